"""Run the microbenchmarks of this machine within a time budget, resumably.

python -m moesim_kernels.runner [OP ...] --minutes M --out DIR [--routing FILE.npz]

Rows go to DIR, one file of JSON lines an operator. What happens is told as JSON lines on stdout:
`start` (points, already done), `row` (op, key), `refused` (op, kernel, why), `skip` (op, why),
`end` (the summary).
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
from moesim_kernels.bench.gpu_points import gpu_points
from moesim_kernels.bench.points import Point, cpu_points, interleaved
from moesim_kernels.bench.routing import CapturedRouting, read_captured, with_traces

TERMINATED = 143
FATAL = (
    "CUDA error",
    "device-side assert",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
)  # after these a process cannot use its GPU
Tell = Callable[[dict[str, object]], None]
Measure = Callable[[Point], dict[str, object]]


@dataclass(slots=True)
class Summary:
    """What a run did.

    measured, refused, reused, left  points: measured now, failed (a row says why), found finished,
             left for want of time
    skipped  operators given up, with the reason
    """

    measured: int = 0
    refused: int = 0
    reused: int = 0
    left: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def all_points() -> dict[str, list[Point]]:
    """The points of every operator by its name; GPU operators follow those of the CPU."""
    return cpu_points() | gpu_points()


def chosen_points(ops: Sequence[str], traces: Sequence[CapturedRouting] = ()) -> list[Point]:
    """The points of the named operators, all of them when none is named; ValueError lists them.

    traces  captured routing at hand: points that need another one are left out
    """
    known = all_points()
    unknown = sorted(set(ops) - set(known))
    if unknown:
        raise ValueError(f"operator {unknown[0]!r} is unknown, known: {', '.join(known)}")
    chosen = {op: with_traces(known[op], traces) for op in known if not ops or op in ops}
    return interleaved(chosen)


def run(
    points: Sequence[Point], measure: Measure, out: Path, minutes: float, tell: Tell
) -> Summary:
    """Measure what is not yet in `out`, in the given order, until the time is over.

    measure  the row of a point; CannotMeasure gives its operator up, and the others go on; any
             other error is the point's own: its row says why, and its operator goes on
    tell     is told each event, a dict with `event`
    raises   what stopped the device, after its row is written: a second run goes on behind it
    """
    from moesim_kernels.bench.measured import CannotMeasure, failed_row

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
            rows.append(out, row := measure(point))
        except CannotMeasure as error:
            summary.skipped[point.op] = str(error)
            tell({"event": "skip", "op": point.op, "why": str(error)})
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows.append(out, failed_row(point, device_of(point.op), why))
            summary.refused += 1
            tell({"event": "refused", "op": point.op, "kernel": point.kernel, "why": why})
            if any(word in why for word in FATAL):
                raise
        else:
            summary.measured += 1
            tell({"event": "row", "op": point.op, "key": row["key"]})
    summary.seconds = round(time.monotonic() - started, 1)
    tell({"event": "end", **asdict(summary)})
    return summary


@contextmanager
def this_machine(out: Path, traces: Sequence[CapturedRouting] = ()) -> Iterator[Measure]:
    """The function that measures a point here; what it needs is made once and given back."""
    from contextlib import ExitStack, closing
    from functools import cache

    from moesim_kernels.bench import alltoall, cpu, disk
    from moesim_kernels.bench.accelerator import this_gpu
    from moesim_kernels.bench.gpu_ops import GPU_OPS

    with ExitStack() as stack:
        weights = cpu.Weights()
        file = cache(lambda: stack.enter_context(closing(disk.DirectFile(out))))
        ranks = cache(lambda backend, n: stack.enter_context(closing(alltoall.Ranks(backend, n))))
        gpu = cache(lambda: stack.enter_context(this_gpu(traces)))
        by_op = {
            "cpu_gemv": lambda point: cpu.gemm(point, weights),
            "cpu_gemm": lambda point: cpu.gemm(point, weights),
            "cpu_experts": lambda point: cpu.experts(point, traces),
            "stream": cpu.stream,
            "nvme_read": lambda point: disk.read(point, file()),
            "all_to_all": lambda point: alltoall.exchange(point, ranks("gloo", 2)),
            "all_to_all_nccl": lambda point: alltoall.exchange(
                point, ranks("nccl", int(point.shape["ranks"]))
            ),
        }
        by_op |= {op: lambda point, do=do: do(point, gpu()) for op, do in GPU_OPS.items()}
        yield lambda point: by_op[point.op](point).row(point)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 could not run."""
    asked = _parser().parse_args(arguments)
    try:
        traces = [read_captured(path) for path in asked.routing]
        points = chosen_points(asked.ops, traces)
        asked.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # give back what is held
    with this_machine(asked.out, traces) as measure:
        run(points, measure, asked.out, asked.minutes, _tell_stdout)
    return 0


def _not_finished(points: Sequence[Point], out: Path, summary: Summary) -> list[Point]:
    names = {op: timing.place(device_of(op)) for op in {point.op for point in points}}
    done = {op: rows.finished(out, op) for op in names}
    todo = [p for p in points if p.key(names[p.op]) not in done[p.op]]
    summary.reused = len(points) - len(todo)
    return todo


def device_of(op: str) -> dict[str, object]:
    """`device` of an operator's rows; the name is "" for a GPU operator without a GPU."""
    if op not in gpu_points():
        return timing.cpu()
    from moesim_kernels.bench.accelerator import gpu_facts

    return gpu_facts()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moesim_kernels.runner", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(all_points())}")
    parser.add_argument("--minutes", type=_minutes, default=8.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--routing",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=".npz with topk[tokens, layers, k]; may be repeated, the first that fits is taken",
    )
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
