"""RoutingTrace: which experts each token of a captured run went to; and ExpertCounts, its shadow.

A RoutingTrace keeps token order, requests and phases. ExpertCounts keeps only how often each
expert was chosen; what needs token order refuses it by name (`require_tokens`). Both are stored
as Parquet with everything about the capture in the file's metadata. `formats/` reads the files
of other systems into these two.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError

PREFILL, DECODE = 0, 1
MISSING = -1


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Expert choices of every token at every MoE layer; expert ids are logical.

    topk      int16[tokens, moe_layers, top_k], 0..n_experts-1, -1 where missing
    layers    absolute layer index of each column of topk, increasing
    request   int32[tokens], which request the token belongs to
    position  int32[tokens], place of the token in its request, 0 first
    phase     int8[tokens], 0 prefill, 1 decode
    forward   int64[tokens] forward-pass id in the order they ran, or None when not logged
    weights   float16[tokens, moe_layers, top_k] gate weights, or None
    scores    float16[tokens, moe_layers, n_experts] full router scores, or None
    model     name of the model, "" when unknown
    capture   how the trace was taken (engine, file), for the reader
    """

    topk: npt.NDArray[np.int16]
    n_experts: int
    layers: tuple[int, ...]
    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: npt.NDArray[np.int8]
    forward: npt.NDArray[np.int64] | None = None
    weights: npt.NDArray[np.float16] | None = None
    scores: npt.NDArray[np.float16] | None = None
    model: str = ""
    capture: str = ""

    def __post_init__(self) -> None:
        _check_topk(self.topk, self.n_experts, self.layers)
        tokens, n_layers, top_k = self.topk.shape
        expected = {
            "request": (tokens,),
            "position": (tokens,),
            "phase": (tokens,),
            "forward": (tokens,),
            "weights": (tokens, n_layers, top_k),
            "scores": (tokens, n_layers, self.n_experts),
        }
        for field, shape in expected.items():
            array = getattr(self, field)
            if array is not None and array.shape != shape:
                raise TraceError(f"{field}: shape {array.shape}, expected {shape} as in topk")
        if tokens and not set(np.unique(self.phase)) <= {PREFILL, DECODE}:
            raise TraceError(f"phase: values {np.unique(self.phase)[:5]}, expected 0 or 1")

    @property
    def n_tokens(self) -> int:
        """Number of tokens (rows)."""
        return int(self.topk.shape[0])

    @property
    def n_layers(self) -> int:
        """Number of MoE layers captured (columns)."""
        return int(self.topk.shape[1])

    @property
    def top_k(self) -> int:
        """Experts chosen per token and layer."""
        return int(self.topk.shape[2])

    def rows(self, index: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> RoutingTrace:
        """The same trace with only the given token rows, in the given order."""
        per_token = ("topk", "request", "position", "phase", "forward", "weights", "scores")
        parts = {f: a[index] for f in per_token if (a := getattr(self, f)) is not None}
        return replace(self, **parts)


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """How often each expert was chosen; no token order.

    counts  float64[moe_layers, n_experts], >= 0 (expected counts may be fractions)
    layers  absolute layer index of each row
    top_k   experts per token when known, else 0
    """

    counts: npt.NDArray[np.float64]
    layers: tuple[int, ...]
    top_k: int = 0
    model: str = ""
    capture: str = ""

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or len(self.layers) != self.counts.shape[0]:
            raise TraceError(
                f"counts: shape {self.counts.shape}, expected [{len(self.layers)} layers, experts]"
            )
        if not np.isfinite(self.counts).all() or (self.counts < 0).any():
            raise TraceError("counts: found a negative or non-finite count, expected >= 0")

    @property
    def n_experts(self) -> int:
        """Number of routed experts in a layer."""
        return int(self.counts.shape[1])

    @property
    def n_layers(self) -> int:
        """Number of MoE layers counted."""
        return int(self.counts.shape[0])


def expert_counts(trace: RoutingTrace) -> ExpertCounts:
    """Counts of a trace; missing cells are not counted."""
    counts = np.empty((trace.n_layers, trace.n_experts), dtype=np.float64)
    for column in range(trace.n_layers):
        chosen = trace.topk[:, column].ravel()
        counts[column] = np.bincount(chosen[chosen != MISSING], minlength=trace.n_experts)
    return ExpertCounts(counts, trace.layers, trace.top_k, trace.model, trace.capture)


def require_tokens(trace: RoutingTrace | ExpertCounts, purpose: str) -> RoutingTrace:
    """The trace itself, or a TraceError naming the purpose that needs token order."""
    if isinstance(trace, ExpertCounts):
        raise TraceError(f"{purpose} needs token order, but the input holds expert counts only")
    return trace


def content_hash(trace: RoutingTrace | ExpertCounts) -> str:
    """SHA-256 over shapes and values (not over names), as hexadecimal text."""
    digest = hashlib.sha256()
    if isinstance(trace, ExpertCounts):
        fields: tuple[str, ...] = ("counts",)
    else:
        fields = ("topk", "request", "position", "phase", "forward", "weights", "scores")
    digest.update(repr((trace.n_experts, trace.layers)).encode())
    for field in fields:
        array = getattr(trace, field)
        if array is not None:
            digest.update(f"{field} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _check_topk(topk: npt.NDArray[np.int16], n_experts: int, layers: tuple[int, ...]) -> None:
    if topk.ndim != 3 or topk.dtype != np.int16:
        raise TraceError(
            f"topk: {topk.dtype}{list(topk.shape)}, expected int16[tokens, moe_layers, top_k]"
        )
    if len(layers) != topk.shape[1] or list(layers) != sorted(set(layers)):
        raise TraceError(f"layers: {layers}, expected {topk.shape[1]} increasing layer indices")
    if not 0 < topk.shape[2] <= n_experts <= 2**15 - 1:
        raise TraceError(
            f"n_experts: {n_experts}, expected between top_k={topk.shape[2]} and 32767"
        )
    if topk.size and (topk.min() < MISSING or topk.max() >= n_experts):
        raise TraceError(
            f"topk: expert ids {topk.min()}..{topk.max()}, expected 0..{n_experts - 1}"
            " (-1 where missing)"
        )
