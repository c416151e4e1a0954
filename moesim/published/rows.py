"""Published runs of offloading engines (a CSV table of text columns) as typed work on hardware.

The table describes hardware, model, number format, workload and policy in words. They are read by
rule, one pattern to a meaning; a row that no rule reads is counted under the reason, never guessed.
What the words leave open is assumed in one place, `ASSUMED`, and the same for every row.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from hwmodels.device import Device
from hwmodels.errors import HardwareError
from moesim.errors import SimulationError
from moesim.published.words import Machine, Refused, read_machine, read_model, read_widths
from traces.model import ModelSpec

Phase = Literal["prefill", "decode"]
Placement = Literal["uniform", "random", "frequency", "dynamic", "front-loading", "back-loading"]

MOST_FILE_BYTES = 64 << 20
COLUMNS = (
    "id", "system_version", "model", "precision", "hardware", "parallelism", "workload", "policy",
    "metric", "value", "unit", "holdout", "family", "block", "configurable", "notes",
)  # fmt: skip
FAMILIES = ("KT", "IKLC", "LCPP")
METRICS: Mapping[str, Phase] = MappingProxyType(
    {
        "prefill_tps": "prefill",
        "decode_tps": "decode",
        "output_tps": "decode",
        "itl_ms": "decode",
    }
)
"""Metrics that are predicted, with the phase that they time."""

ASSUMED: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        "prompt": (128, "tokens of a prompt that is called short, or not described"),
        "long_prompt": (8192, "tokens of a prompt that is called long"),
        "output": (256, "tokens of an answer whose length is not given"),
        "micro_batch": (512, "default of llama.cpp's --ubatch-size"),
        "serving_requests": (1, "requests under way in a ShareGPT run; fitted on KT/sched/random"),
        "serving_depth": (512, "cached tokens of a ShareGPT request, about, at half its answer"),
    }
)


@dataclass(frozen=True, slots=True)
class Work:
    """What was timed.

    sequences    decoded at once, or prompts computed at once
    tokens       prefill: tokens of every prompt; decode: 1
    depth        tokens in the cache of each before
    micro_batch  prefill: tokens computed in one pass, at most
    first_pass   whether weights are touched for the first time (no warm-up run before)
    alike        tokens of a pass are of one request, or of requests alike (random tokens)
    """

    phase: Phase
    sequences: int
    tokens: int
    depth: float
    micro_batch: int
    first_pass: bool = False
    alike: bool = True


@dataclass(frozen=True, slots=True)
class Residency:
    """Where weights are.

    dense       "device" or "host": attention, shared experts, head
    share       of the routed experts on the device, 0..1
    placement   which: "front-loading" and "back-loading" take whole layers, first or last
    fill        share is what fits beside everything else in device memory
    copied      experts that are not there are copied to the device each time ("stream"); a prompt
                is then taken as one pass: in micro-batches of 512 the copies alone take minutes
    paged       they are in a mapped file larger than memory
    graph       decoding runs as a CUDA graph
    """

    dense: Literal["device", "host"]
    share: float
    placement: Placement = "uniform"
    fill: bool = False
    copied: bool = False
    paged: bool = False
    graph: bool = True


@dataclass(frozen=True, slots=True)
class OffloadRow:
    """One measured rate: tokens/s, or milliseconds between tokens when metric is "itl_ms".

    engine       name of a profile in `engines.py`
    model        its shape, with the experts per token that the run took
    expert_bits, dense_bits  bits stored per weight
    stream_from  tokens of a pass from which experts are copied to the device to be multiplied
    flag         the table's own remark when it doubts or holds out the row, "" for none
    """

    name: str
    block: str
    family: str
    metric: str
    measured: float
    engine: str
    model: ModelSpec
    expert_bits: float
    dense_bits: float
    kv_bits: float
    machine: Machine
    work: Work
    residency: Residency
    stream_from: float
    flag: str = ""

    @property
    def offloaded(self) -> bool:
        """Whether the host computes or holds any of the model beside a device, or all of it."""
        everything = self.residency.share == 1 and not self.residency.fill
        return self.residency.dense == "host" or not everything


@dataclass(frozen=True, slots=True)
class OffloadRows:
    """Rows of a file, and those left out by reason, with their names."""

    rows: tuple[OffloadRow, ...]
    skipped: Mapping[str, tuple[str, ...]]


def read_offload_rows(path: Path, configurable_only: bool = True) -> OffloadRows:
    """Rows of the families that offload.

    configurable_only  leave out, uncounted, what the table says cannot be set up again
    raises  SimulationError naming the file, line and column that is wrong; OSError
    """
    rows: list[OffloadRow] = []
    skipped: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), start=2):
        cells = Cells(f"{path}: row {number}", line)
        if cells["family"] not in FAMILIES:
            continue
        if configurable_only and cells["configurable"] != "1":
            continue
        try:
            rows.append(read_row(cells))
        except Refused as reason:
            skipped.setdefault(str(reason), []).append(cells["id"])
    counted = MappingProxyType({reason: tuple(names) for reason, names in skipped.items()})
    return OffloadRows(tuple(rows), counted)


def _lines(path: Path) -> list[dict[str, str | None]]:
    if path.stat().st_size > MOST_FILE_BYTES:
        raise SimulationError(f"{path}: over {MOST_FILE_BYTES} bytes, not a table of runs")
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise SimulationError(f"{path}: column {missing[0]!r} is missing")
        return list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SimulationError(f"{path}: not a CSV table: {str(error)[:80]}") from error


@dataclass(frozen=True, slots=True)
class Cells:
    """One line of the table: text by column, and where it stands."""

    where: str
    line: Mapping[str, str | None]

    def __getitem__(self, name: str) -> str:
        return (self.line.get(name) or "").strip()

    def number(self, name: str) -> float:
        """A finite number above 0; SimulationError otherwise."""
        text = self[name]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise SimulationError(f"{self.where}: {name}={text[:40]!r}, expected a number > 0")
        return value


def read_row(cells: Cells) -> OffloadRow:
    """The run of a line.

    raises  Refused with the reason why it cannot be priced; SimulationError for a value that is
            not a number > 0
    """
    measured = cells.number("value")
    metric = cells["metric"]
    if metric not in METRICS:
        raise Refused(f"metric {metric[:40]} is not the rate of a run")
    model = _top_k(read_model(cells["model"]), cells["policy"])
    expert_bits, dense_bits = read_widths(cells["precision"], model)
    try:
        machine = read_machine(cells["hardware"], cells["parallelism"])
    except HardwareError as error:
        raise Refused(str(error)[:120]) from error
    engine = _engine(cells)
    residency = _residency(cells, model, machine.device)
    return OffloadRow(
        cells["id"], cells["block"], cells["family"], metric, measured,
        engine, model, expert_bits, dense_bits, _kv_bits(cells, residency), machine,
        _work(cells, METRICS[metric]), residency, _stream_from(cells, engine, model), _flag(cells),
    )  # fmt: skip


def _engine(cells: Cells) -> str:
    """Profile of an engine by its name and version."""
    version = cells["system_version"].lower()
    if "ik_llama" in version:
        return "ik_llama.cpp"
    if "llama.cpp" in version:
        return "llama.cpp"
    if "kt-kernel" in version:
        return "kt-kernel-amx" if "AMX" in cells["precision"] else "kt-kernel"
    if "ktransformers" in version and ("v0.3" in version or "amx" in version):
        return "ktransformers-0.3"
    if "ktransformers" in version:
        return "ktransformers-0.2"
    raise Refused(f"engine {version[:40]!r} has no profile")


def _stream_from(cells: Cells, engine: str, model: ModelSpec) -> float:
    """Tokens of a pass from which experts go to the device; infinity for never.

    llama.cpp and its fork copy the experts that a pass needs from 32 tokens on; the fork, since its
    pull request 520, from 32 * n_experts / top_k on, when an expert has 32 tokens. kt-kernel
    streams whole layers from a threshold that the user sets; the published runs of 2,048 tokens
    stayed on the CPU, those of 8,192 did not.
    """
    version = cells["system_version"]
    if "cpu experts" in version.lower() or engine.startswith("ktransformers"):
        return math.inf
    if engine.startswith("kt-kernel"):
        return 4096.0 if "amx" not in engine else math.inf
    if engine == "ik_llama.cpp" and re.search(r"\bPR\b|#?520|threshold", version, re.I):
        newer = "main" not in version.split("(")[0]
        return 32.0 * model.n_experts / model.top_k if newer else 32.0
    return 32.0


def _top_k(model: ModelSpec, policy: str) -> ModelSpec:
    found = re.search(r"(\d{1,2}) experts/token", policy)
    return replace(model, top_k=int(found[1])) if found else model


def _flag(cells: Cells) -> str:
    doubted = "suspect" in cells["notes"].lower()
    held_out = cells["holdout"] not in ("", "0")
    marks = ["held out"] * held_out + [cells["notes"]] * doubted
    return "; ".join(marks)


def _kv_bits(cells: Cells, residency: Residency) -> float:
    """Bits of a cached number: 8.5 where a row says q8_0, and in ik_llama.cpp on a CPU.

    There 16 bits would need 87 GB/s of a host whose memory gives 60 (block IKLC/357cpu-ik).
    """
    fork_on_cpu = residency.dense == "host" and "ik_llama" in cells["system_version"]
    return 8.5 if "q8_0" in cells["workload"] or fork_on_cpu else 16.0


_EVERYTHING_ON_DEVICE = re.compile(r"full GPU|all in VRAM|all in unified|all on device", re.I)
_EVERYTHING_ON_HOST = re.compile(r"CPU only|all on CPU|^CPU$", re.I)
_EXPERTS_ON_HOST = re.compile(
    r"exps=CPU|experts? on CPU|CPU experts|experts in host RAM|rest CPU|^cpu$|AMX kernels", re.I
)


def _residency(cells: Cells, model: ModelSpec, device: Device | None) -> Residency:
    policy, text = cells["policy"], f"{cells['policy']}; {cells['workload']}"
    graph = "no cuda graph" not in text.lower()
    if found := re.search(r"expert ratio (\d{1,3})\s?%, placement=([\w-]+)", text):
        return Residency("device", _share(int(found[1]), 100), _placement(found[2]), graph=graph)
    if found := re.search(r"hot-expert VRAM cache: (\d{1,4}) slots", policy):
        return Residency("device", _share(int(found[1]), model.n_experts), "dynamic", graph=False)
    if found := re.search(r"(\d{1,4}) of (\d{1,4}) experts/layer on GPU", policy):
        return Residency("device", _share(int(found[1]), int(found[2])), graph=graph)
    if found := re.search(r"kt-num-gpu-experts (\d{1,4})", policy):
        return Residency("device", _share(int(found[1]), model.n_experts), graph=graph)
    if found := re.search(r"(\d{1,3}) layers of experts in VRAM", text):
        share = _share(int(found[1]), model.n_moe_layers)
        return Residency("device", share, "front-loading", graph=graph)
    if found := re.search(r"--n-cpu-moe (\d{1,3})|experts of last (\d{1,3}) layers on CPU", policy):
        first = found[1] is not None
        left = model.n_moe_layers - int(found[1] or found[2])
        share = _share(max(left, 0), model.n_moe_layers)
        return Residency("device", share, "back-loading" if first else "front-loading", graph=False)
    return _whole(policy, device, graph)


def _whole(policy: str, device: Device | None, graph: bool) -> Residency:
    """Policies that put all routed experts in one place."""
    if "--fit on" in policy:
        return Residency("device", 1.0, "back-loading", fill=True, graph=False)
    if _EVERYTHING_ON_DEVICE.search(policy):
        return Residency("device", 1.0)
    if "from NVMe" in policy:
        return Residency("device", 0.0, paged=True, graph=graph)
    if policy == "stream":
        return Residency("device", 0.0, copied=True, graph=False)
    if device is None or (_EVERYTHING_ON_HOST.search(policy) and policy != "cpu"):
        return Residency("host", 0.0)
    if _EXPERTS_ON_HOST.search(policy):
        return Residency("device", 0.0, graph=graph)
    raise Refused(f"policy {policy[:60]!r} is not understood")


def _share(part: int, whole: int) -> float:
    if not 0 <= part <= whole or not whole:
        raise Refused(f"{part} of {whole} is not a share of the experts")
    return part / whole


def _placement(text: str) -> Placement:
    known: Mapping[str, Placement] = {
        "uniform": "uniform", "random": "random", "frequency": "frequency", "dynamic": "dynamic",
        "front-loading": "front-loading", "frontloading": "front-loading",
        "front_loading": "front-loading", "front": "front-loading",
    }  # fmt: skip
    if text not in known:
        raise Refused(f"placement {text[:40]!r} is not known")
    return known[text]


def _work(cells: Cells, phase: Phase) -> Work:
    """Numbers of the workload's words; ASSUMED where they are silent."""
    text = cells["workload"]
    micro = _count(text, r"u_batch #") or _assumed("micro_batch")
    if "ShareGPT" in text:
        return Work("decode", _assumed("serving_requests"), 1, _assumed("serving_depth"), micro)
    depth = _count(text, r"N_KV=#", r"at depth #")
    if "sweep-bench" in text:  # a pass of one micro-batch at a depth, then an eighth of it decoded
        tokens, after = (micro, 0.0) if phase == "prefill" else (1, micro / 8)
        return Work(phase, 1, tokens, (depth or 0) + after, micro, first_pass=depth == 0)
    sequences = _count(text, r"(?<!u_)batch #,", r"# concurrent", r"# prompts x")
    sequences = 1 if sequences is None else sequences
    prompt = _count(
        text, r"prompt batch #", r"prompt #", r"#-token prompt", r"\bin # /", r"input #",
        r"# input tok", r"\bpp ?#",
    )  # fmt: skip
    tokens = _silent_prompt(text) if prompt is None else prompt
    if not (sequences and tokens):
        raise Refused("no tokens in the workload")
    alike = sequences == 1 or "PP " in text  # llama-batched-bench decodes random tokens
    if phase == "prefill":
        micro = max(micro, tokens) if "prompt batch" in text else micro
        return Work(phase, sequences, tokens, depth or 0, micro, alike=alike)
    alone = re.search(r"\btg\d+$|pp\d+ / tg", text)  # llama-bench times answers without a prompt
    before = depth if depth is not None else 0 if alone else tokens
    answer = _count(text, r"output #", r"out #", r"\btg ?#", r"~# tok out", r"-# tok out")
    answer = answer or _assumed("output")
    return Work(phase, sequences, 1, before + answer / 2, micro, alike=alike)


def _silent_prompt(text: str) -> int:
    """Tokens of a prompt whose length a text does not give."""
    if "llama-bench" in text:
        return _assumed("micro_batch")  # its default prompt is as long
    return _assumed("long_prompt" if "long prompt" in text else "prompt")


def _assumed(name: str) -> int:
    return int(ASSUMED[name][0])


def _count(text: str, *patterns: str) -> int | None:
    """The number at the # of the first pattern that a text has, None for none."""
    for pattern in patterns:
        if found := re.search(pattern.replace("#", r"(\d{1,9})"), text, re.I):
            return int(found[1])
    return None
