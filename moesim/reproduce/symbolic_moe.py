"""Symbolic-MoE (arXiv 2503.05641): which of many whole models answers which question, in groups.

Each question is put to k models, drawn by their skills; one model fits the GPU at a time. Asked
question by question, nearly every answer waits for a model to be loaded. The batch strategy
recruits for all questions first, then loads every model once and lets it answer its whole group:

    naive    switches * load + one answer after another
    grouped  models * load + each group's answers, batched

The price is that the first question is answered late. Recruiting follows the published code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.cost import DEFAULT_EFFICIENCY
from hwmodels.device import Device, Figure
from hwmodels.devices import load_device, load_link
from moesim.errors import SimulationError
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.sources import Sources
from traces.replay import replay
from traces.synth import stream

NAME = "symbolic-moe"
PAPER = "Symbolic-MoE, arXiv 2503.05641"

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

QUESTIONS, RECRUITS, MODELS = 500, 3, 16
RARE_SHARE = 0.05  # a model with a smaller share of all recruitments is replaced
STRENGTH_POWER = 1 / 0.5
LOADS_S = (20.0, 60.0)
FIGURES = MappingProxyType(
    {
        "params": Figure(7.6e9, "assumed", "weights of one model; the paper's are mostly 7 to 9 B"),
        "answer": Figure(512, "assumed", "tokens of one answer with its reasoning"),
        "batch": Figure(256, "assumed", "most sequences at once, vLLM's default"),
        "keywords": Figure(5, "assumed", "skills named for a question"),
        "skills": Figure(60, "assumed", "skills in the profiles"),
        "validation": Figure(350, "assumed", "questions the profiles are made from"),
        "rounds": Figure(3, "assumed", "of a discussion between three models on four GPUs"),
    }
)


@dataclass(frozen=True, slots=True)
class Bench:
    """A GPU and a model: what loading and answering cost.

    load_s    until a model that was not on the GPU can answer
    answer_s  float64[most + 1], seconds until 0..most answers are done that begin together
    """

    load_s: float
    answer_s: Floats

    def group_s(self, n: int) -> float:
        """Seconds for n answers of one model, in batches of the most it can take."""
        most = len(self.answer_s) - 1
        return float(n // most * self.answer_s[most] + self.answer_s[n % most])


def bench(device: Device, load_s: float) -> Bench:
    """Decoding on a device: every step reads the weights once, or is bound by arithmetic."""
    params, tokens, most = (FIGURES[key].value for key in ("params", "answer", "batch"))
    n = np.arange(int(most) + 1)
    read_s = 2 * params / (device.memory_bytes_per_s * DEFAULT_EFFICIENCY.memory_share)
    work_s = 2 * params * n / (device.peak_flop_per_s("bf16") * DEFAULT_EFFICIENCY.compute_share)
    return Bench(load_s, tokens * np.maximum(read_s, work_s) * (n > 0))


def skill_profiles(n_models: int, rng: np.random.Generator) -> Floats:
    """float64[models, skills]: right minus wrong answers of validation questions with the skill.

    A model's chance to be right is its own mean plus a draw for the skill, 0.35 to 0.8 on average
    and 0.15 either way: assumed.
    """
    n_skills, n_questions = int(FIGURES["skills"].value), int(FIGURES["validation"].value)
    mean = rng.uniform(0.35, 0.8, n_models)
    chance = np.clip(mean[:, None] + rng.normal(0, 0.15, (n_models, n_skills)), 0, 1)
    asked = rng.multinomial(n_questions * int(FIGURES["keywords"].value), [1 / n_skills] * n_skills)
    right = rng.binomial(asked, chance)
    return (2 * right - asked).astype(np.float64)


def strength(profiles: Floats) -> Floats:
    """float64[models]: overall strength, sums to 1.

    source  recruit_agents.py: sums of the profiles, shifted to at least 1 if one is negative, to
            the power 1 / 0.5
    """
    total = profiles.sum(axis=1)
    if total.min() < 0:
        total = total - total.min() + 1
    raised = total**STRENGTH_POWER
    return np.asarray(raised / raised.sum())


def recruit_odds(profiles: Floats, skills: Longs) -> Floats:
    """float64[questions, models]: chance of each draw to take each model.

    skills  int64[questions, keywords], skills that each question needs
    source  recruit_agents.py: sum of the profile's entries; only positive sums take part, or all,
            shifted to at least 1, where none is positive; times strength
    """
    score = profiles[:, skills].sum(axis=2).T
    shifted = score - score.min(axis=1, keepdims=True) + 1
    none = ~(score > 0).any(axis=1, keepdims=True)
    weight = np.where(none, shifted, np.maximum(score, 0)) * strength(profiles)
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))


def recruit(odds: Floats, k: int, rng: np.random.Generator) -> Longs:
    """int64[questions, k]: models drawn with replacement, rare ones replaced afterwards.

    source  recruit_agents.py: a model with less than 5 % of all draws gives its places to draws
            among the frequent ones, by how often they were drawn
    raises  SimulationError when no model is frequent enough to take them
    """
    edges = odds.cumsum(axis=1)
    drawn = rng.random((len(odds), k))
    chosen = (drawn[:, :, None] >= edges[:, None, :-1]).sum(axis=2)
    count = np.bincount(chosen.ravel(), minlength=odds.shape[1])
    frequent = count >= RARE_SHARE * chosen.size
    if not frequent.any():
        raise SimulationError(f"no model has {RARE_SHARE:.0%} of the draws, expected at least one")
    rare = ~frequent[chosen]
    odds_of = count * frequent / count[frequent].sum()
    chosen[rare] = rng.choice(odds.shape[1], int(rare.sum()), p=odds_of)
    return np.asarray(chosen, dtype=np.int64)


def switches(models: Longs, resident: int = 1) -> int:
    """Loads of a stream of model ids when an LRU of that many models stays on the GPU."""
    return replay(models.ravel(), resident, "lru").n_misses


def naive_s(chosen: Longs, on: Bench) -> Floats:
    """float64[questions]: when each question is answered, one answer after the other."""
    stream_of = chosen.ravel()
    loads = np.concatenate(([1], (np.diff(stream_of) != 0).astype(np.int64)))
    done = (loads * on.load_s + on.answer_s[1]).cumsum()
    return np.asarray(done.reshape(chosen.shape)[:, -1])


def grouped_s(chosen: Longs, on: Bench, n_gpus: int = 1) -> Floats:
    """float64[questions]: when each question is answered, every model loaded once.

    A question is answered when the last of its models is done with its group. Models go to the
    GPU that is free first, the largest group first.
    """
    size = np.bincount(chosen.ravel())
    free, done = np.zeros(n_gpus), np.zeros(len(size))
    for model in np.argsort(-size, kind="stable"):
        if size[model]:
            gpu = int(free.argmin())
            free[gpu] += on.load_s + on.group_s(int(size[model]))
            done[model] = free[gpu]
    return np.asarray(done[chosen].max(axis=1))


def windowed_s(chosen: Longs, on: Bench, window: int) -> Floats:
    """The same where only `window` questions at a time are known before models are loaded."""
    parts, start = [], 0.0
    for first in range(0, len(chosen), window):
        part = grouped_s(chosen[first : first + window], on)
        parts.append(start + part)
        start += float(part.max())
    return np.concatenate(parts)


def cached_s(chosen: Longs, on: Bench, resident: int) -> float:
    """Seconds question by question when an LRU of `resident` models stays on the GPU."""
    return switches(chosen, resident) * on.load_s + chosen.size * float(on.answer_s[1])


def recruited(seed: int) -> Longs:
    """int64[500, 3]: models of every question, from synthetic skill profiles."""
    rng = stream(seed, "symbolic-moe")
    profiles = skill_profiles(MODELS, rng)
    n_skills, keywords = (int(FIGURES[key].value) for key in ("skills", "keywords"))
    skills = rng.integers(0, n_skills, (QUESTIONS, keywords))
    return recruit(recruit_odds(profiles, skills), RECRUITS, rng)


_HOW = (
    "500 questions, 3 models each of 16, synthetic skill profiles; 7.6 B models, answers of 512"
    " tokens and an RTX A6000 assumed"
)


def claims(sources: Sources) -> list[Claim]:
    """Switches exactly, then time with and without grouping, and what grouping costs."""
    chosen = recruited(sources.seed)
    return [
        *_switches(chosen),
        *_speedup(chosen),
        *_first_answer(chosen),
        *_honest_baselines(chosen),
        *_more_gpus(chosen),
    ]


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    band: tuple[float, float] | None,
    note: str = _HOW,
    tier: Tier = "C",
) -> Claim:
    low, high = band or (None, None)
    return Claim(NAME, claim, published, float(simulated), low, high, tier, "code", note)


def _switches(chosen: Longs) -> Iterator[Claim]:
    worst = np.arange(QUESTIONS * RECRUITS) % MODELS
    jobs = QUESTIONS * RECRUITS
    note = "models in turn, so that none answers twice running; replayed through one place"
    yield _row("switches without grouping, worst order", jobs, switches(worst), (jobs, jobs),
               note, "A")  # fmt: skip
    grouped = switches(np.sort(worst))
    note = "the same jobs, by model"
    yield _row("switches with grouping", MODELS, grouped, (MODELS, MODELS), note, "A")
    yield _row("switches without grouping, as recruited", None, switches(chosen), None)
    yield _row("models left after the 5 % rule", None, len(np.unique(chosen)), None)


def _speedup(chosen: Longs) -> Iterator[Claim]:
    """As recruited, and with all 16 models asked equally often, the hardest case for grouping."""
    alike = np.arange(chosen.size).reshape(chosen.shape) % MODELS
    band = (10.0, float(chosen.size))
    note = f"{_HOW}; band: at least 10 in the handbook, at most one load for every answer"
    for load_s in LOADS_S:
        on = bench(load_device("rtx-a6000"), load_s)
        for models, how in ((chosen, "as recruited"), (alike, "all models alike")):
            together_s = grouped_s(models, on).max()
            found = naive_s(models, on).max() / together_s
            claim = f"naive over grouped time, loading in {load_s:.0f} s, {how}"
            yield _row(claim, None, found, band, note)
            work_s = together_s - load_s * len(np.unique(models))
            found = (switches(models) * load_s + work_s) / together_s
            claim = f"naive over grouped time, equally fast answers, {load_s:.0f} s, {how}"
            yield _row(claim, None, found, None, _HOW + "; loads alone differ, not batching")


def _first_answer(chosen: Longs) -> Iterator[Claim]:
    """The price: whoever asks first waits for whole groups."""
    for load_s in LOADS_S:
        on = bench(load_device("rtx-a6000"), load_s)
        one_s, all_s = naive_s(chosen, on), grouped_s(chosen, on)
        how = f"loading in {load_s:.0f} s"
        yield _row(f"first question answered after, s, naive, {how}", None, one_s[0], None)
        note = _HOW + "; mean over which question stands first"
        claim = f"first question answered after, s, grouped, {how}"
        yield _row(claim, None, all_s.mean(), None, note)
        late = float((one_s < all_s).mean() * 100)
        yield _row(f"questions that grouping delays, %, {how}", None, late, None)


def _honest_baselines(chosen: Longs) -> Iterator[Claim]:
    """Against what else a careful runtime would do, loading in 20 s and from pinned memory."""
    device = load_device("rtx-a6000")
    weights_bytes = 2 * FIGURES["params"].value
    resident = int(device.memory_bytes // weights_bytes)
    pinned_s = weights_bytes / load_link(device.host_link).bytes_per_s
    for load_s, how in ((LOADS_S[0], "loading in 20 s"), (pinned_s, "loading from pinned memory")):
        on = bench(device, load_s)
        whole = grouped_s(chosen, on).max()
        note = f"{_HOW}; honest baseline; a load takes {load_s:.2g} s"
        cached = cached_s(chosen, on, resident) / whole
        claim = f"LRU of {resident} resident models over grouped time, {how}"
        yield _row(claim, None, cached, None, note)
        windowed = windowed_s(chosen, on, 64).max() / whole
        yield _row(f"groups of 64 questions over one group, {how}", None, windowed, None, note)


def _more_gpus(chosen: Longs) -> Iterator[Claim]:
    on = bench(load_device("rtx-a6000"), LOADS_S[0])
    one = grouped_s(chosen, on).max()
    for n_gpus in (2, 4):
        found = one / grouped_s(chosen, on, n_gpus).max()
        yield _row(f"grouped time on one GPU over that on {n_gpus}", None, found, None)
    rounds = int(FIGURES["rounds"].value)
    discussion = on.load_s + rounds * on.group_s(QUESTIONS)
    note = (
        f"{_HOW}; abstract: comparable; a discussion of {rounds} rounds, every model resident on a"
        " GPU of its own and fully batched, which the baselines of the paper need not be"
    )
    yield _row(
        "grouped time on one GPU over a discussion on four", 1.0, one / discussion, None, note
    )
