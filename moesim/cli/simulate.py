"""`moesim simulate`: run steps of a trace under a plan, beside the contiguous placement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.cli.inputs import (
    open_trace,
    phase_of,
    require_model,
    usual_tokens_per_rank,
)
from moesim.cli.plan_kinds import is_residency
from moesim.cli.simulate_report import CSV_COLUMNS, csv_rows, show
from moesim.errors import SimulationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwmodels.system import System
    from moesim.lower.layer_costs import StepOptions
    from moesim.simulate import Result, Setting
    from planners.plan import Placement
    from planners.planfile import PlanFile
    from traces.model import ModelSpec
    from traces.routing import ExpertCounts, RoutingTrace

    Input = RoutingTrace | ExpertCounts


def simulate(
    trace: Annotated[
        str, typer.Option("--trace", "-t", help="Routing trace or expert counts, or `bundled`.")
    ],
    plan: Annotated[
        Path | None, typer.Option("--plan", "-p", help="Plan file; else contiguous placement.")
    ] = None,
    system: Annotated[
        str, typer.Option(help="Cluster, such as h800x32; else the one planned for.")
    ] = "",
    model: Annotated[
        str, typer.Option(help="Name or config.json; else the one planned for, or the trace's.")
    ] = "",
    phase: Annotated[
        str, typer.Option(help="decode or prefill; else the plan's, or what the trace has.")
    ] = "",
    tokens_per_rank: Annotated[
        int, typer.Option(min=0, help="Tokens of a step on a rank; else the plan's [128, 2048].")
    ] = 0,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the KV cache per request.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Steps to run at most.")] = 32,
    send: Annotated[str, typer.Option(help="One copy per device, node or expert.")] = "device",
    replica_rule: Annotated[
        str, typer.Option(help="even, or local: the nearest replica.")
    ] = "even",
    two_batch_overlap: Annotated[
        bool, typer.Option("--two-batch-overlap", help="Two half batches, overlapped.")
    ] = False,
    shared_overlap: Annotated[
        bool, typer.Option("--shared-overlap", help="Shared experts run during dispatch.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")] = 0,
    timeline: Annotated[
        Path | None, typer.Option(help="Write the first step here for ui.perfetto.dev.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for record, table, pictures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Run steps of a trace: seconds by component, tokens per second, dollars, bytes."""
    wish = _Wish(
        trace=trace,
        system=system,
        model=model,
        phase=phase,
        tokens_per_rank=tokens_per_rank,
        context=context,
        steps=steps,
        send=send,
        replica_rule=replica_rule,
        two_batch_overlap=two_batch_overlap,
        shared_overlap=shared_overlap,
        seed=seed,
    )
    if plan is not None and is_residency(plan):
        _simulate_residency(wish, plan, timeline, as_json)
        return
    document = _run(wish, plan, timeline, out)
    if as_json:
        output.emit_json(document)
    else:
        show(document)


def _simulate_residency(wish: _Wish, path: Path, timeline: Path | None, as_json: bool) -> None:
    """A residency plan is run on its box, one request after the other, as `moesim offload` does."""
    from moesim.cli import offload
    from planners.residency_file import read_residency

    plan = read_residency(path)
    planned = plan.inputs.get("request", {})
    asked = offload.Wish(
        trace=wish.trace,
        system=wish.system or str(plan.inputs.get("system", "")),
        model=wish.model or plan.model,
        drive=str(planned.get("drive", "")),
        bits=float(plan.inputs.get("expert_bits", 16.0)),
        phase=wish.phase or str(plan.inputs.get("phase", "")),
        seed=wish.seed,
    )
    document = offload.run_wish(asked, timeline, plan)
    if as_json:
        output.emit_json(document)
    else:
        offload.show(document)


def _run(wish: _Wish, plan: Path | None, timeline: Path | None, out: Path | None) -> dict[str, Any]:
    """Run every placement, write what was asked for, and give the record."""
    if timeline is not None:
        output.check_target(timeline)
    case = _case(wish, plan)
    with output.progress(None, f"simulate up to {wish.steps} steps"):
        results = {name: _results(case, placement) for name, placement in case.placements.items()}
    document = _document(case, results)
    if timeline is not None:
        _write_timeline(case, timeline)
    if out is not None:
        _write_folder(case, results, document, output.result_folder(out))
    return document


