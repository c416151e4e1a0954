"""The stored form of a trace: one Parquet file, provenance in its metadata, read in chunks.

Columns `request position phase [forward]` are scalars; `topk [weights scores]` are fixed-size
lists of moe_layers * top_k (scores: moe_layers * n_experts) values per token. Counts are a file
of the same kind with one row a layer. Writing goes beside the target, then renames.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from traces.errors import TraceError
from traces.files import replacing
from traces.routing import ExpertCounts, RoutingTrace, content_hash

_KEY = b"moesim"
_SCALARS: dict[str, type[np.generic]] = {
    "request": np.int32,
    "position": np.int32,
    "phase": np.int8,
    "forward": np.int64,
}
_LISTS: dict[str, type[np.generic]] = {
    "topk": np.int16,
    "weights": np.float16,
    "scores": np.float16,
}
_MAX_CELLS = 2**34


class _Header(BaseModel):
    """What the metadata of a trace file must say."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1]
    kind: Literal["routing_trace", "expert_counts"]
    model: str
    capture: str
    n_experts: int = Field(gt=0, le=2**15 - 1)
    top_k: int = Field(ge=0)
    layers: list[int]
    content_sha256: str


def write(trace: RoutingTrace | ExpertCounts, path: Path, rows_per_group: int = 65536) -> None:
    """Write a trace or counts to path; the file appears whole or not at all."""
    table = _counts_table(trace) if isinstance(trace, ExpertCounts) else _trace_table(trace)
    header = _Header(
        schema_version=1,
        kind="expert_counts" if isinstance(trace, ExpertCounts) else "routing_trace",
        model=trace.model,
        capture=trace.capture,
        n_experts=trace.n_experts,
        top_k=trace.top_k,
        layers=list(trace.layers),
        content_sha256=content_hash(trace),
    )
    table = table.replace_schema_metadata({_KEY: header.model_dump_json().encode()})
    with replacing(path) as beside:
        pq.write_table(table, beside, compression="zstd", row_group_size=rows_per_group)


def read(path: Path) -> RoutingTrace | ExpertCounts:
    """The trace or counts in a file that `write` made; TraceError when it is anything else."""
    file, header = _open(path)
    try:
        table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{path}: cannot be read, truncated or damaged ({error})") from error
    trace = _from_table(table, header, path)
    if content_hash(trace) != header.content_sha256:
        raise TraceError(f"{path}: content does not match its content_sha256, the file was altered")
    return trace


def iter_chunks(path: Path, rows: int = 65536) -> Iterator[RoutingTrace]:
    """The trace in pieces of at most `rows` tokens, so that it may exceed memory.

    raises  TraceError when the file holds counts only or is damaged
    """
    file, header = _open(path)
    if header.kind != "routing_trace":
        raise TraceError(f"{path}: holds expert counts, expected a routing trace with token order")
    try:
        for batch in file.iter_batches(batch_size=rows):
            chunk = _from_table(pa.Table.from_batches([batch]), header, path)
            assert isinstance(chunk, RoutingTrace)  # noqa: S101 - for the type checker
            yield chunk
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{path}: cannot be read, truncated or damaged ({error})") from error


def is_trace_file(path: Path) -> bool:
    """Whether path is a Parquet file with this package's metadata."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return False
    return _KEY in metadata


def _open(path: Path) -> tuple[pq.ParquetFile, _Header]:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise TraceError(f"{path}: no such file") from error
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{path}: not a Parquet file, truncated or damaged ({error})") from error
    metadata = file.schema_arrow.metadata or {}
    if _KEY not in metadata:
        raise TraceError(f"{path}: no trace metadata; make it with `moesim trace import`")
    try:
        header = _Header.model_validate_json(metadata[_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise TraceError(f"{path}: metadata field {field}: {first['msg']}") from error
    cells = file.metadata.num_rows * len(header.layers) * max(header.top_k, 1)
    if cells > _MAX_CELLS:
        raise TraceError(f"{path}: {cells} cells, expected at most {_MAX_CELLS}; read it in chunks")
    return file, header


def _trace_table(trace: RoutingTrace) -> Any:
    columns: dict[str, Any] = {}
    for name in (*_SCALARS, *_LISTS):
        array = getattr(trace, name)
        if array is None:
            continue
        flat = np.ascontiguousarray(array, dtype=_SCALARS.get(name, _LISTS.get(name)))
        if name in _SCALARS:
            columns[name] = pa.array(flat)
        else:
            width = flat.shape[1] * flat.shape[2]
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width)
    return pa.table(columns)


def _counts_table(counts: ExpertCounts) -> Any:
    flat = np.ascontiguousarray(counts.counts, dtype=np.float64)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    return pa.table({"counts": lists})


def _from_table(table: Any, header: _Header, path: Path) -> RoutingTrace | ExpertCounts:
    layers = tuple(header.layers)
    if header.kind == "expert_counts":
        values = _list_column(table, "counts", np.float64, header.n_experts, path)
        counts = values.reshape(-1, header.n_experts)
        return ExpertCounts(counts, layers, header.top_k, header.model, header.capture)
    fields: dict[str, Any] = {}
    for name, dtype in _SCALARS.items():
        if name in table.column_names:
            fields[name] = table[name].to_numpy().astype(dtype, copy=False)
        elif name != "forward":
            raise TraceError(f"{path}: column {name} is missing")
    width = {"topk": header.top_k, "weights": header.top_k, "scores": header.n_experts}
    for name, dtype in _LISTS.items():
        if name in table.column_names:
            flat = _list_column(table, name, dtype, len(layers) * width[name], path)
            fields[name] = flat.reshape(-1, len(layers), width[name])
        elif name == "topk":
            raise TraceError(f"{path}: column topk is missing")
    return RoutingTrace(
        n_experts=header.n_experts,
        layers=layers,
        model=header.model,
        capture=header.capture,
        **fields,
    )


def _list_column(
    table: Any, name: str, dtype: npt.DTypeLike, width: int, path: Path
) -> npt.NDArray[Any]:
    if name not in table.column_names:
        raise TraceError(f"{path}: column {name} is missing")
    column = table[name].combine_chunks()
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != width:
        raise TraceError(f"{path}: column {name} is {kind}, expected lists of {width} values")
    values = column.flatten().to_numpy(zero_copy_only=False)
    if values.dtype != np.dtype(dtype) or len(values) != width * len(column):
        raise TraceError(f"{path}: column {name} holds {values.dtype}, expected {np.dtype(dtype)}")
    return np.asarray(values)
