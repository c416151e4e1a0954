"""Move token rows into expert order and back: the unfused dispatch and combine of one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moesim_kernels.align import sort_slots
from moesim_kernels.errors import KernelError

MAX_BLOCK = 1024  # columns one program moves


@dataclass(frozen=True, slots=True)
class Permuted:
    """Rows grouped by expert.

    rows      [n_slots, width]; slots of absent experts have no row, so that rows past
              counts.sum() are undefined
    position  int32[n_tokens, top_k], row of each slot, -1 absent
    counts    int64[n_experts] rows per expert, in order
    """

    rows: torch.Tensor
    position: torch.Tensor
    counts: torch.Tensor


def _block(width: int) -> int:
    return min(MAX_BLOCK, 1 << max(width - 1, 1).bit_length())


def positions(ids: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each slot once sorted by expert, int32 shaped like ids, -1 absent; and counts.

    Slots of one expert keep the order of their tokens.
    """
    order, counts = sort_slots(ids, n_experts)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=ids.device)
    position = torch.where(ids.reshape(-1) < 0, -1, position)
    return position.reshape(ids.shape).int(), counts[:-1]


def permute(x: torch.Tensor, ids: torch.Tensor, n_experts: int) -> Permuted:
    """Copy each token's row once per chosen expert, grouped by expert.

    x    [n_tokens, width], contiguous
    ids  int[n_tokens, top_k]; -1 where the expert is not held here
    """
    from moesim_kernels.permute_kernel import permute_kernel

    _check(x, ids)
    position, counts = positions(ids, n_experts)
    rows = torch.empty(ids.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    if rows.numel():
        block = _block(x.shape[1])
        grid = (ids.numel(), -(-x.shape[1] // block))
        permute_kernel[grid](x, rows, position, x.shape[1], ids.shape[1], block)
    return Permuted(rows, position, counts)


def unpermute(
    rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum each token's rows, weighted; float32 inside, absent slots add nothing.

    rows      [n_slots, width], contiguous
    position  int32[n_tokens, top_k] of `permute`
    weights   float32[n_tokens, top_k], or None for a plain sum
    returns   [n_tokens, width] of rows' dtype
    """
    return _combine(rows, position, weights, by_slot=False)


def sum_slots(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sum top_k rows per token where row t * top_k + j is slot j of token t; ids < 0 absent."""
    return _combine(rows, ids, None, by_slot=True)


def _combine(
    rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor | None, *, by_slot: bool
) -> torch.Tensor:
    from moesim_kernels.permute_kernel import combine_kernel

    (n_tokens, top_k), width = position.shape, rows.shape[1]
    if rows.shape[0] != n_tokens * top_k or not rows.is_contiguous():
        raise KernelError(f"rows: shape {list(rows.shape)}, expected {n_tokens * top_k} rows")
    if weights is not None and weights.shape != position.shape:
        raise KernelError(f"weights: shape {list(weights.shape)}, expected {list(position.shape)}")
    y = torch.empty(n_tokens, width, dtype=rows.dtype, device=rows.device)
    if y.numel():
        block = _block(width)
        flat = position if weights is None else weights.float().contiguous()
        combine_kernel[(n_tokens, -(-width // block))](
            rows, y, position.contiguous(), flat, width, top_k, by_slot, weights is not None, block
        )
    return y


def _check(x: torch.Tensor, ids: torch.Tensor) -> None:
    if x.dim() != 2 or ids.dim() != 2 or x.shape[0] != ids.shape[0] or not x.is_contiguous():
        raise KernelError(
            f"x: shape {list(x.shape)}, ids: shape {list(ids.shape)}; expected contiguous "
            "[tokens, width] and [tokens, top_k]"
        )


def permute_reference(x: torch.Tensor, ids: torch.Tensor, n_experts: int) -> torch.Tensor:
    """The rows of `permute` that exist, expert by expert in plain torch."""
    parts = [x[(ids == expert).nonzero()[:, 0]] for expert in range(n_experts)]
    return torch.cat(parts)
