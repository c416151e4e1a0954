"""Tables of measured collectives: NCCL by operator, DeepEP by kernel and direction.

`rows_of` brings both to the columns that `tables.py` reads: one row a time, with the kernel that
ran in `framework`, `version`, `wire_dtype` and `kernel_source`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hwmodels.fitted.collectives import ROUNDS
from hwmodels.fitted.expert_exchange import FP8_BITS, deduplicated_copies, single_copies
from hwmodels.fitted.parts import Floats, Work

if TYPE_CHECKING:
    import pandas as pd

RANKS_A_NODE = 8
NCCL = ("nccl", "op_name", "nccl_dtype", "num_gpus", "message_size", "bytes", "latency_ms")
LOW_LATENCY = ("release", "num_token", "num_topk", "node_num", "dispatch_avg_t_us")
NORMAL = ("release", "num_token", "num_topk", "node_num", "dispatch_sms", "dispatch_transmit_us")
COLLECTIVE_SHAPE = ("num_gpus",)
EXCHANGE_SHAPE = ("hidden_size", "num_topk", "num_experts", "node_num")
# Bits on the wire by the name in `wire_dtype`; "any" moves bytes as they are.
WIRE_BITS = {"any": 0.0, "fp8": FP8_BITS, "bfloat16": 16.0}


def rows_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as `tables.py` reads them; those of any other table as they are."""
    has = set(rows.columns)
    if has.issuperset(NCCL):
        return rows.assign(
            framework="nccl", version=rows["nccl"], wire_dtype="any",
            kernel_source=rows["op_name"], milliseconds=rows["latency_ms"],
        )  # fmt: skip
    if has.issuperset(NORMAL):
        return _directions(rows, "normal", {"": "transmit_us", "_notify": "notify_us"})
    if has.issuperset(LOW_LATENCY):
        return _directions(rows, "ll", {"": "avg_t_us"})
    return rows


def _directions(rows: pd.DataFrame, kernel: str, stages: dict[str, str]) -> pd.DataFrame:
    """One row for each direction and stage; between nodes another kernel runs, by its own name."""
    import pandas as pd

    found = [
        of_stage.assign(
            framework="deepep",
            version=of_stage["release"],
            wire_dtype="fp8" if direction == "dispatch" else "bfloat16",
            kernel_source=[f"{kernel}_{direction}{stage}{over}" for over in _across(of_stage)],
            milliseconds=of_stage[f"{direction}_{column}"] * 1e-3,
            sums=float(direction == "combine"),
            sms=of_stage.get(f"{direction}_sms", 0),
        )
        for direction in ("dispatch", "combine")
        for stage, column in stages.items()
        # Inside a node there is no kernel of its own that notifies: the table has 0.
        for of_stage in [rows[rows["node_num"] > 1] if stage else rows]
    ]
    return pd.concat(found, ignore_index=True)


def _across(rows: pd.DataFrame) -> list[str]:
    return ["_across" if nodes > 1 else "" for nodes in rows["node_num"]]


def collective_work(rows: pd.DataFrame, dtype: str) -> Work:
    """Columns of the family "collective"; the table's `bytes` is the full buffer of a rank.

    Read so, the largest messages move 250 to 370 GB/s over NVLink 4, which does 450; were it
    what each rank contributes, an all-gather over 8 would move 2.7 TB/s.
    """
    operator = str(rows["kernel_source"].iloc[0])
    return {
        "message_bytes": rows["bytes"].to_numpy(np.float64),
        "ranks": rows["num_gpus"].to_numpy(np.float64),
        "element_bytes": (rows["bytes"] / rows["message_size"]).to_numpy(np.float64),
        "rounds": np.full(len(rows), ROUNDS[operator]),
    }


def low_latency_work(rows: pd.DataFrame, dtype: str) -> Work:
    """Columns of the family "exchange_low_latency"; num_token is of a rank, routing uniform."""
    columns = _exchange(rows, dtype)
    return columns | single_copies(columns)


def normal_work(rows: pd.DataFrame, dtype: str) -> Work:
    """Columns of the family "exchange_normal"; num_token is of a rank, routing uniform."""
    columns = _exchange(rows, dtype)
    return columns | deduplicated_copies(columns)


def _exchange(rows: pd.DataFrame, dtype: str) -> dict[str, Floats]:
    names = {
        "tokens": "num_token", "hidden": "hidden_size", "top_k": "num_topk",
        "experts": "num_experts", "nodes": "node_num", "multiprocessors": "sms", "sums": "sums",
    }  # fmt: skip
    columns = {ours: rows[theirs].to_numpy(np.float64) for ours, theirs in names.items()}
    columns["ranks"] = columns["nodes"] * RANKS_A_NODE
    columns["element_bits"] = np.full(len(rows), WIRE_BITS[dtype])
    return columns
