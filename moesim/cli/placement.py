"""What `moesim plan placement` and `moesim demo` do: resolve inputs, study, write, show."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli import output
from moesim.cli.inputs import open_trace, phase_of, require_model, usual_tokens_per_rank
from moesim.errors import SimulationError

if TYPE_CHECKING:
    from hwmodels.system import System
    from moesim.lower.layer_costs import StepOptions
    from moesim.placement_study import Study, StudyOptions
    from planners.plan import Placement
    from traces.model import ModelSpec
    from traces.routing import ExpertCounts, RoutingTrace

    Input = RoutingTrace | ExpertCounts

DEFAULT_DEVICE = "h200"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for, as typed; empty text and 0 mean "not said"."""

    trace: str
    judge: str = ""
    share: float = 0.5
    split: str = "request"
    model: str = ""
    system: str = ""
    ranks: int = 0
    nodes: int = 0
    slots: int = 0
    phase: str = ""
    tokens_per_rank: int = 0
    context: int = 2048
    send: str = "device"
    replica_rule: str = "even"
    two_batch_overlap: bool = False
    node_limited: bool = False
    keep_balance: bool | None = None
    current: str = "contiguous"
    drift: float = 0.3
    least_gain: float = 0.01
    steps: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request with everything it names opened: what is planned on, for what, judged on what."""

    request: Request
    model: ModelSpec
    system: System
    planned: Input
    judged: Input | None
    options: StudyOptions


def run(request: Request, folder: Path | None) -> dict[str, Any]:
    """Study the request; write plan, record, table and pictures when a folder is given.

    returns  the document that `--json` prints
    """
    evidence, spec = open_trace(request.trace, request.model or None)
    resolved = resolve(request, evidence, require_model(spec, "a placement plan"))
    study, document = carry_out(resolved)
    if folder is not None:
        write(resolved, study, document, folder)
    return document


def resolve(request: Request, evidence: Input, model: ModelSpec) -> Resolved:
    """Everything the request names beside the trace and the model."""
    _require_all_layers(request.trace, evidence, model)
    planned, judged = _parts(request, evidence, model)
    system = _system(request)
    options = _options(request, model, system, planned, judged)
    return Resolved(request, model, system, planned, judged, options)


def carry_out(resolved: Resolved) -> tuple[Study, dict[str, Any]]:
    """The study and its document."""
    from moesim.placement_report import study_document
    from moesim.placement_study import placement_study

    with output.progress(None, "plan and judge"):
        study = placement_study(
            resolved.model, resolved.system, resolved.planned, resolved.judged, resolved.options
        )
    return study, study_document(study, _inputs(resolved))


def write(resolved: Resolved, study: Study, document: dict[str, Any], folder: Path) -> None:
    """Plan, record, table, pictures and a page that shows them, into the folder."""
    from moesim.placement_report import plan_file, write_pictures
    from planners.planfile import write_plan
    from traces.files import write_text

    output.result_folder(folder)
    plan = plan_file(study, resolved.model, resolved.system, resolved.options, document)
    write_plan(plan, folder / "plan.json")
    output.write_json(folder / "result.json", document)
    output.write_csv(folder / "table.csv", COLUMNS, rows(document))
    judged = resolved.planned if resolved.judged is None else resolved.judged
    pictures = write_pictures(study, judged, folder)
    write_text(folder / "report.html", _page(document, pictures))


def _page(document: dict[str, Any], pictures: list[Path]) -> str:
    """The study as one page of HTML."""
    from moesim.report.html import Section, page

    cells = [[output.shown(cell) for cell in row] for row in rows(document)]
    return page(
        f"A placement plan for {document['inputs']['model']}",
        [
            Section("What it says", text=sentences(document)),
            Section(_title(document), columns=_headings(), rows=cells, pictures=pictures),
            Section("Use it", code="moesim export plan.json --to sglang -o placement.json"),
        ],
    )


def _parts(request: Request, evidence: Input, model: ModelSpec) -> tuple[Input, Input | None]:
    """What is planned on, and what is judged on (None: the same counts)."""
    from traces.edit import split
    from traces.routing import ExpertCounts

    if request.judge:
        judged, spec = open_trace(request.judge, request.model or None)
        _require_all_layers(request.judge, judged, spec or model)
        return evidence, judged
    if isinstance(evidence, ExpertCounts):
        return evidence, None
    parts = split(evidence, request.share, request.split, request.seed)  # type: ignore[arg-type]
    return parts.plan, parts.judge


def _require_all_layers(name: str, evidence: Input, model: ModelSpec) -> None:
    if evidence.layers != model.moe_layers:
        raise SimulationError(
            f"{name}: layers: holds {evidence.n_layers} MoE layers ({evidence.layers[:3]}...),"
            f" expected all {model.n_moe_layers} of {model.name}; a plan cannot leave layers out"
        )


def _system(request: Request) -> System:
    """The cluster, with the nodes the user said."""
    from hwmodels.systems import load_system

    if not request.system and not request.ranks:
        raise SimulationError("where will it run? pass --system (h800x32) or --ranks and --nodes")
    system = load_system(request.system or f"{DEFAULT_DEVICE}x{request.ranks}")
    if not request.system:
        output.note(f"system {system.name} assumed; pass --system for another device")
    if request.ranks and request.ranks != system.n_devices:
        raise SimulationError(
            f"--ranks {request.ranks} but system {system.name} has {system.n_devices} devices"
        )
    if not request.nodes:
        return system
    if system.n_devices % request.nodes:
        raise SimulationError(
            f"--nodes {request.nodes} does not divide {system.n_devices} ranks evenly"
        )
    return replace(system, devices_per_node=system.n_devices // request.nodes)


def _options(
    request: Request, model: ModelSpec, system: System, planned: Input, judged: Input | None
) -> StudyOptions:
    from moesim.placement_study import StudyOptions
    from planners.drift import Drift
    from planners.layer import Search

    smallest = -(-model.n_experts // system.n_devices) * system.n_devices
    return StudyOptions(
        n_slots=request.slots or smallest,
        step=_step(request, system, planned if judged is None else judged),
        node_limited=request.node_limited,
        keep_balance=request.keep_balance,
        current=_current(request.current),
        drift=Drift(relative_sd=request.drift),
        least_gain=request.least_gain,
        most_steps=request.steps,
        search=Search(seed=request.seed),
        seed=request.seed,
    )


def _step(request: Request, system: System, judged: Input) -> StepOptions:
    from moesim.lower.layer_costs import StepOptions
    from planners.dispatch import MODES, RULES

    for flag, value, known in (
        ("--send", request.send, MODES),
        ("--replica-rule", request.replica_rule, RULES),
    ):
        if value not in known:
            raise SimulationError(f"{flag} {value!r} is unknown, known: {', '.join(known)}")
    phase = request.phase or phase_of(judged, request.judge or request.trace)
    tokens = request.tokens_per_rank or usual_tokens_per_rank(judged, phase, system.n_devices)
    return StepOptions(
        tokens_per_rank=tokens,
        phase=phase,  # type: ignore[arg-type]  # StepOptions checks it
        context=request.context,
        two_batch_overlap=request.two_batch_overlap,
        mode=request.send,  # type: ignore[arg-type]
        rule=request.replica_rule,  # type: ignore[arg-type]
    )


def _current(text: str) -> str | Placement:
    """An incumbent's name, or the placement of a plan file."""
    from planners.planfile import read_plan

    if text.endswith(".json"):
        return read_plan(Path(text)).placement()
    return text


