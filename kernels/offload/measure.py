"""Calibrate this machine and run a trace under several policies; one JSON-able answer.

Everything takes turns: some tokens of each policy, then some calibration, again and again. A
machine that is shared changes its speed by several per cent within seconds; so all see the same.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moesim_kernels.bench import timing
from moesim_kernels.errors import KernelError
from moesim_kernels.offload.calibrate import Calibration, Costs
from moesim_kernels.offload.memory import huge_pages, require_memory
from moesim_kernels.offload.policy import POLICIES
from moesim_kernels.offload.robbed import CALM
from moesim_kernels.offload.run import (
    AnyIds,
    Measured,
    RunOptions,
    Session,
    checked_ahead,
    checked_ids,
)
from moesim_kernels.offload.stack import Stack, StackSpec, open_stack
from moesim_kernels.offload.storage import require_kind

SCHEMA = 1
DECIDED = ("hits", "misses", "prefetched")  # the same in every round, whatever the time
TIMED = ("step_s", "stall_s", "busy_s", "robbed_s", "late", "dropped", "bytes_read")
Tell = Callable[[dict[str, object]], None]


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What to run.

    slots     of each layer; warm_up, tokens at the beginning that fill them and are not timed
    rounds    how often the same tokens are timed; chunk, tokens of a policy before the next's turn
    tier      one of storage.KINDS
    folder    where the experts' file is written, None: the system's for temporary files; keep it
    """

    spec: StackSpec = field(default_factory=StackSpec)
    policies: Sequence[str] = POLICIES
    slots: int = 12
    warm_up: int = 256
    rounds: int = 3
    chunk: int = 8
    tier: str = "auto"
    folder: Path | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "chunk"):
            if (value := getattr(self, name)) < 1:
                raise KernelError(f"{name}={value}, expected at least 1")
        if unknown := [name for name in self.policies if name not in POLICIES]:
            raise KernelError(f"policy={unknown[0]!r}, expected some of {', '.join(POLICIES)}")
        if not self.policies:
            raise KernelError("policies: none, expected at least one")


