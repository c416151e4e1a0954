"""Seconds of the operators of a forward pass: fitted kernels first, formulas for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from hwmodels.collective import RING_BASE_S, RingOp, ring_collective
from hwmodels.fitted.kernels import nearest_kernel, parse_kernel
from hwmodels.fitted.model import OperatorModel, predict
from hwmodels.fitted.parts import Floats
from hwmodels.operators import elementwise
from hwmodels.system import System
from moesim.lower.engine_step import (
    ALL_GATHER,
    ALL_REDUCE,
    ELEMENTWISE,
    REDUCE_SCATTER,
    Operator,
)

COLLECTIVES = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER)
# One exchange between all ranks of a node takes RING_BASE_S and this: NCCL's all-to-all of up to
# 16 kB takes 6.3 to 8 us on 2 to 8 H100.
EXCHANGE_ROUND_S = 2.2e-6

# Who measured the kernel that an engine runs on Hopper by default, and its name there, by family
# and number format ("" for any other). vLLM's latent attention is FlashAttention 3 as in SGLang,
# whose rows are taken: vLLM's own were timed with the host's launches (160 us whatever the size).
# TensorRT-LLM's guide for gpt-oss: on Hopper the Triton kernels of OpenAI, which vLLM runs also.
_OPENAI_MXFP4 = ("vllm", "vllm_gptossmxfp4moe_triton_oaitritonmxfp4expertsmonolithic")
KERNELS: Mapping[str, Mapping[tuple[str, str], tuple[str, str]]] = MappingProxyType(
    {
        "vllm": {
            ("gemm", ""): ("vllm", "torch.nn.functional.linear"),
            ("gemm", "fp8"): ("vllm", "CutlassFP8ScaledMMLinearKernel"),
            ("gemm", "fp8_block"): ("vllm", "DeepGemmFp8BlockScaledMMKernel"),
            ("experts", ""): ("vllm", "vllm_unquantizedfusedmoe_triton_tritonexperts"),
            ("experts", "fp8_block"): ("vllm", "vllm_fp8moe_triton_tritonexperts"),
            ("experts", "int4_wo"): ("sglang", "sglang_marlin_moe"),
            ("experts", "w4a16_mxfp4"): _OPENAI_MXFP4,
            ("attention", ""): ("vllm", "vllm_flash_attn_fa3"),
            ("latent", ""): ("sglang", "flash_attention"),
        },
        "sglang": {
            ("gemm", ""): ("sglang", "sglang_torch_linear"),
            ("gemm", "fp8"): ("sglang", "sglang_sgl_kernel_fp8_scaled_mm"),
            ("gemm", "fp8_block"): ("sglang", "sglang_deepgemm_gemm_nt_f8f8bf16"),
            ("experts", ""): ("sglang", "sglang_fused_moe_triton"),
            ("experts", "int4_wo"): ("sglang", "sglang_marlin_moe"),
            ("attention", ""): ("sglang", "fa3"),
            ("latent", ""): ("sglang", "flash_attention"),
        },
        "trtllm": {
            ("gemm", ""): ("trtllm", "torch_flow"),
            ("experts", ""): ("trtllm", "moe_torch_flow_cutlass"),
            ("experts", "w4a16_mxfp4"): _OPENAI_MXFP4,
            ("attention", ""): ("trtllm", "torch_flow"),
            ("latent", ""): ("trtllm", "default"),
        },
    }
)


@dataclass(frozen=True, slots=True)
class Prices:
    """Who prices the operators of an engine on a system.

    models     fitted kernels, of one device
    framework  "vllm", "sglang" or "trtllm": its own kernels are taken where they were measured
    _kernels   those found so far, by family and format
    """

    models: Sequence[OperatorModel]
    system: System
    framework: str
    _kernels: dict[tuple[str, str], OperatorModel] = field(default_factory=dict, compare=False)

    def seconds(self, operators: Sequence[Operator]) -> list[Floats]:
        """Seconds of each operator in each pass, float64[n]; 0 where a pass has none of it.

        Operators of one kernel are priced in one call: a pass has thirty of them and six kernels.
        """
        found = [np.zeros(len(operator.present)) for operator in operators]
        alike: dict[tuple[str, str, float], list[int]] = {}
        for place, operator in enumerate(operators):
            ranks = float(operator.work["ranks"][0]) if operator.family in COLLECTIVES else 0.0
            alike.setdefault((operator.family, operator.dtype, ranks), []).append(place)
        for places in alike.values():
            self._price([operators[place] for place in places], [found[place] for place in places])
        return found

    def kernel(self, family: str, dtype: str) -> OperatorModel:
        """The fitted kernel that stands for an operator; HardwareError when no format fits."""
        kind = family.split("_")[0]
        known = KERNELS.get(self.framework, {})
        unknown = (self.framework, "unknown")
        framework, source = known.get((kind, dtype)) or known.get((kind, ""), unknown)
        for model in self.models:
            name = parse_kernel(model.kernel)
            same = (name.framework, name.dtype, name.source) == (framework, dtype, source)
            if same and model.family == family:
                return model
        return nearest_kernel(self.models, family, f"{framework} - {dtype} {source}")

    def _price(self, operators: Sequence[Operator], found: Sequence[Floats]) -> None:
        """Fill in the seconds of operators of one family, format and number of ranks."""
        everywhere = all(operator.present.all() for operator in operators)
        work = {
            name: np.concatenate(
                [of.work[name] if everywhere else of.work[name][of.present] for of in operators]
            )
            for name in operators[0].work
        }
        seconds, start = self._priced(operators[0], work), 0
        for operator, of_operator in zip(operators, found, strict=True):
            end = start + int(np.count_nonzero(operator.present))
            of_operator[operator.present] = seconds[start:end]
            start = end

    def _priced(self, operator: Operator, work: Mapping[str, Floats]) -> Floats:
        if operator.family == ELEMENTWISE:
            return elementwise(self.system.device, work["bytes"]).seconds
        if operator.family in COLLECTIVES:
            return self._collective(operator.family, work["bytes"], int(work["ranks"][0]))
        key = operator.family, operator.dtype
        if key not in self._kernels:
            self._kernels[key] = self.kernel(*key)
        return predict(self._kernels[key], self.system.device, work).seconds

    def _collective(self, family: str, n_bytes: Floats, ranks: int) -> Floats:
        if family == ALL_REDUCE:
            return all_reduce_seconds(self.system, n_bytes, ranks)
        op: RingOp = "all_gather" if family == ALL_GATHER else "reduce_scatter"
        return ring_collective(self.system, op, n_bytes, ranks).seconds


def all_reduce_seconds(system: System, n_bytes: Floats, ranks: int) -> Floats:
    """The fastest of three ways, as engines choose by size, float64[n].

    one exchange   every rank reads the whole buffer of all others
    two exchanges  each reduces its share, then all gather
    ring           NCCL's
    source         bytes by counting; the start of an exchange from NCCL's all-to-all on H100
    """
    rate = system.scale_up.bytes_per_s
    start_s = RING_BASE_S + EXCHANGE_ROUND_S
    one = start_s + n_bytes * (ranks - 1) / rate
    two = start_s + EXCHANGE_ROUND_S + 2 * n_bytes * (ranks - 1) / ranks / rate
    ring = ring_collective(system, "all_reduce", n_bytes, ranks).seconds
    return np.minimum(np.minimum(one, two), ring)
