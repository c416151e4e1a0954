"""Curves of trace statistics, each beside what chance would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesim.report.figure import PALETTE, drawing, few_ticks

Floats = npt.NDArray[np.float64]


def reuse_by_layer(ratio: Floats, layers: Sequence[int], path: Path) -> None:
    """How much more often consecutive tokens share experts than independent ones, by layer.

    ratio  float64[layers], nan where unknown
    """
    with drawing(path, (8.0, 3.8)) as (_, (panel,)):
        place = np.arange(len(layers))
        panel.plot(place, ratio, marker="o", markersize=4, color=PALETTE[0], label="trace")
        panel.axhline(1.0, color=PALETTE[7], linestyle="--", label="independent tokens")
        known = ratio[~np.isnan(ratio)]
        mean = f"{known.mean():.2f}x" if len(known) else "unknown"
        panel.set_title(f"Consecutive tokens share experts {mean} as often as independent ones")
        panel.set_xlabel("layer")
        panel.set_ylabel("shared experts / independent")
        panel.set_xticks(*few_ticks(tuple(layers), 20))
        panel.set_ylim(bottom=min(0.9, *known, 1.0) if len(known) else 0.0)
        panel.legend()


def srp_by_window(windows: Sequence[int], srp: Floats, floor: Floats, path: Path) -> None:
    """Segment routing best performance against its random floor, by window length.

    windows  tokens of a segment, increasing
    srp      float64[windows], nan where no request is long enough
    floor    float64[windows], of independent even routing
    """
    with drawing(path, (8.0, 4.0)) as (_, (panel,)):
        panel.plot(windows, srp, marker="o", color=PALETTE[0], label="trace")
        panel.plot(
            windows, floor, marker="s", linestyle="--", color=PALETTE[7], label="random floor"
        )
        panel.fill_between(windows, floor, srp, where=srp >= floor, color=PALETTE[4], alpha=0.25)
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(windows), [str(window) for window in windows])
        panel.set_ylim(0.0, 1.0)
        gap = srp - floor
        best = f"{np.nanmax(gap):.2f}" if np.isfinite(gap).any() else "unknown"
        panel.set_title(f"A few experts serve a segment: up to {best} above chance")
        panel.set_xlabel("tokens in a segment")
        panel.set_ylabel("SRP (best F1 of one set per segment)")
        panel.legend()


def shares_by_rank(counts: Mapping[str, Floats], path: Path) -> None:
    """Share of all choices that the most chosen experts take, a curve for each set of counts.

    counts  name to float64[layers, n_experts]; layers are averaged after sorting each
    """
    with drawing(path, (8.0, 4.2)) as (_, (panel,)):
        for i, (name, count) in enumerate(counts.items()):
            ordered = -np.sort(-count, axis=1)
            total = np.maximum(ordered.sum(axis=1, keepdims=True), 1e-300)
            share = np.concatenate([[0.0], (np.cumsum(ordered, axis=1) / total).mean(axis=0)])
            panel.plot(np.linspace(0, 1, len(share)), share, color=PALETTE[i % 9], label=name)
        panel.plot([0, 1], [0, 1], color=PALETTE[7], linestyle="--", label="even")
        panel.set(xlim=(0, 1), ylim=(0, 1.01))
        panel.set_title("Share of choices that the most chosen experts take")
        panel.set_xlabel("share of experts, most chosen first")
        panel.set_ylabel("share of choices")
        panel.legend(loc="lower right")
