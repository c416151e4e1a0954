"""`moesim bench`: the microbenchmarks of this machine, in a process of their own.

The benchmarks live in `kernels/`, which shares no import with this package: the rows that they
write and the events that they tell are all that passes between the two.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.cli import output

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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Measure this machine; a point that the folder already has is not measured again."""
    done = run_benchmarks(ops or [], minutes, output.result_folder(out))
    document = done | {"out": out, "files": sorted(file.name for file in out.glob("*.jsonl"))}
    if as_json:
        output.emit_json(document)
        return
    output.facts(
        f"Rows are in {out}",
        {
            "measured now": done["measured"],
            "already there": done["reused"],
            "left for want of time": done["left"],
            "seconds": done["seconds"],
        },
    )


def run_benchmarks(ops: list[str], minutes: float, out: Path) -> dict[str, Any]:
    """Run the benchmarks with a progress bar; the runner's summary.

    raises  SimulationError with the runner's own words when it could not run
    """
    from moesim.errors import SimulationError

    command = [sys.executable, "-m", RUNNER, *ops, "--minutes", str(minutes), "--out", str(out)]
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
    return summary


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
    for event in events:
        if event["event"] == "row":
            step(1)
        elif event["event"] == "skip":
            output.note(f"{event['op']}: {event['why']}")
        elif event["event"] == "end":
            return {key: value for key, value in event.items() if key != "event"}
    return None
