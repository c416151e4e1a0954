"""Fitted operators in pictures: predicted over measured, share of the roofline, error by load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.report.figure import PALETTE, drawing

if TYPE_CHECKING:
    from hwmodels.fitted.parts import Parts
    from hwmodels.fitted.scores import Predicted

Floats = npt.NDArray[np.float64]
MOST_DEVICES = 4  # rows of panels; those with most rows are drawn
LEAST_IN_BIN = 5  # fewer say nothing of a median
LEAST_SHARE = 0.002  # of the roofline; less is not drawn
RATIO_LIMIT = 2.0  # how far over or under the measured time is drawn
_GRID: Mapping[str, Any] = MappingProxyType({"color": "#dddddd", "linewidth": 0.6})
# Parts that are bytes over a datasheet's rate.
_MOVED = ("memory", "cache", "link", "exchange", "away")
_UNITS: Mapping[str, str] = MappingProxyType(
    {
        "gemm": "rows (m)", "experts": "tokens of the batch", "attention_decode": "sequences",
        "latent_decode": "sequences", "attention_prefill": "new tokens, all sequences",
        "latent_prefill": "new tokens, all sequences", "collective": "bytes of the message",
        "exchange_normal": "tokens of a rank", "exchange_low_latency": "tokens of a rank",
    }
)  # fmt: skip


def fit_pictures(predicted: Sequence[Predicted], folder: Path) -> list[Path]:
    """Three pictures, written into a folder; the files.

    raises  SimulationError when no row has a prediction
    """
    if not any(np.isfinite(of.errors).any() for of in predicted):
        raise SimulationError("no predicted row to draw")
    names = ("predicted_over_measured", "roofline_share", "error_by_load")
    drawers = (predicted_over_measured, roofline_share, error_by_load)
    paths = [folder / f"{name}.png" for name in names]
    for draw, path in zip(drawers, paths, strict=True):
        draw(predicted, path)
    return paths


def predicted_over_measured(predicted: Sequence[Predicted], path: Path) -> None:
    """How many rows lie where, both sides logarithmic; a panel a family.

    The ratio stands for the predicted time, so that ten per cent can be seen over six decades.
    """
    families = _by_family(predicted)
    shape = _grid(len(families))
    with drawing(path, (5.4 * shape[1], 4.2 * shape[0]), shape) as (figure, panels):
        for panel, (family, of) in zip(panels, families.items(), strict=False):
            measured, errors = _joined(of)
            bins = panel.hexbin(
                measured, np.clip(1 + errors, 1 / RATIO_LIMIT, RATIO_LIMIT), xscale="log",
                yscale="log", gridsize=(60, 40), bins="log", mincnt=1, cmap="viridis",
                linewidths=0.1,
            )  # fmt: skip
            figure.colorbar(bins, ax=panel, label="rows", pad=0.01)
            _ratio_side(panel)
            _seconds_side(panel)
            _say_clipped(panel, errors)
            panel.set_title(f"{_spoken(family)}: {_summary(errors)}")
            panel.set_xlabel("measured time")
            panel.set_ylabel("predicted / measured")
        _no_more(panels[len(families) :])


def roofline_share(predicted: Sequence[Predicted], path: Path) -> None:
    """Median share of the datasheet's roofline over the load; a panel a device and family.

    Lines are measured medians of each number format, dashes predicted ones; the tint holds
    the middle half of the measured rows.
    """
    cells: dict[tuple[str, str], list[Predicted]] = {}
    for device in _devices(predicted):
        for family, found in _by_family(predicted).items():
            if of_device := [of for of in found if of.rows.device == device]:
                cells[device, family] = of_device
    shape = _grid(len(cells))
    with drawing(path, (5.2 * shape[1], 4.0 * shape[0]), shape) as (_, panels):
        for panel, ((device, family), found) in zip(panels, cells.items(), strict=False):
            _roofline_panel(panel, found)
            panel.set_title(f"{device}: {_spoken(family)}")
        _no_more(panels[len(cells) :])


def error_by_load(predicted: Sequence[Predicted], path: Path) -> None:
    """Quantiles of the error by load; a panel a family."""
    families = _by_family(predicted)
    shape = _grid(len(families))
    with drawing(path, (5.4 * shape[1], 3.9 * shape[0]), shape) as (_, panels):
        for panel, (family, of) in zip(panels, families.items(), strict=False):
            tokens = np.concatenate([one.rows.tokens for one in of])
            errors = 100 * np.concatenate([one.errors for one in of])
            _error_panel(panel, tokens, errors)
            panel.set_title(f"{_spoken(family)}: {_summary(errors / 100)}")
            _load_side(panel, family)
            panel.set_ylabel("error, per cent")
        _no_more(panels[len(families) :])


def _error_panel(panel: Any, tokens: Floats, errors: Floats) -> None:
    at, levels = _quantiles(tokens, errors, (0.1, 0.25, 0.5, 0.75, 0.9))
    panel.fill_between(at, levels[0], levels[4], color=PALETTE[4], alpha=0.3, label="80 % of rows")
    panel.fill_between(at, levels[1], levels[3], color=PALETTE[0], alpha=0.35, label="half of them")
    panel.plot(at, levels[2], color=PALETTE[0], marker="o", markersize=3.5, label="median")
    panel.axhline(0, color="black", linewidth=1)
    for side in (-10, 10):
        panel.axhline(side, color="black", linestyle=":", linewidth=1)
    low, high = levels.min(initial=-15.0), levels.max(initial=15.0)
    panel.set_ylim(low * 1.1, high * 1.1 + 0.15 * (high - low))  # room for the legend
    panel.grid(visible=True, **_GRID)
    panel.legend(fontsize=8, ncols=3, loc="upper center")


def _roofline_panel(panel: Any, found: Sequence[Predicted]) -> None:
    from matplotlib.lines import Line2D

    seen: list[float] = []
    dtypes = sorted({of.rows.dtype for of in found})
    for i, dtype in enumerate(dtypes):
        tokens, measured, expected = _shares([of for of in found if of.rows.dtype == dtype])
        colour = PALETTE[i % len(PALETTE)]
        at, levels = _quantiles(tokens, measured, (0.25, 0.5, 0.75))
        if not len(at):
            continue  # too few rows, or a family without a roofline
        panel.fill_between(at, levels[0], levels[2], color=colour, alpha=0.12, linewidth=0)
        panel.plot(at, levels[1], color=colour, marker="o", markersize=3.5, label=dtype)
        guessed_at, guessed = _quantiles(tokens, expected, (0.5,))
        panel.plot(guessed_at, guessed[0], color=colour, linestyle="--", linewidth=1.6)
        seen += [float(levels[0].min()), float(levels[2].max())]
    if not seen:
        panel.text(0.5, 0.5, "no roofline", ha="center", transform=panel.transAxes)
        return
    _share_side(panel, min(seen), max(seen))
    panel.set_ylabel("share of the roofline")
    _load_side(panel, found[0].rows.family)
    panel.grid(visible=True, **_GRID)
    dashes = Line2D([], [], color="black", linestyle="--", label="predicted")
    handles, _ = panel.get_legend_handles_labels()
    panel.legend(handles=[*handles, dashes], fontsize=8)


def _shares(found: Sequence[Predicted]) -> tuple[Floats, Floats, Floats]:
    """Loads, and the roofline's time over measured and over predicted seconds."""
    from hwmodels.devices import load_device
    from hwmodels.fitted.model import parts_of

    tokens, measured, expected = [], [], []
    for of in found:
        known = np.isfinite(of.prediction.seconds)
        parts = parts_of(of.rows.family, load_device(of.rows.device), of.rows.work)
        at_best = _at_best(parts)[known]
        at_best = np.where(at_best > 0, at_best, np.nan)
        tokens.append(of.rows.tokens[known])
        measured.append(at_best / of.rows.seconds[known])
        expected.append(at_best / of.prediction.seconds[known])
    return np.concatenate(tokens), np.concatenate(measured), np.concatenate(expected)


