"""`moesim demo`: the whole way on the bundled trace, into one folder, each part timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.cli.placement import (
    Request,
    Resolved,
    carry_out,
    resolve,
    show,
    write,
)

if TYPE_CHECKING:
    from moesim.placement_study import Study
    from traces.model import ModelSpec
    from traces.routing import RoutingTrace

SHAPED_LIKE = "gpt-oss-20b"  # also 32 experts, 4 per token: a size people serve
SYSTEM, SLOTS, TOKENS_PER_RANK = "h200x8", 40, 64


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
    resolved, trace = clock.part("open the bundled trace", _open)
    stats = clock.part("statistics", lambda: _statistics(trace, folder))
    study, record = clock.part("plan and judge", lambda: carry_out(resolved))
    clock.part("plan, pictures, report", lambda: write(resolved, study, record, folder))
    clock.part("timeline of one step", lambda: _timeline(trace, resolved, study, folder))
    clock.part("file for SGLang", lambda: _export(folder))
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


def _open() -> tuple[Resolved, RoutingTrace]:
    from moesim.cli.inputs import open_trace
    from traces.routing import require_tokens

    trace = require_tokens(open_trace("bundled")[0], "the demo")
    request = Request("bundled", system=SYSTEM, slots=SLOTS, tokens_per_rank=TOKENS_PER_RANK)
    return resolve(request, trace, shaped(trace)), trace


def _statistics(trace: RoutingTrace, folder: Path) -> Any:
    from traces.stats import summarize, to_json

    stats = summarize(trace)
    output.write_json(folder / "stats.json", to_json(stats))
    return stats


def _timeline(trace: RoutingTrace, resolved: Resolved, study: Study, folder: Path) -> None:
    from moesim.engine import run
    from moesim.simulate import Setting, step_timeline
    from moesim.timeline import write_chrome_trace
    from traces.batches import steps

    step = resolved.options.step
    setting = Setting(resolved.model, resolved.system, step)
    rows = steps(trace, setting.tokens_per_step, step.phase, resolved.options.seed).rows
    program, names = step_timeline(trace, study.placements["plan"], setting, rows[0])
    write_chrome_trace(program, run(program), folder / "step.trace.json", names)


def _export(folder: Path) -> None:
    from planners.export import sglang
    from planners.planfile import read_plan

    sglang.write(read_plan(folder / "plan.json"), folder / "sglang.json")


def _show(stats: Any, record: dict[str, Any], clock: Clock, folder: Path) -> None:
    output.say(
        f"The bundled trace: {stats.tokens:,} tokens, {len(stats.layers)} MoE layers,"
        f" {stats.n_experts} experts, {stats.top_k} per token."
    )
    show(record)
    output.table(
        "What took how long", ["part", "seconds"], [(k, v) for k, v in clock.seconds.items()]
    )
    output.say(f"Everything is in {folder}/; open {folder}/report.html first.")
