"""The GPU as the benchmarks see it: where tensors live, how calls are timed, how it feels.

Calls take turns inside one CUDA graph, so that neither launches nor warm caches are in the time;
what cannot be captured is timed call by call between events, and its row says so.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from moesim_kernels.bench import timing
from moesim_kernels.bench.health import Health, driver
from moesim_kernels.bench.measured import CannotMeasure, CannotMeasurePoint, Measured
from moesim_kernels.bench.routing import CapturedRouting

GRAPH_SECONDS = 2e-3  # of one replay, so that an event's half microsecond does not show
MOST_CALLS = 200
CACHES = 3  # how often the distinct weights of all turns exceed the last-level cache
MOST_COPIES = 64
MEMORY_SHARE = 0.8  # of the device that the turns of one point may fill
WARM_SECONDS = 25e-3  # of work before the first sample, so that clocks have risen
Call = Callable[[], object]
Timing = tuple[timing.Timed, Mapping[str, object]]
Sample = TypeVar("Sample")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device.

    device   of the tensors
    facts    `device` of its rows
    l2_bytes, memory_bytes
    time     times calls that take turns; False as second argument forbids a CUDA graph
    health   clocks, power and throttling since the last question, part of `telemetry`
    traces   captured routing of real models, where some were given
    """

    device: torch.device
    facts: Mapping[str, object]
    l2_bytes: int
    memory_bytes: int
    time: Callable[[Sequence[Call], bool], Timing]
    health: Callable[[], Mapping[str, object]] = dict
    traces: Sequence[CapturedRouting] = ()

    def copies(self, busy_bytes: float, whole_bytes: float) -> int:
        """How many sets of weights must take turns so that each finds the cache cold.

        busy_bytes   of a set that one call reads; whole_bytes, that the set occupies
        raises       CannotMeasurePoint when not even one set fits
        """
        most = int(MEMORY_SHARE * self.memory_bytes // max(whole_bytes, 1))
        if not most:
            raise CannotMeasurePoint(f"{whole_bytes / 2**30:.1f} GiB do not fit this device")
        wanted = math.ceil(CACHES * self.l2_bytes / max(busy_bytes, 1))
        return min(max(wanted, 1), most, MOST_COPIES)

    def measured(self, calls: Sequence[Call], graph: bool = True, **facts: object) -> Measured:
        """Time the calls in turn; facts are the other fields of Measured."""
        return self.watched(lambda: self.time(calls, graph), **facts)

    def by_the_clock(self, call: Call, **facts: object) -> Measured:
        """Time a call and the wait for the device after it, as the program that makes it does."""

        def whole() -> None:
            call()
            self.wait()

        return self.watched(lambda: (timing.repeat(_warm(whole)), {}), **facts)

    def watched(self, measure: Callable[[], Timing], **facts: object) -> Measured:
        """What measure returns, with the device's health meanwhile; facts as of `measured`."""
        self.wait()
        self.health()  # forget what was before
        timed, method = measure()
        given = {"device": self.facts, "telemetry": self.health(), **facts}
        given["method"] = {**method, **facts.get("method", {})}
        return Measured(timed, **given)  # type: ignore[arg-type]

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def replay_of(self, call: Call) -> Call:
        """Replays a CUDA graph of one call; the call itself where there is no CUDA.

        raises  CannotMeasurePoint where the call waits for the device
        """
        if self.device.type != "cuda":
            return call
        graph = _captured([call], 1, _warmed([call]))
        if graph is None:
            raise CannotMeasurePoint("the call cannot be captured in a CUDA graph")
        return graph.replay


def gpu_facts() -> dict[str, object]:
    """`device` of a row measured on the first CUDA device; its name is "" without one."""
    if not torch.cuda.is_available():
        return {"name": "", "kind": "gpu"}
    seen = torch.cuda.get_device_properties(0)
    return {
        "name": seen.name, "kind": "gpu", "sm": seen.major * 10 + seen.minor,
        "mem_gib": round(seen.total_memory / (1 << 30), 1), "cuda": str(torch.version.cuda),
        "driver": driver(),
    }  # fmt: skip


@contextmanager
def this_gpu(traces: Sequence[CapturedRouting] = ()) -> Iterator[Accelerator]:
    """The first CUDA device, watched while it is held; CannotMeasure without one."""
    if not torch.cuda.is_available():
        raise CannotMeasure("no GPU")
    torch.manual_seed(0)
    seen = torch.cuda.get_device_properties(0)
    with Health() as health:
        yield Accelerator(
            torch.device("cuda"), gpu_facts(), seen.L2_cache_size, seen.total_memory, time_on_gpu,
            health.since_last, traces,
        )  # fmt: skip


def time_on_gpu(calls: Sequence[Call], graph: bool = True) -> Timing:
    """Seconds of one call, from replays of a graph in which all calls take turns."""
    stream = _warmed([*calls, calls[0]])
    with torch.cuda.stream(stream):
        once = _elapsed_s(calls[0])
    n_calls = _turns(len(calls), once)
    method = {"l2": "cold_rotating" if len(calls) > 1 else "warm_or_larger", "copies": len(calls)}
    captured = _captured(calls, n_calls, stream) if graph else None
    if captured is None:
        turn = itertools.cycle(calls)
        seconds = _samples(lambda: next(turn)(), 1)
        return timing.Timed(seconds), {"timer": "events", **method}
    seconds = _samples(captured.replay, n_calls)
    return timing.Timed(seconds), {"timer": "cudagraph", "calls_per_graph": n_calls, **method}


def _turns(n_distinct: int, once_s: float) -> int:
    """Calls in a graph: whole rounds, about GRAPH_SECONDS in all, MOST_CALLS unless distinct."""
    wanted = math.ceil(GRAPH_SECONDS / max(once_s, 1e-6) / n_distinct)
    return n_distinct * max(1, min(wanted, MOST_CALLS // n_distinct))


def _warmed(calls: Sequence[Call]) -> torch.cuda.Stream:
    """A stream on which every call ran: compiled, and libraries have their memory there."""
    torch.cuda.synchronize()  # another stream may still fill the tensors
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    return stream


def _captured(
    calls: Sequence[Call], n_calls: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph | None:
    """The graph of calls taken on stream; None where a call waits for the device."""
    with torch.cuda.stream(stream):
        if _waits(calls[0]):
            return None
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer `with` takes the stream back: a failed capture leaves it current.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            for _, call in zip(range(n_calls), itertools.cycle(calls), strict=False):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _waits(call: Call) -> bool:
    """Whether a call waits for the device, as far as torch notices.

    Asked before a capture is tried: until torch 2.12 a failed one leaves the allocator believing
    that a capture goes on, and memory is not given back any more (pytorch pull request 180395).
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _samples(call: Call, per_call: int) -> list[float]:
    """Event times divided by per_call, after WARM_SECONDS of calls."""
    return sampled(_warm(lambda: _elapsed_s(call) / per_call))


def _warm(call: Callable[[], Sample]) -> Callable[[], Sample]:
    """The call, after WARM_SECONDS of it."""
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_SECONDS:
        call()
    return call


def sampled(sample: Callable[[], Sample]) -> list[Sample]:
    """At least LEAST samples, then more until POINT_SECONDS are over or there are MOST."""
    samples: list[Sample] = []
    began = time.perf_counter()
    while len(samples) < timing.LEAST or (
        len(samples) < timing.MOST and time.perf_counter() - began < timing.POINT_SECONDS
    ):
        samples.append(sample())
    return samples


def _elapsed_s(call: Call) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) * 1e-3
