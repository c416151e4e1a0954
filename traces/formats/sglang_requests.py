"""Which request a token belongs to, from its position alone: SGLang's recorder logs no ids.

A sequence that starts at position 0 is a new request; one that starts at p continues the request
that stopped there, oldest first, for a running batch keeps its order. What continues nothing
known began before the recording (or behind a cached prefix) and becomes a request of its own. A
request that a decode pass leaves out has ended, unless it is the one whose prompt is still being
read in chunks: the last of the prefill pass before. Two requests that stand at one position when
one of them ends cannot be told apart; the older is taken to go on.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import numpy as np
import numpy.typing as npt

_DECODE, _MIXED = 2, 3


class RequestTracker:
    """Follows the sequences of each rank through its passes; never gives one id to two of them."""

    def __init__(self) -> None:
        self._next_id = 0
        self._open: dict[int, dict[int, deque[int]]] = {}  # rank -> next position -> requests
        self._chunked: dict[int, tuple[int, int]] = {}  # rank -> (next position, request)

    def follow(
        self,
        rank: int,
        positions: npt.NDArray[Any],
        lengths: npt.NDArray[Any] | None,
        mode: int,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """(request of each token, whether it decodes) of one pass.

        lengths  tokens of each sequence in the pass; None: one each when decoding, else a
                 sequence ends where positions stop going up by one
        """
        starts = _starts(positions, lengths, mode)
        stops = np.append(starts[1:], len(positions))
        waiting = self._open.setdefault(rank, defaultdict(deque))
        ids, decodes, advanced = [], [], []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            first, length = int(positions[start]), stop - start
            known = first > 0 and bool(waiting[first])
            ids.append(waiting[first].popleft() if known else self._new())
            decodes.append(mode == _DECODE or (mode == _MIXED and known and length == 1))
            advanced.append((first + length, ids[-1]))
        if mode == _DECODE:
            waiting.clear()
            chunked = self._chunked.pop(rank, None)
            if chunked is not None and chunked[1] not in ids:
                self._chunked[rank] = chunked
                waiting[chunked[0]].append(chunked[1])
        else:
            prompts = [a for a, decode in zip(advanced, decodes, strict=True) if not decode]
            if prompts:
                self._chunked[rank] = prompts[-1]
        for position, request in advanced:
            waiting[position].append(request)
        sizes = stops - starts
        return np.repeat(np.array(ids), sizes), np.repeat(np.array(decodes), sizes)

    def _new(self) -> int:
        self._next_id += 1
        return self._next_id - 1


def _starts(
    positions: npt.NDArray[Any], lengths: npt.NDArray[Any] | None, mode: int
) -> npt.NDArray[np.int64]:
    if mode == _DECODE:
        return np.arange(len(positions))
    if lengths is not None:
        return np.concatenate(([0], np.cumsum(lengths)[:-1]))
    return np.concatenate(([0], np.flatnonzero(np.diff(positions.astype(np.int64)) != 1) + 1))
