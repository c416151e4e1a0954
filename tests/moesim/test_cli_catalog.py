"""`moesim catalog`: every model, system, device and link, with figures and sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwmodels.devices import device_names, link_names, load_device
from hwmodels.systems import load_system, system_names
from tests.moesim.cli_case import config_file, moesim, refused
from traces.models import load_model, model_names

KINDS = {"measured", "datasheet", "derived", "assumed"}


def test_all_models_are_listed_with_what_follows_from_their_shape() -> None:
    documents = moesim("catalog", "models", "--json").json()
    assert [document["name"] for document in documents] == list(model_names())
    by_name = {document["name"]: document for document in documents}
    assert by_name["deepseek-v3"]["total_params"] == pytest.approx(671e9, rel=0.02)
    assert all(document["source"] for document in documents)
    table = moesim("catalog", "models").out
    assert all(f" {name} " in table for name in model_names())


@pytest.mark.parametrize("name", ["mixtral-8x7b", "Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"])
def test_a_model_is_found_by_any_of_its_names(name: str) -> None:
    document = moesim("catalog", "models", name, "--json").json()
    spec = load_model("mixtral-8x7b")
    assert document["name"] == "mixtral-8x7b"
    assert document["moe_layers"] == list(spec.moe_layers)
    assert document["attention"]["n_heads"] == spec.attention.n_heads
    assert "0..31 (32)" in moesim("catalog", "models", name).out


def test_a_config_file_is_shown_as_a_model(tmp_path: Path) -> None:
    document = moesim("catalog", "models", config_file(tmp_path), "--json").json()
    assert (document["n_experts"], document["hidden_size"]) == (8, 64)


def test_everything_of_the_hardware_catalogue_is_listed() -> None:
    document = moesim("catalog", "systems", "--json").json()
    assert [system["name"] for system in document["systems"]] == list(system_names())
    assert [device["name"] for device in document["devices"]] == list(device_names())
    assert [link["name"] for link in document["links"]] == list(link_names())
    text = moesim("catalog", "systems").out
    assert all(f" {name} " in text for name in (*system_names(), *device_names(), *link_names()))


def test_every_figure_has_a_kind_and_a_source() -> None:
    document = moesim("catalog", "systems", "--json").json()
    figures = [
        figure
        for part in (*document["devices"], *document["links"])
        for figure in part["figures"].values()
    ]
    assert len(figures) > 500
    assert all(figure["kind"] in KINDS and figure["source"] for figure in figures)


@pytest.mark.parametrize("name", ["h800x32", "H800 SXM", "gb200-nvl72", "rtx-4090-workstation"])
def test_a_system_or_a_device_alone_is_shown_in_full(name: str) -> None:
    document = moesim("catalog", "systems", name, "--json").json()
    system = load_system(name)
    assert document["n_devices"] == system.n_devices
    assert document["scale_up"]["bytes_per_s"] == system.scale_up.bytes_per_s
    assert document["device"]["memory_bytes"] == system.device.memory_bytes
    shown = moesim("catalog", "systems", name).out
    assert set(document["device"]["figures"]) <= set(shown.split())
    assert system.device.name in shown


def test_a_link_is_shown_by_its_name() -> None:
    document = moesim("catalog", "systems", "nvlink-4", "--json").json()
    assert document["link"]["figures"]["bandwidth.theoretical"]["value"] == 450e9
    assert "450 GB/s" in moesim("catalog", "systems", "nvlink-4").out


def test_unknown_names_are_refused_with_close_ones() -> None:
    refused(moesim("catalog", "models", "mixtrl-8x7b"), "'mixtrl-8x7b'", "mixtral-8x7b")
    refused(moesim("catalog", "systems", "h201"), "'h201'", "h200")
    refused(moesim("catalog", "systems", "h200x9"), "9")


def test_the_roofline_of_a_device_is_drawn_with_a_models_experts(tmp_path: Path) -> None:
    picture = tmp_path / "roof.png"
    ran = moesim("catalog", "systems", "h200x8", "--plot", picture, "--model", "mixtral-8x7b")
    assert ran.code == 0, ran.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused(moesim("catalog", "systems", "--plot", picture), "--plot needs the NAME")
    refused(moesim("catalog", "systems", "h200", "--plot", tmp_path), str(tmp_path))


def test_a_device_without_a_compute_figure_has_no_roofline(tmp_path: Path) -> None:
    bare = [name for name in device_names() if not load_device(name).flop_per_s]
    for name in bare[:1]:
        picture = tmp_path / "roof.png"
        refused(moesim("catalog", "systems", name, "--plot", picture), name, "no compute figure")
        assert not picture.exists()
