"""What is said of predicted tables: scores by group, the skew, who predicted what, files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwmodels.calibration import Score, score_of
from hwmodels.fitted.scores import LABELS, Predicted, SkewScore, group_scores, skew_scores
from moesim.cli import output

if TYPE_CHECKING:
    from moesim.cli.validate_tables import Outcome

COLUMNS = ("group", "rows", "mean %", "median %", "p90 %", "bias %", "within 10 %")
_ORDER = ("clean", "device", "family", "dtype", "code", "tokens", "skew")


def document(outcome: Outcome) -> dict[str, Any]:
    """The keys that scripts rely on; `skipped` counts, `skipped_why` says for what reason."""
    scores = group_scores(outcome.predicted)
    skipped = {reason: count for reason, count in outcome.skipped.items() if count}
    return asdict(scores.pop("all")) | {
        "skipped": sum(skipped.values()),
        "skipped_why": skipped,
        "groups": {name: asdict(of) for name, of in sorted(scores.items(), key=_place)},
        "skew": {name: asdict(of) for name, of in _skew(outcome.predicted).items()},
        "fitted_as": fitted_as(outcome.predicted),
        "extrapolated": {name: asdict(of) for name, of in extrapolated(outcome).items()},
        "held_out": outcome.held_out,
        "inputs": {"files": outcome.files, "versions": _versions()},
    }


def _skew(predicted: Sequence[Predicted]) -> dict[str, SkewScore]:
    """Of the operators that tables give with a balanced twin: the experts."""
    return skew_scores([of for of in predicted if of.rows.family == "experts"])


def fitted_as(predicted: Sequence[Predicted]) -> list[dict[str, Any]]:
    """Kernels that another kernel or device predicted, with their own score."""
    return [
        {
            "device": of.rows.device, "family": of.rows.family, "kernel": of.rows.kernel,
            "by_device": device, "by_kernel": kernel,
        }
        | asdict(score_of(of.errors))
        for of, device, kernel in _by_others(predicted)
    ]  # fmt: skip


def _by_others(predicted: Sequence[Predicted]) -> Iterator[tuple[Predicted, str, str]]:
    for of in predicted:
        device, _, kernel = of.fitted_as.partition(": ")
        if kernel.startswith("other ") or (device, kernel) == (of.rows.device, of.rows.kernel):
            continue  # the kernel itself
        yield of, device, kernel


def extrapolated(outcome: Outcome) -> dict[str, Score]:
    """Scores of rows beyond and within the fitted sizes, by another kernel, from another device."""
    predicted = outcome.predicted
    others = {id(of): (device, kernel) for of, device, kernel in _by_others(predicted)}
    homes = [others.get(id(of), (of.rows.device, of.rows.kernel)) for of in predicted]
    errors = np.concatenate([of.errors for of in predicted])
    sizes = [len(of.rows.seconds) for of in predicted]
    outside = np.concatenate(outcome.outside)
    device = [home[0] != of.rows.device for of, home in zip(predicted, homes, strict=True)]
    kernel = [home[1] != of.rows.kernel for of, home in zip(predicted, homes, strict=True)]
    masks = {
        "outside_range": outside,
        "inside_range": ~outside,
        "other_device": np.repeat(device, sizes),
        "other_kernel": np.repeat(kernel, sizes),
    }
    known = np.isfinite(errors)
    return {
        name: score_of(errors[mask & known]) for name, mask in masks.items() if (mask & known).any()
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from moesim import __version__

    return {"moesim": __version__, "numpy": version("numpy"), "sklearn": version("scikit-learn")}


def _place(item: tuple[str, Score]) -> tuple[int, float, str]:
    """Groups in order of _ORDER, token ranges by size, kernels last by falling error."""
    name, score = item
    label, _, value = name.partition(" ")
    if label == "kernel":
        return len(_ORDER), -score.mean_abs_pct_error, name
    tokens = float(value.removeprefix("from ")) if label == "tokens" else 0.0
    return _ORDER.index(label) if label in _ORDER else len(LABELS), tokens, name


def show(outcome: Outcome, verdict: str) -> None:
    """The tables on stdout."""
    scores = group_scores(outcome.predicted)
    overall = scores.pop("all")
    groups = sorted(scores.items(), key=_place)
    lines = [_line(name, of) for name, of in groups if not name.startswith("kernel ")]
    for name, of in extrapolated(outcome).items():
        lines.append(_line(_EXTRAPOLATED[name], of))
    title = f"Predicted against measured ({outcome.held_out})"
    output.table(title, COLUMNS, [*lines, _line("all", overall)])
    kernels = [_line(n.removeprefix("kernel "), of) for n, of in groups if n.startswith("kernel ")]
    if len(kernels) > 1:
        output.table("By kernel, worst first", ("kernel", *COLUMNS[1:]), kernels)
    _show_skew(_skew(outcome.predicted))
    _show_fitted_as(fitted_as(outcome.predicted))
    for reason, count in outcome.skipped.items():
        if count:
            output.say(f"skipped, {reason}: {count:,}")
    output.say(verdict)


_EXTRAPOLATED: Mapping[str, str] = {
    "outside_range": "beyond the fitted sizes",
    "inside_range": "within the fitted sizes",
    "other_device": "predicted from another device",
    "other_kernel": "predicted by another kernel",
}


def _show_skew(scores: Mapping[str, SkewScore]) -> None:
    if not scores:
        return
    columns = ("distribution", "pairs", "error of ratio %", "over 5 % from 1", "right side %")
    lines = [
        (name, of.pairs, of.mean_abs_pct_error, of.differing, 100 * of.right_side)
        for name, of in scores.items()
    ]
    output.table("Skewed over balanced latency at equal sizes", columns, lines)


def _show_fitted_as(found: Sequence[Mapping[str, Any]]) -> None:
    others = [of for of in found if of["by_kernel"] != of["kernel"]]
    if not others:
        return
    columns = ("kernel", "predicted by", "rows", "mean %", "median %", "bias %")
    lines = [
        (
            f"{of['device']}: {of['kernel']}", f"{of['by_device']}: {of['by_kernel']}", of["rows"],
            of["mean_abs_pct_error"], of["median_abs_pct_error"], of["bias_pct"],
        )
        for of in others
    ]  # fmt: skip
    output.table("Kernels that were not measured before, by their relatives", columns, lines, 2)


def write(found: Mapping[str, Any], folder: Path) -> None:
    """result.json and table.csv."""
    output.write_json(folder / "result.json", found)
    keys = ("rows", "mean_abs_pct_error", "median_abs_pct_error", "p90_abs_pct_error", "bias_pct",
            "within_10_pct")  # fmt: skip
    groups = {"all": found, **found["groups"]}
    lines = [(name, *(of[key] for key in keys)) for name, of in groups.items()]
    output.write_csv(folder / "table.csv", ("group", *keys), lines)


def _line(name: str, of: Score) -> list[object]:
    return [
        name, of.rows, of.mean_abs_pct_error, of.median_abs_pct_error, of.p90_abs_pct_error,
        of.bias_pct, 100 * of.within_10_pct,
    ]  # fmt: skip
