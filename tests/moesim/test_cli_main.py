"""The root command: fast help, exit codes, one-line errors, flags that stand anywhere."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

from moesim import __version__
from moesim.cli import catalog, output
from moesim.errors import SimulationError
from tests.moesim.cli_case import moesim, refused

HEAVY = (
    "numba", "torch", "matplotlib", "pandas", "ortools", "scipy", "sklearn", "pyarrow", "simpy",
    "numpy", "pydantic", "rich", "networkx", "pulp",
)  # fmt: skip


def help_in_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_imports_no_heavy_library() -> None:
    code = f"""
import sys
from moesim.cli.main import app
try:
    app(["--help"], prog_name="moesim")
except SystemExit as end:
    assert end.code == 0
heavy = sorted({{name.split(".")[0] for name in sys.modules}} & set({HEAVY!r}))
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    ran = help_in_new_process(code)
    assert ran.returncode == 0, ran.stderr
    for command in ("demo", "trace", "catalog", "plan", "simulate", "export"):
        assert f"\n  {command} " in ran.stdout


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        ran = help_in_new_process("from moesim.cli.main import app; app(['--help'])")
        assert ran.returncode == 0, ran.stderr
        return time.perf_counter() - started

    # The fastest of a few: other work on the machine only ever adds time.
    assert min(seconds() for _ in range(5)) < 0.5


def test_version_is_that_of_the_package() -> None:
    assert moesim("--version").out == f"moesim {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("catalog", "models", "--no-such-flag"), ("simulate",)]
)
def test_a_misspelled_command_line_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    ran = moesim(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Usage: " in ran.err


def with_failing_models(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(catalog.output, "emit_json", fail)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SimulationError("two\nlines"), "error: two lines"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), "error: a.json: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "b"), "error: b: Permission denied"),
        (OSError("odd"), "error: odd"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    with_failing_models(monkeypatch, error)
    ran = moesim("catalog", "models", "mixtral-8x7b", "--json")
    refused(ran)
    assert ran.err == line + "\n"


def test_an_interrupt_is_one_line_and_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    with_failing_models(monkeypatch, KeyboardInterrupt())
    ran = moesim("catalog", "models", "mixtral-8x7b", "--json")
    assert (ran.code, ran.out, ran.err) == (130, "", "interrupted\n")


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError("bug"), AssertionError("bug")])
def test_a_broken_invariant_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with_failing_models(monkeypatch, error)
    assert moesim("catalog", "models", "mixtral-8x7b", "--json").raised is error


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("catalog", "models", "mixtral-8x7b"), True),
        (("--no-progress", "catalog", "models", "mixtral-8x7b"), False),
        (("catalog", "models", "mixtral-8x7b", "--no-progress"), False),
        (("catalog", "--no-progress", "models", "mixtral-8x7b"), False),
    ],
)
def test_no_progress_may_stand_anywhere(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], shown: bool
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(output, "facts", lambda *_: seen.append(output.show_progress.get()))
    assert moesim(*arguments).code == 0
    assert seen == [shown]


def test_a_closed_pipe_is_no_error_message() -> None:
    code = "from moesim.cli.main import run; run()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "catalog", "systems", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    message = process.stderr.read().decode()
    process.stderr.close()
    process.wait()
    assert message == ""


def test_colours_need_a_terminal() -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "moesim.cli.main", "catalog", "systems", "h200"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "\x1b" not in ran.stdout
    assert "4.8 TB/s" in ran.stdout
