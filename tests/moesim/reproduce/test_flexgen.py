"""FlexGen: the linear program against a grid, its order against CPU attention, and its rows."""

from __future__ import annotations

import pytest

from moesim.reproduce import flexgen
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from moesim.reproduce.streamed_runs import flexgen_run, t4_box, zero_run
from planners.flexgen import flexgen_plan
from planners.streamed import Lengths, StreamedPolicy, layer_shape
from traces.models import load_model


@pytest.fixture(scope="module")
def claims() -> dict[str, Claim]:
    return {claim.claim: claim for claim in flexgen.claims(Sources())}


def test_everything_with_a_band_is_inside_it(claims: dict[str, Claim]) -> None:
    banded = [claim for claim in claims.values() if claim.low is not None]
    assert len(banded) == 3
    assert all(claim.verdict == "inside" for claim in banded)


def test_opt_shapes_have_the_parameters_of_their_names() -> None:
    for layers, hidden, heads, billions in ((32, 4096, 32, 6.7), (48, 7168, 56, 30)):
        shape = flexgen.opt_shape(layers, hidden, heads)
        embeddings = 50_272 * hidden  # tied
        n_params = shape.layer_bytes * layers / 2 + embeddings
        assert n_params == pytest.approx(billions * 1e9, rel=0.02)


def test_a_coarser_grid_never_beats_the_program() -> None:
    problem = flexgen.opt_problem(flexgen.opt_shape(48, 7168, 56))
    for block, micro in ((48, 48), (96, 32)):
        best = flexgen.grid_seconds(problem, block, micro)
        assert flexgen_plan(problem, block, micro).seconds <= best * (1 + 1e-9)


def test_cpu_attention_slows_the_block_schedule_at_the_fitted_rates() -> None:
    shape, lengths = layer_shape(load_model("mixtral-8x7b")), Lengths(242, 50)
    rates = {
        on_gpu: flexgen_run(shape, t4_box(), lengths, StreamedPolicy(320, 32, on_gpu)).tokens_per_s
        for on_gpu in (True, False)
    }
    assert rates[False] < rates[True]


def test_every_published_row_is_shown_with_its_figure(claims: dict[str, Claim]) -> None:
    shown = [claim for name, claim in claims.items() if " on one " in name]
    assert len(shown) == 10
    assert all(claim.published and claim.verdict == "shown" for claim in shown)
    assert all(0.5 < claim.simulated / (claim.published or 1) < 3.0 for claim in shown)


def test_a_larger_whole_batch_earns_more_until_its_compute_shows() -> None:
    shape, lengths = layer_shape(load_model("mixtral-8x7b")), Lengths(242, 50)
    rates = [zero_run(shape, t4_box(), lengths, batch).tokens_per_s for batch in (8, 32, 128)]
    assert rates == sorted(rates)
    assert rates[2] < 16 * rates[0]
