"""Simulate a trace on one box under an offload policy: hit rate, bytes, stalls, tokens/s, joules.

Decisions are made over the whole trace, then clocked some passes at a time, so that memory stays
bounded. Figures that only make sense together are reported together: a high hit rate bought with
more bytes, or with loads ahead that arrive late, is no gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim import engine
from moesim.errors import SimulationError
from moesim.lower.offload import Extras, OffloadProgram, offload_program
from moesim.lower.offload_kernel import LOADED_EXPERT
from moesim.offload.built_in import decide_built_in
from moesim.offload.decisions import LOW, ON_CPU, PREFETCH, SKIPPED, Decisions
from moesim.offload.drive import cold_reads
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices
from moesim.policies.prefetch import Predictions
from traces.compiled import compiled
from traces.layer_steps import LayerSteps
from traces.routing import DECODE

Seconds = npt.NDArray[np.float64]
_CELLS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class OffloadResult:
    """What a run over a trace's passes did.

    pass_s           float64[n_passes], seconds of each forward pass
    is_decode        bool[n_passes]
    pass_tokens      int64[n_passes]
    hit_rate         share of requested experts in the fast tier when the gate asked
    bytes_per_token  copied to the device, by demand and ahead, over all tokens
    stall_s          float64[n_passes], device idle while it waits for loads or the CPU
    load_wait_s      of all stalls, those spent waiting for a load
    loads, loads_ahead, wasted  copies by demand, ahead, and ahead but never used
    dropped          of those ahead, the ones whose slot was given away before they started
    cpu_share, skipped_share, low_share  of the expert computations
    busy_s           seconds of work on device, copy engines, CPU, drive, PIM
    """

    pass_s: Seconds
    is_decode: npt.NDArray[np.bool_]
    pass_tokens: npt.NDArray[np.int64]
    hit_rate: float
    bytes_per_token: float
    stall_s: Seconds
    load_wait_s: float
    loads: int
    loads_ahead: int
    wasted: int
    dropped: int
    evictions: int
    cpu_share: float
    skipped_share: float
    low_share: float
    busy_s: Seconds

    @property
    def seconds(self) -> float:
        """Seconds of all passes."""
        return float(self.pass_s.sum())

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all passes over their seconds."""
        return float(self.pass_tokens.sum() / self.seconds) if self.seconds else float("nan")

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens of decode passes over their seconds; nan without any."""
        return self._rate(self.is_decode)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of prefill passes over their seconds; nan without any."""
        return self._rate(~self.is_decode)

    @property
    def stall_s_per_token(self) -> float:
        """Seconds a token waits on average."""
        return float(self.stall_s.sum() / self.pass_tokens.sum())

    def _rate(self, chosen: npt.NDArray[np.bool_]) -> float:
        seconds = float(self.pass_s[chosen].sum())
        return float(self.pass_tokens[chosen].sum() / seconds) if seconds else float("nan")


def simulate(
    work: LayerSteps,
    prices: Prices,
    policy: OffloadPolicy,
    predicted: Predictions | None = None,
    host_slots: int = 0,
) -> OffloadResult:
    """Decide by a built-in policy and clock it.

    host_slots  experts that fit host memory, the rest lies on the drive; 0: all fit
    raises      SimulationError when policy and prices count in different units
    """
    in_units = round(prices.expert_bytes / prices.unit_bytes)
    if policy.units_high != in_units:
        raise SimulationError(
            f"units_high={policy.units_high}: these prices count a full copy as {in_units} units"
        )
    decided = decide_built_in(work, policy, prices.unit_times(), predicted)
    extras = cold_reads(work, decided, host_slots) if host_slots else None
    return run(work, decided, prices, extras)


