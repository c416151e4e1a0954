"""GPU: the routed experts of one layer, by our kernels and by those of others.

Weights are cold (sets worth three times the last-level cache take turns), activations warm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from moesim_kernels import quantise
from moesim_kernels.bench import peers
from moesim_kernels.bench.accelerator import Accelerator, Call
from moesim_kernels.bench.measured import CannotMeasurePoint, Measured
from moesim_kernels.bench.points import Point
from moesim_kernels.bench.routing import drawn_ids, routing_of
from moesim_kernels.grouped_gemm import Routed, moe_ffn, moe_ffn_reference
from moesim_kernels.quantise import GROUP, ExpertWeights
from moesim_kernels.tuning import Config, Problem, choose_config

FORMATS = MappingProxyType(
    {"bf16": "dense", "fp16": "dense", "fp32": "dense", "int8": "int8", "int4": "int4",
     "fp8": "fp8"}
)  # fmt: skip
# Activations of fp8 weights come in as bf16 and are quantised on the way.
ACTIVATIONS = MappingProxyType(
    {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
)
CHECKED_TOKENS = 16
SPREAD = MappingProxyType({"int8": 73.3, "int4": 4.6, "fp8": 32.0})  # of the stored numbers


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured: sizes of the layer, weight format and dtype of the activations."""

    tokens: int
    hidden: int
    inter: int
    experts: int
    topk: int
    weight_format: str = "dense"
    dtype: torch.dtype = torch.bfloat16

    def expert_bytes(self) -> int:
        """Bytes of one expert's three matrices, scales and padding included."""
        return self._matrix_bytes(2 * self.inter, self.hidden) + self._matrix_bytes(
            self.hidden, self.inter
        )

    def _matrix_bytes(self, n_out: int, n_in: int) -> int:
        groups = math.ceil(n_in / GROUP)
        if self.weight_format == "dense":
            return n_out * n_in * self.dtype.itemsize
        if self.weight_format == "fp8":
            return n_out * n_in + 4 * math.ceil(n_out / GROUP) * groups
        values = n_out * (n_in if self.weight_format == "int8" else groups * GROUP // 2)
        return values + 4 * n_out * groups


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of all experts: gate over up, and down."""

    gate_up: ExpertWeights
    down: ExpertWeights


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens x [tokens, hidden], their routing, and the launch configuration of our kernels."""

    x: torch.Tensor
    routed: Routed
    config: Config


def grouped_gemm(point: Point, gpu: Accelerator) -> Measured:
    """The routed experts of one layer, alignment or permutation and the weighted sum included."""
    sizes, source, bind = _sizes(point), *_implementation(point)
    ids = drawn_ids(point, gpu.traces)
    routing = routing_of(ids, sizes.experts)
    batch = make_batch(sizes, torch.from_numpy(ids), gpu)
    busy_bytes = routing["distinct"] * sizes.expert_bytes()
    layers = make_layers(sizes, busy_bytes, gpu)
    with torch.inference_mode():
        calls = [bind(batch, layer) for layer in layers]
        error = max_rel_err(calls[0](), batch, layers[0])
        del layers  # what calls need of them they hold
        ours = point.kernel == "moesim"
        measured = gpu.measured(
            calls,
            source=source,
            # Each busy expert's weights once, and per token and choice a row in and a row out: what
            # the layer needs, not what is issued (no padding, nothing between the two products).
            n_bytes=busy_bytes + 2 * ids.size * sizes.hidden * sizes.dtype.itemsize,
            flops=6 * ids.size * sizes.hidden * sizes.inter,
            routing=routing,
            config=batch.config.to_json() if ours else {},
            max_rel_err=error,
        )
    method = {"spans": "known to the host"} if point.kernel == "torch_loop" else {}
    return replace(measured, method={**measured.method, **method})


def tuned_folder(device_name: str) -> Path | None:
    """Where the configuration tables of a device lie beside its results; None without one."""
    name = re.sub("[^a-z0-9]+", "-", device_name.lower()).strip("-")
    folder = Path(__file__).resolve().parents[1] / "results" / name / "tuned"
    return folder if folder.is_dir() else None


def make_batch(
    sizes: Sizes, ids: torch.Tensor, gpu: Accelerator, config: Config | None = None
) -> Batch:
    """Random tokens with the experts of ids [tokens, topk]; without a config the tuned one."""
    draw = torch.Generator(gpu.device).manual_seed(0)
    x = torch.randn(
        sizes.tokens, sizes.hidden, dtype=sizes.dtype, device=gpu.device, generator=draw
    )
    gates = torch.rand(sizes.tokens, sizes.topk, device=gpu.device, generator=draw)
    gates = gates / gates.sum(1, keepdim=True)
    if config is None:
        name = str(gpu.facts["name"])
        problem = Problem(sizes.experts, sizes.inter, name, sizes.weight_format)
        config = choose_config(tuned_folder(name), problem, sizes.tokens, sizes.topk)
    return Batch(x, Routed(ids.to(gpu.device, torch.int32), gates), config)


def make_layers(sizes: Sizes, busy_bytes: int, gpu: Accelerator) -> list[Layer]:
    """As many sets of weights as keep the cache cold; CannotMeasurePoint when none fits."""
    whole_bytes = sizes.experts * sizes.expert_bytes()
    return [random_layer(sizes, gpu.device, i) for i in range(gpu.copies(busy_bytes, whole_bytes))]


def random_layer(sizes: Sizes, device: torch.device, seed: int = 0) -> Layer:
    """Random weights made on the device in the format they are stored in, expert by expert.

    Products of inputs of variance 1 have about variance 1.
    """
    draw = torch.Generator(device).manual_seed(seed)
    return Layer(
        _random_weights(sizes, 2 * sizes.inter, sizes.hidden, draw),
        _random_weights(sizes, sizes.hidden, sizes.inter, draw),
    )


def max_rel_err(y: torch.Tensor, batch: Batch, layer: Layer) -> float:
    """Largest error of the first tokens over their largest value, against the float32 loop.

    The loop is run for one expert at a time, so that only one is widened to float32.
    raises  CannotMeasurePoint when y is not finite
    """
    x, ids = batch.x[:CHECKED_TOKENS], batch.routed.ids[:CHECKED_TOKENS]
    expected = torch.zeros(x.shape, device=x.device)
    for expert in ids.unique().tolist():
        only = Routed(torch.where(ids == expert, 0, -1), batch.routed.gates[:CHECKED_TOKENS])
        weights = (_one_expert(w, expert) for w in (layer.gate_up, layer.down))
        expected += moe_ffn_reference(x, *weights, only)
    error = (y[:CHECKED_TOKENS].float() - expected).abs().max() / expected.abs().max()
    if not math.isfinite(error):
        raise CannotMeasurePoint("the result is not finite")
    return round(float(error), 6)


def _sizes(point: Point) -> Sizes:
    names = ("tokens", "hidden", "inter", "experts", "topk")
    stored, activation = str(point.dtype["w"]), str(point.dtype["a"])
    known = stored in FORMATS and activation in ACTIVATIONS
    if not known or (FORMATS[stored] == "dense" and stored != activation):
        raise CannotMeasurePoint(f"no kernel for {stored} weights with {activation} activations")
    numbers = (int(point.shape[name]) for name in names)
    return Sizes(*numbers, FORMATS[stored], ACTIVATIONS[activation])


def _one_expert(weights: ExpertWeights, expert: int) -> ExpertWeights:
    scales = None if weights.scales is None else weights.scales[expert : expert + 1]
    return replace(weights, values=weights.values[expert : expert + 1], scales=scales)


def _random_weights(sizes: Sizes, n_out: int, n_in: int, draw: torch.Generator) -> ExpertWeights:
    kind, n_experts, device = sizes.weight_format, sizes.experts, draw.device
    spread = n_in**-0.5
    if kind == "dense":
        values = torch.empty(n_experts, n_out, n_in, dtype=sizes.dtype, device=device)
        for matrix in values:
            matrix.normal_(0, spread, generator=draw)
        return quantise.dense(values)
    groups = math.ceil(n_in / GROUP)
    width = groups * GROUP // 2 if kind == "int4" else n_in
    dtype = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}[kind]
    values = torch.empty(n_experts, n_out, width, dtype=dtype, device=device)
    for matrix in values:
        _fill(matrix, kind, draw)
    scale_rows = math.ceil(n_out / GROUP) if kind == "fp8" else n_out
    scales = torch.empty(n_experts, scale_rows, groups, device=device)
    scales.uniform_(0.5 * spread / SPREAD[kind], 1.5 * spread / SPREAD[kind], generator=draw)
    return ExpertWeights(values, scales, kind, n_in)


