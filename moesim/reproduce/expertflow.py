"""ExpertFlow (arXiv 2410.17954): a predictor of whole routing paths, a cache that follows it, and
batches of tokens that take similar paths.

Predictor  an oracle that errs at a given rate; its bytes take a slot, its seconds come before
           every pass on the device
PLEC       `moesim/policies/plec.py`: slots of all layers follow the predicted paths
Scheduler  `moesim/policies/batching.py`: two adjacent batches are dealt anew by predicted paths

Baselines are SE-MoE (a ring that holds all experts of two consecutive layers), an LRU of every
layer's own slots that loads on demand (Cache-MoE), and one-block-ahead routing (pre-gated).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box, load_box
from hwmodels.device import Figure
from hwmodels.devices import load_device
from hwmodels.host_costs import host_bytes_per_s
from moesim.lower.offload import Extras
from moesim.offload.built_in import decide_built_in
from moesim.offload.decide import decide
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices, Weights, prices
from moesim.offload.simulate import OffloadResult, run, simulate
from moesim.policies.batching import active_experts, paths_of, regroup
from moesim.policies.plec import plec
from moesim.policies.prefetch import Predictions, oracle, previous_token
from moesim.reproduce.baseline import NAME as HONEST
from moesim.reproduce.baseline import honest_baseline
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.sources import Sources
from traces.counting import expert_bytes, total_params
from traces.layer_steps import ForwardPasses, LayerSteps, forward_passes, layer_steps
from traces.model import ModelSpec
from traces.models import load_model
from traces.routing import RoutingTrace
from traces.synth import stream, zipf_trace

NAME = "expertflow"
PAPER = "ExpertFlow, arXiv 2410.17954"

ACCURACY = 0.9
SLOTS, BATCH = 4, 32  # of a layer; tokens of a pass
GRID = tuple((slots, batch) for slots in (4, 16) for batch in (4, 8, 16, 32))
PASSES, REQUEST_TOKENS = 40, 256
FIGURES = MappingProxyType(
    {
        "exponent": Figure(0.7, "derived", "Zipf law and reuse nearest, on a grid, to published"),
        "reuse": Figure(
            0.05, "derived", "LRU, LFU and Belady hits of Switch-base-128 (2505.16056)"
        ),
        "skewed": Figure(1.1, "derived", "shares of the 135 captured tokens of switch-base-32"),
        "link": Figure(25e9, "assumed", "PCIe 4.0 x16, pinned; handbook"),
        "predictor": Figure(7.21e6, "datasheet", "bytes of the predictor, the paper"),
        "seconds": Figure(2e-3, "assumed", "one pass of a small encoder-decoder, not hidden"),
        "types": Figure(64, "assumed", "kinds of tokens in clustered traffic, Zipf exponent 1"),
        "follow": Figure(0.8, "assumed", "chance that a token takes its kind's expert"),
    }
)
_TRACE = (
    "synthetic routing, Zipf 0.7 with reuse 0.05 (nearest to published cache hits of"
    " Switch-base-128); PCIe 25 GB/s; predictor charged 1 slot and 2 ms a pass (assumed)"
)
_ORDER = "execution order, hits are requests of (layer, expert) in the fast tier or on their way"


@dataclass(frozen=True, slots=True)
class Case:
    """One model and batch size: its layer-steps and their prices."""

    work: LayerSteps
    prices: Prices

    @property
    def n_layers(self) -> int:
        """MoE layers of the model."""
        return self.work.n_layers


def machine() -> Box:
    """An A40 beside one Xeon Gold 6338."""
    base, host = load_box("a40"), load_device("xeon-gold-6338")
    rate = host_bytes_per_s(host, base.efficiency)
    return replace(base, host=host, copy_bytes_per_s=FIGURES["link"].value, dram_bytes_per_s=rate)


def case(model: ModelSpec, batch: int, seed: int, exponent: float | None = None) -> Case:
    """Passes of `batch` tokens by the law of the Switch trace."""
    law = FIGURES["exponent"].value if exponent is None else exponent
    trace = zipf_trace(
        batch * REQUEST_TOKENS, model.n_moe_layers, model.n_experts, model.top_k, law,
        FIGURES["reuse"].value, seed,
    )  # fmt: skip
    passes = forward_passes(trace, batch, "decode", seed=seed)
    return _priced(model, layer_steps(trace, in_batches(passes.rows[: PASSES * batch], batch)))


def in_batches(rows: npt.NDArray[np.int64], batch: int) -> ForwardPasses:
    """Passes of so many rows each, with a context of half a request."""
    n = len(rows) // batch
    return ForwardPasses(
        rows=np.ascontiguousarray(rows[: n * batch]),
        start=np.arange(n + 1, dtype=np.int64) * batch,
        phase=np.ones(n, np.int8),
        context=np.full(n, REQUEST_TOKENS / 2),
        requests=np.full(n, batch, np.int32),
    )


def _priced(model: ModelSpec, work: LayerSteps) -> Case:
    return Case(work, prices(model, machine(), work, Weights(16)))


def expertflow(one: Case, slots: int, predicted: Predictions) -> OffloadResult:
    """PLEC with `slots` a layer, led by a predictor that is paid for."""
    taken = int(np.ceil(FIGURES["predictor"].value / one.prices.expert_bytes))
    policy = OffloadPolicy(slots=np.array([slots * one.n_layers - taken]))
    paid = replace(one.prices, first_s=one.prices.first_s + FIGURES["seconds"].value)
    decided = decide(one.work, policy, plec(one.work, policy, predicted))
    return run(one.work, decided, paid)


def per_layer_lru(one: Case, slots: int) -> OffloadResult:
    """Cache-MoE: every layer's own slots, misses loaded at the gate."""
    policy = OffloadPolicy(cache="lru", slots=np.full(one.n_layers, slots))
    return simulate(one.work, one.prices, policy)


