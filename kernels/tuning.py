"""Launch configurations: one JSON file per device and problem, in the key format vLLM uses.

File name   E=128,N=768,device_name=NVIDIA_H200[,dtype=int4_w4a16][,block_shape=[128,128]].json
            (N is the expert's intermediate width, after tensor parallelism)
Content     {"<tokens M>": {"BLOCK_SIZE_M": .., "BLOCK_SIZE_N": .., "BLOCK_SIZE_K": ..,
            "GROUP_SIZE_M": .., "num_warps": .., "num_stages": ..}, ...}
The nearest M is used. Files written by vLLM's tuner load as they are; without a file
`default_config` decides. Needs neither torch nor triton.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from moesim_kernels.errors import KernelError

MAX_FILE_BYTES = 1 << 20
_KEYS = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
    "num_warps": "n_warps",
    "num_stages": "n_stages",
}
# Keys of vLLM's weight-only files that steer kernels we do not have.
_OTHER_KEYS = frozenset({"SPLIT_K", "waves_per_eu", "matrix_instr_nonkdim", "kpack"})
_DTYPE_OF_FORMAT = {"dense": "", "int8": "int8_w8a16", "int4": "int4_w4a16", "fp8": "fp8_w8a8"}


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True, slots=True)
class Config:
    """One launch configuration of the grouped GEMM.

    block_m, block_n, block_k   tile of rows, output columns and reduction; powers of two >= 16
    group_m                     row blocks that share a sweep over the columns (L2 reuse), >= 1
    n_warps, n_stages           warps per program (power of two) and pipeline depth, >= 1
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 1
    n_warps: int = 4
    n_stages: int = 3

    def __post_init__(self) -> None:
        for field in ("block_m", "block_n", "block_k"):
            value = getattr(self, field)
            if value < 16 or not _is_power_of_two(value):
                raise KernelError(f"config: {field}={value} must be a power of two >= 16")
        if self.group_m < 1 or self.n_stages < 1 or not _is_power_of_two(self.n_warps):
            raise KernelError(
                f"config: group_m={self.group_m}, n_stages={self.n_stages} must be >= 1 and "
                f"n_warps={self.n_warps} a power of two"
            )

    def to_json(self) -> dict[str, int]:
        """The configuration under vLLM's key names."""
        return {key: getattr(self, field) for key, field in _KEYS.items()}


@dataclass(frozen=True, slots=True)
class Problem:
    """What a table is keyed by: experts held, intermediate width, device, weight format.

    weight_format   dense (bf16 or fp16), int8, int4 or fp8
    """

    n_experts: int
    intermediate: int
    device_name: str
    weight_format: str = "dense"

    def __post_init__(self) -> None:
        if self.weight_format not in _DTYPE_OF_FORMAT:
            known = ", ".join(_DTYPE_OF_FORMAT)
            raise KernelError(f"weight_format={self.weight_format!r}: expected one of {known}")

    def file_name(self) -> str:
        """The table's file name; spaces of the device name become underscores.

        Group-wise int8 and int4 carry block_shape=[0,128] and fp8 blocks [128,128], as vLLM
        writes them (no blanks).
        """
        name = f"E={self.n_experts},N={self.intermediate},device_name="
        name += self.device_name.replace(" ", "_").replace("/", "_")
        dtype = _DTYPE_OF_FORMAT[self.weight_format]
        if not dtype:
            return f"{name}.json"
        block = "[128,128]" if self.weight_format == "fp8" else "[0,128]"
        return f"{name},dtype={dtype},block_shape={block}.json"


def default_config(n_slots: int, n_experts: int, weight_format: str = "dense") -> Config:
    """A sane configuration where nothing was tuned.

    n_slots   token-expert pairs of the call (tokens times top_k)

    Rows per block follow the mean slots per expert (half of a block is padding on average, so
    little batches take the smallest tile that the tensor cores accept).
    """
    mean = n_slots / max(n_experts, 1)
    block_m = 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 128 else 128
    group_m = 1 if mean <= 16 else 8
    if weight_format == "dense":
        block_n, block_k = (64, 128) if block_m <= 32 else (128, 64)
        return Config(block_m, block_n, block_k, group_m, 4 if block_m <= 64 else 8, 4)
    if weight_format == "fp8":
        return Config(block_m, 64, 128, group_m, 4 if block_m <= 64 else 8, 3)
    return Config(min(block_m, 64), 64, 128, group_m, 4, 3)


def _config_of(entry: object, where: str) -> Config:
    if not isinstance(entry, dict):
        raise KernelError(f"{where}: expected an object of launch parameters")
    unknown = sorted(set(entry) - set(_KEYS) - _OTHER_KEYS)
    missing = [key for key in _KEYS if key not in entry and not key.startswith("num_")]
    if unknown or missing:
        raise KernelError(f"{where}: unknown keys {unknown}, missing keys {missing}")
    values = {field: entry[key] for key, field in _KEYS.items() if key in entry}
    for field, value in values.items():
        if type(value) is not int:
            raise KernelError(f"{where}: {field}={value!r} must be an integer")
    try:
        return Config(**values)
    except KernelError as error:
        raise KernelError(f"{where}: {error}") from None


def load_table(path: Path) -> dict[int, Config]:
    """Configurations by number of tokens; raises KernelError naming file and entry."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise KernelError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KernelError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise KernelError(f"{path}: expected an object keyed by numbers of tokens")
    content.pop("triton_version", None)  # newer tables of vLLM name the compiler they were tuned on
    table: dict[int, Config] = {}
    for key, entry in content.items():
        if not key.isdecimal() or int(key) < 1:
            raise KernelError(f"{path}: key {key!r} is not a number of tokens >= 1")
        table[int(key)] = _config_of(entry, f"{path}: {key}")
    if not table:
        raise KernelError(f"{path}: no configuration")
    return table


def save_table(path: Path, table: dict[int, Config]) -> None:
    """Write a table, sorted by tokens; written beside, then renamed."""
    content = {str(tokens): table[tokens].to_json() for tokens in sorted(table)}
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    os.replace(beside, path)


def nearest(table: dict[int, Config], n_tokens: int) -> Config:
    """The configuration whose M is nearest to n_tokens; of two equally near, the smaller M."""
    return table[min(table, key=lambda tokens: (abs(tokens - n_tokens), tokens))]


def choose_config(folder: Path | None, problem: Problem, n_tokens: int, top_k: int) -> Config:
    """The tuned configuration of a folder of tables, else `default_config`."""
    path = folder / problem.file_name() if folder is not None else None
    if path is not None and path.is_file():
        return nearest(load_table(path), n_tokens)
    return default_config(n_tokens * top_k, problem.n_experts, problem.weight_format)
