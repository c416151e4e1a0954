"""ProgramBuilder: collects streams, pools and tasks, and turns them into a Program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.program import Names, Program

NONE = -1
"""Fills the unused places of a rectangular array of waits or pools."""

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Draw:
    """Bytes a task draws, from which pools, and the most it can draw in a second.

    For `append` the values of one task: a number, one pool or a sequence of pools, a number.
    For `extend` of n tasks also arrays: bytes [n], pools [n] or [n, most pools of a task] with
    NONE in unused places, max_rate [n].
    """

    bytes: npt.ArrayLike
    pools: npt.ArrayLike = ()
    max_rate: npt.ArrayLike = np.inf


NO_DRAW = Draw(0.0)


class ProgramBuilder:
    """Collects streams, pools and tasks; a task's id is its place in the order of issue."""

    def __init__(self) -> None:
        self._streams: list[tuple[str, str]] = []
        self._pools: list[tuple[str, float]] = []
        self._labels: dict[tuple[str, str], int] = {("task", ""): 0}
        self._one_by_one: list[tuple[int, float, Sequence[int], Draw, int]] = []
        self._blocks: list[_Block] = []
        self._n_tasks = 0

    @property
    def n_tasks(self) -> int:
        """Number of tasks so far, which is the id of the next one."""
        return self._n_tasks

    def stream(self, name: str, process: str = "") -> int:
        """A new stream; process is the device or rank it belongs to."""
        self._streams.append((name, process))
        return len(self._streams) - 1

    def pool(self, name: str, rate_bytes_per_s: float) -> int:
        """A new pool whose rate is split among the tasks drawing on it."""
        self._pools.append((name, rate_bytes_per_s))
        return len(self._pools) - 1

    def label(self, name: str, category: str = "") -> int:
        """The number of a label, to be given to tasks; equal labels have one number."""
        return self._labels.setdefault((name, category), len(self._labels))

    def append(
        self,
        stream: int,
        seconds: float = 0.0,
        waits: Sequence[int] = (),
        draw: Draw = NO_DRAW,
        label: int = 0,
    ) -> int:
        """One more task; returns its id. A task of zero seconds joins those it waits for."""
        self._one_by_one.append((stream, seconds, waits, draw, label))
        self._n_tasks += 1
        return self._n_tasks - 1

    def extend(
        self,
        stream: npt.ArrayLike,
        seconds: npt.ArrayLike = 0.0,
        waits: npt.ArrayLike = NONE,
        draw: Draw = NO_DRAW,
        label: npt.ArrayLike = 0,
    ) -> npt.NDArray[np.int64]:
        """Many tasks at once; returns their ids, int64[n].

        stream, seconds, draw.bytes and label are numbers or arrays [n] (an array among the first
        three says n); waits holds task ids, one number, [n] or [n, most waits of a task], NONE in
        unused places. Where all n tasks wait for many, let them wait for one joint instead.
        """
        self._flush()
        block = _block(stream, seconds, waits, draw, label)
        self._blocks.append(block)
        first, self._n_tasks = self._n_tasks, self._n_tasks + len(block.stream)
        return np.arange(first, self._n_tasks)

    def build(self) -> Program:
        """The program so far; SimulationError names a task that breaks its rules."""
        self._flush()
        blocks = self._blocks
        if self._n_tasks > np.iinfo(np.int32).max:
            raise SimulationError(f"{self._n_tasks} tasks, expected at most 2**31 - 1")
        return Program(
            stream=_joined([b.stream for b in blocks], np.int32),
            seconds=_joined([b.seconds for b in blocks], np.float64),
            bytes=_joined([b.bytes for b in blocks], np.float64),
            max_rate=_joined([b.max_rate for b in blocks], np.float64),
            wait_start=_offsets([b.n_waits for b in blocks]),
            wait_for=_joined([b.wait_for for b in blocks], np.int32),
            draw_start=_offsets([b.n_pools for b in blocks]),
            draw_pool=_joined([b.draw_pool for b in blocks], np.int32),
            pool_rate=np.array([rate for _, rate in self._pools], dtype=np.float64),
            n_streams=len(self._streams),
        )

    def names(self) -> Names:
        """The names given so far."""
        self._flush()
        return Names(
            stream=tuple(name for name, _ in self._streams),
            process=tuple(process for _, process in self._streams),
            pool=tuple(name for name, _ in self._pools),
            label=_joined([b.label for b in self._blocks], np.int32),
            labels=tuple(name for name, _ in self._labels),
            categories=tuple(category for _, category in self._labels),
        )

    def _flush(self) -> None:
        """Turn the tasks appended one by one into a block of arrays."""
        if not self._one_by_one:
            return
        stream, seconds, waits, draws, label = zip(*self._one_by_one, strict=True)
        pools = [_pools_of(draw) for draw in draws]
        block = _Block(
            stream=_int32("stream", stream),
            seconds=np.array(seconds, dtype=np.float64),
            bytes=np.array([draw.bytes for draw in draws], dtype=np.float64),
            max_rate=np.array([draw.max_rate for draw in draws], dtype=np.float64),
            n_waits=np.array([len(row) for row in waits], dtype=np.int64),
            wait_for=_int32("waits", [w for row in waits for w in row]),
            n_pools=np.array([len(row) for row in pools], dtype=np.int64),
            draw_pool=_int32("pools", [p for row in pools for p in row]),
            label=_int32("label", label),
        )
        self._blocks.append(block)
        self._one_by_one = []


