"""Fitting the generator of `synth.py`: request tilts, token types, then calibration by generating.

Nothing here knows a RoutingTrace: arrays in, arrays out, so that each step can be read and tested
alone. Rows are tokens in the order of their requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from traces import synth_kernels as kernels
from traces.synth_model import RoutingModel

Ids = npt.NDArray[np.int16]
Flags = npt.NDArray[np.bool_]
Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Sampler = Callable[[RoutingModel, int], tuple[Ids, Flags]]

FAR_LAGS = (8, 32, 128)  # tokens apart; only the request's own tilt reaches this far
_PRIOR_TOKENS = 32.0  # a request's shares are shrunk as if it had this many average tokens more
_TYPE_PRIOR_TOKENS = 16.0
_EM_ROUNDS = 10
_TOKENS_PER_TYPE = 200
_MIX_TOKENS = 4.0
_FOLLOW_PRIOR = 2.0
_RANK = 16  # tilt directions
_MAX_TILT_REQUESTS = 2048
_LOG_LIMIT = 8.0  # one factor of a weight stays within e^-8..e^8, so float32 products stay finite
PAIR = 0.4
MOM=0.5
STEP = lambda r: min(0.7, 4.0 / (1 + r))
_LOG_FLOOR = -20.0


@dataclass(frozen=True, slots=True)
class Statistics:
    """Means of a trace that the calibration matches; all float64.

    share   [layers, experts] share of the layer's choices, sums to 1
    reuse   [layers] overlap of consecutive tokens over that of independent draws; nan if no two
    kept    [layers, experts] chosen again by the next token of the request, per chosen + 1/2
    far     [layers] share of the choices that the token FAR_LAGS before had made, too; nan if none
    together  [layers] mean lift of two experts of one set over their shares' product; 0 for top-1
    pairs   [layers - 1, experts, experts] share of (i, j) among the choices of adjacent layers
    """

    share: Doubles
    chosen: Doubles
    reuse: Doubles
    kept: Doubles
    far: Doubles
    together: Doubles
    pairs: Doubles


def measure(topk: Ids, first: Flags, n_experts: int) -> Statistics:
    """Statistics of topk int16[tokens, layers, k]; `first` marks the first token of a request."""
    n_layers = topk.shape[1]
    chosen, kept = np.zeros((2, n_layers, n_experts))
    far, compared = np.zeros((2, n_layers))
    together = np.zeros((n_layers, n_experts, n_experts))
    pairs = np.zeros((n_layers - 1, n_experts, n_experts))
    lags = np.array(FAR_LAGS, dtype=np.int64)
    kernels.count_choices(topk, first, lags, (chosen, kept), (far, compared), (together, pairs))
    total = np.maximum(chosen.sum(axis=1, keepdims=True), 1)
    overall, share = kept.sum(axis=1, keepdims=True) / total, chosen / total
    independent = (share**2).sum(axis=1) * (total[:, 0] / len(topk)) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        far_share = far / compared
        reuse = kept.sum(axis=1) / np.count_nonzero(~first) / independent
    return Statistics(
        share=share,
        chosen=chosen / len(topk),
        reuse=reuse,
        kept=(kept + _PRIOR_TOKENS * overall) / (chosen + _PRIOR_TOKENS),
        far=far_share,
        together=_mean_lift(together, share),
        pairs=pairs / np.maximum(pairs.sum(axis=(1, 2), keepdims=True), 1),
    )


def affinity(topk: Ids, request: Index, n_experts: int) -> Doubles:
    """float64[layers - 1], the statistic of `synth.affinity_ratio`."""
    ratios = np.empty(topk.shape[1] - 1)
    for layer in range(len(ratios)):
        here = np.ascontiguousarray(topk[:, layer])
        there = np.ascontiguousarray(topk[:, layer + 1])
        pairs = np.zeros((n_experts, n_experts))
        kernels.count_pairs(here, there, pairs)
        ratios[layer] = kernels.between_request_squares(here, there, request, pairs)
    return ratios


def lifts(pairs: Doubles) -> tuple[Doubles, Doubles]:
    """Pair shares over independence, and independence itself; both [layers - 1, E, E].

    A cell that independence never fills has lift 1.
    """
    independent = pairs.sum(axis=2)[:, :, None] * pairs.sum(axis=1)[:, None, :]
    lift = np.divide(pairs, independent, out=np.ones_like(pairs), where=independent > 0)
    return lift, independent


def without_sampling_noise(pairs: Doubles, ratio: Doubles) -> Doubles:
    """Pair shares pulled towards independence until their sum of squares is the unbiased `ratio`.

    sum_ij x_i y_j (lift_ij - 1)^2 of counted pairs exceeds the true value by the counting noise;
    scaling every lift - 1 by the root of what is left removes the excess.
    """
    lift, independent = lifts(pairs)
    counted = (independent * (lift - 1) ** 2).sum(axis=(1, 2))
    wanted = np.maximum(np.nan_to_num(ratio, nan=1.0) - 1, 0)
    scale = np.sqrt(np.minimum(wanted / np.maximum(counted, 1e-12), 1))
    return np.asarray(independent * (1 + scale[:, None, None] * (lift - 1)))


def shares_by_group(topk: Ids, group: Index, n_groups: int, n_experts: int) -> Doubles:
    """float64[groups, layers, experts], how often each group's tokens chose each expert."""
    n_layers = topk.shape[1]
    counts = np.zeros((n_layers * n_experts, n_groups))
    kernels.count_types(topk, group.astype(np.int32), counts)
    return np.ascontiguousarray(counts.T).reshape(n_groups, n_layers, n_experts)


