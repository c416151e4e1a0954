"""Experts returned with the answers: SGLang and vLLM `return_routed_experts`, one request each.

SGLang   `meta_info.routed_experts` (or `sglext`): base64 of little-endian int32 bytes whose shape
         [tokens, layers, top_k] the response does not say, so the model must be given
vLLM     `choices[].routed_experts`: base64 of a whole npy, or nested lists; newer servers put the
         prompt's part into `prompt_routed_experts`
array    the same as a bare .npy, or as `routed_experts` in an .npz, one request

All hold logical ids with every layer of the model; dense layers are all 0 and are dropped. The
last token of a request has no forward pass, so there is one row less than tokens.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError
from traces.formats.common import RawTrace, build_trace, shape_of
from traces.formats.load import (
    as_array,
    head,
    iter_jsonl,
    load_json,
    npy_array,
    npy_from_bytes,
    npz_array,
    one_line,
)
from traces.formats.options import ImportOptions
from traces.routing import DECODE, MISSING, PREFILL, RoutingTrace

Array = npt.NDArray[Any]
_SAMPLE = 1024  # tokens looked at when telling ids from other integers


@dataclass(frozen=True, slots=True)
class _Answer:
    """Rows [tokens, layers, top_k] of one request, the first at position `start`."""

    rows: Array
    start: int = 0
    prompt_tokens: int | None = None


def read(path: Path, options: ImportOptions) -> RoutingTrace:
    """The trace of one or many answers; TraceError names the response that does not fit."""
    answers = list(_answers(path, options))
    if not answers:
        raise TraceError(f"{path}: no routed_experts in it, expected at least one")
    shapes = sorted({answer.rows.shape[1:] for answer in answers})
    if len(shapes) != 1:
        raise TraceError(
            f"{path}: routed_experts: [layers, top_k] of {one_line(shapes, 80)}, expected one"
        )
    rows = np.concatenate([answer.rows for answer in answers])
    columns, layers, dropped = _moe_columns(rows, path, options)
    rows = np.ascontiguousarray(rows[:, columns])
    _refuse_other_integers(rows, layers, path)
    position = np.concatenate([a.start + np.arange(len(a.rows)) for a in answers])
    lengths = [len(answer.rows) for answer in answers]
    prompts = [-1 if a.prompt_tokens is None else a.prompt_tokens for a in answers]
    prompt = np.repeat(np.array(prompts), lengths)
    notes = [f"routed_experts {path.name}", "last token of each request not captured"]
    if dropped:
        notes.append(f"{dropped} all-zero layers dropped")
    if options.model is None and options.layers is None:
        notes.append("layer indices are those of the array")
    if min(prompts) < 0:
        notes.append("prompt length not in the file, such requests are marked prefill")
    raw = RawTrace(
        topk=rows,
        layers=layers,
        request=np.repeat(np.arange(len(answers)), lengths),
        position=position,
        phase=np.where((position >= prompt) & (prompt >= 0), DECODE, PREFILL),
        capture="; ".join(notes),
    )
    return build_trace(raw, path, options)


# --- files -----------------------------------------------------------------------------------


def _answers(path: Path, options: ImportOptions) -> Iterator[_Answer]:
    magic = head(path, 6)
    if magic == b"\x93NUMPY":
        yield _Answer(_rows(npy_array(path), str(path)))
    elif magic[:2] == b"PK":
        yield _Answer(_rows(npz_array(path, "routed_experts"), str(path)))
    else:
        for where, response in _responses(path):
            yield from _from_response(response, where, options)


def _responses(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every response of a JSON file (one, or a list of them) or of a JSON lines file."""
    if _is_lines(path):
        for number, response in iter_jsonl(path):
            yield f"{path}: line {number}", response
        return
    content = load_json(path)
    for number, response in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(response, dict):
            raise TraceError(f"{path}: response {number} is no object")
        yield f"{path}: response {number}", response


def _is_lines(path: Path) -> bool:
    """Whether the first line is an object by itself: '{' to '}' with a line after it, or not."""
    with path.open("rb") as file:
        first = file.readline().strip()
        return first.startswith(b"{") and first.endswith(b"}") and bool(file.readline().strip())


# --- responses -------------------------------------------------------------------------------


def _from_response(
    response: dict[str, Any], where: str, options: ImportOptions
) -> Iterator[_Answer]:
    meta = _dict(response, "meta_info")
    counts = meta or _dict(response, "usage") or response
    prompt, completion = _count(counts, "prompt_tokens"), _count(counts, "completion_tokens")
    if "choices" in response:
        yield from _from_choices(response, prompt, where, options)
        return
    holder = meta if "routed_experts" in meta else _dict(response, "sglext") or response
    if holder.get("routed_experts") is None:
        return
    rows = _decode(holder["routed_experts"], f"{where}: routed_experts", options)
    yield _Answer(rows, _start(len(rows), prompt, completion, where), prompt)


