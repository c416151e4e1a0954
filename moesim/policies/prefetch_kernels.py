"""Compiled loops of the predictors: cells of LayerSteps in, (start, expert) of Predictions out.

start   int64[n_steps + 1] and expert int32[cells], as in LayerSteps
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled, inlined

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]
Named = tuple[Longs, Ints]


@compiled
def corrupt(
    start: Longs,
    expert: Ints,
    recall: Doubles,
    cumulative: Doubles,
    near: Ints,
    extra: int,
    rng: np.random.Generator,
) -> Named:
    """True experts with misses that grow with rank, near misses in their place, and extra names."""
    n_layers, n_experts = cumulative.shape
    n_steps = len(start) - 1
    named_start = np.zeros(n_steps + 1, np.int64)
    named = np.empty(len(expert) + n_steps * extra, np.int32)
    taken = np.full(n_experts, -1, np.int64)
    used = 0
    for step in range(n_steps):
        layer, first, n = step % n_layers, start[step], start[step + 1] - start[step]
        for cell in range(first, first + n):
            taken[expert[cell]] = step  # a near miss is not one of the true ones
        n_wrong = 0
        for rank in range(n):
            p_miss = (1.0 - recall[layer]) * (rank + 0.5) * 2.0 / n
            if recall[layer] < 0.5:  # the slope would pass 1: flat up to recall 0, true mean
                slope = 2.0 * recall[layer]
                p_miss = 1.0 - slope * (1.0 - (rank + 0.5) / n)
            if rng.random() < p_miss:
                n_wrong += 1
            else:
                named[used] = expert[first + rank]
                used += 1
        for i in range(min(n_wrong + extra, n_experts - n)):
            chosen = -1
            if step < len(near) and i < near.shape[1]:
                chosen = near[step, i]
            while chosen < 0 or taken[chosen] == step:
                chosen = int(np.searchsorted(cumulative[layer], rng.random()))
                chosen = min(chosen, n_experts - 1)
            taken[chosen] = step
            named[used] = chosen
            used += 1
        named_start[step + 1] = used
    return named_start, named[:used].copy()


@compiled
def follow(
    start: Longs, expert: Ints, n_layers: int, n_experts: int, n_named: int, fade: float
) -> Named:
    """Most frequent successors of the experts of the layer before, counted as passes go by."""
    n_steps = len(start) - 1
    counts = np.zeros((n_layers, n_experts, n_experts), np.float32)
    named_start = np.zeros(n_steps + 1, np.int64)
    named = np.empty(n_steps * n_named, np.int32)
    score = np.zeros(n_experts, np.float64)
    used, gain = 0, np.float32(1.0)
    for step in range(n_steps):
        layer = step % n_layers
        if layer == 0:
            gain /= np.float32(fade)  # older counts fade: newer ones weigh more
            if gain > 1e20:
                counts /= gain
                gain = np.float32(1.0)
        else:
            score[:] = 0.0
            for cell in range(start[step - 1], start[step]):
                for e in range(n_experts):
                    score[e] += counts[layer, expert[cell], e]
            used = _name_best(score, named, used, n_named)
            for cell in range(start[step - 1], start[step]):
                for after in range(start[step], start[step + 1]):
                    counts[layer, expert[cell], expert[after]] += gain
        named_start[step + 1] = used
    return named_start, named[:used].copy()


@compiled
def popular(
    start: Longs, expert: Ints, shape: tuple[int, int], n_named: int, period: int, fade: float
) -> Named:
    """Most used experts of every layer, offered once after every `period` passes."""
    n_layers, n_experts = shape
    n_steps = len(start) - 1
    counts = np.zeros((n_layers, n_experts))
    named_start = np.zeros(n_steps + 1, np.int64)
    offered = (n_steps // n_layers // period + 1) * n_layers
    named = np.empty(offered * n_named, np.int32)
    used = 0
    for step in range(n_steps):
        layer, at = step % n_layers, step // n_layers
        if at > 0 and at % period == 0:
            used = _name_best(counts[layer], named, used, n_named)
            counts[layer] *= fade
        for cell in range(start[step], start[step + 1]):
            counts[layer, expert[cell]] += 1.0
        named_start[step + 1] = used
    return named_start, named[:used].copy()


@compiled
def match_requests(
    start: Longs,
    expert: Ints,
    shape: tuple[int, int],
    request: Ints,
    n_named: int,
    n_stored: int,
) -> Named:
    """Best experts of the stored request that resembles the running one most."""
    n_layers, n_experts = shape
    n_passes = len(request)
    stored = np.zeros((n_stored, n_layers, n_experts))
    stored_norm = np.zeros((n_stored, n_layers))
    matched = np.zeros(n_stored, np.int64)
    current = np.zeros((n_layers, n_experts))
    dot = np.zeros((n_stored, n_layers))
    norm = np.zeros(n_layers)
    named_start = np.zeros(len(start), np.int64)
    named = np.empty((len(start) - 1) * n_named, np.int32)
    used, n_kept = 0, 0
    for p in range(n_passes):
        if p > 0 and request[p] != request[p - 1]:
            n_kept = _store(current, stored, stored_norm, matched, n_kept)
            current[:] = 0.0
            dot[:] = 0.0
            norm[:] = 0.0
        best = -1
        if n_kept > 0 and norm.sum() > 0:
            best = _closest(dot, norm, stored_norm, n_kept)
            matched[best] += 1
        for layer in range(n_layers):
            step = p * n_layers + layer
            if best >= 0:
                used = _name_best(stored[best, layer], named, used, n_named)
            named_start[step + 1] = used
            for cell in range(start[step], start[step + 1]):
                e = expert[cell]
                norm[layer] += 2.0 * current[layer, e] + 1.0
                current[layer, e] += 1.0
                for s in range(n_kept):
                    dot[s, layer] += stored[s, layer, e]
    return named_start, named[:used].copy()


@inlined
def _store(
    current: Doubles, stored: Doubles, stored_norm: Doubles, matched: Longs, n_kept: int
) -> int:
    """Keep a finished request, in place of the one matched least when all places are taken."""
    at = n_kept
    if n_kept == len(stored):
        at = int(np.argmin(matched))
    else:
        n_kept += 1
    stored[at] = current
    matched[at] = 0
    for layer in range(current.shape[0]):
        stored_norm[at, layer] = (current[layer] ** 2).sum()
    return n_kept


@inlined
def _closest(dot: Doubles, norm: Doubles, stored_norm: Doubles, n_kept: int) -> int:
    """The stored request with the largest mean cosine over layers."""
    best, best_sum = 0, -1.0
    for s in range(n_kept):
        total = 0.0
        for layer in range(len(norm)):
            size = norm[layer] * stored_norm[s, layer]
            if size > 0:
                total += dot[s, layer] / np.sqrt(size)
        if total > best_sum:
            best, best_sum = s, total
    return best


@inlined
def _name_best(score: Doubles, named: Ints, used: int, n_named: int) -> int:
    """Append the experts with the highest scores above 0, best first; of equals the lowest id."""
    first = used
    for _ in range(min(n_named, len(score))):
        best, high = -1, 0.0
        for e in range(len(score)):
            if score[e] > high:
                already = False
                for i in range(first, used):
                    already = already or named[i] == e
                if not already:
                    best, high = e, score[e]
        if best < 0:
            break
        named[used] = best
        used += 1
    return used


@compiled
def overlap(
    start: Longs, expert: Ints, named_start: Longs, named: Ints, n_layers: int, n_experts: int
) -> tuple[Doubles, Doubles, Doubles]:
    """Asked, named, and named and asked experts of every layer."""
    asked, offered, both = np.zeros(n_layers), np.zeros(n_layers), np.zeros(n_layers)
    mark = np.full(n_experts, -1, np.int64)
    for step in range(len(start) - 1):
        layer = step % n_layers
        for i in range(named_start[step], named_start[step + 1]):
            mark[named[i]] = step
            offered[layer] += 1
        for cell in range(start[step], start[step + 1]):
            asked[layer] += 1
            if mark[expert[cell]] == step:
                both[layer] += 1
    return asked, offered, both
