"""llama.cpp: a token's time against sums of bytes, prompts by rule, mapped files, and claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.offload.simulate import simulate
from moesim.reproduce import llama_cpp
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.models import load_model
from traces.synth import uniform_trace


@pytest.fixture(scope="module")
def synthetic() -> list[Claim]:
    return llama_cpp.claims(Sources())


@pytest.fixture(scope="module")
def work() -> LayerSteps:
    trace = uniform_trace(3, 24, 32, 4)
    return layer_steps(trace, forward_passes(trace))


# --- a token --------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 48), st.floats(1e11, 4e12), st.floats(2e10, 1e12))
def test_a_token_takes_its_bytes_over_the_rate_of_the_memory_they_lie_in(
    n: int, gpu_rate: float, cpu_rate: float
) -> None:
    ours, expected = llama_cpp.byte_seconds(n, gpu_rate, cpu_rate)
    assert ours == pytest.approx(expected, rel=1e-9)


def test_n_cpu_moe_leaves_the_first_layers_and_ot_the_last(work: LayerSteps) -> None:
    first = llama_cpp.on_cpu(work, 5).pinned
    last = llama_cpp.on_cpu(work, 5, last=True).pinned
    assert first is not None
    assert last is not None
    assert first.reshape(24, 32).all(axis=1).tolist() == [False] * 5 + [True] * 19
    assert last.reshape(24, 32).all(axis=1).tolist() == [True] * 19 + [False] * 5


def test_every_layer_on_the_cpu_adds_the_same_time(work: LayerSteps) -> None:
    at = llama_cpp.MAINLINE
    priced = at.priced(load_model("gpt-oss-20b"), work, 4.25, at.load())
    lasted = [simulate(work, priced, llama_cpp.on_cpu(work, n)).seconds for n in range(0, 25, 4)]
    steps = np.diff(lasted)
    assert (steps > 0).all()
    assert steps == pytest.approx(steps[0])


# --- prompts --------------------------------------------------------------------------------------


def prompt(tokens: int) -> llama_cpp.Prompt:
    model, at = load_model("deepseek-v2-lite"), llama_cpp.AUTHOR
    return llama_cpp.Prompt(model, at, at.load(), 4.25, tokens, tokens)


def test_experts_are_copied_from_thirty_two_tokens_on() -> None:
    assert prompt(31).rate() == prompt(31).on_cpu()
    assert prompt(32).rate() == prompt(32).streamed()
    assert prompt(32).rate() < prompt(31).rate()


def test_a_copied_batch_lasts_as_long_as_the_copies_and_then_its_arithmetic() -> None:
    short = prompt(64)
    routed = 26 * 64 * 3 * 2048 * 1408 * 4.25 / 8
    copies_s = routed / short.box.copy_bytes_per_s
    assert copies_s < 64 / short.streamed() < 1.2 * copies_s
    twice = replace(short, box=replace(short.box, copy_bytes_per_s=2 * 25e9, dram_bytes_per_s=1e12))
    assert 1.8 < twice.streamed() / short.streamed() < 2.05


def test_copying_gains_on_the_cpu_with_every_token_of_a_batch() -> None:
    over = [prompt(n).streamed() / prompt(n).on_cpu() for n in (32, 128, 512)]
    assert over == sorted(over)


# --- mapped files ---------------------------------------------------------------------------------


def test_more_memory_is_never_slower_and_beyond_the_file_changes_nothing() -> None:
    rates = [llama_cpp.mapped_run(gigabytes * 1e9, 0.8) for gigabytes in (40, 96, 160, 240, 300)]
    assert rates == sorted(rates)
    assert rates[-1] == rates[-2]
    assert rates[3] > 2 * rates[0]


# --- claims ---------------------------------------------------------------------------------------


def test_identities_hold_and_decode_rates_are_reproduced(synthetic: list[Claim]) -> None:
    assert {claim.system for claim in synthetic} == {llama_cpp.NAME}
    assert all(claim.inside for claim in synthetic if claim.tier == "A")
    rows = [claim for claim in synthetic if claim.claim[:4] in ("IKLC", "LCPP")]
    assert len(rows) == 4
    assert all(claim.inside for claim in rows)
    assert any("honest baseline" in claim.note for claim in synthetic)


def test_on_a_captured_trace_the_sweep_falls_too(shared: Path) -> None:
    found = list(llama_cpp._sweep(Sources(shared / "traces")))
    assert [claim.verdict for claim in found] == ["inside", "inside", "shown"]
    assert found[2].tier == "B"
