"""HybriMoE (arXiv 2504.05897): experts of a layer split between GPU, link and CPU as they fall.

code-HSS   the released code's schedule and constants, decode only (its prefill gives the GPU all)
paper-HSS  the paper's priorities, times of the paper's box; see `hybrimoe_setup.py` for both

Against it: every miss on the CPU with the popular experts resident for good (KTransformers,
llama.cpp), every miss to the GPU through an LRU cache, and the honest baseline.

Assumed: a gate finds 85 % of a layer's experts one layer ahead, and that share of the rest again
with every layer more; static experts are chosen on tokens that are not replayed; prefetch without
a cache gets two of the slots of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moesim.offload.built_in import decide_built_in, hooks_for
from moesim.offload.decide import Hooks, decide
from moesim.offload.decisions import ON_CPU
from moesim.offload.policy import OffloadPolicy
from moesim.offload.simulate import OffloadResult
from moesim.policies.dispatch import hss
from moesim.policies.impact import busy_seconds
from moesim.policies.prefetch import DEFAULT_NEXT_GATE
from moesim.reproduce.baseline import honest_baseline
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.hybrimoe_runs import (
    Bench,
    all_parts,
    benches,
    decode_parts,
    prefill_parts,
    prompt_bench,
    static,
    to_gpu,
)
from moesim.reproduce.hybrimoe_setup import (
    RecentScores,
    Scored,
    on_cpu,
    routing,
    scored_trace,
    unit_times,
)
from moesim.reproduce.sources import Sources
from traces.layer_steps import LayerSteps, forward_passes, layer_steps

NAME = "hybrimoe"
PAPER = "HybriMoE, arXiv 2504.05897 (DAC 2025)"

STEMS = ("deepseek-v2-lite-law", "deepseek-v2-lite-intent")
PROMPTS = 2

# The handbook's bands: over all misses on the CPU, over all to the GPU, MRS against LRU in points,
# and single parts in their order; hit rates of captured traces within 3 points.
_OVER_CPU, _OVER_GPU, _GAP, _MORE = (1.3, 2.0), (1.2, 100.0), (2.0, 100.0), (1.0, 100.0)
_SHRINKS, _POINTS = (-100.0, 0.0), 3.0
_Band = tuple[float, float] | None
How = tuple[Tier, str, str]  # tier, convention, note
# Token copies, experts that are there, slope; experts on the GPU, T_gpu, T_cpu.
_VECTORS = (
    ([1] * 6, 2, 1.0, (0, 1, 2, 3, 4), 2.5, 1.79),
    ([1] * 2, 0, 0.2, (0,), 0.9179, 0.99),
    ([9, 4, 2, 7, 3, 1, 1, 5], 3, 0.2, (0, 1, 2, 3, 7), 2.5, 1.79),
    ([9, 4, 2, 7, 3, 1, 1, 5], 3, 0.8, (0, 1, 2, 3, 4, 7), 3.0, 2.39),
)
# Parts of the paper's ablation (Qwen2, 25 %): times over its baseline in decode and prefill.
_PUBLISHED_DECODE = {"schedule": 1.46, "prefetch": 1.15, "cache": 1.38, "all": 1.86}
_PUBLISHED_PREFILL = {"schedule": 1.26, "prefetch": 1.06, "all": 1.31}
_PLACEMENTS = {
    "popular experts resident": "static experts chosen by use on other tokens of the same texts",
    "experts resident by number": (
        "static experts that use has no part in, as KTransformers' rules by layer; added after the"
        " rows with popular ones were seen"
    ),
}
_ONLY_CHOSEN = (
    "the trace has gate weights of the chosen experts only, so TopP ends at p = k; the rows with"
    " all scores show what near misses are worth"
)
_MODELLED = "made scores persist by two constants only; without near misses the gain is near none"
_OTHER_TEXTS = (
    "with two slots for two experts the hit rate is the share that repeats from token to token,"
    " which depends on the texts, and the paper's are not said"
)
_SAME_TEXTS = "experts that are popular on the same texts leave little for a cache to add"
_NO_PLACEMENT = "a quarter of all requests hit such experts, fewer than any placement made by use"
_GPU_BOUND = (
    "by these constants a move (0.42) hides behind an expert on the GPU (0.5) and the CPU takes one"
    " of six: six experts in a row against five are 1.2 at most, less the dense part"
)
_LINK_BOUND = (
    "by the box's rates the CPU reads an expert in a third of the time the link needs to move it,"
    " so few moves pay; the released constants have the CPU at an eighth of that rate"
)


def claims(sources: Sources) -> list[Claim]:
    """Identities of the schedule, hit rates of the caches, speed of the parts."""
    first = routing(sources, STEMS[0])
    found = [*_golden(), *_hit_rates(sources, first), *_all_scores(sources.seed)]
    by_code, priced = benches(first, sources.seed)
    found += [*_decode(by_code, first.origin), *_against("code-HSS", by_code, first.origin)]
    found += _against("paper-HSS, priced", priced, first.origin)
    return [*found, *_prefill(first, sources.seed)]


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    band: _Band = None,
    how: How = ("C", "", ""),
    why: str = "",
) -> Claim:
    """`why` is told where the figure falls outside its band."""
    low, high = band or (None, None)
    tier, convention, note = how
    if band and not band[0] <= simulated <= band[1] and why:
        note = f"{note}; outside because {why}"
    return Claim(NAME, claim, published, float(simulated), low, high, tier, convention, note)


def _golden() -> Iterator[Claim]:
    """Vectors of the released code's schedule, worked out by hand."""
    for tokens, n_there, slope, on_gpu, gpu, cpu in _VECTORS:
        times = unit_times(slope, max(tokens))
        there = [cell < n_there for cell in range(len(tokens))]
        place = hss(tokens, there, times)
        busy = busy_seconds(tokens, there, place, times)
        right = sum((where != ON_CPU) == (cell in on_gpu) for cell, where in enumerate(place))
        name = f"loads {','.join(map(str, tokens))}, {n_there} there, slope {slope}"
        how: How = ("A", "code-HSS", "times in the code's unit")
        n = len(tokens)
        yield _row(f"{name}: experts placed as by hand", n, right, (n, n), how)
        yield _row(f"{name}: T_gpu", gpu, busy.gpu_s, (0.9999 * gpu, 1.0001 * gpu), how)
        yield _row(f"{name}: T_cpu", cpu, busy.cpu_s, (0.9999 * cpu, 1.0001 * cpu), how)


