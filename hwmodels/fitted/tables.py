"""Public tables of measured operators (Parquet, aiconfigurator's columns) as work and seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hwmodels.errors import HardwareError
from hwmodels.fitted.benchmark_routing import mean_routed
from hwmodels.fitted.collective_tables import (
    COLLECTIVE_SHAPE,
    EXCHANGE_SHAPE,
    WIRE_BITS,
    collective_work,
    low_latency_work,
    normal_work,
    rows_of,
)
from hwmodels.fitted.experts import ROUTED
from hwmodels.fitted.parts import Floats, Work

if TYPE_CHECKING:
    import pandas as pd

MOST_FILE_BYTES = 2 << 30
HARDWARE = MappingProxyType(
    {
        "a100_sxm": "a100-80gb", "h100_sxm": "h100", "h200_sxm": "h200", "l40s": "l40s",
        "h100_or_h200": "h100", "b200_sxm": "b200", "gb200": "gb200", "l40": "l40", "h20": "h20",
    }
)  # fmt: skip
# Bits of weights and activations by the table's name of a format; scales included.
BITS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "bfloat16": (16, 16), "float16": (16, 16), "fp8": (8, 8), "fp8_block": (8.002, 8),
        "int8_wo": (8.125, 16), "int4_wo": (4.25, 16), "w4a16_mxfp4": (4.25, 16),
        "w4a8_mxfp4_mxfp8": (4.25, 8), "w4afp8": (4.25, 8), "sq": (8, 8), "nvfp4": (4.5, 4),
    }
)  # fmt: skip
MLA = MappingProxyType({"kv_rank": 512.0, "rope_dim": 64.0, "nope_dim": 128.0, "v_dim": 128.0})


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows of one kernel on one device.

    family   of operators (`model.FAMILIES`); kernel, "framework version dtypes name"
    device   catalogue name; dtype, the table's name of the number format
    work     columns of the family; seconds float64[n]
    watts    float64[n], NaN where power was not measured
    shape    int64[n], rows of one number have the same sizes but for how much work
    model    int64[n], the same but for parallel degrees also
    tokens   float64[n], how much work: tokens, rows or sequences
    skew     str[n], name of the routing distribution, "" where there is none
    """

    family: str
    kernel: str
    device: str
    dtype: str
    work: Work
    seconds: Floats
    watts: Floats
    shape: npt.NDArray[np.int64]
    model: npt.NDArray[np.int64]
    tokens: Floats
    skew: npt.NDArray[np.str_]


@dataclass(frozen=True, slots=True)
class Table:
    """All kernels of some files; skipped counts rows by the reason they were left out."""

    groups: tuple[Measured, ...]
    skipped: Mapping[str, int]
    files: tuple[str, ...]
    sha256: str


