"""Duplex: identities of the device, laws of its stages, and the claims with their verdicts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.lower.pim_stages import STAGES, Stages, holders, pair_law, run, serve
from moesim.reproduce import duplex
from moesim.reproduce.claim import Claim
from moesim.reproduce.duplex import machine, workload
from moesim.reproduce.sources import Sources
from traces.counting import total_params
from traces.formats.detect import read_any
from traces.models import load_model
from traces.routing import RoutingTrace

# Claims outside their band, and why, in the words of their notes.
OUTSIDE = {
    "Mixtral: Duplex over GPU, lowest": "both units tie",
    "Mixtral: +PE+ET over GPU, highest": "nominal rate",
    "Mixtral: +PE+ET over GPU, lowest": "both units tie",
    "GLaM: +PE+ET over GPU, highest": "nominal rate",
    "Mixtral: PE adds, %, mean": "both units tie",
    "Mixtral: energy a token, %, best cell, AttAcc's path": "shorter one",
    "Mixtral: +PE+ET over Bank-PIM, highest": "busiest device",
    "Mixtral: +PE+ET over Bank-PIM, mean": "busiest device",
}


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return duplex.claims(Sources())


def figure(claims: list[Claim], name: str) -> float:
    return next(one.simulated for one in claims if one.claim == name)


def test_every_identity_holds(claims: list[Claim]) -> None:
    exact = [one for one in claims if one.tier == "A"]
    assert len(exact) == 13
    assert all(one.inside for one in exact)


def test_claims_outside_their_band_are_the_known_ones_and_say_why(claims: list[Claim]) -> None:
    outside = {one.claim: one.note for one in claims if one.verdict == "outside"}
    assert set(outside) == set(OUTSIDE)
    assert all(OUTSIDE[claim] in note for claim, note in outside.items())


def test_every_claim_has_its_own_name_and_trends_name_their_assumptions(
    claims: list[Claim],
) -> None:
    assert len({one.claim for one in claims}) == len(claims)
    assert all(one.system == "duplex" and one.convention for one in claims)
    assert all(one.note for one in claims if one.tier == "C")


def test_the_largest_gain_without_co_processing_is_in_the_papers_cell() -> None:
    found = duplex.grid("Mixtral", 0).speedup("duplex")
    assert divmod(int(found.argmax()), 3) == (0, 2)  # batch 32, length 4096
    assert found.max() == pytest.approx(2.51, rel=0.05)


def test_energy_falls_by_about_as_much_as_published_on_all_three_models(
    claims: list[Claim],
) -> None:
    for name in ("Mixtral", "GLaM", "Grok-1"):
        row = next(one for one in claims if one.claim == f"{name}: energy a token, %, best cell")
        assert row.published is not None
        assert row.simulated == pytest.approx(row.published, abs=5)


def test_skew_raises_what_co_processing_gains(claims: list[Claim]) -> None:
    claim = "Mixtral: co-processing gain over that with uniform routing, Zipf"
    assert 1.0 < figure(claims, claim) <= 2.0


def test_captured_mixtral_routing_gains_more_than_uniform_routing(shared: Path) -> None:
    trace = read_any(shared / "traces" / "mixtral-8x7b-mtbench.npz")
    assert isinstance(trace, RoutingTrace)
    rng = np.random.default_rng(0)
    counts = duplex.batches(trace.rows(slice(0, 4096)).topk, 64, rng)
    assert counts.shape[1] == 8
    assert (counts.sum(axis=1) == 128).all()
    on = replace(machine("pe+et", 4), spaces=0)
    even, member = pair_law(np.full(8, 1 / 8))
    uniform = duplex.co_processing_gain(rng.multinomial(64, even, 4096) @ member, on)
    assert duplex.co_processing_gain(counts, on) > uniform


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 400), min_size=8, max_size=8), min_size=1, max_size=5))
def test_co_processing_gains_between_nothing_and_twice(rows: list[list[int]]) -> None:
    counts = np.array(rows)
    counts[:, 0] += 1
    gain = duplex.co_processing_gain(counts, replace(machine("pe+et", 4), spaces=0))
    assert 1 - 1e-12 <= gain <= 2 + 1e-12


def test_glam_has_the_papers_143_billion_parameters() -> None:
    assert total_params(duplex.glam_143b()) == pytest.approx(143e9, rel=0.01)
    assert total_params(load_model("grok-1")) == pytest.approx(314e9, rel=0.02)


def test_pair_law_is_two_draws_without_replacement() -> None:
    p = np.array([0.5, 0.3, 0.2])
    odds, member = pair_law(p)
    for row, (i, j) in zip(range(3), combinations(range(3), 2), strict=True):
        drawn = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert odds[row] == pytest.approx(drawn)
        assert member[row].tolist() == [int(expert in (i, j)) for expert in range(3)]
    even, _ = pair_law(np.full(64, 1 / 64))
    np.testing.assert_allclose(even, 1 / 2016)


@pytest.mark.parametrize(("batch", "length"), [(32, 256), (128, 1024)])
def test_a_batch_stays_full_and_every_token_chooses_two_experts(batch: int, length: int) -> None:
    stages = serve(workload("Mixtral", batch, length, length), 0)
    assert (stages.decoding + stages.arrivals == batch).all()
    tokens = stages.decoding + stages.prompt
    assert (stages.counts.sum(axis=2) == 2 * tokens[:, None]).all()
    assert stages.arrivals.sum() == pytest.approx(batch / length * STAGES, rel=0.2)
    assert stages.context.mean() == pytest.approx(1.5 * length * batch, rel=0.1)


def test_serving_draws_the_same_stages_for_the_same_seed() -> None:
    work = workload("Mixtral", 32, 256, 256)
    one, same, other = serve(work, 0), serve(work, 0), serve(work, 1)
    np.testing.assert_array_equal(one.counts, same.counts)
    assert (one.counts != other.counts).any()


def test_a_model_whose_tokens_choose_four_experts_is_refused() -> None:
    work = replace(workload("Mixtral", 32, 256, 256), model=load_model("gpt-oss-20b"))
    with pytest.raises(SimulationError, match="top_k=4, expected 2"):
        serve(work, 0)


def test_experts_are_whole_cut_or_shared_as_the_paper_lays_them_out() -> None:
    assert holders(machine("gpu", 4), 8) == (4, 1)  # Mixtral: two whole experts on a device
    assert holders(machine("pe+et", 4), 8) == (1, 4)  # ET: eight quarters on each
    assert holders(machine("gpu", 16), 8) == (8, 2)  # Grok-1: two devices share one expert
    assert holders(machine("pe+et", 16), 8) == (2, 8)  # four experts a node, cut in eight


def test_devices_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(SimulationError, match="8 experts and 3 devices"):
        holders(machine("gpu", 3), 8)


def only_decode(n_tokens: int, counts: list[int]) -> Stages:
    none = np.zeros(1, np.int64)
    return Stages(np.array([n_tokens]), np.zeros(1), none, none, np.zeros(1), np.array([[counts]]))


def test_a_stage_adds_up_from_its_parts() -> None:
    """32 layers of projections, two all-reduces and two whole experts on the busiest device."""
    on, work = machine("gpu", 4), workload("Mixtral", 32, 256, 256)
    seconds = run(work, only_decode(32, [8] * 8), on).seconds[0]
    expert_s = 2 * 3 * 4096 * 14336 * 2 / 3.35e12
    projections_s = 2 * 4096 * (2 * 4096 + 2 * 1024) / 4 / 3.35e12
    reduce_s = 5e-6 + 6 * 0.75e-6 + 1.5 * 32 * 4096 * 2 / 370e9
    head_s = 2 * 4096 * 32000 / 4 / 3.35e12
    expected = 32 * (expert_s + projections_s + 2 * reduce_s) + head_s
    assert seconds == pytest.approx(expected, rel=0.002)


def test_co_processing_of_a_stage_takes_the_golden_makespan() -> None:
    work = workload("Mixtral", 100, 256, 256)
    stages = only_decode(100, [2, 4, 6, 8, 16, 24, 40, 100])
    one = replace(machine("pe+et", 1), spaces=0)
    both, alone = (run(work, stages, on).seconds[0] for on in (one, replace(one, rule="xpu")))
    assert (alone - both) / 32 * 1e6 == pytest.approx(840.9 - 237.6, abs=0.2)


def test_joules_count_every_byte_once_wherever_it_is_read() -> None:
    work = workload("Mixtral", 64, 256, 256)
    stages = only_decode(64, [16] * 8)
    gpu, pim = machine("gpu", 4), machine("duplex", 4)
    saved = run(work, stages, gpu).joules[0] - run(work, stages, pim).joules[0]
    expert_bits = 32 * 8 * 3 * 4096 * 14336 * 16
    assert saved == pytest.approx(expert_bits * (3.59 - 1.92) * 1e-12, rel=1e-9)


def test_twice_the_gpus_are_faster_but_never_twice_as_fast(claims: list[Claim]) -> None:
    grid = duplex.grid("Mixtral", 0)
    assert (grid.speedup("2xgpu") > 1).all()
    assert (grid.speedup("2xgpu") < 2).all()
    assert figure(claims, "Mixtral: +PE+ET over 2xGPU, mean") > 1
