"""The catalogue of devices and links: every file loads, every figure has a unit and a source."""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from hwmodels.catalog_files import CATALOG, DeviceFile, LinkFile, figures, read_file
from hwmodels.device import Figure
from hwmodels.devices import (
    ASSUMED_CPU_LAUNCH,
    ASSUMED_LAUNCH,
    About,
    about_device,
    achievable_share,
    device_names,
    link_names,
    load_component,
    load_device,
    load_link,
)
from hwmodels.errors import HardwareError

DEVICES, LINKS = device_names(), link_names()
FILES = sorted(CATALOG.glob("*/*.toml"))


def test_no_name_is_shared_by_two_files() -> None:
    assert len(DEVICES) == len(list((CATALOG / "devices").glob("*.toml")))
    assert len(LINKS) == len(list((CATALOG / "links").glob("*.toml")))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_is_named_in_lower_case_with_hyphens_and_says_where_its_figures_are_from(
    path: Path,
) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", path.stem)
    for figure in tables_with_a_value(tomllib.loads(path.read_text())):
        assert set(figure) <= {"value", "kind", "source", "when"}
        assert re.fullmatch(r"[0-9.]+ [A-Za-z/]+", str(figure["value"]))
        assert figure["kind"] in {"datasheet", "measured", "derived", "assumed"}
        assert len(str(figure["source"])) > 2
        assert figure["kind"] != "measured" or figure["when"]