def _at_best(parts: Parts) -> Floats:
    """Seconds at datasheet rates of the slower of moving the data and computing, float64[n]."""
    moved = sum(parts.memory.get(name, 0.0) for name in _MOVED) + np.zeros(len(parts))
    return np.maximum(moved, parts.compute.get("arithmetic", 0.0))


def _quantiles(loads: Floats, values: Floats, levels: Sequence[float]) -> tuple[Floats, Floats]:
    """Quantiles float64[levels, bins] of values by power of two, at the bins' loads."""
    known = np.isfinite(values) & (loads > 0)
    loads, values = loads[known], values[known]
    power = np.rint(np.log2(np.maximum(loads, 1))).astype(np.int64)
    bins = [p for p in np.unique(power) if (power == p).sum() >= LEAST_IN_BIN]
    found = [np.quantile(values[power == p], levels) for p in bins]
    at = np.exp2(np.array(bins, dtype=np.float64))
    return at, np.array(found, dtype=np.float64).reshape(len(bins), len(levels)).T


def _by_family(predicted: Sequence[Predicted]) -> dict[str, list[Predicted]]:
    found: dict[str, list[Predicted]] = {}
    for of in sorted(predicted, key=lambda one: one.rows.family):
        found.setdefault(of.rows.family, []).append(of)
    return found


