"""Routing that stays on: every expert is switched on and off by a chain of its own.

A ReLU router takes as many experts as score above zero, and trained for locality it keeps them
over neighbouring tokens (BlockFFN, arXiv 2507.08771). Here each expert of each layer is a chain of
two states: off it turns on with one chance at the next token, on it turns off with another. Such
routing is an activity, bool[tokens, layers, experts]; as a RoutingTrace a token's active experts
are listed in rising order and the places left over are -1 (MISSING), which everything that counts
experts leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError
from traces.routing import DECODE, MISSING, RoutingTrace
from traces.synth import stream

Flags = npt.NDArray[np.bool_]

DEFAULT_REQUEST_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Chain:
    """Chances per token that an expert which is off turns on, and one which is on turns off."""

    turn_on: float
    turn_off: float

    def __post_init__(self) -> None:
        if not (0 <= self.turn_on <= 1 and 0 <= self.turn_off <= 1):
            raise TraceError(
                f"turn_on={self.turn_on}, turn_off={self.turn_off}, expected chances in 0..1"
            )
        if self.turn_on + self.turn_off == 0:
            raise TraceError("turn_on and turn_off are both 0, expected one above 0")

    @property
    def active_share(self) -> float:
        """Share of tokens at which an expert is on, in the long run."""
        return self.turn_on / (self.turn_on + self.turn_off)

    def sparsity(self, n_tokens: int = 1) -> float:
        """Chance that an expert is off at all of so many neighbouring tokens.

        One token: token-level sparsity (TLS); L tokens: chunk-level sparsity (CLS_L). Off at the
        first, then never turned on: (1 - active_share) * (1 - turn_on) ** (L - 1).
        """
        return float((1 - self.active_share) * (1 - self.turn_on) ** (n_tokens - 1))


def independent(active_share: float) -> Chain:
    """No memory: each token draws its experts anew."""
    return Chain(active_share, 1 - active_share)


def chain_with(token_sparsity: float, chunk_sparsity: float, chunk: int) -> Chain:
    """The chain with that TLS and that CLS over `chunk` tokens.

    raises  TraceError unless 0 < chunk_sparsity < token_sparsity < 1 and chunk is 2 or more, or
            when experts would have to turn off with a chance above 1
    """
    if not (0 < chunk_sparsity < token_sparsity < 1 and chunk >= 2):
        raise TraceError(
            f"token_sparsity={token_sparsity}, chunk_sparsity={chunk_sparsity}, chunk={chunk}:"
            " expected 0 < chunk sparsity < token sparsity < 1 and a chunk of 2 or more"
        )
    turn_on = 1 - (chunk_sparsity / token_sparsity) ** (1 / (chunk - 1))
    return Chain(turn_on, turn_on * token_sparsity / (1 - token_sparsity))


def draw_activity(
    chain: Chain,
    shape: tuple[int, int, int],
    seed: int = 0,
    request_tokens: int = DEFAULT_REQUEST_TOKENS,
) -> Flags:
    """bool[tokens, layers, experts]: every expert by its own chain, requests from the long run.

    shape           tokens, layers, experts
    request_tokens  a request's first token is drawn independently of what was before
    """
    n_tokens, n_layers, n_experts = shape
    if min(shape) < 1 or request_tokens < 1:
        raise TraceError(f"shape={shape}, request_tokens={request_tokens}: expected 1 or more each")
    rng = stream(seed, "markov")
    active = np.empty(shape, dtype=np.bool_)
    for token in range(n_tokens):
        drawn = rng.random((n_layers, n_experts))
        if token % request_tokens == 0:
            active[token] = drawn < chain.active_share
        else:
            active[token] = drawn < np.where(active[token - 1], 1 - chain.turn_off, chain.turn_on)
    return active


def sparsity(active: Flags, n_tokens: int = 1, request_tokens: int = 0) -> float:
    """Share of (window, layer, expert) that are off throughout, over windows of so many tokens.

    Every window inside a request of `request_tokens` counts (0: all tokens are one request).
    raises  TraceError when no request is that long
    """
    length = request_tokens or len(active)
    if not 1 <= n_tokens <= min(length, len(active)):
        raise TraceError(f"windows of {n_tokens} tokens, expected 1..{min(length, len(active))}")
    off = windows = 0.0
    for first in range(0, len(active), length):
        part = active[first : first + length]
        if len(part) < n_tokens:
            continue
        counted = np.cumsum(part, axis=0, dtype=np.int32)
        counted[n_tokens:] = counted[n_tokens:] - counted[:-n_tokens]
        window = counted[n_tokens - 1 :]
        off += float((window == 0).sum())
        windows += window.size
    return off / windows


def activity_trace(
    active: Flags, top_k: int = 0, request_tokens: int = DEFAULT_REQUEST_TOKENS
) -> RoutingTrace:
    """The activity as a decode trace; a token without any expert has none but -1.

    top_k   places of a token at a layer, 0 for as many as the fullest needs
    raises  TraceError when a token needs more places
    """
    n_tokens, n_layers, n_experts = active.shape
    token, layer, expert = np.nonzero(active)
    per_cell = active.sum(axis=2)
    fullest = int(per_cell.max(initial=0))
    width = top_k or max(1, fullest)
    if width < fullest:
        raise TraceError(f"top_k={width}, but a token has {fullest} active experts at a layer")
    ends = np.cumsum(per_cell.ravel())
    place = np.arange(len(expert)) - np.repeat(ends - per_cell.ravel(), per_cell.ravel())
    topk = np.full((n_tokens, n_layers, width), MISSING, dtype=np.int16)
    topk[token, layer, place] = expert
    number = np.arange(n_tokens, dtype=np.int32)
    return RoutingTrace(
        topk=topk,
        n_experts=n_experts,
        layers=tuple(range(n_layers)),
        request=number // request_tokens,
        position=number % request_tokens,
        phase=np.full(n_tokens, DECODE, dtype=np.int8),
        capture=f"generated by chains, {per_cell.mean():.3g} of {n_experts} experts on average",
    )


def activity_of(trace: RoutingTrace) -> Flags:
    """bool[tokens, layers, experts]: which experts each token of any trace chose."""
    chosen = np.where(trace.topk == MISSING, trace.n_experts, trace.topk).astype(np.int64)
    active = np.zeros((trace.n_tokens, trace.n_layers, trace.n_experts + 1), dtype=np.bool_)
    np.put_along_axis(active, chosen, True, axis=2)
    return active[:, :, :-1]
