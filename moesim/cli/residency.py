"""`moesim plan residency`: what stays in fast memory, beside what engines do without a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.cli.inputs import open_trace, require_model
from moesim.errors import SimulationError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hwmodels.box import Box
    from moesim.residency_candidates import ResidencyOptions
    from moesim.residency_study import ResidencyStudy
    from traces.model import ModelSpec
    from traces.routing import RoutingTrace

COLUMNS = (
    *("candidate", "tokens/s", "hit rate", "MB/token", "stall ms/token", "J/token"),
    *("on CPU", "device GB"),
)
ON_MISS_DEFAULT = "split where there is a CPU, else load"
_MISSES = {"load": "load", "cpu": "cpu", "split": "hss"}


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for, as typed; empty text and 0 mean "not said"."""

    trace: str
    judge: str
    share: float
    model: str
    system: str
    drive: str
    bits: float
    low_bits: float
    low_share: float
    dense_bits: float
    batch: int
    phase: str
    kv_tokens: int
    device_memory: str
    host_memory: str
    on_miss: str
    current: str
    recall: float
    least_gain: float
    tokens: int
    seed: int
    pin: str


def residency(
    trace: Annotated[str, typer.Argument(help="Routing trace to plan on, or `bundled`.")],
    system: Annotated[str, typer.Option(help="Box, such as rtx-4090-xeon-6454s or rtx-4090.")],
    judge: Annotated[str, typer.Option(help="Judge on this trace; else on a held-out part.")] = "",
    share: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="Share of the trace that is planned on.")
    ] = 0.5,
    model: Annotated[str, typer.Option(help="Name or config.json; else from the trace.")] = "",
    drive: Annotated[
        str, typer.Option(help="Drive under host memory, such as nvme-gen4; none without.")
    ] = "",
    bits: Annotated[float, typer.Option(help="Bits per expert weight, scales included.")] = 16.0,
    low_bits: Annotated[float, typer.Option(help="Bits that some experts may have.")] = 0.0,
    low_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Most activations at the low bits.")
    ] = 0.0,
    dense_bits: Annotated[float, typer.Option(help="Bits per weight of everything else.")] = 16.0,
    batch: Annotated[int, typer.Option(min=1, help="Requests (decode), tokens (prefill).")] = 1,
    phase: Annotated[str, typer.Option(help="decode, prefill or both; else what is there.")] = "",
    kv_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens held in the KV cache, all requests together.")
    ] = 4096,
    device_memory: Annotated[
        str, typer.Option(help='What may be used of it, such as "20 GiB"; else all.')
    ] = "",
    host_memory: Annotated[
        str, typer.Option(help="Host memory for experts; else the system's.")
    ] = "",
    on_miss: Annotated[str, typer.Option(help=f"load, cpu or split [{ON_MISS_DEFAULT}].")] = "",
    current: Annotated[
        str, typer.Option(help="What runs today: best, or an incumbent's name.")
    ] = "best",
    recall: Annotated[
        float,
        typer.Option(max=1.0, help="Next-gate recall of the prefetching incumbent; -1: published."),
    ] = -1.0,
    least_gain: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the time that a plan must save.")
    ] = 0.01,
    pin: Annotated[
        str,
        typer.Option(
            help='Experts that must stay at full bits, "layer:expert,...", absolute layers.'
        ),
    ] = "",
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each part.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the plan and its proof.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 when the plan is not worth it.")
    ] = False,
) -> None:
    """Decide which experts, attention weights and KV caches stay in which memory.

    The knapsack's plan is simulated on unseen tokens beside uniform LRU, LRU with next-gate
    prefetch, frequency pinning and whole layers, all with the same rule for misses, and beside two
    oracles that no engine can run.
    """
    request = Request(
        trace=trace, judge=judge, share=share, model=model, system=system, drive=drive, bits=bits,
        low_bits=low_bits, low_share=low_share, dense_bits=dense_bits, batch=batch, phase=phase,
        kv_tokens=kv_tokens, device_memory=device_memory, host_memory=host_memory,
        on_miss=on_miss, current=current, recall=recall, least_gain=least_gain, tokens=tokens,
        seed=seed, pin=pin,
    )  # fmt: skip
    study, document = _carry_out(request, out)
    if as_json:
        output.emit_json(document)
    else:
        show(document)
    if strict and study.verdict != "deploy":
        raise typer.Exit(1)


