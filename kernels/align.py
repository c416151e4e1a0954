"""Ragged token lists cut into row blocks of one expert each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moesim_kernels.errors import KernelError

# Largest problems that one program sorts, and that one program an expert does; beyond them torch's
# parallel sort is quicker (not measured).
ONE_LAUNCH_SLOTS = 1024
ONE_LAUNCH_EXPERTS = 512
BY_EXPERT_SLOTS = 32768


@dataclass(frozen=True, slots=True)
class Alignment:
    """Slots (token-expert pairs, numbered token * top_k + choice) sorted by expert, in blocks.

    slots         int32[n_padded_bound]; padding and everything past n_padded holds n_slots
    block_expert  int32[n_padded_bound / block_m], the expert of each row block; -1 past n_padded
    n_padded      int32[1] on the device: rows in use, a multiple of block_m
    block_m       rows per block
    """

    slots: torch.Tensor
    block_expert: torch.Tensor
    n_padded: torch.Tensor
    block_m: int


def padded_bound(n_slots: int, n_experts: int, block_m: int) -> int:
    """Rows that any routing of n_slots fits into, a multiple of block_m.

    Each expert in use wastes at most block_m - 1 rows, and at most n_slots experts are in use.
    """
    return -(-(n_slots + min(n_experts, n_slots) * (block_m - 1)) // block_m) * block_m


def sort_slots(ids: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots in the order of their experts, and how many each expert has.

    ids      int[n_tokens, top_k]; negative where the expert is not held here
    returns  int64[n_slots] order (stable; absent slots last), int64[n_experts + 1] counts, the
             last one of absent slots
    """
    flat = ids.reshape(-1).long()
    expert = torch.where(flat < 0, n_experts, flat)
    order = torch.argsort(expert, stable=True)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    return order, counts


def align(ids: torch.Tensor, n_experts: int, block_m: int) -> Alignment:
    """Sort slots by expert and pad each expert's list to whole blocks.

    ids     int[n_tokens, top_k] in [-1, n_experts); -1 marks an expert that is not held here
    raises  KernelError when ids is not an integer matrix

    Sizes depend on shapes alone and nothing is read back, so that a CUDA graph can hold it; the
    caller answers for ids being in range. Little batches take one launch (`align_kernel.py`) and
    middling ones four, in place of two dozen of torch's; all give the same bits.
    """
    if ids.dim() != 2 or ids.dtype.is_floating_point:
        raise KernelError(f"ids: {ids.dtype}{list(ids.shape)}, expected integers [tokens, top_k]")
    if 0 < ids.numel() <= ONE_LAUNCH_SLOTS and n_experts <= ONE_LAUNCH_EXPERTS:
        return _align_in_one_launch(ids, n_experts, block_m)
    if 0 < ids.numel() <= BY_EXPERT_SLOTS:
        return align_by_expert(ids, n_experts, block_m)
    return align_reference(ids, n_experts, block_m)


def _align_in_one_launch(ids: torch.Tensor, n_experts: int, block_m: int) -> Alignment:
    import triton
    from moesim_kernels.align_kernel import align_kernel

    bound = padded_bound(ids.numel(), n_experts, block_m)
    options = {"dtype": torch.int32, "device": ids.device}
    slots = torch.full((bound,), ids.numel(), **options)
    made = Alignment(slots, torch.empty(bound // block_m, **options), slots.new_empty(1), block_m)
    padded_experts = max(16, triton.next_power_of_2(n_experts))
    align_kernel[(1,)](
        ids.contiguous(),
        *(made.slots, made.block_expert, made.n_padded),
        *(ids.numel(), bound // block_m),
        EXPERTS=n_experts,
        PADDED_EXPERTS=padded_experts,
        BLOCK_M=block_m,
        CHUNK=max(16, 8192 // padded_experts),
        num_warps=8,
    )
    return made


def align_by_expert(ids: torch.Tensor, n_experts: int, block_m: int) -> Alignment:
    """What `align` returns, by a program for each expert that looks at all slots."""
    import triton
    from moesim_kernels.align_kernel import count_kernel, place_kernel

    bound, flat = padded_bound(ids.numel(), n_experts, block_m), ids.contiguous()
    options = {"dtype": torch.int32, "device": ids.device}
    made = Alignment(
        torch.full((bound,), ids.numel(), **options),
        torch.full((bound // block_m,), -1, **options),
        torch.empty(1, **options),
        block_m,
    )
    counts = torch.empty(n_experts, **options)
    chunk = min(1024, max(16, triton.next_power_of_2(ids.numel())))
    count_kernel[(n_experts,)](flat, counts, ids.numel(), CHUNK=chunk)
    place_kernel[(n_experts,)](
        *(flat, counts, made.slots, made.block_expert, made.n_padded, ids.numel()),
        EXPERTS=n_experts,
        PADDED_EXPERTS=triton.next_power_of_2(n_experts),
        BLOCK_M=block_m,
        CHUNK=chunk,
    )
    return made


def align_reference(ids: torch.Tensor, n_experts: int, block_m: int) -> Alignment:
    """What `align` returns, in plain torch."""
    n_slots, device = ids.numel(), ids.device
    bound = padded_bound(n_slots, n_experts, block_m)
    order, counts = sort_slots(ids, n_experts)
    padded = (counts[:-1] + block_m - 1) // block_m * block_m
    ends = torch.cumsum(padded, 0)
    # Where each expert's list begins, before and after padding; absent slots go past the end.
    first = torch.cumsum(counts, 0) - counts
    first_padded = torch.cat([ends - padded, torch.full_like(ends[:1], bound)])
    expert = torch.repeat_interleave(counts, output_size=n_slots)
    rank = torch.arange(n_slots, device=device) - first[expert]
    row = torch.where(expert == n_experts, bound, first_padded[expert] + rank)
    slots = torch.full((bound + 1,), n_slots, dtype=torch.int32, device=device)
    slots[row] = order.int()
    starts = torch.arange(0, bound, block_m, device=device)
    block_expert = torch.searchsorted(ends, starts, right=True)
    block_expert = torch.where(block_expert >= n_experts, -1, block_expert).int()
    return Alignment(slots[:bound], block_expert, ends[-1:].int(), block_m)
