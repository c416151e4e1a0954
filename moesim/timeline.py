"""What a Timeline shows: a trace for ui.perfetto.dev, how busy streams were, what set the pace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.engine import Timeline
from moesim.errors import SimulationError
from moesim.program import Names, Program

_CHUNK = 10_000  # tasks turned into Python values at a time


@dataclass(frozen=True, slots=True)
class Counter:
    """A number that changes with time, drawn under a process: cache occupancy, queue depth.

    time_s  float64[points], ascending; value  float64[points], finite, holds from that time on
    """

    process: str
    name: str
    time_s: npt.NDArray[np.float64]
    value: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        fits = self.time_s.shape == self.value.shape == (self.value.size,)
        finite = np.isfinite(self.time_s).all() and np.isfinite(self.value).all()
        if not (fits and finite and (np.diff(self.time_s) >= 0).all()):
            raise SimulationError(
                f"counter {self.name}: time_s{list(self.time_s.shape)} and"
                f" value{list(self.value.shape)} must be of one length, finite, time ascending"
            )


def busy_share(program: Program, timeline: Timeline) -> npt.NDArray[np.float64]:
    """Share of the makespan each stream spent on tasks, float64[streams]; 0 if it is empty."""
    spent = timeline.end_s - timeline.start_s
    busy = np.bincount(program.stream, weights=spent, minlength=program.n_streams)
    return _over(busy.astype(np.float64), timeline.makespan_s)


def pool_share(program: Program, timeline: Timeline) -> npt.NDArray[np.float64]:
    """Bytes drawn from each pool over what it could give in the makespan, float64[pools]."""
    drawn = np.repeat(program.bytes, np.diff(program.draw_start))
    total = np.bincount(program.draw_pool, weights=drawn, minlength=program.n_pools)
    return _over(total / program.pool_rate, timeline.makespan_s)


def _over(seconds: npt.NDArray[np.float64], makespan_s: float) -> npt.NDArray[np.float64]:
    """Shares of the makespan; 0 of none."""
    return seconds / makespan_s if makespan_s > 0 else np.zeros(len(seconds))


def pool_users(program: Program, timeline: Timeline, pool: int, name: str) -> Counter:
    """How many tasks that draw from a pool are running, as a counter."""
    entry = np.repeat(np.arange(program.n_tasks), np.diff(program.draw_start))
    users = entry[(program.draw_pool == pool) & (program.bytes[entry] > 0)]
    time = np.concatenate([timeline.start_s[users], timeline.end_s[users]])
    step = np.repeat([1.0, -1.0], len(users))
    order = np.argsort(time, kind="stable")
    level = np.cumsum(step[order])
    last = np.append(time[order][1:] != time[order][:-1], True)[: len(order)]
    return Counter("", name, time[order][last], level[last])


def critical_path(program: Program, timeline: Timeline) -> npt.NDArray[np.int64]:
    """Tasks that set the makespan, first to last: each starts at the instant the one before ends.

    The last task to end, then always the predecessor that ended last (on its stream or among its
    waits; the first in task order of equals). A draw on the path may be slow because of others
    that share its pools; these are not on the path.
    """
    if not program.n_tasks:
        return np.zeros(0, dtype=np.int64)
    before = _stream_predecessor(program)
    task = int(timeline.end_s.argmax())
    path = []
    while task >= 0:
        path.append(task)
        waits = program.wait_for[program.wait_start[task] : program.wait_start[task + 1]]
        earlier = np.sort(np.append(waits, before[task]))
        earlier = earlier[earlier >= 0]
        task = int(earlier[timeline.end_s[earlier].argmax()]) if len(earlier) else -1
    return np.array(path[::-1], dtype=np.int64)


def _stream_predecessor(program: Program) -> npt.NDArray[np.int64]:
    """The task before each task on its stream, int64[tasks], -1 for the first."""
    order = np.argsort(program.stream, kind="stable")
    before = np.full(program.n_tasks, -1, dtype=np.int64)
    follows = program.stream[order[1:]] == program.stream[order[:-1]]
    before[order[1:][follows]] = order[:-1][follows]
    return before


def write_chrome_trace(
    program: Program,
    timeline: Timeline,
    path: Path,
    names: Names,
    counters: Sequence[Counter] = (),
) -> None:
    """Write the timeline as Chrome trace JSON, which ui.perfetto.dev opens.

    A process per `names.process`, a thread per stream, a complete event per task in order of
    time, ts and dur in µs, rounded to whole ns so that back-to-back tasks never overlap. The
    file appears only when it is complete.

    raises  SimulationError when the names do not fit the program
    """
    _check_names(program, names)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for i, event in enumerate(_events(program, timeline, names, counters)):
                file.write(",\n" * (i > 0) + json.dumps(event))
            file.write("\n]}\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_names(program: Program, names: Names) -> None:
    wanted = {
        "stream": program.n_streams,
        "process": program.n_streams,
        "pool": program.n_pools,
        "label": program.n_tasks,
        "categories": len(names.labels),
    }
    for field, n in wanted.items():
        if len(getattr(names, field)) != n:
            raise SimulationError(f"names.{field}: {len(getattr(names, field))}, expected {n}")
    if program.n_tasks and not 0 <= names.label.min() <= names.label.max() < len(names.labels):
        raise SimulationError(
            f"names.label: {names.label.min()}..{names.label.max()},"
            f" expected 0..{len(names.labels) - 1}"
        )


def _events(
    program: Program, timeline: Timeline, names: Names, counters: Sequence[Counter]
) -> Iterator[dict[str, Any]]:
    used = (*names.process, *(counter.process for counter in counters))
    pid = {process: i for i, process in enumerate(dict.fromkeys(used))}
    yield from _metadata(names, pid)
    yield from _tasks(program, timeline, names, pid)
    for counter in counters:
        for time, value in zip(_microseconds(counter.time_s), counter.value, strict=True):
            shared = {"ph": "C", "pid": pid[counter.process], "name": counter.name}
            yield shared | {"ts": time, "args": {"value": float(value)}}


def _metadata(names: Names, pid: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Names and order of processes and threads."""
    for process, i in pid.items():
        shown = process or "simulation"
        yield {"ph": "M", "pid": i, "name": "process_name", "args": {"name": shown}}
        yield {"ph": "M", "pid": i, "name": "process_sort_index", "args": {"sort_index": i}}
    for tid, (stream, process) in enumerate(zip(names.stream, names.process, strict=True)):
        thread = {"ph": "M", "pid": pid[process], "tid": tid}
        yield thread | {"name": "thread_name", "args": {"name": stream}}
        yield thread | {"name": "thread_sort_index", "args": {"sort_index": tid}}


def _tasks(
    program: Program, timeline: Timeline, names: Names, pid: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """A complete event per task, stream by stream, in order of time."""
    order = np.argsort(program.stream, kind="stable")
    for at in range(0, len(order), _CHUNK):
        tasks = order[at : at + _CHUNK]
        columns = (
            tasks.tolist(),
            program.stream[tasks].tolist(),
            names.label[tasks].tolist(),
            program.bytes[tasks].tolist(),
            _microseconds(timeline.start_s[tasks]),
            _microseconds(timeline.end_s[tasks]),
        )
        for task, stream, label, n_bytes, start, end in zip(*columns, strict=True):
            event = {
                "ph": "X",
                "pid": pid[names.process[stream]],
                "tid": stream,
                "name": names.labels[label],
                "cat": names.categories[label] or "task",
                "ts": start,
                "dur": round(end - start, 3),
                "args": {"task": task},
            }
            if n_bytes:
                event["args"]["bytes"] = n_bytes
            yield event


def _microseconds(seconds: npt.NDArray[np.float64]) -> Iterable[float]:
    """µs, rounded to whole ns."""
    rounded: list[float] = np.round(seconds * 1e6, 3).tolist()
    return rounded