@dataclass(frozen=True, slots=True)
class _Block:
    """A run of tasks; waits and pools are compressed rows given by their lengths."""

    stream: npt.NDArray[np.int32]
    seconds: npt.NDArray[np.float64]
    bytes: npt.NDArray[np.float64]
    max_rate: npt.NDArray[np.float64]
    n_waits: npt.NDArray[np.int64]
    wait_for: npt.NDArray[np.int32]
    n_pools: npt.NDArray[np.int64]
    draw_pool: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]


def _block(
    stream: npt.ArrayLike,
    seconds: npt.ArrayLike,
    waits: npt.ArrayLike,
    draw: Draw,
    label: npt.ArrayLike,
) -> _Block:
    lengths = [np.shape(v)[0] for v in (stream, seconds, draw.bytes) if np.ndim(v)]
    n = lengths[0] if lengths else 1
    pools = np.asarray(draw.pools)
    n_waits, wait_for = _compressed("waits", waits, n)
    n_pools, draw_pool = _compressed("pools", np.sort(pools) if pools.ndim == 2 else pools, n)
    return _Block(
        stream=_column("stream", _int32("stream", stream), n),
        seconds=_column("seconds", np.asarray(seconds, dtype=np.float64), n),
        bytes=_column("bytes", np.asarray(draw.bytes, dtype=np.float64), n),
        max_rate=_column("max_rate", np.asarray(draw.max_rate, dtype=np.float64), n),
        n_waits=n_waits,
        wait_for=wait_for,
        n_pools=n_pools,
        draw_pool=draw_pool,
        label=_column("label", _int32("label", label), n),
    )


def _column(field: str, values: npt.NDArray[_T], n: int) -> npt.NDArray[_T]:
    """One value for each of n tasks."""
    if values.shape not in ((), (n,)):
        raise SimulationError(f"{field}: shape {values.shape}, expected one value or ({n},)")
    return np.broadcast_to(values, (n,))


def _compressed(
    field: str, values: npt.ArrayLike, n: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Lengths of the rows of a rectangle without its NONE places, and what is left of it."""
    rows = _int32(field, values)
    if not rows.size:
        return np.zeros(n, dtype=np.int64), np.zeros(0, dtype=np.int32)
    if rows.ndim < 2:
        rows = _column(field, rows, n).reshape(n, 1)
    if rows.ndim != 2 or len(rows) != n:
        raise SimulationError(f"{field}: shape {rows.shape}, expected ({n},) or ({n}, most)")
    used = rows != NONE
    return used.sum(axis=1, dtype=np.int64), rows[used]


def _pools_of(draw: Draw) -> Sequence[int]:
    if isinstance(draw.pools, int):
        return (draw.pools,)
    if isinstance(draw.pools, Sequence):
        return sorted(draw.pools)
    return [int(pool) for pool in np.sort(draw.pools, axis=None)]


def _int32(field: str, values: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Whole numbers as int32; SimulationError instead of a silent wrap or truncation."""
    array = np.asarray(values)
    if not array.size:
        return np.zeros(array.shape, dtype=np.int32)
    limits = np.iinfo(np.int32)
    if array.dtype.kind not in "iu" or array.min() < limits.min or array.max() > limits.max:
        raise SimulationError(
            f"{field}: {array.dtype} {array.min()}..{array.max()}, expected whole numbers in int32"
        )
    return array.astype(np.int32, copy=False)


def _joined(parts: Sequence[npt.NDArray[_T]], dtype: type[_T]) -> npt.NDArray[_T]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _offsets(lengths: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    start = np.zeros(sum(map(len, lengths)) + 1, dtype=np.int64)
    np.cumsum(_joined(lengths, np.int64), out=start[1:])
    return start
