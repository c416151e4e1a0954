"""Heat maps: load of ranks before and after a plan, load of experts, who follows whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.report.figure import drawing, few_ticks

Floats = npt.NDArray[np.float64]

# Ends of a ratio's colour scale, and the ticks above 1 for each; below 1 are their inverses.
_SCALES: Mapping[float, tuple[float, ...]] = MappingProxyType(
    {
        1.25: (1.1, 1.25),
        1.5: (1.2, 1.5),
        2.0: (1.25, 1.5, 2.0),
        4.0: (1.5, 2.0, 3.0, 4.0),
        8.0: (2.0, 4.0, 8.0),
    }
)


def rank_load_heatmaps(
    loads: Mapping[str, Floats], path: Path, layers: Sequence[int] | None = None
) -> None:
    """Load of every rank at every layer, a panel for each placement, all on one colour scale.

    loads   placement name to float64[layers, ranks], any unit; shown over the layer's mean
    layers  absolute index of each row; 0, 1, ... when None
    raises  SimulationError when loads is empty or its arrays differ in their layers
    """
    ratios = {name: over_mean(load) for name, load in loads.items()}
    if len({len(ratio) for ratio in ratios.values()}) != 1:
        shapes = {name: list(load.shape) for name, load in loads.items()}
        raise SimulationError(f"loads: shapes {shapes}, expected the same layers in each")
    n_layers = len(next(iter(ratios.values())))
    rows = tuple(range(n_layers) if layers is None else layers)
    end = _scale_for(np.concatenate([ratio.ravel() for ratio in ratios.values()]))
    shape = _panels(len(ratios))
    size = (1.4 + 3.7 * shape[1], _height(n_layers) * (1.0 if shape[0] == 1 else 0.8 * shape[0]))
    with drawing(path, size, shape) as (figure, axes):
        for panel, (name, ratio) in zip(axes, ratios.items(), strict=False):
            image = _ratio_image(panel, ratio, end)
            panel.set_title(f"{name}\nbusiest {float(ratio.max(axis=1).mean()):.2f}x the mean")
            _label_axes(panel, ("rank", range(ratio.shape[1]), 9), ("layer", rows, 12))
        for panel in axes[len(ratios) :]:
            panel.set_visible(False)
        _colour_bar(figure, image, axes, "load of the rank / mean of the layer")


def expert_load_heatmap(counts: Floats, layers: Sequence[int], path: Path) -> None:
    """How often each expert of each layer was chosen, over an even share.

    counts  float64[layers, n_experts]
    layers  absolute index of each row
    """
    ratio = over_mean(counts)
    busiest = float(ratio.max(axis=1).mean())
    with drawing(path, (9.0, _height(len(layers)))) as (figure, (panel,)):
        image = _ratio_image(panel, ratio, _scale_for(ratio))
        _colour_bar(figure, image, [panel], "choices / even share")
        panel.set_title(
            f"Expert load: the busiest of a layer takes {busiest:.1f}x an even share on average"
        )
        _label_axes(panel, ("expert", range(counts.shape[1]), 17), ("layer", layers, 16))


def transition_heatmap(pairs: Floats, layers: tuple[int, int], path: Path) -> None:
    """Which experts of one layer follow which of the layer before, over what chance would give.

    pairs   float64[n_experts, n_experts], tokens that chose (row) at layers[0] and (column) at
            layers[1]
    """
    lift = over_chance(pairs)
    with drawing(path, (7.4, 6.2)) as (figure, (panel,)):
        image = _ratio_image(panel, lift, 8.0)
        _colour_bar(figure, image, [panel], "tokens with both / expected if independent")
        panel.set_title(f"Which experts of layer {layers[1]} follow those of layer {layers[0]}")
        experts = range(len(pairs))
        across, down = (f"expert of layer {layer}" for layer in reversed(layers))
        _label_axes(panel, (across, experts, 9), (down, experts, 9))


def over_mean(load: Floats) -> Floats:
    """Each value over the mean of its row; 1 in a row without load."""
    mean = load.mean(axis=1, keepdims=True)
    ratio: Floats = np.divide(load, mean, out=np.ones(load.shape), where=mean > 0)
    return ratio


def over_chance(pairs: Floats) -> Floats:
    """Each count over what its row and column totals would give; 1 where they give nothing."""
    total = max(float(pairs.sum()), 1.0)
    expected = pairs.sum(axis=1, keepdims=True) * pairs.sum(axis=0, keepdims=True) / total
    lift: Floats = np.divide(pairs, expected, out=np.ones(pairs.shape), where=expected > 0)
    return lift


def _ratio_image(panel: Any, ratio: Floats, end: float) -> Any:
    """A ratio in colours that part at 1, alike for n times and one n-th, up to `end`."""
    limit = float(np.log2(end))
    panel.spines[:].set_visible(True)
    return panel.imshow(
        np.log2(np.maximum(ratio, 1.0 / end**2)),
        aspect="auto",
        cmap="PuOr_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )


def _scale_for(ratio: Floats) -> float:
    """The smallest scale that holds nearly all values above 1; the rest gets its end colour."""
    most = float(np.quantile(ratio, 0.995)) if ratio.size else 1.0
    return next((end for end in _SCALES if end >= most), max(_SCALES))


def _colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    end = 2.0 ** float(image.get_clim()[1])
    above = min(_SCALES.items(), key=lambda item: abs(item[0] - end))[1]
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.015, aspect=35)
    ticks = [1.0 / value for value in reversed(above)] + [1.0, *above]
    bar.set_ticks(np.log2(ticks), labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label(label)


def _label_axes(
    panel: Any, across: tuple[str, Sequence[int], int], down: tuple[str, Sequence[int], int]
) -> None:
    """Names and tick labels of both axes: (name, label of each cell, most labels)."""
    panel.set_xlabel(across[0])
    panel.set_xticks(*few_ticks(across[1], across[2]))
    panel.set_ylabel(down[0])
    panel.set_yticks(*few_ticks(down[1], down[2]))


def _panels(n: int) -> tuple[int, int]:
    """(rows, columns) for n panels: up to three side by side, four as a square."""
    n_columns = 2 if n == 4 else min(n, 3)
    return -(-n // n_columns), n_columns


def _height(n_layers: int) -> float:
    """Inches for a map of n layers."""
    return min(7.5, max(3.2, 1.6 + 0.11 * n_layers))
