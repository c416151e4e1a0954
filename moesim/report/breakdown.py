"""Where a step's time goes, placement by placement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moesim.errors import SimulationError
from moesim.report.figure import PALETTE, drawing, time_unit

_LEAST_LABELLED = 0.06  # share of the longest bar that a part needs to carry its figure
_HEIGHT = 0.68  # of a bar, where bars are 1 apart
_DARK = frozenset({PALETTE[0], PALETTE[2], PALETTE[5], PALETTE[8]})
_HIDDEN: Mapping[str, Any] = MappingProxyType(
    {"facecolor": "white", "edgecolor": "black", "hatch": "////", "alpha": 0.8}
)


def step_breakdown(parts: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Stacked bars of step time by component, a bar for each placement, with totals.

    parts   placement name to component to seconds per step; a negative component is time that
            was hidden behind the others and is drawn as an empty piece before the bar's end
    raises  SimulationError when parts is empty
    """
    if not parts:
        raise SimulationError("parts: empty, expected at least one placement")
    components = _components(parts)
    longest = max(sum(s for s in part.values() if s > 0) for part in parts.values())
    factor, unit = time_unit(longest)
    with drawing(path, (9.5, 2.0 + 0.42 * len(parts))) as (figure, (panel,)):
        for row, part in enumerate(parts.values()):
            _bar(panel, row, part, (components, factor, longest))
            _total(panel, row, part, (unit, factor, longest))
        panel.set_yticks(range(len(parts)), list(parts))
        panel.invert_yaxis()
        panel.set_xlim(0, longest * factor * 1.2)
        panel.set_xlabel(f"time of a step, mean ({unit})")
        panel.set_title(_headline(parts))
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        handles = _legend(components, parts)
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))


def _components(parts: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Every component that takes time somewhere, in order of first mention, to its colour."""
    names = dict.fromkeys(name for part in parts.values() for name in part)
    used = [name for name in names if any(part.get(name, 0.0) > 0 for part in parts.values())]
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(used)}


def _bar(
    panel: Any,
    row: int,
    part: Mapping[str, float],
    scale: tuple[Mapping[str, str], float, float],
) -> None:
    """The pieces of one bar, one after the other, wide ones with their figure."""
    colours, factor, longest = scale
    total, left = sum(part.values()), 0.0
    for name, colour in colours.items():
        seconds = max(part.get(name, 0.0), 0.0)
        panel.barh(row, seconds * factor, left=left * factor, color=colour, height=_HEIGHT)
        middle, wide = left + seconds / 2, _LEAST_LABELLED * longest
        left += seconds
        if seconds > wide and middle < total - wide / 2:  # under the hatching it is unreadable
            panel.text(
                middle * factor,
                row,
                f"{seconds * factor:.3g}",
                ha="center",
                va="center",
                color="white" if colour in _DARK else "black",
                fontsize=9,
            )


def _total(
    panel: Any, row: int, part: Mapping[str, float], scale: tuple[str, float, float]
) -> None:
    """The bar's total beside it; what overlap hid is hatched."""
    unit, factor, longest = scale
    end, total = sum(s for s in part.values() if s > 0), sum(part.values())
    text = f"{total * factor:.3g} {unit}"
    if total < end:
        panel.barh(row, (end - total) * factor, left=total * factor, height=_HEIGHT, **_HIDDEN)
        text += f" ({(end - total) * factor:.2g} hidden)"
    panel.text((end + 0.01 * longest) * factor, row, text, va="center", fontweight="bold")


def _legend(colours: Mapping[str, str], parts: Mapping[str, Mapping[str, float]]) -> list[Any]:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    if any(seconds < 0 for part in parts.values() for seconds in part.values()):
        handles.append(Patch(label="hidden by overlap", **_HIDDEN))
    return handles


def _headline(parts: Mapping[str, Mapping[str, float]]) -> str:
    """What is seen: the fastest placement, and by how much against the first."""
    totals = {name: sum(part.values()) for name, part in parts.items()}
    best, first = min(totals, key=totals.__getitem__), next(iter(totals))
    if best == first or totals[first] <= 0:
        return f"Where a step's time goes: {best}"
    saved = 1 - totals[best] / totals[first]
    return f"Where a step's time goes: {best} takes {saved:.1%} less than {first}"