def _carry_out(request: Request, folder: Path | None) -> tuple[ResidencyStudy, dict[str, Any]]:
    from moesim.residency_report import study_document
    from moesim.residency_study import residency_study

    routing, model = _routing(request.trace, request.model)
    judged = _routing(request.judge, request.model)[0] if request.judge else None
    box = box_of(request.system, request.drive, request.host_memory)
    options = _options(request, box, routing, model)
    with output.progress(None, "plan and judge") as advance:
        study = residency_study(routing, model, box, options, judged, lambda _: advance(1))
    document = study_document(study, _inputs(request, model, box, routing, options))
    if folder is not None:
        _write(study, model, options, document, output.result_folder(folder))
    return study, document


def box_of(system: str, drive: str, host_memory: str) -> Box:
    """The box a user names, with host memory as typed."""
    from hwmodels.box import load_box
    from hwmodels.units import parse

    held = int(parse(host_memory, "B")) if host_memory else 0
    return load_box(system, drive, held)


def _routing(text: str, name: str) -> tuple[RoutingTrace, ModelSpec]:
    from traces.routing import require_tokens

    found, spec = open_trace(text, name or None)
    return require_tokens(found, "a residency plan"), require_model(spec, "a residency plan")


def _options(
    request: Request, box: Box, routing: RoutingTrace, model: ModelSpec
) -> ResidencyOptions:
    from hwmodels.units import parse
    from moesim.cli.inputs import phase_of
    from moesim.offload.prices import Weights
    from moesim.residency_candidates import ResidencyOptions

    wanted = request.on_miss or ("split" if box.host is not None else "load")
    if wanted not in _MISSES:
        raise SimulationError(f"--on-miss {wanted!r}: expected {', '.join(_MISSES)}")
    if wanted != "load" and box.host is None:
        raise SimulationError(
            f"--on-miss {wanted}: {box.system.name} has no CPU in the catalogue; name a system"
            " with a host, or use load"
        )
    device = int(parse(request.device_memory, "B")) if request.device_memory else 0
    return ResidencyOptions(
        weights=Weights(request.bits, request.low_bits, request.dense_bits),
        batch_size=request.batch,
        phase=request.phase or phase_of(routing, request.trace),  # type: ignore[arg-type]
        kv_tokens=request.kv_tokens,
        device_bytes=device,
        on_miss=_MISSES[wanted],
        low_share=request.low_share,
        pinned=pinned_experts(request.pin, model),
        current=request.current,
        least_gain=request.least_gain,
        recall=None if request.recall < 0 else request.recall,
        most_tokens=request.tokens,
        share=request.share,
        seed=request.seed,
    )


def pinned_experts(text: str, model: ModelSpec) -> npt.NDArray[np.bool_] | None:
    """bool[moe_layers, n_experts] of "layer:expert,...", None for none.

    raises  SimulationError for what is no MoE layer or expert of the model
    """
    import numpy as np

    if not text:
        return None
    rows = {layer: row for row, layer in enumerate(model.moe_layers)}
    marked = np.zeros((model.n_moe_layers, model.n_experts), np.bool_)
    for item in text.split(","):
        layer, _, expert = item.strip().partition(":")
        if not (layer.isdecimal() and expert.isdecimal()):
            raise SimulationError(f"--pin {item.strip()!r}: expected layer:expert, such as 3:54")
        if int(layer) not in rows or int(expert) >= model.n_experts:
            raise SimulationError(
                f"--pin {item.strip()}: {model.name} has MoE layers {model.moe_layers[0]}.."
                f"{model.moe_layers[-1]} of {model.n_experts} experts"
            )
        marked[rows[int(layer)], int(expert)] = True
    return marked


def _inputs(
    request: Request, model: ModelSpec, box: Box, routing: RoutingTrace, options: ResidencyOptions
) -> dict[str, Any]:
    from traces.routing import content_hash

    return {
        "request": asdict(request),
        "model": model.name,
        "top_k": model.top_k,
        "system": box.system.name,
        "phase": options.phase,
        "on_miss": options.on_miss,
        "expert_bits": options.weights.expert_bits,
        "trace_sha256": content_hash(routing),
        "seed": request.seed,
    }


