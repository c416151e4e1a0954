"""`moesim offload`: try cache, prefetch and miss policies on a trace and one box."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.cli.inputs import open_trace, phase_of, require_model
from moesim.cli.residency import box_of
from moesim.errors import SimulationError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hwmodels.box import Box
    from moesim.offload.memory import Footprint
    from moesim.offload.policy import OffloadPolicy
    from moesim.offload.trial import Trial
    from planners.residency_file import ResidencyFile
    from traces.layer_steps import LayerSteps
    from traces.model import ModelSpec
    from traces.routing import RoutingTrace

COLUMNS = (
    *("cache", "prefetch", "on miss", "tokens/s", "hit rate", "MB/token", "stall ms/token"),
    *("ahead used", "on CPU", "J/token", "device GB"),
)
_MISSES = {
    "load": "load",
    "load-low": "load_low",
    "cpu": "cpu",
    "split": "hss",
    "threshold": "threshold",
    "skip": "skip",
}
_PLANNED = {"load": "load", "cpu": "cpu", "split": "hss"}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for, as typed; empty text and 0 mean "not said"."""

    trace: str
    system: str = ""
    model: str = ""
    caches: str = "lru"
    prefetch: str = "none"
    on_miss: str = ""
    slots: int = 0
    device_memory: str = ""
    host_memory: str = ""
    drive: str = ""
    bits: float = 16.0
    dense_bits: float = 16.0
    gpus: int = 0
    split: str = "tensor"
    recall: float = -1.0
    budget: int = 1
    distance: int = 1
    batch: int = 1
    phase: str = ""
    kv_tokens: int = 4096
    tokens: int = 100_000
    seed: int = 0
    pim: str = ""
    pim_stacks: int = 5
    shallow: int = 0
    low_bits: float = 0.0
    high_share: float = 1.0
    nested: bool = False