# --- caches -------------------------------------------------------------------------------------


def hit_rate(work: LayerSteps, cache: str, share: float) -> float:
    """Hit rate in percent, misses loaded, so many of a layer's experts in slots."""
    slots = np.full(work.n_layers, round(share * work.n_experts))
    return 100 * decide_built_in(work, OffloadPolicy(cache=cache, slots=slots)).hit_rate


def _hit_rates(sources: Sources, first: Scored) -> Iterator[Claim]:
    for stem in STEMS:
        scored = first if stem == STEMS[0] else routing(sources, stem)
        if stem != STEMS[0] and not scored.captured:
            continue
        work = layer_steps(scored.trace, forward_passes(scored.trace))
        title = f"DeepSeek-V2-Lite, {stem.rsplit('-', 1)[-1] if scored.captured else 'generated'}"
        yield from _deepseek(work, title, scored)
    trace = sources.captured("mixtral-8x7b-mtbench")
    if trace is not None:
        work = layer_steps(trace, forward_passes(trace, phase="decode"))
        note = "captured mixtral-8x7b-mtbench, decode; it has no gate weights, so no MRS"
        for share, published in ((0.25, 30.2), (0.75, 80.6)):
            found, near = hit_rate(work, "lru", share), _near(published)
            name = f"Mixtral: LRU hit rate at {share:.0%}, %"
            yield _row(name, published, found, near, ("B", "execution order", note), _OTHER_TEXTS)


def _near(published: float) -> tuple[float, float]:
    return published - _POINTS, published + _POINTS


def _deepseek(work: LayerSteps, title: str, scored: Scored) -> Iterator[Claim]:
    tier: Tier = "B" if scored.captured else "C"
    how: How = (tier, "execution order", scored.origin)
    rates = {(c, s): hit_rate(work, c, s) for c in ("mrs", "lru") for s in (0.25, 0.5, 0.75)}
    for cache, published in (("mrs", 52.7), ("lru", 47.7)):
        name = f"{title}: {cache.upper()} hit rate at 25%, %"
        band = _near(published) if scored.captured else None
        yield _row(name, published, rates[cache, 0.25], band, how)
    gap = {share: rates["mrs", share] - rates["lru", share] for share in (0.25, 0.5, 0.75)}
    how = ("C", "execution order", scored.origin)
    name = f"{title}: MRS over LRU at 25%, points"
    yield _row(name, 5.0, gap[0.25], _GAP, how, _ONLY_CHOSEN)
    yield _row(f"{title}: MRS over LRU at 50%, points", None, gap[0.5], None, how)
    change = gap[0.75] - gap[0.25]
    yield _row(f"{title}: that at 75% less that at 25%, points", None, change, _SHRINKS, how)


