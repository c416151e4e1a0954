"""Random residency plans, and other projects' code out of their wheels."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from planners.residency_file import CacheEntry, ResidencyFile, ResidentLayer, TierEntry

EXPERT_BYTES = 1000


def plan_of(
    tier: np.ndarray,
    *,
    load: np.ndarray | None = None,
    bits: np.ndarray | None = None,
    dense: int = 0,
    spare: tuple[int, ...] = (0, 10**9, 10**12),
    others: int = 0,
    cache: CacheEntry | None = None,
    **changes: Any,
) -> ResidencyFile:
    """A plan with these tiers (int[moe_layers, experts]) behind `dense` dense layers.

    spare   bytes of each tier that the experts placed there leave free
    others  bytes of other things on the device
    """
    n_moe, n_experts = tier.shape
    bits = np.full(tier.shape, 4.0) if bits is None else bits
    size = np.ceil(EXPERT_BYTES * bits / bits.max()).astype(int)
    slots = sum(cache.slots) * EXPERT_BYTES if cache else 0
    used = [int(size[tier == index].sum()) for index in range(3)]
    used[0] += slots + others
    names, kinds = ("gpu", "dram", "nvme"), ("device", "host", "disk")
    layers = [ResidentLayer(layer=index, kind="dense") for index in range(dense)]
    for row in range(n_moe):
        shown = [] if load is None or not load[row].any() else load[row].tolist()
        layers.append(
            ResidentLayer(
                layer=dense + row,
                kind="moe",
                expert_tier=tier[row].tolist(),
                expert_bits=bits[row].tolist(),
                load=shown,
            )
        )
    fields: dict[str, Any] = {
        "model": "example",
        "n_experts": n_experts,
        "top_k": 1,
        "expert_bytes": EXPERT_BYTES,
        "tiers": [
            TierEntry(name=n, kind=k, capacity_bytes=u + s, used_bytes=u)
            for n, k, u, s in zip(names, kinds, used, spare, strict=True)
        ],
        "layers": layers,
        "cache": cache or CacheEntry(),
    }
    return ResidencyFile(**(fields | changes))


@st.composite
def plans(draw: st.DrawFn, most_tiers: int = 3, mixed_bits: bool = False) -> ResidencyFile:
    """Plans of up to 6 MoE layers and 8 experts: uneven, equal, tied and unknown loads."""
    n_moe, n_experts = draw(st.integers(1, 6)), draw(st.integers(2, 8))
    shape = (n_moe, n_experts)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tier = rng.integers(0, draw(st.integers(1, most_tiers)), shape)
    load = {
        "uneven": rng.dirichlet(np.full(n_experts, 0.3), n_moe),
        "equal": np.full(shape, 1 / n_experts),
        "tied": rng.integers(0, 3, shape).astype(float),
        "some unknown": rng.random(shape) * rng.integers(0, 2, (n_moe, 1)),
    }[draw(st.sampled_from(["uneven", "equal", "tied", "some unknown"]))]
    total = load.sum(axis=1, keepdims=True)
    load = np.divide(load, total, out=np.zeros(shape), where=total > 0)
    bits = rng.choice([4.0, 8.0, 16.0], shape) if mixed_bits else None
    slots = draw(st.integers(0, 3))
    return plan_of(
        tier,
        load=load,
        bits=bits,
        dense=draw(st.integers(0, 3)),
        spare=(draw(st.integers(0, 12_000)), 10**6, 10**9),
        others=draw(st.integers(0, 5000)),
        cache=CacheEntry(slots=[slots] * n_moe, policy="lru") if slots else None,
    )


def wheel(pattern: str, requirement: str) -> Path:
    """A wheel from $MOESIM_WHEELS, the environment, or a download; the test skips without."""
    folder = Path(os.environ.get("MOESIM_WHEELS", Path(sys.prefix) / "wheels"))
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
        done = subprocess.run([*command, "-d", str(folder)], capture_output=True, check=False)
        if done.returncode or not list(folder.glob(pattern)):
            pytest.skip(f"the wheel {requirement} cannot be had: set MOESIM_WHEELS to its folder")
    return sorted(folder.glob(pattern))[-1]


def functions_of(path: Path, member: str, names: Iterable[str], known: dict[str, Any]) -> Any:
    """Functions of a file in a wheel, run in a namespace of `known` names only."""
    with zipfile.ZipFile(path) as archive:
        tree = ast.parse(archive.read(member))
    wanted = set(names)
    found = [node for node in tree.body if getattr(node, "name", None) in wanted]
    assert {node.name for node in found} == wanted, f"{path.name} has another {member}"
    future = ast.parse("from __future__ import annotations").body
    code = ast.fix_missing_locations(ast.Module([*future, *found], []))
    exec(compile(code, member, "exec"), known)
    return known
