"""What a residency study says: the JSON document, the plan file and the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.placement_report import versions
from moesim.residency_candidates import ResidencyOptions
from moesim.residency_study import ResidencyStudy
from planners.residency_file import CacheEntry, ResidencyFile, ResidentLayer, TierEntry
from traces.model import ModelSpec

Document = dict[str, Any]
_FIGURES = (
    *("tokens_per_s", "hit_rate", "bytes_per_token", "stall_s_per_token"),
    *("joules_per_token", "cpu_share", "device_bytes"),
)
KINDS: Mapping[str, str] = {
    "tokens_per_s": "analytic",
    "stall_s_per_token": "analytic",
    "hit_rate": "measured",
    "bytes_per_token": "measured",
    "joules_per_token": "assumed",
    "device_bytes": "analytic",
}
"""How each figure is known: routing is replayed as captured, times and bytes follow from shapes."""


def study_document(study: ResidencyStudy, inputs: Mapping[str, Any]) -> Document:
    """The record of a study: every figure by candidate, on the unseen tokens."""
    figures = {name: outcome.figures for name, outcome in study.outcomes.items()}
    n_experts, top_k = study.activations.shape[1], int(inputs["top_k"])
    gain = study.gain
    return {
        **{key: {name: figure[key] for name, figure in figures.items()} for key in _FIGURES},
        "prefill_tokens_per_s": _rates(study, "prefill_tokens_per_s"),
        "decode_tokens_per_s": _rates(study, "decode_tokens_per_s"),
        "verdict": study.verdict,
        "reason": study.reason,
        "compared_with": study.current,
        "gain": {"mean": gain.mean, "low": gain.low, "high": gain.high, "requests": gain.n_steps},
        "regret": study.regret,
        "over_belady": study.to_belady,
        "lower_bound_s": study.residency.bound,
        "planned_s": study.residency.seconds,
        "gap": study.residency.gap,
        "solve_seconds": study.solve_seconds,
        "pin_share": study.pin_share,
        "pinned_experts": int(study.pinned.sum()),
        "slots": study.slots.tolist(),
        "slots_that_fit_per_layer": study.slots_per_layer,
        "rho": study.slots_per_layer / top_k,
        "share_of_experts": study.slots_per_layer / n_experts,
        "random_floor": study.random_floor,
        "knee_slots": study.knee,
        "hit_curve": study.hit_curve.tolist(),
        "lru_hit_rate_by_convention": dict(study.lru_hits),
        "memory": {
            tier.name: {"capacity_bytes": tier.capacity_bytes, "used_bytes": int(used)}
            for tier, used in zip(study.tiers, study.residency.used_bytes, strict=True)
        },
        "kv_bytes": study.footprint.all_kv_bytes,
        "left_out": dict(study.left_out),
        "planned_tokens": study.planned_tokens,
        "judged_tokens": study.judged_tokens,
        "kinds": dict(KINDS),
        "inputs": dict(inputs),
        "versions": versions(),
    }


def _rates(study: ResidencyStudy, name: str) -> dict[str, float]:
    return {key: getattr(outcome.result, name) for key, outcome in study.outcomes.items()}


def plan_file(
    study: ResidencyStudy, model: ModelSpec, options: ResidencyOptions, document: Document
) -> ResidencyFile:
    """The neutral plan of a study, with the figures it promises."""
    where, foot = study.residency, study.footprint
    rows = {layer: column for column, layer in enumerate(model.moe_layers)}
    load = study.activations / study.activations.sum(axis=1, keepdims=True).clip(1e-300)
    cache_bytes = int(study.slots.sum()) * foot.expert_bytes
    room = [cache_bytes] + [0] * (len(study.tiers) - 1)
    return ResidencyFile(
        model=model.name,
        n_experts=model.n_experts,
        top_k=model.top_k,
        expert_bytes=foot.expert_bytes,
        tiers=[
            TierEntry(
                name=tier.name,
                kind=tier.kind,  # type: ignore[arg-type]  # pydantic checks it
                capacity_bytes=tier.capacity_bytes + more,
                used_bytes=int(used) + more,
            )
            for tier, used, more in zip(study.tiers, where.used_bytes, room, strict=True)
        ],
        layers=[
            ResidentLayer(
                layer=layer,
                kind="moe" if layer in rows else "dense",
                attention_tier=int(where.attention_tier[layer]),
                expert_tier=where.expert_tier[rows[layer]].tolist() if layer in rows else [],
                expert_bits=where.expert_bits[rows[layer]].tolist() if layer in rows else [],
                load=load[rows[layer]].tolist() if layer in rows else [],
            )
            for layer in range(model.n_layers)
        ],
        cache=CacheEntry(
            slots=study.slots.tolist() if study.slots.any() else [],
            policy="lru" if study.slots.any() else "",
            on_miss={"cpu": "cpu", "hss": "split", "threshold": "split"}.get(  # type: ignore[arg-type]
                study.on_miss, "load"
            ),
        ),
        kv_bytes=foot.all_kv_bytes,
        inputs=document["inputs"],
        figures={
            key: document[key]
            for key in ("tokens_per_s", "hit_rate", "bytes_per_token", "gain", "regret", "gap")
        },
        verdict=study.verdict,
        versions=document["versions"],
        seed=options.seed,
    )


def write_pictures(study: ResidencyStudy, model: ModelSpec, folder: Path) -> list[Path]:
    """Hit-rate curve, residency map and candidates, as PNG files."""
    from moesim.report.residency_pictures import candidate_bars, hit_rate_curve, residency_map

    curve, where, bars = (
        folder / name for name in ("hit_curve.png", "residency.png", "tokens_per_s.png")
    )
    hit_rate_curve(study.hit_curve, study.knee, study.slots_per_layer, curve)
    names = [tier.name for tier in study.tiers]
    residency_map(study.residency.expert_tier, study.slots, names, model.moe_layers, where)
    speed = {name: outcome.result.tokens_per_s for name, outcome in study.outcomes.items()}
    candidate_bars(speed, study.current, bars)
    return [bars, curve, where]
