"""Captures of the form simllm-preplay-trace, v1 and v2: JSON lines of one run, told by row_type.

`header` (provenance: experts, top_k, layers), then each `request` (its token ids) followed by one
line a token, `forward-token` (v1) or `observed-dispatch` (v2), with the experts of every layer;
v2 may add `kv-event` lines; a `footer` closes the file with the counts of what came before.
Token indices start again at 0 in decode, so a decode token's position is prompt length + index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from traces.errors import TraceError
from traces.formats.common import RawTrace, build_trace
from traces.formats.load import iter_jsonl, one_line
from traces.formats.options import ImportOptions
from traces.routing import DECODE, PREFILL, RoutingTrace

_Model = TypeVar("_Model", bound=BaseModel)
_SCHEMAS = ("simllm-preplay-trace-v1", "simllm-preplay-trace-v2")
_TOKEN_ROWS = ("forward-token", "observed-dispatch")


class _Provenance(BaseModel):
    """The part of the header that says what was captured; the rest is for people."""

    model_config = ConfigDict(extra="ignore", strict=True)

    expert_count: int = Field(gt=0)
    top_k: int = Field(gt=0)
    moe_layer_indices: list[int] = Field(min_length=1)
    model_id: str = ""
    runner: str = ""
    framework: str = ""
    device: str = ""


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    request_id: str
    input_token_ids: list[int]
    output_token_ids: list[int]


class _Choice(BaseModel):
    """One layer's routing of one token."""

    model_config = ConfigDict(extra="forbid", strict=True)

    layer_index: int
    expert_ids: list[int]
    gate_weights: list[float] | None = None


class _Token(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    row_type: Literal["forward-token", "observed-dispatch"]
    schema_: str = Field(alias="schema")
    phase: Literal["prefill", "decode"]
    request_id: str
    token_id: int
    token_index: int = Field(ge=0)
    routing: list[_Choice]
    routing_source: str = ""


@dataclass(slots=True)
class _Rows:
    """Token lines gathered so far, in the order of the file."""

    topk: list[list[list[int]]] = field(default_factory=list)
    weights: list[list[list[float]] | None] = field(default_factory=list)
    request: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)


def read(path: Path, options: ImportOptions) -> RoutingTrace:
    """The trace of a preplay file; TraceError names the line and field that does not fit."""
    provenance: _Provenance | None = None
    footer: dict[str, Any] | None = None
    requests: dict[str, tuple[int, _Request]] = {}
    rows, events = _Rows(), 0
    for number, record in iter_jsonl(path):
        where, kind = f"{path}: line {number}", record.get("row_type")
        if footer is not None:
            raise TraceError(f"{where}: {one_line(kind, 40)} after the footer, expected no more")
        if kind == "header":
            _check_schema(record.get("schema"), where)
            provenance = _parse(_Provenance, record.get("provenance"), where)
        elif provenance is None:
            raise TraceError(f"{where}: row_type {one_line(kind, 40)}, expected the header first")
        elif kind == "request":
            request = _parse(_Request, record, where)
            requests[request.request_id] = (len(requests), request)
        elif kind in _TOKEN_ROWS:
            _add_token(rows, _parse(_Token, record, where), requests, provenance, where)
        elif kind == "kv-event":
            events += 1
        elif kind == "footer":
            footer = record
        else:
            raise TraceError(f"{where}: row_type {one_line(kind, 40)} is unknown")
    if provenance is None or footer is None:
        raise TraceError(f"{path}: no footer, expected one at the end; the file was cut short")
    _check_footer(footer, rows, len(requests), events, path)
    return build_trace(_raw(rows, provenance, events, path), path, options)


def _check_schema(schema: Any, where: str) -> None:
    if schema not in _SCHEMAS:
        raise TraceError(
            f"{where}: schema {one_line(schema, 40)}, expected {' or '.join(_SCHEMAS)}"
        )


def _parse(kind: type[_Model], record: Any, where: str) -> _Model:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise TraceError(f"{where}: field {one_line(name, 60)}: {first['msg']}") from error


def _add_token(
    rows: _Rows,
    token: _Token,
    requests: dict[str, tuple[int, _Request]],
    provenance: _Provenance,
    where: str,
) -> None:
    if token.request_id not in requests:
        raise TraceError(
            f"{where}: request_id {one_line(token.request_id, 40)}, expected one announced before"
        )
    number, request = requests[token.request_id]
    decode = token.phase == "decode"
    ids = request.output_token_ids if decode else request.input_token_ids
    if token.token_index >= len(ids) or ids[token.token_index] != token.token_id:
        raise TraceError(
            f"{where}: token_id {token.token_id} at {token.phase} index {token.token_index}"
            f" is not that of request {one_line(token.request_id, 40)}"
        )
    found = [choice.layer_index for choice in token.routing]
    if found != provenance.moe_layer_indices:
        raise TraceError(
            f"{where}: layer_index {one_line(found, 60)}, expected those of the header"
        )
    for choice in token.routing:
        _check_choice(choice, provenance.top_k, where)
    rows.topk.append([choice.expert_ids for choice in token.routing])
    gates = [choice.gate_weights for choice in token.routing]
    rows.weights.append([gate for gate in gates if gate is not None] if all(gates) else None)
    rows.request.append(number)
    rows.position.append(token.token_index + decode * len(request.input_token_ids))
    rows.phase.append(DECODE if decode else PREFILL)


def _check_choice(choice: _Choice, top_k: int, where: str) -> None:
    gates = choice.gate_weights
    if len(choice.expert_ids) != top_k or (gates is not None and len(gates) != top_k):
        raise TraceError(
            f"{where}: layer {choice.layer_index}: {len(choice.expert_ids)} expert_ids,"
            f" {'no' if gates is None else len(gates)} gate_weights, expected top_k={top_k}"
        )


def _check_footer(
    footer: dict[str, Any], rows: _Rows, n_requests: int, events: int, path: Path
) -> None:
    decode = sum(rows.phase)
    prefill = len(rows.phase) - decode
    counted = {
        "request_count": n_requests,
        "kv_event_count": events,
        "prefill_forward_token_count": prefill,
        "prefill_dispatch_count": prefill,
        "decode_forward_token_count": decode,
        "decode_dispatch_count": decode,
    }
    for name, found in counted.items():
        if name in footer and footer[name] != found:
            raise TraceError(
                f"{path}: footer {name}={one_line(footer[name], 20)}, but {found} such lines"
            )
    if not rows.topk:
        raise TraceError(f"{path}: no token lines, expected {' or '.join(_TOKEN_ROWS)}")


def _raw(rows: _Rows, provenance: _Provenance, events: int, path: Path) -> RawTrace:
    complete = all(weights is not None for weights in rows.weights)
    parts = [f"preplay {path.name}", provenance.framework or provenance.runner, provenance.device]
    if events:
        parts.append(f"{events} kv-event lines not imported")
    try:
        topk = np.array(rows.topk, dtype=np.int64)
    except OverflowError as error:
        raise TraceError(f"{path}: expert_ids beyond 64 bits, expected ids") from error
    return RawTrace(
        topk=topk,
        n_experts=provenance.expert_count,
        layers=provenance.moe_layer_indices,
        request=np.array(rows.request),
        position=np.array(rows.position),
        phase=np.array(rows.phase),
        weights=np.array(rows.weights, dtype=np.float64) if complete else None,
        model=provenance.model_id.rsplit("/", 1)[-1].lower(),
        capture="; ".join(part for part in parts if part),
    )