def run(
    work: LayerSteps,
    decided: Decisions,
    prices: Prices,
    extras: Extras | None = None,
    progress: Callable[[int], None] | None = None,
) -> OffloadResult:
    """Clock the decisions: when each pass ends and how long the device stood idle in it.

    progress  told the number of passes done after every part
    """
    n_passes = work.passes.n_passes
    pass_s, stall_s = np.zeros(n_passes), np.zeros(n_passes)
    waited, busy = 0.0, np.zeros(2 * prices.n_gpus + 3)
    dropped: list[npt.NDArray[np.bool_]] = []
    for first, end in _parts(work):
        part = offload_program(work, decided, prices, (first, end), extras)
        timeline = engine.run(part.program)
        dropped.append(part.dropped)
        waited += _measure(
            part.program.stream, part.kind, timeline.start_s, timeline.end_s,
            part.pass_end, prices.n_gpus, pass_s[first:end], stall_s[first:end], busy,
        )  # fmt: skip
        if progress is not None:
            progress(end)
    gone = np.concatenate(dropped) if dropped else np.zeros(0, np.bool_)
    return _result(work, decided, prices, (pass_s, stall_s, waited, busy), gone)


def _parts(work: LayerSteps) -> Iterator[tuple[int, int]]:
    """Runs of passes with at most so many cells, at least one pass each."""
    ends = work.start[:: work.n_layers]
    first, n_passes = 0, len(ends) - 1
    while first < n_passes:
        end = int(np.searchsorted(ends, ends[first] + _CELLS_AT_ONCE, side="right")) - 1
        end = min(max(end, first + 1), n_passes)
        yield first, end
        first = end


def timeline_of(
    work: LayerSteps, decided: Decisions, prices: Prices, n_pass: int, extras: Extras | None = None
) -> tuple[OffloadProgram, engine.Timeline]:
    """One pass with its timeline, for pictures."""
    part = offload_program(work, decided, prices, (n_pass, n_pass + 1), extras)
    return part, engine.run(part.program)


def _result(
    work: LayerSteps,
    decided: Decisions,
    prices: Prices,
    clocked: tuple[Seconds, Seconds, float, Seconds],
    dropped: npt.NDArray[np.bool_],
) -> OffloadResult:
    pass_s, stall_s, waited, busy = clocked
    tokens = work.passes.tokens
    moved = decided.loads.units[~dropped].sum(dtype=np.int64)
    loaded_bytes = float(moved) * prices.unit_bytes
    ahead = int((decided.loads.kind == PREFETCH).sum())
    return OffloadResult(
        pass_s=pass_s,
        is_decode=work.passes.phase == DECODE,
        pass_tokens=tokens,
        hit_rate=decided.hit_rate,
        bytes_per_token=loaded_bytes / max(1, int(tokens.sum())),
        stall_s=stall_s,
        load_wait_s=waited,
        loads=len(decided.loads.kind) - ahead,
        loads_ahead=ahead,
        wasted=decided.wasted,
        dropped=int(dropped.sum()),
        evictions=decided.evictions,
        cpu_share=_share(decided.place == ON_CPU),
        skipped_share=_share(decided.place == SKIPPED),
        low_share=_share(decided.level == LOW),
        busy_s=busy,
    )


def _share(marked: npt.NDArray[np.bool_]) -> float:
    return float(marked.mean()) if len(marked) else float("nan")


@compiled
def _measure(
    stream: npt.NDArray[np.int32],
    kind: npt.NDArray[np.int8],
    start_s: Seconds,
    end_s: Seconds,
    pass_end: npt.NDArray[np.int64],
    n_gpus: int,
    pass_s: Seconds,
    stall_s: Seconds,
    busy_s: Seconds,
) -> float:
    """Seconds and idle seconds of each pass, seconds of work of each stream; waits for loads."""
    at, began, waited, free, worked = 0, 0.0, 0.0, 0.0, 0.0
    for task in range(len(stream)):
        lasted = end_s[task] - start_s[task]
        busy_s[stream[task]] += lasted
        if stream[task] < n_gpus:
            worked += lasted
            if kind[task] == LOADED_EXPERT:
                waited += max(0.0, start_s[task] - free)
            free = end_s[task]
        if at < len(pass_end) and task == pass_end[at]:
            pass_s[at] = end_s[task] - began
            stall_s[at] = max(0.0, pass_s[at] - worked)
            began, worked = end_s[task], 0.0
            at += 1
    return waited
