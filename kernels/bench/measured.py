"""What a benchmark hands back: times and the facts that go into its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moesim_kernels.bench import timing
from moesim_kernels.bench.points import Point
from moesim_kernels.bench.rows import SCHEMA


class CannotMeasure(RuntimeError):
    """This machine cannot run an operator; the message says why, and the runner goes on."""


class CannotMeasurePoint(RuntimeError):
    """This machine cannot run one point; its operator's others are still tried."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of one point.

    timed        seconds of each repetition
    source       name of the kernel or call that was timed
    n_bytes      bytes moved; flops, operations done: both what the job needs, not what was issued
    method       how it was timed
    routing      facts of the drawn routing, beside the point's own
    config       launch configuration of the kernel
    telemetry    clocks and power; derived, figures that follow from the times or the work
    max_rel_err  largest error against a float32 reference over its largest value, None: no check
    """

    timed: timing.Timed
    source: str
    n_bytes: int
    flops: int = 0
    method: Mapping[str, object] = field(default_factory=dict)
    routing: Mapping[str, object] = field(default_factory=dict)
    max_rel_err: float | None = None
    device: Mapping[str, object] = field(default_factory=timing.cpu)
    config: Mapping[str, object] = field(default_factory=dict)
    telemetry: Mapping[str, object] = field(default_factory=dict)
    derived: Mapping[str, object] = field(default_factory=dict)

    def row(self, point: Point) -> dict[str, object]:
        """The row of a point, a dict of plain JSON values."""
        return _head(point, self.device) | {
            "kernel": {"source": self.source, "config": dict(self.config)},
            "routing": {**point.routing, **self.routing},
            "method": {"timer": "perf_counter", **self.method},
            "lat_us": timing.latency(self.timed.seconds),
            "telemetry": {**timing.telemetry(self.timed.disturbed), **self.telemetry},
            "derived": {"bytes": self.n_bytes, "flops": self.flops, **self.derived},
            "check": {} if self.max_rel_err is None else {"max_rel_err": self.max_rel_err},
            "ok": True, "why": "",
        }  # fmt: skip


def failed_row(point: Point, device: Mapping[str, object], why: str) -> dict[str, object]:
    """The row of a point that could not be measured here: it is not tried again."""
    return _head(point, device) | {
        "kernel": {"source": point.kernel, "config": {}}, "routing": dict(point.routing),
        "ok": False, "why": why,
    }  # fmt: skip


def _head(point: Point, device: Mapping[str, object]) -> dict[str, object]:
    return {
        "schema": SCHEMA, "op": point.op, "key": point.key(timing.place(device)),
        "device": dict(device), "sw": timing.software(),
        "shape": dict(point.shape), "dtype": dict(point.dtype),
    }  # fmt: skip