def se_moe(one: Case) -> OffloadResult:
    """All experts of the next layer come while this one computes; room for two layers."""
    work = one.work
    everything = Predictions(
        np.arange(work.n_steps + 1, dtype=np.int64) * work.n_experts,
        np.tile(np.arange(work.n_experts, dtype=np.int32), work.n_steps),
    )
    policy = OffloadPolicy(cache="fifo", slots=np.array([2 * work.n_experts]))
    decided = decide_built_in(work, policy, None, everything)
    return run(work, decided, one.prices, Extras(in_order=True))


def pre_gated(one: Case, slots: int) -> OffloadResult:
    """The experts of the next layer are known exactly, in as many slots as PLEC has."""
    policy = OffloadPolicy(cache="fifo", slots=np.array([slots * one.n_layers]))
    return simulate(one.work, one.prices, policy, oracle(one.work, 1.0))


def claims(sources: Sources) -> list[Claim]:
    """Memory from shapes; cache and scheduler on synthetic routing."""
    model = load_model("switch-base-128")
    one = case(model, BATCH, sources.seed)
    ours = expertflow(one, SLOTS, oracle(one.work, ACCURACY, seed=sources.seed))
    return [
        _memory(model),
        *_speed(one, ours),
        *_hits(model, sources.seed),
        *_scheduler(model, sources.seed),
        *_published_ratios(sources.seed),
        *_what_if(model, one, ours, sources.seed),
        *_figures(one, ours),
    ]


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    band: tuple[float, float] | None = None,
    note: str = _TRACE,
    tier: Tier = "C",
) -> Claim:
    low, high = band or (None, None)
    return Claim(NAME, claim, published, float(simulated), low, high, tier, _ORDER, note)


def _memory(model: ModelSpec) -> Claim:
    experts = model.n_moe_layers * model.n_experts * expert_bytes(model)
    total = 2 * total_params(model)
    slots = SLOTS * model.n_moe_layers * expert_bytes(model)
    ratio = (total - experts + slots + FIGURES["predictor"].value) / total
    note = "16-bit shapes: non-expert weights, 4 slots a layer, predictor; published 1.03/15.26 GB"
    return _row("memory, share of the whole model", 0.067, ratio, (0.05, 0.09), note, "A")


