"""Configuration tables: names, nearest batch, files as vLLM's tuner writes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moesim_kernels.errors import KernelError
from moesim_kernels.tuning import (
    Config,
    Problem,
    choose_config,
    default_config,
    load_table,
    nearest,
    save_table,
)

ENTRY = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
QWEN = Problem(128, 768, "NVIDIA H200")


def test_file_names_follow_the_format_of_vllm() -> None:
    assert QWEN.file_name() == "E=128,N=768,device_name=NVIDIA_H200.json"
    fp8 = Problem(256, 2048, "NVIDIA H200", "fp8")
    assert fp8.file_name() == (
        "E=256,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    )
    names = {Problem(8, 64, "cpu", kind).file_name() for kind in ("dense", "int8", "int4", "fp8")}
    assert len(names) == 4


def test_a_written_table_reads_back_and_is_chosen_by_the_nearest_batch(tmp_path: Path) -> None:
    table = {1: Config(16, 64, 128), 64: Config(32, 64, 64, 8, 8, 4), 4096: Config(128, 256, 64)}
    path = tmp_path / QWEN.file_name()
    save_table(path, table)
    assert load_table(path) == table
    assert list(tmp_path.iterdir()) == [path]
    assert choose_config(tmp_path, QWEN, 40, 8) == table[64]
    assert choose_config(tmp_path, QWEN, 32, 8) == table[1]
    assert choose_config(tmp_path, QWEN, 10**6, 8) == table[4096]


def test_without_a_table_the_default_is_taken(tmp_path: Path) -> None:
    assert choose_config(tmp_path, QWEN, 8, 8) == default_config(64, 128)
    assert choose_config(None, QWEN, 8, 8) == default_config(64, 128)


def test_a_table_of_vllms_tuner_loads(tmp_path: Path) -> None:
    tuned = ENTRY | {"num_warps": 8, "num_stages": 2, "SPLIT_K": 1}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"triton_version": "3.6.0", "1": ENTRY, "48": tuned}))
    assert load_table(path) == {1: Config(16, 64, 128), 48: Config(16, 64, 128, 1, 8, 2)}


@given(st.integers(0, 200_000), st.integers(1, 512), st.sampled_from(["dense", "int8", "int4"]))
def test_defaults_are_valid_and_blocks_grow_with_the_batch(slots, experts, kind) -> None:
    made = default_config(slots, experts, kind)
    assert made.block_m <= default_config(2 * slots, experts, kind).block_m
    assert kind == "dense" or 32 <= made.block_k <= 128


@given(st.sets(st.integers(1, 5000), min_size=1), st.integers(1, 5000))
def test_no_batch_of_a_table_is_nearer_than_the_one_taken(keys: set[int], tokens: int) -> None:
    table = {key: Config(16, 16, 16, key) for key in keys}
    taken = nearest(table, tokens).group_m
    assert abs(taken - tokens) == min(abs(key - tokens) for key in keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "not JSON"),
        ("[]", "keyed by numbers of tokens"),
        ("{}", "no configuration"),
        (json.dumps({"many": ENTRY}), "key 'many' is not a number"),
        (json.dumps({"8": ENTRY | {"BLOCK_SIZE_Q": 1}}), "BLOCK_SIZE_Q"),
        (json.dumps({"8": {"BLOCK_SIZE_M": 16}}), "missing keys"),
        (json.dumps({"8": ENTRY | {"BLOCK_SIZE_M": "16"}}), "block_m='16' must be an integer"),
        (json.dumps({"8": ENTRY | {"BLOCK_SIZE_M": 24}}), "8: config: block_m=24"),
        (json.dumps({"8": 3}), "expected an object"),
    ],
)
def test_bad_tables_are_refused_with_file_and_entry(tmp_path: Path, content, message) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(KernelError, match=message) as caught:
        load_table(path)
    assert "bad.json" in str(caught.value)


def test_the_package_and_its_tables_need_neither_torch_nor_triton() -> None:
    code = (
        "import sys, moesim_kernels, moesim_kernels.tuning\n"
        "sys.exit(len({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_importing_the_kernels_signatures_does_not_import_triton() -> None:
    code = (
        "import sys, moesim_kernels.grouped_gemm, moesim_kernels.gate, moesim_kernels.attention\n"
        "sys.exit('triton' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
