"""Experts split between a GPU and the PIM stacks in its memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.cost import ExpertShape
from hwmodels.devices import load_device
from planners.co_processing import (
    Split,
    UnitRates,
    co_processing_split,
    crossover_tokens,
    device_rates,
    pim_seconds,
    ridge_tokens,
    split_cells,
    unit_seconds,
)
from planners.errors import PlanError

MIXTRAL = ExpertShape(4096, 14336, 3)
STACK = load_device("duplex-logic-pim")
XPU, PIM = device_rates(load_device("duplex")), device_rates(STACK, 5)
N = np.arange(2001)
XPU_S, PIM_S = unit_seconds(XPU, MIXTRAL, N), unit_seconds(PIM, MIXTRAL, N)
SUBSETS = (np.arange(256)[:, None] >> np.arange(8)) & 1  # every split of 8 experts

counts_of = st.lists(st.lists(st.integers(0, 2000), min_size=8, max_size=8), min_size=1, max_size=6)


def golden(counts: list[int]) -> Split:
    return co_processing_split(np.array([counts]), XPU_S, PIM_S)


def best_s(counts: np.ndarray) -> np.ndarray:
    """Shortest makespan of all 256 splits, by trying each."""
    pim = (PIM_S[counts] * (counts > 0)) @ SUBSETS.T
    xpu = (XPU_S[counts] * (counts > 0)) @ (1 - SUBSETS).T
    return np.maximum(pim, xpu).min(axis=1)


def split_plain(tokens: list[int], xpu_s: list[float], pim_s: list[float]) -> list[bool]:
    """The rule of the module's docstring, one step, without arrays."""
    present = [cell for cell in range(len(tokens)) if tokens[cell]]
    moved: list[int] = []

    def makespan(on_pim: list[int]) -> float:
        left = sum(xpu_s[cell] for cell in present if cell not in on_pim)
        return max(left, sum(pim_s[cell] for cell in on_pim))

    for cell in sorted(present, key=tokens.__getitem__):
        if makespan([*moved, cell]) >= makespan(moved):
            break
        moved.append(cell)
    return [cell in moved for cell in range(len(tokens))]


def test_the_handbooks_three_splits_come_out_as_worked_by_hand() -> None:
    mixed = golden([2, 4, 6, 8, 16, 24, 40, 100])
    assert mixed.on_pim[0].tolist() == [True] * 6 + [False] * 2
    assert mixed.pim_s[0] * 1e6 == pytest.approx(237.6, abs=0.05)
    assert mixed.xpu_s[0] * 1e6 == pytest.approx(210.2, abs=0.05)
    sixteen, eight = golden([16] * 8), golden([8] * 8)
    assert (sixteen.on_pim.sum(), eight.on_pim.sum()) == (5, 7)
    assert sixteen.makespan_s[0] * 1e6 == pytest.approx(315.3, abs=0.05)
    assert eight.makespan_s[0] * 1e6 == pytest.approx(185.3, abs=0.05)


def test_one_unit_alone_takes_what_the_handbook_says() -> None:
    counts = np.array([2, 4, 6, 8, 16, 24, 40, 100])
    assert PIM_S[counts].sum() * 1e6 == pytest.approx(700.8, abs=0.05)
    assert XPU_S[counts].sum() * 1e6 == pytest.approx(840.9, abs=0.05)
    assert PIM_S[np.full(8, 8)].sum() * 1e6 == pytest.approx(211.7, abs=0.05)
    for tokens, pim_us in ((8, 26), (16, 53), (32, 106), (128, 423)):
        assert PIM_S[tokens] * 1e6 == pytest.approx(pim_us, abs=0.5)
    assert XPU_S[290] == XPU_S[1] == pytest.approx(105e-6, abs=0.5e-6)


def test_ridge_and_crossover_are_the_papers() -> None:
    assert ridge_tokens(PIM) == pytest.approx(8, rel=0.01)
    assert crossover_tokens(XPU, PIM) == pytest.approx(31.8, abs=0.05)
    assert PIM_S[31] < XPU_S[31]
    assert PIM_S[32] > XPU_S[32]
    assert crossover_tokens(PIM, XPU) == 0
    assert crossover_tokens(XPU, UnitRates(2 * XPU.bytes_per_s, XPU.flop_per_s)) == float("inf")


def test_four_bit_weights_move_the_ridge_to_a_quarter_of_the_tokens() -> None:
    assert ridge_tokens(PIM, 4) == ridge_tokens(PIM) / 4
    at = int(crossover_tokens(XPU, PIM, 4))
    times = [unit_seconds(unit, MIXTRAL, np.array([at, at + 1]), 4) for unit in (XPU, PIM)]
    assert times[1][0] < times[0][0]
    assert times[1][1] > times[0][1]


def test_bank_pim_ties_with_logic_pim_at_four_tokens_and_takes_twice_as_long_from_eight() -> None:
    logic, bank = UnitRates(4.0, 32.0), UnitRates(16.0, 16.0)  # ridges 8 and 1, 4 and 16 times HBM
    ratio = unit_seconds(bank, MIXTRAL, N[1:]) / unit_seconds(logic, MIXTRAL, N[1:])
    assert ratio[4 - 1] == 1.0
    assert ratio[0] == 0.25
    assert (ratio[8 - 1 :] == 2.0).all()


def test_bank_group_pim_takes_as_long_as_logic_pim() -> None:
    bank_group = pim_seconds(load_device("duplex-bankgroup-pim"), 5, MIXTRAL, N)
    np.testing.assert_array_equal(bank_group, PIM_S)
    np.testing.assert_array_equal(PIM_S, pim_seconds(STACK, 5, MIXTRAL, N))


