"""What a benchmark hands back: times and the facts that go into its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moesim_kernels.bench import timing
from moesim_kernels.bench.points import Point
from moesim_kernels.bench.rows import SCHEMA


class CannotMeasure(RuntimeError):
    """This machine cannot run an operator; the message says why, and the runner goes on."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of one point.

    timed        seconds of each repetition
    source       name of the kernel or call that was timed
    n_bytes      bytes moved; flops, operations done: both what the job needs, not what was issued
    method       how it was timed
    routing      facts of the drawn routing, beside the point's own
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

    def row(self, point: Point) -> dict[str, object]:
        """The row of a point, a dict of plain JSON values."""
        return {
            "schema": SCHEMA, "op": point.op, "key": point.key(str(self.device["name"])),
            "device": dict(self.device), "sw": timing.software(),
            "kernel": {"source": self.source, "config": {}},
            "shape": dict(point.shape), "dtype": dict(point.dtype),
            "routing": {**point.routing, **self.routing},
            "method": {"timer": "perf_counter", **self.method},
            "lat_us": timing.latency(self.timed.seconds),
            "telemetry": timing.telemetry(self.timed.disturbed),
            "derived": {"bytes": self.n_bytes, "flops": self.flops},
            "check": {} if self.max_rel_err is None else {"max_rel_err": self.max_rel_err},
            "ok": True, "why": "",
        }  # fmt: skip