def _write(
    study: ResidencyStudy,
    model: ModelSpec,
    options: ResidencyOptions,
    document: dict[str, Any],
    folder: Path,
) -> None:
    """Plan, record, table, pictures and a page that shows them, into the folder."""
    from moesim.report.html import Section, page
    from moesim.residency_report import plan_file, write_pictures
    from planners.keep_sets import require_pinned
    from planners.residency_file import write_residency
    from traces.files import write_text

    plan = plan_file(study, model, options, document)
    if options.pinned is not None:
        require_pinned(plan, options.pinned, options.weights.expert_bits)
    write_residency(plan, folder / "plan.json")
    output.write_json(folder / "result.json", document)
    output.write_csv(folder / "table.csv", COLUMNS, rows(document))
    pictures = write_pictures(study, model, folder)
    cells = [[output.shown(cell) for cell in row] for row in rows(document)]
    sections = [
        Section("What it says", text=sentences(document)),
        Section(_title(document), columns=list(COLUMNS), rows=cells, pictures=pictures),
        Section("Use it", code="moesim export plan.json --to llama-cpp -o overrides.txt"),
    ]
    write_text(
        folder / "report.html",
        page(f"A residency plan for {document['inputs']['model']}", sections),
    )


def rows(document: dict[str, Any]) -> list[tuple[object, ...]]:
    """A row per candidate, in the order of COLUMNS."""
    return [
        (
            name,
            speed,
            document["hit_rate"][name],
            document["bytes_per_token"][name] / 1e6,
            document["stall_s_per_token"][name] * 1e3,
            document["joules_per_token"][name],
            document["cpu_share"][name],
            document["device_bytes"][name] / 1e9,
        )
        for name, speed in document["tokens_per_s"].items()
    ]


def show(document: dict[str, Any]) -> None:
    """The study for people: a table, then what it means."""
    output.table(_title(document), COLUMNS, rows(document))
    for sentence in sentences(document):
        output.say(sentence)


def _title(document: dict[str, Any]) -> str:
    inputs = document["inputs"]
    return (
        f"{inputs['model']} at {inputs['expert_bits']:g} bits on {inputs['system']},"
        f" {inputs['phase']}, misses: {inputs['on_miss']}"
    )


def sentences(document: dict[str, Any]) -> list[str]:
    """What a study means, a line each."""
    gain = document["gain"]
    said = [
        f"Verdict: {document['verdict'].replace('_', ' ')}. Against {document['compared_with']} the"
        f" plan saves {gain['mean']:.1%} of the time (95 % between {gain['low']:.1%} and"
        f" {gain['high']:.1%} over {gain['requests']} requests).",
    ]
    if document["reason"]:
        said.append(f"No plan helps: {document['reason']}.")
    said.append(
        f"{document['pinned_experts']:,} experts pinned, {sum(document['slots']):,} slots of an LRU"
        f" cache ({document['pin_share']:.0%} of the room is pinned)."
    )
    said.append(_regret(document))
    said.append(
        f"{document['slots_that_fit_per_layer']} experts a layer fit (rho {document['rho']:.2f});"
        f" random routing would hit {document['random_floor']:.0%}; the knee of the LRU curve is at"
        f" {document['knee_slots']} slots."
    )
    said += [f"Left out: {name}: {why}" for name, why in document["left_out"].items()]
    said.append(
        f"Placed within {document['gap']:.2%} of the bound in {document['solve_seconds']:.2f} s;"
        f" judged on {document['judged_tokens']:,} unseen tokens."
    )
    return said


def _regret(document: dict[str, Any]) -> str:
    against = {"the best pinning in hindsight": "regret", "a clairvoyant cache": "over_belady"}
    parts = [
        f"{100 * document[key]:+.1f} % against {name}"
        for name, key in against.items()
        if document[key] == document[key]
    ]
    return f"Time on unseen tokens: {', '.join(parts)}." if parts else "No oracle could be run."
