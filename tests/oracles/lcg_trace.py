"""The trace behind the golden values: 512 tokens, 4 layers, 8 experts, top 2, from a tiny LCG."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from traces.routing import RoutingTrace

TOKENS, LAYERS, EXPERTS, TOP_K = 512, 4, 8, 2
KEEP_SHARE = 0.6


def uniforms(seed: int = 1) -> Iterator[float]:
    """Numbers in [0, 1) of s <- (1103515245 s + 12345) mod 2**31."""
    state = seed
    while True:
        state = (1103515245 * state + 12345) % 2**31
        yield state / 2**31


def lcg_trace() -> RoutingTrace:
    """Each token keeps each expert of the one before with chance 0.6, then fills at random."""
    draw = uniforms()
    rows: list[list[list[int]]] = []
    for token in range(TOKENS):
        before = rows[token - 1] if token else [[]] * LAYERS
        row: list[list[int]] = []
        for layer in range(LAYERS):
            chosen = [expert for expert in before[layer] if next(draw) < KEEP_SHARE]
            while len(chosen) < TOP_K:
                expert = int(next(draw) * EXPERTS)
                if expert not in chosen:
                    chosen.append(expert)
            row.append(chosen)
        rows.append(row)
    return one_request(np.array(rows, dtype=np.int16), EXPERTS)


def one_request(topk: np.ndarray, n_experts: int) -> RoutingTrace:
    """A trace of one prefill request with the given choices [tokens, layers, top_k]."""
    tokens, layers, _ = topk.shape
    return RoutingTrace(
        topk=topk.astype(np.int16),
        n_experts=n_experts,
        layers=tuple(range(layers)),
        request=np.zeros(tokens, np.int32),
        position=np.arange(tokens, dtype=np.int32),
        phase=np.zeros(tokens, np.int8),
    )
