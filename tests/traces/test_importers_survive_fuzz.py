"""Whatever is done to a file, an importer gives a sound trace or one clear line; nothing else.

Damage comes in three kinds: bytes (cut short, flipped, overwritten, appended to), content (a key
gone, a value of another type, sign, shape or size) and lies (declared sizes that are not there).
"""

from __future__ import annotations

import io
import json
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.traces.format_files import (
    COUNT_WRITERS,
    MOE_LAYERS,
    TRACE_WRITERS,
    choices,
    model,
    preplay_records,
    slots_map,
    write_npz,
)
from traces.errors import TraceError
from traces.formats import load
from traces.formats.detect import READERS, ImportOptions, read_any
from traces.requests import RequestTrace, read_requests
from traces.routing import ExpertCounts, RoutingTrace
from traces.validate import validate

WRITERS: dict[str, Callable[[Path], Path]] = {**TRACE_WRITERS, **COUNT_WRITERS}
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
OPTIONS = (
    ImportOptions(model=model()),
    ImportOptions(n_experts=16),
    ImportOptions(),
    ImportOptions(layers=(0, 2, 4, 6)),
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One valid file (or folder) of each kind."""
    return {name: write(tmp_path_factory.mktemp("file")) for name, write in WRITERS.items()}


def survives(path: Path, options: ImportOptions) -> RoutingTrace | ExpertCounts | str:
    """Reads a file as a user would; fails on anything but a sound result or one clear line."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result: Any = read_any(path, options)
    except TraceError as error:
        result = str(error)
        assert path.name in result
        assert len(result.splitlines()) == 1
        assert "Traceback" not in result
    else:
        assert isinstance(result, (RoutingTrace, ExpertCounts))
        if isinstance(result, RoutingTrace):
            validate(result)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 2**20, f"{grown_kib} KiB more"
    return result


# --- bytes -----------------------------------------------------------------------------------

damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(b"")),
    st.tuples(st.just("write"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("remove"), st.floats(0, 1), st.binary(min_size=1, max_size=64)),
)


