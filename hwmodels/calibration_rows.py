"""Rows of measurements, as the microbenchmarks write them: JSON lines, checked at the door."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, StrictStr, ValidationError

from hwmodels.catalog_files import Closed
from hwmodels.errors import HardwareError

MOST_LINE_BYTES = 1 << 20
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "fp8": 8, "int4": 4, "uint8": 8}
NOT_SHAPE = ("m", "threads", "tokens")  # how much work, not of what shape
Floats = npt.NDArray[np.float64]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Open(Closed):
    """A sub-object that may hold more than is listed."""

    model_config = ConfigDict(extra="allow")


class _Device(_Open):
    name: StrictStr = Field(min_length=1)


class _Kernel(Closed):
    source: StrictStr
    config: dict[str, Any] = {}


class _Dtype(Closed):
    w: StrictStr = ""
    a: StrictStr = ""
    group: int = 0


class _Routing(_Open):
    counts: list[Annotated[int, Field(ge=0)]] = []


class _Telemetry(_Open):
    disturbed: bool = False


class _Latency(Closed):
    median: Positive
    p10: Positive
    p90: Positive
    n: int = Field(ge=1)


class _Derived(_Open):
    bytes: NotNegative = 0.0
    flops: NotNegative = 0.0


class RowModel(Closed):
    """One line as it was read; the schema of every benchmark in `kernels/`."""

    schema_: Literal[1] = Field(alias="schema")
    op: StrictStr = Field(min_length=1)
    key: StrictStr = ""
    device: _Device
    sw: dict[str, Any]
    kernel: _Kernel
    shape: dict[str, int | float | str]
    dtype: _Dtype
    routing: _Routing = _Routing()
    method: dict[str, Any] = {}
    lat_us: _Latency | None = None
    telemetry: _Telemetry = _Telemetry()
    derived: _Derived = _Derived()
    check: dict[str, Any] = {}
    ok: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement as the fit sees it.

    group      device, op, kernel, dtypes, threads: rows of one group share their constants
    shape      canonical text of the sizes that rows held out together have in common
    identity   the row's own key, or the hash of what it measured
    seconds    median; spread, the 90th percentile over the 10th
    disturbed  other work shared the cores while it was measured
    rows, n_bytes, flops  float64[pieces]: the work, one piece for each busy expert, else one;
                rows of the activations, 0 where there are none
    in_flight  how many such jobs are under way at once
    """

    group: tuple[str, ...]
    shape: str
    identity: str
    seconds: float
    spread: float
    rows: Floats
    n_bytes: Floats
    flops: Floats
    in_flight: float = 1.0
    disturbed: bool = False

    @property
    def op(self) -> str:
        """Name of the operator."""
        return self.group[1]


@dataclass(frozen=True, slots=True)
class Rows:
    """All rows of some files: failed counts those that say they are not ok; sha256 is of them."""

    rows: tuple[Row, ...]
    failed: int
    files: tuple[str, ...]
    sha256: str


def read_rows(paths: Sequence[Path]) -> Rows:
    """Rows of JSON-lines files and of folders of them, in order of file name.

    raises  HardwareError with file, line and field; OSError
    """
    files = _all_files(paths)
    digest, rows, failed = sha256(), [], 0
    for file in files:
        for model, line in _models(file):
            digest.update(line)
            if model.ok and model.lat_us is not None:
                rows.append(_row(model, model.lat_us))
            else:
                failed += 1
    if not rows:
        raise HardwareError(f"{files[0]}: no measured row")
    return Rows(tuple(rows), failed, tuple(file.name for file in files), digest.hexdigest())


def read_models(paths: Sequence[Path]) -> list[RowModel]:
    """Every row of the same files as it was written, those that are not ok among them.

    raises  HardwareError with file, line and field; OSError
    """
    return [model for file in _all_files(paths) for model, _ in _models(file)]


def _all_files(paths: Sequence[Path]) -> list[Path]:
    files = [
        file
        for path in paths
        for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
    ]
    if not files:
        raise HardwareError(f"{paths[0] if paths else 'no file'}: no .jsonl file in it")
    return files


def _models(path: Path) -> Iterator[tuple[RowModel, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), 1):
            if len(line) > MOST_LINE_BYTES:
                raise HardwareError(f"{path}:{number}: a line of over {MOST_LINE_BYTES} bytes")
            if line.strip():
                yield _model(line, f"{path}:{number}"), line


def _model(line: bytes, where: str) -> RowModel:
    try:
        return RowModel.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "row"
        shown = str(first["input"])[:60]
        raise HardwareError(f"{where}: {field}={shown!r}: {first['msg'].lower()}") from error
    except (ValueError, RecursionError) as error:
        raise HardwareError(f"{where}: not a JSON object: {str(error)[:80]}") from error


def _row(model: RowModel, latency: _Latency) -> Row:
    shape = model.shape
    work = _expert_pieces(model) if model.routing.counts else _one_piece(model)
    facts = (
        model.device.name, model.op, model.kernel.source, model.dtype.w, model.dtype.a,
        str(shape.get("threads", "")), _variant(shape),
    )  # fmt: skip
    common = {
        key: value
        for key, value in shape.items()
        if key not in NOT_SHAPE and not isinstance(value, str)
    }
    measured = json.dumps([facts, shape, model.routing.counts], sort_keys=True)
    return Row(
        facts,
        json.dumps(common, sort_keys=True),
        model.key or sha256(measured.encode()).hexdigest()[:16],
        latency.median * 1e-6,
        latency.p90 / latency.p10,
        *work,
        in_flight=float(shape.get("depth", 1)),
        disturbed=model.telemetry.disturbed,
    )


def _variant(shape: Mapping[str, int | float | str]) -> str:
    """The parts of a shape that are words ("even", "pinned"): each has constants of its own."""
    return ",".join(str(value) for _, value in sorted(shape.items()) if isinstance(value, str))


def _one_piece(model: RowModel) -> tuple[Floats, Floats, Floats]:
    rows = float(model.shape.get("m", model.shape.get("tokens", 0)))
    return np.array([rows]), np.array([model.derived.bytes]), np.array([model.derived.flops])


def _expert_pieces(model: RowModel) -> tuple[Floats, Floats, Floats]:
    """One piece an expert: its three matrices, and what it does for its own tokens."""
    counts = np.array([count for count in model.routing.counts if count], dtype=np.float64)
    total = counts.sum()
    if not total:
        return _one_piece(model)
    size = BITS.get(model.dtype.a or model.dtype.w, 16) / 8
    moved = 2 * counts * float(model.shape.get("hidden", 0)) * size
    weights = max(model.derived.bytes - moved.sum(), 0.0) / len(counts)
    return counts, weights + moved, model.derived.flops * counts / total