def offload(
    trace: Annotated[str, typer.Argument(help="Routing trace, or `bundled`.")],
    system: Annotated[str, typer.Option(help="Box, such as rtx-4090-xeon-6454s or rtx-4090.")],
    model: Annotated[str, typer.Option(help="Name or config.json; else from the trace.")] = "",
    caches: Annotated[
        str, typer.Option("--cache", help="Policies by name, or FILE.py:CLASS, with commas.")
    ] = "lru",
    prefetch: Annotated[str, typer.Option(help="Predictors by name, with commas.")] = "none",
    on_miss: Annotated[
        str,
        typer.Option(help="load, load-low, cpu, split, threshold or skip [split with a CPU]."),
    ] = "",
    slots: Annotated[
        int, typer.Option(min=0, help="Experts of every layer on the device; else what fits.")
    ] = 0,
    shallow: Annotated[
        int, typer.Option(min=0, help="First layers that hold all experts; the rest share.")
    ] = 0,
    device_memory: Annotated[
        str, typer.Option(help='What may be used of it, such as "20 GiB"; else all.')
    ] = "",
    host_memory: Annotated[str, typer.Option(help="For experts; else the system's.")] = "",
    drive: Annotated[str, typer.Option(help="Drive under host memory, such as nvme-gen4.")] = "",
    bits: Annotated[float, typer.Option(help="Bits per expert weight, scales included.")] = 16.0,
    low_bits: Annotated[float, typer.Option(help="Bits of a second, low-bit copy; 0: none.")] = 0.0,
    high_share: Annotated[
        float,
        typer.Option(max=1.0, help="Share of gate weight served at full bits, the rest at low."),
    ] = 1.0,
    nested: Annotated[
        bool,
        typer.Option("--nested", help="Low bits are part of full ones."),
    ] = False,
    dense_bits: Annotated[float, typer.Option(help="Bits per weight of everything else.")] = 16.0,
    gpus: Annotated[int, typer.Option(min=0, help="Devices in use; 0 for all of a node.")] = 0,
    split: Annotated[str, typer.Option(help="tensor or layers: how devices share.")] = "tensor",
    recall: Annotated[
        float, typer.Option(max=1.0, help="Of next-gate prefetch; -1: as published.")
    ] = -1.0,
    budget: Annotated[int, typer.Option(min=0, help="Loads ahead at most, at each layer.")] = 1,
    distance: Annotated[int, typer.Option(min=1, help="Layers ahead that are predicted.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Requests (decode), tokens (prefill).")] = 1,
    phase: Annotated[str, typer.Option(help="decode, prefill or both; else what is there.")] = "",
    kv_tokens: Annotated[int, typer.Option(min=0, help="Tokens held in the KV cache.")] = 4096,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens that are replayed.")] = 100_000,
    pim: Annotated[
        str, typer.Option(help="PIM stack in the devices' memory, such as duplex-logic-pim.")
    ] = "",
    pim_stacks: Annotated[int, typer.Option(min=1, help="PIM stacks of a device.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")] = 0,
    timeline: Annotated[
        Path | None, typer.Option(help="Write the last pass here for ui.perfetto.dev.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Replay a trace with experts outside the device: hits, bytes, stalls and tokens/s together.

    Several caches and predictors, with commas, are tried against each other on the same tokens.
    """
    wish = Wish(
        trace=trace, system=system, model=model, caches=caches, prefetch=prefetch,
        on_miss=on_miss, slots=slots, device_memory=device_memory, host_memory=host_memory,
        drive=drive, bits=bits, dense_bits=dense_bits, gpus=gpus, split=split, recall=recall,
        budget=budget, distance=distance, batch=batch, phase=phase, kv_tokens=kv_tokens,
        tokens=tokens, seed=seed, pim=pim, pim_stacks=pim_stacks, shallow=shallow,
        low_bits=low_bits, high_share=high_share, nested=nested,
    )  # fmt: skip
    document = run_wish(wish, timeline)
    if as_json:
        output.emit_json(document)
    else:
        show(document)


def run_wish(
    wish: Wish, timeline: Path | None = None, plan: ResidencyFile | None = None
) -> dict[str, Any]:
    """Every combination of caches and predictors, or the policy of a residency plan."""
    if timeline is not None:
        output.check_target(timeline)
    case = _case(wish, plan)
    trials = case.trials
    done: list[dict[str, Any]] = []
    with output.progress(len(trials), "trials") as advance:
        for trial in trials:
            decided, figures = case.try_out(trial)
            done.append(
                {"cache": trial.cache, "prefetch": trial.prefetch, "on_miss": trial.policy.on_miss}
                | figures
            )
            advance(1)
    if timeline is not None:
        _write_timeline(case, decided, timeline)
    return _document(case, done)


@dataclass(frozen=True, slots=True)
class _Case:
    """Everything resolved."""

    wish: Wish
    routing: RoutingTrace
    model: ModelSpec
    box: Box
    work: LayerSteps
    prices: Any
    foot: Footprint
    trials: tuple[Trial, ...]

    def try_out(self, trial: Trial) -> tuple[Any, dict[str, Any]]:
        """One trial on the case's tokens."""
        from moesim.offload.trial import hit_rates_by_convention, try_out

        passes = self.work.passes
        request = self.routing.request[passes.rows[passes.start[:-1]]]
        decided, figures = try_out(trial, self.model, self.prices, self.work, self.foot, request)
        if self.wish.batch == 1:
            routing = self.routing.rows(passes.rows)
            figures["hit_rate_by_convention"] = hit_rates_by_convention(trial, routing)
        return decided, figures


def _case(wish: Wish, plan: ResidencyFile | None) -> _Case:
    from moesim.offload.memory import footprint
    from moesim.offload.prices import Weights, prices
    from traces.layer_steps import forward_passes, layer_steps
    from traces.routing import require_tokens

    evidence, found = open_trace(wish.trace, wish.model or None)
    model = require_model(found, "offloading")
    routing = require_tokens(evidence, "offloading").rows(slice(0, wish.tokens))
    box = box_of(wish.system, wish.drive, wish.host_memory)
    if wish.gpus:
        box = replace(box, n_devices=wish.gpus)
    form = Weights(wish.bits, wish.low_bits, wish.dense_bits, wish.split)
    phase = wish.phase or phase_of(routing, wish.trace)
    passes = forward_passes(routing, wish.batch, phase, seed=wish.seed)  # type: ignore[arg-type]
    work = layer_steps(routing, passes)
    foot = footprint(model, box, form, wish.kv_tokens)
    policy = _policy(wish, box, work, foot) if plan is None else policy_of(plan, work)
    trials = _trials(wish, policy) if plan is None else (_planned_trial(wish, policy, plan),)
    return _Case(wish, routing, model, box, work, prices(model, box, work, form), foot, trials)


def _policy(wish: Wish, box: Box, work: LayerSteps, foot: Footprint) -> OffloadPolicy:
    """Equal slots in every layer, the first experts in them at the start."""
    import numpy as np

    from moesim.offload.policy import OffloadPolicy
    from moesim.offload.prices import Weights, units_of

    wanted = wish.on_miss or ("split" if box.host is not None else "load")
    if wanted not in _MISSES:
        raise SimulationError(f"--on-miss {wanted!r}: expected {', '.join(_MISSES)}")
    low, high = units_of(Weights(wish.bits, wish.low_bits))
    in_layer = _slots_by_layer(wish, box, work, foot)
    warm = np.arange(work.n_experts)[None, :] < in_layer[:, None]
    return OffloadPolicy(
        slots=in_layer * high,
        warm=warm.reshape(-1),
        on_miss=_MISSES[wanted],
        budget=wish.budget,
        units_high=high,
        units_low=low,
        high_share=wish.high_share,
        nested=wish.nested,
    )


def _slots_by_layer(
    wish: Wish, box: Box, work: LayerSteps, foot: Footprint
) -> npt.NDArray[np.int64]:
    """int64[n_layers]: full copies that every layer has room for."""
    import numpy as np

    from planners.slot_split import shallow_first

    slots = min(wish.slots or _slots_that_fit(wish, box, work, foot), work.n_experts)
    if not wish.shallow:
        return np.full(work.n_layers, slots, np.int64)
    total = slots * work.n_layers
    return shallow_first(total, work.n_layers, work.n_experts, wish.shallow)


def _slots_that_fit(wish: Wish, box: Box, work: LayerSteps, foot: Footprint) -> int:
    from hwmodels.units import parse
    from moesim.offload.memory import expert_room_bytes

    device = int(parse(wish.device_memory, "B")) if wish.device_memory else 0
    room = expert_room_bytes(box, foot, device)
    n_layers = foot.n_experts // work.n_experts
    return int(room // foot.expert_bytes // max(1, n_layers))


def _trials(wish: Wish, policy: OffloadPolicy) -> tuple[Trial, ...]:
    from hwmodels.devices import load_device
    from moesim.offload.trial import Trial

    pim = (load_device(wish.pim), wish.pim_stacks) if wish.pim else None
    return tuple(
        Trial(policy, cache, prefetch, _recall(wish), wish.distance, wish.seed, pim, wish.bits)
        for cache in _names(wish.caches)
        for prefetch in _names(wish.prefetch)
    )


def _planned_trial(wish: Wish, policy: OffloadPolicy, plan: ResidencyFile) -> Trial:
    from moesim.offload.trial import Trial

    prefetch = plan.cache.prefetch or "none"
    return Trial(policy, plan.cache.policy or "lru", prefetch, _recall(wish), wish.distance)


def policy_of(plan: ResidencyFile, work: LayerSteps) -> OffloadPolicy:
    """What a residency plan has an engine do: its pins, its slots, its rule for misses."""
    import numpy as np

    from moesim.offload.policy import OffloadPolicy

    tiers = plan.expert_tiers()
    if tiers.shape != (work.n_layers, work.n_experts):
        raise SimulationError(
            f"the plan is for {plan.model}: {tiers.shape[0]} MoE layers of {tiers.shape[1]}"
            f" experts, but the trace holds {work.n_layers} of {work.n_experts}"
        )
    pinned = tiers == 0
    slots = np.array(plan.cache.slots or [0] * work.n_layers, np.int64)
    load = np.where(pinned, -1.0, plan.loads())
    warm = np.zeros(pinned.shape, np.bool_)
    for layer, order in enumerate(np.argsort(-load, axis=1, kind="stable")):
        chosen = order[: slots[layer]]
        warm[layer, chosen[load[layer, chosen] >= 0]] = True
    on_miss = _PLANNED[plan.cache.on_miss]
    return OffloadPolicy("lru", slots, pinned.reshape(-1), warm.reshape(-1), on_miss)


def _recall(wish: Wish) -> float | None:
    return None if wish.recall < 0 else wish.recall


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise SimulationError("name at least one cache and one predictor (`none` for no prefetch)")
    return names


def _document(case: _Case, done: list[dict[str, Any]]) -> dict[str, Any]:
    from moesim.placement_report import versions
    from moesim.residency_report import KINDS
    from traces.routing import content_hash

    return {
        "trials": done,
        "tokens": int(case.work.passes.tokens.sum()),
        "layer_steps": case.work.n_steps,
        "missing_choices": case.work.n_missing,
        "kinds": dict(KINDS),
        "inputs": {
            "request": asdict(case.wish),
            "model": case.model.name,
            "system": case.box.system.name,
            "trace_sha256": content_hash(case.routing),
        },
        "versions": versions(),
        "seed": case.wish.seed,
    }


def _write_timeline(case: _Case, decided: Any, path: Path) -> None:
    from moesim.offload.simulate import timeline_of
    from moesim.timeline import write_chrome_trace

    part, timeline = timeline_of(case.work, decided, case.prices, case.work.passes.n_passes - 1)
    write_chrome_trace(part.program, timeline, path, part.names())
    output.note(f"wrote {path}; open it in ui.perfetto.dev")


def show(document: dict[str, Any]) -> None:
    """The trials as a table."""
    inputs = document["inputs"]
    title = f"{inputs['model']} on {inputs['system']}, {document['tokens']:,} tokens"
    rows = [
        (
            done["cache"], done["prefetch"], done["on_miss"], done["tokens_per_s"],
            done["hit_rate"], done["bytes_per_token"] / 1e6, done["stall_s_per_token"] * 1e3,
            done["useful_ahead_share"], done["cpu_share"], done["joules_per_token"],
            done["device_bytes"] / 1e9,
        )
        for done in document["trials"]
    ]  # fmt: skip
    output.table(title, COLUMNS, rows, left=3)
    first = document["trials"][0]
    output.say(
        f"rho {first['rho']:.2f}, {first['share_of_experts']:.0%} of the experts in slots;"
        f" {document['missing_choices']:,} choices are missing from the trace"
    )
