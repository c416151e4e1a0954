"""What a GPU does at best: its memory, its tensor cores, and a kernel that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from moesim_kernels.bench.accelerator import Accelerator, Timing
from moesim_kernels.bench.measured import CannotMeasurePoint, Measured
from moesim_kernels.bench.points import Point
from moesim_kernels.bench.timing import Timed, latency

MOST_BYTES, MEMORY_PARTS = 1 << 30, 16  # of an array that is moved: so many, or a part of memory
READ_BLOCK = 8192  # float32 values of one program, 32 KiB
MOST_SIDE, GEMM_PARTS = 8192, 32  # of the square matrices, three of which fill a part of memory
CHECKED_ROWS = 16
REPLAYS = 50  # of a graph between two events, so that the first launch hardly shows


def peak(point: Point, gpu: Accelerator) -> Measured:
    """Bandwidth of a copy, a fill or a read; speed of a large square product."""
    return _PEAKS[str(point.shape["kind"])](gpu)


def launch(point: Point, gpu: Accelerator) -> Measured:
    """`kernels` empty Triton kernels, launched one by one or as one CUDA graph.

    graph  the device's time of one replay among many; `alone_us` is that of one replay and the
           wait for it, by the clock of the host
    eager  the host's time until all are launched and done
    """
    n_kernels, graph = int(point.shape["kernels"]), point.shape["kind"] == "graph"
    source, burst = "triton.empty", _burst(n_kernels)
    if not graph:
        measured = gpu.by_the_clock(burst, source=source, n_bytes=0)
        return _per_kernel(measured, n_kernels, {})
    replay = gpu.replay_of(burst)
    alone = _median_us(gpu.by_the_clock(replay, source=source, n_bytes=0))
    measured = gpu.watched(lambda: _in_a_row(replay, gpu), source=source, n_bytes=0)
    return _per_kernel(measured, n_kernels, {"alone_us": alone})


def array_bytes(gpu: Accelerator) -> int:
    """Size of an array that no cache holds, a multiple of what one program reads."""
    unit = 4 * READ_BLOCK
    wanted = max(min(MOST_BYTES, gpu.memory_bytes // MEMORY_PARTS), 4 * gpu.l2_bytes)
    return max(wanted // unit, 1) * unit


def gemm_side(gpu: Accelerator) -> int:
    """A power of two, at most MOST_SIDE."""
    side = MOST_SIDE
    while 6 * side * side > gpu.memory_bytes // GEMM_PARTS and side > 64:
        side //= 2
    return side


def _copy(gpu: Accelerator) -> Measured:
    n_bytes = array_bytes(gpu)
    source, target = (torch.ones(n_bytes // 4, device=gpu.device) for _ in range(2))
    return _moved(gpu, lambda: target.copy_(source), "torch.copy_", 2 * n_bytes)


def _set(gpu: Accelerator) -> Measured:
    n_bytes = array_bytes(gpu)
    target = torch.ones(n_bytes // 4, device=gpu.device)
    return _moved(gpu, target.zero_, "torch.zero_", n_bytes)


def _read(gpu: Accelerator) -> Measured:
    from moesim_kernels.bench.floor_kernel import read_kernel

    n_blocks = array_bytes(gpu) // (4 * READ_BLOCK)
    source = torch.ones(n_blocks * READ_BLOCK, device=gpu.device)
    sums = torch.zeros(n_blocks, device=gpu.device)

    def call() -> object:
        return read_kernel[(n_blocks,)](source, sums, READ_BLOCK, num_warps=8)

    call()
    error = float((sums - READ_BLOCK).abs().max()) / READ_BLOCK
    return _moved(gpu, call, "triton.read", 4 * source.numel(), error)


def _moved(
    gpu: Accelerator,
    call: Callable[[], object],
    source: str,
    n_bytes: int,
    error: float | None = None,
) -> Measured:
    config = {"array_bytes": array_bytes(gpu)}
    return gpu.measured([call], source=source, n_bytes=n_bytes, config=config, max_rel_err=error)


def _gemm_bf16(gpu: Accelerator) -> Measured:
    a, b = (_square(gpu).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return _product(gpu, a, b, lambda: torch.mm(a, b.t(), out=out), "torch.mm")


def _gemm_fp8(gpu: Accelerator) -> Measured:
    a, b = (_square(gpu).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=gpu.device)

    def call() -> torch.Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    try:
        call()
    except (RuntimeError, AttributeError) as error:
        raise CannotMeasurePoint(f"no fp8 product here: {error}".splitlines()[0]) from error
    return _product(gpu, a, b, call, "torch._scaled_mm")


def _square(gpu: Accelerator) -> torch.Tensor:
    side = gemm_side(gpu)
    return torch.randn(side, side, device=gpu.device)


def _product(
    gpu: Accelerator,
    a: torch.Tensor,
    b: torch.Tensor,
    call: Callable[[], torch.Tensor],
    source: str,
) -> Measured:
    """Measure call, which returns a b.T in bf16."""
    side = len(a)
    expected = a[:CHECKED_ROWS].float() @ b.float().T
    error = (call()[:CHECKED_ROWS].float() - expected).abs().max() / expected.abs().max()
    return gpu.measured(
        [call], source=source, n_bytes=side * side * (2 * a.element_size() + 2),
        flops=2 * side**3, config={"m": side, "n": side, "k": side}, max_rel_err=float(error),
    )  # fmt: skip


_PEAKS: dict[str, Callable[[Accelerator], Measured]] = {
    "copy": _copy, "set": _set, "read": _read, "gemm_bf16": _gemm_bf16, "gemm_fp8": _gemm_fp8,
}  # fmt: skip


def _burst(n_kernels: int) -> Callable[[], None]:
    from moesim_kernels.bench.floor_kernel import empty_kernel

    launcher = empty_kernel[(1,)]

    def burst() -> None:
        for _ in range(n_kernels):
            launcher()

    return burst


def _in_a_row(replay: Callable[[], object], gpu: Accelerator) -> Timing:
    def row() -> None:
        for _ in range(REPLAYS):
            replay()

    timed, method = gpu.time([row], False)
    seconds = [taken / REPLAYS for taken in timed.seconds]
    return Timed(seconds, timed.disturbed), {**method, "replays_in_a_row": REPLAYS}


def _per_kernel(measured: Measured, n_kernels: int, derived: dict[str, float]) -> Measured:
    derived = {"per_kernel_us": round(_median_us(measured) / n_kernels, 3), **derived}
    return replace(measured, derived=derived)


def _median_us(measured: Measured) -> float:
    return float(latency(measured.timed.seconds)["median"])
