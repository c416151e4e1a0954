"""`moesim export`: a plan as the file of the engine that will run it, and the flags."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.cli.plan_kinds import plan_kind

if TYPE_CHECKING:
    from planners.export.record import Export
    from planners.residency_file import ResidencyFile

PLACEMENT = ("sglang",)
RESIDENCY = (
    "ktransformers", "ktransformers-yaml", "llama-cpp", "sglang-paged", "moe-infinity",
    "device-map",
)  # fmt: skip
ENGINES = (*PLACEMENT, *RESIDENCY)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to write, and what single engines need to know beside the plan."""

    file: Path
    model: str
    rules: Path | None
    offload_folder: str
    device_memory: str
    host_memory: str
    device_buffer: str


def export(
    plan: Annotated[Path, typer.Argument(help="Plan file that `moesim plan` wrote.")],
    to: Annotated[str, typer.Option("--to", help=f"Engine: {', '.join(ENGINES)}.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The engine's file.")],
    all_to_all: Annotated[
        str, typer.Option(help="SGLang's --moe-a2a-backend for the launch line.")
    ] = "deepep",
    model: Annotated[
        str, typer.Option(help="The model's config.json, for device-map; else the plan's.")
    ] = "",
    rules: Annotated[
        Path | None, typer.Option(help="The model's own rule file, for ktransformers-yaml.")
    ] = None,
    offload_folder: Annotated[
        str, typer.Option(help="Folder on disk, for moe-infinity (required) and device-map.")
    ] = "",
    device_memory: Annotated[
        str, typer.Option(help="Whole memory of the GPU, such as 24GB, for moe-infinity.")
    ] = "",
    host_memory: Annotated[
        str, typer.Option(help="Whole memory of the host, such as 128GiB, for moe-infinity.")
    ] = "",
    device_buffer: Annotated[
        str, typer.Option(help="llama.cpp's name of the GPU's buffers: CUDA0, Metal, Vulkan0.")
    ] = "CUDA0",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Write a plan as an engine's own file and say how to launch with it.

    Engines that take no single experts get the nearest plan they can hold; what that costs is said.
    """
    from planners.errors import PlanError

    if to not in ENGINES:
        raise PlanError(f"engine {to!r} is unknown, known: {', '.join(ENGINES)}")
    _check_kind(plan, to)
    if to in PLACEMENT:
        _placement(plan, out, all_to_all, as_json)
        return
    target = Target(out, model, rules, offload_folder, device_memory, host_memory, device_buffer)
    _residency(plan, to, target, as_json)


def _check_kind(plan: Path, to: str) -> None:
    """PlanError when the plan is of the kind that other engines take."""
    from planners.errors import PlanError

    kind = plan_kind(plan)
    for other, engines in (("residency", RESIDENCY), ("placement", PLACEMENT)):
        if kind == other and to not in engines:
            raise PlanError(
                f"{plan}: kind is {kind!r}, which {to} does not take; it is for:"
                f" {', '.join(engines)}"
            )


def _placement(plan: Path, out: Path, all_to_all: str, as_json: bool) -> None:
    from planners.export import sglang
    from planners.planfile import read_plan

    written = sglang.write(read_plan(plan), out, all_to_all)
    if as_json:
        output.emit_json(
            {"file": written.map_file, "sidecar": written.sidecar, "flags": list(written.flags)}
        )
        return
    output.say(f"Wrote {written.map_file}; where it comes from is in {written.sidecar}.")
    output.say("Launch with:")
    output.say("  python -m sglang.launch_server --model-path MODEL " + shlex.join(written.flags))


def _residency(plan: Path, to: str, target: Target, as_json: bool) -> None:
    from planners.errors import PlanError
    from planners.residency_file import read_residency

    read = read_residency(plan)
    output.check_target(target.file)
    try:
        written = _WRITERS[to](read, target)
    except PlanError as error:
        other_files = tuple(f"{file}: " for file in (target.file, target.rules, target.model))
        named = str(error).startswith(other_files)
        raise PlanError(str(error) if named else f"{plan}: {error}") from error
    if as_json:
        output.emit_json(_document(to, written))
    else:
        _show(written)


def _ktransformers(plan: ResidencyFile, target: Target) -> Export:
    from planners.export import ktransformers

    return ktransformers.write(plan, target.file)


def _ktransformers_yaml(plan: ResidencyFile, target: Target) -> Export:
    from planners.export import ktransformers_yaml

    return ktransformers_yaml.write(plan, target.file, target.rules)


def _llama_cpp(plan: ResidencyFile, target: Target) -> Export:
    from planners.export import llama_cpp

    return llama_cpp.write(plan, target.file, target.device_buffer)


def _sglang_paged(plan: ResidencyFile, target: Target) -> Export:
    from planners.export import sglang_paged

    return sglang_paged.write(plan, target.file)


def _moe_infinity(plan: ResidencyFile, target: Target) -> Export:
    from hwmodels.units import parse
    from planners.errors import PlanError
    from planners.export import moe_infinity

    if not (target.device_memory and target.offload_folder):
        raise PlanError(
            "moe-infinity takes shares of the whole memory and a folder for the weights: give"
            " --device-memory and --offload-folder"
        )
    machine = moe_infinity.Machine(
        device_bytes=int(parse(target.device_memory, "B")),
        offload_path=target.offload_folder,
        host_bytes=int(parse(target.host_memory, "B")) if target.host_memory else 0,
    )
    return moe_infinity.write(plan, target.file, machine)


def _device_map(plan: ResidencyFile, target: Target) -> Export:
    from planners.export import device_map, hf_modules

    shapes = hf_modules.tensor_shapes(Path(target.model or plan.model))
    return device_map.write(plan, target.file, shapes, target.offload_folder or "offload")


_WRITERS: Mapping[str, Callable[[ResidencyFile, Target], Export]] = {
    "ktransformers": _ktransformers,
    "ktransformers-yaml": _ktransformers_yaml,
    "llama-cpp": _llama_cpp,
    "sglang-paged": _sglang_paged,
    "moe-infinity": _moe_infinity,
    "device-map": _device_map,
}


def _document(to: str, written: Export) -> dict[str, Any]:
    """The result for scripts; granularity and override_flags where the engine has them."""
    loss = output.plain(written.loss) | {"lost_share": written.loss.lost_share}
    more = {
        name: list(value) if isinstance(value, tuple) else value
        for name in ("granularity", "override_flags")
        if (value := getattr(written, name, None)) is not None
    }
    return {
        "engine": to,
        "file": written.file,
        "sidecar": written.sidecar,
        "flags": list(written.flags),
        "launch": written.launch,
        "loss": loss,
        "notes": list(written.notes),
        **more,
    }


def _show(written: Export) -> None:
    loss = written.loss
    output.say(f"Wrote {written.file}; where it comes from is in {written.sidecar}.")
    output.say("Launch with:")
    output.say(f"  {written.launch}")
    overrides = getattr(written, "override_flags", ())
    if overrides and overrides != written.flags:
        output.say("The same as overrides, for versions without --n-cpu-moe:")
        output.say(f"  {shlex.join(overrides)}")
    pairs = {
        "planned, pinned": loss.plan_device_share,
        "as exported": loss.device_share,
        "known by": loss.device_share_kind,
        "at most, in its room": loss.device_share_at_most,
        "lost": loss.lost_share,
        "planned bytes": loss.plan_device_bytes,
        "planned bytes of cache": loss.plan_cache_bytes,
        "exported bytes": loss.device_bytes,
        "layers without a load": loss.layers_without_load,
    }
    output.facts("Activations of routed experts served by the device:", pairs)
    for text in written.notes:
        output.say(f"* {text}")
