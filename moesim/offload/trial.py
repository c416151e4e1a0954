"""One trial: a trace, a box and a policy by name -> every figure that belongs together."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from hwmodels.device import Device
from moesim.errors import SimulationError
from moesim.lower.offload import Extras
from moesim.offload.built_in import decide_built_in, hooks_for
from moesim.offload.decide import Hooks, decide
from moesim.offload.decisions import ON_PIM, Decisions
from moesim.offload.drive import cold_reads
from moesim.offload.energy import joules_of
from moesim.offload.memory import Footprint, check_below
from moesim.offload.pim import with_pim
from moesim.offload.policy import CACHES, OffloadPolicy
from moesim.offload.prices import Prices
from moesim.offload.simulate import OffloadResult, run
from moesim.policies import prefetch as predictors
from moesim.policies.prefetch import Predictions
from traces.layer_steps import LayerSteps
from traces.model import ModelSpec
from traces.replay import CONVENTIONS, POLICIES, replay_trace
from traces.routing import RoutingTrace

PREFETCHES = ("none", "next-gate", "previous-token", "transitions", "popularity", "activation-map")


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried.

    cache      a name in CACHES, or FILE.py:CLASS, a class of one's own (moesim/policies/cache.py)
               that is called with the LayerSteps
    prefetch   a name in PREFETCHES; recall: of next-gate, None for what is published of the model
    distance   layer-steps ahead at which predictions are known
    pim        a PIM stack in the devices' memory and how many each has, None for none
    """

    policy: OffloadPolicy
    cache: str = "lru"
    prefetch: str = "none"
    recall: float | None = None
    distance: int = 1
    seed: int = 0
    pim: tuple[Device, int] | None = None
    weight_bits: float = 16.0


def try_out(
    trial: Trial,
    model: ModelSpec,
    prices: Prices,
    work: LayerSteps,
    foot: Footprint,
    request: npt.NDArray[np.int32],
) -> tuple[Decisions, dict[str, Any]]:
    """Decisions and figures of one trial.

    request  int32[n_passes], request of each pass
    raises   SimulationError for unknown names, or a policy that does not fit the model or trace
    """
    predicted = predictions(trial, model, work, request)
    decided = _decide(trial, work, prices, predicted)
    held = check_below(prices.box, foot, resident_experts(trial.policy, work) * foot.expert_bytes)
    extras = cold_reads(work, decided, held) if held < work.n_objects else Extras()
    if trial.pim is not None:
        decided, beside = with_pim(work, decided, prices, model, trial.pim, trial.weight_bits)
        extras = replace(extras, pim_s=beside.pim_s)
    result = run(work, decided, prices, extras)
    joules = joules_of(model, prices, work, decided, result)
    figures = _figures(result, work, trial)
    figures["pim_share"] = float((decided.place == ON_PIM).mean()) if len(decided.place) else 0.0
    figures["joules_per_token"] = joules.total_j_per_token
    figures["device_bytes"] = (
        foot.dense_bytes
        + foot.all_kv_bytes
        + resident_experts(trial.policy, work) * foot.expert_bytes
    )
    if predicted is not None:
        found = predictors.accuracy(work, predicted)
        figures["recall"] = _mean(found.recall)
        figures["precision"] = _mean(found.precision)
    return decided, figures


def predictions(
    trial: Trial, model: ModelSpec, work: LayerSteps, request: npt.NDArray[np.int32]
) -> Predictions | None:
    """The predictor's names for every layer-step, None for no prefetch."""
    if trial.prefetch == "none":
        return None
    if trial.prefetch not in PREFETCHES:
        raise SimulationError(
            f"prefetch {trial.prefetch!r} is unknown, known: {', '.join(PREFETCHES)}"
        )
    recall: Any = trial.recall
    if recall is None:
        recall = predictors.next_gate_recall(model.name, work.n_layers)
    make: Mapping[str, Callable[[], Predictions]] = MappingProxyType(
        {
            "next-gate": lambda: predictors.oracle(work, recall, seed=trial.seed),
            "previous-token": lambda: predictors.previous_token(work),
            "transitions": lambda: predictors.transitions(work),
            "popularity": lambda: predictors.popularity(work, 2 * work.top_k),
            "activation-map": lambda: predictors.activation_map(work, request),
        }
    )
    return make[trial.prefetch]().known_at(trial.distance)