@given(counts_of)
def test_both_units_are_never_slower_than_either_unit_rule_alone(rows: list[list[int]]) -> None:
    counts = np.array(rows)
    split = co_processing_split(counts, XPU_S, PIM_S)
    one_at_a_time = np.minimum(XPU_S, PIM_S)[counts].sum(axis=1)
    for alone in (XPU_S[counts].sum(axis=1), PIM_S[counts].sum(axis=1), one_at_a_time):
        assert (split.makespan_s <= alone * (1 + 1e-12)).all()


@given(counts_of, st.booleans())
def test_every_expert_with_a_token_is_computed_once(rows: list[list[int]], by_space: bool) -> None:
    counts = np.array(rows)
    split = co_processing_split(counts, XPU_S, PIM_S, np.arange(8) % 4 if by_space else None)
    assert not split.on_pim[counts == 0].any()
    np.testing.assert_allclose(
        split.pim_s, (PIM_S[counts] * split.on_pim * (counts > 0)).sum(axis=1)
    )
    np.testing.assert_allclose(
        split.xpu_s, (XPU_S[counts] * ~split.on_pim * (counts > 0)).sum(axis=1)
    )


@given(counts_of)
def test_the_pim_side_has_the_experts_with_the_fewest_tokens(rows: list[list[int]]) -> None:
    counts = np.array(rows)
    on_pim = co_processing_split(counts, XPU_S, PIM_S).on_pim
    most = np.where(on_pim, counts, 0).max(axis=1)
    least = np.where(on_pim | (counts == 0), 10**6, counts).min(axis=1)
    assert (most <= least).all()


@given(st.lists(st.lists(st.integers(0, 290), min_size=8, max_size=8), min_size=1, max_size=6))
def test_no_split_is_better_while_the_gpus_time_is_flat(rows: list[list[int]]) -> None:
    counts = np.array(rows)
    split = co_processing_split(counts, XPU_S, PIM_S)
    np.testing.assert_allclose(split.makespan_s, best_s(counts), rtol=1e-12)


def test_up_to_2000_tokens_the_best_of_all_splits_is_within_a_tenth() -> None:
    counts = np.random.default_rng(1).integers(0, 2001, (20_000, 8))
    found, best = co_processing_split(counts, XPU_S, PIM_S).makespan_s, best_s(counts)
    assert (found >= best * (1 - 1e-12)).all()
    assert (found / best).max() < 1.10
    assert (found / best).mean() < 1.02


@given(counts_of)
def test_a_memory_space_is_used_by_one_unit_only(rows: list[list[int]]) -> None:
    counts, space = np.array(rows), np.arange(8) % 4
    on_pim = co_processing_split(counts, XPU_S, PIM_S, space).on_pim
    for one in range(4):
        of_space = on_pim[:, space == one] | (counts[:, space == one] == 0)
        none = ~on_pim[:, space == one]
        assert (of_space.all(axis=1) | none.all(axis=1)).all()


@given(counts_of)
def test_spaces_of_one_expert_each_are_no_rule(rows: list[list[int]]) -> None:
    counts = np.array(rows)
    free = co_processing_split(counts, XPU_S, PIM_S)
    np.testing.assert_array_equal(
        free.on_pim, co_processing_split(counts, XPU_S, PIM_S, np.arange(8)).on_pim
    )


cells = st.lists(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 64), st.integers(1, 64)), min_size=0, max_size=9
    ),
    min_size=0,
    max_size=6,
)


@settings(max_examples=200)
@given(cells)
def test_compiled_and_plain_rule_agree_on_steps_of_any_length(
    steps: list[list[tuple[int, int, int]]],
) -> None:
    flat = np.array([cell for step in steps for cell in step], np.int64).reshape(-1, 3)
    start = np.cumsum([0, *map(len, steps)]).astype(np.int64)
    xpu_s, pim_s = flat[:, 1] / 8, flat[:, 2] / 8  # sums without rounding
    found = split_cells(start, np.ascontiguousarray(flat[:, 0]), xpu_s, pim_s)
    expected: list[bool] = []
    for step in steps:
        tokens, xpu, pim = ([cell[i] for cell in step] for i in range(3))
        expected += split_plain(tokens, [s / 8 for s in xpu], [s / 8 for s in pim])
    assert found.tolist() == expected


def test_a_fixed_cost_is_paid_by_every_expert_with_a_token() -> None:
    unit = UnitRates(XPU.bytes_per_s, XPU.flop_per_s, 5e-6)
    np.testing.assert_allclose(
        unit_seconds(unit, MIXTRAL, N) - XPU_S, np.where(N > 0, 5e-6, 0), atol=1e-15
    )


@pytest.mark.parametrize(
    ("counts", "space", "message"),
    [
        ([[2001]], None, r"counts=2001\.\.2001, expected 0\.\.2000"),
        ([[-1]], None, r"counts=-1\.\.-1, expected 0\.\.2000"),
        ([1, 2], None, r"expected int\[steps, experts\]"),
        ([[1.5]], None, r"expected int\[steps, experts\]"),
        ([[1, 2]], [0], "expected one id >= 0 for each of 2"),
        ([[1, 2]], [0, -1], "expected one id >= 0 for each of 2"),
    ],
)
def test_wrong_counts_and_spaces_are_refused(
    counts: list[object], space: list[int] | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        co_processing_split(
            np.array(counts), XPU_S, PIM_S, None if space is None else np.array(space)
        )


def test_a_unit_without_bandwidth_and_negative_tokens_are_refused() -> None:
    with pytest.raises(PlanError, match="bytes_per_s=0"):
        UnitRates(0, 1)
    with pytest.raises(PlanError, match="tokens=-1"):
        unit_seconds(XPU, MIXTRAL, np.array([-1]))