@dataclass(frozen=True, slots=True)
class _Wish:
    """What the user asked for, as typed; empty text and 0 mean "not said"."""

    trace: str
    system: str
    model: str
    phase: str
    tokens_per_rank: int
    context: int
    steps: int
    send: str
    replica_rule: str
    two_batch_overlap: bool
    shared_overlap: bool
    seed: int


@dataclass(frozen=True, slots=True)
class _Case:
    """Everything resolved: what runs on what, under which placements ("plan" last, if any)."""

    wish: _Wish
    evidence: Input
    setting: Setting
    placements: dict[str, Placement]
    plan_path: Path | None


def _case(wish: _Wish, plan_path: Path | None) -> _Case:
    from moesim.simulate import Setting
    from planners.planfile import read_plan

    plan = None if plan_path is None else read_plan(plan_path)
    evidence, found = open_trace(wish.trace, wish.model or _planned_model(plan))
    model = require_model(found, "simulation")
    system = _system(wish, plan)
    setting = Setting(model, system, _options(wish, plan, evidence, system))
    placements = _placements(plan, model, system)
    return _Case(wish, evidence, setting, placements, plan_path)


def _placements(plan: PlanFile | None, model: ModelSpec, system: System) -> dict[str, Placement]:
    """Contiguous, in as many slots as the plan has; and the plan."""
    from planners.incumbents import Shape, contiguous
    from planners.step_time import check_system

    n_slots = -(-model.n_experts // system.n_devices) * system.n_devices
    planned: dict[str, Placement] = {}
    if plan is None:
        output.note(f"no --plan: contiguous placement in {n_slots} slots")
    else:
        _check_plan(plan, model)
        planned["plan"] = plan.placement()
        check_system(planned["plan"], system)
        n_slots = plan.n_slots
    shape = Shape(system.n_devices, n_slots, min(system.devices_per_node, system.n_devices))
    return {"contiguous": contiguous(model.n_moe_layers, model.n_experts, shape)} | planned


def _planned_model(plan: PlanFile | None) -> str | None:
    """The model a plan is for, if the catalogue has it; a plan is a file, its name no path."""
    from traces.errors import TraceError
    from traces.models import catalog_entry

    if plan is None:
        return None
    try:
        return catalog_entry(plan.model).name
    except TraceError:
        output.note(f"the plan is for {plan.model!r}, which is not in the catalogue")
        return None


def _check_plan(plan: PlanFile, model: ModelSpec) -> None:
    if plan.moe_layers != model.moe_layers or plan.n_experts != model.n_experts:
        raise SimulationError(
            f"the plan is for {plan.model}: {len(plan.moe_layers)} MoE layers of {plan.n_experts}"
            f" experts, but model {model.name} has {model.n_moe_layers} of {model.n_experts}"
        )


def _system(wish: _Wish, plan: PlanFile | None) -> System:
    from hwmodels.systems import load_system

    planned = "" if plan is None else str(plan.inputs.get("system", ""))
    name = wish.system or planned
    if not name:
        raise SimulationError("where will it run? pass --system, such as h800x32")
    if name == planned and name.endswith(".toml"):
        raise SimulationError("the plan names a system file; pass it with --system")
    system = load_system(name)
    if plan is not None and not wish.system and plan.ranks_per_node < system.n_devices:
        return replace(system, devices_per_node=plan.ranks_per_node)  # as planned with --nodes
    return system


def _options(wish: _Wish, plan: PlanFile | None, evidence: Input, system: System) -> StepOptions:
    from moesim.lower.layer_costs import StepOptions
    from planners.dispatch import MODES, RULES

    choices = (("--send", wish.send, MODES), ("--replica-rule", wish.replica_rule, RULES))
    for flag, value, known in choices:
        if value not in known:
            raise SimulationError(f"{flag} {value!r} is unknown, known: {', '.join(known)}")
    planned = {} if plan is None else plan.inputs
    phase = wish.phase or str(planned.get("phase") or phase_of(evidence, wish.trace))
    tokens = wish.tokens_per_rank
    if not tokens and phase == planned.get("phase"):
        tokens = _whole(planned.get("tokens_per_rank"))
    return StepOptions(
        tokens_per_rank=tokens or usual_tokens_per_rank(evidence, phase, system.n_devices),
        phase=phase,  # type: ignore[arg-type]  # StepOptions checks it
        context=wish.context,
        two_batch_overlap=wish.two_batch_overlap,
        shared_overlap=wish.shared_overlap,
        mode=wish.send,  # type: ignore[arg-type]
        rule=wish.replica_rule,  # type: ignore[arg-type]
    )


def _whole(value: object) -> int:
    """A positive whole number of a plan's inputs, 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _results(case: _Case, placement: Placement) -> Result:
    """All placements run the same steps, so that they can be compared step by step."""
    from moesim.simulate import simulate_counts, simulate_steps
    from traces.routing import ExpertCounts

    wish = case.wish
    if isinstance(case.evidence, ExpertCounts):
        return simulate_counts(case.evidence, placement, case.setting, wish.steps, wish.seed)
    return simulate_steps(case.evidence, placement, case.setting, _rows(case))


def _rows(case: _Case) -> Any:
    """int64[steps, tokens_per_step], token rows of the steps that are run."""
    from traces.batches import steps
    from traces.routing import require_tokens

    trace = require_tokens(case.evidence, "a step of real tokens")
    setting = case.setting
    made = steps(trace, setting.tokens_per_step, setting.options.phase, case.wish.seed)
    return made.rows[: case.wish.steps]


def _document(case: _Case, results: dict[str, Result]) -> dict[str, Any]:
    """The record: figures by placement, how each is known, and what went in."""
    from moesim.placement_report import versions

    last = results[next(reversed(results))]
    options = case.setting.options
    per_placement: dict[str, Callable[[Result], object]] = {
        "step_time_s": lambda r: float(r.seconds.mean()),
        "slowest_step_s": lambda r: float(r.seconds.max()),
        "tokens_per_s": lambda r: r.tokens_per_s,
        "usd_per_million_tokens": lambda r: r.usd_per_million_tokens,
        "joules_per_token": lambda r: r.joules_per_token,
        "max_over_mean": lambda r: float(r.max_over_mean.mean()),
        "bytes_per_token": lambda r: dict(r.bytes_per_token),
        "breakdown_s": lambda r: dict(r.breakdown_s),
        "per_layer_max_over_mean": lambda r: r.max_over_mean.tolist(),
    }
    document: dict[str, Any] = {
        key: {name: figure(result) for name, result in results.items()}
        for key, figure in per_placement.items()
    }
    return document | {
        "steps": last.n_steps,
        "tokens_per_step": last.tokens_per_step,
        "kinds": dict(last.kinds),
        "inputs": {
            "trace": case.wish.trace,
            "plan": None if case.plan_path is None else str(case.plan_path),
            "devices_per_node": case.setting.system.devices_per_node,
            "slots": next(iter(case.placements.values())).n_slots,
            "phase": options.phase,
            "tokens_per_rank": options.tokens_per_rank,
            "context": options.context,
            "send": options.mode,
            "replica_rule": options.rule,
            "two_batch_overlap": options.two_batch_overlap,
            "shared_overlap": options.shared_overlap,
            **dict(last.inputs),
        },
        "versions": versions(),
        "seed": case.wish.seed,
    }


def _write_timeline(case: _Case, path: Path) -> None:
    """The first step, under the plan when there is one."""
    from moesim.engine import run
    from moesim.simulate import step_timeline
    from moesim.timeline import write_chrome_trace
    from traces.routing import require_tokens

    trace = require_tokens(case.evidence, "--timeline")
    placement = list(case.placements.values())[-1]
    program, names = step_timeline(trace, placement, case.setting, _rows(case)[0])
    write_chrome_trace(program, run(program), path, names)
    output.note(f"wrote {path}; open it in ui.perfetto.dev")


def _write_folder(
    case: _Case, results: dict[str, Result], document: dict[str, Any], folder: Path
) -> None:
    """result.json, table.csv and the pictures."""
    from moesim.report.breakdown import step_breakdown
    from moesim.report.heatmap import rank_load_heatmaps
    from planners.plan import rank_loads
    from traces.routing import ExpertCounts, expert_counts

    evidence = case.evidence
    counts = evidence if isinstance(evidence, ExpertCounts) else expert_counts(evidence)
    loads = {name: rank_loads(p, counts.counts) for name, p in case.placements.items()}
    output.write_json(folder / "result.json", document)
    output.write_csv(folder / "table.csv", CSV_COLUMNS, csv_rows(document))
    rank_load_heatmaps(loads, folder / "rank_load.png", counts.layers)
    step_breakdown(
        {name: dict(r.breakdown_s) for name, r in results.items()}, folder / "step_time.png"
    )
