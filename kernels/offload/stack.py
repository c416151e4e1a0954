"""The layer stack: its sizes, its random weights, and the one file that holds all experts."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from moesim_kernels.errors import KernelError
from moesim_kernels.offload.memory import PAGE_BYTES, require_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMAT = 1
ROOM = 1.05  # free disk asked for, over what is written
Weights = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StackSpec:
    """Sizes of a stack; one with equal values has equal weights.

    hidden, intermediate  of a SwiGLU expert: gate and up [2 intermediate, hidden], then down
                  [hidden, intermediate]
    dense         width of the part that stands in for attention: [dense, hidden], [hidden, dense]
    dtype         of weights and activations, "float32" or "bfloat16"
    """

    n_layers: int = 8
    n_experts: int = 32
    top_k: int = 4
    hidden: int = 512
    intermediate: int = 512
    dense: int = 4096
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_experts", "top_k", "hidden", "intermediate", "dense"):
            if (value := getattr(self, name)) < 1:
                raise KernelError(f"stack: {name}={value}, expected at least 1")
        if self.top_k > self.n_experts:
            raise KernelError(f"stack: top_k={self.top_k} is above n_experts={self.n_experts}")
        if self.dtype not in DTYPES:
            raise KernelError(f"stack: dtype={self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.seed < 0:
            raise KernelError(f"stack: seed={self.seed}, expected 0 or more")

    @property
    def weights_per_expert(self) -> int:
        """Numbers in one expert."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the file and in a slot: whole pages."""
        n_bytes = self.weights_per_expert * DTYPES[self.dtype].itemsize
        return math.ceil(n_bytes / PAGE_BYTES) * PAGE_BYTES

    @property
    def file_bytes(self) -> int:
        """Bytes of all experts."""
        return self.n_layers * self.n_experts * self.expert_bytes

    def offset(self, layer: int, expert: int) -> int:
        """Where an expert begins in the file."""
        return (layer * self.n_experts + expert) * self.expert_bytes

    def expert(self, flat: torch.Tensor) -> Weights:
        """Gate-and-up and down of an expert, views of its flat weights."""
        cut = 2 * self.hidden * self.intermediate
        up, down = flat[:cut], flat[cut : self.weights_per_expert]
        return up.view(-1, self.hidden), down.view(self.hidden, -1)


class Stack:
    """A stack whose experts are in an open file; `close` gives the file back.

    descriptor  of the file; direct, the same file past the page cache, None where refused
    dense       the resident part of each layer
    path        the file where it is kept, None where it has no name
    reused      whether an earlier file was found to hold this stack
    """

    def __init__(self, spec: StackSpec, path: Path, *, kept: bool, reused: bool) -> None:
        self.spec, self.reused = spec, reused
        self.path = path if kept else None
        self.descriptor = os.open(path, os.O_RDONLY)
        self.direct = _open_direct(path)
        self._in_memory: torch.Tensor | None = None
        self.dense = [_dense_weights(spec, layer) for layer in range(spec.n_layers)]

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; one without a name is gone."""
        for descriptor in (self.descriptor, self.direct):
            if descriptor is not None:
                os.close(descriptor)

    def inputs(self, n_tokens: int) -> torch.Tensor:
        """What enters the first layer, [tokens, hidden]; a token's row depends on its number."""
        rows = [_random(self.spec, (1, 2, token), self.spec.hidden) for token in range(n_tokens)]
        return torch.stack(rows).to(DTYPES[self.spec.dtype])

    def in_memory(self, *, pinned: bool) -> torch.Tensor:
        """All bytes of the file in memory, uint8[file_bytes]; read once, at the first call."""
        if self._in_memory is None:
            require_memory(self.spec.file_bytes, "all experts")
            held = torch.empty(self.spec.file_bytes, dtype=torch.uint8, pin_memory=pinned)
            fill(self.descriptor, held.numpy().data, 0)
            self._in_memory = held
        return self._in_memory

    def cut_into(self, share: float) -> Stack:
        """The same open file as experts of another size, to time reads; closed with this one."""
        size = max(int(self.spec.intermediate * share), 1)
        spec = replace(self.spec, intermediate=size)
        n_experts = self.spec.file_bytes // (spec.n_layers * spec.expert_bytes)
        view = copy.copy(self)
        view.spec = replace(spec, n_experts=n_experts, top_k=1)
        return view

    def load(self, layer: int, expert: int) -> Weights:
        """An expert by a plain read, for checks."""
        return self.spec.expert(_stored(self.spec, self.descriptor, layer, expert))


