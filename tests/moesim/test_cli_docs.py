"""docs/cli.md is made from the commands: it is fresh, and every flag is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moesim.cli import docs
from moesim.cli.main import app
from tests.moesim.cli_case import moesim

COMMANDS = dict(docs.commands(app, "moesim"))


def test_the_page_in_the_repository_is_fresh() -> None:
    assert docs.run(["--check"]) == 0, "write it with `python -m moesim.cli.docs`"


def test_check_notices_a_stale_or_missing_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "TARGET", tmp_path / "cli.md")
    assert docs.run(["--check"]) == 1
    assert docs.run([]) == 0
    assert docs.run(["--check"]) == 0
    (tmp_path / "cli.md").write_text("old")
    assert docs.run(["--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert docs.run(["--chek"]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_that_help_shows_is_on_the_page(command: str) -> None:
    section = docs.page().split(f"\n## {command}\n")[1].split("\n## ")[0]
    shown = moesim(*command.split()[1:], "--help").out
    flags = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown.split("Options:")[1]))
    mentioned = set(re.findall(r"`(--?[a-z][a-z-]*)`", section))
    assert flags - {"--help"} == mentioned | (flags - {"--help"}) & set(_in_prose(section))
    assert mentioned <= flags


def _in_prose(section: str) -> list[str]:
    """Flags that a help text merely speaks of."""
    return re.findall(r"(?<![\w`-])--?[a-z][a-z-]*", section)


def test_every_command_and_flag_says_what_it_does() -> None:
    for name, command in COMMANDS.items():
        assert command.__doc__, name
        for parameter in docs.parameters(command):
            assert parameter.help or parameter.name == "seed", f"{name} {parameter.name}"