def _speed(one: Case, ours: OffloadResult) -> Iterator[Claim]:
    needed = len(one.work.expert) / one.work.n_steps
    note = (
        f"{_TRACE}; SE-MoE loads {one.work.n_experts} experts a layer, a batch needs {needed:.1f}"
        f" distinct ones with this routing: a system that keeps none gains"
        f" {one.work.n_experts / needed:.1f} at most"
    )
    over = se_moe(one).seconds / ours.seconds
    yield _row("speed over SE-MoE, 4 slots, batch 32", 9.99, over, (6.0, 14.0), note)
    lru = per_layer_lru(one, SLOTS)
    busy = ours.busy_s[1] / ours.seconds
    note = (
        f"{_TRACE}; the link is busy {busy:.0%} of the time, so loads decide: PLEC hands the slots"
        " of a finished layer on and keeps nothing for the next pass, LRU keeps some, and wrong"
        " predictions are loads too; a gain needs computation for loads to hide behind, as of a"
        " slow framework, which rooflines do not have"
    )
    over = lru.seconds / ours.seconds
    yield _row("speed over per-layer LRU, 4 slots, batch 32", None, over, (1.3, 3.0), note)
    more = 100 * (ours.hit_rate - lru.hit_rate)
    yield _row("hits over per-layer LRU, points, 4 slots, batch 32", None, more, (15.0, 100.0))


def _hits(model: ModelSpec, seed: int) -> Iterator[Claim]:
    """Hit rates over cache and batch sizes."""
    more = []
    for slots, batch in GRID:
        one = case(model, batch, seed)
        ours = expertflow(one, slots, oracle(one.work, ACCURACY, seed=seed))
        more.append(100 * (ours.hit_rate - per_layer_lru(one, slots).hit_rate))
        if (slots, batch) == (16, 4):
            note = f"{_TRACE}; band: 3 points, the handbook's tolerance on hit rates"
            hit = 100 * ours.hit_rate
            yield _row("hit rate, %, 16 slots, batch 4", 91.9, hit, (88.9, 94.9), note)
    note = f"{_TRACE}; 4 and 16 slots, batches of 4 to 32"
    yield _row("hits over per-layer LRU, points, mean", 27.65, float(np.mean(more)), None, note)
    yield _row("hits over per-layer LRU, points, highest", 61.15, max(more), None, note)


def clustered_trace(model: ModelSpec, n_tokens: int, seed: int) -> RoutingTrace:
    """Tokens of some kinds; those of one kind mostly take one path, the rest follow the law."""
    plain = zipf_trace(
        n_tokens, model.n_moe_layers, model.n_experts, 1, FIGURES["exponent"].value, 0.0, seed
    )
    rng = stream(seed, "expertflow kinds")
    n_types = int(FIGURES["types"].value)
    share = 1 / np.arange(1, n_types + 1)
    kind = rng.choice(n_types, n_tokens, p=share / share.sum())
    own = rng.integers(0, model.n_experts, (n_types, model.n_moe_layers)).astype(np.int16)
    follows = rng.random((n_tokens, model.n_moe_layers)) < FIGURES["follow"].value
    topk = np.where(follows, own[kind], plain.topk[:, :, 0])[:, :, None]
    return replace(plain, topk=topk.astype(np.int16))


def dealt_anew(
    trace: RoutingTrace, pairs: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.int64]:
    """int64[pairs, 2 * batch]: rows of every pair of batches, regrouped by predicted paths."""
    rng = stream(seed, "expertflow paths")
    wrong = rng.random(trace.topk.shape) >= ACCURACY
    guess = rng.integers(0, trace.n_experts, trace.topk.shape)
    paths = paths_of(np.where(wrong, guess, trace.topk).astype(np.int16), trace.n_experts)
    return np.stack([rows[regroup(paths[rows]).ravel()] for rows in pairs])


