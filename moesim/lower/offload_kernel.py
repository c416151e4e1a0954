"""The compiled half of `offload.py`: tasks of a Program written in order of issue.

What costs in these loops is the number of arrays that calls pass on: hence few, of records. The
estimates in a task are those of a program in which nothing slows anything down; they decide which
loads ahead have started when a load by demand comes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled, inlined

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]
Records = npt.NDArray[Any]

DENSE, RESIDENT_EXPERTS, LOADED_EXPERT, COPY, COPY_AHEAD, CPU_EXPERTS, READ, HEAD, PIM = range(9)
DRAM = 0
_RESIDENT, _LOADED, _ON_CPU, _ON_PIM = 0, 1, 2, 3

LOAD = np.dtype(
    [
        ("bytes", np.float64),
        ("step", np.int64),
        ("left", np.int64),  # layer-step at which the copy left its slot again
        ("gpu", np.int32),
        ("task", np.int32),  # its copy, -1 while it has not started
        ("gate", np.int32),  # the gate it was issued at
        ("ahead", np.bool_),
        ("cold", np.bool_),
        ("dropped", np.bool_),
    ],
    align=True,
)
TASK = np.dtype(
    [
        ("seconds", np.float64),
        ("bytes", np.float64),
        ("max_rate", np.float64),
        ("start_s", np.float64),  # estimates, without contention
        ("end_s", np.float64),
        ("wait_end", np.int64),
        ("draw_end", np.int64),
        ("stream", np.int32),
        ("kind", np.int8),
    ],
    align=True,
)


class Work(NamedTuple):
    """What was decided, of some passes."""

    start: Longs
    tokens: Ints
    place: npt.NDArray[np.int8]
    load: Ints
    loads: Records  # of these passes
    cpu_cold: npt.NDArray[np.bool_]
    gpu_of_layer: Ints
    first_load: int
    any_ahead: bool
    any_cpu: bool


class PriceTables(NamedTuple):
    """What it costs."""

    passes: Doubles  # [n_passes, 4] first, before, after and tail seconds
    experts: Doubles  # [most tokens + 1, 3] seconds on device, CPU and PIM
    gpu_fixed_s: float
    gpu_start_s: float
    cpu_fixed_s: float
    copy_s: float
    copy_rate: float
    cpu_rate: float
    drive_s: float
    drive_rate: float
    expert_bytes: float
    deferred: int
    shared_dram: bool
    any_pim: bool


class Tasks(NamedTuple):
    """The program while it is written."""

    tasks: Records
    wait_for: Ints
    draw_pool: Ints
    pass_end: Longs
    free_s: Doubles  # when each stream is free, by estimate
    total: Longs  # tasks, waits, draws so far, then the first load not started of each device


@compiled
def emit(
    work: Work, prices: PriceTables, tasks: Tasks, passes: tuple[int, int], n_layers: int
) -> None:
    """All tasks of the passes, in order of issue."""
    n_gpus = len(tasks.total) - 3
    issued = 0
    on_device = due = late = -1  # last task on a device; CPU tasks the next layers wait for
    for p in range(passes[0], passes[1]):
        for layer in range(n_layers):
            step = p * n_layers + layer
            gpu = work.gpu_of_layer[layer]
            seconds = prices.passes[p, 1] + (prices.passes[p, 0] if layer == 0 else 0.0)
            gate = _task(tasks, gpu, DENSE, seconds)
            if on_device >= 0 and tasks.tasks[on_device].stream != gpu:
                _wait(tasks, on_device)
            if due >= 0:
                _wait(tasks, due)
            if work.any_ahead:
                _start_queued(work, prices, tasks, issued, step, tasks.tasks[gate].end_s)
                _promote(work, prices, tasks, step)
            while issued < len(work.loads) and work.loads[issued].step == step:
                work.loads[issued].gate = gate
                if not (work.any_ahead and work.loads[issued].ahead):
                    _copy(work.loads, prices, tasks, issued)
                issued += 1
            now = later = -1
            if work.any_cpu:
                now, later = _on_cpu(work, prices, tasks, step, gate, 2 * n_gpus)
            due, late = (now if now >= 0 else late), later
            beside = -1
            if prices.any_pim:
                beside = _on_pim(work, prices, tasks, step, gate, 2 * n_gpus + 2)
            last = _on_gpu(work, prices, tasks, step, gpu, prices.passes[p, 2])
            on_device = last if last >= 0 else gate
            if beside >= 0:
                on_device = _task(tasks, gpu, RESIDENT_EXPERTS, 0.0)
                _wait(tasks, beside)
        on_device = _task(tasks, work.gpu_of_layer[n_layers - 1], HEAD, prices.passes[p, 3])
        if due >= 0:
            _wait(tasks, due)
        if late >= 0:
            _wait(tasks, late)
        due = late = -1
        tasks.pass_end[p - passes[0]] = on_device
    if work.any_ahead:
        _start_queued(work, prices, tasks, issued, passes[1] * n_layers, np.inf)


@inlined
def _start_queued(
    work: Work, prices: PriceTables, tasks: Tasks, issued: int, step: int, now_s: float
) -> None:
    """Loads ahead that, by estimate, start before now; those whose slot has gone are dropped."""
    loads, n_gpus = work.loads, len(tasks.total) - 3
    for gpu in range(n_gpus):
        load = tasks.total[3 + gpu]
        while load < issued:
            if loads[load].ahead and loads[load].task < 0 and loads[load].gpu == gpu:
                if loads[load].left < step:
                    loads[load].dropped = True
                elif tasks.free_s[n_gpus + gpu] >= now_s:
                    break
                else:
                    _copy(loads, prices, tasks, load)
            load += 1
        tasks.total[3 + gpu] = load


@inlined
def _promote(work: Work, prices: PriceTables, tasks: Tasks, step: int) -> None:
    """Loads ahead that this layer-step needs and that have not started start now."""
    for cell in range(work.start[step], work.start[step + 1]):
        if work.place[cell] != _RESIDENT or work.load[cell] < work.first_load:
            continue
        load = work.load[cell] - work.first_load
        if work.loads[load].task < 0:
            _copy(work.loads, prices, tasks, load)


@inlined
def _task(tasks: Tasks, stream: int, kind: int, seconds: float) -> int:
    """One more task, without waits or draws yet."""
    at = int(tasks.total[0])
    rows = tasks.tasks
    rows[at].stream = stream
    rows[at].kind = kind
    rows[at].seconds = seconds
    rows[at].bytes = 0.0
    rows[at].max_rate = np.inf
    rows[at].wait_end = tasks.total[1]
    rows[at].draw_end = tasks.total[2]
    rows[at].start_s = tasks.free_s[stream]
    rows[at].end_s = rows[at].start_s + seconds
    tasks.free_s[stream] = rows[at].end_s
    tasks.total[0] = at + 1
    return at


@inlined
def _wait(tasks: Tasks, for_task: int) -> None:
    """The newest task waits for an earlier one; it has drawn nothing yet."""
    at, rows = tasks.total[0] - 1, tasks.tasks
    tasks.wait_for[tasks.total[1]] = for_task
    tasks.total[1] += 1
    rows[at].wait_end = tasks.total[1]
    rows[at].start_s = max(rows[at].start_s, rows[for_task].end_s)
    rows[at].end_s = rows[at].start_s + rows[at].seconds
    tasks.free_s[rows[at].stream] = rows[at].end_s


@inlined
def _draw(tasks: Tasks, n_bytes: float, rate: float, shared_dram: bool) -> None:
    """The newest task draws bytes more, from the DRAM pool where that is shared."""
    at, rows = tasks.total[0] - 1, tasks.tasks
    if shared_dram and rows[at].bytes == 0.0:
        tasks.draw_pool[tasks.total[2]] = DRAM
        tasks.total[2] += 1
        rows[at].draw_end = tasks.total[2]
    rows[at].bytes += n_bytes
    rows[at].max_rate = rate
    rows[at].end_s = rows[at].start_s + max(rows[at].seconds, rows[at].bytes / rate)
    tasks.free_s[rows[at].stream] = rows[at].end_s


@inlined
def _copy(loads: Records, prices: PriceTables, tasks: Tasks, load: int) -> None:
    """A load: read from the drive first when the expert is not in host memory."""
    n_gpus = len(tasks.total) - 3
    engine, n_bytes = n_gpus + loads[load].gpu, loads[load].bytes
    kind = COPY_AHEAD if loads[load].ahead else COPY
    after = loads[load].gate
    if loads[load].cold:
        after = _read(prices, tasks, n_bytes, after, 2 * n_gpus + 1)
    if not prices.shared_dram:
        task = _task(tasks, engine, kind, prices.copy_s + n_bytes / prices.copy_rate)
        _wait(tasks, after)
    else:
        _task(tasks, engine, kind, prices.copy_s)
        _wait(tasks, after)
        task = _task(tasks, engine, kind, 0.0)
        _draw(tasks, n_bytes, prices.copy_rate, True)
    loads[load].task = task


@inlined
def _read(prices: PriceTables, tasks: Tasks, n_bytes: float, gate: int, drive: int) -> int:
    """A read from the drive into host memory, its latency first."""
    _task(tasks, drive, READ, prices.drive_s)
    _wait(tasks, gate)
    task = _task(tasks, drive, READ, 0.0)
    _draw(tasks, n_bytes, prices.drive_rate, prices.shared_dram)
    return task


@inlined
def _on_cpu(
    work: Work, prices: PriceTables, tasks: Tasks, step: int, gate: int, cpu: int
) -> tuple[int, int]:
    """Experts on the CPU, one after the other: the task the next layer waits for, and the last of
    those that may join one layer later; -1 for none.
    """
    n_cpu = 0
    for cell in range(work.start[step], work.start[step + 1]):
        n_cpu += work.place[cell] == _ON_CPU
    if n_cpu == 0:
        return -1, -1
    _task(tasks, cpu, CPU_EXPERTS, prices.cpu_fixed_s)
    _wait(tasks, gate)
    on_time = max(1, n_cpu - prices.deferred)
    now, seen, same, task = -1, 0, 0, -1
    for cell in range(work.start[step], work.start[step + 1]):
        if work.place[cell] != _ON_CPU:
            continue
        tokens, cold = work.tokens[cell], len(work.cpu_cold) > 0 and work.cpu_cold[cell]
        if same == tokens and not cold and seen != on_time:  # equal experts in a row are one task
            tasks.tasks[task].seconds += prices.experts[tokens, 1]
        else:
            read = _read(prices, tasks, prices.expert_bytes, gate, cpu + 1) if cold else -1
            task = _task(tasks, cpu, CPU_EXPERTS, prices.experts[tokens, 1])
            if cold:
                _wait(tasks, read)
        _draw(tasks, prices.expert_bytes, prices.cpu_rate, prices.shared_dram)
        same = 0 if cold else tokens
        seen += 1
        if seen == on_time:
            now = task
    return now, (task if n_cpu > on_time else -1)


@inlined
def _on_pim(work: Work, prices: PriceTables, tasks: Tasks, step: int, gate: int, pim: int) -> int:
    """Experts on the PIM unit, one after the other, started as on the device; -1 for none."""
    seconds = 0.0
    for cell in range(work.start[step], work.start[step + 1]):
        if work.place[cell] == _ON_PIM:
            seconds += prices.experts[work.tokens[cell], 2]
    if seconds == 0.0:
        return -1
    task = _task(tasks, pim, PIM, prices.gpu_fixed_s + seconds)
    _wait(tasks, gate)
    return task


@inlined
def _on_gpu(
    work: Work, prices: PriceTables, tasks: Tasks, step: int, gpu: int, after_s: float
) -> int:
    """Experts that wait for nothing together with the shared ones, then each other after its load.

    returns  the last task, -1 when there is no work
    """
    seconds, n_waiting, last = 0.0, 0, -1
    for cell in range(work.start[step], work.start[step + 1]):
        if work.place[cell] <= _LOADED and work.load[cell] >= work.first_load:
            n_waiting += 1
        elif work.place[cell] == _RESIDENT:
            seconds += prices.experts[work.tokens[cell], 0]
    if seconds > 0.0:
        seconds += prices.gpu_fixed_s
    if seconds + after_s > 0.0:
        last = _task(tasks, gpu, RESIDENT_EXPERTS, seconds + after_s)
    if n_waiting == 0:
        return last
    for place in (_RESIDENT, _LOADED):  # what was fetched ahead arrives before what is missing
        for cell in range(work.start[step], work.start[step + 1]):
            if work.place[cell] == place and work.load[cell] >= work.first_load:
                own_s = prices.gpu_start_s + prices.experts[work.tokens[cell], 0]
                last = _task(tasks, gpu, LOADED_EXPERT, own_s)
                _wait(tasks, work.loads[work.load[cell] - work.first_load].task)
    return last


@compiled
def next_leaving(objects: Ints, steps: Longs, victims: Ints, n_objects: int) -> Longs:
    """Layer-step at which the copy of each load leaves its slot again; far off for never."""
    left = np.full(len(objects), np.iinfo(np.int64).max)
    leaves = np.full(n_objects, np.iinfo(np.int64).max)
    for load in range(len(objects) - 1, -1, -1):
        left[load] = leaves[objects[load]]
        if victims[load] >= 0:
            leaves[victims[load]] = steps[load]
    return left
