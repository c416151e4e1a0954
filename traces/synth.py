"""Traces made, not captured: fitted to a real trace's statistics, or from a few numbers.

`fit` measures a captured trace and calibrates a generator on it; `generate` draws a new trace of
any length from the result. The generator draws the k experts of a token at a layer without
replacement, with log weight

    popularity[layer, e] + type[c, layer, e] + tilt[request, layer, e]
        + reuse[layer, e] if the token before in the request chose e
        + sum of affinity[layer - 1, i, e] over the experts i this token chose one layer before

where c is the token's type (one of a few dozen; what makes layers far apart agree) and the tilt is
the request's own taste (what makes tokens far apart agree). Popularity, reuse, affinity and the
size of the tilt are calibrated by generating, measuring and correcting, so that a generated trace
has the source's shares, consecutive-token reuse and inter-layer affinity, not only similar ones.
`zipf_trace` and `uniform_trace` need no source.
"""

from __future__ import annotations

from dataclasses import dataclass
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

_SINGLE_REQUEST_PARTS = 16
_CALIBRATION_TOKENS = 150_000


@dataclass(frozen=True, slots=True)
class FittedTrace:
    """A trace's statistics and the generator calibrated on them; arrays only.

    popularity  float64[layers, experts], share of the layer's choices, sums to 1
    reuse       float64[layers], overlap of consecutive tokens over that of independent draws
    affinity    float64[layers - 1], see `affinity_ratio`
    requests    lengths, phases and first positions of the source's requests
    model       log weights of the generator, see `synth_model.RoutingModel`
    top_k, layers, source   as in RoutingTrace; source is the model's name
    """

    popularity: Doubles
    reuse: Doubles
    affinity: Doubles
    requests: RequestShapes
    model: RoutingModel
    top_k: int
    layers: tuple[int, ...]
    source: str


def stream(seed: int, name: str) -> np.random.Generator:
    """The random generator of one named purpose in a run with this seed (an int >= 0)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(name.encode()),)))


def in_request_order(trace: RoutingTrace) -> Index:
    """int64[tokens], rows sorted by request, then position; equal ones stay in trace order."""
    return np.lexsort((trace.position, trace.request)).astype(np.int64)


def affinity_ratio(trace: RoutingTrace) -> Doubles:
    """How much the experts of a token depend on its experts one layer before; 1 when not at all.

    returns  float64[layers - 1], sum over (i, j) of P_ij^2 / (x_i y_j): P_ij is the share of
             (i, j) among all pairs of choices of one token at adjacent captured layers, x and y
             its margins. It is the mean lift of the pairs that occur, and 1 + chi-square / n
    bias     counting noise looks like dependence: for n independent pairs the plain estimate is
             1 + (E - 1)^2 / n. Here P_ij^2 is estimated from products over tokens of different
             requests only (a U-statistic with requests as clusters), right on average however few
             the tokens and however alike those of one request. By chance it may fall below 1. A
             trace of one request is cut into 16 stretches, taken for independent; nan when there
             are no two tokens to compare
    raises   TraceError for an empty trace
    """
    from traces import synth_fit

    _require_rows(trace, "affinity")
    ordered = trace.rows(in_request_order(trace))
    return synth_fit.affinity(ordered.topk, _clusters(ordered.request), trace.n_experts)


def fit(trace: RoutingTrace, seed: int = 0, rounds: int = 24, n_types: int = 64) -> FittedTrace:
    """A generator that keeps the trace's popularity, temporal reuse and inter-layer affinity.

    rounds   calibration rounds, each generating as many tokens as the trace, at most 150,000
    n_types  token types at most; fewer when the trace has fewer than 200 tokens a type
    raises   TraceError for a trace without tokens
    """
    from traces import synth_fit, synth_model

    _require_rows(trace, "fit")
    ordered = trace.rows(in_request_order(trace))
    topk, shapes = ordered.topk, synth_model.request_shapes(ordered)
    first = synth_model.starts(ordered.request)
    measured = synth_fit.measure(topk, first, trace.n_experts)
    affinity = synth_fit.affinity(topk, _clusters(ordered.request), trace.n_experts)
    start = synth_fit.latent_structure(
        topk, ordered.phase, first, (trace.n_experts, n_types), stream(seed, "types")
    )
    size = min(trace.n_tokens, _CALIBRATION_TOKENS)

    def sample(model: RoutingModel, round_: int) -> tuple[Ids, Flags]:
        rng = stream(seed, f"calibrate {round_}")
        places = synth_model.place_tokens(shapes, None, size, rng)
        return synth_model.draw(model, places, trace.top_k, rng), places.first

    target = synth_fit.target_of(measured, affinity)
    model = synth_fit.calibrate(start, target, sample, rounds)
    return FittedTrace(
        popularity=measured.share,
        reuse=measured.reuse,
        affinity=affinity,
        requests=shapes,
        model=model,
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


def _require_rows(trace: RoutingTrace, purpose: str) -> None:
    if not trace.n_tokens:
        raise TraceError(f"{purpose} needs at least one token, the trace has none")


def _clusters(request: npt.NDArray[np.int32]) -> Index:
    """The requests themselves, or 16 stretches when there is only one; rows in request order."""
    if request[0] != request[-1]:
        return request.astype(np.int64)
    return np.arange(len(request), dtype=np.int64) * _SINGLE_REQUEST_PARTS // len(request)
