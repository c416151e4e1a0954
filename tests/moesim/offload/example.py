"""Small layer-steps for tests of the offload simulator."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from moesim.offload.policy import CACHES, OffloadPolicy
from moesim.policies.dispatch import UnitTimes
from moesim.policies.prefetch import Predictions, oracle
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.routing import DECODE, PREFILL, RoutingTrace

TIMES = UnitTimes([0.5] * 64, [0.3 * n for n in range(64)], 0.79, 0.41791)


def trace_of(
    topk: np.ndarray, n_experts: int, n_prefill: int = 0, weights: bool = True, seed: int = 0
) -> RoutingTrace:
    """One request: the first n_prefill tokens are its prompt."""
    n_tokens, n_layers, top_k = topk.shape
    rng = np.random.default_rng(seed)
    gate = np.sort(rng.dirichlet(np.ones(top_k), (n_tokens, n_layers)))[..., ::-1]
    phase = np.where(np.arange(n_tokens) < n_prefill, PREFILL, DECODE).astype(np.int8)
    return RoutingTrace(
        topk=topk.astype(np.int16),
        n_experts=n_experts,
        layers=tuple(range(n_layers)),
        request=np.zeros(n_tokens, np.int32),
        position=np.arange(n_tokens, dtype=np.int32),
        phase=phase,
        weights=np.ascontiguousarray(gate).astype(np.float16) if weights else None,
    )


def random_topk(n_tokens: int, n_layers: int, n_experts: int, top_k: int, seed: int) -> np.ndarray:
    """Distinct experts of every token, low ids more popular."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(n_tokens, n_layers, n_experts)) - 0.15 * np.arange(n_experts)
    return np.argsort(-scores, axis=2)[:, :, :top_k]


def work_of(
    n_tokens: int = 60,
    n_layers: int = 3,
    n_experts: int = 8,
    top_k: int = 2,
    n_prefill: int = 0,
    seed: int = 0,
) -> LayerSteps:
    """Layer-steps of one random request."""
    topk = random_topk(n_tokens, n_layers, n_experts, top_k, seed)
    trace = trace_of(topk, n_experts, n_prefill, seed=seed)
    return layer_steps(trace, forward_passes(trace))


@st.composite
def cases(draw: st.DrawFn) -> tuple[LayerSteps, OffloadPolicy, Predictions | None]:
    """Random work with a random policy that fits it, and predictions or none."""
    n_layers, n_experts = draw(st.integers(1, 4)), draw(st.integers(3, 10))
    top_k = draw(st.integers(1, min(3, n_experts)))
    work = work_of(
        draw(st.integers(1, 40)), n_layers, n_experts, top_k,
        n_prefill=draw(st.integers(0, 10)), seed=draw(st.integers(0, 10**6)),
    )  # fmt: skip
    per_layer = draw(st.booleans())
    low = draw(st.sampled_from([0, 0, 1, 2]))
    high = 4 if low else 1
    room = n_experts if per_layer else n_experts * n_layers
    size = high * draw(st.integers(top_k, max(top_k, room)))
    slots = np.full(n_layers, size, np.int64) if per_layer else np.array([size * n_layers])
    on_miss = draw(
        st.sampled_from(["load", "cpu", "threshold", "hss", "skip"] + ["load_low"] * (low > 0))
    )
    pinned = None
    if draw(st.booleans()):
        pinned = np.random.default_rng(draw(st.integers(0, 99))).random(work.n_objects) < 0.2
    policy = OffloadPolicy(
        cache=draw(st.sampled_from(CACHES)),
        slots=slots,
        pinned=pinned,
        on_miss=on_miss,
        threshold_tokens=2,
        budget=draw(st.sampled_from([0, 1, 2, 1 << 30])),
        horizon=draw(st.integers(1, 20)),
        units_high=high,
        units_low=low,
        high_share=draw(st.sampled_from([1.0, 0.5])) if low else 1.0,
        nested=draw(st.booleans()),
        keep_expected=draw(st.booleans()),
    )
    predicted = None
    if draw(st.booleans()):
        predicted = oracle(work, 0.6, extra=draw(st.integers(0, 2)), seed=1)
        predicted = predicted.known_at(draw(st.integers(1, 2 * n_layers)))
    return work, policy, predicted