def _mean_lift(together: Doubles, share: Doubles) -> Doubles:
    """float64[layers], sum of P_ij^2 / (x_i x_j) of pairs of one set."""
    p = together / np.maximum(together.sum(axis=(1, 2), keepdims=True), 1)
    independent = share[:, :, None] * share[:, None, :]
    ratio = np.divide(p**2, independent, out=np.zeros_like(p), where=independent > 0)
    return np.asarray(ratio.sum(axis=(1, 2)))


def target_of(measured: Statistics, affinity_ratio: Doubles) -> Statistics:
    """What to calibrate on: the measured statistics with the pairs' counting noise taken out."""
    return replace(measured, pairs=without_sampling_noise(measured.pairs, affinity_ratio))


def latent_structure(
    topk: Ids,
    phase: npt.NDArray[np.int8],
    first: Flags,
    sizes: tuple[int, int],
    rng: np.random.Generator,
) -> RoutingModel:
    """The model before calibration: request tilts and token types, no reuse, no affinity yet.

    sizes  (n_experts, types at most)
    """
    n_experts, n_types = sizes
    n_types = int(np.clip(len(topk) // _TOKENS_PER_TYPE, 1, n_types))
    request = np.cumsum(first) - 1
    n_requests, n_layers = int(request[-1]) + 1, topk.shape[1]
    counts = shares_by_group(topk, request, n_requests, n_experts)
    score, basis = request_tilt(counts, topk.shape[2], _RANK)
    share = counts.sum(axis=0) / np.maximum(counts.sum(axis=(0, 2))[:, None], 1)
    expected = share * np.exp(np.tensordot(score, basis, axes=1)).astype(np.float64)
    expected /= np.maximum(expected.sum(axis=2, keepdims=True), 1e-12)
    lift, types = token_types(topk, request, expected, n_types, rng)
    document = 2 * request + phase
    mix = mix_of(types, document, 2 * n_requests, n_types, _MIX_TOKENS)
    follow = follow_of(types, document, mix, first)
    popularity = np.maximum(np.log(np.maximum(share * n_experts, 1e-9)), _LOG_FLOOR)
    return RoutingModel(
        popularity=popularity.astype(np.float32),
        reuse=np.zeros((n_layers, n_experts), dtype=np.float32),
        affinity=np.zeros((n_layers - 1, n_experts, n_experts), dtype=np.float32),
        types=lift.astype(np.float32),
        tilt_basis=basis,
        tilt_score=score,
        mix=mix.reshape(n_requests, 2, n_types),
        follow=follow,
    )


def request_tilt(counts: Doubles, top_k: int, rank: int) -> tuple[Floats, Floats]:
    """How requests differ: log shares of each request over all requests, at low rank.

    counts   float64[requests, layers, experts]
    returns  score float32[requests, rank], basis float32[rank, layers, experts]; requests with
             more tokens weigh more; past 2048 requests the basis is fitted on the longest 2048
    """
    share = counts.sum(axis=0)
    share /= np.maximum(share.sum(axis=1, keepdims=True), 1)
    prior = _PRIOR_TOKENS * top_k * share + 1e-6
    tokens = counts.sum(axis=2)[:, :, None] / top_k
    log_ratio = np.log((counts + prior) / ((tokens + _PRIOR_TOKENS) * top_k * share + 1e-6))
    scaled = (log_ratio * np.sqrt(share)).reshape(len(counts), -1)
    weight = np.sqrt(tokens.mean(axis=(1, 2)))
    longest = np.sort(np.argsort(-weight, kind="stable")[:_MAX_TILT_REQUESTS])
    rows = scaled[longest] * weight[longest, None]
    values, vectors = np.linalg.eigh(rows @ rows.T)
    keep = np.argsort(-values)[: min(rank, len(values))]
    directions = vectors[:, keep].T @ rows
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    basis = directions.reshape(-1, *share.shape) / np.sqrt(np.maximum(share, 1e-6))
    return (scaled @ directions.T).astype(np.float32), basis.astype(np.float32)


def token_types(
    topk: Ids, document: Index, expected: Doubles, n_types: int, rng: np.random.Generator
) -> tuple[Doubles, npt.NDArray[np.int32]]:
    """Types of tokens by hard expectation-maximisation: what a token is, seen through its path.

    document  int64[tokens], request and phase of each token, 0..documents-1
    expected  float64[documents, layers, experts], shares the document's tokens have on average
    returns   log lift float64[types, layers, experts] over the document's shares, and the type of
              each token int32[tokens]
    source    mixture of multinomials, one per type, with the document's shares as the base
    """
    n_documents, n_layers, n_experts = expected.shape
    top_k = topk.shape[2]
    base = expected.mean(axis=0)
    counts = np.zeros((n_layers * n_experts, n_types))
    types = np.full(len(topk), -1, dtype=np.int32)
    seeds = rng.choice(len(topk), n_types, replace=False)
    kernels.count_types(topk[seeds], np.arange(n_types, dtype=np.int32), counts)
    usual = np.repeat(base.reshape(-1, 1), n_types, axis=1) * top_k
    log_prior = np.zeros((n_documents, n_types))
    prior = top_k * base.reshape(-1, 1)
    strength = 2.0
    for _ in range(_EM_ROUNDS):
        log_lift = np.log((counts + strength * prior + 1e-6) / (usual + strength * prior + 1e-6))
        log_lift = np.clip(log_lift, -_LOG_LIMIT, _LOG_LIMIT)
        norm = _log_normaliser(expected, log_lift) * top_k
        fit = np.ascontiguousarray(log_lift, dtype=np.float32)
        changed = kernels.assign_types(
            topk, document, fit, (log_prior - norm).astype(np.float32), types
        )
        counts[:] = 0
        kernels.count_types(topk, types, counts)
        mix = mix_of(types, document, n_documents, n_types, concentration=1.0)
        tokens = np.bincount(document * n_types + types, minlength=n_documents * n_types)
        usual = np.tensordot(expected, tokens.reshape(n_documents, n_types), axes=(0, 0))
        usual = usual.reshape(-1, n_types) * top_k
        log_prior = np.log(mix)
        strength = _TYPE_PRIOR_TOKENS
        if changed < len(topk) / 100:
            break
    log_lift = np.log((counts + strength * prior + 1e-6) / (usual + strength * prior + 1e-6))
    lifted = np.clip(log_lift, -_LOG_LIMIT, _LOG_LIMIT).T.reshape(n_types, n_layers, n_experts)
    return np.ascontiguousarray(lifted), types


def mix_of(
    types: npt.NDArray[np.int32],
    document: Index,
    n_documents: int,
    n_types: int,
    concentration: float,
) -> Doubles:
    """float64[documents, types], shares of types, shrunk by `concentration` average tokens."""
    tokens = np.bincount(document * n_types + types, minlength=n_documents * n_types)
    tokens = tokens.reshape(n_documents, n_types).astype(np.float64)
    overall = (tokens.sum(axis=0) + 1e-3) / (tokens.sum() + 1e-3 * n_types)
    mixed = tokens + concentration * overall
    return np.asarray(mixed / mixed.sum(axis=1, keepdims=True))


def follow_of(
    types: npt.NDArray[np.int32], document: Index, mix: Doubles, first: Flags
) -> Doubles:
    """float64[types, types], how often the second type came right after the first, over the
    times the mix of the request alone would have brought it there; shrunk towards 1.
    """
    n_types = mix.shape[1]
    follows = ~first[1:]
    before, after = types[:-1][follows].astype(np.int64), types[1:][follows]
    seen = np.bincount(before * n_types + after, minlength=n_types**2).astype(np.float64)
    n_documents = len(mix)
    pairs = document[1:][follows] * n_types + before
    source = np.bincount(pairs, minlength=n_documents * n_types).reshape(n_documents, n_types)
    usual = source.T @ mix
    return np.asarray((seen.reshape(n_types, n_types) + _FOLLOW_PRIOR) / (usual + _FOLLOW_PRIOR))


def _log_normaliser(expected: Doubles, log_lift: Doubles) -> Doubles:
    """float64[documents, types], sum over layers of log sum_e expected * lift."""
    n_documents, n_layers, n_experts = expected.shape
    lift = np.exp(log_lift).reshape(n_layers, n_experts, -1)
    norm = np.zeros((n_documents, lift.shape[2]))
    for layer in range(n_layers):
        norm += np.log(np.maximum(expected[:, layer] @ lift[layer], 1e-12))
    return norm


def calibrate(
    model: RoutingModel, target: Statistics, sample: Sampler, rounds: int
) -> RoutingModel:
    """The model after `rounds` of generating, measuring and correcting every log weight.

    sample   (model, round) -> topk int16[tokens, layers, k] and its first-token flags
    method   stochastic approximation of moment matching: each log weight moves by the log of
             wanted over generated, in steps that shrink; the last third of the rounds is averaged
    """
    tail: list[RoutingModel] = []
    velocity = np.zeros((2, *target.share.shape))
    for round_ in range(rounds):
        topk, first = sample(model, round_)
        step = STEP(round_)
        model = _corrected(model, target, measure(topk, first, target.share.shape[1]), step, velocity)
        if round_ >= rounds - max(rounds // 3, 1):
            tail.append(model)
    return _averaged(tail) if tail else model


def _corrected(
    model: RoutingModel, target: Statistics, got: Statistics, step: float, v: Doubles
) -> RoutingModel:
    v[0] = MOM * v[0] + step * _log_odds(target.chosen, got.chosen)
    v[1] = MOM * v[1] + step * _log_odds(target.kept, got.kept)
    popularity = model.popularity + v[0]
    reuse = model.reuse + v[1]
    pair = model.affinity + step * PAIR * pair_correction(target.pairs, got.pairs, got.chosen)
    comparable = np.isfinite(target.far) & np.isfinite(got.far)
    gain = np.where(comparable, _log_ratio(target.far, got.far, 1e-9), 0.0)
    gain = np.exp(np.clip(2.0 * step * gain, -0.5, 0.5))
    spread = np.where(target.together > 1, _log_ratio(target.together, got.together, 1e-9), 0.0)
    spread = np.exp(np.clip(2.0 * step * spread, -0.5, 0.5))
    return replace(
        model,
        types=np.clip(model.types * spread[None, :, None], -_LOG_LIMIT, _LOG_LIMIT).astype(np.float32),
        popularity=np.clip(popularity, _LOG_FLOOR, _LOG_LIMIT).astype(np.float32),
        reuse=np.clip(reuse, -_LOG_LIMIT, _LOG_LIMIT).astype(np.float32),
        affinity=np.clip(pair, -_LOG_LIMIT, _LOG_LIMIT).astype(np.float32),
        tilt_basis=(model.tilt_basis * gain[None, :, None]).astype(np.float32),
    )


def pair_correction(wanted: Doubles, got: Doubles, chosen: Doubles) -> Doubles:
    """What to add to the affinity weights: log odds of (j after i), wanted over generated.

    Both arguments are pair shares [layers - 1, experts, experts]. Rare pairs move little, and what
    every i would add to the same j is left to the popularity.
    """
    odds = _log_odds(_conditional(wanted, chosen), _conditional(got, chosen), 0.02 * chosen[1:, None])
    x = got.sum(axis=2)
    common = (odds * x[:, :, None]).sum(axis=1, keepdims=True)
    return np.asarray(odds - common)


def _conditional(pairs: Doubles, chosen: Doubles) -> Doubles:
    x = pairs.sum(axis=2, keepdims=True)
    k = chosen.sum(axis=1)[1:, None, None]
    return np.divide(k * pairs, x, out=np.zeros_like(pairs) + chosen[1:, None], where=x > 0)


def _log_odds(wanted: Doubles, got: Doubles, floor: Doubles | float = 1e-5) -> Doubles:
    return _log_ratio(wanted, got, floor) - _log_ratio(np.maximum(1 - wanted,0), np.maximum(1 - got,0), 1e-3)


def _log_ratio(wanted: Doubles, got: Doubles, floor: Doubles | float) -> Doubles:
    return np.asarray(np.log((wanted + floor) / (got + floor)))


def _averaged(models: list[RoutingModel]) -> RoutingModel:
    names = ("popularity", "reuse", "affinity", "types", "tilt_basis")
    means = {n: np.mean([getattr(m, n) for m in models], axis=0, dtype=np.float64) for n in names}
    return replace(models[-1], **{n: mean.astype(np.float32) for n, mean in means.items()})
