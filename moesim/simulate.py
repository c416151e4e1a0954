"""Run many steps of a trace under a placement: seconds, tokens/s, joules, dollars, and why.

Without two-batch overlap a step is priced from counts per rank (`planners/step_time.py`), many
steps in one pass. With it every step becomes a Program for the engine. `step_timeline` gives the
full timeline of one step either way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.cost import CostKind
from hwmodels.system import System
from moesim.errors import SimulationError
from moesim.lower.expert_parallel import step_breakdown, step_program
from moesim.lower.layer_costs import StepOptions, layer_costs
from moesim.program import Names, Program
from planners.dispatch import Counts, DispatchCounts, Routing, source_ranks, step_counts
from planners.drawn import draw_tokens, drawn_dispatch
from planners.plan import Placement, max_over_mean
from planners.step_time import MoeLaws, MoeParts, check_system, laws_for, step_seconds_from_counts
from traces.batches import steps
from traces.model import ModelSpec
from traces.routing import ExpertCounts, RoutingTrace, content_hash

Rows = npt.NDArray[np.int64]
CHUNK_BYTES = 64 << 20  # counts of the steps priced in one pass

KINDS: Mapping[str, CostKind] = MappingProxyType(
    {
        "seconds": "analytic",
        "breakdown_s": "analytic",
        "tokens_per_s": "analytic",
        "joules_per_token": "assumed",
        "usd_per_million_tokens": "assumed",
        "max_over_mean": "measured",
        "distinct": "measured",
        "bytes_per_token": "measured",
    }
)

_COUNTED = ("max_over_mean", "distinct", "bytes_per_token")
_DRAWN_KINDS: Mapping[str, CostKind] = MappingProxyType(
    {**KINDS, **dict.fromkeys(_COUNTED, "assumed")}
)
_DRAWN_STEPS = 16  # drawn at a time


@dataclass(frozen=True, slots=True)
class Result:
    """What a run of steps took. Means are over steps.

    seconds         float64[steps], end of each step
    breakdown_s     component to mean seconds per step; with two-batch overlap "overlap" is minus
                    the seconds hidden by it, so the components always sum to the mean step
    max_over_mean   float64[moe_layers], busiest rank over mean rank in token copies
    distinct        float64[moe_layers], experts with a token on the rank that has most of them
    bytes_per_token "up" and "out": bytes sent per token over the in-node link and between nodes,
                    dispatch and combine of all layers together
    joules_per_token  every device at its board power for the whole step, and the links' energy;
                    None when the catalogue has no power for the device
    usd_per_million_tokens  by rental price, None when the catalogue has none for the device
    kinds           how each figure is known; "measured" ones are counted from the trace
    inputs          names and hashes of what went in, and how steps were made if not given
    """

    seconds: npt.NDArray[np.float64]
    tokens_per_step: int
    breakdown_s: Mapping[str, float]
    tokens_per_s: float
    joules_per_token: float | None
    usd_per_million_tokens: float | None
    max_over_mean: npt.NDArray[np.float64]
    distinct: npt.NDArray[np.float64]
    bytes_per_token: Mapping[str, float]
    kinds: Mapping[str, CostKind]
    inputs: Mapping[str, str]

    @property
    def n_steps(self) -> int:
        """Number of steps run."""
        return len(self.seconds)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a trace runs on: model, system, and how a step is run."""

    model: ModelSpec
    system: System
    options: StepOptions

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step over all ranks."""
        return self.options.tokens_per_rank * self.system.n_devices


def simulate_steps(
    trace: RoutingTrace, placement: Placement, setting: Setting, rows: Rows | None = None
) -> Result:
    """Run steps of a trace; the same trace, placement and setting give the same Result.

    rows    int64[steps, tokens_per_step] token rows of each step, consecutive blocks per rank;
            None takes all steps of the options' phase that the trace fills (traces/batches.py)
    raises  SimulationError when the trace's layers or experts are not the model's, PlanError when
            the placement does not fit the system
    """
    _check(trace, placement, setting)
    inputs = _inputs(trace, placement, setting)
    if rows is None:
        drawn = steps(trace, setting.tokens_per_step, setting.options.phase, 0)
        inputs["steps"] = "resampled: the trace is short" if drawn.resampled else "each token once"
        rows = drawn.rows
    _check_rows(setting, rows)
    totals = _Totals(setting)
    chunk = _steps_per_chunk(placement)
    for first in range(0, len(rows), chunk):
        totals.add(_batches(trace, placement, setting, rows[first : first + chunk]))
    return totals.result(KINDS, inputs)


def simulate_counts(
    counts: ExpertCounts, placement: Placement, setting: Setting, n_steps: int, seed: int
) -> Result:
    """Run steps drawn from expert counts: compute with the noise of a step, traffic expected.

    Equal counts, setting, n_steps and seed draw equal tokens per expert whatever the placement,
    so Results of several placements are paired step by step.
    raises  as simulate_steps
    """
    _check(counts, placement, setting)
    if n_steps < 1:
        raise SimulationError(f"n_steps={n_steps}, expected at least 1")
    totals, model = _Totals(setting), setting.model
    routing = Routing(model.top_k, model.n_groups, model.topk_groups)
    rng = np.random.default_rng(seed)
    chunk = _DRAWN_STEPS  # fixed, so that the draws do not depend on the placement
    for first in range(0, n_steps, chunk):
        batches = []
        for part in _parts(setting.options):
            n_tokens = len(range(*part.indices(setting.options.tokens_per_rank)))
            n_tokens *= placement.n_ranks
            drawn = draw_tokens(counts.counts, n_tokens, routing, min(chunk, n_steps - first), rng)
            plan = (routing, setting.options.mode)
            batches.append(drawn_dispatch(counts.counts, drawn, n_tokens, placement, plan))
        totals.add(tuple(batches))
    return totals.result(_DRAWN_KINDS, _inputs(counts, placement, setting))


def step_timeline(
    trace: RoutingTrace, placement: Placement, setting: Setting, step: Rows
) -> tuple[Program, Names]:
    """Program and names of one step; moesim.engine.run turns the program into a Timeline.

    step  int64[tokens_per_step] token rows, consecutive blocks per rank
    """
    _check(trace, placement, setting)
    _check_rows(setting, step[None])
    batches = tuple(b.step(0) for b in _batches(trace, placement, setting, step[None]))
    return step_program(setting.model, setting.system, setting.options, batches)


class _Totals:
    """Sums over the steps seen so far."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._laws = _laws(setting)
        self._seconds: list[npt.NDArray[np.float64]] = []
        self._breakdown: dict[str, float] = {}
        n_layers = setting.model.n_moe_layers
        self._max_over_mean = np.zeros(n_layers)
        self._distinct = np.zeros(n_layers)
        self._copies = {"up": 0.0, "out": 0.0}

    def add(self, batches: tuple[DispatchCounts, ...]) -> None:
        """Steps of one batch, or of two half batches that overlap; counts with a steps axis."""
        alone = [self._alone(counts) for counts in batches]
        one_after_the_other = np.sum(alone, axis=0)
        seconds = one_after_the_other
        if len(batches) > 1:
            seconds = self._overlapped(batches)
            self._add_parts({"overlap": seconds - one_after_the_other})
        self._seconds.append(np.asarray(seconds))
        self._add_counts(_joined(batches))

    def _alone(self, counts: DispatchCounts) -> Counts:
        """float64[steps]: seconds of a batch without overlap; its parts are added up."""
        setting = self._setting
        parts = MoeParts(*step_seconds_from_counts(counts, self._laws))
        tokens = counts.n_tokens / setting.system.n_devices
        costs = layer_costs(setting.model, setting.system, setting.options, tokens)
        breakdown = step_breakdown(setting.model, costs, parts, setting.options.shared_overlap)
        self._add_parts(breakdown)
        return np.asarray(sum(breakdown.values()))

    def _overlapped(self, batches: tuple[DispatchCounts, ...]) -> Counts:
        """float64[steps]: end of each step's program."""
        from moesim.engine import run

        setting, ends = self._setting, []
        for step in range(len(batches[0].rank_tokens)):
            alone = tuple(counts.step(step) for counts in batches)
            program, _ = step_program(setting.model, setting.system, setting.options, alone)
            ends.append(run(program).makespan_s)
        return np.array(ends)

    def result(self, kinds: Mapping[str, CostKind], inputs: Mapping[str, str]) -> Result:
        """Means of all steps."""
        setting, system = self._setting, self._setting.system
        seconds = np.concatenate(self._seconds)
        n_steps, total_s = len(seconds), float(seconds.sum())
        n_tokens = n_steps * setting.tokens_per_step
        both_ways = self._laws.dispatch_bytes + self._laws.combine_bytes
        moved = {link: copies * both_ways / n_tokens for link, copies in self._copies.items()}
        link_j = moved["up"] * system.scale_up.energy_j_per_byte
        link_j += moved["out"] * system.scale_out.energy_j_per_byte
        device_s_per_token = total_s * system.n_devices / n_tokens
        usd_per_s, board_w = system.device.usd_per_hour / 3600, system.device.tdp_w
        return Result(
            seconds=seconds,
            tokens_per_step=setting.tokens_per_step,
            breakdown_s={part: value / n_steps for part, value in self._breakdown.items()},
            tokens_per_s=n_tokens / total_s,
            joules_per_token=device_s_per_token * board_w + link_j if board_w > 0 else None,
            usd_per_million_tokens=device_s_per_token * usd_per_s * 1e6 if usd_per_s > 0 else None,
            max_over_mean=self._max_over_mean / n_steps,
            distinct=self._distinct / n_steps,
            bytes_per_token=moved,
            kinds=kinds,
            inputs=inputs,
        )

    def _add_parts(self, breakdown: Mapping[str, Counts]) -> None:
        for part, seconds in breakdown.items():
            self._breakdown[part] = self._breakdown.get(part, 0.0) + float(seconds.sum())

    def _add_counts(self, counts: DispatchCounts) -> None:
        loads = counts.rank_tokens
        flat = loads.reshape(-1, loads.shape[-1])
        self._max_over_mean += max_over_mean(flat).reshape(loads.shape[:2]).sum(axis=0)
        self._distinct += counts.rank_distinct.max(axis=-1).sum(axis=0)
        self._copies["up"] += float(counts.up_send.sum())
        self._copies["out"] += float(counts.out_send.sum())


