"""Forward passes of a trace, and what every MoE layer of each has to compute.

`forward_passes` says which tokens run together; `layer_steps` says, for every MoE layer of every
pass, which distinct experts they chose and with how many token copies. One layer of one pass is a
layer-step: the unit in which experts are looked up, loaded and computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from traces.batches import steps
from traces.compiled import compiled
from traces.errors import TraceError
from traces.replay import compiled_form
from traces.routing import DECODE, MISSING, PREFILL, RoutingTrace

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
PassPhase = Literal["both", "decode", "prefill"]


@dataclass(frozen=True, slots=True)
class ForwardPasses:
    """Tokens that run together, pass after pass.

    rows      int64[tokens in passes], rows of the trace, those of a pass adjacent
    start     int64[n_passes + 1], where each pass begins in rows
    phase     int8[n_passes], 0 prefill, 1 decode
    context   float64[n_passes], tokens in the KV cache before the pass, mean over its requests
    requests  int32[n_passes], requests that run in the pass
    """

    rows: Longs
    start: Longs
    phase: npt.NDArray[np.int8]
    context: npt.NDArray[np.float64]
    requests: Ints

    @property
    def n_passes(self) -> int:
        """Number of forward passes."""
        return len(self.phase)

    @property
    def tokens(self) -> Longs:
        """int64[n_passes]: tokens of each pass."""
        return np.diff(self.start)


@dataclass(frozen=True, slots=True)
class LayerSteps:
    """Work of the routed experts in the order it runs.

    Layer-step i is captured MoE layer i % n_layers of forward pass i // n_layers.
    start      int64[n_steps + 1], where each layer-step begins in the arrays below
    expert     int32[cells], distinct experts of the layer-step, in the order first chosen
    tokens     int32[cells], token copies that each of them gets
    gate       float32[cells], its gate weights summed over tokens, None when the trace has none
    n_missing  choices the trace does not hold (-1), left out
    """

    start: Longs
    expert: Ints
    tokens: Ints
    gate: Floats | None
    n_layers: int
    n_experts: int
    top_k: int
    passes: ForwardPasses
    n_missing: int = 0

    @property
    def n_steps(self) -> int:
        """Number of layer-steps."""
        return len(self.start) - 1

    @property
    def n_objects(self) -> int:
        """Experts over all layers; object of a cell is layer * n_experts + expert."""
        return self.n_layers * self.n_experts

    def layer_of_step(self) -> Longs:
        """int64[n_steps]: captured layer of each layer-step."""
        return np.arange(self.n_steps, dtype=np.int64) % self.n_layers

    def objects(self) -> Ints:
        """int32[cells]: layer * n_experts + expert."""
        layer = np.repeat(self.layer_of_step(), np.diff(self.start))
        return (layer * self.n_experts + self.expert).astype(np.int32)


def forward_passes(
    trace: RoutingTrace,
    batch_size: int = 1,
    phase: PassPhase = "both",
    chunk_tokens: int = 0,
    seed: int = 0,
) -> ForwardPasses:
    """Passes of one request at a time as it ran, or lock-step batches.

    batch_size    1: requests in the order of the trace, each prompt in passes of chunk_tokens
                  (0: whole), then token by token; above 1, `phase` must name one phase: decode
                  steps of that many requests, or prefill passes of that many tokens
    raises        TraceError when the trace has no token of the phase
    """
    if batch_size < 1 or chunk_tokens < 0:
        raise TraceError(f"batch_size={batch_size}, chunk_tokens={chunk_tokens}: expected >= 1, 0")
    if batch_size == 1:
        return _one_request_at_a_time(trace, phase, chunk_tokens)
    if phase == "both":
        raise TraceError(f"batch_size={batch_size}: say which phase, decode or prefill")
    rows = steps(trace, batch_size, phase, seed).rows
    n_passes, width = rows.shape
    decode = phase == "decode"
    position = trace.position[rows.ravel()].astype(np.float64).reshape(rows.shape)
    return ForwardPasses(
        rows=np.ascontiguousarray(rows).ravel(),
        start=np.arange(n_passes + 1, dtype=np.int64) * width,
        phase=np.full(n_passes, DECODE if decode else PREFILL, np.int8),
        context=position.mean(axis=1) if decode else np.zeros(n_passes),
        requests=np.full(n_passes, width if decode else 1, np.int32),
    )


def _one_request_at_a_time(
    trace: RoutingTrace, phase: PassPhase, chunk_tokens: int
) -> ForwardPasses:
    rows = np.arange(trace.n_tokens, dtype=np.int64)
    if phase != "both":
        rows = rows[trace.phase == (DECODE if phase == "decode" else PREFILL)]
    if not len(rows):
        raise TraceError(f"the trace has no {phase} token; pass --phase for the other")
    request, position, kind = trace.request[rows], trace.position[rows], trace.phase[rows]
    jumps = (np.diff(request) != 0) | (np.diff(position) != 1) | (np.diff(kind) != 0)
    begins = np.concatenate(([True], jumps | (kind[1:] == DECODE)))
    if chunk_tokens:
        run_start = np.flatnonzero(begins)
        place = np.arange(len(rows)) - np.repeat(
            run_start, np.diff(np.append(run_start, len(rows)))
        )
        begins |= place % chunk_tokens == 0
    first = np.flatnonzero(begins)
    return ForwardPasses(
        rows=rows,
        start=np.append(first, len(rows)),
        phase=kind[first],
        context=position[first].astype(np.float64),
        requests=np.ones(len(first), np.int32),
    )


def layer_steps(trace: RoutingTrace, passes: ForwardPasses) -> LayerSteps:
    """Distinct experts and their token copies of every layer of every pass."""
    weights = trace.weights
    gate = None if weights is None else np.ascontiguousarray(weights, dtype=np.float32)
    no_gate = np.zeros((0, 0, 0), np.float32)
    single = bool((passes.tokens == 1).all())
    if single and gate is None and (trace.n_tokens == 0 or trace.topk.min() != MISSING):
        return _one_token_each(trace, passes)
    start, expert, tokens, summed = _count_cells(
        compiled_form(trace.topk), no_gate if gate is None else gate,
        passes.rows, passes.start, trace.n_experts,
    )  # fmt: skip
    n_chosen = len(passes.rows) * trace.n_layers * trace.top_k
    return LayerSteps(
        start=start,
        expert=expert,
        tokens=tokens,
        gate=None if gate is None else summed,
        n_layers=trace.n_layers,
        n_experts=trace.n_experts,
        top_k=trace.top_k,
        passes=passes,
        n_missing=n_chosen - int(tokens.sum(dtype=np.int64)),
    )


def part_of(work: LayerSteps, first: int, end: int) -> LayerSteps:
    """Forward passes first..end, exclusive."""
    steps = slice(first * work.n_layers, end * work.n_layers + 1)
    start = work.start[steps]
    cells = slice(int(start[0]), int(start[-1]))
    passes = work.passes
    rows = slice(int(passes.start[first]), int(passes.start[end]))
    return replace(
        work,
        start=start - start[0],
        expert=work.expert[cells],
        tokens=work.tokens[cells],
        gate=None if work.gate is None else work.gate[cells],
        passes=ForwardPasses(
            passes.rows[rows],
            passes.start[first : end + 1] - passes.start[first],
            passes.phase[first:end],
            passes.context[first:end],
            passes.requests[first:end],
        ),
    )


def without(work: LayerSteps, pinned: npt.NDArray[np.bool_]) -> LayerSteps:
    """The layer-steps without requests for pinned experts."""
    kept = ~pinned[work.objects()]
    per_step = np.add.reduceat(kept, work.start[:-1]) if len(kept) else np.zeros(0, np.int64)
    per_step = np.where(np.diff(work.start) > 0, per_step, 0)
    start = np.concatenate([[0], np.cumsum(per_step)]).astype(np.int64)
    return replace(work, start=start, expert=work.expert[kept], tokens=work.tokens[kept], gate=None)


def _one_token_each(trace: RoutingTrace, passes: ForwardPasses) -> LayerSteps:
    """The same for passes of one token without holes: the choices as they stand."""
    whole = len(passes.rows) == trace.n_tokens and bool((np.diff(passes.rows) == 1).all())
    topk = trace.topk if whole else trace.topk[passes.rows]
    n_steps = topk.shape[0] * trace.n_layers
    return LayerSteps(
        start=np.arange(n_steps + 1, dtype=np.int64) * trace.top_k,
        expert=topk.reshape(-1).astype(np.int32),
        tokens=np.ones(topk.size, np.int32),
        gate=None,
        n_layers=trace.n_layers,
        n_experts=trace.n_experts,
        top_k=trace.top_k,
        passes=passes,
    )


@compiled
def _count_cells(
    topk: npt.NDArray[np.int16], gate: Floats, rows: Longs, pass_start: Longs, n_experts: int
) -> tuple[Longs, Ints, Ints, Floats]:
    """Cells of every layer-step, experts in the order first chosen."""
    n_layers, top_k = topk.shape[1], topk.shape[2]
    n_passes = len(pass_start) - 1
    has_gate = gate.shape[0] > 0
    start = np.zeros(n_passes * n_layers + 1, np.int64)
    expert = np.empty(len(rows) * n_layers * top_k, np.int32)
    tokens = np.zeros(len(expert), np.int32)
    summed = np.zeros(len(expert), np.float32)
    place = np.full(n_experts, -1, np.int64)
    used = 0
    for p in range(n_passes):
        for layer in range(n_layers):
            first = used
            for r in range(pass_start[p], pass_start[p + 1]):
                for j in range(top_k):
                    chosen = topk[rows[r], layer, j]
                    if chosen < 0:
                        continue
                    if place[chosen] < first:
                        place[chosen] = used
                        expert[used] = chosen
                        used += 1
                    tokens[place[chosen]] += 1
                    if has_gate:
                        summed[place[chosen]] += gate[rows[r], layer, j]
            for cell in range(first, used):
                place[expert[cell]] = -1
            start[p * n_layers + layer + 1] = used
    return start, expert[:used].copy(), tokens[:used].copy(), summed[:used].copy()
