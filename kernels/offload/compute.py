"""What a layer computes for the token that passes through; one place, so all runs agree."""

from __future__ import annotations

import torch
from moesim_kernels.offload.stack import Weights
from torch.nn.functional import linear, silu

EPSILON = 1e-6


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Each row at root mean square 1."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


def dense_part(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """What stands in for attention, [tokens, hidden] in and out, the input added."""
    up, down = weights
    return x + linear(silu(linear(normalised(x), up)), down)


def expert_part(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """One SwiGLU expert, [tokens, hidden] in and out."""
    up, down = weights
    gate, value = linear(x, up).chunk(2, dim=-1)
    return linear(silu(gate) * value, down)
