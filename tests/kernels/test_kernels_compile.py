"""Every kernel compiles for an H100 or H200 (sm_90) without one, in the shapes engines run.

The interpreter accepts programs that the compiler refuses, and knows nothing of shared memory;
this holds both. It runs in a process of its own, since there triton must not interpret.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY_BYTES = 232_448  # one program's limit on sm_90 (227 KiB)
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moesim_kernels import attention, grouped_gemm_kernel as gemm
from moesim_kernels.align_kernel import align_kernel, count_kernel, place_kernel
from moesim_kernels.attention_kernel import decode_kernel
from moesim_kernels.fp8_rows_kernel import fp8_rows_kernel
from moesim_kernels.gate_kernel import gate_kernel
from moesim_kernels.permute_kernel import combine_kernel, permute_kernel
from moesim_kernels.tuning import default_config

made = []

def build(kernel, label, pointers, constants, warps=4, stages=3, odd=()):
    name = kernel.arg_names
    types = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in name}
    if "scale" in types:
        types["scale"] = "fp32"
    aligned = [n for n in name if n not in constants and n != "scale" and n not in odd]
    hints = {(name.index(n),): [["tt.divisibility", 16]] for n in aligned}
    values = {(name.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, types, values, hints)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    made.append([label, built.metadata.shared, len(built.asm["cubin"])])

index = {n: "*i32" for n in ("slot_ptr", "block_expert_ptr", "n_padded_ptr", "position_ptr")}
floats = {n: "*fp32" for n in ("x_scale_ptr", "w_scale_ptr", "weight_ptr", "bias_ptr")}
kinds = {"dense": ("*bf16", "*bf16"), "int8": ("*bf16", "*i8"), "int4": ("*bf16", "*u8"),
         "fp8": ("*fp8e4nv", "*fp8e4nv")}
for code, (kind, (x, w)) in enumerate(kinds.items()):
    for slots in (8, 128 * 512):
        c = default_config(slots, 128, kind)
        constants = dict(
            SLOTS_PER_ROW=8, FORMAT=code, SWIGLU=True, WEIGHTED=True, EVEN_K=slots > 8,
            BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP_M=c.group_m)
        pointers = index | floats | {"x_ptr": x, "w_ptr": w, "y_ptr": "*bf16"}
        build(gemm.grouped_gemm_kernel, f"{kind} {slots}", pointers, constants, c.n_warps,
              c.n_stages, odd=() if slots > 8 else ("K",))
for rule in (dict(SCORING=1, BIASED=True, GROUPS=8, MEMBERS=32, GROUPS_KEPT=4, TOP_K=8),
             dict(SCORING=0, BIASED=False, GROUPS=1, MEMBERS=128, GROUPS_KEPT=1, TOP_K=8)):
    rule |= dict(RENORMALISE=True, PADDED_GROUPS=rule["GROUPS"], PADDED_MEMBERS=rule["MEMBERS"],
                 PADDED_K=8)
    outs = {"logits_ptr": "*fp32", "ids_ptr": "*i32", "weights_ptr": "*fp32"}
    build(gate_kernel, f"gate {rule['GROUPS']}", floats | outs, rule)
rows = {"x_ptr": "*bf16", "y_ptr": "*bf16", "rows_ptr": "*bf16"}
build(align_kernel, "align", index | {"ids_ptr": "*i32"},
      dict(EXPERTS=256, PADDED_EXPERTS=256, BLOCK_M=16, CHUNK=32))
ids = index | {"ids_ptr": "*i32", "count_ptr": "*i32"}
build(count_kernel, "count", ids, dict(CHUNK=1024))
build(place_kernel, "place", ids,
      dict(EXPERTS=256, PADDED_EXPERTS=256, BLOCK_M=64, CHUNK=1024))
build(permute_kernel, "permute", index | rows, dict(SLOTS_PER_ROW=8, BLOCK=1024))
build(combine_kernel, "combine", index | floats | rows,
      dict(TOP_K=8, BY_SLOT=True, WEIGHTED=False, BLOCK=1024))
build(fp8_rows_kernel, "fp8 rows",
      {"x_ptr": "*bf16", "y_ptr": "*fp8e4nv", "scale_ptr": "*fp32"},
      dict(BLOCK_ROWS=8, ROUND_FIRST=False))
cache = {n: "*bf16" for n in ("q_ptr", "q_rope_ptr", "k_ptr", "k_rope_ptr", "v_ptr")}
cache |= {"length_ptr": "*i32", "out_ptr": "*fp32", "lse_ptr": "*fp32"}
for heads, dim, rope, block, most in ((64, 128, 0, attention.BLOCK, attention.MAX_HEADS),
                                      (128, 512, 64, attention.BLOCK_LATENT,
                                       attention.MAX_HEADS_LATENT)):
    constants = dict(
        KV_HEADS=1, HEADS_PER_KV=heads, DIM=dim, ROPE=rope, V_DIM=dim, BLOCK_HEADS=most,
        PADDED_DIM=dim, PADDED_ROPE=max(rope, 16), PADDED_V=dim, SHARED_V=rope > 0, BLOCK=block)
    build(decode_kernel, f"decode {dim}", cache, constants)
json.dump(made, sys.stdout)
"""


def test_every_kernel_compiles_for_sm_90_within_its_shared_memory(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stderr[-3000:])
    made = json.loads(done.stdout)
    assert len(made) == 18
    too_much = [(label, used) for label, used, _ in made if used > SHARED_MEMORY_BYTES]
    assert not too_much
    assert all(size > 0 for _, _, size in made)
