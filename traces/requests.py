"""RequestTrace: when requests came and how long they were; readers of three public forms.

Azure     CSV `TIMESTAMP,ContextTokens,GeneratedTokens`, wall-clock timestamps
Mooncake  JSON lines `timestamp` (milliseconds), `input_length`, `output_length`, `hash_ids` (one
          id for each block of 512 prompt tokens; equal ids are equal prefixes)
Vidur     CSV `num_prefill_tokens,num_decode_tokens,...`: lengths only, no arrival times
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from traces.errors import TraceError
from traces.formats.load import decoding, head, iter_jsonl, one_line

MOONCAKE_BLOCK_TOKENS = 512
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class PrefixBlocks:
    """Which prompt blocks requests share: block ids of all requests, one after another.

    ids      int64[blocks], equal ids are equal content behind an equal prefix
    offsets  int64[n + 1], request i has ids[offsets[i]:offsets[i + 1]]
    block_tokens  prompt tokens in a block; the last of a request may be shorter
    """

    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    block_tokens: int

    def __post_init__(self) -> None:
        whole = len(self.offsets) and self.offsets[0] == 0 and self.offsets[-1] == len(self.ids)
        if not whole or (np.diff(self.offsets) < 0).any():
            raise TraceError(f"prefix_blocks: offsets do not cut {len(self.ids)} ids into requests")

    def of(self, request: int) -> npt.NDArray[np.int64]:
        """Block ids of one request, in the order of its prompt."""
        return self.ids[self.offsets[request] : self.offsets[request + 1]]


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Requests in the order they came.

    arrival_s      float64[n] seconds since the first, never going back; None when not known
    prompt_tokens  int32[n], >= 1
    output_tokens  int32[n], >= 0
    prefix_blocks  which prompts begin alike, or None
    source         file and form, for the reader
    """

    arrival_s: npt.NDArray[np.float64] | None
    prompt_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]
    prefix_blocks: PrefixBlocks | None = None
    source: str = ""

    def __post_init__(self) -> None:
        n = len(self.prompt_tokens)
        lengths = {"output_tokens": len(self.output_tokens)}
        if self.arrival_s is not None:
            lengths["arrival_s"] = len(self.arrival_s)
        if self.prefix_blocks is not None:
            lengths["prefix_blocks"] = len(self.prefix_blocks.offsets) - 1
        for name, found in lengths.items():
            if found != n:
                raise TraceError(f"{name}: {found} requests, expected {n} as in prompt_tokens")
        if n == 0 or self.prompt_tokens.min() < 1 or self.output_tokens.min() < 0:
            raise TraceError("prompt_tokens, output_tokens: expected requests with >= 1 and >= 0")
        arrival = self.arrival_s
        if arrival is not None and not (
            np.isfinite(arrival).all() and (np.diff(arrival) >= 0).all()
        ):
            raise TraceError("arrival_s: expected finite times that never go back")

    @property
    def n_requests(self) -> int:
        """Number of requests."""
        return len(self.prompt_tokens)


def read_requests(path: Path) -> RequestTrace:
    """The requests in a file of any known form, told from its content.

    raises  TraceError of one line naming file, row, value and expectation
    """
    start = head(path, 4096).lstrip(b"\xef\xbb\xbf \r\n\t")
    reader: Callable[[Path], RequestTrace]
    if start.startswith(b"{"):
        reader = read_mooncake
    else:
        names = start.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
        found = [reader for column, reader in _READERS.items() if column in names.split(",")]
        if not found:
            raise TraceError(
                f"{path}: header {one_line(names, 60)!r}, expected columns of Azure or Vidur CSV"
                f" ({', '.join(_READERS)}), or Mooncake's JSON lines"
            )
        reader = found[0]
    try:
        return reader(path)
    except TraceError as error:
        text = one_line(error, 400)
        raise TraceError(text if str(path) in text else f"{path}: {text}") from error


