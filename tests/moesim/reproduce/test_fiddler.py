"""Fiddler: the rule against enumeration, its placement and pricing by hand, and the claims."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.offload.prices import prices
from moesim.reproduce import fiddler
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from traces.models import load_model
from traces.synth import uniform_trace

counts = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def synthetic() -> list[Claim]:
    return fiddler.claims(Sources())


@pytest.fixture(scope="module")
def work() -> fiddler._Work:
    return fiddler._work(uniform_trace(3000, 32, 8, 2))


# --- the rule -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(counts, st.integers(0, 2**8 - 1))
def test_the_threshold_costs_as_little_as_the_best_assignment(row: list[int], mask: int) -> None:
    tokens = np.array([row])
    there = np.array([[bool(mask >> i & 1) for i in range(len(row))]])
    best = fiddler.enumerated_costs(tokens, there)
    assert fiddler.threshold_costs(tokens, there).tolist() == best.tolist()


def test_costs_of_one_layer_by_hand() -> None:
    # on the GPU: 0; absent with 3 tokens: 21 on the CPU; absent with 30: a copy
    tokens, there = np.array([[5, 3, 30]]), np.array([[True, False, False]])
    assert fiddler.enumerated_costs(tokens, there).tolist() == [0 + 21 + 70]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_having_more_experts_on_the_gpu_never_costs_more(there: list[bool]) -> None:
    tokens = np.array([[4, 12, 25]])
    some, every = (fiddler.enumerated_costs(tokens, np.array([t])) for t in (there, [True] * 3))
    assert every[0] <= some[0]


# --- the placement --------------------------------------------------------------------------------


def test_popular_experts_are_those_with_the_highest_counts_over_all_layers() -> None:
    trace = uniform_trace(400, 4, 8, 2, seed=3)
    rows = np.arange(400) < 200
    marked = fiddler.popular_experts(trace, rows, 10)
    seen = np.zeros(32)
    for token in trace.topk[:200].tolist():
        for layer, chosen in enumerate(token):
            for expert in chosen:
                seen[layer * 8 + expert] += 1
    assert marked.sum() == 10
    assert seen[marked].min() >= seen[~marked].max()


def test_on_even_routing_popularity_hits_no_more_than_its_share(shared: Path) -> None:
    even = list(fiddler._hit_rates(uniform_trace(4096, 32, 8, 2), 0))
    assert all(claim.simulated == pytest.approx(100 * 56 / 256, abs=0.7) for claim in even)
    captured = Sources(shared / "traces").captured("mixtral-8x7b-mtbench")
    assert captured is not None
    popular, random = fiddler._hit_rates(captured, 0)
    assert popular.simulated > random.simulated + 1
    assert popular.inside
    assert random.inside


# --- tokens/s -------------------------------------------------------------------------------------


def test_with_the_codes_constants_a_token_costs_seven_milliseconds_an_expert(
    work: fiddler._Work,
) -> None:
    at = fiddler.setup("L4", work, code_costs=True)
    done = at.fiddler(work.decode)
    on_cpu = done.cpu_share * 64 * done.pass_tokens.sum()
    assert done.loads == 0
    assert done.busy_s[2] == pytest.approx(7e-3 * on_cpu, rel=1e-6)
    assert 1 - done.cpu_share == pytest.approx(done.hit_rate)


def test_prompts_load_experts_with_many_tokens_and_leave_few_to_the_cpu(
    work: fiddler._Work,
) -> None:
    at = fiddler.setup("L4", work)
    short, long = (at.fiddler(work.prefill[n]) for n in (16, 128))
    assert short.cpu_share > 0.7
    assert long.cpu_share < 0.01
    assert short.pass_tokens.tolist() == [16] * len(short.pass_tokens)


def test_an_engine_of_whole_layers_is_as_fast_as_its_copies(work: fiddler._Work) -> None:
    at = fiddler.setup("Quadro RTX 6000", work)
    done = at.whole_layers(work.decode)
    model_bytes = 256 * prices(load_model("mixtral-8x7b"), at.box, work.decode).expert_bytes
    copies_s = model_bytes / at.box.copy_bytes_per_s
    assert copies_s < 1 / done.tokens_per_s < 1.1 * copies_s


def test_rate_counts_the_prompt_and_every_token(work: fiddler._Work) -> None:
    at = fiddler.setup("L4", work)
    decode, prefill = at.fiddler(work.decode), at.fiddler(work.prefill[16])
    rate = fiddler.rate(decode, prefill, 100)
    assert 100 / rate == pytest.approx(prefill.pass_s.mean() + 100 * decode.pass_s.mean())
    assert fiddler.rate(decode, prefill, 500) > rate


def test_the_swapping_baseline_moves_every_miss_twice(work: fiddler._Work) -> None:
    at = fiddler.setup("L4", work)
    done = at.swapping(work.decode)
    misses = (1 - done.hit_rate) * 64
    size = prices(load_model("mixtral-8x7b"), at.box, work.decode).expert_bytes
    assert done.bytes_per_token == pytest.approx(2 * misses * size, rel=1e-9)


# --- claims ---------------------------------------------------------------------------------------


def test_identities_hold_and_the_headline_is_reproduced(synthetic: list[Claim]) -> None:
    assert {claim.system for claim in synthetic} == {fiddler.NAME}
    assert all(claim.inside for claim in synthetic if claim.tier == "A")
    headline = next(claim for claim in synthetic if "above 3" in claim.claim)
    assert headline.inside
    assert any("honest baseline" in claim.note for claim in synthetic)
    outside = [claim for claim in synthetic if claim.inside is False]
    assert all("rooflines" in claim.note or "constants" in claim.note for claim in outside)


def test_a_captured_trace_that_is_too_short_is_not_used(shared: Path) -> None:
    for n_tokens in (1, 50, 300):
        _, tier, note = fiddler._trace(Sources(shared / "traces", max_tokens=n_tokens))
        assert tier == "C"
        assert "synthetic" in note
    assert fiddler._trace(Sources(shared / "traces"))[1] == "B"
