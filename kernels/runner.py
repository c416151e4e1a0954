"""Run the microbenchmarks of this machine within a time budget, resumably.

python -m moesim_kernels.runner [OP ...] --minutes M --out DIR

Rows go to DIR, one file of JSON lines an operator. What happens is told as JSON lines on stdout:
`start` (points, already done), `row` (op, key), `skip` (op, why), `end` (the summary).
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moesim_kernels.bench import rows, timing
from moesim_kernels.bench.points import GPU_OPS, Point, all_points, interleaved

TERMINATED = 143
Tell = Callable[[dict[str, object]], None]
Measure = Callable[[Point], dict[str, object]]


@dataclass(slots=True)
class Summary:
    """What a run did: points measured now, found finished, left for want of time, skipped by op."""

    measured: int = 0
    reused: int = 0
    left: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def chosen_points(ops: Sequence[str]) -> list[Point]:
    """The points of the named operators, all of them when none is named; ValueError lists them."""
    known = all_points()
    unknown = sorted(set(ops) - set(known))
    if unknown:
        raise ValueError(f"operator {unknown[0]!r} is unknown, known: {', '.join(known)}")
    return interleaved({op: known[op] for op in known if not ops or op in ops})


def run(
    points: Sequence[Point], measure: Measure, out: Path, minutes: float, tell: Tell
) -> Summary:
    """Measure what is not yet in `out`, in the given order, until the time is over.

    measure  the row of a point; CannotMeasure gives its operator up, and the others go on
    tell     is told each event, a dict with `event`
    """
    from moesim_kernels.bench.measured import CannotMeasure

    started = time.monotonic()
    summary = Summary()
    todo = _not_finished(points, out, summary)
    tell({"event": "start", "points": len(todo), "reused": summary.reused, "minutes": minutes})
    for point in todo:
        if point.op in summary.skipped:
            continue
        if time.monotonic() - started >= 60 * minutes:
            summary.left += 1
            continue
        try:
            row = measure(point)
        except CannotMeasure as error:
            summary.skipped[point.op] = str(error)
            tell({"event": "skip", "op": point.op, "why": str(error)})
            continue
        rows.append(out, row)
        summary.measured += 1
        tell({"event": "row", "op": point.op, "key": row["key"]})
    summary.seconds = round(time.monotonic() - started, 1)
    tell({"event": "end", **asdict(summary)})
    return summary


@contextmanager
def this_machine(out: Path) -> Iterator[Measure]:
    """The function that measures a point here; what it needs is made once and given back."""
    from contextlib import ExitStack, closing
    from functools import cache

    from moesim_kernels.bench import alltoall, cpu, disk, gpu

    with ExitStack() as stack:
        weights = cpu.Weights()
        file = cache(lambda: stack.enter_context(closing(disk.DirectFile(out))))
        pair = cache(lambda: stack.enter_context(closing(alltoall.Pair())))
        by_op = {
            "cpu_gemv": lambda point: cpu.gemm(point, weights),
            "cpu_gemm": lambda point: cpu.gemm(point, weights),
            "cpu_experts": cpu.experts,
            "stream": cpu.stream,
            "nvme_read": lambda point: disk.read(point, file()),
            "all_to_all": lambda point: alltoall.exchange(point, pair()),
            "copy": gpu.copy,
        }
        yield lambda point: by_op[point.op](point).row(point)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 could not run."""
    asked = _parser().parse_args(arguments)
    try:
        points = chosen_points(asked.ops)
        asked.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # give back what is held
    with this_machine(asked.out) as measure:
        run(points, measure, asked.out, asked.minutes, _tell_stdout)
    return 0


def _not_finished(points: Sequence[Point], out: Path, summary: Summary) -> list[Point]:
    names = {op: _device_name(op) for op in {point.op for point in points}}
    done = {op: rows.finished(out, op) for op in names}
    todo = [p for p in points if p.key(names[p.op]) not in done[p.op]]
    summary.reused = len(points) - len(todo)
    return todo


def _device_name(op: str) -> str:
    if op not in GPU_OPS:
        return str(timing.cpu()["name"])
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moesim_kernels.runner", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(all_points())}")
    parser.add_argument("--minutes", type=_minutes, default=8.0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def _minutes(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(text)
    return value


def _tell_stdout(event: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
