"""Pre-gated MoE: the engine against closed forms and golden blocks, memory, and the claims."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.offload.prices import Weights, prices
from moesim.reproduce import pre_gated_moe
from moesim.reproduce.claim import Claim
from moesim.reproduce.pre_gated_moe import SCHEDULES, Blocks, closed_form_s, simulated_s
from moesim.reproduce.sources import Sources
from traces.models import load_model

OUTSIDE = {"Switch-base-128: peak memory, share of GPU-only": "no more than this"}
times = st.floats(0, 10)


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return pre_gated_moe.claims(Sources())


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    n_tokens, n_blocks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    row = st.lists(times, min_size=n_blocks, max_size=n_blocks)
    copy_s = draw(st.lists(row, min_size=n_tokens, max_size=n_tokens))
    return Blocks(np.array(copy_s), draw(times), draw(times), draw(times))


# --- timelines ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(blocks(), st.sampled_from(SCHEDULES))
def test_the_engine_takes_as_long_as_the_formulas(one: Blocks, schedule: str) -> None:
    np.testing.assert_allclose(
        simulated_s(one, schedule), closed_form_s(one, schedule), rtol=1e-9, atol=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_pre_gating_is_between_gpu_only_and_on_demand(one: Blocks) -> None:
    ours = simulated_s(one, "pre-gated")
    assert (ours <= simulated_s(one, "on-demand") + 1e-9).all()
    # The last block has no gate of its own.
    assert (ours + one.gate_s >= simulated_s(one, "gpu-only") - 1e-9).all()


@pytest.mark.parametrize(
    ("activated", "ms"), [(1, (1.550, 2.305, 96.637, 1.550)), (4, (1.550, 4.570, 96.637, 3.070))]
)
def test_golden_blocks_come_out_of_the_engine_exactly(
    activated: int, ms: tuple[float, ...]
) -> None:
    model = load_model("switch-base-128")
    for schedule, expected in zip(SCHEDULES, ms, strict=True):
        seconds = [
            simulated_s(pre_gated_moe.blocks_of(model, np.full((2, n), activated)), schedule)[1]
            for n in (5, 6)
        ]
        assert 1e3 * (seconds[1] - seconds[0]) == pytest.approx(expected, abs=5e-4)


def test_copies_that_take_no_time_make_all_schedules_gpu_only() -> None:
    one = Blocks(np.zeros((3, 6)), 0.0)
    for schedule in ("on-demand", "prefetch-all"):
        np.testing.assert_allclose(simulated_s(one, schedule), simulated_s(one, "gpu-only"))


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SimulationError, match=r"'post-gated' is unknown, known: gpu-only"):
        simulated_s(Blocks(np.zeros((1, 2)), 0.0), "post-gated")
    with pytest.raises(SimulationError, match="'post-gated' is unknown"):
        closed_form_s(Blocks(np.zeros((1, 2)), 0.0), "post-gated")


# --- memory -------------------------------------------------------------------------------------


def test_memory_rises_from_on_demand_over_pre_gated_to_prefetch_all() -> None:
    model = load_model("switch-base-128")
    order = ("on-demand", "pre-gated", "prefetch-all", "gpu-only")
    found = [pre_gated_moe.peak_bytes(model, schedule, 4) for schedule in order]
    assert found == sorted(found)
    expert = 18_874_368
    assert found[1] - found[0] == 4 * expert
    assert found[2] - found[1] == (256 - 8) * expert
    assert found[3] - found[2] == (12 * 128 - 256) * expert


def test_prefetch_all_needs_what_pre_gating_needs_when_all_experts_are_active() -> None:
    model = load_model("switch-base-64")
    ours, all_of_them = (
        pre_gated_moe.peak_bytes(model, schedule, 64) for schedule in ("pre-gated", "prefetch-all")
    )
    assert ours == all_of_them


# --- routing of beams ---------------------------------------------------------------------------


def test_a_decoder_is_the_second_half_of_the_layers() -> None:
    model = pre_gated_moe.decoder(load_model("switch-base-128"))
    assert model.n_layers == 12
    assert model.moe_layers == (1, 3, 5, 7, 9, 11)
    assert model.n_encoder_layers == 0


def test_beams_share_experts_and_each_activates_one() -> None:
    model = pre_gated_moe.decoder(load_model("switch-base-128"))
    work = pre_gated_moe.beam_steps(model, 0)
    assert work.n_steps == 256 * 6
    activated = np.diff(work.start)
    assert activated.min() >= 1
    assert activated.max() <= 4
    assert (np.add.reduceat(work.tokens, work.start[:-1]) == 4).all()


def test_the_next_blocks_experts_are_known_exactly_but_for_the_first_block() -> None:
    model = pre_gated_moe.decoder(load_model("switch-base-64"))
    work = pre_gated_moe.beam_steps(model, 0)
    known = pre_gated_moe.exact_next(work)
    for step in range(60):
        asked = work.expert[work.start[step] : work.start[step + 1]].tolist()
        found = known.expert[known.start[step] : known.start[step + 1]].tolist()
        assert found == (asked if step % 6 else [])


def test_on_the_simulator_only_first_blocks_miss() -> None:
    model = pre_gated_moe.decoder(load_model("switch-base-64"))
    work = pre_gated_moe.beam_steps(model, 0)
    costs = prices(model, pre_gated_moe.machine(), work, Weights(32))
    ours = pre_gated_moe.pre_gated(work, costs)
    in_first = np.diff(work.start)[::6].sum()
    assert ours.loads <= in_first
    assert ours.hit_rate >= 1 - in_first / len(work.expert)


# --- claims -------------------------------------------------------------------------------------


def test_every_identity_holds_but_peak_memory(claims: list[Claim]) -> None:
    exact = [one for one in claims if one.tier == "A" and one.inside is not None]
    assert len(exact) == 9
    assert [one.claim for one in exact if not one.inside] == list(OUTSIDE)


def test_claims_outside_their_band_are_the_known_ones_and_say_why(claims: list[Claim]) -> None:
    outside = {one.claim: one.note for one in claims if one.verdict == "outside"}
    assert set(outside) == set(OUTSIDE)
    assert all(OUTSIDE[claim] in note for claim, note in outside.items())


def test_every_claim_has_its_own_name_and_a_note(claims: list[Claim]) -> None:
    assert len({one.claim for one in claims}) == len(claims)
    assert all(one.system == "pre-gated-moe" and one.note for one in claims)


def test_systems_rank_as_published(claims: list[Claim]) -> None:
    for model in ("Switch-base", "Switch-large-128"):
        rates = [
            next(c.simulated for c in claims if c.claim == f"{model}: tokens/s, {schedule}")
            for schedule in ("prefetch-all", "on-demand", "pre-gated")
        ]
        assert rates == sorted(rates)


def test_misses_on_the_cpu_are_faster_than_pre_gating_on_rooflines(claims: list[Claim]) -> None:
    row = next(c for c in claims if c.claim == "roofline: honest baseline, over pre-gated")
    assert row.verdict == "shown"
    assert row.simulated < 1