def read_tables(paths: Sequence[Path]) -> Table:
    """Every kernel of Parquet files.

    raises  HardwareError naming the file that is no such table; OSError
    """
    groups: list[Measured] = []
    skipped: dict[str, int] = {}
    digest = sha256()
    for path in paths:
        digest.update(path.read_bytes() if path.stat().st_size <= MOST_FILE_BYTES else b"")
        found, left_out = _read(path)
        groups += found
        for reason, count in left_out.items():
            skipped[reason] = skipped.get(reason, 0) + count
    return Table(tuple(groups), skipped, tuple(path.name for path in paths), digest.hexdigest())


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one kind of table is read: columns that tell it, and its rows as work.

    milliseconds  column of the times; dtype, columns of the formats
    work          columns of a family from a group of rows of one kernel
    shape, model  columns that rows held out together have in common
    tokens        columns whose product is how much work
    """

    family: str
    columns: tuple[str, ...]
    milliseconds: str
    dtype: tuple[str, ...]
    work: Callable[[pd.DataFrame, str], Work]
    shape: tuple[str, ...]
    model: tuple[str, ...]
    tokens: tuple[str, ...]


def _read(path: Path) -> tuple[list[Measured], dict[str, int]]:
    import pandas as pd
    import pyarrow as pa

    if path.stat().st_size > MOST_FILE_BYTES:
        raise HardwareError(f"{path}: over {MOST_FILE_BYTES} bytes")
    try:
        rows = rows_of(pd.read_parquet(path))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise HardwareError(f"{path}: not a Parquet file: {str(error)[:80]}") from error
    kind = _kind(path, rows)
    try:
        return _groups(kind, rows)
    except HardwareError as error:
        raise HardwareError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        # a column that is missing, or holds words
        why = str(error).strip("'")[:80]
        raise HardwareError(f"{path}: not a table of {kind.family}: {why}") from error


def _groups(kind: _Kind, rows: pd.DataFrame) -> tuple[list[Measured], dict[str, int]]:
    """The kernels of a table, and how many rows were left out by reason."""
    known = rows["hw"].isin(list(HARDWARE))
    timed = rows[kind.milliseconds] > 0
    formats = rows[kind.dtype[0]].isin([*BITS, *WIRE_BITS])
    skipped = {
        "device not in the catalogue": int((~known).sum()),
        "no time": int((known & ~timed).sum()),
        "number format not known": int((known & timed & ~formats).sum()),
    }
    kept = rows[known & timed & formats].reset_index(drop=True)
    keys = ["hw", "framework", "version", *kind.dtype, "kernel_source"]
    groups = [
        _group(kind, tuple(map(str, key)), group) for key, group in kept.groupby(keys, sort=True)
    ]
    return groups, {reason: count for reason, count in skipped.items() if count}


def _kind(path: Path, rows: pd.DataFrame) -> _Kind:
    has = set(rows.columns)
    for kind in KINDS:
        if has.issuperset(kind.columns) and _is_decode(kind, rows):
            return kind
    raise HardwareError(f"{path}: no known table has columns {', '.join(sorted(has))[:120]}")


def _is_decode(kind: _Kind, rows: pd.DataFrame) -> bool:
    """Decode and prefill tables have the same columns; the operator's name tells them apart."""
    if "op_name" not in rows or not len(rows):
        return True
    decodes = str(rows["op_name"].iloc[0]).startswith("generation")
    return decodes == kind.family.endswith("decode")


def _group(kind: _Kind, key: tuple[str, ...], rows: pd.DataFrame) -> Measured:
    hardware, framework, version, *rest = key
    dtypes, source = rest[:-1], rest[-1]
    watts = rows["power_w"] if "power_w" in rows else np.full(len(rows), np.nan)
    skew = rows["distribution"] if "distribution" in rows else np.full(len(rows), "")
    name = " kv ".join(dtypes)
    return Measured(
        kind.family,
        f"{framework} {version} {name} {source}",
        HARDWARE[hardware],
        dtypes[0],
        kind.work(rows, dtypes[0]),
        rows[kind.milliseconds].to_numpy(np.float64) * 1e-3,
        np.asarray(watts, dtype=np.float64),
        rows.groupby(list(kind.shape), dropna=False).ngroup().to_numpy().astype(np.int64),
        rows.groupby(list(kind.model), dropna=False).ngroup().to_numpy().astype(np.int64),
        rows[list(kind.tokens)].prod(axis=1).to_numpy(np.float64),
        np.asarray(skew, dtype=np.str_),
    )


def _numbers(rows: pd.DataFrame, **names: str) -> dict[str, Floats]:
    """Columns under our names."""
    return {ours: rows[theirs].to_numpy(np.float64) for ours, theirs in names.items()}


def _constant(rows: pd.DataFrame, **values: float) -> dict[str, Floats]:
    return {name: np.full(len(rows), value, dtype=np.float64) for name, value in values.items()}


def _gemm_work(rows: pd.DataFrame, dtype: str) -> Work:
    stored, computed = BITS[dtype]
    return _numbers(rows, m="m", n="n", k="k") | _constant(
        rows, weight_bits=stored, activation_bits=computed
    )


def _expert_work(rows: pd.DataFrame, dtype: str) -> Work:
    stored, computed = BITS[dtype]
    gated = "nongated" not in str(rows["kernel_source"].iloc[0])
    columns = _numbers(
        rows, tokens="num_tokens", hidden="hidden_size", top_k="topk", experts="num_experts"
    )
    of_rank = _numbers(
        rows, inter="inter_size", tensor="moe_tp_size", experts="num_experts", ranks="moe_ep_size"
    )
    columns["intermediate"] = of_rank["inter"] // of_rank["tensor"]
    columns["local_experts"] = of_rank["experts"] // of_rank["ranks"]
    columns |= _constant(
        rows, weight_bits=stored, activation_bits=computed, matrices=3.0 if gated else 2.0
    )
    return columns | _benchmark_counts(rows)


