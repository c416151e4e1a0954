"""The model behind generated traces: request shapes, log weights, and drawing tokens from both.

`synth.py` says in words what the model is, `synth_fit.py` finds its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces import synth_kernels as kernels
from traces.errors import TraceError
from traces.routing import RoutingTrace
from traces.synth_kernels import Doubles, Flags, Floats, Ids, Index

AGES_TOKENS = (1, 2, 4, 8, 16, 32, 64)  # upper ends of the buckets of age; then "older or never"


@dataclass(frozen=True, slots=True)
class RequestShapes:
    """Lengths and phases of the source's requests; a generated request copies one of them.

    run_start       int64[requests + 1], runs of request r are run_start[r]:run_start[r + 1]
    run_phase       int8[runs], phase of each stretch of tokens of one phase
    run_length      int64[runs], its tokens
    first_position  int64[requests], position of the request's first token
    """

    run_start: Index
    run_phase: npt.NDArray[np.int8]
    run_length: Index
    first_position: Index

    @property
    def n_requests(self) -> int:
        """Requests of the source."""
        return len(self.first_position)

    @property
    def lengths(self) -> Index:
        """int64[requests], tokens of each."""
        return np.asarray(np.add.reduceat(self.run_length, self.run_start[:-1]), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Places:
    """One row a token to be generated, request after request.

    template  int64[tokens], the source request whose shape and tilt this token's request has
    request   int32[tokens], 0, 1, 2, ...
    position  int32[tokens]
    phase     int8[tokens]
    first     bool[tokens], first token of its request
    """

    template: Index
    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: npt.NDArray[np.int8]
    first: Flags


@dataclass(frozen=True, slots=True)
class RoutingModel:
    """Log weights of the generator (float32) and how its token types follow each other (float64).

    popularity  [layers, experts]
    reuse       [layers, experts], added when the request's token before chose the expert
    recency     [layers, buckets of AGES_TOKENS], added by tokens since the request chose it last
    affinity    [layers - 1, experts, experts], added for each expert i of the layer before
    types       [types, layers, experts], of the token's type
    tilt_basis  [rank, layers, experts] and tilt_score [requests, rank]: of the request
    mix         [requests, 2, types], share of each type in the request's prefill and decode
    follow      [types, types], how much likelier the second type is right after the first
    """

    popularity: Floats
    reuse: Floats
    recency: Floats
    affinity: Floats
    types: Floats
    tilt_basis: Floats
    tilt_score: Floats
    mix: Doubles
    follow: Doubles


def age_buckets() -> Index:
    """int64[66], the bucket of AGES_TOKENS of each age in tokens, up to "older or never"."""
    return np.searchsorted(AGES_TOKENS, np.arange(AGES_TOKENS[-1] + 2)).astype(np.int64)


def starts(request: npt.NDArray[np.int32]) -> Flags:
    """bool[tokens], whether a row has another request than the row before."""
    first = np.ones(len(request), dtype=np.bool_)
    first[1:] = request[1:] != request[:-1]
    return first


def request_shapes(ordered: RoutingTrace) -> RequestShapes:
    """Lengths and phases of a trace whose rows are in request order."""
    first = starts(ordered.request)
    new_run = first.copy()
    new_run[1:] |= np.diff(ordered.phase) != 0
    run_at, request_at = np.flatnonzero(new_run), np.flatnonzero(first)
    return RequestShapes(
        run_start=np.append(np.searchsorted(run_at, request_at), len(run_at)),
        run_phase=ordered.phase[run_at],
        run_length=np.diff(np.append(run_at, len(first))),
        first_position=ordered.position[request_at].astype(np.int64),
    )


def place_tokens(
    shapes: RequestShapes, n_requests: int | None, n_tokens: int | None, rng: np.random.Generator
) -> Places:
    """Requests in a shuffled cycle of the source's: n_requests whole ones, or n_tokens tokens.

    raises  TraceError unless exactly one of both is given and positive
    """
    size = n_requests if n_tokens is None else n_tokens
    if (n_requests is None) == (n_tokens is None) or size is None or size < 1:
        raise TraceError(
            f"n_requests={n_requests}, n_tokens={n_tokens}: give exactly one, at least 1"
        )
    per_cycle = shapes.n_requests if n_tokens is None else int(shapes.lengths.sum())
    cycles = -(-size // per_cycle)
    order = np.concatenate([rng.permutation(shapes.n_requests) for _ in range(cycles)])
    return _places_of(shapes, order[:n_requests], n_tokens)


def draw(model: RoutingModel, places: Places, top_k: int, rng: np.random.Generator) -> Ids:
    """int16[tokens, layers, top_k] distinct expert ids; likelier ones tend to come first."""
    n_requests, _, n_types = model.mix.shape
    mix = model.mix.reshape(2 * n_requests, n_types)
    mix_row = 2 * places.template + places.phase
    types = kernels.draw_types(places.first, mix_row, mix, model.follow, rng)
    weights = (
        np.exp(model.types + model.popularity),
        model.tilt_score,
        model.tilt_basis,
        np.exp(model.reuse),
        age_buckets(),
        np.exp(model.recency),
        np.exp(model.affinity),
    )
    topk = np.empty((len(places.first), model.popularity.shape[0], top_k), dtype=np.int16)
    kernels.draw_experts(places.first, places.template, types, weights, topk, rng)
    return topk


def _places_of(shapes: RequestShapes, order: Index, n_tokens: int | None) -> Places:
    """Tokens of the requests in the given order, cut after n_tokens."""
    lengths = shapes.lengths[order]
    run = _ranges(shapes.run_start[order], np.diff(shapes.run_start)[order])
    first_row = np.repeat(np.cumsum(lengths) - lengths, lengths)
    within = np.arange(int(lengths.sum())) - first_row
    request = np.repeat(np.arange(len(order), dtype=np.int32), lengths)
    position = np.repeat(shapes.first_position[order], lengths) + within
    return Places(
        template=np.repeat(order, lengths)[:n_tokens],
        request=request[:n_tokens],
        position=position.astype(np.int32)[:n_tokens],
        phase=np.repeat(shapes.run_phase[run], shapes.run_length[run])[:n_tokens],
        first=(within == 0)[:n_tokens],
    )


def _ranges(start: Index, size: Index) -> Index:
    """start[0], start[0] + 1, ... (size[0] of them), then from start[1], and so on."""
    offset = np.repeat(start - (np.cumsum(size) - size), size)
    return np.asarray(offset + np.arange(int(size.sum())))
