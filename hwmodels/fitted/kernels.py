"""Which fitted kernel stands for another: the same, else its nearest relative, and which device."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hwmodels.device import Device
from hwmodels.errors import HardwareError
from hwmodels.fitted.model import OperatorModel

# Words of kernel names that tell what code runs, most telling first.
CODE = ("marlin", "deepgemm", "cutlass", "triton", "flashinfer", "flashmla", "fa4", "fa3", "fa2",
        "flash_attn", "torch")  # fmt: skip
# Names that do not say their code: vLLM's fused_moe is the Triton kernel.
SPOKEN = (("vllm_fused_moe", "triton"), ("fused_moe_triton", "triton"))
# Families whose kernels' last word names the operator; the size of an element is in their work.
OPERATORS = ("collective", "exchange_low_latency", "exchange_normal")


@dataclass(frozen=True, slots=True)
class KernelName:
    """The parts of "framework version dtypes source"; dtypes may read "bfloat16 kv fp8"."""

    framework: str
    version: str
    dtype: str
    source: str

    @property
    def code(self) -> str:
        """The word of CODE that the source contains, "" for none."""
        for name, word in SPOKEN:
            if name in self.source:
                return word
        return next((word for word in CODE if word in self.source.lower()), "")


def parse_kernel(name: str) -> KernelName:
    """The parts of a kernel's name; HardwareError when it has fewer than four."""
    words = name.split(" ")
    if len(words) < 4:
        raise HardwareError(f"kernel {name!r}: expected framework, version, dtype and source")
    cached = words[3] == "kv" and len(words) >= 6
    dtype = " ".join(words[2:5]) if cached else words[2]
    return KernelName(words[0], words[1], dtype, " ".join(words[5 if cached else 3 :]))


def nearest_kernel(models: Iterable[OperatorModel], family: str, kernel: str) -> OperatorModel:
    """The model of the same kernel, else of its nearest relative.

    Relatives compute in the same number format (fp8 and fp8_block are one here, with the same one
    preferred); nearest is the same code, then the same framework, then most rows. In OPERATORS
    relatives are the same operator in any format, the nearest version before most rows.
    raises  HardwareError when the family has no relative, with the formats or operators it has
    """
    of_family = sorted((m for m in models if m.family == family), key=lambda m: m.kernel)
    for model in of_family:
        if model.kernel == kernel:
            return model
    wanted = parse_kernel(kernel)
    if family in OPERATORS:
        return _nearest_operator(of_family, wanted)
    related = [m for m in of_family if _bits(parse_kernel(m.kernel)) == _bits(wanted)]
    if not related:
        known = ", ".join(sorted({parse_kernel(m.kernel).dtype for m in of_family})) or "none"
        raise HardwareError(f"{family}: no kernel measured in {wanted.dtype}, known: {known}")
    return max(related, key=lambda m: (*_likeness(parse_kernel(m.kernel), wanted), m.rows))


def _nearest_operator(of_family: list[OperatorModel], wanted: KernelName) -> OperatorModel:
    named = {model.kernel: parse_kernel(model.kernel) for model in of_family}
    related = [model for model in of_family if named[model.kernel].source == wanted.source]
    if not related:
        known = ", ".join(sorted({name.source for name in named.values()})) or "none"
        raise HardwareError(f"operator {wanted.source!r} was not measured, known: {known}")

    def likeness(model: OperatorModel) -> tuple[float, ...]:
        name = named[model.kernel]
        gap = _version_gap(name.version, wanted.version)
        return (*_likeness(name, wanted), *(-step for step in gap), model.rows)

    return max(related, key=likeness)


def _version_gap(one: str, other: str) -> tuple[int, ...]:
    """Differences of major, minor, patch and so on, four of them; words do not count."""
    ours, theirs = ([*map(int, re.findall(r"\d+", text)), 0, 0, 0, 0][:4] for text in (one, other))
    return tuple(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def nearest_device(names: Iterable[str], device: Device, known: dict[str, Device]) -> str:
    """Name of the fitted device most like another: itself, else nearest in rates and cache.

    known   the fitted devices by name
    """
    listed = sorted(names)
    if not listed:
        raise HardwareError("no device has been fitted")
    if device.name in listed:
        return device.name
    return min(listed, key=lambda name: _distance(known[name], device))


def _bits(kernel: KernelName) -> str:
    return kernel.dtype.replace("fp8_block", "fp8")


def _likeness(kernel: KernelName, wanted: KernelName) -> tuple[bool, bool, bool]:
    return (
        bool(wanted.code) and kernel.code == wanted.code,  # a name may not say its code
        kernel.dtype == wanted.dtype,
        kernel.framework == wanted.framework,
    )


def _distance(one: Device, other: Device) -> float:
    """Sum of differences of logarithms; having fp8 or not counts as much as a factor of e."""

    def rates(device: Device) -> np.ndarray:
        return np.log([
            device.memory_bytes_per_s, device.flop_per_s.get("bf16", 1e12),
            max(device.l2_bytes, 1e6), max(device.multiprocessors, 1),
        ])  # fmt: skip

    fp8 = float(("fp8" in one.flop_per_s) != ("fp8" in other.flop_per_s))
    return float(np.abs(rates(one) - rates(other)).sum() + fp8)