def tables_with_a_value(table: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    if "value" in table:
        yield table
    for value in table.values():
        if isinstance(value, dict):
            yield from tables_with_a_value(value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_quantity_is_a_bare_number(path: Path) -> None:
    counts = {"year", "devices", "devices_per_node", "n_devices", "sockets"}
    assert set(bare_numbers(tomllib.loads(path.read_text()))) <= counts


def bare_numbers(table: Mapping[str, object]) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from bare_numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_is_found_under_each_of_its_names_and_its_links_exist(name: str) -> None:
    device = load_device(name)
    for alias in (name, *device.aliases):
        assert load_device(alias.upper()) == device
    for link in {device.link, device.host_link, device.scale_out} - {""}:
        assert load_link(link).bytes_per_s > 0
    assert device.launch_s > 0
    assert device.figures is not None
    assert device.figures["memory.bandwidth"].value == device.memory_bytes_per_s
    known = {key.removeprefix("compute.") for key in device.figures if key.startswith("compute.")}
    assert known == set(device.flop_per_s)


@pytest.mark.parametrize("name", DEVICES)
def test_wider_types_are_never_faster(name: str) -> None:
    peaks = load_device(name).flop_per_s
    for narrow, wide in (("fp4", "fp8"), ("fp8", "bf16"), ("bf16", "tf32"), ("tf32", "fp32")):
        if narrow in peaks and wide in peaks:
            assert peaks[narrow] >= peaks[wide]


@pytest.mark.parametrize("name", LINKS)
def test_what_is_achievable_is_at_most_what_is_nominal(name: str) -> None:
    component = load_component(name)
    assert component.figures
    for alias in (name, *component.aliases):
        assert load_component(alias.upper()) == component
    assert 0 < achievable_share(name) <= 1
    if "bandwidth.theoretical" in component.figures:
        assert load_link(name).latency_s > 0
        return
    with pytest.raises(HardwareError, match="has no bandwidth"):
        load_link(name)


def test_launch_periods_are_measured_derived_or_marked_as_assumed() -> None:
    def figure(name: str) -> Figure:
        return (load_device(name).figures or {})["launch.graph"]

    assert (figure("h200").value, figure("h200").kind) == (1.29e-6, "measured")
    assert (figure("h800").value, figure("h800").kind) == (1.29e-6, "derived")
    assert figure("b200") == ASSUMED_LAUNCH
    assert figure("epyc-9654") == ASSUMED_CPU_LAUNCH
    for name in ("a100-80gb", "a40", "l40", "h200"):
        row = load_component(f"kernel-period-{name}").figures
        device = load_device(name).figures or {}
        assert device["launch.graph"].value == row["latency.graph"].value
        assert device["launch.stream"].value == row["latency.stream"].value


def table(shared: Path, name: str) -> list[dict[str, str]]:
    with (shared / "handbook" / name).open(newline="") as file:
        return list(csv.DictReader(file))


RATES = {
    "memory.bandwidth": ("mem_GBps", 1e9),
    "compute.fp32": ("tflops_fp32", 1e12),
    "compute.tf32": ("tf32", 1e12),
    "compute.bf16": ("bf16", 1e12),
    "compute.fp16": ("fp16", 1e12),
    "compute.fp8": ("fp8", 1e12),
    "compute.int8": ("int8", 1e12),
    "link.bandwidth": ("link_GBps_per_dir", 1e9),
    "host_link.bandwidth": ("host_link_GBps", 1e9),
    "power.tdp": ("tdp_W", 1),
    "price.rental": ("usd_per_hour", 1),
}


def same(figure: Figure | None, text: str, scale: float) -> bool:
    """The figure and the table's cell agree; none and an empty or zero cell do too."""
    if figure is None:
        return text in ("", "0")
    return text != "" and figure.value == pytest.approx(float(text) * scale, rel=1e-12)


def test_every_device_of_the_table_is_in_the_catalogue_with_its_figures(shared: Path) -> None:
    rows = table(shared, "hardware.csv")
    assert len(rows) == 70
    assert len({load_device(row["name"]).name for row in rows}) == 70
    for row in rows:
        device = load_device(row["name"])
        known = device.figures or {}
        assert (device.kind, device.vendor) == (row["kind"], row["vendor"])
        about = about_device(row["name"])
        assert (about.year, about.confidence) == (int(row["year"]), row["confidence"])
        for key, (column, scale) in RATES.items():
            assert same(known.get(key), row[column], scale), (device.name, key)
        four_bits = known.get("compute.fp4") or known.get("compute.int4")
        assert same(four_bits, row["fp4_or_int4"], 1e12), device.name
        if row["mem_GiB"]:
            assert same(known["memory.capacity"], row["mem_GiB"], 2**30)
        else:
            assert device.kind == "cpu"
            assert known["memory.capacity"].kind == "assumed"


COMPONENT_COLUMNS = {
    "bandwidth.theoretical": ("GBps_per_dir_theoretical", 1e9),
    "bandwidth.achievable": ("GBps_achievable", 1e9),
    "energy.transfer": ("energy_pJ_per_bit", 8e-12),
    "capacity.typical": ("capacity_GB", 1e9),
}


def test_every_link_of_the_table_is_in_the_catalogue_with_its_figures(shared: Path) -> None:
    rows = table(shared, "links_memories.csv")
    assert len(rows) == 53
    assert len({load_component(row["name"]).name for row in rows}) == 53
    for row in rows:
        component = load_component(row["name"])
        known = component.figures
        assert (component.kind, component.confidence) == (row["kind"], row["confidence"])
        for key, (column, scale) in COMPONENT_COLUMNS.items():
            if row[column] or not (key == "energy.transfer" and component.name.startswith("pcie-")):
                assert same(known.get(key), row[column], scale), (component.name, key)
        latencies = [float(part) * 1e-6 for part in re.findall(r"[\d.]+", row["latency_us"])]
        ours = [figure.value for key, figure in known.items() if key.startswith("latency.")]
        assert sorted(ours) == pytest.approx(sorted(latencies))


def test_sources_of_the_table_are_kept(shared: Path) -> None:
    for row in table(shared, "hardware.csv"):
        if "aiconfigurator" in row["source"]:
            known = load_device(row["name"]).figures or {}
            assert any("aiconfigurator" in figure.source for figure in known.values()), row["name"]


def test_an_unknown_device_or_link_is_refused_with_the_close_names() -> None:
    with pytest.raises(HardwareError, match=r"device 'h1000' .*close: .*h100"):
        load_device("h1000")
    with pytest.raises(HardwareError, match=r"link 'nvlink-40' .*close: nvlink-4"):
        load_link("nvlink-40")
    with pytest.raises(HardwareError, match="names are known") as caught:
        load_device("\N{SNOWMAN}" * 5000)
    assert len(str(caught.value)) < 300


def test_notes_are_one_line() -> None:
    assert "one NVLink domain" in about_device("gb200").note
    assert "\n" not in about_device("cloudmatrix384").note
    assert about_device("NVIDIA H200") == About(2024, "high", "")


GOOD = """
name = "small"
kind = "gpu"
vendor = "Nobody"
year = 2030
confidence = "low"

[memory.capacity]
value = "1 GiB"
kind = "assumed"
source = "a test"

[memory.bandwidth]
value = "10 GB/s"
kind = "measured"
source = "a test"
when = "always"

[compute.bf16]
value = "1 TFLOPS"
kind = "assumed"
source = "a test"
"""


def written(tmp_path: Path, old: str = "", new: str = "") -> Path:
    path = tmp_path / "small.toml"
    path.write_text(GOOD.replace(old, new) if old else GOOD)
    return path


def test_a_device_of_ones_own_is_read_from_its_file(tmp_path: Path) -> None:
    device = load_device(str(written(tmp_path)))
    assert (device.name, device.memory_bytes, device.memory_bytes_per_s) == ("small", 2**30, 10e9)
    assert device.link == ""
    assert (device.link_bytes_per_s, device.tdp_w, device.usd_per_hour) == (0, 0, 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"10 GB/s"', "10", r"memory\.bandwidth\.value=10: .*string"),
        ('"10 GB/s"', '"10"', r"memory\.bandwidth: '10' has no unit"),
        ('"10 GB/s"', '"10 GB"', r"memory\.bandwidth: '10 GB' is in GB, expected B/s"),
        ('when = "always"', "", "a measured figure needs `when`"),
        ('"measured"', '"guessed"', r"memory\.bandwidth\.kind='guessed'"),
        ("[compute.bf16]", "[compute.bf17]", "bf17"),
        ("[memory.capacity]", "[memory.capacities]", "capacities"),
        ("[memory.capacity]", "[memory.usable]", "memory.capacity is missing"),
        ('vendor = "Nobody"', 'vender = "Nobody"', "vend"),
        ('name = "small"', 'name = "other"', "expected the file's name 'small'"),
        ("year = 2030", "year =", "small.toml"),
        ("1 GiB", "0 GiB", "memory_bytes=0 must be > 0"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(HardwareError, match=message) as caught:
        load_device(str(written(tmp_path, old, new)))
    assert "\n" not in str(caught.value)


def test_files_are_read_as_their_own_kind_only(tmp_path: Path) -> None:
    path = CATALOG / "links" / "nvlink-4.toml"
    assert "bandwidth.theoretical" in figures(read_file(path, LinkFile), "nvlink-4")
    with pytest.raises(HardwareError, match=r"nvlink-4\.toml"):
        read_file(path, DeviceFile)
    with pytest.raises(HardwareError, match=r"absent\.toml"):
        read_file(tmp_path / "absent.toml", DeviceFile)
