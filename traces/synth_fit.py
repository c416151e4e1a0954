"""What makes requests and tokens differ: the tilts and types the generator starts from.

Arrays in, arrays out; rows are tokens in the order of their requests. `synth_calibrate.py` then
corrects the sizes of what is found here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces import synth_kernels as kernels
from traces.synth_calibrate import LOG_LIMIT
from traces.synth_kernels import Doubles, Flags, Floats, Ids, Index, Types
from traces.synth_model import AGES_TOKENS, RoutingModel

_RANK = 16  # directions in which requests may differ
_PRIOR_TOKENS = 32.0  # average tokens that the shares of a request are shrunk by
_TYPE_PRIOR_TOKENS = 16.0  # the same for a token type
_SEED_PRIOR_TOKENS = 2.0  # and for the single token that a type starts from
_MIX_PRIOR_TOKENS = 4.0  # and for the mix of types in one phase of a request
_FOLLOW_PRIOR_TOKENS = 2.0
_TOKENS_PER_TYPE = 200
_MOST_ROUNDS = 10
_SETTLED_SHARE = 0.01  # of the tokens still changing their type


@dataclass(frozen=True, slots=True)
class Sizes:
    """n_experts of a layer, and how many token types at most."""

    n_experts: int
    n_types: int


def latent_structure(
    topk: Ids, phase: npt.NDArray[np.int8], first: Flags, sizes: Sizes, rng: np.random.Generator
) -> RoutingModel:
    """The generator before calibration: tilts and types; reuse, recency and affinity are 0."""
    n_tokens, n_layers, top_k = topk.shape
    n_experts = sizes.n_experts
    n_types = int(np.clip(n_tokens // _TOKENS_PER_TYPE, 1, sizes.n_types))
    request = np.cumsum(first) - 1
    counts = _counts_by_request(topk, request, n_experts)
    share = counts.sum(axis=0) / np.maximum(counts.sum(axis=(0, 2))[:, None], 1)
    score, basis = request_tilt(counts, top_k)
    expected = share * np.exp(np.tensordot(score, basis, axes=1)).astype(np.float64)
    expected /= np.maximum(expected.sum(axis=2, keepdims=True), 1e-12)
    lift, types = token_types(topk, request, expected, n_types, rng)
    document, n_documents = 2 * request + phase, 2 * len(counts)
    mix = _mix(types, document, (n_documents, n_types), _MIX_PRIOR_TOKENS)
    return RoutingModel(
        popularity=np.log(np.maximum(share * n_experts, 1e-8)).astype(np.float32),
        reuse=np.zeros((n_layers, n_experts), dtype=np.float32),
        recency=np.zeros((n_layers, len(AGES_TOKENS) + 1), dtype=np.float32),
        affinity=np.zeros((n_layers - 1, n_experts, n_experts), dtype=np.float32),
        types=lift.astype(np.float32),
        tilt_basis=basis,
        tilt_score=score,
        mix=mix.reshape(len(counts), 2, n_types),
        follow=_follow(types, document, mix, first),
    )


def request_tilt(counts: Doubles, top_k: int) -> tuple[Floats, Floats]:
    """How requests differ: log shares of each request over those of all, at low rank.

    counts   float64[requests, layers, experts]
    returns  score float32[requests, rank], basis float32[rank, layers, experts]; their product is
             the log ratio, with requests weighing by their tokens and experts by their share
    """
    total = counts.sum(axis=0)
    share = total / np.maximum(total.sum(axis=1, keepdims=True), 1)
    tokens = counts.sum(axis=2)[:, :, None] / top_k
    prior = _PRIOR_TOKENS * top_k * share + 1e-6
    usual = tokens * top_k * share + prior
    scaled = (np.log((counts + prior) / usual) * np.sqrt(share)).reshape(len(counts), -1)
    rows = scaled * np.sqrt(tokens.mean(axis=(1, 2)))[:, None]
    directions = _principal_directions(rows)
    basis = directions.reshape(-1, *share.shape) / np.sqrt(np.maximum(share, 1e-6))
    return (scaled @ directions.T).astype(np.float32), basis.astype(np.float32)


def _principal_directions(rows: Doubles) -> Doubles:
    """float64[rank, columns], unit vectors along which the rows differ most from 0.

    method  eigenvectors of the smaller of the two Gram matrices
    """
    wide = rows.shape[0] <= rows.shape[1]
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = vectors[:, np.argsort(-values, kind="stable")[:_RANK]].T
    directions = kept @ rows if wide else kept
    length = np.linalg.norm(directions, axis=1, keepdims=True)
    return np.asarray(directions / np.maximum(length, 1e-12))


def token_types(
    topk: Ids, request: Index, expected: Doubles, n_types: int, rng: np.random.Generator
) -> tuple[Doubles, Types]:
    """Groups of tokens that take similar paths through all layers.

    expected  float64[requests, layers, experts], shares of the choices by the request alone
    returns   log lift float64[types, layers, experts] of a type over what its tokens' requests
              would choose, and the type of each token int32[tokens]
    source    hard expectation-maximisation of a mixture of multinomials whose base is `expected`
    """
    n_requests, n_layers, n_experts = expected.shape
    top_k = topk.shape[2]
    base = top_k * expected.mean(axis=0).reshape(-1, 1)
    counts = np.zeros((n_layers * n_experts, n_types))
    seeds = np.sort(rng.choice(len(topk), n_types, replace=False))
    kernels.count_by_group(topk[seeds], np.arange(n_types, dtype=np.int32), counts)
    log_lift = _log_lift(counts, np.repeat(base, n_types, axis=1), base * _SEED_PRIOR_TOKENS)
    types = np.full(len(topk), -1, dtype=np.int32)
    log_mix = np.zeros((n_requests, n_types))
    for _ in range(_MOST_ROUNDS):
        log_prior = (log_mix - top_k * _log_normaliser(expected, log_lift)).astype(np.float32)
        changed = kernels.assign_types(topk, request, log_lift, log_prior, types)
        counts[:] = 0
        kernels.count_by_group(topk, types, counts)
        sizes = _sizes(types, request, (n_requests, n_types))
        usual = top_k * np.tensordot(expected, sizes, axes=(0, 0)).reshape(-1, n_types)
        log_lift = _log_lift(counts, usual, base * _TYPE_PRIOR_TOKENS)
        log_mix = np.log(_mix(types, request, (n_requests, n_types), 1.0))
        if changed < _SETTLED_SHARE * len(topk):
            break
    by_type = np.ascontiguousarray(log_lift.T, dtype=np.float64)
    return by_type.reshape(n_types, n_layers, n_experts), types


def _log_lift(counts: Doubles, usual: Doubles, prior: Doubles) -> Floats:
    ratio = (counts + prior + 1e-6) / (usual + prior + 1e-6)
    return np.clip(np.log(ratio), -LOG_LIMIT, LOG_LIMIT).astype(np.float32)


def _log_normaliser(expected: Doubles, log_lift: Floats) -> Doubles:
    """float64[requests, types], sum over layers of log sum_e expected * lift."""
    n_requests, n_layers, n_experts = expected.shape
    lift = np.exp(log_lift.astype(np.float64)).reshape(n_layers, n_experts, -1)
    norm = np.zeros((n_requests, lift.shape[2]))
    for layer in range(n_layers):
        norm += np.log(np.maximum(expected[:, layer] @ lift[layer], 1e-12))
    return norm


def _counts_by_request(topk: Ids, request: Index, n_experts: int) -> Doubles:
    """float64[requests, layers, experts], how often each request chose each expert."""
    n_requests, n_layers = int(request[-1]) + 1, topk.shape[1]
    counts = np.zeros((n_layers * n_experts, n_requests))
    kernels.count_by_group(topk, request.astype(np.int32), counts)
    return np.ascontiguousarray(counts.T).reshape(n_requests, n_layers, n_experts)


def _sizes(types: Types, group: Index, shape: tuple[int, int]) -> Doubles:
    """float64[groups, types], tokens of each type in each group."""
    cells = np.bincount(group * shape[1] + types, minlength=shape[0] * shape[1])
    return cells.reshape(shape).astype(np.float64)


def _mix(types: Types, group: Index, shape: tuple[int, int], prior_tokens: float) -> Doubles:
    """float64[groups, types], shares of the types, shrunk towards those of all tokens."""
    sizes = _sizes(types, group, shape)
    overall = (sizes.sum(axis=0) + 1e-3) / (sizes.sum() + 1e-3 * shape[1])
    mixed = sizes + prior_tokens * overall
    return np.asarray(mixed / mixed.sum(axis=1, keepdims=True))


def _follow(types: Types, document: Index, mix: Doubles, first: Flags) -> Doubles:
    """float64[types, types], how often the second type came right after the first, over how often
    the mix of the request would have brought it there.
    """
    n_documents, n_types = mix.shape
    follows = ~first[1:]
    before = types[:-1][follows].astype(np.int64)
    seen = _sizes(types[1:][follows], before, (n_types, n_types))
    left = _sizes(types[:-1][follows], document[1:][follows], (n_documents, n_types))
    usual = left.T @ mix
    return np.asarray((seen + _FOLLOW_PRIOR_TOKENS) / (usual + _FOLLOW_PRIOR_TOKENS))
