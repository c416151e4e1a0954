"""Clock, machine facts and noise: what every benchmark shares."""

from __future__ import annotations

import functools
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

POINT_SECONDS, LEAST, MOST = 0.3, 5, 60
PATIENCE = 3
CALM_PREEMPTIONS_PER_S = 10  # housekeeping; a busy neighbour on a core causes 40 and more
DEFAULT_CACHE_BYTES = 32 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of each call; disturbed says that other work shared the cores for all but a few."""

    seconds: Sequence[float]
    disturbed: bool = False


def repeat(call: Callable[[], object], seconds: float | None = None) -> Timed:
    """Time a call after one that warms up; about `seconds` in all, POINT_SECONDS if None.

    Calls during which the system often gave a core to other work are left out when LEAST calm ones
    remain, and up to PATIENCE times as long is spent to find those; else all calls count.
    """
    call()
    calm: list[float] = []
    every: list[float] = []
    budget = POINT_SECONDS if seconds is None else seconds
    began = time.perf_counter()
    while not _enough(time.perf_counter() - began, budget, len(calm), len(every)):
        preempted = _preemptions()
        started = time.perf_counter()
        call()
        every.append(time.perf_counter() - started)
        if _preemptions() - preempted <= CALM_PREEMPTIONS_PER_S * every[-1]:
            calm.append(every[-1])
    return Timed(calm) if len(calm) >= LEAST else Timed(every, disturbed=True)


def _enough(spent: float, budget: float, n_calm: int, n_all: int) -> bool:
    if n_all < LEAST:
        return False
    return n_calm >= MOST or spent > (budget if n_calm >= LEAST else PATIENCE * budget)


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def latency(seconds: Sequence[float]) -> dict[str, float | int]:
    """`lat_us` of a row: median, 10th and 90th percentile in microseconds, and how many."""
    p10, median, p90 = (float(x) for x in np.quantile(np.asarray(seconds) * 1e6, (0.1, 0.5, 0.9)))
    return {"median": round(median, 3), "p10": round(p10, 3), "p90": round(p90, 3),
            "n": len(seconds)}  # fmt: skip


def telemetry(disturbed: bool) -> dict[str, float | bool]:
    """What else was running: the one-minute load average, and whether the times show it."""
    return {"load_average": round(os.getloadavg()[0], 2), "disturbed": disturbed}


@functools.cache
def cache_bytes() -> int:
    """Size of the last-level cache that core 0 sees; DEFAULT_CACHE_BYTES when not known."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [_size(path.read_text().strip()) for path in sizes]
    return max(found, default=DEFAULT_CACHE_BYTES) or DEFAULT_CACHE_BYTES


def numa_nodes(system: Path = Path("/sys/devices/system/node")) -> int:
    """Memory nodes that the system names, at least one."""
    return max(len(list(system.glob("node[0-9]*"))), 1)


def memory_bytes() -> int:
    """All memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def cpu() -> dict[str, object]:
    """`device` of a row measured on the CPU: name with the number of cores, caches, memory."""
    cores = len(os.sched_getaffinity(0))
    return {
        "name": f"{_cpu_name()} ({cores} cores)", "kind": "cpu", "cores": cores,
        "llc_bytes": cache_bytes(), "mem_gib": round(memory_bytes() / (1 << 30), 1),
        "numa_nodes": numa_nodes(),
    }  # fmt: skip


@functools.cache
def software() -> dict[str, str]:
    """`sw` of a row: versions of what took part, and the commit of this code where known."""
    import torch

    return {
        "torch": torch.__version__, "triton": _version("triton"), "numpy": np.__version__,
        "python": platform.python_version(), "system": platform.system(), "git": _revision(),
    }  # fmt: skip


def place(device: Mapping[str, object]) -> str:
    """Device and software by which a point is known: other ones measure it anew."""
    return f"{device['name']}, torch {_version('torch')}, triton {_version('triton')}"


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "")
    return int(number) * _UNITS.get(unit, 1) if number.isdigit() else 0


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _revision() -> str:
    here = str(Path(__file__).parent)
    ask = ["git", "-C", here, "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