def read_azure(path: Path) -> RequestTrace:
    """Azure's public LLM inference trace (2023 and 2024 form)."""
    columns = _csv_columns(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    arrival = _seconds(columns[0], path)
    prompt = _lengths(columns[1], 1, f"{path}: ContextTokens")
    output = _lengths(columns[2], 0, f"{path}: GeneratedTokens")
    order = np.argsort(arrival, kind="stable")
    moved = int((order != np.arange(len(order))).sum())
    note = f"; {moved} rows put into the order of time" if moved else ""
    return RequestTrace(
        arrival[order] - arrival[order[0]],
        prompt[order],
        output[order],
        source=f"Azure {path.name}{note}",
    )


class _MooncakeLine(BaseModel):
    """One request of a Mooncake trace; newer files have more fields."""

    model_config = ConfigDict(extra="ignore", strict=True)

    timestamp: float = Field(ge=0, allow_inf_nan=False)
    input_length: int = Field(ge=1, le=_INT32_MAX)
    output_length: int = Field(ge=0, le=_INT32_MAX)
    hash_ids: list[int] | None = None


def read_mooncake(path: Path) -> RequestTrace:
    """A Mooncake trace: milliseconds, lengths, and the hashed 512-token blocks of each prompt."""
    lines = [_mooncake_line(record, path, number) for number, record in iter_jsonl(path)]
    lines.sort(key=lambda line: line.timestamp)
    if not lines:
        raise TraceError(f"{path}: no requests, expected one a line")
    hashed = [line.hash_ids for line in lines if line.hash_ids is not None]
    return RequestTrace(
        np.array([line.timestamp - lines[0].timestamp for line in lines]) / 1e3,
        np.array([line.input_length for line in lines], dtype=np.int32),
        np.array([line.output_length for line in lines], dtype=np.int32),
        _prefix_blocks(hashed, path) if len(hashed) == len(lines) else None,
        source=f"Mooncake {path.name}",
    )


def read_vidur(path: Path) -> RequestTrace:
    """A Vidur lengths file; arrival times are None, `poisson_arrivals` makes some."""
    columns = _csv_columns(path, ("num_prefill_tokens", "num_decode_tokens"))
    return RequestTrace(
        None,
        _lengths(columns[0], 1, f"{path}: num_prefill_tokens"),
        _lengths(columns[1], 0, f"{path}: num_decode_tokens"),
        source=f"Vidur {path.name}",
    )


def poisson_arrivals(trace: RequestTrace, rate_per_s: float, seed: int) -> RequestTrace:
    """The same requests with arrival times of a Poisson process, the first at 0 s.

    raises  TraceError unless rate_per_s is finite and above 0
    """
    if not (np.isfinite(rate_per_s) and rate_per_s > 0):
        raise TraceError(f"rate_per_s={rate_per_s} must be finite and above 0")
    gaps = np.random.default_rng(seed).exponential(1 / rate_per_s, trace.n_requests)
    gaps[0] = 0.0
    source = f"{trace.source}; Poisson arrivals, {rate_per_s:g} a second, seed {seed}"
    return replace(trace, arrival_s=np.cumsum(gaps), source=source)


_READERS: dict[str, Callable[[Path], RequestTrace]] = {
    "ContextTokens": read_azure,
    "num_prefill_tokens": read_vidur,
}


def _csv_columns(path: Path, names: Sequence[str]) -> list[list[str]]:
    """The named columns of a CSV file, as text."""
    with decoding(path, "CSV"), path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    header = [cell.strip() for cell in rows[0]] if rows else []
    missing = [name for name in names if name not in header]
    if missing or len(rows) < 2:
        raise TraceError(
            f"{path}: {max(len(rows) - 1, 0)} rows of {one_line(header, 60)},"
            f" expected columns {', '.join(names)}"
        )
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise TraceError(f"{path}: row {number}: {len(row)} cells, expected {len(header)}")
    return [[row[header.index(name)].strip() for row in rows[1:]] for name in names]


def _lengths(cells: list[str], least: int, where: str) -> npt.NDArray[np.int32]:
    """Integers of at least `least`; TraceError with the first row that is not one."""
    for number, cell in enumerate(cells, start=2):
        plain = cell.isascii() and cell.isdigit() and len(cell) <= 10
        if not plain or not least <= int(cell) <= _INT32_MAX:
            raise TraceError(
                f"{where}: {one_line(cell, 30)!r} in row {number}, expected an integer >= {least}"
            )
    return np.array([int(cell) for cell in cells], dtype=np.int32)


_STAMP = re.compile(r"(19|20|21)\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?")


def _seconds(cells: list[str], path: Path) -> npt.NDArray[np.float64]:
    """Seconds since 1970 of wall-clock stamps in UTC, kept to the nanosecond until subtracted."""
    stamps = [re.sub(r"(\+00:00|Z)$", "", cell) for cell in cells]
    for number, stamp in enumerate(stamps, start=2):
        if not _STAMP.fullmatch(stamp):
            raise TraceError(
                f"{path}: TIMESTAMP: {one_line(stamp, 40)!r} in row {number},"
                " expected YYYY-MM-DD hh:mm:ss[.fraction]"
            )
    with decoding(path, "TIMESTAMP"):
        times = np.array(stamps, dtype="datetime64[ns]")
    nanoseconds: npt.NDArray[np.int64] = (times - times.min()).astype(np.int64)
    return nanoseconds / 1e9


def _mooncake_line(record: dict[str, Any], path: Path, number: int) -> _MooncakeLine:
    try:
        line = _MooncakeLine.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise TraceError(f"{path}: line {number}: field {field}: {first['msg']}") from error
    blocks = -(-line.input_length // MOONCAKE_BLOCK_TOKENS)
    if line.hash_ids is not None and len(line.hash_ids) != blocks:
        raise TraceError(
            f"{path}: line {number}: {len(line.hash_ids)} hash_ids, expected {blocks}:"
            f" one for each {MOONCAKE_BLOCK_TOKENS} of {line.input_length} prompt tokens"
        )
    return line


def _prefix_blocks(hashed: list[list[int]], path: Path) -> PrefixBlocks:
    offsets = np.cumsum([0, *map(len, hashed)])
    try:
        ids = np.array([block for blocks in hashed for block in blocks], dtype=np.int64)
    except OverflowError as error:
        raise TraceError(f"{path}: hash_ids: beyond 64 bits") from error
    return PrefixBlocks(ids, offsets, MOONCAKE_BLOCK_TOKENS)
