"""Nested weights: bytes against a quantiser that really nests, and laws of upgrades."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.errors import PlanError
from planners.nested_bits import (
    D2MOE,
    NestedFormat,
    nested_bytes,
    plane_bytes,
    separate_bytes,
    store_bytes,
    upgrade_bytes,
)
from traces.counting import total_params
from traces.models import load_model

formats = st.builds(
    lambda base, more, group, scale, zero: NestedFormat(base, base + more, group, scale, zero),
    st.integers(1, 4),
    st.integers(0, 4),
    st.sampled_from((1, 32, 128)),
    st.sampled_from((0, 8, 16)),
    st.sampled_from((0, 16)),
)
weights = st.integers(0, 10**6)


def nested_quantiser(values: np.ndarray, bits: int) -> tuple[int, np.ndarray]:
    """Bits stored and the values read back when INT2 and planes of signs are really made."""
    groups = values.reshape(-1, D2MOE.group)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    scale = (high - low) / 3
    codes = np.rint((groups - low) / scale).astype(np.int8)
    stored = [(codes, 2), (scale, 16), (low, 16)]
    read = low + codes * scale
    for _ in range(bits - 2):
        rest = groups - read
        scale = np.abs(rest).mean(axis=1, keepdims=True)
        signs = np.where(rest >= 0, 1, -1)
        stored += [(signs, 1), (scale, 16)]
        read = read + signs * scale
    return sum(array.size * width for array, width in stored), read.ravel()


def test_bytes_are_those_of_weights_really_nested_and_every_plane_brings_them_nearer() -> None:
    values = np.random.default_rng(0).normal(size=4096)
    errors = []
    for bits in D2MOE.levels:
        stored, read = nested_quantiser(values, bits)
        assert nested_bytes(len(values), bits) * 8 == stored
        errors.append(float(np.square(values - read).mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_an_expert_of_llama_moe_takes_what_the_formula_gives_by_hand() -> None:
    n = 3 * 4096 * 1376
    assert n == 128 * 132_096
    for bits in (2, 3, 4):
        sixteen_bits = 2 * n
        scales = 132_096 * (4 + 2 * (bits - 2))  # a scale and a zero point, then one scale a plane
        assert nested_bytes(n, bits) == sixteen_bits * bits // 16 + scales
    assert plane_bytes(n).tolist() == [4_755_456, 2_377_728, 2_377_728]


@settings(deadline=None)
@given(weights, formats)
def test_planes_add_up_to_every_copy_and_an_upgrade_is_the_difference(
    n: int, form: NestedFormat
) -> None:
    whole = np.cumsum(plane_bytes(n, form)).tolist()
    assert whole == [nested_bytes(n, bits, form) for bits in form.levels]
    steps = (0, *form.levels)
    for had in steps:
        for bits in steps:
            if bits >= had:
                through = nested_bytes(n, had, form) + upgrade_bytes(n, had, bits, form)
                assert through == nested_bytes(n, bits, form)
    assert upgrade_bytes(n, form.top_bits, form.top_bits, form) == 0


@settings(deadline=None)
@given(weights, formats)
def test_one_nested_copy_is_never_larger_than_all_separate_ones(n: int, form: NestedFormat) -> None:
    apart = sum(separate_bytes(n, bits, form) for bits in form.levels)
    assert nested_bytes(n, form.base_bits, form) == separate_bytes(n, form.base_bits, form)
    assert nested_bytes(n, form.top_bits, form) <= apart + len(form.levels)  # whole bytes


@settings(deadline=None)
@given(weights, formats)
def test_bytes_never_fall_with_weights_or_bits(n: int, form: NestedFormat) -> None:
    assert (plane_bytes(n, form) >= 0).all()
    assert (plane_bytes(n + 1, form) >= plane_bytes(n, form)).all()
    assert nested_bytes(0, form.top_bits, form) == 0


@pytest.mark.parametrize("name", ["mixtral-8x7b", "olmoe-1b-7b", "deepseek-v2-lite"])
def test_a_store_counts_every_weight_once_nested_and_thrice_apart(name: str) -> None:
    spec = load_model(name)
    bare = NestedFormat(scale_bits=0, zero_bits=0)
    tables = spec.vocab_size * spec.hidden_size * (1 if spec.tied_embeddings else 2)
    experts = spec.n_moe_layers * spec.n_experts * spec.expert_params
    rest = 2 * tables + (total_params(spec) - tables - experts) / 2
    store = store_bytes(spec, bare)
    assert store.nested == pytest.approx(experts * 4 / 8 + rest, abs=spec.n_experts * 100)
    assert store.experts == pytest.approx(experts * 9 / 8 + rest, abs=spec.n_experts * 100)
    assert store.models - store.experts == pytest.approx(2 * rest, abs=4)
    assert store.nested < store.experts < store.models


def test_bad_precisions_are_refused_with_what_was_expected() -> None:
    with pytest.raises(PlanError, match="5 bits, expected 0 for none, or one of 2, 3, 4"):
        nested_bytes(10, 5)
    with pytest.raises(PlanError, match="from 4 to 2 bits"):
        upgrade_bytes(10, 4, 2)
    with pytest.raises(PlanError, match="n_weights=-1"):
        nested_bytes(-1, 2)
    with pytest.raises(PlanError, match="a copy of 0 bits"):
        separate_bytes(10, 0)
    with pytest.raises(PlanError, match=r"nested bits 4\.\.2"):
        NestedFormat(4, 2)
    with pytest.raises(PlanError, match="group=0"):
        NestedFormat(group=0)
