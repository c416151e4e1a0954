"""CPU: one matrix product, a layer of experts one after another, and plain memory traffic.

Weights are cold (copies worth three times the last-level cache take turns), activations warm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from moesim_kernels.bench import timing
from moesim_kernels.bench.measured import CannotMeasure, Measured
from moesim_kernels.bench.points import Point
from moesim_kernels.bench.routing import CapturedRouting, drawn_ids, routing_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
CACHES = 3
MOST_COPIES = 256
MOST_WEIGHT_BYTES = 2 << 30
Product = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let torch use n threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Weights:
    """Cold copies of the last matrices asked for; the memory they take is bounded.

    Copies of one matrix are equal: only their addresses matter to the cache.
    """

    def __init__(self) -> None:
        self._most_bytes = min(MOST_WEIGHT_BYTES, timing.memory_bytes() // 8)
        self._held: dict[tuple[str, int, int], tuple[list[Product], str, float, int]] = {}

    def products(self, dtype: str, n: int, k: int) -> tuple[list[Product], str, float]:
        """Functions x[m, k] -> x w.T, each with its own w[n, k]; their name; their error."""
        wanted = (dtype, n, k)
        if wanted not in self._held:
            n_bytes = n * k * BITS[dtype] // 8
            copies = min(MOST_COPIES, CACHES * timing.cache_bytes() // n_bytes + 2)
            while self._held and self._total() + copies * n_bytes > self._most_bytes:
                self._held.pop(next(iter(self._held)))
            self._held[wanted] = (*_products(dtype, n, k, copies), copies * n_bytes)
        return self._held[wanted][:3]

    def _total(self) -> int:
        return sum(entry[3] for entry in self._held.values())


def gemm(point: Point, weights: Weights) -> Measured:
    """One product of m rows with a cold weight matrix."""
    m, n, k, n_threads = (int(point.shape[name]) for name in ("m", "n", "k", "threads"))
    dtype = str(point.dtype["w"])
    products, source, error = weights.products(dtype, n, k)
    x = torch.randn(m, k, dtype=DTYPES[str(point.dtype["a"])])
    turn = itertools.cycle(products)
    with threads(n_threads):
        timed = timing.repeat(lambda: next(turn)(x))
    moved = n * k * BITS[dtype] // 8 + m * (n + k) * x.element_size()
    return Measured(timed, source, moved, 2 * m * n * k, _cold(len(products)), {}, error)


def experts(point: Point, traces: Sequence[CapturedRouting] = ()) -> Measured:
    """A layer of experts over their own tokens: gate and up, SiLU, down.

    One expert after another, or all in one call where the point's kernel is `torch_grouped_mm`.
    """
    sizes = ("tokens", "hidden", "inter", "experts", "topk", "threads")
    n_tokens, hidden, inter, n_experts, topk, n_threads = (int(point.shape[s]) for s in sizes)
    dtype = DTYPES[str(point.dtype["w"])]
    routing = routing_of(drawn_ids(point, traces), n_experts)
    busy = routing["counts"]
    per_expert = 3 * hidden * inter * dtype.itemsize
    n_layers = min(MOST_COPIES, CACHES * timing.cache_bytes() // (len(busy) * per_expert) + 2)
    layers = [_layer(len(busy), hidden, inter, dtype) for _ in range(n_layers)]
    inputs = [torch.randn(count, hidden, dtype=dtype) for count in busy]
    source, calls = "torch.expert_loop", [partial(run_experts, inputs, layer) for layer in layers]
    if point.kernel:
        source, calls = "torch.grouped_mm", [_grouped_call(inputs, layer) for layer in layers]
        del layers
    turn = itertools.cycle(calls)
    with torch.inference_mode(), threads(n_threads):
        timed = timing.repeat(lambda: next(turn)())
    chosen = n_tokens * topk
    moved = len(busy) * per_expert + chosen * 2 * hidden * dtype.itemsize
    return Measured(timed, source, moved, 6 * chosen * hidden * inter, _cold(n_layers), routing)


def _grouped_call(
    inputs: Sequence[torch.Tensor], layer: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Callable[[], torch.Tensor]:
    """The same layer in two calls over all experts, their weights side by side."""
    from moesim_kernels.bench.peers import grouped_mm_ffn

    up, down = (torch.stack(matrices) for matrices in zip(*layer, strict=True))
    ends = torch.tensor([len(x) for x in inputs]).cumsum(0).int()
    return partial(grouped_mm_ffn, torch.cat(list(inputs)), up, down, ends)


def run_experts(
    inputs: Sequence[torch.Tensor], layer: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    """The result of each expert for its own tokens, [tokens of the expert, hidden] each."""
    results = []
    for x, (up, down) in zip(inputs, layer, strict=True):
        gate, value = torch.nn.functional.linear(x, up).chunk(2, dim=1)
        hidden = torch.nn.functional.silu(gate) * value
        results.append(torch.nn.functional.linear(hidden, down))
    return results


def stream(point: Point) -> Measured:
    """Copy b to a, or the triad a = b + s c, over arrays of `bytes` each."""
    n_bytes, n_threads = int(point.shape["bytes"]), int(point.shape["threads"])
    a, b, c = (torch.ones(n_bytes // 4) for _ in range(3))
    triad = point.shape["kind"] == "triad"
    with threads(n_threads):
        if triad:
            timed = timing.repeat(lambda: torch.add(b, c, alpha=3.0, out=a))
        else:
            timed = timing.repeat(lambda: a.copy_(b))
    arrays, source = (3, "torch.add") if triad else (2, "torch.copy_")
    return Measured(timed, source, arrays * n_bytes, 2 * a.numel() if triad else 0)


def _cold(copies: int) -> dict[str, object]:
    return {"cache": "cold_rotating", "copies": copies}


def _layer(
    n: int, hidden: int, inter: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    up = torch.randn(2 * inter, hidden, dtype=dtype) / hidden**0.5
    down = torch.randn(hidden, inter, dtype=dtype) / inter**0.5
    return [(up.clone(), down.clone()) for _ in range(n)]


def _products(dtype: str, n: int, k: int, copies: int) -> tuple[list[Product], str, float]:
    torch.manual_seed(0)
    make = {"int8": _int8, "int4": _int4}.get(dtype)
    exact = torch.randn(n, k) / k**0.5
    if make is None:
        weight, source = exact.to(DTYPES[dtype]), "torch.linear"
        products = [_linear(weight.clone()) for _ in range(copies)]
        reference = weight.float()
    else:
        products, source, reference = make(exact, copies)
    x = torch.randn(3, k, dtype=DTYPES.get(dtype, torch.bfloat16))
    expected = x.float() @ reference.T
    error = (products[0](x).float() - expected).abs().max() / expected.abs().max()
    return products, source, round(float(error), 6)


def _linear(weight: torch.Tensor) -> Product:
    return lambda x: torch.nn.functional.linear(x, weight)


def _int8(exact: torch.Tensor, copies: int) -> tuple[list[Product], str, torch.Tensor]:
    call = _torch_call("_weight_int8pack_mm")
    scale = exact.abs().amax(1) / 127
    packed = (exact / scale[:, None]).round().to(torch.int8)
    scale = scale.bfloat16()
    held = [packed.clone() for _ in range(copies)]
    reference = packed.float() * scale.float()[:, None]
    return [lambda x, w=w: call(x, w, scale) for w in held], "torch.weight_int8pack_mm", reference


def _int4(exact: torch.Tensor, copies: int) -> tuple[list[Product], str, torch.Tensor]:
    pack = _torch_call("_convert_weight_to_int4pack_for_cpu")
    call = _torch_call("_weight_int4pack_mm_for_cpu")
    n, k = exact.shape
    groups = exact.reshape(n, k // 128, 128)
    scale = (groups.abs().amax(2, keepdim=True) / 7).bfloat16().float()
    codes = (groups / scale).round().clamp(-8, 7)
    packed = pack((codes + 8).reshape(n, k).to(torch.int32), 1)
    facts = torch.stack((scale[..., 0].T, torch.zeros_like(scale[..., 0].T)), 2)
    facts = facts.bfloat16().contiguous()
    held = [packed.clone() for _ in range(copies)]
    reference = (codes * scale).reshape(n, k)
    return (
        [lambda x, w=w: call(x, w, 128, facts) for w in held],
        "torch.weight_int4pack_mm",
        (reference),
    )


def _torch_call(name: str) -> Callable[..., torch.Tensor]:
    call = getattr(torch, name, None)
    if call is None:
        raise CannotMeasure(f"torch {torch.__version__} has no {name}")
    return call
