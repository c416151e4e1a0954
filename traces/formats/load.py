"""Opening files that strangers made: sizes are checked before anything is allocated.

Nothing here runs code from a file: npy and npz without pickle, torch files with weights_only,
JSON and safetensors. Every failure is a TraceError of one line that names the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError

MAX_BYTES = 8 * 2**30
MAX_JSON_BYTES = 2**30
# A member this large that also shrinks this far holds nothing a router wrote.
BOMB_BYTES, BOMB_RATIO = 256 * 2**20, 100
_NUMPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """Type and shape of a stored array, read without its values."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes the values take in memory."""
        return self.dtype.itemsize * math.prod(self.shape)


def one_line(text: object, width: int = 300) -> str:
    """The text without line breaks, at most `width` characters."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."


@contextlib.contextmanager
def decoding(path: Path | str, what: str) -> Iterator[None]:
    """Any failure of a decoder of other people's bytes becomes a TraceError: `what`, damaged.

    Every exception type counts: decoders fed damaged bytes raise whatever they stumble on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except TraceError:
        raise
    except MemoryError as error:
        raise TraceError(f"{path}: {what} needs more memory than there is") from error
    except Exception as error:
        reason = one_line(error, 160) or type(error).__name__
        raise TraceError(f"{path}: {what} truncated or damaged ({reason})") from error


def head(path: Path, n_bytes: int) -> bytes:
    """The first n_bytes of a file, fewer when it is shorter."""
    try:
        with path.open("rb") as file:
            return file.read(n_bytes)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from error


# --- numpy -----------------------------------------------------------------------------------


def npz_headers(path: Path) -> dict[str, ArrayHeader]:
    """Type and shape of every array of an npz file; its zip directory and sizes are checked.

    raises  TraceError for a damaged archive, a pickled array or one whose size is not credible
    """
    with decoding(path, "zip archive"), zipfile.ZipFile(path) as archive:
        members = _checked_members(archive, path)
        return {
            name.removesuffix(".npy"): _member_header(archive, members[name], path)
            for name in members
            if name.endswith(".npy")
        }


def npz_array(path: Path, name: str) -> npt.NDArray[Any]:
    """One array of an npz file, after the checks of `npz_headers`."""
    if name not in npz_headers(path):
        raise TraceError(f"{path}: array {name} is missing")
    with (
        decoding(path, f"array {name}"),
        zipfile.ZipFile(path) as archive,
        archive.open(f"{name}.npy") as member,
    ):
        return _read_values(member)


def npy_array(path: Path) -> npt.NDArray[Any]:
    """The array of an npy file; TraceError when it is damaged, pickled or too large."""
    with decoding(path, "npy array"), path.open("rb") as file:
        _check_header(_read_header(file), path.stat().st_size - file.tell(), f"{path}")
        file.seek(0)
        return _read_values(file)


def npy_from_bytes(data: bytes, where: str) -> npt.NDArray[Any]:
    """The array of an npy file held in memory; `where` names it in errors."""
    with decoding(where, "npy array"):
        file = io.BytesIO(data)
        _check_header(_read_header(file), len(data) - file.tell(), where)
        file.seek(0)
        return _read_values(file)


def _checked_members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    members = {info.filename: info for info in archive.infolist()}
    total = sum(info.file_size for info in members.values())
    if total > MAX_BYTES:
        raise TraceError(f"{path}: unpacks to {total} bytes, expected at most {MAX_BYTES}")
    for name, info in members.items():
        large = info.file_size > BOMB_BYTES
        if large and info.file_size > BOMB_RATIO * max(info.compress_size, 1):
            raise TraceError(
                f"{path}: member {one_line(name, 60)} unpacks {info.compress_size} bytes to"
                f" {info.file_size}, expected at most {BOMB_RATIO} times"
            )
    return members


def _member_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> ArrayHeader:
    name = one_line(info.filename, 60).removesuffix(".npy")
    with decoding(path, f"array {name}"), archive.open(info) as member:
        header = _read_header(member)
        _check_header(header, info.file_size - member.tell(), f"{path}: array {name}")
    return header


def _read_header(file: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"npy version {version}, expected 1.0 or 2.0")
    shape, _, dtype = readers[version](file)
    return ArrayHeader(dtype, tuple(shape))


def _check_header(header: ArrayHeader, stored_bytes: int, where: str) -> None:
    if header.dtype.kind not in "biuf":
        raise TraceError(f"{where}: dtype {one_line(header.dtype, 60)}, expected numbers")
    if any(size < 0 for size in header.shape) or header.n_bytes != stored_bytes:
        raise TraceError(
            f"{where}: {header.dtype}{list(header.shape)} takes {header.n_bytes} bytes,"
            f" but {stored_bytes} are stored"
        )
    if header.n_bytes > MAX_BYTES:
        raise TraceError(f"{where}: {header.n_bytes} bytes, expected at most {MAX_BYTES}")