def _steps_per_chunk(placement: Placement) -> int:
    """Steps whose counts fit CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (6 * 8 * placement.n_layers * placement.n_ranks))


def _parts(options: StepOptions) -> tuple[slice, ...]:
    """The tokens of a rank that make a batch: all, or the first and the second half."""
    if not options.two_batch_overlap:
        return (slice(None),)
    half = -(-options.tokens_per_rank // 2)
    return slice(None, half), slice(half, None)


def _batches(
    trace: RoutingTrace, placement: Placement, setting: Setting, rows: Rows
) -> tuple[DispatchCounts, ...]:
    """Counts of the batches of these steps, with a steps axis."""
    options, n_ranks = setting.options, placement.n_ranks
    per_rank = rows.reshape(len(rows), n_ranks, -1)
    batches = []
    for part in _parts(options):
        tokens = per_rank[:, :, part].reshape(len(rows), -1)
        source = source_ranks(tokens.shape[1], n_ranks)
        batches.append(
            step_counts(trace.topk, tokens, source, placement, options.mode, options.rule)
        )
    return tuple(batches)


_PER_RANK = ("rank_tokens", "rank_distinct", "up_send", "up_recv", "out_send", "out_recv")


def _joined(batches: tuple[DispatchCounts, ...]) -> DispatchCounts:
    """The batches of a step as one; distinct experts are the larger of two halves'."""
    summed = {field: sum(getattr(b, field) for b in batches) for field in _PER_RANK}
    summed["rank_distinct"] = np.maximum.reduce([b.rank_distinct for b in batches])
    return replace(batches[0], **summed)