def _all_scores(seed: int) -> Iterator[Claim]:
    """What the scores of near misses are worth to MRS, where all scores are known."""
    scored = scored_trace(800, 6, seed)
    if scored.scores is None:
        return
    work = layer_steps(scored.trace, forward_passes(scored.trace))
    gap: dict[tuple[int, float], float] = {}
    for share in (0.25, 0.75):
        slots = np.full(work.n_layers, round(share * work.n_experts))
        lru = hit_rate(work, "lru", share)
        for top_p in (6, 12):
            hooks = hooks_for(work, OffloadPolicy(slots=slots))
            cache = Hooks(RecentScores(scored.scores, top_p), hooks.dispatch)
            mrs = 100 * decide(work, OffloadPolicy(slots=slots), cache).hit_rate
            gap[top_p, share] = mrs - lru
    note = f"{scored.origin}, 6 layers; persistence and popularity of the captured law texts"
    how: How = ("C", "execution order", note)
    name = "all scores, p = 2k: MRS over LRU at 25%, points"
    yield _row(name, 5.0, gap[12, 0.25], _GAP, how, _MODELLED)
    yield _row("all scores, p = k: MRS over LRU at 25%, points", None, gap[6, 0.25], None, how)
    change = gap[12, 0.75] - gap[12, 0.25]
    name = "all scores, p = 2k: that at 75% less that at 25%, points"
    yield _row(name, None, change, _SHRINKS, how)


# --- speed --------------------------------------------------------------------------------------


def _told(done: OffloadResult) -> str:
    return (
        f"hit {100 * done.hit_rate:.1f} %, {100 * done.cpu_share:.0f} % on the CPU,"
        f" {done.bytes_per_token / 1e6:.0f} MB and {1e3 * done.stall_s_per_token:.2f} ms of stall"
        f" a token, {1e3 * done.seconds / done.pass_tokens.sum():.2f} ms a token"
    )


def _decode(bench: Bench, origin: str) -> Iterator[Claim]:
    """The ablation by the released constants, for both ways to choose static experts."""
    numbered = np.tile(np.arange(bench.work.n_experts), (bench.work.n_layers, 1))
    for placement, note in _PLACEMENTS.items():
        of = bench if placement.startswith("popular") else replace(bench, popular=numbered)
        parts = decode_parts(of)
        how: How = ("C", "code-HSS", f"{note}; {origin}")
        title = f"decode, code-HSS, {placement}"
        yield from _contributions(title, parts, how)
        gain = {name: parts["base"].seconds / done.seconds for name, done in parts.items()}
        name, over = f"{title}: schedule's gain over cache's", gain["schedule"] / gain["cache"]
        yield _row(name, 1.46 / 1.38, over, _MORE, how)
        name, over = f"{title}: cache's gain over prefetch's", gain["cache"] / gain["prefetch"]
        yield _row(name, 1.38 / 1.15, over, _MORE, how, _SAME_TEXTS)


def _contributions(title: str, parts: dict[str, OffloadResult], how: How) -> Iterator[Claim]:
    """Each part over the baseline, and all of them, which is what has a band."""
    for name, published in _PUBLISHED_DECODE.items():
        done = parts[name]
        tier, convention, note = how
        told = f"{_told(done)}; published for Qwen2; {note}"
        over, band = parts["base"].seconds / done.seconds, _OVER_CPU if name == "all" else None
        claim = f"{title}: {name} over misses on the CPU"
        yield _row(claim, published, over, band, (tier, convention, told), _NO_PLACEMENT)


def _against(convention: str, bench: Bench, origin: str) -> Iterator[Claim]:
    """All parts against misses to the GPU, and against the honest baseline."""
    ours, gpu, cpu = all_parts(bench), to_gpu(bench), static(bench, on_cpu)
    honest = honest_baseline(bench.work, bench.cost, bench.slots, DEFAULT_NEXT_GATE)
    title, priced = f"decode, {convention}", convention.endswith("priced")
    for name, done, band, why in (
        ("all misses to the GPU", gpu, _OVER_GPU, _GPU_BOUND),
        ("the honest baseline", honest, None, ""),
        *((("misses on the CPU", cpu, _OVER_CPU, _LINK_BOUND),) if priced else ()),
    ):
        note = f"{_told(done)}, ours {_told(ours)}; {origin}"
        over = done.seconds / ours.seconds
        yield _row(f"{title}: all over {name}", None, over, band, ("C", convention, note), why)


def _prefill(scored: Scored, seed: int) -> Iterator[Claim]:
    made = [prompt_bench(scored, index, seed) for index in range(PROMPTS)]
    parts = [prefill_parts(bench) for bench in made]
    seconds = {name: sum(one[name].seconds for one in parts) for name in parts[0]}
    note = (
        f"prompts of about {made[0].work.passes.tokens[0]} tokens; the published ablation is of"
        f" Qwen2 and prints no length; no band printed; {scored.origin}"
    )
    how: How = ("C", "paper-HSS, priced", note)
    for name, published in _PUBLISHED_PREFILL.items():
        over = seconds["base"] / seconds[name]
        yield _row(f"prefill: {name} over misses on the CPU", published, over, None, how)
    over = seconds["to the GPU"] / seconds["all"]
    claim = "prefill: paper-HSS over code-HSS, which gives the GPU all"
    yield _row(claim, None, over, None, how)
    honest = [honest_baseline(one.work, one.cost, one.slots, DEFAULT_NEXT_GATE) for one in made]
    over = sum(one.seconds for one in honest) / seconds["all"]
    yield _row("prefill: all over the honest baseline", None, over, None, how)
