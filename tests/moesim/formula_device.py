"""An H100 whose every kernel keeps the datasheet's rates: formulas without anything fitted."""

from __future__ import annotations

import numpy as np

from hwmodels.devices import load_device
from hwmodels.fitted.model import OperatorModel, parts_of
from hwmodels.fitted.store import FittedDevice
from hwmodels.fitted.trees import NO_TREES
from moesim.lower.engine_step import Formats, Operator, Passes, Ranks, operators
from traces.models import load_model

FLOOR_S = 2e-6
KERNELS = (
    ("gemm", "bfloat16"), ("gemm", "fp8_block"), ("experts", "bfloat16"), ("experts", "fp8_block"),
    ("experts", "w4a16_mxfp4"), ("attention_decode", "bfloat16 kv bfloat16"),
    ("attention_prefill", "bfloat16 kv bfloat16"), ("latent_decode", "bfloat16 kv bfloat16"),
    ("latent_prefill", "bfloat16 kv bfloat16"),
)  # fmt: skip


def passes(
    sequences: object, context: object = 2000, prompts: object = 0, chunk: object = 0, dp: int = 1
) -> Passes:
    """Passes of numbers or arrays; every rank of dp holds as much."""
    columns = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, np.float64))
                                    for value in (sequences, context, prompts, chunk)))  # fmt: skip
    decoding, cached, new, of = columns
    return Passes(decoding, cached, new, of, np.zeros(len(of)), dp * (decoding + new * of))


def formula_device() -> FittedDevice:
    """Floor of FLOOR_S, no overlap, every coefficient of memory and compute 1, nothing serial."""
    h100, models = load_device("h100"), []
    work = {operator.family: operator.work for operator in _every_family()}
    for family, dtype in KERNELS:
        parts = parts_of(family, h100, work[family])
        constants = dict.fromkeys((*parts.memory, *parts.compute), 1.0)
        constants |= dict.fromkeys(parts.serial, 1e-9) | {"floor_s": FLOOR_S, "overlap": 1e-9}
        constants |= {name: 1e-9 for name in parts.compute if name != "arithmetic"}
        constants |= {"ragged": 1e-9} if "ragged" in parts.memory else {}
        wide = np.full(len(parts.shape), np.inf, np.float32)
        models.append(
            OperatorModel(family, f"vllm 1 {dtype} plain", "h100", constants, NO_TREES, -wide,
                          wide, 100)
        )  # fmt: skip
    return FittedDevice("h100", tuple(models), ("none",), "0" * 64, {})


def _every_family() -> list[Operator]:
    found = []
    for name in ("deepseek-v3", "qwen3-235b-a22b"):
        step = passes(4, prompts=1, chunk=100)
        found += operators(load_model(name), Ranks(), Formats(routing="balanced"), step)
    return found