def open_stack(spec: StackSpec, folder: Path | None = None, *, keep: bool = False) -> Stack:
    """Write the experts of a stack to one file, or find them in one that was kept; open it.

    folder  on the file system that is the slow tier; the system's folder for temporary files if
            None
    keep    leave the file there, for another run; else it has no name and leaves nothing behind
    raises  KernelError where the disk has no room; OSError where it cannot be written
    """
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    kept = folder / f"moesim-offload-{_name(spec)}.bin"
    if _holds(kept, spec):
        return Stack(spec, kept, kept=True, reused=True)
    _require_room(folder, spec.file_bytes)
    part = _write(spec, folder)
    try:
        if keep:
            os.replace(part, kept)
            _write_beside(kept, spec)
            return Stack(spec, kept, kept=True, reused=False)
        return Stack(spec, part, kept=False, reused=False)
    finally:
        part.unlink(missing_ok=True)


def expert_weights(spec: StackSpec, layer: int, expert: int) -> torch.Tensor:
    """The weights of one expert, flat [weights_per_expert]; they follow from the seed alone."""
    flat = _random(spec, (0, layer, expert), spec.weights_per_expert)
    up, down = spec.expert(flat)
    up /= spec.hidden**0.5
    down /= spec.intermediate**0.5
    return flat.to(DTYPES[spec.dtype])


def fill(descriptor: int, view: memoryview, place: int) -> None:
    """Read until the whole of `view` is filled from a place in a file."""
    done = 0
    while done < len(view):
        n_bytes = os.preadv(descriptor, [view[done:]], place + done)
        if not n_bytes:
            raise OSError(errno.EIO, f"the file ends {len(view) - done} bytes too early")
        done += n_bytes


def _dense_weights(spec: StackSpec, layer: int) -> Weights:
    size = spec.dense * spec.hidden
    flat = _random(spec, (1, 1, layer), 2 * size)
    up = flat[:size].view(spec.dense, spec.hidden) / spec.hidden**0.5
    down = flat[size:].view(spec.hidden, spec.dense) / spec.dense**0.5
    return up.to(DTYPES[spec.dtype]), down.to(DTYPES[spec.dtype])


def _random(spec: StackSpec, place: tuple[int, ...], size: int) -> torch.Tensor:
    (state,) = np.random.SeedSequence([spec.seed, *place]).generate_state(1, np.uint64)
    return torch.randn(size, generator=torch.Generator().manual_seed(int(state) >> 1))


def _write(spec: StackSpec, folder: Path) -> Path:
    """The path of a new file with all experts; nothing is left where that fails."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moesim-offload-", delete=False) as file:
        try:
            for layer in range(spec.n_layers):
                for expert in range(spec.n_experts):
                    file.seek(spec.offset(layer, expert))
                    file.write(_bytes(expert_weights(spec, layer, expert)))
            file.truncate(spec.file_bytes)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    return Path(file.name)


def _bytes(weights: torch.Tensor) -> bytes:
    return weights.view(torch.uint8).numpy().tobytes()


def _stored(spec: StackSpec, descriptor: int, layer: int, expert: int) -> torch.Tensor:
    dtype = DTYPES[spec.dtype]
    n_bytes = spec.weights_per_expert * dtype.itemsize
    held = bytearray(n_bytes)
    fill(descriptor, memoryview(held), spec.offset(layer, expert))
    return torch.frombuffer(held, dtype=dtype)


def _name(spec: StackSpec) -> str:
    return hashlib.sha256(json.dumps(_facts(spec)).encode()).hexdigest()[:16]


def _facts(spec: StackSpec) -> dict[str, object]:
    return {"format": FORMAT, **asdict(spec)}


def _write_beside(path: Path, spec: StackSpec) -> None:
    """The file that says what `path` holds; written last, so it never speaks too early."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(_facts(spec)), encoding="utf-8")
    os.replace(part, path.with_suffix(".json"))


def _holds(path: Path, spec: StackSpec) -> bool:
    """Whether a kept file is this stack: its facts, its size, and its first and last expert."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if facts != _facts(spec) or path.stat().st_size != spec.file_bytes:
            return False
        with path.open("rb") as file:
            return all(
                torch.equal(_stored(spec, file.fileno(), *at), expert_weights(spec, *at))
                for at in ((0, 0), (spec.n_layers - 1, spec.n_experts - 1))
            )
    except (OSError, ValueError):
        return False


def _require_room(folder: Path, n_bytes: int) -> None:
    if not folder.is_dir():
        raise KernelError(f"{folder}: no such folder")
    free = shutil.disk_usage(folder).free
    if free < ROOM * n_bytes:
        raise KernelError(f"{folder}: {n_bytes} bytes of experts, {free} bytes free")


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):  # refused by the file system, or unknown to the system
        return None
