"""Sorted slots, padded blocks and moved rows keep every slot exactly once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_kernels.align import (
    ONE_LAUNCH_SLOTS,
    align,
    align_by_expert,
    align_reference,
    padded_bound,
)
from moesim_kernels.errors import KernelError
from moesim_kernels.permute import permute, permute_reference, sum_slots, unpermute


@st.composite
def _routings(draw) -> tuple[torch.Tensor, int]:
    n_experts = draw(st.integers(1, 9))
    n_tokens, top_k = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    flat = draw(
        st.lists(
            st.integers(-1, n_experts - 1), min_size=n_tokens * top_k, max_size=n_tokens * top_k
        )
    )
    return torch.tensor(flat, dtype=torch.int32).reshape(n_tokens, top_k), n_experts


@settings(max_examples=60, deadline=None)
@given(
    routing=_routings(),
    block_m=st.sampled_from([1, 4, 16]),
    sort=st.sampled_from([align, align_by_expert, align_reference]),
)
def test_each_slot_stands_once_in_a_block_of_its_expert(
    device: str, routing, block_m: int, sort
) -> None:
    ids, n_experts = routing[0].to(device), routing[1]
    made = sort(ids, n_experts, block_m)
    used = int(made.n_padded)
    assert used <= padded_bound(ids.numel(), n_experts, block_m) == made.slots.numel()
    assert (made.slots[used:] == ids.numel()).all()
    assert (made.block_expert[used // block_m :] == -1).all()
    blocks = made.slots[:used].reshape(-1, block_m)
    seen = []
    for expert, block in zip(made.block_expert.tolist(), blocks, strict=False):
        slots = block[block < ids.numel()]
        assert len(slots) > 0
        assert (ids.reshape(-1)[slots.long()] == expert).all()
        seen += slots.tolist()
    assert sorted(seen) == (ids.reshape(-1) >= 0).nonzero()[:, 0].tolist()
    experts = made.block_expert[: used // block_m]
    assert torch.equal(experts, experts.sort().values)


@pytest.mark.parametrize("n_experts", [1, 5, 33])
def test_a_program_an_expert_and_torch_align_alike(n_experts: int, device: str) -> None:
    draw = torch.Generator().manual_seed(n_experts)
    ids = torch.randint(-1, n_experts, (ONE_LAUNCH_SLOTS // 4, 5), generator=draw).to(device)
    found, by_torch = (sort(ids, n_experts, 16) for sort in (align, align_reference))
    assert torch.equal(found.slots, by_torch.slots)
    assert torch.equal(found.block_expert, by_torch.block_expert)
    assert torch.equal(found.n_padded, by_torch.n_padded)


@pytest.mark.parametrize("n_experts", [1, 5, 60, 256, 300])
def test_one_launch_and_torch_align_alike(n_experts: int, device: str) -> None:
    draw = torch.Generator().manual_seed(n_experts)
    ids = torch.randint(-1, n_experts, (ONE_LAUNCH_SLOTS // 8, 8), generator=draw).to(device)
    ids = ids.where(torch.rand(ids.shape, generator=draw).to(device) < 0.7, n_experts // 2)
    found, expected = (sort(ids.int(), n_experts, 16) for sort in (align, align_reference))
    assert torch.equal(found.slots, expected.slots)
    assert torch.equal(found.block_expert, expected.block_expert)
    assert torch.equal(found.n_padded, expected.n_padded)


@settings(max_examples=10, deadline=None)
@given(routing=_routings())
def test_permute_groups_rows_by_expert_and_unpermute_sums_them_back(device: str, routing) -> None:
    ids, n_experts = routing[0].to(device), routing[1]
    x = torch.randn(len(ids), 5, generator=torch.Generator().manual_seed(0)).to(device)
    moved = permute(x, ids, n_experts)
    n_rows = int(moved.counts.sum())
    assert torch.equal(moved.rows[:n_rows], permute_reference(x, ids, n_experts))
    assert torch.equal(moved.position < 0, ids < 0)
    assert moved.counts.tolist() == [int((ids == e).sum()) for e in range(n_experts)]
    held = (ids >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(unpermute(moved.rows, moved.position), x * held)


def test_unpermute_weights_each_row_and_rounds_once(device) -> None:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(6, 1030, generator=draw).half().to(device)  # wider than one program's columns
    ids = torch.rand(6, 5, generator=draw).topk(3, 1).indices.int().to(device)
    weights = torch.rand(6, 3, generator=draw).to(device)
    moved = permute(x, ids, 5)
    y = unpermute(moved.rows, moved.position, weights)
    expected = (x.float() * weights.sum(1, keepdim=True)).half()
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


def test_sum_slots_skips_absent_experts_even_where_rows_hold_nonsense(device) -> None:
    rows = torch.arange(12.0, device=device).reshape(4, 3)
    rows[3] = float("nan")
    ids = torch.tensor([[0, 1], [2, -1]], device=device)
    assert sum_slots(rows, ids).tolist() == [[3.0, 5.0, 7.0], [6.0, 7.0, 8.0]]


def test_shapes_that_do_not_match_are_refused(device) -> None:
    with pytest.raises(KernelError, match="expected integers"):
        align(torch.zeros(3, 2), 4, 16)
    with pytest.raises(KernelError, match="expected 6 rows"):
        unpermute(torch.zeros(5, 4), torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(KernelError, match="ids: shape"):
        permute(torch.zeros(3, 4), torch.zeros(2, 2, dtype=torch.int32), 4)