def _inputs(resolved: Resolved) -> dict[str, Any]:
    from traces.routing import content_hash

    judged = resolved.planned if resolved.judged is None else resolved.judged
    return {
        "request": asdict(resolved.request),
        "model": resolved.model.name,
        "system": resolved.system.name,
        "nodes": resolved.system.n_nodes,
        "slots": resolved.options.n_slots,
        "phase": resolved.options.step.phase,
        "tokens_per_rank": resolved.options.step.tokens_per_rank,
        "planned_sha256": content_hash(resolved.planned),
        "judged_sha256": content_hash(judged),
        "seed": resolved.request.seed,
    }


COLUMNS = (
    "placement",
    "step_ms",
    "max_over_mean",
    "tokens_per_s",
    "out_of_node_kB_per_token",
    "gain_of_plan_pct",
    "low_pct",
    "high_pct",
)


def rows(document: dict[str, Any]) -> list[tuple[object, ...]]:
    """A row per placement, in the order of COLUMNS."""
    return [
        (
            name,
            seconds * 1e3,
            document["max_over_mean"][name],
            document["tokens_per_s"][name],
            document["bytes_per_token"][name]["out"] / 1e3,
            *(
                (100 * document["gain"][name][key] for key in ("mean", "low", "high"))
                if name in document["gain"]
                else (None, None, None)
            ),
        )
        for name, seconds in document["step_time_s"].items()
    ]