def damaged(data: bytes, damage: tuple[str, float, bytes]) -> bytes:
    """The bytes after one piece of damage at a place given as a share of the length."""
    kind, place, new = damage
    at = int(place * len(data))
    rest = {"cut": len(data), "write": at + len(new), "insert": at, "remove": at + len(new)}[kind]
    return data[:at] + (new if kind in ("write", "insert") else b"") + data[rest:]


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_bytes_are_refused_in_one_line_or_read(
    name: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    original = originals[name]

    @FUZZ
    @given(
        st.lists(damages, min_size=1, max_size=3),
        st.sampled_from(OPTIONS),
        st.integers(0, 7),
    )
    @example([("cut", 0.0, b"")], OPTIONS[0], 0)
    def run(damage: list[tuple[str, float, bytes]], options: ImportOptions, which: int) -> None:
        target = tmp_path / original.name
        victim = target
        if original.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(original, target)
            files = sorted(target.iterdir())
            victim = files[which % len(files)]
            data = victim.read_bytes()
        else:
            data = original.read_bytes()
        for piece in damage:
            data = damaged(data, piece)
        victim.write_bytes(data)
        survives(target, options)

    run()


@pytest.mark.parametrize("format_name", READERS)
def test_every_reader_refuses_or_reads_the_files_of_all_others(
    format_name: str, originals: dict[str, Path]
) -> None:
    for path in originals.values():
        survives(path, ImportOptions(format=format_name, model=model()))


@pytest.mark.parametrize("suffix", [".csv", ".pt", ".json", ".npz", ".parquet", ""])
def test_the_suffix_decides_nothing(
    suffix: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    for original in originals.values():
        if original.is_file():
            renamed = tmp_path / f"renamed{suffix}"
            shutil.copy(original, renamed)
            assert not isinstance(survives(renamed, OPTIONS[0]), str)


@pytest.mark.parametrize("format_name", [None, *READERS])
def test_an_empty_file_is_refused_by_every_reader(format_name: str | None, tmp_path: Path) -> None:
    path = tmp_path / "empty.bin"
    path.touch()
    assert isinstance(survives(path, ImportOptions(format=format_name, model=model())), str)


@pytest.mark.parametrize("format_name", [None, *READERS])
def test_an_empty_folder_is_refused_by_every_reader(
    format_name: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    assert isinstance(survives(path, ImportOptions(format=format_name, model=model())), str)


# --- content ---------------------------------------------------------------------------------

strange = st.sampled_from(
    [
        *(
            None,
            True,
            -1,
            -5,
            0,
            99,
            2**31,
            2**63,
            2**80,
            -(2**70),
            1.5,
            float("nan"),
            float("inf"),
        ),
        *("", "x", "AAAA", "\n", "k\u00e9\u2028", [], {}, [[]], [1, [2]], [[1, 2], [3]], ["a"]),
    ]
)
strange_arrays = st.sampled_from(
    [
        np.zeros((0, 4, 3), np.int16),
        np.zeros((18, 0, 3), np.int16),
        np.zeros((18, 4, 3), np.float32),
        np.full((18, 4, 3), np.nan, np.float16),
        np.full((18, 4, 3), -2, np.int64),
        np.full((18, 4, 3), 2**40, np.int64),
        np.full((18, 4, 3), 2**63, np.uint64),
        np.zeros((18, 4, 3), bool),
        np.zeros((18, 4, 3), np.complex64),
        np.array(["a", "b"]),
        np.array([b"x"]),
        np.int64(7),
        np.arange(18),
        -np.arange(18),
        np.full(18, 1e300),
        np.full((4, 16), -1.0),
        np.full((4, 16), np.inf),
        np.zeros((4, 16)),
        np.zeros(0),
        np.zeros((5, 18), np.int64),
        np.full((5, 18), 40000, np.int64),
    ]
)


def mutate(tree: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """The tree of dicts, lists and values with one value replaced, dropped or doubled."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(tree, key=str)))
        action = draw(st.integers(0, 4))
        rest = {k: v for k, v in tree.items() if k != key}
        if action == 0:
            return rest
        return {**rest, (f"{key}x" if action == 1 else key): mutate(tree[key], draw)}
    if isinstance(tree, list) and tree and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(tree) - 1))
        action = draw(st.integers(0, 4))
        middle = [] if action == 0 else [mutate(tree[at], draw)]
        return tree[:at] + middle + ([tree[at]] if action == 1 else []) + tree[at + 1 :]
    return draw(strange)


@pytest.mark.parametrize(
    "name", ["sglang responses", "vllm responses", "megatron", "preplay", "sglang stat json"]
)
def test_strange_json_values_are_refused_in_one_line_or_read(
    name: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    original = originals[name]
    text = original.read_text()
    lines = original.suffix == ".jsonl"
    content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)

    @FUZZ
    @given(st.data(), st.sampled_from(OPTIONS))
    def run(data: st.DataObject, options: ImportOptions) -> None:
        tree = mutate(content, data.draw)
        target = tmp_path / original.name
        if lines and isinstance(tree, list):
            target.write_text("".join(json.dumps(line) + "\n" for line in tree))
        else:
            target.write_text(json.dumps(tree))
        survives(target, options)

    run()


@pytest.mark.parametrize("name", ["npz", "counts npz", "logits npz"])
def test_strange_arrays_are_refused_in_one_line_or_read(
    name: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    with np.load(originals[name]) as stored:
        arrays = dict(stored)
    names = sorted({*arrays, "pos", "fwd", "weights", "scores", "seq", "phase", "n_experts"})

    @FUZZ
    @given(st.sampled_from(names), strange_arrays, st.booleans(), st.sampled_from(OPTIONS))
    def run(key: str, array: np.ndarray, gone: bool, options: ImportOptions) -> None:
        content = {k: v for k, v in arrays.items() if k != key}
        if not gone:
            content[key] = array
        target = tmp_path / "tiny.npz"
        np.savez(target, **content)
        survives(target, options)

    run()


@pytest.mark.parametrize("name", ["sglang per_token", "sglang stat", "logits pt"])
def test_strange_tensors_are_refused_in_one_line_or_read(
    name: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    content = torch.load(originals[name], weights_only=True)
    tensors = [
        torch.zeros((0, 3)),
        torch.zeros(1).expand(2**20, 2**20),  # four tebibytes on paper, four bytes in the file
        torch.full((5, 18, 8), -7),
        torch.full((5, 18), 2**40),
        torch.full((5, 8, 8), 3, dtype=torch.int32),
        torch.zeros((4, 5, 16), dtype=torch.bool),
        torch.full((4, 5, 16), float("nan")),
        torch.eye(16).to_sparse(),
        torch.zeros((2, 2), dtype=torch.complex64),
        torch.from_numpy(slots_map() + 3),
    ]

    def draw_with(data: st.DataObject) -> Callable[[st.SearchStrategy[Any]], Any]:
        either = st.one_of(strange, st.sampled_from(tensors))
        return lambda strategy: data.draw(either if strategy is strange else strategy)

    @FUZZ
    @given(st.data(), st.sampled_from(OPTIONS))
    def run(data: st.DataObject, options: ImportOptions) -> None:
        target = tmp_path / "strange.pt"
        torch.save(mutate(content, draw_with(data)), target)
        survives(target, options)

    run()


@FUZZ
@given(row=st.integers(0, 70), column=st.integers(0, 5), cell=st.text(max_size=12))
@pytest.mark.parametrize("name", ["csv", "matrix csv"])
def test_strange_cells_are_refused_in_one_line_or_read(
    name: str, row: int, column: int, cell: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    lines = originals[name].read_text().splitlines()
    cells = lines[row % len(lines)].split(",")
    cells[column % len(cells)] = cell
    lines[row % len(lines)] = ",".join(cells)
    target = tmp_path / "counts.csv"
    target.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    survives(target, OPTIONS[1])


@FUZZ
@given(
    value=st.integers(-(2**20), 2**20),
    token=st.integers(0, 17),
    layer=st.sampled_from(MOE_LAYERS),
)
def test_an_id_out_of_range_is_named_with_its_token_and_layer(
    value: int, token: int, layer: int, tmp_path: Path
) -> None:
    ids = choices().astype(np.int32)
    ids[token, layer - 1, 0] = value
    path = tmp_path / "ids.npz"
    np.savez(path, topk=ids, layers=MOE_LAYERS, n_experts=16)
    result = survives(path, ImportOptions())
    if -1 <= value < 16:
        assert isinstance(result, RoutingTrace)
    else:
        assert isinstance(result, str)
        assert f"expert id {value} at token {token}, layer {layer}, expected 0..15" in result


# --- lies ------------------------------------------------------------------------------------


def npy_header(shape: tuple[int, ...], descr: str = "<i2") -> bytes:
    """An npy header that promises an array, without the array."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "shape", [(2**40, 4, 3), (2**62, 2**62, 3), (2**62, 0, 3), (-5, 4, 3), (0,), (10**30,)]
)
def test_a_huge_declared_shape_is_refused_without_allocating(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    in_zip, alone = tmp_path / "huge.npz", tmp_path / "huge.npy"
    with zipfile.ZipFile(in_zip, "w") as archive:
        archive.writestr("topk.npy", npy_header(shape) + b"\0" * 64)
    alone.write_bytes(npy_header(shape) + b"\0" * 64)
    for path in (in_zip, alone):
        assert isinstance(survives(path, OPTIONS[1]), str)


def test_a_zip_member_that_unpacks_to_a_bomb_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "BOMB_BYTES", 2**20)  # a real one takes seconds to write
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, topk=np.zeros((2**18, 4, 3), np.int16))  # 6 MiB of zeros
    text = survives(path, OPTIONS[1])
    assert isinstance(text, str)
    assert "member topk.npy unpacks" in text


def test_a_zip_directory_that_lies_about_sizes_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # the last directory entry; bytes 24..28 are its size
    for size in (0, 2**31, 2**32 - 2):
        data[entry + 24 : entry + 28] = struct.pack("<I", size)
        path.write_bytes(data)
        assert isinstance(survives(path, OPTIONS[0]), str)


def test_a_pickle_inside_an_npz_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "sprung").touch, ())

    path = tmp_path / "pickled.npz"
    np.savez(path, topk=np.array([Trap()], dtype=object))
    text = survives(path, OPTIONS[0])
    assert isinstance(text, str)
    assert "dtype object" in text
    assert not (tmp_path / "sprung").exists()


