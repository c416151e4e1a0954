"""Local routing consistency: SRP, SCH and cache hit rates of captured traces against the paper's.

Both lookup conventions are given: the paper's (a token's experts looked up together against the
cache before the token, free cold fill, an empty cache for every sample) and execution order (one
request after the other, one cache, a first use is a miss).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from traces.consistency import sch, srp, srp_floor
from traces.replay import EXECUTION_ORDER, TOKEN_BATCH, hit_rate
from traces.routing import DECODE, RoutingTrace
from traces.synth import zipf_trace

NAME = "local-routing-consistency"
PAPER = "arXiv 2505.16056"

NAMES = {TOKEN_BATCH: "paper (token batch, free fill)", EXECUTION_ORDER: "execution order"}
POLICIES = {"LRU": "lru", "LFU": "perfect_lfu", "Belady": "belady"}
SRP_BAND, HIT_BAND = 0.02, 0.03
KNEE_RHOS = (1.0, 2.0, 3.0)
KNEE_PUBLISHED = (0.8097, 0.9055, 0.9623)  # SCH over Belady of the paper's own small model
LEAST_TOKENS = 1000  # of a trace that stands for a model


@dataclass(frozen=True, slots=True)
class Published:
    """One model's row: SRP by window, SCH at 16 tokens by rho, hit rates at rho 2 by policy.

    source  curves of plot/msrp.pdf, msch.pdf and mchr.pdf of ljcleo/moe-lrc, digitised; SRP to
            0.2 points, the others to 0.005
    """

    srp: Mapping[int, float]
    sch: Mapping[float, float]
    hits: Mapping[str, float]


_MIXTRAL = Published(
    srp={4: 0.6255, 16: 0.4936, 64: 0.4451, 256: 0.4247},
    sch={0.5: 0.256, 1.0: 0.452, 2.0: 0.742, 3.0: 0.921},
    hits={"LRU": 0.614, "LFU": 0.595, "Belady": 0.820},
)
_DEEPSEEK_V2_LITE = Published(
    srp={4: 0.5321, 16: 0.3792, 64: 0.3067, 256: 0.2692},
    sch={0.5: 0.227, 1.0: 0.378, 2.0: 0.580, 3.0: 0.716},
    hits={"LRU": 0.420, "LFU": 0.375, "Belady": 0.648},
)
_QWEN15 = Published(
    srp={4: 0.4723, 16: 0.3071, 64: 0.2250, 256: 0.1871},
    sch={0.5: 0.170, 1.0: 0.288, 2.0: 0.463, 3.0: 0.575},
    hits={"LRU": 0.276, "LFU": 0.242, "Belady": 0.527},
)


@dataclass(frozen=True, slots=True)
class Capture:
    """A trace of a model of the table, and how its text differs from the paper's 11 corpora."""

    stem: str
    model: str
    published: Published
    caveat: str


CAPTURES = (
    Capture(
        "mixtral-8x7b-mtbench",
        "Mixtral-8x7B",
        _MIXTRAL,
        "MT-Bench chat, prompts and sampled answers, 128 to 1,492 tokens a turn",
    ),
    Capture(
        "deepseek-v2-lite-law",
        "DeepSeek-V2-Lite",
        _DEEPSEEK_V2_LITE,
        "law text only, 33 samples of 125 to 580 tokens",
    ),
    Capture(
        "deepseek-v2-lite-intent",
        "DeepSeek-V2-Lite",
        _DEEPSEEK_V2_LITE,
        "intent classification only, 127 samples of 47 to 88 tokens that share a template",
    ),
    Capture(
        "qwen1.5-moe-a2.7b-5-layers",
        "Qwen1.5-MoE",
        _QWEN15,
        "5 of 24 layers, the first among them; answers of the chat variant; 25 sequences of 82"
        " tokens, told apart by their place in the batch while all 25 run",
    ),
)
UNLISTED = ("gpt-oss-20b-decode", "flame-moe-290m")  # captured, but not models of the table

FLOORS = {  # (k, E): at 16 tokens
    (1, 4): 0.452,
    (1, 5): 0.400,
    (1, 8): 0.321,
    (6, 64): 0.281,
    (1, 15): 0.241,
    (1, 16): 0.237,
    (1, 64): 0.161,
    (1, 128): 0.124,
}
GOLDEN_SRP = {4: 0.759993, 16: 0.553898, 64: 0.444154}
GOLDEN_HITS = {  # (policy, rho): by convention
    ("SCH(16)", 1.0): (0.585693, 0.510498),
    ("LRU", 1.0): (0.673096, 0.663330),
    ("LFU", 1.0): (0.343262, 0.249512),
    ("Belady", 1.0): (0.723877, 0.721924),
    ("LRU", 0.5): (0.340088, 0.0),
}


