"""GPU: copies between host and device; what needs a kernel of ours is measured with the kernel."""

from __future__ import annotations

import torch
from moesim_kernels.bench import timing
from moesim_kernels.bench.measured import CannotMeasure, Measured
from moesim_kernels.bench.points import Point


def require_gpu() -> None:
    """CannotMeasure when torch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise CannotMeasure("no GPU")


def copy(point: Point) -> Measured:
    """One copy of `bytes` to or from the GPU, from pinned or pageable host memory, waited for."""
    require_gpu()
    n_bytes, pinned = int(point.shape["bytes"]), point.shape["memory"] == "pinned"
    host = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=pinned)
    device = torch.zeros(n_bytes, dtype=torch.uint8, device="cuda")
    source, target = (host, device) if point.shape["to"] == "gpu" else (device, host)

    def move() -> None:
        target.copy_(source, non_blocking=pinned)
        torch.cuda.synchronize()

    timed = timing.repeat(move)
    return Measured(timed, "torch.copy_", n_bytes, 0, {"waits": "synchronize"}, device=_device())


def _device() -> dict[str, object]:
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name, "kind": "gpu", "sm": facts.major * 10 + facts.minor,
        "mem_gib": round(facts.total_memory / (1 << 30), 1),
    }  # fmt: skip
