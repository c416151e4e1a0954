"""Watts of routed experts against measured ones, by number format and by tokens.

python benchmarks/energy_rows.py FILE [--fit]

FILE is a table of measured fused experts with a column power_w. The constants of
`hwmodels/energy.py` are published ones. Two guesses stand beside them: board power always, and the
best constant, which has seen the answers. With --fit the same formula is also fitted to half of the
shapes and scored on the other half, to tell a poor formula from poor constants; what is fitted is
printed, never kept.

Rows of few tokens are to be read with care: the sensor reports the mean of the last second, and the
watts look as if each row kept some of the row before it. A layer of one token seems to draw more
than one of eight although it moves less.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

from hwmodels.devices import load_device
from hwmodels.energy_scores import (
    PowerScore,
    Watts,
    best_constant,
    expert_watts,
    power_score,
)
from hwmodels.fitted.tables import read_tables

RANGES = ((1, 1), (2, 16), (17, 63), (64, 256), (257, 1024), (1025, 4096), (4097, 10**9))
PUBLISHED = (122.0, 144.0, 51.0, 1.3, 0.65)  # where the fit starts: W, pJ/byte twice, pJ/FLOP twice


def read_watts(path: Path, device: str = "h200") -> Watts:
    """The rows of a table that have watts."""
    rows = pd.read_parquet(path, filters=[("power_w", ">", 0)])
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / path.name
        rows.to_parquet(kept)
        return expert_watts(load_device(device), read_tables([kept]).groups)


def scores(watts: Watts, keep: np.ndarray, tdp_w: float) -> list[PowerScore]:
    """Of the model, of board power and of the best constant."""
    measured, seconds = watts.measured[keep], watts.amounts.seconds[keep]
    guesses = (watts.predicted[keep], tdp_w, best_constant(measured))
    return [power_score(np.broadcast_to(g, measured.shape), measured, seconds) for g in guesses]


def report(watts: Watts, tdp_w: float) -> Table:
    """One line for all rows, for each format and for each range of tokens."""
    columns = ("rows", "n", "model", "board power", "best constant", "model bias W", "joules")
    table = Table(*columns, title="|watts / measured - 1|, mean and median")
    everything = np.ones(len(watts.measured), dtype=bool)
    parts = {"all": everything, "64 tokens or more": watts.tokens >= 64}
    parts |= {str(name): watts.dtype == name for name in np.unique(watts.dtype)}
    for low, high in RANGES:
        parts[f"{low} to {high} tokens"] = (watts.tokens >= low) & (watts.tokens <= high)
    for name, keep in parts.items():
        of = scores(watts, keep, tdp_w)
        errors = (f"{100 * one.mean:.1f} / {100 * one.median:.1f} %" for one in of)
        table.add_row(
            name, str(of[0].rows), *errors, f"{of[0].bias_w:+.0f}", f"{of[0].joules:+.1%}"
        )
    return table


def fitted(watts: Watts, keep: np.ndarray, tdp_w: float) -> list[str]:
    """The formula fitted to one half of the shapes, scored on the other, both ways."""
    a = watts.amounts
    per_s = a.n_bytes / a.seconds * 1e-12, a.flops / a.seconds * 1e-12
    terms = np.stack(
        [per_s[0] * (1 - a.cached), per_s[0] * a.cached, per_s[1] * (a.bits > 8),
         per_s[1] * (a.bits <= 8)], axis=1,
    )  # fmt: skip

    def said(constants: np.ndarray) -> np.ndarray:
        return np.minimum(tdp_w, abs(constants[0]) + terms @ np.abs(constants[1:]))

    shapes = np.unique(watts.shape)
    chosen = np.random.default_rng(0).permutation(shapes)[: len(shapes) // 2]
    half, lines = np.isin(watts.shape, chosen), []
    for train in (half & keep, ~half & keep):

        def loss(constants: np.ndarray, train: np.ndarray = train) -> float:
            return float(np.abs(said(constants) / watts.measured - 1)[train].mean())

        best = np.abs(minimize(loss, PUBLISHED, method="Nelder-Mead", options={"maxiter": 1200}).x)
        test = keep & ~train
        one = power_score(said(best)[test], watts.measured[test], a.seconds[test])
        lines.append(
            f"{100 * one.mean:.1f} / {100 * one.median:.1f} % on {one.rows} rows of unseen shapes:"
            f" {best[0]:.0f} W, {best[1]:.0f} and {best[2]:.0f} pJ/byte, {best[3]:.2f} (16 bits)"
            f" and {best[4]:.2f} (8 bits) pJ/FLOP"
        )
    return lines


def main() -> None:
    """Print the scores of one file."""
    console, device = Console(width=140), load_device("h200")
    watts = read_watts(Path(sys.argv[1]))
    console.print(report(watts, device.tdp_w))
    if "--fit" in sys.argv:
        for least in (1, 64):
            console.print(f"fitted, not shipped; rows of {least} tokens or more:")
            for line in fitted(watts, watts.tokens >= least, device.tdp_w):
                console.print("  " + line)


if __name__ == "__main__":
    main()
