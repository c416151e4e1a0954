"""BlockFFN: passes against the bytes they read, speculation against a loop, and the claims."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.reproduce import blockffn
from moesim.reproduce.blockffn import Speculation, draft_seconds, pass_seconds
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from traces.model import ModelSpec
from traces.models import load_model


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return blockffn.claims(Sources())


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return load_model(blockffn.MODEL)


def only(claims: list[Claim], name: str) -> Claim:
    (found,) = [claim for claim in claims if claim.claim == name]
    return found


def activity(model: ModelSpec, n_tokens: int, n_active: int) -> np.ndarray:
    """The first experts of every layer, at every token."""
    active = np.zeros((n_tokens, model.n_moe_layers, model.n_experts), bool)
    active[:, :, :n_active] = True
    return active


# --- speculation --------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0, 1))
def test_a_round_yields_at_least_one_token_and_at_most_its_chunk(
    chunk: int, acceptance: float
) -> None:
    tokens = Speculation(chunk, acceptance).tokens
    assert 1 <= tokens <= chunk
    assert Speculation(chunk + 1, acceptance).tokens >= tokens * (1 - 1e-12)


def test_tokens_of_a_round_are_those_of_drawn_rounds() -> None:
    how = Speculation(8, 0.75)
    right = np.random.default_rng(0).random((200_000, 7)) < 0.75
    accepted = np.logical_and.accumulate(right, axis=1).sum(axis=1)
    assert (1 + accepted).mean() == pytest.approx(how.tokens, rel=0.005)
    assert Speculation(8, 1.0).tokens == 8
    assert Speculation(8, 0.0).tokens == 1


def test_chunks_and_chances_out_of_range_are_refused() -> None:
    with pytest.raises(SimulationError, match="chunk=0"):
        Speculation(chunk=0)
    with pytest.raises(SimulationError, match=r"acceptance=1\.2"):
        Speculation(acceptance=1.2)


# --- passes -------------------------------------------------------------------------------------


def test_a_pass_takes_longer_by_the_bytes_of_the_experts_it_reads(model: ModelSpec) -> None:
    box = blockffn.edge_box()
    rate = box.device.memory_bytes_per_s * box.efficiency.gpu_memory_share
    few, many = (pass_seconds(model, box, activity(model, 16, n), 1) for n in (10, 50))
    read = 40 * model.n_moe_layers * model.expert_params * 2
    assert many - few == pytest.approx(read / rate, rel=1e-6)
    assert many > model.n_moe_layers * 50 * model.expert_params * 2 / rate


def test_a_chunk_reads_the_union_of_its_tokens_once(model: ModelSpec) -> None:
    box = blockffn.edge_box()
    turns = np.zeros((16, model.n_moe_layers, model.n_experts), bool)
    for token in range(16):
        turns[token, :, token % 8 * 7 : token % 8 * 7 + 7] = True  # 56 experts in turn
    alone = activity(model, 16, 7)
    assert pass_seconds(model, box, turns, 1) == pytest.approx(pass_seconds(model, box, alone, 1))
    whole = pass_seconds(model, box, activity(model, 16, 56), 8)
    assert pass_seconds(model, box, turns, 8) == pytest.approx(whole)


def test_a_draft_reads_the_drafter_and_little_else(model: ModelSpec) -> None:
    box = blockffn.edge_box()
    weights = 6 * 1792**2 + 3 * 1792 * 7168 + 1792 * 16_384
    least = 2 * weights / box.device.memory_bytes_per_s
    assert least < draft_seconds(model, box) < 1.5 * least


def test_nothing_is_copied_on_a_device_of_one_memory() -> None:
    assert blockffn.edge_box().unified


# --- claims -------------------------------------------------------------------------------------


def test_every_identity_is_reproduced(claims: list[Claim]) -> None:
    exact = [claim for claim in claims if claim.tier == "A"]
    assert len(exact) == 9
    assert {claim.verdict for claim in exact} == {"inside"}


def test_decoding_in_chunks_is_as_much_faster_as_the_band_says(claims: list[Claim]) -> None:
    (speed,) = [claim for claim in claims if claim.published == 3.67]
    assert (speed.verdict, speed.low, speed.high) == ("inside", 2.5, 4.0)
    assert "assumed acceptance of 0.75" in speed.note


def test_sparsity_and_speculation_each_gain_and_together_more(claims: list[Claim]) -> None:
    (both,) = [claim.simulated for claim in claims if claim.published == 3.67]
    sparse = only(claims, "sparse kernels alone, one by one, over dense").simulated
    plain = only(claims, "speculation alone, all experts, over dense").simulated
    on_top = only(claims, "sparse kernels over dense ones, both in chunks").simulated
    assert 1 < sparse < both
    assert 1 < plain < both
    assert plain * on_top == pytest.approx(both)
    anew = only(claims, "chunks of 8 over dense when experts do not stay on").simulated
    assert plain < anew < both


def test_the_acceptance_decides_and_its_range_is_shown(claims: list[Claim]) -> None:
    (assumed,) = [claim.simulated for claim in claims if claim.published == 3.67]
    low = only(claims, "the same at an acceptance of 0.6").simulated
    high = only(claims, "the same at an acceptance of 0.9").simulated
    assert low < assumed < high
    assert high / low > 2


def test_whatever_the_seed_drawn_activity_has_the_published_sparsity() -> None:
    for seed in (1, 2):
        drawn = blockffn.bench(seed)
        assert drawn.active.shape == (blockffn.TOKENS, 35, 56)
        found = [
            claim for claim in blockffn._drawn(drawn.active) if claim.claim.endswith("activity")
        ]
        assert [claim.verdict for claim in found] == ["inside", "inside"]


def test_a_bench_with_all_experts_does_not_care_which_are_on() -> None:
    one = blockffn.bench(0)
    other = replace(one, active=~one.active)
    assert one.one_by_one(False) == other.one_by_one(False)
    assert one.one_by_one(True).pass_s < other.one_by_one(True).pass_s
