"""MoE-Lens: identities exactly, the scheduler and the engine as they came out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.lower.streamed import IterationLoad
from moesim.reproduce import moe_lens
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from moesim.reproduce.streamed_runs import a40_box
from planners.streamed import LayerShape, Lengths, StreamBox, layer_shape
from traces.models import load_model


@pytest.fixture(scope="module")
def shape() -> LayerShape:
    return layer_shape(load_model("mixtral-8x7b"))


@pytest.fixture(scope="module")
def box(shape: LayerShape) -> StreamBox:
    return a40_box(shape)


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return moe_lens.claims(Sources())


def test_every_identity_holds_to_one_percent(claims: list[Claim]) -> None:
    identities = [claim for claim in claims if claim.tier == "A" and claim.published is not None]
    assert len(identities) == 19
    for claim in identities:
        assert claim.verdict == "inside"
        assert claim.published is not None
        assert claim.simulated == pytest.approx(claim.published, rel=0.01)


def test_only_equation_six_with_few_requests_of_two_workloads_is_outside(
    claims: list[Claim],
) -> None:
    outside = {claim.claim for claim in claims if claim.verdict == "outside"}
    assert outside == {
        "error of equation 6 at (98, 128), 5,000 requests",
        "error of equation 6 at (98, 256), 5,000 requests",
    }
    assert all(claim.note for claim in claims if claim.verdict == "outside")


def test_misprints_are_no_fixtures(claims: list[Claim]) -> None:
    figures = {claim.published for claim in claims}
    assert not figures & {0.056, 280e3}


def test_throughput_nears_the_bound_with_more_requests_and_never_passes_it(
    shape: LayerShape, box: StreamBox
) -> None:
    bound = 70e9 / 131_072 / (94e9 / 19.5e9) * 354 / (226 * 256)
    rates = [moe_lens.serve(shape, box, (98, 256), n).tokens_per_s for n in (500, 2000, 8000)]
    assert rates == sorted(rates)
    assert rates[-1] < bound


def test_prices_between_simulated_points_are_those_of_the_engine(
    shape: LayerShape, box: StreamBox
) -> None:
    load = (np.array([1000.0, 5000.0, 17_000.0]), np.array([5e9, 66e9, 40e9]))
    found = moe_lens.engine_seconds(shape, box, Lengths(98, 64), load)
    share = 64 / 162
    for seconds, tokens, held in zip(found, *load, strict=True):
        point = IterationLoad(tokens * share, tokens * (1 - share), held, 98)
        exact = moe_lens.vslpipe_seconds(shape, box, point)
        assert seconds == pytest.approx(exact, rel=0.03)


def test_a_faster_link_or_more_host_bandwidth_never_slows_an_iteration(
    shape: LayerShape, box: StreamBox
) -> None:
    load = IterationLoad(1000.0, 4000.0, 70e9, 98.0)
    base = moe_lens.vslpipe_seconds(shape, box, load)
    for field in ("link_bytes_per_s", "dram_bytes_per_s", "gpu_flop_per_s"):
        faster = replace(box, **{field: 1.5 * getattr(box, field)})
        assert moe_lens.vslpipe_seconds(shape, faster, load) <= base * (1 + 1e-9)


def test_the_error_of_equation_six_falls_with_the_number_of_requests(
    shape: LayerShape, box: StreamBox
) -> None:
    errors = [
        moe_lens.stage2_error(shape, box, (98, 256), n, paced=False)
        for n in (1000, 5000, 10_000, 20_000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.10
    assert moe_lens.stage2_error(shape, box, (98, 256), 5000, paced=True) < 0.01
