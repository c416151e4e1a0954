"""Laws of one engine step: work adds up, is split over ranks, and never shrinks with load."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.systems import load_system
from moesim.errors import SimulationError
from moesim.lower.continuous_batching import (
    Load,
    Scheduler,
    Serving,
    pass_seconds,
    time_per_output_token,
)
from moesim.lower.engine_step import Formats, Operator, Ranks, operators
from moesim.lower.step_prices import Prices, all_reduce_seconds
from tests.moesim.formula_device import formula_device, passes
from traces.counting import active_params
from traces.models import load_model

MODELS = ("deepseek-v3", "qwen3-235b-a22b", "gpt-oss-120b", "kimi-k2")
EVEN = Formats(routing="balanced")


def flops(operator: Operator) -> np.ndarray:
    work = operator.work
    if operator.family == "gemm":
        each = 2 * work["m"] * work["n"] * work["k"]
    elif operator.family == "experts":
        each = 2 * work["copies"] * work["hidden"] * work["intermediate"] * work["matrices"]
    else:
        return np.zeros(len(operator.present))
    return np.asarray(operator.times * each * operator.present)


def weights(operator: Operator) -> float:
    work = operator.work
    if operator.family == "gemm":
        return float(operator.times * (work["n"] * work["k"])[0])
    if operator.family == "experts":
        of_expert = work["hidden"] * work["intermediate"] * work["matrices"]
        return float(operator.times * (work["local_experts"] * of_expert)[0])
    return 0.0


def serving(
    model: str = "qwen3-235b-a22b", ranks: Ranks | None = None, *, mixes: bool = True,
    budget: int = 8192,
) -> Serving:  # fmt: skip
    ranks = ranks or Ranks(8, 1, 1, 8)
    prices = Prices(formula_device().models, load_system(f"h100x{ranks.n_devices}"), "vllm")
    return Serving(load_model(model), ranks, EVEN, Scheduler(budget, mixes), prices)


def loads(isl: object, osl: object, concurrency: object) -> Load:
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, np.float64))
                                   for value in (isl, osl, concurrency)))  # fmt: skip
    return Load(*arrays)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_decoded_token_multiplies_with_every_active_parameter_once(
    name: str, tokens: int
) -> None:
    model = load_model(name)
    found = sum(flops(of)[0] for of in operators(model, Ranks(), EVEN, passes(tokens)))
    assert found == pytest.approx(2 * tokens * active_params(model), rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_costs_the_same_work_per_token_but_for_the_head(name: str) -> None:
    model = load_model(name)
    step = passes(0, prompts=1, chunk=500)
    found = sum(flops(of)[0] for of in operators(model, Ranks(), EVEN, step))
    head = model.vocab_size * model.hidden_size
    expected = 2 * 500 * (active_params(model) - head) + 2 * head
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_more_ranks_hold_fewer_weights_each(name: str) -> None:
    model = load_model(name)
    by_tp = [
        sum(map(weights, operators(model, Ranks(n, 1, n, 1), EVEN, passes(4))))
        for n in (1, 2, 4, 8)
    ]
    by_ep = [
        sum(map(weights, operators(model, Ranks(n, 1, 1, n), EVEN, passes(4))))
        for n in (1, 2, 4, 8)
    ]
    for of_size in (by_tp, by_ep):
        assert of_size == sorted(of_size, reverse=True)
        assert of_size[0] > 4 * of_size[-1]
    assert by_tp == pytest.approx(by_ep)


def test_a_rank_of_eight_does_an_eighth_of_the_expert_work_at_even_loads() -> None:
    model = load_model("deepseek-v3")
    shares = [
        sum(flops(of)[0] for of in operators(model, ranks, EVEN, passes(256)) if
            of.family == "experts")
        for ranks in (Ranks(), Ranks(8, 1, 8, 1), Ranks(8, 1, 1, 8))
    ]  # fmt: skip
    assert shares[1:] == pytest.approx([shares[0] / 8] * 2)


@given(
    sequences=st.integers(1, 200), more=st.integers(0, 200), context=st.integers(10, 20_000),
    longer=st.integers(0, 20_000), name=st.sampled_from(MODELS[:2]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_more_sequences_or_a_longer_context_are_never_faster(
    sequences: int, more: int, context: int, longer: int, name: str
) -> None:
    of = serving(name)
    step = passes([sequences, sequences + more, sequences], [context, context, context + longer])
    few, many, long = pass_seconds(of, step)
    assert min(many, long) >= few * (1 - 1e-6)


def test_a_pass_without_tokens_takes_no_time() -> None:
    assert pass_seconds(serving(), passes([0, 1]))[0] == 0


def test_alone_a_request_waits_for_nobodys_prompt() -> None:
    of = serving()
    alone = time_per_output_token(of, loads(1000, 200, 1))
    assert alone == pytest.approx(pass_seconds(of, passes(1, 1100)))


@given(
    isl=st.integers(16, 30_000), osl=st.integers(16, 4000), concurrency=st.integers(2, 200),
    mixes=st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_more_requests_or_longer_prompts_never_give_tokens_sooner(
    isl: int, osl: int, concurrency: int, mixes: bool
) -> None:
    of = serving(mixes=mixes)
    load = loads([isl, isl, 2 * isl], osl, [concurrency, concurrency + 20, concurrency])
    base, crowded, longer = time_per_output_token(of, load)
    assert min(crowded, longer) >= base * (1 - 1e-6)


def test_prompts_in_passes_of_their_own_cost_more_than_beside_decode_tokens() -> None:
    load = loads(1000, 200, [8, 64])
    apart = time_per_output_token(serving(mixes=False), load)
    assert (apart > time_per_output_token(serving(mixes=True), load)).all()


def test_all_prompts_are_paid_for_whatever_fits_a_pass() -> None:
    """Far over the budget every pass is full, and the tokens of the prompts set the pace."""
    of = serving(budget=512)
    long, short = time_per_output_token(of, loads([8192, 4096], 64, 128))
    decode = pass_seconds(of, passes(128, 4000))[0]
    assert long - decode > 1.7 * (short - decode)


@given(n_bytes=st.floats(1, 1e9), ranks=st.sampled_from([2, 4, 8]))
@settings(max_examples=50, deadline=None)
def test_an_all_reduce_moves_at_least_its_bytes_over_the_link(n_bytes: float, ranks: int) -> None:
    system = load_system("h100x8")
    seconds = all_reduce_seconds(system, np.array([n_bytes, 2 * n_bytes]), ranks)
    assert seconds[1] >= seconds[0] >= n_bytes / system.scale_up.bytes_per_s
    assert seconds[0] >= 5e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ranks(8, 1, 1, 4), "must be the same number of devices"),
        (lambda: operators(load_model(MODELS[2]), Ranks(7, 1, 7, 1), EVEN, passes(1)), "split"),
        (lambda: operators(load_model(MODELS[2]), Ranks(), Formats("fp7"), passes(1)), "fp7"),
        (lambda: loads(0, 1, 1), "isl=0 must be >= 1"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_the_figure(make: object, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        make()  # type: ignore[operator]
