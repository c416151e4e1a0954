"""SGLang's own loader, taken from its wheel, reads what we write; its own EPLB equals ours."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from planners.export import sglang
from planners.incumbents import Shape, contiguous, eplb_global, eplb_hierarchical
from planners.plan import max_over_mean, rank_loads
from planners.planfile import PlanFile, layers_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.needs_wheel

WHEEL = "sglang==0.5.23"


@pytest.fixture(scope="session")
def wheel_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SGLang's Python source from its wheel: $MOESIM_WHEELS, the environment, or a download."""
    folder = Path(os.environ.get("MOESIM_WHEELS", Path(sys.prefix) / "wheels"))
    if not list(folder.glob("sglang-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        done = subprocess.run([*command, "-d", str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"the wheel {WHEEL} cannot be had: set MOESIM_WHEELS to a folder with it")
    source = tmp_path_factory.mktemp("sglang")
    with zipfile.ZipFile(sorted(folder.glob("sglang-*.whl"))[-1]) as wheel:
        wheel.extractall(source, [n for n in wheel.namelist() if "/srt/eplb/" in n])
    return source


@pytest.fixture
def loader(wheel_source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The module `expert_location`, with the server around it replaced by settings."""
    settings = SimpleNamespace(
        moe=SimpleNamespace(
            init_expert_location="",
            ep_num_redundant_experts=0,
            ep_dispatch_algorithm="static",
            moe_a2a_backend="deepep",
            ep_join_mode=None,
        )
    )
    parallel = SimpleNamespace(ep_size=0, nnodes=1, elastic_ep_initial_size=None, tp_size=0)
    runtime = types.ModuleType("sglang.srt.runtime_context")
    vars(runtime).update(
        get_exec=lambda: settings,
        get_parallel=lambda: parallel,
        get_device=lambda: SimpleNamespace(device="cpu"),
        get_resources=lambda: SimpleNamespace(),
    )
    elastic = types.ModuleType("sglang.srt.elastic_ep.elastic_ep")
    vars(elastic).update(elastic_expanded_world_enabled=lambda: False, ElasticEPStateManager=None)
    models = types.ModuleType("sglang.srt.model_loader")
    vars(models).update(get_model_architecture=lambda config: (config.architecture, None))
    for name, path in (("sglang", "sglang"), ("sglang.srt", "sglang/srt")):
        package = types.ModuleType(name)
        package.__path__ = [str(wheel_source / path)]
        monkeypatch.setitem(sys.modules, name, package)
    folder = types.ModuleType("sglang.srt.elastic_ep")
    for module in (runtime, elastic, models, folder):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module = importlib.import_module("sglang.srt.eplb.expert_location")
    vars(module).update(_settings=settings, _parallel=parallel)
    yield module
    for name in [n for n in sys.modules if n.startswith("sglang")]:
        sys.modules.pop(name)


def _model(n_layers: int, n_experts: int, module: types.ModuleType) -> SimpleNamespace:
    class Architecture:
        @staticmethod
        def get_model_config_for_expert_location(config: object) -> object:
            return module.ModelConfigForExpertLocation(
                num_layers=n_layers, num_logical_experts=n_experts, num_groups=4
            )

    return SimpleNamespace(architecture=Architecture, hf_config=None)


def _plan() -> PlanFile:
    placement = contiguous(4, 16, Shape(4, 20, 2))
    return PlanFile(
        model="example",
        n_experts=16,
        top_k=2,
        expert_parallel_size=4,
        ranks_per_node=2,
        n_slots=20,
        layers=layers_of(placement, moe_layers=(1, 2, 3, 5), n_layers=6),
    )


def test_sglangs_loader_takes_the_file_on_every_rank(
    loader: types.ModuleType, tmp_path: Path
) -> None:
    plan = _plan()
    written = sglang.write(plan, tmp_path / "map.json")
    loader._settings.moe.init_expert_location = str(written.map_file)
    loader._settings.moe.ep_num_redundant_experts = 4
    loader._parallel.ep_size, loader._parallel.nnodes = 4, 2
    expected = sglang.physical_to_logical_map(plan)
    for rank in range(4):
        metadata = loader.compute_initial_expert_location_metadata(_model(6, 16, loader), rank)
        assert metadata.physical_to_logical_map.tolist() == expected.tolist()
        assert metadata.num_local_physical_experts == 5
        dispatch = metadata.logical_to_rank_dispatch_physical_map.numpy()
        reached = np.take_along_axis(expected, dispatch, axis=1)
        assert (reached == np.arange(16)).all()


@pytest.mark.parametrize("nodes", [1, 2])
def test_sglangs_own_eplb_balances_exactly_as_ours(loader: types.ModuleType, nodes: int) -> None:
    algorithms = importlib.import_module("sglang.srt.eplb.eplb_algorithms.deepseek")
    load = np.random.default_rng(1).integers(1, 10_000, (5, 16)).astype(float)
    shape = Shape(n_ranks=8, n_slots=24, ranks_per_node=8 // nodes, n_groups=4)
    theirs, _, _ = algorithms.rebalance_experts(
        weight=torch.tensor(load),
        num_replicas=24,
        num_groups=4,
        num_nodes=nodes,
        num_gpus=8,
        enable_hierarchical=nodes > 1,
    )
    ours = (eplb_hierarchical if nodes > 1 else eplb_global)(load, shape)
    table = theirs.numpy().astype(np.int32)
    copies = np.stack([np.bincount(row, minlength=16) for row in table])
    share = np.take_along_axis(load / copies, table.astype(np.int64), axis=1)
    busiest = share.reshape(5, 8, -1).sum(axis=2)
    np.testing.assert_allclose(
        max_over_mean(rank_loads(ours, load)), max_over_mean(busiest), rtol=1e-6
    )
