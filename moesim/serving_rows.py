"""Measured serving runs (a CSV table in aiconfigurator's columns) as loads on engines.

What the table says is not always what ran; each reading below is by rule, never by row:

- A number format is that of the published checkpoint where there is only one: the table calls
  gpt-oss's MXFP4 experts nvfp4 and block-scaled FP8 plain fp8.
- TensorRT-LLM's flags "tp 8, ep 8" mean 8 devices of which every one holds an eighth of the
  experts; part of the rows have them multiplied (tp 64, expert tp 8 x ep 8). The same run stands
  in the table in both ways.
- Requests under way are those that the load generator was told (silicon_concurrency), where given;
  else batch_size of every rank with attention of its own.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from moesim.errors import SimulationError
from moesim.lower.engine_step import Ranks
from traces.errors import TraceError
from traces.models import catalog_entry

MOST_FILE_BYTES = 64 << 20
NODE = 8  # devices of an H100 or H200 server
COLUMNS = (
    "id", "silicon_data_source", "backend", "backend_version", "model_path", "system", "mode",
    "isl", "osl", "gemm_quant_mode", "moe_quant_mode", "batch_size", "tp_size", "pp_size",
    "attention_dp_size", "moe_tp_size", "moe_ep_size", "silicon_ttft_ms", "silicon_tpot_ms",
)  # fmt: skip
_FLAGS = re.compile(r"_tp(\d+)(?:_0)?_ep(\d+)(?:_0)?_", re.ASCII)
_TOLD = re.compile(r"silicon_concurrency=(\d{1,6})\b", re.ASCII)

NOT_AGGREGATED = "prefill and decode on servers of their own"
PIPELINE = "pipeline parallel"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published model: its name in the catalogue and the number formats of its weights."""

    model: str
    gemm: str
    experts: str


_BLOCKS = ("fp8_block", "fp8_block")
CHECKPOINTS: Mapping[str, Checkpoint] = MappingProxyType(
    {
        "deepseek-ai/DeepSeek-V3": Checkpoint("deepseek-v3", *_BLOCKS),
        "deepseek-ai/DeepSeek-R1": Checkpoint("deepseek-r1", *_BLOCKS),
        "Qwen/Qwen3-235B-A22B-FP8": Checkpoint("qwen3-235b-a22b", *_BLOCKS),
        "openai/gpt-oss-120b": Checkpoint("gpt-oss-120b", "bfloat16", "w4a16_mxfp4"),
        # The language model is Kimi K2's; only routed experts are in int4.
        "moonshotai/Kimi-K2.5": Checkpoint("kimi-k2", "bfloat16", "int4_wo"),
    }
)


@dataclass(frozen=True, slots=True)
class ServingRow:
    """One measured run with prefill and decode on the same devices.

    concurrency  requests under way in all, as the table has it; ttft_s inf when not given
    """

    name: str
    model_path: str
    checkpoint: Checkpoint
    system: str
    backend: str
    version: str
    isl: float
    osl: float
    concurrency: float
    ranks: Ranks
    tpot_s: float
    ttft_s: float

    @property
    def queued(self) -> bool:
        """Whether it waited longer than it decoded: fewer requests ran at once than the table says.

        The rule reads what was measured, so it may sort scores but not choose what is scored.
        """
        return math.isfinite(self.ttft_s) and self.ttft_s > self.osl * self.tpot_s


@dataclass(frozen=True, slots=True)
class ServingRows:
    """Rows of a file and how many were left out, by reason."""

    rows: tuple[ServingRow, ...]
    skipped: Mapping[str, int]


def read_serving(path: Path) -> ServingRows:
    """Every aggregated run of a file.

    raises  SimulationError naming the file, line and column that is wrong; OSError
    """
    if path.stat().st_size > MOST_FILE_BYTES:
        raise SimulationError(f"{path}: over {MOST_FILE_BYTES} bytes, not a table of runs")
    try:
        lines = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
        if missing:
            raise SimulationError(f"{path}: column {missing[0]!r} is missing")
        cells = list(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SimulationError(f"{path}: not a CSV table: {str(error)[:80]}") from error
    rows, skipped = [], dict[str, int]()
    for number, line in enumerate(cells, start=2):
        found = _row(_Line(f"{path}: row {number}", line))
        if isinstance(found, str):
            skipped[found] = skipped.get(found, 0) + 1
        else:
            rows.append(found)
    return ServingRows(tuple(rows), skipped)


@dataclass(frozen=True, slots=True)
class _Line:
    where: str
    cells: Mapping[str, str | None]

    def text(self, name: str) -> str:
        return (self.cells[name] or "").strip()

    def number(self, name: str, empty: float = math.nan) -> float:
        """A finite number above 0; `empty` for an empty cell, or an error when that is NaN."""
        text = self.text(name)
        if not text and not math.isnan(empty):
            return empty
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise SimulationError(f"{self.where}: {name}={text[:40]!r}, expected a number > 0")
        return value

    def count(self, name: str, empty: float = math.nan) -> int:
        value = self.number(name, empty)
        if value != int(value) or value > 1e6:
            raise SimulationError(f"{self.where}: {name}={value:g}, expected a whole number")
        return int(value)


def _row(line: _Line) -> ServingRow | str:
    """The run of a line, or why it cannot be priced."""
    if line.text("mode") != "agg":
        return NOT_AGGREGATED
    if line.count("pp_size", 1) != 1:
        return PIPELINE
    sizes = _split(line)
    try:
        checkpoint, ranks = _checkpoint(line), Ranks(*sizes)
    except (SimulationError, TraceError) as error:
        return str(error)
    return ServingRow(
        line.text("id"), line.text("model_path"), checkpoint,
        line.text("system"), line.text("backend"), line.text("backend_version") or "not given",
        line.number("isl"), line.number("osl"),
        _concurrency(line), ranks, line.number("silicon_tpot_ms") * 1e-3,
        line.number("silicon_ttft_ms", math.inf) * 1e-3,
    )  # fmt: skip


def _checkpoint(line: _Line) -> Checkpoint:
    """The published one, else a model of the catalogue in the formats that the table says."""
    path = line.text("model_path")
    if known := CHECKPOINTS.get(path):
        return known
    name = catalog_entry(path).name
    return Checkpoint(name, line.text("gemm_quant_mode"), line.text("moe_quant_mode"))


def _concurrency(line: _Line) -> float:
    told = _TOLD.search(line.text("silicon_data_source"))
    if told and int(told[1]):
        return float(told[1])
    return line.number("batch_size") * line.count("attention_dp_size", 1)


def _split(line: _Line) -> tuple[int, int, int, int]:
    """The sizes of Ranks."""
    tp, dp = line.count("tp_size"), line.count("attention_dp_size", 1)
    expert_tp, expert_ep = line.count("moe_tp_size"), line.count("moe_ep_size")
    flags = _FLAGS.search(line.text("id"))
    multiplied = flags is not None and int(flags[1]) * int(flags[2]) == tp * dp
    if min(expert_tp, expert_ep) > 1 and (multiplied or expert_tp * expert_ep > NODE):
        parts = expert_tp
        attention = (1, parts) if dp > 1 else (parts, 1)
        return (*attention, max(parts // expert_ep, 1), expert_ep)
    if not line.text("attention_dp_size"):
        dp = max(expert_tp * expert_ep // tp, 1)
    return tp, dp, expert_tp, expert_ep
