"""Traces made, not captured: fitted to a real trace's statistics, or from a few numbers.

`fit` measures a captured trace and calibrates a generator on it; `generate` draws a new trace of
any length from the result. The generator draws the k experts of a token at a layer without
replacement, with log weight

    popularity[layer, e] + type[c, layer, e] + tilt[request, layer, e]
        + reuse[layer, e] if the token before in the request chose e
        + recency[layer, age], by the tokens since the request last chose e
        + sum of affinity[layer - 1, i, e] over the experts i this token chose one layer before

where c is the token's type (one of a few dozen; what makes experts of one token agree over all
layers) and the tilt is the request's own taste (what makes tokens far apart agree). All of these
are calibrated by generating, measuring and correcting, so that a generated trace has the source's
popularity, reuse of consecutive tokens and inter-layer affinity. `synth_model.py` is the model,
`synth_fit.py` finds types and tilts, `synth_calibrate.py` corrects.

`zipf_trace` and `uniform_trace` need no source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError
from traces.routing import DECODE, RoutingTrace

if TYPE_CHECKING:
    from traces.synth_model import RequestShapes, RoutingModel

Ids = npt.NDArray[np.int16]
Flags = npt.NDArray[np.bool_]
Index = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

_STRETCHES = 16  # a trace of one request is cut into, where independent samples are needed
_MOST_TOKENS, _MOST_REQUESTS = 300_000, 2048  # a fit uses; a longer trace is sampled
_EARLY_TOKENS, _LATE_TOKENS = (
    50_000,
    150_000,
)  # generated per calibration round, first and last half
_LAW_REQUEST_TOKENS = 256  # of a request of zipf_trace


@dataclass(frozen=True, slots=True)
class FittedTrace:
    """A trace's statistics and the generator calibrated on them.

    popularity    float64[layers, experts], share of the layer's choices, sums to 1
    reuse         float64[layers], overlap of consecutive tokens over that of independent draws
    affinity      float64[layers - 1], see `affinity_ratio`
    requests      lengths, phases and first positions of the source's requests
    model         log weights of the generator, see `synth_model.RoutingModel`
    sample_share  share of the source's tokens that all of this was measured on, 1 for all
    top_k, layers, source   as in RoutingTrace; source is the model's name
    """

    popularity: Doubles
    reuse: Doubles
    affinity: Doubles
    requests: RequestShapes
    model: RoutingModel
    sample_share: float
    top_k: int
    layers: tuple[int, ...]
    source: str


def stream(seed: int, name: str) -> np.random.Generator:
    """The random generator of one named purpose in a run with this seed.

    raises  TraceError for a negative seed
    """
    if seed < 0:
        raise TraceError(f"seed={seed}, expected 0 or more")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(name.encode()),)))


def affinity_ratio(trace: RoutingTrace) -> Doubles:
    """How much the experts of a token depend on its experts one layer before; 1 when not at all.

    returns  float64[layers - 1], sum over (i, j) of P_ij^2 / (x_i y_j): P_ij is the share of
             (i, j) among all pairs of choices of one token at adjacent captured layers, x and y
             its margins. It is the mean lift of the pairs that occur, and 1 + chi-square / n; nan
             where no two tokens can be compared
    bias     counting noise looks like dependence: for n independent pairs the plain estimate is
             1 + (E - 1)^2 / n. Here P_ij^2 is estimated from products over tokens of different
             requests only (a U-statistic with requests as clusters), right on average however few
             the tokens; it may fall below 1 by chance, and reads low for a handful of requests
             whose tokens are alike. A trace of one request is cut into 16 stretches, taken for
             independent
    raises   TraceError for an empty trace
    """
    from traces import synth_calibrate

    ordered = _in_request_order(trace, "affinity")
    cluster = _clusters(ordered.request)
    return synth_calibrate.affinity(ordered.topk, cluster, trace.n_experts)


def fit(trace: RoutingTrace, seed: int = 0, rounds: int = 24, n_types: int = 64) -> FittedTrace:
    """A generator that keeps the trace's popularity, temporal reuse and inter-layer affinity.

    rounds   calibration rounds, each generating about as many tokens as the trace has
    n_types  token types at most; fewer when the trace has fewer than 200 tokens a type
    raises   TraceError for a trace without tokens; one with a single layer or expert is fine
    note     of a trace with more than 300,000 tokens or 2,048 requests, requests drawn at random
             are used, see sample_share. Missing cells are skipped and not generated
    """
    from traces import synth_calibrate, synth_fit, synth_model

    ordered = _sampled(_in_request_order(trace, "fit"), stream(seed, "sample"))
    topk, shapes = ordered.topk, synth_model.request_shapes(ordered)
    first = synth_model.starts(ordered.request)
    measured = synth_calibrate.measure(topk, first, trace.n_experts)
    affinity = synth_calibrate.affinity(topk, _clusters(ordered.request), trace.n_experts)
    start = synth_fit.latent_structure(
        topk, ordered.phase, first, synth_fit.Sizes(trace.n_experts, n_types), stream(seed, "types")
    )

    def sample(model: RoutingModel, round_: int) -> tuple[Ids, Flags]:
        rng = stream(seed, f"round {round_}")
        most = _EARLY_TOKENS if 2 * round_ < rounds else _LATE_TOKENS
        places = synth_model.place_tokens(shapes, None, min(len(topk), most), rng)
        return synth_model.draw(model, places, trace.top_k, rng), places.first

    pairs = synth_calibrate.without_counting_noise(measured.pairs, affinity)
    model = synth_calibrate.calibrate(start, replace(measured, pairs=pairs), sample, rounds)
    return FittedTrace(
        popularity=measured.share,
        reuse=measured.reuse,
        affinity=affinity,
        requests=shapes,
        model=model,
        sample_share=len(topk) / trace.n_tokens,
        top_k=trace.top_k,
        layers=trace.layers,
        source=trace.model,
    )


def generate(
    fitted: FittedTrace,
    n_requests: int | None = None,
    n_tokens: int | None = None,
    seed: int = 0,
) -> RoutingTrace:
    """A new trace with the fitted statistics; the same seed gives the same bytes.

    n_requests, n_tokens  exactly one: that many requests, each with the length, phases and tilt
                          of one source request (all of them once before any twice), or that many
                          tokens, the last request cut short
    raises                TraceError unless exactly one is given and positive
    """
    from traces import synth_model

    rng = stream(seed, "generate")
    places = synth_model.place_tokens(fitted.requests, n_requests, n_tokens, rng)
    return RoutingTrace(
        topk=synth_model.draw(fitted.model, places, fitted.top_k, rng),
        n_experts=fitted.popularity.shape[1],
        layers=fitted.layers,
        request=places.request,
        position=places.position,
        phase=places.phase,
        model=fitted.source,
        capture=f"generated, seed {seed}, fitted to {fitted.requests.n_requests} requests",
    )


def zipf_trace(
    n_tokens: int,
    n_layers: int,
    n_experts: int,
    top_k: int,
    exponent: float = 1.0,
    reuse: float = 0.0,
    seed: int = 0,
) -> RoutingTrace:
    """A decode trace by a law: the r-th most popular expert is drawn in proportion to r^-exponent.

    Which expert has which rank is random in every layer; layers are independent; requests have 256
    tokens. For top_k > 1 the k experts differ, so their shares are flatter than the law.
    exponent  0 for even shares
    reuse     chance in 0..1 that an expert of the token before stays; the rest is drawn anew
    raises    TraceError for sizes, an exponent or a reuse out of range
    """
    from traces import synth_kernels

    _check_law(exponent, reuse)
    if min(n_tokens, n_layers) < 1 or not 0 < top_k <= n_experts <= 2**15 - 1:
        raise TraceError(
            f"n_tokens={n_tokens}, n_layers={n_layers}, n_experts={n_experts}, top_k={top_k}:"
            " expected 1 or more, and top_k <= n_experts <= 32767"
        )
    rng = stream(seed, "zipf")
    law = np.maximum(np.arange(1, n_experts + 1, dtype=np.float64) ** -exponent, 1e-30)
    share = np.stack([rng.permutation(law) for _ in range(n_layers)]).astype(np.float32)
    token = np.arange(n_tokens, dtype=np.int32)
    position = token % _LAW_REQUEST_TOKENS
    topk = np.empty((n_tokens, n_layers, top_k), dtype=np.int16)
    synth_kernels.draw_by_law(position == 0, share, float(reuse), topk, rng)
    return RoutingTrace(
        topk=topk,
        n_experts=n_experts,
        layers=tuple(range(n_layers)),
        request=token // _LAW_REQUEST_TOKENS,
        position=position,
        phase=np.full(n_tokens, DECODE, dtype=np.int8),
        capture=f"generated, Zipf exponent {exponent:g}, reuse {reuse:g}, seed {seed}",
    )


def uniform_trace(
    n_tokens: int, n_layers: int, n_experts: int, top_k: int, seed: int = 0
) -> RoutingTrace:
    """A decode trace of independent even draws: the floor for every statistic of locality."""
    return zipf_trace(n_tokens, n_layers, n_experts, top_k, exponent=0.0, reuse=0.0, seed=seed)


def _check_law(exponent: float, reuse: float) -> None:
    if not 0 <= exponent <= 20:
        raise TraceError(f"exponent={exponent}, expected 0..20")
    if not 0 <= reuse <= 1:
        raise TraceError(f"reuse={reuse}, expected a chance in 0..1")


def _in_request_order(trace: RoutingTrace, purpose: str) -> RoutingTrace:
    """Rows sorted by request, then position; topk in the one form the kernels are compiled for."""
    if not trace.n_tokens:
        raise TraceError(f"{purpose} needs at least one token, the trace has none")
    ordered = trace.rows(np.lexsort((trace.position, trace.request)).astype(np.int64))
    return replace(ordered, topk=np.require(ordered.topk, requirements=["C", "W"]))


def _sampled(ordered: RoutingTrace, rng: np.random.Generator) -> RoutingTrace:
    """Whole requests at random up to the most a fit uses, in their order; one at least."""
    names, sizes = np.unique(ordered.request, return_counts=True)
    if ordered.n_tokens <= _MOST_TOKENS and len(names) <= _MOST_REQUESTS:
        return ordered
    order = rng.permutation(len(names))[:_MOST_REQUESTS]
    fitting = max(int(np.searchsorted(np.cumsum(sizes[order]), _MOST_TOKENS, side="right")), 1)
    return ordered.rows(np.isin(ordered.request, names[order[:fitting]]))


def _clusters(request: npt.NDArray[np.int32]) -> Index:
    """The requests themselves, or 16 stretches when there is only one; rows in request order."""
    if request[0] != request[-1]:
        return request.astype(np.int64)
    return np.arange(len(request), dtype=np.int64) * _STRETCHES // len(request)