def measure(
    topk: AnyIds,
    predicted: AnyIds | None = None,
    options: MeasureOptions | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Run the tokens under each policy in rounds, calibrating between; a dict of JSON values.

    topk, predicted  as `run_stack` takes them; predicted is needed by `lru_prefetch`
    tell             is told each event, a dict with `event`: `stack`, then `turn` (round, done, of)
    returns          `costs`: fields of `calibrate.Costs`
                     `policies`: by name, each field as in `run.Measured`: [tokens] of `step_s`,
                     `stall_s`, `busy_s`, `robbed_s`, `late`, `dropped`, `bytes_read`, the median
                     over the calm rounds of the token (the calmest where none is); [tokens][layers]
                     of `hits`, `misses`, `prefetched`; [rounds][tokens] of `round_step_s`,
                     `round_robbed_s`; `hit_rate`, `buffer_bytes`
                     `calm_share`: of a step, what may be robbed of a calm one
                     `same_outputs`: whether all runs computed the same, bit for bit
                     `tier`, `environment`, and the options
    raises           KernelError naming what does not fit, before anything is written
    """
    options = MeasureOptions() if options is None else options
    tell = (lambda event: None) if tell is None else tell
    _check(topk, predicted, options)
    began, preempted = time.monotonic(), _preemptions()
    with open_stack(options.spec, options.folder, keep=options.keep) as stack:
        tell({"event": "stack", "bytes": options.spec.file_bytes, "reused": stack.reused})
        n_slots = options.spec.n_layers * options.slots
        with Calibration(stack, n_slots, options.tier) as calibration:
            rounds = [
                _round(stack, topk, predicted, options, _Turns(calibration, tell, number))
                for number in range(options.rounds)
            ]
            costs = calibration.costs()
    seconds = time.monotonic() - began
    by_policy = {name: [of_round[name] for of_round in rounds] for name in options.policies}
    first = rounds[0][options.policies[0]]
    return {
        "schema": SCHEMA, "stack": asdict(options.spec), "tier": first.tier,
        "slots": options.slots, "warm_up": options.warm_up, "rounds": options.rounds,
        "chunk": options.chunk, "n_tokens": len(first.step_s), "calm_share": CALM,
        "costs": _costs_json(costs),
        "policies": {name: _policy_json(runs) for name, runs in by_policy.items()},
        "same_outputs": all(
            torch.equal(run.outputs, first.outputs) for runs in by_policy.values() for run in runs
        ),
        "environment": _environment(seconds, _preemptions() - preempted),
    }  # fmt: skip


def _check(topk: AnyIds, predicted: AnyIds | None, options: MeasureOptions) -> None:
    """Refuse, before anything is written, what would be refused later."""
    spec, n_policies = options.spec, len(options.policies)
    ids = checked_ids(spec, topk, options.slots, options.warm_up)
    needed = "lru_prefetch" in options.policies
    checked_ahead(spec, predicted, ids, options.slots, needed=needed)
    require_kind(options.tier)
    if options.tier != "pinned":
        held = (n_policies + 1) * options.slots + (n_policies + 2) * spec.top_k  # at most
        require_memory(held * spec.n_layers * spec.expert_bytes, "the slots of all policies")


@dataclass(frozen=True, slots=True)
class _Turns:
    calibration: Calibration
    tell: Tell
    round: int


def _round(
    stack: Stack,
    topk: AnyIds,
    predicted: AnyIds | None,
    options: MeasureOptions,
    turns: _Turns,
) -> dict[str, Measured]:
    """Each policy from the beginning to the end, a chunk of tokens at a time."""
    run_options = RunOptions(options.warm_up, options.tier)
    with ExitStack() as held:
        sessions = {
            name: held.enter_context(
                Session(stack, topk, name, options.slots, predicted, run_options)
            )
            for name in options.policies
        }
        n_tokens = len(topk) - options.warm_up
        for done in range(0, n_tokens, options.chunk):
            turns.calibration.sample()
            for session in sessions.values():
                session.advance(options.chunk)
            done = min(done + options.chunk, n_tokens)
            turns.tell({"event": "turn", "round": turns.round, "done": done, "of": n_tokens})
        return {name: session.measured() for name, session in sessions.items()}


def _policy_json(runs: Sequence[Measured]) -> dict[str, Any]:
    first = runs[0]
    for name in DECIDED:
        if any((getattr(run, name) != getattr(first, name)).any() for run in runs):
            raise RuntimeError(f"{first.policy}: {name} differ between rounds")
    columns = {name: np.stack([_per_token(run, name) for run in runs]) for name in TIMED}
    return {
        "hit_rate": first.hit_rate, "buffer_bytes": first.buffer_bytes,
        **{name: _of_calm_rounds(column, columns).tolist() for name, column in columns.items()},
        "round_step_s": columns["step_s"].tolist(),
        "round_robbed_s": columns["robbed_s"].tolist(),
        **{name: getattr(first, name).tolist() for name in DECIDED},
    }  # fmt: skip


def _of_calm_rounds(column: Any, columns: Mapping[str, Any]) -> Any:
    """Per token the median over its calm rounds; where there is none, the least robbed round."""
    share = columns["robbed_s"] / columns["step_s"]
    kept = share <= np.maximum(CALM, share.min(axis=0))
    return np.nanmedian(np.where(kept, column, np.nan), axis=0)


def _per_token(run: Measured, name: str) -> Any:
    column = getattr(run, name)
    return column if column.ndim == 1 else column.sum(axis=1)


def _costs_json(costs: Costs) -> dict[str, Any]:
    """Keys of JSON are text."""
    return {name: _with_text_keys(value) for name, value in asdict(costs).items()}


def _with_text_keys(value: Any) -> Any:
    return {str(key): of for key, of in value.items()} if isinstance(value, Mapping) else value


def _environment(seconds: float, preempted: int) -> dict[str, object]:
    return {
        "device": timing.cpu(), "software": timing.software(), "seconds": round(seconds, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "huge_pages": huge_pages(), "preemptions_per_s": round(preempted / seconds, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }  # fmt: skip


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
