"""The planner is never worse than EPLB on what it saw, and finds what is there to be found."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.collective import AllToAllLaw
from hwmodels.cost import ExpertLaw
from planners.dispatch import Routing
from planners.drift import NO_DRIFT, Drift, group_kin, token_kin
from planners.errors import PlanError
from planners.expected_traffic import GroupChances, expected_price, relocate_expected, visit_share
from planners.incumbents import Shape, contiguous, eplb_global, eplb_hierarchical
from planners.layer import LayerPrice, LayerTask, Search, tail_load
from planners.placement import Evidence, PlacementOptions, plan_placement
from planners.plan import max_over_mean, rank_loads, replica_counts
from planners.step_time import MoeLaws
from planners.traffic import relocate, sampled_price

LAWS = MoeLaws(
    ExpertLaw(launch_s=1e-5, weight_s=1e-6, compute_s=1e-7, activation_s=1e-8),
    AllToAllLaw(latency_s=1e-5, up_s_per_byte=1e-11, out_s_per_byte=2e-11),
    dispatch_bytes=4096.0,
    combine_bytes=8192.0,
)
DRIFT = Drift(relative_sd=0.4, kin_share=0.3, tail=2.0)
WIRE_ONLY = LayerPrice(0.0, 0.0, 0.0, rank_copy_s=1.0, node_copy_s=0.0)


def _skewed(n_layers: int, n_experts: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).pareto(1.5, (n_layers, n_experts)) + 0.05


def _paired_tokens(n_tokens: int, seed: int) -> np.ndarray:
    """Experts 0 and 4, 1 and 5, 2 and 6, 3 and 7 are always chosen together."""
    first = np.random.default_rng(seed).integers(0, 4, n_tokens)
    return np.stack([first, first + 4], axis=1).astype(np.int16)[:, None, :]


@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 4, 40), (8, 8, 32), (16, 4, 64)]))
@settings(max_examples=15, deadline=None)
def test_a_plan_from_counts_is_never_less_balanced_than_eplb_in_any_layer(
    seed: int, sizes: tuple[int, int, int]
) -> None:
    n_ranks, per_node, n_slots = sizes
    load = _skewed(3, 32, seed)
    shape = Shape(n_ranks, n_slots, per_node, n_groups=4)
    evidence = Evidence(load, None, Routing(4, 4, 2))
    plan = plan_placement(evidence, shape, LAWS, PlacementOptions(4096, search=Search(5)))
    ours = max_over_mean(rank_loads(plan, load))
    for form in (eplb_global, eplb_hierarchical):
        assert (ours <= max_over_mean(rank_loads(form(load, shape), load)) * (1 + 1e-9)).all()


def test_a_node_limited_plan_keeps_groups_inside_nodes_and_its_load_below_eplb() -> None:
    load = _skewed(4, 32, 1)
    shape = Shape(8, 48, 4, n_groups=4)
    options = PlacementOptions(4096, node_limited=True)
    plan = plan_placement(Evidence(load, None, Routing(4, 4, 2)), shape, LAWS, options)
    groups = plan.physical_to_logical_map.reshape(4, 2, -1) // 8
    for layer in groups:
        assert not set(layer[0]) & set(layer[1])
    theirs = rank_loads(eplb_hierarchical(load, shape), load).max(axis=1)
    assert (rank_loads(plan, load).max(axis=1) <= theirs * (1 + 1e-9)).all()


def test_experts_that_are_chosen_together_end_up_on_one_rank() -> None:
    topk = _paired_tokens(2000, seed=3)
    counts = np.bincount(topk.ravel(), minlength=8).astype(float)[None]
    shape = Shape(n_ranks=4, n_slots=8, ranks_per_node=4)
    evidence = Evidence(counts, topk, Routing(2))
    plan = plan_placement(
        evidence, shape, LAWS, PlacementOptions(2000, search=Search(200), drift=NO_DRIFT)
    )
    pairs = plan.physical_to_logical_map.reshape(4, 2)
    assert all(abs(int(a) - int(b)) == 4 for a, b in pairs)


def test_equal_inputs_give_equal_plans() -> None:
    topk, load = _paired_tokens(500, seed=0), _skewed(1, 8, 0)
    shape, evidence = Shape(4, 12, 2), Evidence(load, topk, Routing(2))
    one, two = (plan_placement(evidence, shape, LAWS, PlacementOptions(512)) for _ in range(2))
    assert (one.physical_to_logical_map == two.physical_to_logical_map).all()


def _task(load: np.ndarray, copies: np.ndarray, **changes: object) -> LayerTask:
    task = LayerTask(
        load / copies, group_kin(16, 2), 4, 2, LayerPrice(1.0, 0.01, 0.001, 3.0, 2.0), DRIFT
    )
    return replace(task, **changes)


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_search_never_ends_dearer_than_it_began(seed: int, within_nodes: bool) -> None:
    rng = np.random.default_rng(seed)
    topk = np.argsort(rng.random((300, 16)), axis=1)[:, :3].astype(np.int16)
    load = np.bincount(topk.ravel(), minlength=16).astype(float)
    slots = np.arange(16, dtype=np.int32)
    task, search = _task(load, np.ones(16)), Search(20, within_nodes, seed % 100)
    found = relocate(slots, topk, task, search)
    assert sorted(found) == sorted(slots)
    assert sampled_price(found, topk, task) <= sampled_price(slots, topk, task) * (1 + 1e-9)


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_search_on_expectations_never_ends_dearer_either(seed: int, within_nodes: bool) -> None:
    load = _skewed(1, 16, seed)
    start = eplb_global(load, Shape(4, 20, 2))
    copies = replica_counts(start)[0]
    slots, task = start.physical_to_logical_map[0], _task(load[0], copies)
    chances = GroupChances(np.full(2, 0.5), load[0] / load.sum() / copies)
    found = relocate_expected(slots, chances, task, Search(20, within_nodes, seed % 100))
    assert sorted(found) == sorted(slots)
    assert expected_price(found, chances, task) <= expected_price(slots, chances, task) * (1 + 1e-9)


def test_no_rank_of_a_plan_holds_an_expert_twice() -> None:
    load = np.ones((2, 8))
    load[:, 0] = 1000.0  # EPLB would put most redundant slots of this one on the same two ranks
    shape = Shape(n_ranks=2, n_slots=12, ranks_per_node=2)
    plan = plan_placement(Evidence(load, None, Routing(2)), shape, LAWS, PlacementOptions(64))
    for rank in plan.physical_to_logical_map.reshape(-1, 6):
        assert len(set(rank)) == 6


def test_a_cap_on_the_busiest_rank_holds() -> None:
    topk = _paired_tokens(1000, seed=1)[:, 0]
    load = np.bincount(topk.ravel(), minlength=8) * np.array([1.0, 1, 1, 1, 9, 1, 1, 1])
    start = eplb_global(load[None], Shape(4, 8, 4))
    busiest = rank_loads(start, load[None]).max()
    task = LayerTask(load, np.eye(8), 4, 4, WIRE_ONLY, NO_DRIFT, cap=float(busiest))
    found = relocate(start.physical_to_logical_map[0], topk, task, Search(200))
    assert load[found].reshape(4, 2).sum(axis=1).max() <= busiest * (1 + 1e-12)


def test_visit_share_is_the_exact_chance_of_independent_choices() -> None:
    group, expert = np.array([0.6, 0.3]), np.array([0.5, 0.2, 0.4, 0.1])
    held = np.array([0, 1, 2], dtype=np.int32)
    exact = 0.0
    for open_groups in (c for n in range(3) for c in combinations(range(2), n)):
        chance = np.prod([q if g in open_groups else 1 - q for g, q in enumerate(group)])
        missed = np.prod([1 - expert[e] for e in held if e // 2 in open_groups])
        exact += chance * (1 - missed)
    assert visit_share(held, group, expert, np.zeros(2)) == pytest.approx(exact, rel=1e-12)


def test_kin_is_one_for_experts_always_chosen_together_and_none_for_strangers() -> None:
    kin = token_kin(_paired_tokens(4000, seed=2)[:, 0], n_experts=8)
    assert kin[0, 4] == kin[3, 7] == 1.0
    assert kin[0, 1] == kin[0, 5] == 0.0
    independent = np.random.default_rng(0).integers(0, 8, (20_000, 1)).astype(np.int16)
    assert token_kin(independent, 8).sum() == pytest.approx(8)


def test_kin_on_one_rank_raise_its_tail() -> None:
    load, kin = np.full(4, 10.0), group_kin(4, 2)
    task = LayerTask(load, kin, 2, 2, WIRE_ONLY, DRIFT)
    together, apart = np.array([0, 1], dtype=np.int32), np.array([0, 2], dtype=np.int32)
    constants = task.constants()
    tails = [tail_load(held, load, kin, constants) for held in (together, apart)]
    assert tails[0] > tails[1] > 20.0
    exact = 20.0 + 2.0 * 0.4 * np.sqrt(0.7 * 200 + 0.3 * 400)
    assert tails[0] == pytest.approx(exact)


def test_groups_that_do_not_divide_over_nodes_are_refused_by_name() -> None:
    options = PlacementOptions(64, node_limited=True)
    evidence = Evidence(np.ones((1, 12)), None, Routing(2, 3, 2))
    with pytest.raises(PlanError, match="groups=3 .* nodes=2"):
        plan_placement(evidence, Shape(4, 12, 2, n_groups=3), LAWS, options)


@pytest.mark.needs_shared
@pytest.mark.parametrize(("n_ranks", "n_slots"), [(32, 288), (64, 320)])
def test_deepseek_v3_counts_are_balanced_no_worse_than_by_eplb_in_every_layer(
    shared: Path, n_ranks: int, n_slots: int
) -> None:
    files = sorted((shared / "counts").glob("deepseek-v3-*.npz"))
    assert len(files) == 8
    shape = Shape(n_ranks, n_slots, 8, n_groups=8)
    for path in files:
        load = np.load(path)["counts"].astype(float)
        evidence = Evidence(load, None, Routing(8, 8, 4))
        plan = plan_placement(evidence, shape, LAWS, PlacementOptions(4096, search=Search(2)))
        ours = max_over_mean(rank_loads(plan, load))
        for theirs in (eplb_global(load, shape), eplb_hierarchical(load, shape)):
            assert (ours <= max_over_mean(rank_loads(theirs, load)) * (1 + 1e-9)).all(), path.name
        assert contiguous(*load.shape, shape).n_slots == plan.n_slots