def resident_experts(policy: OffloadPolicy, work: LayerSteps) -> int:
    """Experts the device holds at most: slots and pins."""
    pinned = 0 if policy.pinned is None else int(policy.pinned.sum())
    slots = policy.capacity(work.n_layers)
    most = work.n_experts if len(slots) > 1 else work.n_objects
    return pinned + int(np.minimum(slots // policy.units_high, most).sum())


def _decide(
    trial: Trial, work: LayerSteps, prices: Prices, predicted: Predictions | None
) -> Decisions:
    times = prices.unit_times()
    if ":" not in trial.cache:
        if trial.cache not in CACHES:
            raise SimulationError(
                f"cache {trial.cache!r} is unknown, known: {', '.join(CACHES)}, or FILE.py:CLASS"
            )
        return decide_built_in(work, replace(trial.policy, cache=trial.cache), times, predicted)
    hooks = hooks_for(work, trial.policy, times)
    own = Hooks(cache=own_cache(trial.cache)(work), dispatch=hooks.dispatch)
    return decide(work, trial.policy, own, predicted)


def own_cache(text: str) -> Callable[[LayerSteps], Any]:
    """The class named by FILE.py:CLASS; it is the user's own code and is run."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SimulationError(f"cache {text}: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, name, None)
    needed = ("use", "insert", "evict", "victim")
    missing = [method for method in needed if not hasattr(made, method)]
    if made is None or missing:
        raise SimulationError(
            f"cache {text}: expected a class {name} with {', '.join(missing or needed)}"
        )
    return made  # type: ignore[no-any-return]


def _figures(result: OffloadResult, work: LayerSteps, trial: Trial) -> dict[str, Any]:
    """Everything a run is judged by, together."""
    tokens = float(result.pass_tokens.sum())
    slots = trial.policy.capacity(work.n_layers)
    in_layer = float(slots.sum()) / trial.policy.units_high / work.n_layers
    return {
        "tokens_per_s": result.tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "hit_rate": result.hit_rate,
        "bytes_per_token": result.bytes_per_token,
        "stall_s_per_token": result.stall_s_per_token,
        "load_wait_s_per_token": result.load_wait_s / tokens,
        "loads_per_token": result.loads / tokens,
        "loads_ahead_per_token": result.loads_ahead / tokens,
        "useful_ahead_share": _useful(result),
        "evictions_per_token": result.evictions / tokens,
        "cpu_share": result.cpu_share,
        "skipped_share": result.skipped_share,
        "low_bits_share": result.low_share,
        "rho": in_layer / work.top_k,
        "share_of_experts": in_layer / work.n_experts,
        "pass_s": {f"p{q}": float(np.quantile(result.pass_s, q / 100)) for q in (50, 95, 99)},
    }


def _useful(result: OffloadResult) -> float | None:
    return 1.0 - result.wasted / result.loads_ahead if result.loads_ahead else None


def _mean(by_layer: npt.NDArray[np.float64]) -> float:
    known = by_layer[np.isfinite(by_layer)]
    return float(known.mean()) if len(known) else float("nan")


def hit_rates_by_convention(trial: Trial, routing: RoutingTrace) -> dict[str, float]:
    """Hit rate of the same cache in timeless replay, by each lookup convention of published work.

    For caches that replay knows, with equal slots in every layer; empty for others. The simulated
    loop's own rate differs: it looks all experts of a token up at once and spares them.
    """
    policy = trial.policy
    slots = policy.capacity(routing.n_layers) // policy.units_high
    known = trial.cache in POLICIES and policy.pinned is None and bool((slots == slots[0]).all())
    if not known or slots[0] < 1 or trial.prefetch != "none":
        return {}
    scope = "per_layer" if len(slots) > 1 else "global"
    return {
        convention: replay_trace(routing, int(slots[0]), trial.cache, convention, scope).hit_rate
        for convention in CONVENTIONS
    }