def claims(sources: Sources) -> list[Claim]:
    """Floors and golden vectors; the captured traces against their rows; trends."""
    captured = dict(_captured(sources))
    found = [*_floors(), *_golden()]
    for capture in CAPTURES:
        if capture.stem in captured:
            found += _against_row(capture, captured[capture.stem])
    return [*found, *_ranks(captured), *_trends(captured, sources)]


def _captured(sources: Sources) -> Iterator[tuple[str, RoutingTrace]]:
    for stem in (*(capture.stem for capture in CAPTURES), *UNLISTED):
        trace = sources.captured(stem)
        if trace is not None and trace.forward is not None and np.ptp(trace.request) == 0:
            trace = by_place_in_batch(trace)
        if trace is not None and trace.n_tokens >= LEAST_TOKENS:
            yield stem, trace


def by_place_in_batch(trace: RoutingTrace) -> RoutingTrace:
    """Decode rows of a continuous batch as sequences: equal places of passes of the first size.

    A trace of such a batch without sequence ids has its sequences interleaved. They keep their
    places until one of them ends; later passes are left out.
    """
    if trace.forward is None:
        return trace
    order = np.argsort(trace.forward, kind="stable")
    decode = order[trace.phase[order] == DECODE]
    forward = trace.forward[decode]
    passes, first, size = np.unique(forward, return_index=True, return_counts=True)
    whole = np.cumprod(size == size[:1]).astype(bool)  # up to the first pass of another size
    kept = trace.rows(decode[np.isin(forward, passes[whole])])
    number = np.repeat(np.arange(int(whole.sum())), size[whole])
    place = np.arange(kept.n_tokens) - first[whole][number]
    return replace(kept, request=place.astype(np.int32), position=number.astype(np.int32))


def golden_trace() -> RoutingTrace:
    """512 tokens, 4 layers, top 2 of 8: an expert stays with chance 0.6, the rest is drawn.

    Numbers come from s <- (1103515245 s + 12345) mod 2**31 with seed 1, u = s / 2**31.
    """
    state = 1
    before: list[list[int]] = [[] for _ in range(4)]
    topk = np.empty((512, 4, 2), dtype=np.int16)

    def draw() -> float:
        nonlocal state
        state = (1103515245 * state + 12345) % 2**31
        return state / 2**31

    for token in range(512):
        for layer in range(4):
            chosen = [expert for expert in before[layer] if draw() < 0.6]
            while len(chosen) < 2:
                expert = int(8 * draw())
                if expert not in chosen:
                    chosen.append(expert)
            before[layer] = chosen
            topk[token, layer] = chosen
    nothing, places = np.zeros(512, np.int32), np.arange(512, dtype=np.int32)
    return RoutingTrace(topk, 8, (0, 1, 2, 3), nothing, places, np.zeros(512, np.int8))


def _floors() -> list[Claim]:
    return [
        Claim(
            system=NAME,
            claim=f"SRP(16) of independent even routing, {top_k} of {n_experts}",
            published=published,
            simulated=srp_floor(n_experts, top_k, 16),
            low=round(published - 0.0005, 4),
            high=round(published + 0.0005, 4),
            tier="A",
            convention="identity",
            note="closed form, printed to three decimals",
        )
        for (top_k, n_experts), published in FLOORS.items()
    ]


def _golden() -> list[Claim]:
    trace, note = golden_trace(), "512 tokens of a congruential generator"
    found = [
        _exact(f"golden trace, SRP({m})", published, srp(trace, m).srp, "both", note)
        for m, published in GOLDEN_SRP.items()
    ]
    for (policy, rho), both in GOLDEN_HITS.items():
        for convention, published in zip((TOKEN_BATCH, EXECUTION_ORDER), both, strict=True):
            ours = _hits(trace, policy, rho, convention)
            claim = f"golden trace, {policy} at rho {rho:g}"
            found.append(_exact(claim, published, ours, NAMES[convention], note))
    return found


def _exact(claim: str, published: float, ours: float, convention: str, note: str) -> Claim:
    low, high = round(published - 5e-7, 7), round(published + 5e-7, 7)
    return Claim(NAME, claim, published, ours, low, high, "A", convention, note)


def _hits(trace: RoutingTrace, policy: str, rho: float, convention: str) -> float:
    if policy == "SCH(16)":
        return sch(trace, 16, rho, convention)
    return hit_rate(trace, POLICIES[policy], rho, convention)