def test_a_torch_file_with_code_in_it_is_refused_without_running_it(tmp_path: Path) -> None:
    import torch

    class Trap:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "sprung").touch, ())

    path = tmp_path / "expert_distribution_recorder_0.pt"
    torch.save({"logical_count": Trap()}, path)
    assert isinstance(survives(path, OPTIONS[0]), str)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("opening", [b"[" * 100_000, b'{"meta_info":' * 50_000, b"[[" * 10])
def test_deeply_nested_json_is_refused(opening: bytes, tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_bytes(opening)
    assert isinstance(survives(path, OPTIONS[0]), str)
    named = ImportOptions(format="routed-experts", model=model())
    assert isinstance(survives(path, named), str)


def test_a_csv_with_one_enormous_expert_id_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text("layer,expert,count\n0,999999999,1\n")
    assert "expert ids to 999999999" in str(survives(path, ImportOptions()))


# --- requests --------------------------------------------------------------------------------

MOONCAKE = [
    {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]},
    {"timestamp": 40, "input_length": 5, "output_length": 1, "hash_ids": [1]},
]
REQUEST_FILES = {
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.03,3180,8\n",
    "mooncake.jsonl": "".join(json.dumps(line) + "\n" for line in MOONCAKE),
    "vidur.csv": "num_prefill_tokens,num_decode_tokens,pd_ratio\n3772,54,69.8\n2015,156,12.9\n",
}


def requests_survive(path: Path) -> None:
    """Reads a request file; fails on anything but a trace or one clear line."""
    text = f"{path}"
    try:
        assert isinstance(read_requests(path), RequestTrace)
    except TraceError as error:
        text = str(error)
    assert path.name in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("name", REQUEST_FILES)
def test_damaged_request_files_are_refused_in_one_line_or_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name

    @FUZZ
    @given(st.lists(damages, min_size=1, max_size=3))
    @example([("cut", 0.0, b"")])
    def run(damage: list[tuple[str, float, bytes]]) -> None:
        data = REQUEST_FILES[name].encode()
        for piece in damage:
            data = damaged(data, piece)
        path.write_bytes(data)
        requests_survive(path)

    run()


def test_strange_mooncake_values_are_refused_in_one_line_or_read(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"

    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        tree = mutate(MOONCAKE, data.draw)
        lines = tree if isinstance(tree, list) else [tree]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        requests_survive(path)

    run()


def test_the_fixtures_of_this_file_are_valid_to_begin_with(originals: dict[str, Path]) -> None:
    for path in originals.values():
        assert not isinstance(survives(path, OPTIONS[0]), str)
    assert len(preplay_records()) == 22
    assert io.BytesIO(originals["npz"].read_bytes()).read(2) == b"PK"
