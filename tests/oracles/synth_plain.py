"""The generator's counts and the lock step of a batch, in plain Python: what the loops must do."""

from __future__ import annotations

from collections import Counter, deque
from itertools import product

from traces.routing import RoutingTrace

Cells = dict[str, Counter[tuple[int, ...]]]


def counts_plain(trace: RoutingTrace, lags: tuple[int, ...], ages: tuple[int, ...]) -> Cells:
    """The tallies of `kernels.count_choices`, keyed by their indices; rows in request order."""
    cells: Cells = {name: Counter() for name in ("chosen", "kept", "aged", "exposed", "far")}
    cells |= {"compared": Counter(), "together": Counter(), "following": Counter()}
    start = 0
    for t in range(trace.n_tokens):
        if t == 0 or trace.request[t] != trace.request[t - 1]:
            start = t
        for layer in range(trace.n_layers):
            for e in range(trace.n_experts):
                uses = [s for s in range(start, t) if e in _chosen(trace, s, layer)]
                age = t - uses[-1] if uses else ages[-1] + 1
                bucket = sum(age > end for end in ages)
                cells["exposed"][layer, bucket] += 1
                if e not in _chosen(trace, t, layer):
                    continue
                cells["chosen"][layer, e] += 1
                cells["aged"][layer, bucket] += 1
                cells["kept"][layer, e] += t > start and e in _chosen(trace, t - 1, layer)
                for lag in lags:
                    cells["compared"][layer,] += t - lag >= start
                    cells["far"][layer,] += t - lag >= start and e in _chosen(trace, t - lag, layer)
                for f in _chosen(trace, t, layer) - {e}:
                    cells["together"][layer, e, f] += 1
                if layer + 1 < trace.n_layers:
                    for f in _chosen(trace, t, layer + 1):
                        cells["following"][layer, e, f] += 1
    return cells


def affinity_plain(trace: RoutingTrace, layer: int) -> float:
    """Affinity of a layer to the next: how often two tokens of different requests agree on a pair,
    each agreement weighed by how unlikely the pair is when layers are independent, judged from
    one choice of each of its experts fewer.
    """
    pairs = [
        [(int(i), int(j)) for i in _chosen(trace, t, layer) for j in _chosen(trace, t, layer + 1)]
        for t in range(trace.n_tokens)
    ]
    every = [pair for token in pairs for pair in token]
    here, there = Counter(i for i, _ in every), Counter(j for _, j in every)
    agreement, comparisons, k = 0.0, 0, trace.top_k
    for t, s in product(range(trace.n_tokens), repeat=2):
        if trace.request[t] == trace.request[s]:
            continue
        comparisons += len(pairs[t]) * len(pairs[s])
        for (i, j), other in product(pairs[t], pairs[s]):
            if (i, j) == other:
                rare = max(here[i] - k, 0.5) * max(there[j] - k, 0.5)
                agreement += (len(every) - k) ** 2 / rare
    return agreement / comparisons if comparisons else float("nan")


def lock_step_plain(sizes: list[int], n_slots: int) -> list[list[tuple[int, int]]]:
    """(request, token) of every slot in every step, until a slot finds no request waiting."""
    waiting = deque(range(len(sizes)))
    slots: list[tuple[int, int] | None] = [None] * n_slots
    steps: list[list[tuple[int, int]]] = []
    while True:
        row: list[tuple[int, int]] = []
        for slot, running in enumerate(slots):
            if running is None or running[1] + 1 == sizes[running[0]]:
                if not waiting:
                    return steps
                running = (waiting.popleft(), -1)
            slots[slot] = (running[0], running[1] + 1)
            row.append((running[0], running[1] + 1))
        steps.append(row)


def _chosen(trace: RoutingTrace, token: int, layer: int) -> set[int]:
    return {int(e) for e in trace.topk[token, layer] if e >= 0}
