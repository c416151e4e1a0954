"""Steps of a real offloading runtime: predicted against measured, by policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.report.figure import PALETTE, drawing

if TYPE_CHECKING:
    from moesim.offload.truth import Compared, Truth

Doubles = npt.NDArray[np.float64]
BAND = 0.10  # of error, drawn in grey


def offload_truth_picture(truth: Truth, path: Path) -> None:
    """Left a dot a token, right the mean step of each policy; steps that count only."""
    points = {name: _ms(of) for name, of in truth.policies.items()}
    with drawing(path, (10.0, 4.8), (1, 2)) as (_, (steps, means)):
        _scatter(steps, points)
        _bars(means, points)
        means.set_title("measured (dark) and predicted (light)")
        steps.set_title(f"median error {truth.overall.median_abs_pct_error:.1f} %")


def _ms(of: Compared) -> Doubles:
    """float64[2, scored]: measured and predicted milliseconds."""
    both = np.stack([of.measured.column("step_s"), of.predicted.clocked.step_s])
    return np.asarray(1e3 * both[:, of.scored])


def _scatter(axes: Any, points: Mapping[str, Doubles]) -> None:
    everything = np.concatenate([both.ravel() for both in points.values()])
    line = np.array([0.9 * everything.min(), 1.05 * everything.max()])
    axes.fill_between(line, line * (1 - BAND), line * (1 + BAND), color="#e8e8e8")
    axes.plot(line, line, color="#999999", linewidth=0.8)
    for (name, both), color in zip(points.items(), PALETTE, strict=False):
        label = f"{name} ({both.shape[1]})"
        axes.scatter(both[0], both[1], s=12, alpha=0.7, linewidths=0, color=color, label=label)
    axes.set(xlabel="measured ms a token", ylabel="predicted ms a token")
    axes.legend(fontsize=8, loc="upper left")


def _bars(axes: Any, points: Mapping[str, Doubles]) -> None:
    for at, ((_, both), color) in enumerate(zip(points.items(), PALETTE, strict=False)):
        for side, (mean, alpha) in enumerate(zip(both.mean(1), (1.0, 0.45), strict=True)):
            axes.bar(at + 0.4 * side - 0.2, mean, width=0.36, color=color, alpha=alpha)
            axes.annotate(f"{mean:.1f}", (at + 0.4 * side - 0.2, mean), ha="center", va="bottom")
    axes.set_xticks(range(len(points)), list(points))
    axes.set_ylabel("mean ms a token")
