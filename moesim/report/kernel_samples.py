"""Measured rows as the comparison of kernels sees them: what was done, by what, in which run."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from hwmodels.calibration_rows import RowModel
from moesim.errors import SimulationError

EXPERT_AXIS = "tokens per expert"
AXES = ("m", "tokens", "batch")  # the first of these that a shape has grows with the batch
RANGE_ENDS = (1.0, 16.0, 128.0)  # of the load
RANGES = ("to 1", "to 16", "to 128", "above")
SAME_WORK: Mapping[str, str] = {"cpu_gemv": "cpu_gemm"}  # one row of the same product
NOT_MEASURED, DISTURBED = "not measured", "other work shared the cores"
_REVISION = "git"
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """What rows must share to be compared: the device, and the versions of all software.

    Revisions of our own code are no part of it, as they are none of the rows' keys: a folder has
    one row a point, whichever revision measured it.
    """

    device: str
    software: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Device, and the libraries that kernels come from."""
        versions = dict(self.software)
        shown = [f"{lib} {versions[lib]}" for lib in ("torch", "triton") if lib in versions]
        return ", ".join([self.device, *shown])


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured row.

    revision     of our code; kernel, what was timed ("torch.grouped_mm"); ours begin with "moesim"
    shape        the sizes, by name; fixed, canonical text of all but the one that grows
    dist, drawn  the law of the routing with its seed, and canonical text of what was drawn
    weights, activations, group   dtypes as in the row, and the group size of the scales
    axis, load   tokens per expert (mean over all experts), or m, tokens or batch; "" and 1 for none
    seconds      median latency; n_bytes and flops, what the job needs
    throttled    the device ran below its clock
    """

    run: Run
    revision: str
    op: str
    kernel: str
    shape: Mapping[str, int | float | str]
    fixed: str
    dist: str
    drawn: str
    weights: str
    activations: str
    group: int
    axis: str
    load: float
    seconds: float
    n_bytes: float
    flops: float
    throttled: bool = False

    @property
    def threads(self) -> int:
        """Threads on a CPU, 0 where the row says none."""
        threads = self.shape.get("threads", 0)
        return 0 if isinstance(threads, str) else int(threads)

    @property
    def work(self) -> tuple[object, ...]:
        """What was computed, whatever computed it and in whichever format its weights are."""
        op = SAME_WORK.get(self.op, self.op)
        return (self.run, op, self.fixed, self.axis, self.load, self.dist, self.drawn)

    @property
    def point(self) -> tuple[object, ...]:
        """What was computed in which format; kernels that share it are peers."""
        return (*self.work, self.weights, self.activations, self.group)


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows that can be compared, and how many cannot, by reason."""

    samples: tuple[Sample, ...]
    left_out: Mapping[str, int]


def samples_of(models: Iterable[RowModel]) -> Samples:
    """The calm, successful rows; of rows of one kernel at one point the last counts."""
    found: dict[tuple[object, ...], Sample] = {}
    left_out: Counter[str] = Counter()
    for model in models:
        if reason := _reason(model):
            left_out[reason] += 1
            continue
        sample = _sample(model)
        key = (*sample.point, sample.kernel)
        left_out["measured again later"] += key in found
        found[key] = sample
    return Samples(tuple(found.values()), {why: n for why, n in left_out.items() if n})


def _reason(model: RowModel) -> str:
    if not model.ok or model.lat_us is None:
        return short_reason(model.why) or NOT_MEASURED
    return DISTURBED if model.telemetry.disturbed else ""


def short_reason(why: str) -> str:
    """A reason without the name of the error that only says that it is one."""
    return why.removeprefix("CannotMeasurePoint: ").strip()


def _sample(model: RowModel) -> Sample:
    if model.lat_us is None:
        raise ValueError(f"{model.op}: a row without a latency is no sample")
    shape, routing = model.shape, model.routing.model_dump()
    axis, load = _load(shape)
    grows = "tokens" if axis == EXPERT_AXIS else axis
    fixed = {name: size for name, size in shape.items() if name != grows}
    telemetry = model.telemetry.model_extra or {}
    return Sample(
        run=Run(model.device.name, _versions(model.sw)),
        revision=str(model.sw.get(_REVISION, "")),
        op=model.op,
        kernel=model.kernel.source,
        shape=shape,
        fixed=json.dumps(fixed, sort_keys=True),
        dist=", ".join(str(routing[name]) for name in ("dist", "seed") if name in routing),
        drawn=json.dumps(routing.get("counts", [])),
        weights=model.dtype.w,
        activations=model.dtype.a or model.dtype.w,
        group=model.dtype.group,
        axis=axis,
        load=load,
        seconds=model.lat_us.median * 1e-6,
        n_bytes=model.derived.bytes,
        flops=model.derived.flops,
        throttled=telemetry.get("throttled") is True,
    )


def _versions(software: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, str(value)) for key, value in software.items() if key != _REVISION))


def _load(shape: Mapping[str, int | float | str]) -> tuple[str, float]:
    """The axis along which a batch grows, and the place on it."""
    if {"tokens", "topk", "experts"} <= set(shape):
        tokens, topk, experts = (_size(shape, name) for name in ("tokens", "topk", "experts"))
        return EXPERT_AXIS, tokens * topk / experts
    axis = next((name for name in AXES if name in shape), "")
    return axis, _size(shape, axis) if axis else 1.0


def _size(shape: Mapping[str, int | float | str], name: str) -> float:
    size = shape[name]
    if isinstance(size, str) or not 0 < size < math.inf:
        raise SimulationError(f"a row's shape.{name}={size!r}, expected a positive number")
    return float(size)


def load_range(load: float) -> str:
    """The name of the range that a load is in, of RANGES."""
    return RANGES[sum(load > end for end in RANGE_ENDS)]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by their key, in the order they came."""
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
