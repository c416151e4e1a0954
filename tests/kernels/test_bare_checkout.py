"""The folder alone, installed nowhere, runs its benchmarks with `python kernels`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# An environment where moesim is installed finds the package; this hides it, and nothing else.
HIDE = """
import sys
class Hidden:
    def find_spec(name, path=None, target=None):
        if name == "moesim_kernels" and path is None:
            sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
        return None
sys.meta_path.insert(0, Hidden)
"""


@pytest.fixture
def run_copy(tmp_path: Path):
    shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("results"))
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE, encoding="utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "hide"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


def test_a_copy_of_the_folder_measures_without_being_installed(run_copy, tmp_path: Path) -> None:
    find = "import importlib.util as u; print(u.find_spec('moesim_kernels'))"
    assert run_copy("-c", find).stdout == "None\n"
    done = run_copy("kernels", "stream", "--minutes", "0.01", "--out", "rows")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "start"
    assert events[-1]["measured"] >= 1
    rows = (tmp_path / "rows" / "stream.jsonl").read_text().splitlines()
    assert len(rows) == events[-1]["measured"]
    assert all(json.loads(row)["ok"] for row in rows)


def test_an_unknown_operator_and_tuning_without_a_gpu_end_in_words(run_copy) -> None:
    done = run_copy("kernels", "gem", "--out", "rows")
    assert done.returncode == 2
    assert "operator 'gem' is unknown" in done.stderr
    if torch.cuda.is_available():
        return
    done = run_copy("kernels", "tune", "--out", "tables")
    assert (done.returncode, done.stderr) == (2, "error: no GPU\n")
