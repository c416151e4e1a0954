"""Nested memory: bytes to read against a walk over planes, and a budget that always holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.policies.nested_memory import NestedMemory, segment_bytes

seeds = st.integers(0, 10**6)
PLANES = np.array([18, 9, 9])


def planes_walked(tokens: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Every plane that is missing is read once, for the lowest precision that needs it."""
    read = np.zeros_like(tokens)
    for expert, row in enumerate(tokens.tolist()):
        there = int(held[expert])
        for level, n in enumerate(row):
            if n:
                read[expert, level] = PLANES[there : level + 1].sum()
                there = max(there, level + 1)
    return read


def random_layer(rng: np.random.Generator, experts: int = 4) -> np.ndarray:
    return rng.integers(0, 3, (experts, len(PLANES))) * rng.integers(0, 2, (experts, 1))


@settings(deadline=None)
@given(seeds)
def test_bytes_to_read_are_the_missing_planes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, held = random_layer(rng), rng.integers(0, 4, 4)
    assert segment_bytes(tokens, held, PLANES).tolist() == planes_walked(tokens, held).tolist()


@settings(deadline=None)
@given(seeds, st.integers(4 * 36, 400))
def test_memory_keeps_its_budget_and_has_what_the_layer_asked(seed: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    memory = NestedMemory((5, 4), PLANES, budget)
    whole = np.append(0, np.cumsum(PLANES))
    for step in range(40):
        layer, tokens = step % 5, random_layer(rng)
        before = memory.held[layer].copy()
        read = memory.load(layer, tokens)
        assert read.tolist() == planes_walked(tokens, before).tolist()
        assert (memory.held[layer] >= before).all()
        assert not segment_bytes(tokens, memory.held[layer], PLANES).any()
        assert memory.used == whole[memory.held].sum() <= budget


def test_the_layer_before_gives_up_high_bits_first_then_low_then_the_one_before_it() -> None:
    every = np.array([[1, 1, 1], [1, 1, 1]])
    memory = NestedMemory((3, 2), PLANES, 3 * 72)
    for layer in range(3):
        memory.load(layer, every)
    assert memory.held.tolist() == [[3, 3]] * 3
    tight = NestedMemory((3, 2), PLANES, 2 * 72)
    for layer in range(2):
        tight.load(layer, every)
    tight.load(2, np.array([[1, 0, 0], [0, 0, 0]]))  # 18 bytes: both highest planes of layer 1
    assert tight.held.tolist() == [[3, 3], [2, 2], [1, 0]]
    tight.load(2, np.array([[0, 1, 0], [1, 0, 0]]))  # 27 more: its middle planes, then a base
    assert tight.held.tolist() == [[3, 3], [0, 1], [2, 1]]
    tight.load(2, every)  # 27 more, of which 9 were spare: the last base
    assert tight.held.tolist() == [[3, 3], [0, 0], [3, 3]]
    tight.load(1, np.array([[1, 0, 0], [0, 0, 0]]))  # the layer before is now 0
    assert tight.held.tolist() == [[2, 2], [1, 0], [3, 3]]
    tight.load(1, every)  # 54 more: all that is left of layer 0
    assert tight.held.tolist() == [[0, 0], [3, 3], [3, 3]]
    tight.load(0, every)  # layer 2 comes before layer 0
    assert tight.held.tolist() == [[3, 3], [3, 3], [0, 0]]


def test_a_layer_larger_than_the_budget_is_refused_with_the_gap() -> None:
    memory = NestedMemory((2, 2), PLANES, 60)
    with pytest.raises(SimulationError, match="needs 72 bytes .* budget of 60 is short by 12"):
        memory.load(0, np.array([[0, 0, 1], [0, 0, 1]]))