def _laws(setting: Setting) -> MoeLaws:
    options = setting.options
    return laws_for(setting.model, setting.system, options.precision, options.kernel)


def _check(evidence: RoutingTrace | ExpertCounts, placement: Placement, setting: Setting) -> None:
    model = setting.model
    if evidence.layers != model.moe_layers or evidence.n_experts != model.n_experts:
        raise SimulationError(
            f"trace has {evidence.n_layers} MoE layers of {evidence.n_experts} experts, model"
            f" {model.name} has {model.n_moe_layers} (layers {model.moe_layers[:3]}...) of"
            f" {model.n_experts}"
        )
    check_system(placement, setting.system)


def _check_rows(setting: Setting, rows: Rows) -> None:
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] != setting.tokens_per_step:
        raise SimulationError(
            f"rows: shape {rows.shape}, expected [1 or more steps, {setting.tokens_per_step}]"
            f" ({setting.options.tokens_per_rank} tokens on each of"
            f" {setting.system.n_devices} ranks)"
        )


def _inputs(
    evidence: RoutingTrace | ExpertCounts, placement: Placement, setting: Setting
) -> dict[str, str]:
    slots = np.ascontiguousarray(placement.physical_to_logical_map)
    return {
        "model": setting.model.name,
        "system": setting.system.name,
        "trace_sha256": content_hash(evidence),
        "placement_sha256": hashlib.sha256(slots.tobytes()).hexdigest(),
    }