def _fill(matrix: torch.Tensor, kind: str, draw: torch.Generator) -> None:
    """Random stored numbers of one expert; SPREAD is their standard deviation."""
    if kind == "int8":
        matrix.random_(-127, 128, generator=draw)
    elif kind == "int4":
        matrix.random_(0, 256, generator=draw)
    else:
        wide = torch.empty(matrix.shape, dtype=torch.bfloat16, device=matrix.device)
        matrix.copy_(wide.normal_(0, SPREAD["fp8"], generator=draw))


Bind = Callable[[Batch, Layer], Call]


def _moesim(batch: Batch, layer: Layer) -> Call:
    return partial(moe_ffn, batch.x, layer.gate_up, layer.down, batch.routed, batch.config)


def _grouped_mm(batch: Batch, layer: Layer) -> Call:
    return partial(peers.grouped_mm_moe, batch.x, batch.routed, *_matrices(layer))


def _loop(batch: Batch, layer: Layer) -> Call:
    spans = peers.spans_of(batch.routed.ids, layer.down.n_experts)
    return partial(peers.loop_moe, batch.x, batch.routed, *_matrices(layer), spans)


def _triton_kernels(batch: Batch, layer: Layer) -> Call:
    run = peers.triton_kernels_moe(*_matrices(layer))
    return partial(_or_refuse, partial(run, batch.x, batch.routed))


def _or_refuse(call: Call) -> object:
    """What another version's kernel cannot do is said in the row, whatever it raises."""
    try:
        return call()
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise CannotMeasurePoint(f"triton_kernels: {why}") from error


def _matrices(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.gate_up.values, layer.down.values


IMPLEMENTATIONS = MappingProxyType(
    {
        "moesim": ("moesim.triton.grouped", _moesim),
        "torch_grouped_mm": ("torch.grouped_mm", _grouped_mm),
        "triton_kernels": ("triton_kernels.matmul", _triton_kernels),
        "torch_loop": ("torch.expert_loop", _loop),
    }
)


def _implementation(point: Point) -> tuple[str, Bind]:
    if point.kernel not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise CannotMeasurePoint(f"kernel {point.kernel!r} is unknown, known: {known}")
    if point.kernel != "moesim" and FORMATS.get(str(point.dtype["w"])) != "dense":
        raise CannotMeasurePoint(f"{point.kernel} takes 16-bit weights, not {point.dtype['w']}")
    return IMPLEMENTATIONS[point.kernel]