def _devices(predicted: Sequence[Predicted]) -> list[str]:
    rows: dict[str, int] = {}
    for of in predicted:
        rows[of.rows.device] = rows.get(of.rows.device, 0) + len(of.rows.seconds)
    return sorted(sorted(rows, key=lambda name: -rows[name])[:MOST_DEVICES])


def _joined(of: Sequence[Predicted]) -> tuple[Floats, Floats]:
    measured = np.concatenate([one.rows.seconds for one in of])
    errors = np.concatenate([one.errors for one in of])
    known = np.isfinite(errors)
    return measured[known], errors[known]


def _summary(errors: Floats) -> str:
    percent = 100 * np.abs(errors[np.isfinite(errors)])
    return f"mean {percent.mean():.1f} %, median {np.median(percent):.1f} %"


def _spoken(family: str) -> str:
    return family.replace("_", " ")


def _grid(n: int) -> tuple[int, int]:
    """(rows, columns) of panels, at most three beside each other."""
    columns = min(n, 3)
    return -(-n // columns), columns


def _no_more(panels: Iterator[Any] | Sequence[Any]) -> None:
    for panel in panels:
        panel.set_axis_off()


def _ratio_side(panel: Any) -> None:
    ticks = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    panel.set_yticks([], minor=True)
    panel.set_ylim(1 / RATIO_LIMIT / 1.03, RATIO_LIMIT * 1.03)
    panel.axhline(1, color="black", linewidth=1)
    for side in (0.9, 1.1):
        panel.axhline(side, color="black", linestyle=":", linewidth=1)


def _seconds_side(panel: Any) -> None:
    low, high = (np.log10(end) for end in panel.get_xlim())
    powers = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    names = {-6: "1 µs", -5: "10 µs", -4: "100 µs", -3: "1 ms", -2: "10 ms", -1: "100 ms", 0: "1 s"}
    ticks = [10.0**power for power in powers]
    panel.set_xticks(ticks, [names.get(p, f"1e{p} s") for p in powers], minor=False)


def _say_clipped(panel: Any, errors: Floats) -> None:
    beyond = int(((1 + errors > RATIO_LIMIT) | (1 + errors < 1 / RATIO_LIMIT)).sum())
    if beyond:
        panel.text(
            0.99, 0.98, f"{beyond:,} of {len(errors):,} beyond the edges", fontsize=8,
            ha="right", va="top", transform=panel.transAxes,
        )  # fmt: skip


def _share_side(panel: Any, least: float, highest: float) -> None:
    """A logarithmic side in per cent."""
    ticks = [digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)]
    low, high = max(least, LEAST_SHARE) / 1.3, max(highest, 1.0) * 1.4
    shown = [tick for tick in ticks if low <= tick <= high]
    panel.set_yscale("log")
    panel.set_yticks(shown, [f"{100 * tick:g} %" for tick in shown], minor=False)
    panel.set_yticks([], minor=True)
    panel.set_ylim(low, high)
    panel.axhline(1, color="black", linewidth=1)


def _load_side(panel: Any, family: str) -> None:
    """A logarithmic side with powers of two in plain figures."""
    panel.set_xscale("log", base=2)
    low, high = (int(np.rint(np.log2(max(end, 1)))) for end in panel.get_xlim())
    step = max(1, -(-(high - low) // 7))
    ticks = [2.0**power for power in range(max(low, 0), high + 1, step)]
    panel.set_xticks(ticks, [_short(tick) for tick in ticks], minor=False)
    panel.set_xlabel(_UNITS.get(family, "tokens"))


def _short(number: float) -> str:
    """1024 as 1k, 2^20 as 1M, 2^30 as 1G."""
    for size, unit in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
