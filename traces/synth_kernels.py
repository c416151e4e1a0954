"""Compiled loops of the fitted generator: arrays in, arrays out.

Rows are tokens in the order of their requests; `first[t]` marks the first token of a request.
Missing cells (-1) are skipped by every count. `traces/synth.py` says what the model is.
"""

from __future__ import annotations

from typing import TypeAlias

import numba
import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int16]
Flags: TypeAlias = npt.NDArray[np.bool_]
Index: TypeAlias = npt.NDArray[np.int64]
Types: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]
Weights: TypeAlias = tuple[Floats, Floats, Floats, Floats, Floats, int]


@numba.njit(cache=True)
def count_choices(
    topk: Ids,
    first: Flags,
    lags: Index,
    single: tuple[Doubles, Doubles],
    far: tuple[Doubles, Doubles],
    pairs: tuple[Doubles, Doubles],
) -> None:
    """Adds one for each routed choice it is true of.

    single  chosen and kept [layers, experts]: chosen at all; chosen by the token before, too
    far     kept and compared [layers]: the same against the tokens `lags` before, all experts
    pairs   together [layers, experts, experts]: i and j by one token at one layer, i != j; and
            next [layers - 1, experts, experts]: i at a layer and j at the next
    """
    chosen, kept = single
    together, following = pairs
    far_kept, far_compared = far
    n_tokens, n_layers, k = topk.shape
    place = 0
    for t in range(n_tokens):
        place = 0 if first[t] else place + 1
        for layer in range(n_layers):
            for a in range(k):
                e = topk[t, layer, a]
                if e < 0:
                    continue
                chosen[layer, e] += 1
                if place > 0:
                    for b in range(k):
                        if topk[t - 1, layer, b] == e:
                            kept[layer, e] += 1
                            break
                for lag in lags:
                    if place >= lag:
                        far_compared[layer] += 1
                        for b in range(k):
                            if topk[t - lag, layer, b] == e:
                                far_kept[layer] += 1
                                break
                for b in range(k):
                    j = topk[t, layer, b]
                    if j >= 0 and j != e:
                        together[layer, e, j] += 1
                if layer + 1 < n_layers:
                    for b in range(k):
                        j = topk[t, layer + 1, b]
                        if j >= 0:
                            following[layer, e, j] += 1


@numba.njit(cache=True)
def count_pairs(here: Ids, there: Ids, pairs: Doubles) -> None:
    """Adds to pairs [experts, experts] every (i, j) that a token chose here and there."""
    n_tokens, k = here.shape
    for t in range(n_tokens):
        for a in range(k):
            for b in range(k):
                if here[t, a] >= 0 and there[t, b] >= 0:
                    pairs[here[t, a], there[t, b]] += 1


@numba.njit(cache=True)
def between_request_squares(here: Ids, there: Ids, request: Index, pairs: Doubles) -> float:
    """Sum over (i, j) of P_ij^2 / (x_i y_j), from pairs of tokens of different requests only.

    here, there  int16[tokens, top_k], the two layers; request int64[tokens], equal values adjacent
    pairs        float64[n_experts, n_experts], counts of (i, j) over all tokens
    """
    total = pairs.sum()
    x = pairs.sum(axis=1) / total
    y = pairs.sum(axis=0) / total
    n_experts = len(pairs)
    own = np.zeros((n_experts, n_experts))
    squares = 0.0
    own_total_squared = 0.0
    for i in range(n_experts):
        for j in range(n_experts):
            if pairs[i, j] > 0:
                squares += pairs[i, j] * pairs[i, j] / (x[i] * y[j])
    n_tokens, k = here.shape
    start = 0
    while start < n_tokens:
        end = start
        while end < n_tokens and request[end] == request[start]:
            end += 1
        size = 0.0
        for t in range(start, end):
            for a in range(k):
                for b in range(k):
                    i, j = here[t, a], there[t, b]
                    if i >= 0 and j >= 0:
                        # (c + 1)^2 - c^2 each time a cell grows: no second pass over the cells
                        squares -= (2.0 * own[i, j] + 1.0) / (x[i] * y[j])
                        own[i, j] += 1.0
                        size += 1.0
        own_total_squared += size * size
        for t in range(start, end):
            for a in range(k):
                for b in range(k):
                    i, j = here[t, a], there[t, b]
                    if i >= 0 and j >= 0:
                        own[i, j] = 0.0
        start = end
    comparisons = total * total - own_total_squared
    return squares / comparisons if comparisons > 0 else np.nan


