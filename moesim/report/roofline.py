"""The roofline of a device: what memory and arithmetic allow, and what operations reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hwmodels.units import format_quantity
from moesim.errors import SimulationError
from moesim.report.figure import PALETTE, drawing

_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True, slots=True)
class Roofs:
    """What a device allows at best; bytes_per_s of memory, flop_per_s by dtype."""

    device: str
    bytes_per_s: float
    flop_per_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Points:
    """Operations of growing size: flop_per_byte and flop_per_s, float64[points], and texts."""

    name: str
    flop_per_byte: npt.NDArray[np.float64]
    flop_per_s: npt.NDArray[np.float64]
    labels: Sequence[str]


def roofline(roofs: Roofs, points: Sequence[Points], path: Path) -> None:
    """Roofs of a device with series of operations below them, both axes logarithmic.

    raises  SimulationError when the device has no compute roof
    """
    if not roofs.flop_per_s:
        raise SimulationError(f"device {roofs.device}: no compute figure, nothing to draw")
    peaks = _distinct_peaks(roofs.flop_per_s)
    ridge = max(peaks) / roofs.bytes_per_s
    known = [p for series in points for p in series.flop_per_byte]
    low, high = min([1.0, *known]) / 2, max([ridge, *known]) * 4
    with drawing(path, (9.0, 5.6)) as (_, (panel,)):
        _memory_roof(panel, roofs, low, max(peaks))
        for i, (peak, names) in enumerate(peaks.items()):
            span = (peak / roofs.bytes_per_s, high)
            _compute_roof(panel, span, peak, (names, _LINES[i % 4]))
        for i, series in enumerate(points):
            _series(panel, series, PALETTE[(5 + i) % len(PALETTE)])
        panel.set(xscale="log", yscale="log", xlim=(low, high))
        panel.set_ylim(top=max(peaks) * 2.2)
        panel.set_xlabel("arithmetic per byte of memory traffic (FLOP/byte)")
        panel.set_ylabel("FLOP/s")
        panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        panel.set_title(f"{roofs.device}: needs {ridge:,.0f} FLOP/byte to reach its peak")
        if points:
            panel.legend(loc="lower right")


def _distinct_peaks(flop_per_s: Mapping[str, float]) -> dict[float, str]:
    """Peak to the dtypes that share it, lowest first."""
    peaks: dict[float, list[str]] = {}
    for dtype, peak in sorted(flop_per_s.items(), key=lambda item: (item[1], item[0])):
        peaks.setdefault(peak, []).append(dtype)
    return {peak: ", ".join(names) for peak, names in peaks.items()}


def _memory_roof(panel: Any, roofs: Roofs, low: float, top: float) -> None:
    ridge = top / roofs.bytes_per_s
    x = np.array([low, ridge])
    panel.plot(x, x * roofs.bytes_per_s, color=PALETTE[0], linewidth=2)
    at = low * (ridge / low) ** 0.45
    panel.annotate(
        f"memory {format_quantity(roofs.bytes_per_s, 'B/s')}",
        (at, at * roofs.bytes_per_s),
        xytext=(-8, 2),
        textcoords="offset points",
        color=PALETTE[0],
        ha="right",
    )


def _compute_roof(
    panel: Any, span: tuple[float, float], peak: float, style: tuple[str, str]
) -> None:
    names, line = style
    panel.plot(span, [peak, peak], color="black", linestyle=line, linewidth=1.4)
    panel.annotate(
        f"{names}\n{peak / 1e12:,.4g} TFLOP/s",
        (span[1], peak),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        annotation_clip=False,
    )


def _series(panel: Any, series: Points, colour: str) -> None:
    panel.plot(
        series.flop_per_byte,
        series.flop_per_s,
        marker="o",
        markersize=4,
        color=colour,
        label=series.name,
    )
    for x, y, label in zip(series.flop_per_byte, series.flop_per_s, series.labels, strict=True):
        panel.annotate(
            label,
            (x, y),
            xytext=(6, -10),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
