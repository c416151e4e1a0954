"""ExpertFlow's cache (arXiv 2410.17954): slots follow what a whole-path predictor says comes next.

All layers share the slots. Of the experts that the predictor names for the layers ahead, those of
the nearest layer take slots first, so that a layer with more predicted experts has more slots, and
those of a finished layer go to later ones. What the predictor missed is loaded at the gate and
takes the slot of what is predicted last, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.errors import SimulationError
from moesim.offload.built_in import hooks_for
from moesim.offload.decide import Hooks
from moesim.offload.policy import OffloadPolicy
from moesim.policies.cache import Lru
from moesim.policies.prefetch import Predictions
from traces.layer_steps import LayerSteps


class Plec:
    """Cache and prefetcher in one: both follow one list, the predicted experts in order of need.

    named    objects predicted for every layer-step, known `horizon` layer-steps ahead
    slots    experts that fit; the list is cut to what is left beside the running layer's
    """

    def __init__(self, named: Sequence[Sequence[int]], slots: int, horizon: int) -> None:
        self._named, self._slots, self._horizon = named, slots, horizon
        self._place: dict[int, int] = {}
        self._lru = Lru()

    def use(self, expert: int, now: int) -> None:
        """Newest of all."""
        self._lru.use(expert, now)

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """As LRU."""
        self._lru.insert(expert, now, ahead)

    def evict(self, expert: int) -> None:
        """Nothing to forget: the list tells what is wanted."""

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Longest unused of those not on the list, else the last on it."""
        place, last, beyond = self._place, self._lru._last, len(self._place)
        return max(candidates, key=lambda expert: (place.get(expert, beyond), -last[expert]))

    def wanted(self, now: int, layer: int, objects: Sequence[int]) -> Sequence[int]:
        """Predicted experts of the layer-steps ahead, as many as have a slot."""
        self._place = {}
        held = set(objects)
        for step in range(now + 1, min(now + self._horizon + 1, len(self._named))):
            for expert in self._named[step]:
                held.add(expert)
                if len(held) > self._slots:
                    return list(self._place)
                self._place.setdefault(expert, len(self._place))
        return list(self._place)


def plec(work: LayerSteps, policy: OffloadPolicy, predicted: Predictions) -> Hooks:
    """Hooks of the plain loop; paths are known one pass of the model ahead.

    raises  SimulationError unless policy.slots is one group over all layers
    """
    if policy.slots is None or len(policy.slots) != 1:
        raise SimulationError("PLEC shares its slots over all layers: give slots of one group")
    cache = Plec(objects_by_step(work, predicted), int(policy.slots[0]), work.n_layers)
    return replace(hooks_for(work, policy), cache=cache, prefetcher=cache)


def objects_by_step(work: LayerSteps, predicted: Predictions) -> list[list[int]]:
    """Objects (layer * n_experts + expert) predicted for every layer-step, in their order."""
    first = np.repeat(work.layer_of_step() * work.n_experts, np.diff(predicted.start))
    objects: list[int] = (first + predicted.expert).tolist()
    start = predicted.start.tolist()
    return [objects[start[step] : start[step + 1]] for step in range(work.n_steps)]
