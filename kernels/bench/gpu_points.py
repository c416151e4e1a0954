"""What is measured on a GPU: the points of every operator, most informative first."""

from __future__ import annotations

from moesim_kernels.bench.points import KIB, MESSAGE_BYTES, MIB, Point, ladder, weight_dtype

# (hidden, intermediate, experts, top_k) of Qwen3-30B-A3B, DeepSeek-V3, Mixtral 8x7B, gpt-oss-20b
# and DeepSeek-V2-Lite.
SHAPES = ((2048, 768, 128, 8), (7168, 2048, 256, 8), (4096, 14336, 8, 2), (2880, 2880, 32, 4),
          (2048, 1408, 64, 6))  # fmt: skip
TOKENS_PER_EXPERT = (1, 64, 8, 256, 0.25, 1024, 16, 2, 4, 32, 0.5, 128, 512)
FORMATS = ("bf16", "int4", "fp8", "int8")
LOADS = ("balanced", "power_law_1.2", "captured")
OURS, PEERS = "moesim", ("torch_grouped_mm", "triton_kernels", "torch_loop")
ROUTER_TOKENS = (1, 1024, 64, 16384, 8, 256, 4096)
ROUTERS = ((128, 8, 2048), (256, 8, 7168), (8, 2, 4096), (32, 4, 2880), (64, 6, 2048))
GQA_HEADS = ((32, 4, 128), (64, 8, 64), (32, 8, 128))  # heads, KV heads, width
MLA_HEADS = ((128, 512, 64), (16, 512, 64))  # heads, latent rank, rotary width
DECODE_BATCHES = (1, 64, 8, 256, 32)
CONTEXTS = (4096, 512, 32768, 1024, 16384)
PREFILL_TOKENS = (4096, 512, 16384, 128, 2048)
COPY_BYTES = tuple(KIB << shift for shift in (2, 18, 10, 14, 6, 20, 12, 8, 16))
PEAKS = ("copy", "set", "gemm_bf16", "gemm_fp8", "read")
PAIRS = ("gemm+copy", "gemm+gemm", "stream+copy", "stream+gemm")


def gpu_points() -> dict[str, list[Point]]:
    """The points of every operator by its name, most informative first."""
    return {
        "peak": [Point("peak", {"kind": kind}) for kind in PEAKS],
        "launch": [
            Point("launch", {"kind": kind, "kernels": n})
            for kind, n in ladder(("graph", "eager"), (1, 100, 10, 30))
        ],
        "copy": _copies(),
        "grouped_gemm": _experts(),
        "gate": _router("gate"),
        "permute": _router("permute"),
        "unpermute": _router("unpermute"),
        "attention_decode": _decodes(),
        "attention_prefill": _prefills(),
        "overlap": [
            Point("overlap", {"pair": pair, "bytes": size})
            for size, pair in ladder((256 * MIB, 32 * MIB), PAIRS)
        ],
        "all_to_all_nccl": [
            Point("all_to_all_nccl", {"bytes": size, "ranks": n, "split": split}, {"w": "uint8"})
            for size, n, split in ladder(MESSAGE_BYTES, (2, 4, 8), ("even", "uneven"))
        ],
    }


def tokens_of(per_expert: float, n_experts: int, top_k: int) -> int:
    """Tokens of a batch that gives each expert per_expert of them on average, at least one."""
    return max(1, round(per_expert * n_experts / top_k))


def _experts() -> list[Point]:
    ours = ladder(TOKENS_PER_EXPERT, SHAPES, LOADS, FORMATS, (OURS,))
    peers = ladder(TOKENS_PER_EXPERT, SHAPES, LOADS[:1], FORMATS[:1], PEERS)
    first = len(ours) // 4  # bf16 and its peers before the tail of the other formats
    ordered = [*ours[:first], *peers, *ours[first:]]
    points = {}
    for per_expert, (hidden, inter, n_experts, top_k), load, dtype, kernel in ordered:
        shape = {
            "tokens": tokens_of(per_expert, n_experts, top_k), "hidden": hidden, "inter": inter,
            "experts": n_experts, "topk": top_k, "tp": 1, "ep": 1,
        }  # fmt: skip
        routing = {"dist": load, "seed": 0}
        point = Point("grouped_gemm", shape, gpu_dtype(dtype), routing, kernel)
        points[point.key("")] = point  # small batches of few experts may round to the same tokens
    return list(points.values())


def gpu_dtype(name: str) -> dict[str, int | str]:
    """The `dtype` of a row: fp8 weights go with fp8 activations, narrower ones with bf16."""
    if name == "fp8":
        return {"w": "fp8", "a": "fp8", "group": 128}
    return weight_dtype(name) | ({"group": 128} if name == "int8" else {})


def _router(op: str) -> list[Point]:
    return [
        Point(op, {"tokens": tokens, "experts": experts, "topk": topk, "hidden": hidden},
              {"w": "bf16", "a": "bf16"}, {"dist": "balanced", "seed": 0})
        for tokens, (experts, topk, hidden) in ladder(ROUTER_TOKENS, ROUTERS)
    ]  # fmt: skip


def _decodes() -> list[Point]:
    gqa = [
        Point("attention_decode", {"batch": batch, "context": context, "heads": heads,
              "kv_heads": kv_heads, "head_dim": width, "kind": "gqa"}, {"a": "bf16"}, {}, kernel)
        for batch, context, (heads, kv_heads, width), kernel in ladder(
            DECODE_BATCHES, CONTEXTS, GQA_HEADS, (OURS, "torch_sdpa")
        )
    ]  # fmt: skip
    mla = [
        Point("attention_decode", {"batch": batch, "context": context, "heads": heads,
              "kv_rank": rank, "rope_dim": rope, "kind": "mla"}, {"a": "bf16"}, {}, OURS)
        for batch, context, (heads, rank, rope) in ladder(DECODE_BATCHES, CONTEXTS, MLA_HEADS)
    ]  # fmt: skip
    return [point for both in zip(gqa[: len(mla)], mla, strict=True) for point in both] + gqa[
        len(mla) :
    ]


def _prefills() -> list[Point]:
    return [
        Point("attention_prefill", {"batch": batch, "tokens": tokens, "heads": heads,
              "kv_heads": kv_heads, "head_dim": width}, {"a": "bf16"}, {}, "torch_sdpa")
        for tokens, (heads, kv_heads, width), batch in ladder(PREFILL_TOKENS, GQA_HEADS, (1, 4))
    ]  # fmt: skip


def _copies() -> list[Point]:
    one = ladder(COPY_BYTES, ("gpu", "cpu", "both"), ("pinned", "pageable"), (1,))
    more = ladder(COPY_BYTES[:5], ("gpu", "cpu", "both"), ("pinned",), (2, 4))
    return [
        Point("copy", {"bytes": size, "to": to, "memory": memory, "streams": streams},
              {"w": "uint8"})
        for size, to, memory, streams in (*one, *more)
    ]  # fmt: skip
