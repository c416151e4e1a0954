"""What `moesim trace stats` shows: tables for the terminal, pictures for a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesim.cli import output
from moesim.report import curves, heatmap

if TYPE_CHECKING:
    from traces.routing import ExpertCounts, RoutingTrace
    from traces.stats import TraceStats

    Input = RoutingTrace | ExpertCounts

_WINDOWS = (2, 4, 8, 16, 32, 64, 128)
_MOST_EXPERTS = 512  # above, a transition picture shows nothing a person can see


def show(summary: TraceStats) -> None:
    """The statistics: what was captured, a row per layer, windows, caches."""
    output.facts("", _facts(summary))
    output.table("load of experts, by layer", _LAYER_COLUMNS, _layer_rows(summary))
    if summary.windows:
        output.table(
            "segments of consecutive tokens, all layers",
            ("tokens", "windows", "SRP", "random floor", "distinct experts", "if independent"),
            [
                (w.window_tokens, w.n_windows, w.srp, w.srp_floor, w.working_set,
                 w.working_set_independent)
                for w in summary.windows
            ],
            left=0,
        )  # fmt: skip
    if summary.caches:
        output.table(
            "cache of experts over all layers",
            ("policy", "order", "slots", "slots / (layers k)", "share of experts", "hit rate",
             "misses per token"),
            [
                (c.policy, c.convention, c.slots, c.rho, c.expert_share, c.hit_rate,
                 c.misses_per_token)
                for c in summary.caches
            ],
            left=2,
        )  # fmt: skip


_LAYER_COLUMNS = ("layer", "max / mean", "variation", "entropy", "reuse")


def _facts(summary: TraceStats) -> dict[str, object]:
    facts: dict[str, object] = {
        "kind": summary.kind,
        "model": summary.model or None,
        "capture": summary.capture,
        "experts": summary.n_experts,
        "top-k": summary.top_k or None,
        "MoE layers": len(summary.layers),
    }
    if summary.tokens is not None:
        phases = summary.phases or {}
        facts |= {
            "tokens": summary.tokens,
            "requests": summary.requests,
            **{f"{phase} tokens": count for phase, count in phases.items()},
            "missing cells": summary.missing_cells,
        }
    return facts


def _layer_rows(summary: TraceStats) -> Iterator[tuple[object, ...]]:
    unknown = (None,) * len(summary.layers)
    reuse = unknown if summary.reuse_ratio is None else summary.reuse_ratio.per_layer
    yield from zip(
        (str(layer) for layer in summary.layers),
        summary.max_over_mean.per_layer,
        summary.cv.per_layer,
        summary.entropy.per_layer,
        reuse,
        strict=True,
    )
    mean_reuse = None if summary.reuse_ratio is None else summary.reuse_ratio.mean
    means = (summary.max_over_mean.mean, summary.cv.mean, summary.entropy.mean, mean_reuse)
    yield ("mean", *means)


def write_pictures(trace: Input, folder: Path) -> list[Path]:
    """Load of experts; of a trace with token order also reuse, SRP and transitions."""
    from traces.routing import ExpertCounts
    from traces.stats import load

    counts = load(trace)
    written = [folder / "expert_load.png", folder / "popularity.png"]
    heatmap.expert_load_heatmap(counts, trace.layers, written[0])
    curves.shares_by_rank({trace.model or "trace": counts}, written[1])
    if isinstance(trace, ExpertCounts):
        return written
    return written + _order_pictures(trace, folder)


def _order_pictures(trace: RoutingTrace, folder: Path) -> list[Path]:
    """Pictures of what needs token order."""
    from traces.consistency import srp
    from traces.locality import reuse_ratio

    written = [folder / "reuse.png", folder / "srp.png"]
    curves.reuse_by_layer(reuse_ratio(trace), trace.layers, written[0])
    figures = [srp(trace, window) for window in _WINDOWS]
    curves.srp_by_window(
        _WINDOWS,
        np.array([figure.srp for figure in figures]),
        np.array([figure.floor for figure in figures]),
        written[1],
    )
    if 1 < trace.n_experts <= _MOST_EXPERTS and trace.n_layers > 1:
        written.append(_strongest_transition(trace, folder / "transitions.png"))
    return written


def _strongest_transition(trace: RoutingTrace, path: Path) -> Path:
    """The pair of neighbouring layers whose experts depend on each other most."""
    from traces.locality import transitions

    pairs = transitions(trace).astype(np.float64)
    lift = [float((heatmap.over_chance(pair) * pair).sum() / max(pair.sum(), 1)) for pair in pairs]
    strongest = int(np.argmax(lift))
    layers = (int(trace.layers[strongest]), int(trace.layers[strongest + 1]))
    heatmap.transition_heatmap(pairs[strongest], layers, path)
    return path