def _from_choices(
    response: dict[str, Any], prompt: int | None, where: str, options: ImportOptions
) -> Iterator[_Answer]:
    choices = response["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise TraceError(f"{where}: choices: expected a list of objects")
    before = response.get("prompt_routed_experts")
    outer = _dict(response, "sglext").get("routed_experts")
    for number, choice in enumerate(choices):
        value = choice.get("routed_experts") or _dict(choice, "sglext").get("routed_experts")
        if value is None and len(choices) == 1:
            value = outer
        if value is None:
            continue
        rows = _decode(value, f"{where}: choices[{number}].routed_experts", options)
        if before is not None:
            lead = _decode(before, f"{where}: prompt_routed_experts", options)
            if lead.shape[1:] != rows.shape[1:]:
                raise TraceError(f"{where}: prompt_routed_experts: shape differs from the choice's")
            rows = np.concatenate([lead, rows])
        yield _Answer(rows, 0, prompt)


def _start(n_rows: int, prompt: int | None, completion: int | None, where: str) -> int:
    """Position of the first row: a request of n tokens has rows for all but the last."""
    if prompt is None or completion is None:
        return 0
    start = prompt + completion - 1 - n_rows
    if start < 0:
        raise TraceError(
            f"{where}: routed_experts: {n_rows} rows, expected at most {prompt + completion - 1}"
            f" for {prompt} prompt and {completion} completion tokens"
        )
    return start


def _decode(value: Any, where: str, options: ImportOptions) -> Array:
    if not isinstance(value, str):
        return _rows(as_array(value, where), where)
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TraceError(f"{where}: not base64 ({one_line(error, 80)})") from error
    if data.startswith(b"\x93NUMPY"):
        return _rows(npy_from_bytes(data, where), where)
    model = shape_of(options, Path(where), "bytes without a shape")
    width = 4 * model.n_layers * model.top_k
    if not data or len(data) % width:
        raise TraceError(
            f"{where}: {len(data)} bytes, expected a multiple of {width}: int32"
            f" for {model.n_layers} layers and top_k={model.top_k} of model {model.name}"
        )
    return np.frombuffer(data, dtype="<i4").reshape(-1, model.n_layers, model.top_k)


def _rows(array: Array, where: str) -> Array:
    if array.ndim != 3 or array.dtype.kind not in "iu" or not array.size:
        raise TraceError(
            f"{where}: {array.dtype}{list(array.shape)}, expected integers [tokens, layers, top_k]"
        )
    return array


def _dict(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _count(value: dict[str, Any], name: str) -> int | None:
    found = value.get(name)
    return found if isinstance(found, int) and 0 <= found < 2**31 else None


# --- layers ----------------------------------------------------------------------------------


def _moe_columns(
    rows: Array, path: Path, options: ImportOptions
) -> tuple[list[int], list[int], int]:
    """(columns that are MoE layers, their absolute layer index, columns dropped)."""
    n_columns, model = rows.shape[1], options.model
    if model is not None and n_columns == model.n_layers:
        layers = list(model.moe_layers)
        return layers, layers, n_columns - len(layers)
    if model is not None and n_columns != model.n_moe_layers:
        raise TraceError(
            f"{path}: routed_experts: {n_columns} layers, expected {model.n_layers}"
            f" (or {model.n_moe_layers} MoE layers) as in model {model.name}"
        )
    if model is not None:
        return list(range(n_columns)), list(model.moe_layers), 0
    filled = (rows != 0).any(axis=(0, 2)) if rows.shape[2] > 1 else np.ones(n_columns, dtype=bool)
    columns = np.flatnonzero(filled).tolist()
    if not columns:
        raise TraceError(f"{path}: routed_experts: all 0, expected expert ids")
    return columns, columns, n_columns - len(columns)


def _refuse_other_integers(rows: Array, layers: list[int], path: Path) -> None:
    """An expert twice in most rows of a layer: counts, a 0/1 placement or an empty buffer."""
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).astype(int)]
    ids = np.sort(sample, axis=2)
    repeated = ((ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] != MISSING)).any(axis=2)
    for column in np.flatnonzero(repeated.mean(axis=0) > 0.5)[:1]:
        token = int(np.argmax(repeated[:, column]))
        raise TraceError(
            f"{path}: routed_experts: layer {layers[column]} repeats an id in its rows"
            f" ({one_line(sample[token, column].tolist(), 60)}), expected distinct expert ids"
        )
