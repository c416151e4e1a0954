"""Symbolic-MoE: recruiting as in its code, switches, and time with and without grouping."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.devices import load_device
from moesim.errors import SimulationError
from moesim.reproduce import symbolic_moe
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from moesim.reproduce.symbolic_moe import (
    RARE_SHARE,
    Bench,
    grouped_s,
    naive_s,
    recruit,
    recruit_odds,
    strength,
    switches,
    windowed_s,
)

SIMPLE = Bench(20.0, np.array([0.0, 3.0, 4.0]))  # batches of two
chosen_of = st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return symbolic_moe.claims(Sources())


def test_every_claim_with_a_band_is_inside(claims: list[Claim]) -> None:
    banded = [one for one in claims if one.verdict != "shown"]
    assert len(banded) == 6
    assert all(one.inside for one in banded)
    assert len({one.claim for one in claims}) == len(claims)
    assert all(one.system == "symbolic-moe" and one.note for one in claims)


def test_switches_fall_from_every_job_to_one_for_each_model() -> None:
    jobs = np.arange(500 * 3) % 16
    assert switches(jobs) == 1500
    assert switches(np.sort(jobs)) == 16


@given(chosen_of)
def test_switches_are_the_changes_of_model_in_a_row(rows: list[list[int]]) -> None:
    jobs = np.array(rows)
    assert switches(jobs) == 1 + np.count_nonzero(np.diff(jobs.ravel()))
    assert switches(np.sort(jobs, axis=None)) == len(np.unique(jobs))


def test_naive_time_loads_whenever_the_model_changes() -> None:
    done = naive_s(np.array([[0, 0, 1], [1, 2, 2]]), SIMPLE)
    assert done.tolist() == [2 * 20 + 3 * 3, 3 * 20 + 6 * 3]


def test_grouped_time_loads_once_and_answers_in_batches() -> None:
    done = grouped_s(np.array([[0, 0, 1], [0, 2, 2]]), SIMPLE)
    first = 20 + 4 + 3  # three answers of model 0: a batch of two and one more
    second = first + 20 + 4  # two answers of model 2
    assert done.tolist() == [second + 20 + 3, second]


@given(chosen_of, st.integers(1, 4))
def test_grouping_never_takes_longer_and_loads_every_model_once(
    rows: list[list[int]], n_gpus: int
) -> None:
    chosen = np.array(rows)
    size = np.bincount(chosen.ravel())
    work_s = sum(20.0 + SIMPLE.group_s(int(n)) for n in size if n)
    one = grouped_s(chosen, SIMPLE).max()
    assert one == pytest.approx(work_s)
    assert one <= naive_s(chosen, SIMPLE).max() + 1e-9
    more = grouped_s(chosen, SIMPLE, n_gpus).max()
    longest_s = max(20.0 + SIMPLE.group_s(int(n)) for n in size)
    assert max(work_s / n_gpus, longest_s) - 1e-9 <= more <= work_s / n_gpus + longest_s


@given(chosen_of)
def test_a_window_over_everything_is_one_group(rows: list[list[int]]) -> None:
    chosen = np.array(rows)
    np.testing.assert_allclose(windowed_s(chosen, SIMPLE, len(chosen)), grouped_s(chosen, SIMPLE))
    assert windowed_s(chosen, SIMPLE, 1).max() >= grouped_s(chosen, SIMPLE).max() - 1e-9


def test_strength_is_the_shifted_sum_squared() -> None:
    assert strength(np.array([[1.0, 2.0], [0.0, 1.0]])).tolist() == [0.9, 0.1]
    shifted = strength(np.array([[-3.0], [1.0]]))  # shifted to 1 and 5
    np.testing.assert_allclose(shifted, [1 / 26, 25 / 26])


def test_only_models_with_a_positive_score_are_drawn_unless_none_has_one() -> None:
    profiles = np.array([[3.0, -2.0], [1.0, -1.0], [-1.0, -3.0]])
    odds = recruit_odds(profiles, np.array([[0, 0], [1, 1]]))
    total = strength(profiles)
    positive = np.array([6.0, 2.0, 0.0]) * total
    np.testing.assert_allclose(odds[0], positive / positive.sum())
    shifted = np.array([3.0, 5.0, 1.0]) * total  # scores -4, -2, -6
    np.testing.assert_allclose(odds[1], shifted / shifted.sum())


def test_draws_follow_their_odds_and_repeat_models() -> None:
    odds = np.tile([0.5, 0.3, 0.2], (20_000, 1))
    chosen = recruit(odds, 3, np.random.default_rng(0))
    share = np.bincount(chosen.ravel()) / chosen.size
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.01)
    same = (chosen == chosen[:, :1]).all(axis=1).mean()
    assert same == pytest.approx(0.5**3 + 0.3**3 + 0.2**3, abs=0.01)


@given(st.integers(0, 2**31))
def test_models_below_a_twentieth_of_the_draws_are_replaced_by_frequent_ones(seed: int) -> None:
    popularity = np.array([0.45, 0.3, 0.2, 0.03, 0.02])
    chosen = recruit(np.tile(popularity, (2000, 1)), 3, np.random.default_rng(seed))
    count = np.bincount(chosen.ravel(), minlength=5)
    assert count.sum() == 6000
    assert count[3:].tolist() == [0, 0]
    assert (count[:3] >= RARE_SHARE * 6000).all()


def test_recruiting_where_no_model_is_frequent_is_refused() -> None:
    odds = np.full((1000, 100), 0.01)
    with pytest.raises(SimulationError, match="no model has 5% of the draws"):
        recruit(odds, 3, np.random.default_rng(0))


def test_batching_answers_costs_nothing_until_arithmetic_binds() -> None:
    on = symbolic_moe.bench(load_device("rtx-a6000"), 20.0)
    assert on.answer_s[0] == 0
    assert on.answer_s[64] == on.answer_s[1]
    assert on.answer_s[256] > on.answer_s[1]
    assert on.group_s(300) == pytest.approx(on.answer_s[256] + on.answer_s[44])


def test_grouping_makes_the_first_question_wait(claims: list[Claim]) -> None:
    found = {one.claim: one.simulated for one in claims}
    for load in (20, 60):
        naive, grouped = (
            found[f"first question answered after, s, {how}, loading in {load} s"]
            for how in ("naive", "grouped")
        )
        assert grouped > naive
