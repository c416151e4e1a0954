"""What is fetched ahead: predictions of the experts of a later layer, best first.

A prediction is made at the gate of layer-step t for layer-step t + distance. Predictors that know
the true routing are oracles with a given accuracy, to try "what if a predictor were this good";
those that look only at the past of a captured trace are real and are measured on it (`accuracy`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from traces.layer_steps import LayerSteps

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Predictions:
    """Experts expected at every layer-step, best first.

    start     int64[n_steps + 1], where each layer-step's predictions begin
    expert    int32[predicted], expert ids within the layer
    distance  layer-steps between the gate at which they are known and the predicted one
    """

    start: Longs
    expert: Ints
    distance: int

    def __post_init__(self) -> None:
        if self.distance < 1:
            raise SimulationError(f"distance={self.distance}, expected at least 1 layer-step")


class Prefetcher(Protocol):
    """A prefetcher of one's own: what to fetch at this gate, objects, best first."""

    def wanted(self, now: int, layer: int, objects: Sequence[int]) -> Sequence[int]:
        """Objects (layer * n_experts + expert) to fetch, given those the gate has just chosen."""


def no_predictions(work: LayerSteps) -> Predictions:
    """Nothing is fetched ahead."""
    return Predictions(np.zeros(work.n_steps + 1, np.int64), np.zeros(0, np.int32), 1)
