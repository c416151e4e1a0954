"""A corpus as token numbers in one file: what training needs where there is neither text nor net.

Reading and writing need numpy and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traces.data.training import EncodedDomains
from traces.errors import TraceError
from traces.files import replacing
from traces.formats.load import ArrayHeader, npz_array, npz_headers

MAX_UNPACKED_BYTES = 256 * 2**20
RECORD = "record"
_TYPES = {
    "tokens": ("uint16", 1),
    "ends": ("int64", 1),
    "domain": ("int16", 1),
    "held_out": ("bool", 1),
    "merges": ("int32", 2),
    RECORD: ("uint8", 1),
}


@dataclass(frozen=True, slots=True)
class EncodedCorpus:
    """Training and held-out documents (uint16 token arrays) by domain, and where they come from.

    merges  int32[merges, 2] of the tokenizer, so that samples can be read
    record  JSON values: what the corpus was made of
    """

    train: EncodedDomains
    held_out: EncodedDomains
    merges: np.ndarray
    record: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return 256 + len(self.merges)

    def train_tokens(self) -> dict[str, int]:
        """Training tokens of each domain."""
        return {name: sum(map(len, documents)) for name, documents in self.train.items()}


def write_corpus(corpus: EncodedCorpus, path: Path) -> None:
    """Write the file, compressed; it appears whole or not at all."""
    if corpus.vocab_size > 2**16:
        raise TraceError(f"{path}: vocabulary {corpus.vocab_size}, expected at most 65536")
    names = list(corpus.train)
    splits = ((False, corpus.train), (True, corpus.held_out))
    rows = [
        (document, names.index(name), held_out)
        for held_out, domains in splits
        for name, documents in domains.items()
        for document in documents
    ]
    arrays: dict[str, np.ndarray] = {
        "tokens": np.concatenate([document for document, _, _ in rows]).astype(np.uint16),
        "ends": np.cumsum([len(document) for document, _, _ in rows], dtype=np.int64),
        "domain": np.array([domain for _, domain, _ in rows], dtype=np.int16),
        "held_out": np.array([held_out for _, _, held_out in rows], dtype=np.bool_),
        "merges": corpus.merges.astype(np.int32),
    }
    write_arrays(path, arrays, {"domains": names, "made_of": corpus.record})


def read_corpus(path: Path) -> EncodedCorpus:
    """Read the file; TraceError when it is not one, is damaged or unpacks too large."""
    arrays, record = read_arrays(path, _TYPES)
    tokens, ends, domain = arrays["tokens"], arrays["ends"], arrays["domain"]
    names = record.get("domains")
    if not isinstance(names, list) or not isinstance(record.get("made_of"), dict):
        raise TraceError(f"{path}: record: expected the fields domains and made_of")
    if not (len(ends) == len(domain) == len(arrays["held_out"])):
        raise TraceError(f"{path}: ends, domain and held_out differ in length")
    starts = np.concatenate(([0], ends[:-1]))
    if not len(ends) or ends[-1] != len(tokens) or (ends <= starts).any():
        raise TraceError(f"{path}: ends: expected increasing ends of documents in tokens")
    if domain.min() < 0 or domain.max() >= len(names):
        raise TraceError(f"{path}: domain: expected 0 to {len(names) - 1}")
    if arrays["merges"].shape[1] != 2 or tokens.max() >= 256 + len(arrays["merges"]):
        raise TraceError(f"{path}: tokens: {tokens.max()} is not in the vocabulary of merges")
    splits: tuple[EncodedDomains, EncodedDomains] = ({}, {})
    spans = zip(starts, ends, domain, arrays["held_out"], strict=True)
    for start, end, index, held_out in spans:
        splits[int(held_out)].setdefault(str(names[index]), []).append(tokens[start:end])
    if list(splits[0]) != list(splits[1]):
        raise TraceError(f"{path}: held_out: expected documents of every domain on both sides")
    return EncodedCorpus(*splits, arrays["merges"], record["made_of"])


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], record: dict[str, Any]) -> None:
    """Write arrays and a JSON record beside them into one compressed npz file."""
    text = json.dumps(record, ensure_ascii=False).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside, beside.open("wb") as file:
        named: dict[str, Any] = {**arrays, RECORD: np.frombuffer(text, dtype=np.uint8)}
        np.savez_compressed(file, **named)


def read_arrays(
    path: Path, types: Mapping[str, tuple[str, int]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and record of a file that `write_arrays` made.

    types   type and number of dimensions of each array, the record's too
    raises  TraceError, before any array is unpacked, for other arrays or types than these, for a
            size beyond MAX_UNPACKED_BYTES in all, and for one that the file cannot hold
    """
    headers = npz_headers(path)
    if set(headers) != set(types):
        raise TraceError(f"{path}: arrays {sorted(headers)[:9]}, expected {sorted(types)}")
    for name, (dtype, n_dims) in types.items():
        _check_type(f"{path}: {name}", headers[name], dtype, n_dims)
    total = sum(header.n_bytes for header in headers.values())
    if total > MAX_UNPACKED_BYTES:
        raise TraceError(f"{path}: unpacks to {total} bytes, expected at most {MAX_UNPACKED_BYTES}")
    arrays = {name: npz_array(path, name) for name in types}
    try:
        record = json.loads(arrays.pop(RECORD).tobytes())
    except ValueError as error:
        raise TraceError(f"{path}: record: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise TraceError(f"{path}: record: {type(record).__name__}, expected an object")
    return arrays, record


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_type(where: str, header: ArrayHeader, dtype: str, n_dims: int) -> None:
    if header.dtype != np.dtype(dtype) or len(header.shape) != n_dims:
        raise TraceError(
            f"{where}: {header.dtype}{list(header.shape)}, expected {dtype} of {n_dims} dimensions"
        )
