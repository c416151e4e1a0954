"""Pictures of a residency study: hit-rate curve, where experts live, tokens/s of candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesim.report.figure import PALETTE, drawing, few_ticks

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


def hit_rate_curve(curve: Floats, knee: int, slots: int, path: Path) -> None:
    """Hit rate of an LRU cache against its slots in every layer, beside chance.

    curve  float64[experts + 1]; knee and slots are places in it
    """
    n = len(curve) - 1
    with drawing(path, (8.0, 4.2)) as (_, (panel,)):
        panel.plot(np.arange(n + 1), curve, color=PALETTE[0], label="LRU, unseen tokens")
        panel.plot([0, n], [0, 1], color=PALETTE[7], linestyle="--", label="random routing")
        panel.plot([knee], [curve[knee]], "o", color=PALETTE[5], label=f"knee: {knee} slots")
        panel.axvline(slots, color=PALETTE[2], label=f"what fits: {slots} slots")
        panel.set(xlim=(0, n), ylim=(0, 1.01))
        panel.set_title(f"With {slots} of {n} experts a layer LRU serves {curve[slots]:.0%}")
        panel.set_xlabel("slots in every layer")
        panel.set_ylabel("hit rate")
        panel.legend(loc="lower right")


def residency_map(
    tier: Longs, slots: Longs, names: Sequence[str], layers: Sequence[int], path: Path
) -> None:
    """Tier of every expert, and the free slots of every layer beside it.

    tier   int64[layers, experts], index into names; slots: int64[layers]
    """
    from matplotlib.colors import ListedColormap

    height = min(12.0, 2.0 + 0.16 * len(layers))
    with drawing(path, (10.0, height), (1, 2)) as (figure, (panel, bars)):
        colours = ListedColormap([PALETTE[i] for i in (0, 4, 7, 1)][: len(names)])
        image = panel.imshow(
            tier, aspect="auto", interpolation="nearest", cmap=colours,
            vmin=-0.5, vmax=len(names) - 0.5,
        )  # fmt: skip
        held = float((tier == 0).mean())
        panel.set_title(f"{held:.0%} of the experts are pinned in {names[0]}")
        panel.set_xlabel("expert")
        panel.set_ylabel("layer")
        panel.set_yticks(*few_ticks(tuple(layers)))
        bar = figure.colorbar(image, ax=panel, ticks=range(len(names)))
        bar.ax.set_yticklabels(list(names))
        bars.barh(np.arange(len(slots)), slots, color=PALETTE[2])
        bars.set_ylim(len(slots) - 0.5, -0.5)
        bars.set_title("slots of the cache")
        bars.set_yticks(*few_ticks(tuple(layers)))


def candidate_bars(tokens_per_s: Mapping[str, float], current: str, path: Path) -> None:
    """Tokens/s of every candidate; oracles that nobody can run are grey."""
    from moesim.residency_study import ORACLES

    names = list(tokens_per_s)
    colour = {True: PALETTE[7], False: PALETTE[4]}
    with drawing(path, (8.0, 0.6 + 0.45 * len(names))) as (_, (panel,)):
        shades = [PALETTE[0] if n == "plan" else colour[n in ORACLES] for n in names]
        panel.barh(np.arange(len(names)), list(tokens_per_s.values()), color=shades)
        panel.set_yticks(range(len(names)), [n.replace("_", " ") for n in names])
        panel.invert_yaxis()
        ratio = tokens_per_s["plan"] / tokens_per_s[current] - 1.0
        panel.set_title(f"The plan is {ratio:+.1%} against {current.replace('_', ' ')}")
        panel.set_xlabel("tokens/s (grey: oracles)")