def show(document: dict[str, Any]) -> None:
    """The study for people: a table, then what it means."""
    output.table(_title(document), _headings(), rows(document))
    for sentence in sentences(document):
        output.say(sentence)


def _title(document: dict[str, Any]) -> str:
    inputs = document["inputs"]
    return (
        f"{inputs['model']} on {inputs['system']}, {inputs['slots']} slots, {inputs['phase']} of"
        f" {inputs['tokens_per_rank']} tokens per rank"
    )


def _headings() -> list[str]:
    return [name.replace("_", " ").replace("pct", "%") for name in COLUMNS]


def sentences(document: dict[str, Any]) -> list[str]:
    """What a study means, a line each."""
    gain = document["gain"][document["compared_with"]]
    said = [
        f"Verdict: {document['verdict'].replace('_', ' ')}. Against {document['compared_with']} the"
        f" plan saves {gain['mean']:.1%} of a step (95 % between {gain['low']:.1%} and"
        f" {gain['high']:.1%} over {gain['steps']} steps).",
        _beside_eplb(document),
        f"Judged on {document['judged_on']}.",
    ]
    survives = document["gain_surviving_share"]
    if survives is not None:
        planned = document["gain_on_planned_part"]["mean"]
        said.append(
            f"On what it was planned on it saves {planned:.1%}; {survives:.0%} of that gain"
            " survives."
        )
    said.append(
        f"Busiest rank over mean, planned part: {document['gap']:.2%} above the least that any"
        f" placement can reach ({document['lower_bound']:.4f})."
    )
    limited = document["node_limited"]
    if limited is not None:
        said.append(
            f"With groups kept inside nodes the best is {limited['max_over_mean_planned_part']:.4f}"
            f" ({limited['gap']:.2%} above its bound)."
        )
    said.append(_migration(document["migration"]))
    said += [f"Not priced: {missing}." for missing in document["not_priced"]]
    said.append(f"Planned in {document['solve_seconds']:.2f} s.")
    return said


def _beside_eplb(document: dict[str, Any]) -> str:
    """What EPLB alone would have brought, so that nobody credits the plan with it."""
    seconds, gains = document["step_time_s"], document["gain"]
    form = min(("eplb_hierarchical", "eplb_global"), key=seconds.__getitem__)
    alone, more = 1 - seconds[form] / seconds[document["compared_with"]], gains[form]
    return (
        f"EPLB alone ({form}) would save {alone:.1%}; the plan saves {more['mean']:.2%} of a step"
        f" beyond it ({more['low']:.2%} to {more['high']:.2%})."
    )


def _migration(moved: dict[str, Any]) -> str:
    payback = moved["steps_to_pay_back"]
    ends = "never pays back" if payback is None else f"pays back after {payback:,.0f} steps"
    return (
        f"Going there from {moved['from']} moves {moved['moved_slots']:,} experts"
        f" ({moved['bytes'] / 1e9:,.1f} GB, {moved['seconds']:.2f} s) and {ends}."
    )