def _scheduler(model: ModelSpec, seed: int) -> Iterator[Claim]:
    """Two batches of different requests that run one after the other, dealt anew or as they are."""
    trace = clustered_trace(model, 2 * BATCH * REQUEST_TOKENS, seed)
    passes = forward_passes(trace, 2 * BATCH, "decode", seed=seed)
    given = passes.rows.reshape(-1, 2 * BATCH)[: PASSES // 2]
    seconds, active = [], []
    for rows in (given, dealt_anew(trace, given, seed)):
        batches = rows.reshape(-1, BATCH)
        one = _priced(model, layer_steps(trace, in_batches(batches.ravel(), BATCH)))
        ours = expertflow(one, SLOTS, oracle(one.work, ACCURACY, seed=seed))
        seconds.append(ours.seconds)
        active.append(active_experts(paths_of(trace.topk, trace.n_experts), batches).sum())
    note = (
        "clustered routing: 64 kinds of tokens by Zipf's law, 80 % of choices by kind (assumed);"
        " paths predicted right to 90 %; its 10 ms on the CPU hidden, as in the paper"
    )
    fewer = 100 * (1 - active[1] / active[0])
    yield _row("token scheduler: fewer active experts, %", None, fewer, (10.0, 100.0), note)
    over = seconds[0] / seconds[1]
    yield _row("token scheduler: speed over batches as given", 1.17, over, (1.05, 1.3), note)


def _published_ratios(seed: int) -> Iterator[Claim]:
    note = f"{_TRACE}; baseline not named in the source, taken for SE-MoE; without token scheduler"
    for n_experts, published in ((32, 2.01), (64, 3.19), (128, 5.86)):
        one = case(load_model(f"switch-base-{n_experts}"), BATCH, seed)
        ours = expertflow(one, 16, oracle(one.work, ACCURACY, seed=seed))
        over = se_moe(one).seconds / ours.seconds
        claim = f"Switch-{n_experts}: speed over SE-MoE, 16 slots, batch 32"
        yield _row(claim, published, over, None, note)


def _what_if(model: ModelSpec, one: Case, ours: OffloadResult, seed: int) -> Iterator[Claim]:
    """The same against stronger baselines, with a predictor that exists, with other routing."""
    over = pre_gated(one, SLOTS).seconds / ours.seconds
    note = f"{_TRACE}; pre-gating changes the model, its next layer's experts are known exactly"
    yield _row("speed over pre-gated, 4 slots, batch 32", None, over, None, note)
    for cpu, how in ((True, ""), (False, ", misses loaded")):
        honest = honest_baseline(one.work, one.prices, SLOTS, cpu=cpu, seed=seed)
        claim = f"speed over the honest baseline{how}, 4 slots, batch 32"
        yield _row(claim, None, honest.seconds / ours.seconds, None, f"{HONEST}; {_TRACE}")
    fed = expertflow(one, SLOTS, previous_token(one.work))
    over = per_layer_lru(one, SLOTS).seconds / fed.seconds
    note = f"{_TRACE}; paths of tokens not sampled yet: those of the tokens before are taken"
    yield _row("speed over per-layer LRU, paths of the tokens before", None, over, None, note)
    skewed = case(model, BATCH, seed, FIGURES["skewed"].value)
    ours = expertflow(skewed, SLOTS, oracle(skewed.work, ACCURACY, seed=seed))
    note = f"{_TRACE}; but Zipf 1.1, as skewed as 135 captured tokens of switch-base-32"
    for name, other in (
        ("SE-MoE", se_moe(skewed)),
        ("per-layer LRU", per_layer_lru(skewed, SLOTS)),
    ):
        over = other.seconds / ours.seconds
        yield _row(f"speed over {name}, skewed routing", None, over, None, note)


def _figures(one: Case, ours: OffloadResult) -> Iterator[Claim]:
    """What only makes sense together."""
    for name, found in (("PLEC", ours), ("per-layer LRU", per_layer_lru(one, SLOTS))):
        yield _row(f"{name}: hit rate, %", None, 100 * found.hit_rate)
        yield _row(f"{name}: MB a token", None, found.bytes_per_token / 1e6)
        yield _row(f"{name}: stall, ms a token", None, 1e3 * found.stall_s_per_token)
        yield _row(f"{name}: tokens/s", None, found.tokens_per_s)
