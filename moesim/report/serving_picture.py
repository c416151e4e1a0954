"""Time per output token of serving runs: predicted over measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesim.report.figure import PALETTE, drawing

if TYPE_CHECKING:
    from moesim.validate import EndToEnd

BAND = 0.15  # of error, drawn in grey
MARKERS = "o^sDv"  # by engine


def serving_picture(found: EndToEnd, path: Path) -> None:
    """A dot a run, both sides logarithmic, coloured by model, shaped by engine."""
    measured, predicted = found.measured * 1e3, found.seconds * 1e3
    kinds = [(row.model_path.split("/")[-1], row.backend) for row in found.rows]
    models, engines = (sorted({kind[side] for kind in kinds}) for side in (0, 1))
    low, high = (f(np.r_[measured, predicted]) for f in (np.min, np.max))
    with drawing(path, (6.4, 5.6)) as (_, (panel,)):
        line = np.array([low / 1.1, high * 1.1])
        panel.fill_between(line, line * (1 - BAND), line * (1 + BAND), color="#e8e8e8")
        panel.plot(line, line, color="#999999", linewidth=0.8)
        for model, engine in sorted(set(kinds)):
            of = np.array([kind == (model, engine) for kind in kinds])
            panel.scatter(
                measured[of], predicted[of], s=14, alpha=0.8, linewidths=0,
                color=PALETTE[models.index(model) % len(PALETTE)],
                marker=MARKERS[engines.index(engine) % len(MARKERS)],
                label=f"{model}, {engine} ({of.sum()})",
            )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="measured ms per token",
                  ylabel="predicted ms per token")  # fmt: skip
        error = 100 * np.median(np.abs(found.errors))
        panel.set_title(f"{len(kinds)} serving runs, median error {error:.1f} %")
        panel.legend(fontsize=7, loc="upper left")
