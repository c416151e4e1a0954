"""Flags may come from a file: the same as typing them, typed ones win, unknown ones fail."""

from __future__ import annotations

from pathlib import Path

from tests.moesim.cli_case import config_file, moesim, refused, trace_file


def _file(folder: Path, text: str) -> Path:
    path = folder / "flags.toml"
    path.write_text(text)
    return path


def test_flags_in_a_file_mean_what_typed_flags_mean(tmp_path: Path) -> None:
    model, trace = config_file(tmp_path), trace_file(tmp_path)
    typed = ("plan", "placement", trace, "--model", model, "--system", "h200x4", "--json")
    flags = _file(tmp_path, '[plan.placement]\nslots = 12\ntokens-per-rank = 8\nsend = "node"\n')
    by_file = moesim("--config", flags, *typed).json()
    by_hand = moesim(*typed, "--slots", 12, "--tokens-per-rank", 8, "--send", "node").json()
    assert by_file["inputs"] == by_hand["inputs"]
    assert by_file["step_time_s"] == by_hand["step_time_s"]
    other = moesim("--config", flags, *typed, "--slots", 16).json()
    assert other["inputs"]["slots"] == 16
    assert other["inputs"]["tokens_per_rank"] == 8


def test_an_unknown_key_fails_by_its_name(tmp_path: Path) -> None:
    flags = _file(tmp_path, "[plan.placement]\nslot = 12\n")
    refused(moesim("--config", flags, "catalog", "models"), "flags.toml", "plan.placement.slot")
    flags = _file(tmp_path, "[plans]\nslots = 12\n")
    refused(moesim("--config", flags, "catalog", "models"), "plans", "catalog")


def test_a_file_that_is_not_toml_fails_by_its_name(tmp_path: Path) -> None:
    refused(moesim("--config", _file(tmp_path, "slots: 12"), "catalog", "models"), "not a TOML")
    refused(moesim("--config", tmp_path / "none.toml", "catalog", "models"), "none.toml")
