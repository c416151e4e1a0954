"""`moesim bench`: the microbenchmarks of this machine, in a process of their own.

The benchmarks live in `kernels/`, which shares no import with this package: the rows that they
write and the events that they tell are all that passes between the two.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.cli import bench_report, output
from moesim.cli.inputs import BUNDLED

RUNNER = "moesim_kernels.runner"


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="OP", help="Operators; all when none.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.001, help="Time to spend; the most informative points first.")
    ] = 8.0,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the rows, one .jsonl file an operator.")
    ] = Path("moesim-bench"),
    routing: Annotated[
        str, typer.Option("--routing", help="Trace that captured routing is drawn from.")
    ] = BUNDLED,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing; compare the folder's rows.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Measure this machine; a point that the folder already has is not measured again.

    Then compare what the folder has: kernels with each other, with the measured roofline, and
    weight formats with bf16; only rows of one device and one set of software versions. All rows
    compared are in kernels.csv there, the picture in kernels.png.
    """
    done: dict[str, Any] = {}
    if not report_only:
        output.result_folder(out)
        with captured_routing(routing) as captured:
            done = run_benchmarks(ops or [], minutes, out, captured)
    files = sorted(file.name for file in out.glob("*.jsonl"))
    compared, left_out = bench_report.compare_rows(out) if files or report_only else ([], {})
    if compared:
        bench_report.write_files(compared, out)
    if as_json:
        comparison = bench_report.document(compared, left_out)
        output.emit_json(done | {"out": out, "files": files, "comparison": comparison})
        return
    if done:
        _show_run(done, out)
    bench_report.show(compared, left_out)
    if compared:
        output.say(f"wrote {bench_report.TABLE_FILE} and {bench_report.PICTURE_FILE} in {out}")


def _show_run(done: Mapping[str, Any], out: Path) -> None:
    output.facts(
        f"Rows are in {out}",
        {
            "measured now": done["measured"],
            "could not be measured": done["refused"],
            "already there": done["reused"],
            "left for want of time": done["left"],
            "seconds": done["seconds"],
        },
    )


@contextmanager
def captured_routing(trace: str) -> Iterator[Path]:
    """A file that the runner reads, with `topk[tokens, layers, k]` of a trace, for the block."""
    import numpy as np

    from moesim.cli.inputs import open_trace
    from traces.routing import require_tokens

    routed = require_tokens(open_trace(trace)[0], "captured routing")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{Path(trace).stem or 'trace'}.npz"
        np.savez(path, topk=routed.topk)
        yield path


def run_benchmarks(ops: list[str], minutes: float, out: Path, routing: Path) -> dict[str, Any]:
    """Run the benchmarks with a progress bar; the runner's summary and `refused_why`.

    routing  .npz with `topk`, for points of captured routing
    raises   SimulationError with the runner's own words when it could not run
    """
    from moesim.errors import SimulationError

    command = [sys.executable, "-m", RUNNER, *ops, "--minutes", str(minutes), "--out", str(out),
               "--routing", str(routing)]  # fmt: skip
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        try:
            summary = _follow(_events(process))
        except BaseException:
            process.terminate()
            raise
        process.wait()
        said.seek(0)
        if summary is None:
            raise SimulationError(f"bench: {_reason(said.read().strip().splitlines())}")
    _note_what_failed(summary)
    return summary


def _note_what_failed(summary: Mapping[str, Any]) -> None:
    """A line for each reason: operators that were given up, points that could not be measured."""
    given_up: dict[str, list[str]] = defaultdict(list)
    for op, why in summary["skipped"].items():
        given_up[why].append(op)
    for why, ops in given_up.items():
        output.note(f"{', '.join(ops)}: {why}")
    for why, count in summary["refused_why"].items():
        output.note(f"{count} {'point' if count == 1 else 'points'} not measured: {why}")


def _reason(said: list[str]) -> str:
    last = said[-1].removeprefix("error: ") if said else f"{RUNNER} ended early"
    missing = last.startswith("ModuleNotFoundError")
    return f"{last}; it comes with moesim[kernels]" if missing else last


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    for line in process.stdout or ():
        yield json.loads(line)


def _follow(events: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    first = next(events, None)
    if first is None:
        return None
    with output.progress(first["points"], "measuring") as step:
        return _until_end(events, step)


def _until_end(
    events: Iterator[dict[str, Any]], step: Callable[[int], None]
) -> dict[str, Any] | None:
    from moesim.report.kernel_samples import short_reason

    refused: Counter[str] = Counter()
    for event in events:
        if event["event"] in ("row", "refused"):
            step(1)
        if event["event"] == "refused":
            refused[short_reason(event["why"])] += 1
        elif event["event"] == "end":
            summary = {key: value for key, value in event.items() if key != "event"}
            return summary | {"refused_why": dict(refused.most_common())}
    return None