def _read_values(file: IO[bytes]) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


# --- torch -----------------------------------------------------------------------------------


def load_torch(path: Path) -> Any:
    """What a torch file (zip form) holds, tensors on the CPU; no code of the file is run.

    raises  TraceError for other files, damaged ones, forbidden types, or when torch is missing
    """
    if head(path, 4) != b"PK\x03\x04":
        raise TraceError(f"{path}: not a torch file of the zip form (torch >= 1.6)")
    with decoding(path, "torch archive"), zipfile.ZipFile(path) as archive:
        _checked_members(archive, path)
    try:
        import torch
    except ImportError as error:
        raise TraceError(f"{path}: reading it needs torch, which is not installed") from error
    with decoding(path, "torch file"):
        return torch.load(path, map_location="cpu", weights_only=True)


def as_array(value: Any, where: str) -> npt.NDArray[Any]:
    """A tensor, array or nested list of numbers as a numpy array; bfloat16 becomes float32.

    raises  TraceError naming `where` when it is not a rectangular array of numbers
    """
    if hasattr(value, "untyped_storage"):
        value = _tensor_values(value, where)
    elif not isinstance(value, np.ndarray):
        _check_plain(value, where)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise TraceError(f"{where}: not a rectangular array ({one_line(error, 80)})") from error
    if array.dtype.kind not in "iuf" and array.size:
        raise TraceError(f"{where}: holds {array.dtype} values, expected numbers")
    return array


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """TraceError unless the value is numbers in lists; a tensor in a list could be any size."""
    values = value if isinstance(value, (list, tuple)) else [value]
    kinds = set(map(type, values))
    strange = kinds - {int, float, bool, list, tuple}
    if strange or depth > 8:
        name = min(kind.__name__ for kind in strange) if strange else "deeper list"
        raise TraceError(f"{where}: holds a {name}, expected numbers")
    if kinds & {list, tuple}:
        for inner in values:
            _check_plain(inner, where, depth + 1)


def _tensor_values(tensor: Any, where: str) -> npt.NDArray[Any]:
    """Values of a tensor; refuses one that claims more elements than it stores."""
    with decoding(where, "tensor"):
        n_bytes = tensor.numel() * tensor.element_size()
        if n_bytes > min(tensor.untyped_storage().nbytes(), MAX_BYTES):
            raise TraceError(f"{where}: tensor of {n_bytes} bytes is larger than its storage")
        if str(tensor.dtype) == "torch.bfloat16":
            tensor = tensor.float()
        values: npt.NDArray[Any] = tensor.detach().numpy()
        return values


# --- JSON and safetensors --------------------------------------------------------------------


def load_json(path: Path) -> Any:
    """What a JSON file holds; TraceError when it is damaged or over MAX_JSON_BYTES."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise TraceError(f"{path}: {size} bytes of JSON, expected at most {MAX_JSON_BYTES}")
    with decoding(path, "JSON"):
        return json.loads(path.read_bytes())


def iter_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_JSON_BYTES + 1):
                number += 1
                if len(line) > MAX_JSON_BYTES:
                    raise TraceError(f"{path}: line {number} is over {MAX_JSON_BYTES} bytes")
                if line.strip():
                    yield number, _json_object(line, path, number)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from error


def _json_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    with decoding(path, f"line {number}: JSON"):
        record = json.loads(line)
    if not isinstance(record, dict):
        raise TraceError(f"{path}: line {number} is a {type(record).__name__}, expected an object")
    return record


_SAFETENSORS_DTYPES = {
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "F64": "<f8", "F32": "<f4",
}  # fmt: skip


def safetensors_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of a safetensors file: 8 bytes of length, a JSON header, then the values.

    raises  TraceError when header and values do not fit each other or the file
    """
    size = path.stat().st_size
    with decoding(path, "safetensors file"), path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if size > MAX_BYTES or n_header > size - 8:
            raise TraceError(f"{path}: header of {n_header} bytes in a file of {size}")
        header = json.loads(file.read(n_header))
        values = np.frombuffer(file.read(), dtype=np.uint8)
        header.pop("__metadata__", None)
        return {name: _safetensor(values, entry, name) for name, entry in header.items()}


def _safetensor(values: npt.NDArray[np.uint8], entry: Any, name: str) -> npt.NDArray[Any]:
    start, stop = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    header = ArrayHeader(np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), shape)
    if not 0 <= start <= stop <= len(values) or stop - start != header.n_bytes:
        raise ValueError(f"tensor {one_line(name, 40)}: offsets {start}..{stop} do not fit {shape}")
    array: npt.NDArray[Any] = values[start:stop].view(header.dtype).reshape(shape)
    return array
