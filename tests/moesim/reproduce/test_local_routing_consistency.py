"""Local routing consistency: the golden trace, the digitised table, and what the captures say."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.reproduce import local_routing_consistency as lrc
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from tests.oracles.lcg_trace import lcg_trace
from traces.routing import RoutingTrace


@pytest.fixture(scope="module")
def captured(shared: Path) -> list[Claim]:
    return lrc.claims(Sources(shared / "traces"))


def test_the_golden_trace_is_the_one_of_its_recipe() -> None:
    ours, theirs = lrc.golden_trace(), lcg_trace()
    assert (ours.topk == theirs.topk).all()
    assert ours.topk[0].tolist() == [[4, 1], [2, 4], [7, 1], [5, 1]]
    assert ours.topk[-1].tolist() == [[0, 4], [3, 1], [0, 7], [6, 0]]


def test_every_identity_holds_without_any_captured_trace() -> None:
    claims = lrc.claims(Sources())
    exact = [claim for claim in claims if claim.tier == "A"]
    assert len(exact) == len(lrc.FLOORS) + len(lrc.GOLDEN_SRP) + 2 * len(lrc.GOLDEN_HITS)
    assert [claim.claim for claim in exact if not claim.inside] == []
    assert {claim.convention for claim in exact} == {"identity", "both", *lrc.NAMES.values()}
    assert not any(claim.tier == "B" for claim in claims)


def test_trends_hold_on_synthetic_traces_where_none_is_captured() -> None:
    trends = [claim for claim in lrc.claims(Sources()) if claim.tier == "C"]
    assert {claim.verdict for claim in trends} == {"inside", "shown"}
    assert all("synthetic" in claim.note for claim in trends)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 10**6))
def test_sequences_of_a_continuous_batch_are_told_apart_by_their_place(
    sequences: int, passes: int, seed: int
) -> None:
    """A prefill pass, then passes of all sequences, then of one fewer; rows in any order."""
    rng = np.random.default_rng(seed)
    sizes = [3, *[sequences] * passes, sequences - 1]
    forward = np.repeat(np.arange(len(sizes)), sizes)
    place = np.concatenate([np.arange(size) for size in sizes])
    topk = (place[:, None, None] + np.zeros((1, 2, 1))).astype(np.int16)
    order = np.argsort(rng.permutation(len(sizes))[forward], kind="stable")  # passes shuffled
    tokens = len(place)
    trace = RoutingTrace(
        topk=topk[order],
        n_experts=8,
        layers=(0, 1),
        request=np.zeros(tokens, np.int32),
        position=np.arange(tokens, dtype=np.int32),
        phase=(forward[order] > 0).astype(np.int8),
        forward=forward[order].astype(np.int64),
    )
    apart = lrc.by_place_in_batch(trace)
    assert apart.n_tokens == sequences * passes
    assert (apart.topk[:, 0, 0] == apart.request).all()
    for sequence in range(sequences):
        positions = apart.position[apart.request == sequence]
        assert positions.tolist() == list(range(passes))


def test_the_table_is_the_digitised_one(shared: Path) -> None:
    rows: dict[tuple[str, ...], float] = {}
    for name in ("srp", "sch", "hit"):
        with (shared / "handbook" / f"lrc_{name}.csv").open(encoding="utf-8") as file:
            for row in csv.reader(file):
                rows[(name, *row[: 2 if name == "srp" else 3])] = row[2 if name == "srp" else 3]  # type: ignore[assignment]
    keys = {"Mixtral-8x7B": "mixtral0", "DeepSeek-V2-Lite": "deepseek20", "Qwen1.5-MoE": "qwen0"}
    for capture in lrc.CAPTURES:
        key, table = keys[capture.model], capture.published
        assert table.srp == {m: float(rows["srp", key, str(m)]) for m in (4, 16, 64, 256)}
        sizes = {0.5: "0.5", 1.0: "1", 2.0: "2", 3.0: "3"}
        assert table.sch == {
            rho: float(rows["sch", key, "16", text]) for rho, text in sizes.items()
        }
        assert table.hits == {p: float(rows["hit", key, p, "2"]) for p in lrc.POLICIES}


def test_mixtral_and_law_text_meet_their_whole_row(captured: list[Claim]) -> None:
    for stem in ("mixtral-8x7b-mtbench", "deepseek-v2-lite-law"):
        banded = [c for c in captured if stem in c.claim and c.low is not None]
        assert len(banded) == 11
        assert [c.claim for c in banded if not c.inside] == []


def test_text_of_one_kind_and_a_third_of_the_layers_miss_the_row_where_they_did(
    captured: list[Claim],
) -> None:
    """Measured: what falls outside the band is known, and stays outside."""
    outside = [c.claim for c in captured if c.inside is False]
    assert len([c for c in outside if "qwen1.5" in c]) == 9
    assert [c for c in outside if "qwen1.5" not in c] == [
        "DeepSeek-V2-Lite, deepseek-v2-lite-intent: LFU at rho 2"
    ]


def test_bands_are_two_points_of_srp_and_three_of_hit_rate(captured: list[Claim]) -> None:
    for claim in captured:
        if claim.tier == "B" and claim.low is not None and claim.high is not None:
            assert claim.published is not None
            width = 0.04 if ": SRP" in claim.claim else 0.06
            assert claim.high - claim.low == pytest.approx(width)
            assert claim.low + claim.high == pytest.approx(2 * claim.published)


def test_the_three_models_rank_as_in_the_table(captured: list[Claim]) -> None:
    (ranks,) = [claim for claim in captured if "rank correlation" in claim.claim]
    assert ranks.inside
    assert ranks.note.startswith("3 models")
