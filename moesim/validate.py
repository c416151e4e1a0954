"""Time per output token of measured serving runs against what fitted operators say.

Nothing here is fitted to the runs. Operators are those of one device (H100 by default) on the
datasheet of the run's; what an engine does by default is in ENGINES and `step_prices.KERNELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hwmodels.calibration import Score, score_of
from hwmodels.errors import HardwareError
from hwmodels.fitted.parts import Floats
from hwmodels.fitted.store import FittedDevice
from hwmodels.fitted.tables import HARDWARE
from hwmodels.systems import load_system
from moesim.errors import SimulationError
from moesim.lower.continuous_batching import Load, Scheduler, Serving, time_per_output_token
from moesim.lower.engine_step import Formats
from moesim.lower.step_prices import Prices
from moesim.serving_rows import ServingRow, ServingRows
from traces.models import load_model

# Defaults of the engines on H100 and H200, of their documentation: vLLM's max_num_batched_tokens of
# a server, SGLang's chunked_prefill_size (prompts run in passes of their own unless mixed chunks
# are asked for), TensorRT-LLM's max_num_tokens.
ENGINES: Mapping[str, Scheduler] = MappingProxyType(
    {
        "vllm": Scheduler(8192, mixes=True),
        "sglang": Scheduler(8192, mixes=False),
        "trtllm": Scheduler(8192, mixes=True),
    }
)


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Runs with their predictions.

    seconds    float64[rows], predicted time per output token
    skipped    runs without one, by reason
    fitted_on  device whose operators priced them
    """

    rows: tuple[ServingRow, ...]
    seconds: Floats
    skipped: Mapping[str, int]
    fitted_on: str

    @property
    def measured(self) -> Floats:
        """Seconds per output token, float64[rows]."""
        return np.array([row.tpot_s for row in self.rows])

    @property
    def extrapolated(self) -> int:
        """Runs on another device than the operators were measured on."""
        return sum(HARDWARE[row.system] != self.fitted_on for row in self.rows)

    @property
    def errors(self) -> Floats:
        """(predicted - measured) / measured, float64[rows]."""
        return np.asarray(self.seconds / self.measured - 1)


@dataclass(frozen=True, slots=True)
class EndToEndScore:
    """The score of all runs, Spearman's rank correlation, and scores by what a run has.

    steady_rank_correlation  of the runs that did not queue (`ServingRow.queued`)
    """

    overall: Score
    rank_correlation: float
    steady_rank_correlation: float
    groups: Mapping[str, Score]


def predict_serving(read: ServingRows, fitted: FittedDevice) -> EndToEnd:
    """Every run priced by the operators of one device.

    raises  SimulationError when no run can be priced
    """
    seconds = np.full(len(read.rows), np.nan)
    skipped = dict(read.skipped)
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, row in enumerate(read.rows):
        key = (row.checkpoint, row.system, row.backend, row.ranks)
        alike.setdefault(key, []).append(i)
    for of in alike.values():
        try:
            seconds[of] = _predicted([read.rows[i] for i in of], fitted)
        except (HardwareError, SimulationError) as error:
            skipped[str(error)] = skipped.get(str(error), 0) + len(of)
    known = np.isfinite(seconds)
    if not known.any():
        why = "; ".join(skipped) or "the file has no row"
        raise SimulationError(f"no run could be priced: {why[:300]}")
    kept = tuple(row for row, has in zip(read.rows, known, strict=True) if has)
    return EndToEnd(kept, seconds[known], skipped, fitted.device)


def score_serving(found: EndToEnd) -> EndToEndScore:
    """Scores over all runs and by backend, version, model, system, split and load."""
    errors = found.errors
    groups = {}
    for label, of in LABELS.items():
        values = [of(row) for row in found.rows]
        for value in sorted(set(values), key=lambda text: (len(text), text)):
            groups[f"{label} {value}"] = score_of(errors[[v == value for v in values]])
    steady = np.array([not row.queued for row in found.rows])
    return EndToEndScore(
        score_of(errors),
        _rank_correlation(found.seconds, found.measured),
        _rank_correlation(found.seconds[steady], found.measured[steady]),
        groups,
    )


def _rank_correlation(predicted: Floats, measured: Floats) -> float:
    """Spearman's; NaN where one side has a single value."""
    from scipy.stats import spearmanr

    if len(measured) < 2 or not (np.ptp(measured) > 0 and np.ptp(predicted) > 0):
        return float("nan")
    return float(spearmanr(predicted, measured).statistic)


def _predicted(rows: Sequence[ServingRow], fitted: FittedDevice) -> Floats:
    """Runs of one model on one engine, split and system, float64[rows]."""
    first = rows[0]
    if first.backend not in ENGINES:
        raise SimulationError(f"engine {first.backend!r} is unknown, known: {', '.join(ENGINES)}")
    if first.system not in HARDWARE:
        raise SimulationError(f"system {first.system!r} is unknown, known: {', '.join(HARDWARE)}")
    system = load_system(f"{HARDWARE[first.system]}x{first.ranks.n_devices}")
    serving = Serving(
        load_model(first.checkpoint.model),
        first.ranks,
        Formats(first.checkpoint.gemm, first.checkpoint.experts),
        ENGINES[first.backend],
        Prices(fitted.models, system, first.backend),
    )
    load = Load(*(np.array([getattr(row, name) for row in rows], dtype=np.float64)
                  for name in ("isl", "osl", "concurrency")))  # fmt: skip
    return time_per_output_token(serving, load)


def _split(row: ServingRow) -> str:
    ranks = row.ranks
    return (
        f"attention tp{ranks.attention_tp} dp{ranks.attention_dp},"
        f" experts tp{ranks.expert_tp} ep{ranks.expert_ep}"
    )


LABELS: Mapping[str, Callable[[ServingRow], str]] = MappingProxyType(
    {
        "backend": lambda row: row.backend,
        "model": lambda row: row.model_path,
        "system": lambda row: row.system,
        "batch": lambda row: f"{row.concurrency:g}",
        "lengths": lambda row: f"{row.isl:g}/{row.osl:g}",
        "split": _split,
        "load": lambda row: "queued" if row.queued else "steady",
        "runs": lambda row: f"{row.model_path}, {row.system}, {row.backend} {row.version}",
    }
)
