"""The house has one direction of imports, small functions, and a command line that starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "traces": {"traces"},
    "hwmodels": {"hwmodels"},
    "planners": {"planners", "traces", "hwmodels"},
    "moesim": {"moesim", "planners", "traces", "hwmodels"},
    "kernels": {"kernels", "moesim_kernels"},
}
ROOMS = {*MAY_IMPORT, "moesim_kernels"}
HEAVY = {
    "numba", "torch", "matplotlib", "pandas", "ortools", "scipy", "sklearn", "pyarrow", "simpy",
    "networkx", "pulp", "numpy", "pydantic",
}  # fmt: skip


def _library_files() -> list[Path]:
    return sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def _functions(path: Path) -> Iterator[ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _is_compiled(function: ast.FunctionDef) -> bool:
    marks = " ".join(ast.unparse(mark) for mark in function.decorator_list)
    return any(word in marks for word in ("compiled", "njit", "triton.jit", "command", "_inlined"))


def _lines_without_docstring(function: ast.FunctionDef) -> int:
    doc = function.body[0] if ast.get_docstring(function) else None
    text = (doc.end_lineno or 0) - doc.lineno + 1 if doc else 0
    return (function.end_lineno or 0) - function.lineno + 1 - text


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_run_down_the_table_only(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        up = (set(_imports(path)) & ROOMS) - MAY_IMPORT[room]
        assert not up, f"{path.relative_to(ROOT)} imports {up}"


def test_functions_are_small_and_files_are_short() -> None:
    plain = [f for path in _library_files() for f in _functions(path) if not _is_compiled(f)]
    sizes = np.array([_lines_without_docstring(function) for function in plain])
    assert np.median(sizes) <= 10
    assert np.quantile(sizes, 0.95) <= 40
    assert sizes.max() <= 80
    long = [p.name for p in _library_files() if len(p.read_text().splitlines()) > 600]
    assert not long


def test_every_public_name_says_what_it_is() -> None:
    silent = []
    for path in _library_files():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            silent.append(str(path))
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{path}:{node.lineno} {node.name}")
    assert not silent


def test_help_answers_without_any_heavy_library_and_within_half_a_second() -> None:
    code = (
        "import sys, time; started = time.process_time()\n"
        "sys.argv = ['moesim', '--help']\n"
        "from moesim.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit:\n    pass\n"
        f"heavy = sorted(set(sys.modules) & {HEAVY!r})\n"
        "print(time.process_time() - started, *heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    seconds, *heavy = done.stderr.split()
    assert heavy == []
    assert float(seconds) < 0.5
    assert "plan" in done.stdout