def _against_row(capture: Capture, trace: RoutingTrace) -> Iterator[Claim]:
    """Every figure of the model's row that the trace is long enough for."""
    row, note = capture.published, f"11 corpora there; here {capture.caveat}"

    def claim(
        what: str, published: float, ours: float, band: float | None, convention: str
    ) -> Claim:
        low, high = (
            (None, None)
            if band is None
            else (round(published - band, 6), round(published + band, 6))
        )
        name = f"{capture.model}, {capture.stem}: {what}"
        return Claim(NAME, name, published, ours, low, high, "B", convention, note)

    for m, published in row.srp.items():
        measured = srp(trace, m)
        if measured.n_windows:
            what = f"SRP({m}), {measured.n_windows} windows, floor {measured.floor:.3f}"
            yield claim(what, published, measured.srp, SRP_BAND, "paper")
    paper, execution = NAMES[TOKEN_BATCH], NAMES[EXECUTION_ORDER]
    for rho, published in row.sch.items():
        ours = sch(trace, 16, rho)
        yield claim(f"SCH(16) at rho {rho:g}", published, ours, HIT_BAND, paper)
    for policy, published in row.hits.items():
        what = f"{policy} at rho 2"
        yield claim(what, published, _hits(trace, policy, 2.0, TOKEN_BATCH), HIT_BAND, paper)
        yield claim(what, published, _hits(trace, policy, 2.0, EXECUTION_ORDER), None, execution)


# --- trends -------------------------------------------------------------------------------------


def _ranks(captured: Mapping[str, RoutingTrace]) -> list[Claim]:
    """Do our models rank by SRP(16) as in the table; a model with two traces counts once."""
    published: dict[str, float] = {}
    ours: dict[str, list[float]] = {}
    for capture in CAPTURES:
        if capture.stem in captured and srp(captured[capture.stem], 16).n_windows:
            published[capture.model] = capture.published.srp[16]
            ours.setdefault(capture.model, []).append(srp(captured[capture.stem], 16).srp)
    if len(published) < 2:
        return []
    from scipy.stats import spearmanr

    means = [np.mean(values) for values in ours.values()]
    ranks = min(float(spearmanr(list(published.values()), means).statistic), 1.0)
    note = f"{len(published)} models of the table have a trace here, so this proves little"
    claim = "rank correlation of SRP(16) with the table"
    return [Claim(NAME, claim, None, ranks, 0.9, 1.0, "C", "paper", note)]


def _trends(captured: Mapping[str, RoutingTrace], sources: Sources) -> list[Claim]:
    """The knee at rho 2, and what goes with what; on synthetic traces where none is captured."""
    traces = [trace for trace in captured.values() if srp(trace, 16).n_windows]
    known = f"{len(traces)} captured traces"
    if len(traces) < 3:
        traces = [
            zipf_trace(2000, 4, 32, 4, 0.5, reuse, sources.seed) for reuse in (0.0, 0.3, 0.6, 0.9)
        ]
        known = "4 synthetic traces that reuse none to 90 % of the experts"
    found = [*_knee(traces, known)]
    lru = [hit_rate(trace, "lru", 1.5, TOKEN_BATCH) for trace in traces]
    lfu = [hit_rate(trace, "perfect_lfu", 1.5, TOKEN_BATCH) for trace in traces]
    foresight = [sch(trace, 16, 1.5) for trace in traces]
    segments = [srp(trace, 16).srp for trace in traces]
    note = f"over {known}; the band asks for the sign, no other is printed"
    rows = [("SRP(16)", segments, 0.974), ("LRU", lru, 0.904), ("LFU", lfu, 0.887)]
    for what, values, published in rows:
        claim = f"correlation of SCH(16) with {what} over models, rho 1.5"
        ours = min(float(np.corrcoef(foresight, values)[0, 1]), 1.0)
        found.append(Claim(NAME, claim, published, ours, 0.0, 1.0, "C", "paper", note))
    return found


def _knee(traces: list[RoutingTrace], known: str) -> Iterator[Claim]:
    """SCH over Belady by cache size, and how much less the step beyond rho 2 brings."""
    share = [
        float(np.mean([sch(t, 16, rho) / hit_rate(t, "belady", rho, TOKEN_BATCH) for t in traces]))
        for rho in KNEE_RHOS
    ]
    note = f"mean over {known}; published for the paper's own small model"
    for rho, published, ours in zip(KNEE_RHOS, KNEE_PUBLISHED, share, strict=True):
        claim = f"SCH(16) over Belady at rho {rho:g}"
        yield Claim(NAME, claim, published, ours, None, None, "C", "paper", note)
    one, two, three = KNEE_PUBLISHED
    claim = "what rho 2 to 3 adds to that, over what rho 1 to 2 adds"
    ours = (share[2] - share[1]) / (share[1] - share[0])
    note = f"{note}; a knee when below 1"
    yield Claim(NAME, claim, (three - two) / (two - one), ours, 0.0, 1.0, "C", "paper", note)
