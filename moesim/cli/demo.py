"""`moesim demo`: the whole way on the bundled trace, into one folder, each part timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output

if TYPE_CHECKING:
    from moesim.placement_study import Study, StudyOptions
    from traces.model import ModelSpec
    from traces.routing import RoutingTrace

SHAPED_LIKE = "gpt-oss-20b"  # also 32 experts, 4 per token: a size people serve
SYSTEM, SLOTS = "h200x8", 40


@dataclass(slots=True)
class Clock:
    """Seconds of each part of the demo, in the order they ran."""

    seconds: dict[str, float]

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a part, remember how long it took."""
        output.note(f"{name} ...")
        started = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - started
        return result


def demo(
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for everything the demo writes.")
    ] = Path("moesim-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Statistics, plan, simulation, export and report for the trace that comes with moesim."""
    output.result_folder(folder)
    clock = Clock({})
    document = clock.part("open the bundled trace", lambda: _open(folder))
    trace, model = document
    stats = clock.part("statistics", lambda: _statistics(trace, folder))
    study, options, record = clock.part("plan and judge", lambda: _plan(trace, model, folder))
    clock.part("simulate one step", lambda: _timeline(trace, model, study, options, folder))
    flags = clock.part("export for SGLang", lambda: _export(folder))
    clock.part("pictures and report", lambda: _report(trace, model, study, record, flags, folder))
    record["demo_seconds"] = clock.seconds
    output.write_json(folder / "result.json", record)
    if as_json:
        output.emit_json(record)
        return
    _show(stats, record, clock, folder)


def shaped(trace: RoutingTrace) -> ModelSpec:
    """The bundled model's routing at the layer shape of a model people serve.

    The captured model is tiny; its routing is real, but its times would be launch overhead only.
    """
    from traces.models import load_model

    like = load_model(SHAPED_LIKE)
    n_layers = max(trace.layers) + 1
    return replace(
        like,
        name=f"tiny-moe-32e at the size of {SHAPED_LIKE}",
        n_layers=n_layers,
        moe_layers=trace.layers,
        kv_layers=n_layers,
        attention=replace(like.attention, n_sliding_layers=n_layers // 2),
    )


def _open(folder: Path) -> tuple[RoutingTrace, ModelSpec]:
    from moesim.cli.inputs import open_trace
    from traces.routing import require_tokens

    trace = require_tokens(open_trace("bundled")[0], "the demo")
    return trace, shaped(trace)


def _statistics(trace: RoutingTrace, folder: Path) -> Any:
    from traces.stats import summarize, to_json

    stats = summarize(trace)
    output.write_json(folder / "stats.json", to_json(stats))
    return stats


def _plan(
    trace: RoutingTrace, model: ModelSpec, folder: Path
) -> tuple[Study, StudyOptions, dict[str, Any]]:
    from traces.edit import split

    from hwmodels.systems import load_system
    from moesim.lower.layer_costs import StepOptions
    from moesim.placement_report import plan_file, study_document
    from moesim.placement_study import StudyOptions, placement_study
    from planners.planfile import write_plan
    from traces.routing import content_hash

    system = load_system(SYSTEM)
    parts = split(trace, 0.5, seed=0)
    options = StudyOptions(n_slots=SLOTS, step=StepOptions(tokens_per_rank=64))
    study = placement_study(model, system, parts.plan, parts.judge, options)
    inputs = {
        "trace": "bundled",
        "planned_sha256": content_hash(parts.plan),
        "judged_sha256": content_hash(parts.judge),
        "model": model.name,
        "system": system.name,
        "slots": SLOTS,
        "phase": options.step.phase,
        "tokens_per_rank": options.step.tokens_per_rank,
    }
    record = study_document(study, inputs)
    write_plan(plan_file(study, model, system, options, record), folder / "plan.json")
    return study, options, record


def _timeline(
    trace: RoutingTrace, model: ModelSpec, study: Study, options: StudyOptions, folder: Path
) -> None:
    from traces.batches import steps

    from hwmodels.systems import load_system
    from moesim.engine import run
    from moesim.simulate import Setting, step_timeline
    from moesim.timeline import write_chrome_trace

    setting = Setting(model, load_system(SYSTEM), options.step)
    rows = steps(trace, setting.tokens_per_step, options.step.phase, options.seed).rows
    program, names = step_timeline(trace, study.placements["plan"], setting, rows[0])
    write_chrome_trace(program, run(program), folder / "step.trace.json", names)


def _export(folder: Path) -> tuple[str, ...]:
    from planners.export import sglang
    from planners.planfile import read_plan

    return sglang.write(read_plan(folder / "plan.json"), folder / "sglang.json").flags


def _report(
    trace: RoutingTrace,
    model: ModelSpec,
    study: Study,
    record: dict[str, Any],
    flags: tuple[str, ...],
    folder: Path,
) -> None:
    from moesim.cli.placement import COLUMNS, rows, sentences
    from moesim.placement_report import write_pictures
    from moesim.report.html import Section, page
    from planners.planfile import write_text

    pictures = write_pictures(study, trace, folder)
    table = rows(record)
    output.write_csv(folder / "table.csv", COLUMNS, table)
    cells = [[output.shown(cell) for cell in row] for row in table]
    sections = [
        Section("What it says", text=sentences(record)),
        Section("Beside what runs today", columns=COLUMNS, rows=cells, pictures=pictures),
        Section(
            "Use it",
            text=[f"Priced as {model.name}; the file for SGLang is sglang.json."],
            code="python -m sglang.launch_server --model-path MODEL " + " ".join(flags),
        ),
    ]
    write_text(page("A placement plan for the bundled trace", sections), folder / "report.html")


def _show(stats: Any, record: dict[str, Any], clock: Clock, folder: Path) -> None:
    from moesim.cli.placement import show

    output.say(
        f"The bundled trace: {stats.n_tokens:,} tokens, {stats.n_layers} MoE layers,"
        f" {stats.n_experts} experts, {stats.top_k} per token."
    )
    show(record)
    output.table(
        "What took how long", ["part", "seconds"], [(k, v) for k, v in clock.seconds.items()]
    )
    output.say(f"Everything is in {folder}/; open {folder}/report.html first.")
