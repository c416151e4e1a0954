"""What was fitted on one device, in one small file: arrays and a JSON head in an .npz.

Files of the four measured devices come with the package (`calibrations/`).
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile

import numpy as np
from pydantic import Field, ValidationError

from hwmodels.catalog_files import Closed
from hwmodels.errors import HardwareError
from hwmodels.fitted.model import FAMILIES, OperatorModel
from hwmodels.fitted.trees import LEAF, Trees

SHIPPED = Path(__file__).parents[1] / "calibrations"
MOST_FILE_BYTES = 64 << 20
_ARRAYS = (("feature", np.uint8), ("number", np.float32), ("left", np.uint8), ("roots", np.int32),
           ("low", np.float32), ("high", np.float32))  # fmt: skip
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class FittedDevice:
    """Every kernel fitted on one device.

    files, data_sha256  what it was fitted to
    held_out            families' mean absolute error in per cent on shapes that were kept apart
    note                what a reader should know
    """

    device: str
    models: tuple[OperatorModel, ...]
    files: tuple[str, ...]
    data_sha256: str
    held_out: Mapping[str, float]
    note: str = ""


class _Head(Closed):
    family: str
    kernel: str
    constants: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    baseline: Finite
    rows: int = Field(ge=0)
    error_pct: Finite | None
    p90_pct: Finite | None
    sizes: dict[str, Annotated[int, Field(ge=0, le=1 << 24)]]


class _File(Closed):
    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["fitted operators"]
    device: str
    files: tuple[str, ...]
    data_sha256: str
    held_out: dict[str, Finite]
    note: str
    models: list[_Head]


def save(fitted: FittedDevice, path: Path) -> None:
    """Write whole or not at all; equal fits give equal bytes."""
    arrays: dict[str, list[np.ndarray]] = {name: [] for name, _ in _ARRAYS}
    heads = []
    for model in sorted(fitted.models, key=lambda m: (m.family, m.kernel)):
        parts = _arrays_of(model)
        for name, array in parts.items():
            arrays[name].append(array)
        heads.append(_head_of(model, {name: len(array) for name, array in parts.items()}))
    document = {
        "schema": 1, "kind": "fitted operators", "device": fitted.device,
        "files": list(fitted.files), "data_sha256": fitted.data_sha256,
        "held_out": dict(fitted.held_out), "note": fitted.note, "models": heads,
    }  # fmt: skip
    head = np.frombuffer(json.dumps(document, sort_keys=True).encode(), np.uint8)
    joined = {
        name: np.concatenate([np.zeros(0, dtype), *arrays[name]]).astype(dtype)
        for name, dtype in _ARRAYS
    }
    content = io.BytesIO()
    arrays_by_name: dict[str, Any] = {"head": head, **joined}
    np.savez_compressed(content, **arrays_by_name)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content.getvalue())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> FittedDevice:
    """Read what `save` wrote; HardwareError names the file and what is wrong."""
    if path.stat().st_size > MOST_FILE_BYTES:
        raise HardwareError(f"{path}: over {MOST_FILE_BYTES} bytes, not fitted operators")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as held:
            arrays = {name: held[name] for name in ("head", *(name for name, _ in _ARRAYS))}
        read = _File.model_validate(json.loads(arrays["head"].tobytes()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise HardwareError(f"{path}: {where}: {first['msg'].lower()}") from error
    except (ValueError, KeyError, EOFError, BadZipFile, RecursionError) as error:
        raise HardwareError(f"{path}: not fitted operators: {str(error)[:80]}") from error
    models = _models(read, arrays, path)
    return FittedDevice(read.device, models, read.files, read.data_sha256, read.held_out, read.note)


@cache
def shipped(device: str) -> FittedDevice | None:
    """The fit of a device that comes with the package, by catalogue name; None without one."""
    path = SHIPPED / f"{device}.npz"
    return load(path) if path.is_file() else None


def shipped_names() -> tuple[str, ...]:
    """Devices whose fit comes with the package, sorted."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.npz")))


def _arrays_of(model: OperatorModel) -> dict[str, np.ndarray]:
    trees = model.trees
    return {
        "feature": trees.feature, "number": trees.number, "left": trees.left,
        "roots": trees.roots, "low": model.low, "high": model.high,
    }  # fmt: skip


def _head_of(model: OperatorModel, sizes: Mapping[str, int]) -> dict[str, object]:
    known = math.isfinite(model.error_pct)
    return {
        "family": model.family, "kernel": model.kernel, "constants": dict(model.constants),
        "baseline": model.trees.baseline, "rows": model.rows, "sizes": dict(sizes),
        "error_pct": model.error_pct if known else None,
        "p90_pct": model.p90_pct if known else None,
    }  # fmt: skip


def _models(read: _File, arrays: Mapping[str, np.ndarray], path: Path) -> tuple[OperatorModel, ...]:
    at = dict.fromkeys((name for name, _ in _ARRAYS), 0)
    found = []
    for head in read.models:
        parts = {}
        for name, dtype in _ARRAYS:
            end = at[name] + head.sizes.get(name, 0)
            if arrays[name].dtype != dtype or end > len(arrays[name]):
                raise HardwareError(f"{path}: {head.kernel}: array {name} is damaged")
            parts[name] = arrays[name][at[name] : end]
            at[name] = end
        found.append(_model(head, parts, read.device, path))
    return tuple(found)


def _model(head: _Head, parts: Mapping[str, np.ndarray], device: str, path: Path) -> OperatorModel:
    trees = Trees(parts["feature"], parts["number"], parts["left"], parts["roots"], head.baseline)
    if head.family not in FAMILIES or len(parts["low"]) != len(parts["high"]):
        raise HardwareError(f"{path}: {head.family} {head.kernel}: not a known family")
    _check(trees, len(parts["low"]), f"{path}: {head.kernel}")
    return OperatorModel(
        head.family, head.kernel, device, head.constants, trees, parts["low"], parts["high"],
        head.rows, math.nan if head.error_pct is None else head.error_pct,
        math.nan if head.p90_pct is None else head.p90_pct,
    )  # fmt: skip


def _check(trees: Trees, n_shapes: int, where: str) -> None:
    """Every walk stays inside its tree and goes downwards, so that evaluation ends."""
    ends = np.append(trees.roots[1:], len(trees.feature))
    sizes = np.maximum(ends - trees.roots, 0)
    size, root = np.repeat(sizes, sizes), np.repeat(trees.roots, sizes)
    inner = trees.feature != LEAF
    fits = len(trees.feature) == len(trees.number) == len(trees.left) == len(root)
    if not fits or (trees.feature[inner] >= n_shapes).any() or not np.isfinite(trees.number).all():
        raise HardwareError(f"{where}: trees are damaged")
    left, place = trees.left[inner].astype(np.int64), (np.arange(len(root)) - root)[inner]
    if (left <= place).any() or (left + 1 >= size[inner]).any():
        raise HardwareError(f"{where}: a tree does not go down")
