"""Copies between host and GPU, and what two kinds of work cost each other at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import median

import torch
from moesim_kernels.bench.accelerator import Accelerator, sampled
from moesim_kernels.bench.measured import Measured
from moesim_kernels.bench.points import Point
from moesim_kernels.bench.timing import Timed

WAYS = {"gpu": ("gpu",), "cpu": ("cpu",), "both": ("gpu", "cpu")}
MOST_TIMES = 32  # that one job is done beside the other
HOLD_CYCLES = 4_000_000  # about 2 ms: the host gives out all the work while the device is held
SIDE_UNIT = 128
Move = tuple[torch.Tensor, torch.Tensor]  # target, source


def copy(point: Point, gpu: Accelerator) -> Measured:
    """Copy `bytes` to the GPU, to the CPU, or that much both ways at once, over some streams.

    Each direction is cut evenly over its own `streams`. Times are the host's, from the first
    call until all is there.
    """
    n_bytes, n_streams = int(point.shape["bytes"]), int(point.shape["streams"])
    ways = WAYS[str(point.shape["to"])]
    pinned = point.shape["memory"] == "pinned" and gpu.device.type == "cuda"
    moves = [move for way in ways for move in _moves(way, n_bytes, n_streams, pinned, gpu)]
    turns = [(_on(_stream(gpu) if len(moves) > 1 else None), *move) for move in moves]

    def call() -> None:
        for on, target, source in turns:
            with on():
                target.copy_(source, non_blocking=True)

    method = {"memory": "pinned" if pinned else "pageable", "l2": "warm_or_larger"}
    return gpu.by_the_clock(call, source="torch.copy_", n_bytes=len(ways) * n_bytes, method=method)


def _moves(way: str, n_bytes: int, n_streams: int, pinned: bool, gpu: Accelerator) -> list[Move]:
    """Equal parts of one direction; all pages are written, so that none is the zero page."""
    host = torch.ones(n_bytes, dtype=torch.uint8, pin_memory=pinned)
    device = torch.ones(n_bytes, dtype=torch.uint8, device=gpu.device)
    target, source = (device, host) if way == "gpu" else (host, device)
    parts = (both.tensor_split(n_streams) for both in (target, source))
    return list(zip(*parts, strict=True))


@dataclass(frozen=True, slots=True)
class Job:
    """Work that may be given out without waiting for it; bytes it moves, operations it does."""

    call: Callable[[], object]
    n_bytes: int
    flops: int = 0


def overlap(point: Point, gpu: Accelerator) -> Measured:
    """Two jobs at once on two streams, each done as often as makes both take about as long alone.

    Jobs: `copy` brings `bytes` from pinned memory; `gemm` multiplies square bf16 matrices of
    about `bytes` each; `stream` copies max(`bytes`, 4 x last-level cache) on the device.

    derived, first job first: `alone_us`, `together_us` (until its end, from their common begin),
    `serial_us` (one after the other), and `slowdown` while both run (see `slowdowns`)
    """
    names, n_bytes = str(point.shape["pair"]).split("+"), int(point.shape["bytes"])
    jobs = [_JOBS[name](n_bytes, gpu) for name in names]
    streams = [_stream(gpu) for _ in jobs]
    once = [_alone_s(job, 1, stream, gpu) for job, stream in zip(jobs, streams, strict=True)]
    times = [max(1, min(MOST_TIMES, round(max(once) / taken))) for taken in once]
    alone = [
        _alone_s(job, n, stream, gpu) for job, n, stream in zip(jobs, times, streams, strict=True)
    ]
    together: list[tuple[float, ...]] = []

    def measure() -> tuple[Timed, dict[str, object]]:
        together.extend(sampled(lambda: _ends_s(jobs, times, streams, gpu)))
        timer = "events" if gpu.device.type == "cuda" else "perf_counter"
        return Timed([max(ends) for ends in together]), {"timer": timer, "l2": "warm_or_larger"}

    measured = gpu.watched(
        measure,
        source="+".join(names),
        n_bytes=sum(job.n_bytes * n for job, n in zip(jobs, times, strict=True)),
        flops=sum(job.flops * n for job, n in zip(jobs, times, strict=True)),
        config={"times": times},
    )
    ends = [median(of_job) for of_job in zip(*together, strict=True)]
    return replace(measured, derived=contention(alone, ends))


def contention(alone: Sequence[float], together: Sequence[float]) -> dict[str, object]:
    """`derived` of two jobs from their seconds alone, and from their common begin to each end.

    slowdown  of each while both run: the first to end had the other beside it all the time; what
              the second did meanwhile is all but what it still did alone. None where that says
              nothing, since the second had not begun.
    """
    first = min(together)
    slowdown = [
        round(first / done, 4) if (done := taken - (end - first)) > 0.02 * taken else None
        for taken, end in zip(alone, together, strict=True)
    ]
    return {
        "alone_us": [round(taken * 1e6, 3) for taken in alone],
        "together_us": [round(end * 1e6, 3) for end in together],
        "serial_us": round(sum(alone) * 1e6, 3),
        "slowdown": slowdown,
    }


def _host_copy(n_bytes: int, gpu: Accelerator) -> Job:
    ((target, source),) = _moves("gpu", n_bytes, 1, gpu.device.type == "cuda", gpu)
    return Job(lambda: target.copy_(source, non_blocking=True), n_bytes)


def _gemm(n_bytes: int, gpu: Accelerator) -> Job:
    side = max(math.isqrt(n_bytes // 2) // SIDE_UNIT, 1) * SIDE_UNIT
    a, b, out = (torch.randn(side, side, dtype=torch.bfloat16, device=gpu.device) for _ in range(3))
    return Job(lambda: torch.mm(a, b.t(), out=out), 6 * side * side, 2 * side**3)


def _device_copy(n_bytes: int, gpu: Accelerator) -> Job:
    size = max(n_bytes, 4 * gpu.l2_bytes) // 4
    target, source = (torch.ones(size, device=gpu.device) for _ in range(2))
    return Job(lambda: target.copy_(source), 8 * size)


_JOBS: dict[str, Callable[[int, Accelerator], Job]] = {
    "copy": _host_copy, "gemm": _gemm, "stream": _device_copy
}  # fmt: skip


def _alone_s(job: Job, n_times: int, stream: torch.cuda.Stream | None, gpu: Accelerator) -> float:
    _ends_s([job], [n_times], [stream], gpu)
    return median(end for (end,) in sampled(lambda: _ends_s([job], [n_times], [stream], gpu)))


def _ends_s(
    jobs: Sequence[Job],
    times: Sequence[int],
    streams: Sequence[torch.cuda.Stream | None],
    gpu: Accelerator,
) -> tuple[float, ...]:
    """Seconds from a common begin to the end of each job; one after the other without CUDA."""
    if gpu.device.type != "cuda":
        started = time.perf_counter()
        return tuple(_run(job, n) - started for job, n in zip(jobs, times, strict=True))
    begin = torch.cuda.Event(enable_timing=True)
    ends = [torch.cuda.Event(enable_timing=True) for _ in jobs]
    torch.cuda._sleep(HOLD_CYCLES)
    begin.record()
    for job, n, stream, end in zip(jobs, times, streams, ends, strict=True):
        stream.wait_event(begin)
        with torch.cuda.stream(stream):
            _run(job, n)
            end.record()
    gpu.wait()
    return tuple(begin.elapsed_time(end) * 1e-3 for end in ends)


def _run(job: Job, n_times: int) -> float:
    for _ in range(n_times):
        job.call()
    return time.perf_counter()


def _stream(gpu: Accelerator) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(gpu.device) if gpu.device.type == "cuda" else None


def _on(stream: torch.cuda.Stream | None) -> Callable[[], AbstractContextManager[object]]:
    return nullcontext if stream is None else lambda: torch.cuda.stream(stream)