@numba.njit(cache=True)
def assign_types(
    topk: Ids, document: Index, log_lift: Floats, log_prior: Floats, types: Types
) -> int:
    """Most likely type of each token, in place; returns how many tokens changed theirs.

    log_lift   float32[layers * n_experts, types]
    log_prior  float32[documents, types], log mix less the log normaliser of the document
    """
    n_tokens, n_layers, k = topk.shape
    n_types = log_lift.shape[1]
    n_experts = log_lift.shape[0] // n_layers
    score = np.empty(n_types, np.float32)
    changed = 0
    for t in range(n_tokens):
        score[:] = log_prior[document[t]]
        for layer in range(n_layers):
            for a in range(k):
                if topk[t, layer, a] >= 0:
                    lift = log_lift[layer * n_experts + topk[t, layer, a]]
                    for c in range(n_types):
                        score[c] += lift[c]
        best = 0
        for c in range(1, n_types):
            if score[c] > score[best]:
                best = c
        changed += types[t] != best
        types[t] = best
    return changed


@numba.njit(cache=True)
def count_types(topk: Ids, types: Types, counts: Doubles) -> None:
    """Adds to counts [layers * n_experts, types] the choices of the tokens of each type."""
    n_tokens, n_layers, k = topk.shape
    n_experts = counts.shape[0] // n_layers
    for t in range(n_tokens):
        for layer in range(n_layers):
            for a in range(k):
                if topk[t, layer, a] >= 0:
                    counts[layer * n_experts + topk[t, layer, a], types[t]] += 1


@numba.njit(cache=True)
def draw_types(
    first: Flags, mix_row: Index, mix: Doubles, follow: Doubles, rng: np.random.Generator
) -> Types:
    """Type of each token, in proportion to its mix times how well it follows the type before.

    mix     float64[mixes, types]; mix_row int64[tokens]
    follow  float64[types, types], lift of the second type right after the first
    """
    n_tokens = len(first)
    n_types = mix.shape[1]
    types = np.empty(n_tokens, np.int32)
    rising = np.empty(n_types)
    for t in range(n_tokens):
        total = 0.0
        for c in range(n_types):
            chance = mix[mix_row[t], c]
            if not first[t]:
                chance *= follow[types[t - 1], c]
            total += chance
            rising[c] = total
        drawn = np.searchsorted(rising, rng.random() * total, side="right")
        types[t] = min(drawn, n_types - 1)
    return types


@numba.njit(cache=True)
def draw_experts(
    first: Flags, template: Index, types: Types, model: Weights, rng: np.random.Generator
) -> Ids:
    """int16[tokens, layers, k]: k experts without replacement for each token and layer.

    model  (type_weight float32[types, layers, experts], tilt_score float32[templates, rank],
            tilt_basis float32[rank, layers, experts], reuse_weight float32[layers, experts],
            pair_weight float32[layers - 1, experts, experts], k)
    """
    type_weight, tilt_score, tilt_basis, reuse_weight, pair_weight, k = model
    n_tokens = len(first)
    n_types, n_layers, n_experts = type_weight.shape
    topk = np.empty((n_tokens, n_layers, k), np.int16)
    tilt = np.ones((n_layers, n_experts), np.float32)
    weight = np.empty(n_experts, np.float32)
    for t in range(n_tokens):
        if first[t]:
            tilt[:] = 0
            for r in range(tilt_basis.shape[0]):
                tilt += tilt_score[template[t], r] * tilt_basis[r]
            tilt[:] = np.exp(tilt)
        for layer in range(n_layers):
            base = type_weight[types[t], layer]
            for e in range(n_experts):
                weight[e] = base[e] * tilt[layer, e]
            if not first[t]:
                for b in range(k):
                    e = topk[t - 1, layer, b]
                    weight[e] *= reuse_weight[layer, e]
            if layer > 0:
                for b in range(k):
                    row = pair_weight[layer - 1, topk[t, layer - 1, b]]
                    for e in range(n_experts):
                        weight[e] *= row[e]
            total = np.float32(0)
            for e in range(n_experts):
                total += weight[e]
            for a in range(k):
                left = np.float32(rng.random()) * total
                drawn = -1
                for e in range(n_experts):
                    if weight[e] > 0:
                        drawn = e
                        left -= weight[e]
                        if left < 0:
                            break
                topk[t, layer, a] = drawn
                total -= weight[drawn]
                weight[drawn] = 0
    return topk
