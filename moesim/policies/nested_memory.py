"""Which planes of nested experts stay in memory: beyond a budget the layers before give theirs up.

An expert's copy is a base and planes that add bits (`planners/nested_bits.py`), so memory holds so
many precisions of it, counted from the lowest, and an upgrade reads only what is missing.
source: D2MoE (arXiv 2504.15299)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError

Longs = npt.NDArray[np.int64]


def segment_bytes(tokens: Longs, held: Longs, planes: Longs) -> Longs:
    """int64[experts, precisions]: bytes that each cell of a layer still has to read.

    tokens  int64[experts, precisions], tokens that ask for each, 0 for none
    held    int64[experts], precisions in memory, counted from the lowest
    planes  int64[precisions], bytes that each adds to the one below; a precision nobody asks for
            is read with the next higher one that somebody does
    """
    whole = np.cumsum(planes)
    asked = np.where(tokens > 0, whole, 0)
    had = np.concatenate([np.append(0, whole)[held][:, None], asked[:, :-1]], axis=1)
    return np.where(tokens > 0, np.maximum(whole - np.maximum.accumulate(had, axis=1), 0), 0)


class NestedMemory:
    """Planes in memory, never more than the budget.

    held  int64[layers, experts], precisions that can be read, counted from the lowest
    used  bytes in memory
    """

    def __init__(self, shape: tuple[int, int], planes: Longs, budget_bytes: int) -> None:
        self.held = np.zeros(shape, np.int64)
        self.used = 0
        self._planes, self._budget = planes, budget_bytes

    def load(self, layer: int, tokens: Longs) -> Longs:
        """Make room for what a layer asks and take it in; bytes read, as segment_bytes has them.

        raises  SimulationError when what one layer needs is larger than the budget
        """
        read = segment_bytes(tokens, self.held[layer], self._planes)
        need = self.used + int(read.sum())
        need -= self._free(layer, need - self._budget)
        if need > self._budget:
            raise SimulationError(
                f"layer {layer} needs {need} bytes in memory, the budget of {self._budget} is"
                f" short by {need - self._budget}"
            )
        top = ((tokens > 0) * np.arange(1, tokens.shape[1] + 1)).max(axis=1)
        self.held[layer] = np.maximum(self.held[layer], top)
        self.used = need
        return read

    def _free(self, layer: int, short: int) -> int:
        """Bytes given up: the layer before first, its high bits first, then the one before it."""
        freed = 0
        for back in range(1, len(self.held)):
            row = self.held[(layer - back) % len(self.held)]
            for top in range(len(self._planes), 0, -1):
                if freed >= short:
                    return freed
                size = int(self._planes[top - 1])
                leaving = np.flatnonzero(row == top)[: -(-(short - freed) // size)]
                row[leaving] = top - 1
                freed += size * len(leaving)
        return freed
