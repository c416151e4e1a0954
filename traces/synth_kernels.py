"""Compiled loops of the generator: arrays in, arrays out.

Rows are tokens in the order of their requests; first bool[tokens] marks the first token of each.
Missing cells (-1) are skipped by every count. `synth.py` says in words what the model is; the same
counts in plain Python are in `tests/oracles/synth_plain.py`.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled

Ids: TypeAlias = npt.NDArray[np.int16]
Flags: TypeAlias = npt.NDArray[np.bool_]
Index: TypeAlias = npt.NDArray[np.int64]
Types: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]
Weights: TypeAlias = tuple[Floats, Floats, Floats, Floats, Index, Floats, Floats]
Tallies: TypeAlias = tuple[Doubles, Doubles, Doubles, Doubles, Doubles, Doubles, Doubles, Doubles]


@compiled
def count_choices(topk: Ids, first: Flags, lags: Index, bucket: Index, tallies: Tallies) -> None:
    """Adds one to a tally for every routed choice (expert e at a layer) that it is about.

    lags     tokens back that `far` looks; bucket int64[ages] maps the tokens since the request
             last chose e, at most ages - 1, to a column of `aged` and `exposed`
    tallies  chosen [layers, experts]
             kept [layers, experts], the token before in the request chose e, too
             aged, exposed [layers, buckets], choices by age, and experts that had that age
             far, compared [layers], the token `lag` before chose e, too; and there was such a token
             together [layers, experts, experts], e and another expert of the same token
             following [layers - 1, experts, experts], e and an expert one layer on
    """
    chosen, kept, aged, exposed, far, compared, together, following = tallies
    n_tokens, n_layers, k = topk.shape
    n_experts = chosen.shape[1]
    oldest = len(bucket) - 1
    last = np.zeros((n_layers, n_experts), np.int64)
    place = 0
    for t in range(n_tokens):
        place += 1
        if first[t]:
            place = 0
            last[:] = t - oldest
        for layer in range(n_layers):
            for e in range(n_experts):
                exposed[layer, bucket[min(t - last[layer, e], oldest)]] += 1
            for a in range(k):
                e = topk[t, layer, a]
                if e < 0:
                    continue
                chosen[layer, e] += 1
                aged[layer, bucket[min(t - last[layer, e], oldest)]] += 1
                if place > 0 and last[layer, e] == t - 1:
                    kept[layer, e] += 1
                for lag in lags:
                    if place >= lag:
                        compared[layer] += 1
                        for b in range(k):
                            if topk[t - lag, layer, b] == e:
                                far[layer] += 1
                                break
                for b in range(k):
                    if topk[t, layer, b] >= 0 and topk[t, layer, b] != e:
                        together[layer, e, topk[t, layer, b]] += 1
                if layer + 1 < n_layers:
                    for b in range(k):
                        if topk[t, layer + 1, b] >= 0:
                            following[layer, e, topk[t, layer + 1, b]] += 1
            for a in range(k):
                if topk[t, layer, a] >= 0:
                    last[layer, topk[t, layer, a]] = t


@compiled
def count_pairs(here: Ids, there: Ids, pairs: Doubles) -> None:
    """Adds to pairs [experts, experts] every (i, j) that a token chose here and there."""
    n_tokens, k = here.shape
    for t in range(n_tokens):
        for a in range(k):
            for b in range(k):
                if here[t, a] >= 0 and there[t, b] >= 0:
                    pairs[here[t, a], there[t, b]] += 1


@compiled
def between_cluster_squares(here: Ids, there: Ids, cluster: Index, pairs: Doubles) -> float:
    """Sum over (i, j) of P_ij^2 / (x_i y_j), from pairs of tokens of different clusters only.

    here, there  int16[tokens, top_k], the same tokens at two layers
    cluster      int64[tokens], equal values adjacent
    pairs        [experts, experts], what `count_pairs` counts over all tokens
    returns      nan when there are no two clusters to compare
    margins      x_i is taken from one choice fewer than counted: two tokens that agree on i have
                 raised its count by 2, and 1 / (1 + c) is right on average for 1 / E[c] when c is
                 what the other tokens chose (c binomial)
    """
    n_experts = len(pairs)
    total = pairs.sum()
    k = here.shape[1]
    x = np.maximum(pairs.sum(axis=1) - k, 0.5) / (total - k)
    y = np.maximum(pairs.sum(axis=0) - k, 0.5) / (total - k)
    squares = 0.0
    for i in range(n_experts):
        for j in range(n_experts):
            if pairs[i, j] > 0:
                squares += pairs[i, j] * pairs[i, j] / (x[i] * y[j])
    own = np.zeros((n_experts, n_experts))
    own_comparisons = 0.0
    n_tokens = len(here)
    start = 0
    while start < n_tokens:
        end = start
        size = 0.0
        while end < n_tokens and cluster[end] == cluster[start]:
            for a in range(k):
                for b in range(k):
                    i, j = here[end, a], there[end, b]
                    if i >= 0 and j >= 0:
                        # (c + 1)^2 - c^2 as a cell grows, so that no cell is visited in vain
                        squares -= (2.0 * own[i, j] + 1.0) / (x[i] * y[j])
                        own[i, j] += 1.0
                        size += 1.0
            end += 1
        own_comparisons += size * size
        for t in range(start, end):
            for a in range(k):
                for b in range(k):
                    if here[t, a] >= 0 and there[t, b] >= 0:
                        own[here[t, a], there[t, b]] = 0.0
        start = end
    comparisons = total * total - own_comparisons
    return squares / comparisons if comparisons > 0 else np.nan


@compiled
def assign_types(
    topk: Ids, request: Index, log_lift: Floats, log_prior: Floats, types: Types
) -> int:
    """Most likely type of each token, in place; returns how many tokens changed theirs.

    log_lift   float32[layers * n_experts, types]
    log_prior  float32[requests, types], log share of the type less its log normaliser
    """
    n_tokens, n_layers, k = topk.shape
    n_types = log_lift.shape[1]
    n_experts = log_lift.shape[0] // n_layers
    score = np.empty(n_types, np.float32)
    changed = 0
    for t in range(n_tokens):
        score[:] = log_prior[request[t]]
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


@compiled
def count_by_group(topk: Ids, group: Types, counts: Doubles) -> None:
    """Adds to counts [layers * n_experts, groups] the choices of the tokens of each group."""
    n_tokens, n_layers, k = topk.shape
    n_experts = counts.shape[0] // n_layers
    for t in range(n_tokens):
        for layer in range(n_layers):
            for a in range(k):
                if topk[t, layer, a] >= 0:
                    counts[layer * n_experts + topk[t, layer, a], group[t]] += 1


@compiled
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


@compiled
def draw_without_replacement(weight: Floats, chosen: Ids, rng: np.random.Generator) -> None:
    """Fills chosen int16[k] with experts drawn one after another; their weights become 0."""
    n_experts = len(weight)
    total = np.float32(0)
    for e in range(n_experts):
        total += weight[e]
    for a in range(len(chosen)):
        left = np.float32(rng.random()) * total
        drawn = -1
        for e in range(n_experts):
            if weight[e] > 0:
                drawn = e  # the last one with weight stands in when rounding leaves a rest
                left -= weight[e]
                if left < 0:
                    break
        chosen[a] = drawn
        rest = total - weight[drawn]
        weight[drawn] = 0
        if rest < 0.01 * total:  # what is left of a difference of near equals is rounding
            rest = np.float32(0)
            for e in range(n_experts):
                rest += weight[e]
        total = rest


@compiled
def draw_experts(
    first: Flags,
    template: Index,
    types: Types,
    weights: Weights,
    topk: Ids,
    rng: np.random.Generator,
) -> None:
    """Fills topk int16[tokens, layers, k]: k experts without replacement per token and layer.

    template  int64[tokens], row of tilt_score of the token's request
    weights   type_weight float32[types, layers, experts], tilt_score float32[templates, rank],
              tilt_basis float32[rank, layers, experts], reuse_weight float32[layers, experts],
              bucket int64[ages] (see count_choices), recency_weight float32[layers, buckets],
              pair_weight float32[layers - 1, experts, experts]
    """
    type_weight, tilt_score, tilt_basis, reuse_weight, bucket, recency, pair_weight = weights
    n_tokens, n_layers, k = topk.shape
    n_experts = type_weight.shape[2]
    oldest = len(bucket) - 1
    tilt = np.ones((n_layers, n_experts), np.float32)
    weight = np.empty(n_experts, np.float32)
    last = np.zeros((n_layers, n_experts), np.int64)
    for t in range(n_tokens):
        if first[t]:
            last[:] = t - oldest
            tilt[:] = 0
            for r in range(tilt_basis.shape[0]):
                tilt += tilt_score[template[t], r] * tilt_basis[r]
            tilt[:] = np.exp(tilt)
        for layer in range(n_layers):
            base = type_weight[types[t], layer]
            for e in range(n_experts):
                age = bucket[min(t - last[layer, e], oldest)]
                weight[e] = base[e] * tilt[layer, e] * recency[layer, age]
            if not first[t]:
                for b in range(k):
                    e = topk[t - 1, layer, b]
                    weight[e] *= reuse_weight[layer, e]
            if layer > 0:
                for b in range(k):
                    row = pair_weight[layer - 1, topk[t, layer - 1, b]]
                    for e in range(n_experts):
                        weight[e] *= row[e]
            draw_without_replacement(weight, topk[t, layer], rng)
            for a in range(k):
                last[layer, topk[t, layer, a]] = t


@compiled
def draw_by_law(
    first: Flags, share: Floats, reuse: float, topk: Ids, rng: np.random.Generator
) -> None:
    """Fills topk int16[tokens, layers, k]: each expert of the token before stays with probability
    `reuse`, the free places are drawn by share float32[layers, experts], never one twice.
    """
    n_tokens, n_layers, k = topk.shape
    for t in range(n_tokens):
        for layer in range(n_layers):
            weight = share[layer].copy()
            stayed = 0
            if not first[t]:
                for b in range(k):
                    if rng.random() < reuse:
                        topk[t, layer, stayed] = topk[t - 1, layer, b]
                        weight[topk[t - 1, layer, b]] = 0
                        stayed += 1
            draw_without_replacement(weight, topk[t, layer, stayed:], rng)
