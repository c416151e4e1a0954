"""Systems: named ones, `<device>x<count>`, and which link joins the devices of a node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hwmodels.catalog_files import CATALOG
from hwmodels.devices import achievable_share, device_names, load_device, load_link
from hwmodels.errors import HardwareError
from hwmodels.systems import load_system, scale_up_link, system_names, system_note


@pytest.mark.parametrize("name", system_names())
def test_every_named_system_builds_and_explains_itself(name: str) -> None:
    system = load_system(name)
    assert system.name == name
    assert system.n_nodes * system.devices_per_node == system.n_devices
    assert "Source: " in system_note(name)


def test_every_file_is_a_system() -> None:
    files = {path.stem for path in (CATALOG / "systems").glob("*.toml")}
    assert files == set(system_names())


@pytest.mark.parametrize(
    ("name", "n_devices", "n_nodes"),
    [
        ("h800x32", 32, 4),
        ("h200x8", 8, 1),
        ("h200x64", 64, 8),
        ("h100x2", 2, 1),
        ("gb200x72", 72, 1),
        ("gb200x144", 144, 2),
        ("mi300xx16", 16, 2),
        ("ascend-910cx384", 384, 1),
        ("H100 SXMx8", 8, 1),
        ("a100X8", 8, 1),
        ("h200", 1, 1),
        ("h800-4-nodes", 32, 4),
        ("gb200-nvl72", 72, 1),
        ("cloudmatrix384", 384, 1),
    ],
)
def test_a_count_fills_nodes_of_the_devices_own_size(
    name: str, n_devices: int, n_nodes: int
) -> None:
    system = load_system(name)
    assert (system.n_devices, system.n_nodes) == (n_devices, n_nodes)


@pytest.mark.parametrize("name", device_names())
def test_every_device_makes_a_system_of_one_and_of_a_full_node(name: str) -> None:
    assert load_system(f"{name}x1").n_devices == 1
    per_node = load_device(name).devices_per_node
    assert load_system(f"{name}x{per_node}").n_nodes == 1


def test_a_generic_system_and_its_file_agree_on_devices_and_links() -> None:
    for generic, named in (("h800x32", "h800-4-nodes"), ("h200x8", "dgx-h200"), ("gb200x72",) * 2):
        assert load_system(generic) == replace(load_system(named), name=generic, host=None)


def test_scale_up_is_the_devices_own_rate_times_the_share_its_kind_of_link_reaches() -> None:
    h800, h100 = load_system("h800x8").scale_up, load_system("h100x8").scale_up
    assert h100.bytes_per_s == pytest.approx(370e9)
    assert h800.bytes_per_s == pytest.approx(200e9 * achievable_share("nvlink-4"))
    assert h800.latency_s == load_link("nvlink-4").latency_s


def test_scale_out_is_the_achievable_rate_of_one_adapter() -> None:
    assert load_system("h800x32").scale_out == load_link("infiniband-ndr")
    assert load_system("h800x32").scale_out.bytes_per_s == 48e9
    assert load_system("a100x16").scale_out == load_link("infiniband-hdr")


def test_cards_without_a_link_of_their_own_use_the_host_link() -> None:
    link = load_system("rtx-4090x2").scale_up
    assert link.name == "pcie-4-x16"
    assert link.bytes_per_s == pytest.approx(32e9 * achievable_share("pcie-4-x16"))


def test_a_bridge_joins_two_cards_and_no_more() -> None:
    a40 = load_device("a40")
    assert scale_up_link(a40, 2).name == "nvlink-3"
    assert scale_up_link(a40, 4).name == "pcie-4-x16"


def test_devices_with_one_memory_only_use_the_network() -> None:
    assert load_system("jetson-agx-orinx2").scale_up.name == "ethernet-25g"


def test_the_host_of_two_sockets_has_both_and_the_nodes_memory() -> None:
    host = load_system("rtx-4090-xeon-6454s").host
    socket = load_device("xeon-gold-6454s")
    assert host is not None
    assert host.memory_bytes == 2**40
    assert host.memory_bytes_per_s == 2 * socket.memory_bytes_per_s
    assert host.peak_flop_per_s("bf16") == 2 * socket.peak_flop_per_s("bf16")
    desktop = load_system("rtx-5090-workstation").host
    assert desktop is not None
    assert desktop.memory_bytes_per_s == 89.6e9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h1000x8", r"system 'h1000' is not in the catalogue; close: .*h100"),
        ("dgx-h10", r"close: dgx-h100"),
        ("h100x12", r"n_devices=12 must be a multiple of devices_per_node=8"),
        ("h100x0", r"n_devices=0"),
        ("h100x99999999", r"not in the catalogue"),
        ("h100 x 8", r"not in the catalogue"),
        ("", r"names are known"),
        ("x8", r"names are known"),
        ("absent.toml", r"absent\.toml"),
    ],
)
def test_a_name_that_is_no_system_is_refused(name: str, message: str) -> None:
    with pytest.raises(HardwareError, match=message) as caught:
        load_system(name)
    assert "\n" not in str(caught.value)


def test_a_system_of_ones_own_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nsource = "a test"\ndevice = "h200"\nn_devices = 8\n'
        "devices_per_node = 4\nscale_out = 'roce-400g'\n"
    )
    system = load_system(str(path))
    assert (system.n_nodes, system.scale_out.name, system.host) == (2, "roce-400g", None)
    path.write_text(path.read_text() + "n_gpus = 8\n")
    with pytest.raises(HardwareError, match="n_gpus=8"):
        load_system(str(path))