def _benchmark_counts(rows: pd.DataFrame) -> dict[str, Floats]:
    """ROUTED of each row: the mean over draws of its distribution."""
    key = ["num_tokens", "num_experts", "topk", "moe_ep_size", "distribution"]
    distinct = rows[key].drop_duplicates()
    found = [
        mean_routed(int(tokens), int(experts), int(top_k), int(ranks), str(distribution))
        for tokens, experts, top_k, ranks, distribution in distinct.itertuples(index=False)
    ]
    of_key = distinct.assign(**dict(zip(ROUTED, np.array(found).T, strict=True)))
    merged = rows[key].merge(of_key, on=key, how="left")
    return {name: merged[name].to_numpy(np.float64) for name in ROUTED}


def _attention_work(rows: pd.DataFrame, dtype: str) -> Work:
    columns = _numbers(
        rows, batch="batch_size", new_tokens="isl", heads="num_heads",
        kv_heads="num_key_value_heads", head_dim="head_dim", window="window_size",
    )  # fmt: skip
    columns["window"] = np.nan_to_num(columns["window"])
    columns["kv_heads"] = np.where(columns["kv_heads"] > 0, columns["kv_heads"], columns["heads"])
    return columns | _cache(rows, dtype)


def _latent_work(rows: pd.DataFrame, dtype: str) -> Work:
    columns = _numbers(
        rows, batch="batch_size", new_tokens="isl", heads="num_heads", tensor_parallel="tp_size"
    )
    return columns | _constant(rows, **MLA) | _cache(rows, dtype)


def _cache(rows: pd.DataFrame, dtype: str) -> dict[str, Floats]:
    stored = BITS.get(str(rows["kv_cache_dtype"].iloc[0]), (16.0, 16.0))[0]
    cached = rows["isl"].to_numpy(np.float64) + rows["step"].to_numpy(np.float64)
    return {"cached_tokens": cached} | _constant(
        rows, kv_bits=stored, activation_bits=BITS[dtype][1]
    )


_EXPERT_MODEL = ("hidden_size", "inter_size", "topk", "num_experts")
_ATTENTION = ("num_heads", "num_key_value_heads", "head_dim", "window_size")
_MLA_COLUMNS = ("num_heads", "batch_size", "isl", "step", "mla_dtype", "latency")
_ATTENTION_COLUMNS = ("num_heads", "head_dim", "batch_size", "isl", "attn_dtype", "latency")
_ATTENTION_DTYPE, _MLA_DTYPE = ("attn_dtype", "kv_cache_dtype"), ("mla_dtype", "kv_cache_dtype")
_BATCH = ("batch_size", "isl")
KINDS = (
    _Kind("experts", ("moe_dtype", "num_tokens", "topk", "latency_ms"), "latency_ms",
          ("moe_dtype",), _expert_work, (*_EXPERT_MODEL, "moe_tp_size", "moe_ep_size"),
          _EXPERT_MODEL, ("num_tokens",)),
    _Kind("gemm", ("gemm_dtype", "m", "n", "k", "latency_ms"), "latency_ms", ("gemm_dtype",),
          _gemm_work, ("n", "k"), ("n", "k"), ("m",)),
    _Kind("latent_decode", _MLA_COLUMNS, "latency", _MLA_DTYPE, _latent_work, ("num_heads",),
          ("num_heads",), _BATCH),
    _Kind("latent_prefill", _MLA_COLUMNS, "latency", _MLA_DTYPE, _latent_work, ("num_heads",),
          ("num_heads",), _BATCH),
    _Kind("attention_decode", _ATTENTION_COLUMNS, "latency", _ATTENTION_DTYPE, _attention_work,
          _ATTENTION, _ATTENTION, _BATCH),
    _Kind("attention_prefill", _ATTENTION_COLUMNS, "latency", _ATTENTION_DTYPE, _attention_work,
          _ATTENTION, _ATTENTION, _BATCH),
    _Kind("collective", ("wire_dtype", "num_gpus", "bytes"), "milliseconds", ("wire_dtype",),
          collective_work, COLLECTIVE_SHAPE, COLLECTIVE_SHAPE, ("bytes",)),
    _Kind("exchange_normal", ("wire_dtype", "num_token", "dispatch_sms"), "milliseconds",
          ("wire_dtype",), normal_work, EXCHANGE_SHAPE, EXCHANGE_SHAPE, ("num_token",)),
    _Kind("exchange_low_latency", ("wire_dtype", "num_token", "node_num"), "milliseconds",
          ("wire_dtype",), low_latency_work, EXCHANGE_SHAPE, EXCHANGE_SHAPE, ("num_token",)),
)  # fmt: skip
