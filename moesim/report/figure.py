"""What all pictures have in common: size, colours, units, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from traces.files import write_bytes

DPI = 120
# Okabe and Ito's palette: told apart with any colour vision. Grey and black come last.
PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999",
    "#000000",
)  # fmt: skip
_STYLE: Mapping[str, object] = MappingProxyType(
    {
        "font.size": 10.0,
        "axes.titlesize": 11.0,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "legend.frameon": False,
        "svg.hashsalt": "moesim",
    }
)


@contextmanager
def drawing(
    path: Path, size_inches: tuple[float, float], shape: tuple[int, int] = (1, 1)
) -> Iterator[tuple[Any, Any]]:
    """A figure in our style and its axes; written to path as PNG when the block ends well.

    shape   (rows, columns) of axes, given in reading order
    yields  (figure, axes); equal drawings give equal bytes
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with rc_context(dict(_STYLE)):
        figure = Figure(figsize=size_inches, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(*shape, squeeze=False).ravel()
        figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, content.getvalue())


def time_unit(longest_s: float) -> tuple[float, str]:
    """(factor, unit) in which a time of this length is easy to read: s, ms or µs."""
    if longest_s >= 1.0:
        return 1.0, "s"
    return (1e3, "ms") if longest_s >= 1e-3 else (1e6, "µs")


def few_ticks(labels: Sequence[int], most: int = 16) -> tuple[list[int], list[str]]:
    """Places and texts of at most `most` evenly spaced labels."""
    step = max(1, -(-len(labels) // most))
    places = list(range(0, len(labels), step))
    return places, [str(labels[place]) for place in places]
