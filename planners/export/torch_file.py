"""A dict of one integer tensor as a torch file, written without torch.

The form is torch's own since version 1.6: a zip archive without compression that holds the
tensor's bytes and a pickle naming its type and shape. `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from traces.files import write_bytes

_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal content gives equal bytes


def write_tensor(path: Path, key: str, values: npt.NDArray[np.int32]) -> None:
    """Write {key: values} so that torch.load gives a dict with an int32 tensor."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        members = {
            "data.pkl": _pickled(key, values.shape),
            "byteorder": b"little",
            "data/0": values.astype("<i4").tobytes(),
            "version": b"3\n",
        }
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _EPOCH), content)
    write_bytes(path, packed.getvalue())


def _pickled(key: str, shape: tuple[int, ...]) -> bytes:
    """The pickle of {key: tensor}; the tensor's storage is the persistent object 0."""
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    storage = (
        pickle.MARK
        + _text("storage")
        + _name("torch", "IntStorage")
        + _text("0")
        + _text("cpu")
        + _number(int(np.prod(shape)))
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    arguments = (
        pickle.MARK
        + storage
        + _number(0)
        + _numbers(shape)
        + _numbers(strides)
        + pickle.NEWFALSE
        + _name("collections", "OrderedDict")
        + pickle.EMPTY_TUPLE
        + pickle.REDUCE
        + pickle.TUPLE
    )
    tensor = _name("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE
    start = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT
    return start + _text(key) + tensor + pickle.SETITEM + pickle.STOP


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def _number(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def _numbers(values: tuple[int, ...] | list[int]) -> bytes:
    return pickle.MARK + b"".join(map(_number, values)) + pickle.TUPLE
