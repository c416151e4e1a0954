"""Cut and join traces: split for planning and judging, select a part, put parts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError
from traces.routing import RoutingTrace

By = Literal["request", "order"]


@dataclass(frozen=True, slots=True)
class Split:
    """Two parts of a trace that share no request.

    how  what the split was made by; "time" when the trace has one request only, whose first part
         is planned on and whose rest is judged on
    """

    plan: RoutingTrace
    judge: RoutingTrace
    how: str


def split(trace: RoutingTrace, share: float, by: By = "request", seed: int = 0) -> Split:
    """Plan on about `share` of the tokens, judge on the others; no request is on both sides.

    by      "request": requests at random; "order": the requests that come first in the file,
            which is another domain where the capture went through domains in turn
    raises  TraceError when share is not inside (0, 1) or the trace has fewer than two tokens
    """
    if not 0 < share < 1 or trace.n_tokens < 2:
        raise TraceError(
            f"split: share={share} of {trace.n_tokens} tokens, expected a share inside (0, 1) of"
            " two tokens or more"
        )
    if by not in ("request", "order"):
        raise TraceError(f"split: by={by!r}, expected 'request' or 'order'")
    requests, first, inverse, sizes = np.unique(
        trace.request, return_index=True, return_inverse=True, return_counts=True
    )
    if len(requests) < 2:
        cut = min(max(1, round(share * trace.n_tokens)), trace.n_tokens - 1)
        return Split(trace.rows(slice(0, cut)), trace.rows(slice(cut, None)), "time")
    order = np.argsort(first, kind="stable")
    if by == "request":
        order = np.random.default_rng(seed).permutation(order)
    reached = np.cumsum(sizes[order])
    n_chosen = int(np.searchsorted(reached, share * trace.n_tokens)) + 1
    chosen = np.zeros(len(requests), dtype=bool)
    chosen[order[: min(n_chosen, len(requests) - 1)]] = True
    planned = chosen[inverse.reshape(-1)]
    return Split(trace.rows(planned), trace.rows(~planned), by)


def select(
    trace: RoutingTrace,
    requests: Sequence[int] | None = None,
    phase: int | None = None,
    layers: Sequence[int] | None = None,
) -> RoutingTrace:
    """Only the given requests, phase (0 prefill, 1 decode) and absolute layers.

    raises  TraceError for a layer that was not captured
    """
    keep = np.ones(trace.n_tokens, dtype=bool)
    if requests is not None:
        keep &= np.isin(trace.request, np.asarray(requests))
    if phase is not None:
        keep &= trace.phase == phase
    part = trace.rows(keep)
    if layers is None:
        return part
    missing = sorted(set(layers) - set(trace.layers))
    if missing:
        raise TraceError(f"layers {missing} were not captured, captured are {trace.layers}")
    wanted = tuple(sorted(set(layers)))
    columns = [trace.layers.index(layer) for layer in wanted]
    return replace(
        part,
        topk=part.topk[:, columns],
        layers=wanted,
        weights=None if part.weights is None else part.weights[:, columns],
        scores=None if part.scores is None else part.scores[:, columns],
    )


def concat(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """The traces one after the other; requests and forward passes are numbered anew, kept apart.

    Optional arrays (forward, weights, scores) are kept only if all traces have them.

    raises  TraceError when models, layers, experts or top_k differ
    """
    if not traces:
        raise TraceError("concat: no trace given, expected at least one")
    for trace in traces[1:]:
        for field in ("model", "n_experts", "layers", "top_k"):
            ours, theirs = getattr(traces[0], field), getattr(trace, field)
            if ours != theirs:
                raise TraceError(f"concat: {field} is {ours} in one trace and {theirs} in another")
    fields: dict[str, Any] = {}
    for name in ("topk", "request", "position", "phase", "forward", "weights", "scores"):
        arrays = [getattr(trace, name) for trace in traces]
        if any(array is None for array in arrays):
            fields[name] = None
        elif name in ("request", "forward"):
            fields[name] = _numbered_apart(arrays).astype(arrays[0].dtype)
        else:
            fields[name] = np.concatenate(arrays)
    return replace(traces[0], **fields)


def _numbered_apart(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """Ids 0, 1, 2, ... in the order of the old ones within an array, arrays one after the other."""
    renumbered, used = [], 0
    for ids in arrays:
        distinct, inverse = np.unique(ids, return_inverse=True)
        renumbered.append(inverse.reshape(-1).astype(np.int64) + used)
        used += len(distinct)
    return np.concatenate(renumbered)
