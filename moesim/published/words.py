"""The words of a table of runs that name a machine, a model or a number format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from hwmodels.device import Device
from hwmodels.devices import load_device
from hwmodels.host_costs import with_memory_rate
from traces.counting import expert_share, total_params
from traces.errors import TraceError
from traces.model import ModelSpec
from traces.models import load_model


class Refused(Exception):
    """Why a row of the table cannot be priced; rows are counted by it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One box.

    device             one of its equal GPUs (or a chip whose CPU and GPU share a memory), None
                       for a box whose GPU did not take part or that has none
    host               all sockets as one device, None for a chip with one memory
    link_bytes_per_s   nominal rate of one GPU's host link, one direction
    memory_bytes       DRAM of the host, 0 when not given
    drive_bytes_per_s  of its drive, where one is named
    """

    device: Device | None
    n_devices: int
    host: Device | None
    link_bytes_per_s: float
    memory_bytes: float = 0.0
    drive_bytes_per_s: float = 0.0


MEASURED_SHARE = 0.8
"""Of a nominal DRAM rate, what a read benchmark measures on a host with few channels; assumed."""

# Names in the table that are no alias of the catalogue.
MODELS: Mapping[str, str] = MappingProxyType(
    {
        "deepseek-v3 671b": "deepseek-v3",
        "deepseek-r1/v3 671b": "deepseek-v3",
        "deepseek-r1 671b": "deepseek-r1",
        "deepseek-r1-0528 671b": "deepseek-r1",
        "deepseek-v2-lite 16b": "deepseek-v2-lite",
        "deepseek-coder-v2-lite 16b": "deepseek-v2-lite",
        "kimi-k2-thinking 1t-a32b": "kimi-k2",
        "minimax-m2.1 230b-a10b": "minimax-m2",
        "qwen3-coder-next 80b-a3b": "qwen3-next-80b-a3b",
        "qwen3-coder-30b-a3b": "qwen3-30b-a3b",
    }
)

# Bits stored per weight, scales included: llama.cpp's block layouts, mixtures of layouts by the
# size of published files, and two formats of tensor cores with their scales.
BITS: Mapping[str, float] = MappingProxyType(
    {
        "Q4_K_M": 4.85, "Q4_K_L": 4.9, "Q4_K": 4.5, "IQ4_XS": 4.25, "IQ4_KS": 4.25, "Q8_0": 8.5,
        "Q6_K": 6.56, "Q5_K_M": 5.7, "Q3_K_M": 3.9, "Q2_K_XL": 2.7, "IQ1_S_R4": 1.5,
        "MXFP4": 4.25, "FP8": 8.0, "INT8": 8.0, "INT4": 4.5, "BF16": 16.0,
    }
)  # fmt: skip
LEAST_DENSE_BITS = 6.0  # files of fewer bits on average keep attention at 5 to 8, assumed 6

# The catalogue's spelling is tried first; these are what the table calls them.
_HOSTS: Mapping[str, str] = MappingProxyType(
    {
        r"Xeon Gold 6454S": "xeon-gold-6454s",
        r"Xeon Gold 6430|Xeon 6430": "xeon-gold-6430",
        r"Xeon (?:Platinum )?8488C": "xeon-platinum-8488c",
        r"Xeon (?:Platinum )?8452Y": "xeon-platinum-8452y",
        r"Xeon Gold 6138": "xeon-gold-6138",
        r"EPYC 9355": "epyc-9355",
        r"EPYC 9334": "epyc-9334",
        r"EPYC 9654": "epyc-9654",
        r"EPYC 9755": "epyc-9755",
        r"EPYC 7453": "epyc-7453",
        r"EPYC 7742": "epyc-7742",
        r"Ryzen (?:9 )?7950X": "ryzen-9-7950x",
        r"Ryzen (?:9 )?9950X": "ryzen-9-9950x",
        r"Threadripper PRO 7965WX": "threadripper-pro-7965wx",
        r"i9-13900K\b": "core-i9-13900k",
        r"i9-14900K\b": "core-i9-14900k",
    }
)
_GPUS: Mapping[str, str] = MappingProxyType(
    {
        r"RTX 4090D": "rtx-4090d",
        r"RTX 4090": "rtx-4090",
        r"RTX 5090": "rtx-5090",
        r"RTX 5080": "rtx-5080",
        r"RTX 5070": "rtx-5070",
        r"RTX 4080": "rtx-4080",
        r"RTX 3090 Ti": "rtx-3090-ti",
        r"RTX 3090": "rtx-3090",
        r"RTX 3070": "rtx-3070",
        r"RTX A6000": "rtx-a6000",
        r"RTX A5000": "rtx-a5000",
        r"A100-SXM4-80GB": "a100-80gb",
        r"A100 40GB": "a100-40gb",
        r"L20\b": "l20",
        r"DGX Spark(?: GB10)?": "gb10",
        r"Apple M4 Pro": "m4-pro",
        r"Apple M4 Max": "m4-max",
    }
)


def read_model(text: str) -> ModelSpec:
    """The model of a name in the table; Refused when the catalogue has none."""
    name = MODELS.get(text.lower(), text)
    try:
        return load_model(name)
    except TraceError as error:
        raise Refused(f"model {text[:40]!r} is not in the catalogue") from error


def read_widths(text: str, model: ModelSpec) -> tuple[float, float]:
    """Bits of a routed expert's weights and of all others.

    The file's own bits per weight or size, where the text gives them, else those of the format.
    """
    named = [name for name in BITS if re.search(rf"(?<!\w){name}(?!\w)", text)]
    on_host = re.search(r"CPU experts (?:AMX )?(INT8|INT4)", text)
    if "MXFP4" in named:
        return BITS["MXFP4"], BITS["Q8_0"]
    if found := re.search(r"([\d.]{1,6}) bpw", text):
        bits = float(found[1])
    elif found := re.search(r"([\d.]{1,7}) GiB", text):
        return _bits_of_file(float(found[1]) * 2**33, model)
    elif on_host or named:
        bits = BITS[on_host[1] if on_host else named[0]]
    else:
        raise Refused(f"number format {text[:40]!r} is not known")
    if on_host and on_host[1] == "INT8" and "GPU INT4" in text:
        return bits, BITS["INT4"]
    if "INT4" in named:
        return bits, BITS["BF16"]  # checkpoints in int4 leave all but the routed experts in 16 bits
    return bits, max(bits, LEAST_DENSE_BITS) if bits < 4 else bits


def _bits_of_file(file_bits: float, model: ModelSpec) -> tuple[float, float]:
    """The same of a file: alike when it has 4 bits a weight on average, else dense ones have 6."""
    mean = file_bits / total_params(model)
    if mean >= 4:
        return mean, mean
    experts = expert_share(model) * total_params(model)
    dense = total_params(model) - experts
    return (file_bits - dense * LEAST_DENSE_BITS) / experts, LEAST_DENSE_BITS


def read_machine(text: str, parallelism: str = "") -> Machine:
    """The devices, host and link that the words of a row name.

    parallelism  the threads it ran, where they are fewer than the cores that text counts
    raises  Refused when neither a device nor a host of the catalogue is named; HardwareError
    """
    device, n_devices = _device(text)
    host = _host(text)
    if host is not None:
        host = _threads(host, text, parallelism)
    if device is None and host is None:
        raise Refused(f"hardware {text[:60]!r} is not in the catalogue")
    link = _link(text, device)
    memory = re.search(r"(\d{2,4}) (GB|TB) (?:LP)?DDR", text.replace("1 TB", "1024 GB"))
    drive = 12e9 if "PCIe5" in text and "NVMe" in text else 7e9 if "NVMe" in text else 0.0
    size = float(memory[1]) * 1e9 if memory else 0.0
    return Machine(device, n_devices, host, link, size, drive)


def _device(text: str) -> tuple[Device | None, int]:
    for pattern, name in _GPUS.items():
        if found := re.search(rf"(?:(\d{{1,2}})x )?{pattern}(?![\w])", text):
            device = load_device(name)
            if size := re.search(rf"{pattern} (\d{{1,3}}) ?GB", text):
                device = replace(device, memory_bytes=int(size[1]) << 30)
            return device, int(found[1] or 1)
    return None, 0


def _host(text: str) -> Device | None:
    """All sockets as one device, at the DRAM rate that the text gives or the catalogue has."""
    for pattern, name in _HOSTS.items():
        if found := re.search(rf"(?:(\d)x )?{pattern}", text):
            host = load_device(name)
            sockets = int(found[1] or _SOCKETS.get(name, 1))
            return _populated(host, sockets, text)
    if (memory := _nominal(text)) and re.search(r"DDR\d", text):
        return with_memory_rate(load_device(UNNAMED_HOST), memory)
    return None


def _threads(host: Device, text: str, parallelism: str) -> Device:
    """The host with the arithmetic of the threads that ran, when they are fewer than its cores."""
    cores = re.search(r"(?:(\d)x )?(?:Xeon|EPYC|Ryzen|Threadripper)[^;]*?(\d{1,3})c\b", text)
    threads = re.search(r"(\d{1,3}) threads", parallelism)
    if not (cores and threads):
        return host
    part = min(1.0, int(threads[1]) / (int(cores[1] or 1) * int(cores[2])))
    peaks = {dtype: rate * part for dtype, rate in host.flop_per_s.items()}
    return replace(host, flop_per_s=MappingProxyType(peaks))


UNNAMED_HOST = "ryzen-9-7950x"  # where a row names memory but no CPU
_SOCKETS: Mapping[str, int] = MappingProxyType(
    {"xeon-gold-6454s": 2}  # KTransformers' machine has two wherever its documents count them
)


def _populated(host: Device, sockets: int, text: str) -> Device:
    nominal = _nominal(text) or host.memory_bytes_per_s * sockets
    figures = dict(host.figures or {})
    if "memory.bandwidth" in figures:
        figures["memory.bandwidth"] = replace(
            figures["memory.bandwidth"], value=nominal / sockets, kind="assumed"
        )
    peaks = {dtype: rate * sockets for dtype, rate in host.flop_per_s.items()}
    return replace(
        with_memory_rate(host, nominal),
        flop_per_s=MappingProxyType(peaks),
        figures=MappingProxyType(figures),
    )


def _nominal(text: str) -> float | None:
    """Nominal bytes/s of all DRAM channels that a text describes, None when it does not."""
    speed = re.search(r"DDR\d-(\d{4})", text)
    channels = re.search(r"(\d{1,2}) ?ch", text)
    if speed and channels:
        sockets = re.search(r"(\d)x (?:Xeon|EPYC)", text) if "ch/socket" in text else None
        return int(speed[1]) * 8e6 * int(channels[1]) * int(sockets[1] if sockets else 1)
    if found := re.search(r"(\d{2,4}) GB/s (?:practical|measured)", text):
        return float(found[1]) * 1e9 / MEASURED_SHARE
    if found := re.search(r"DDR5 (\d{2,3}) GB/s", text):
        return float(found[1]) * 1e9
    return None


def _link(text: str, device: Device | None) -> float:
    """Nominal bytes/s of the host link in one direction, the slower of the two ends."""
    own = device.host_link_bytes_per_s if device else 0.0
    found = re.search(r"PCIe ?(\d)(?: ?x(\d{1,2}))?", text)
    if found is None or "NVMe" in text[found.start() :][:20]:
        return own
    stated = 2e9 * float(2 ** int(found[1])) * int(found[2] or 16) / 16
    return min(own, stated) if own else stated
