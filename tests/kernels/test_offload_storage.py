"""Experts in a file: written once, found again, and the same bytes from every tier."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from moesim_kernels.errors import KernelError  # noqa: E402
from moesim_kernels.offload import memory, stack, storage  # noqa: E402
from moesim_kernels.offload.stack import StackSpec, expert_weights, open_stack  # noqa: E402

TINY = StackSpec(n_layers=2, n_experts=3, top_k=2, hidden=32, intermediate=24, dense=40)
EVERY = [(layer, expert) for layer in range(2) for expert in range(3)]
Tier = Callable[[stack.Stack, int], storage.Tier]


def stand_in_for_pinned(of: stack.Stack, n_slots: int) -> storage.Tier:
    return storage.PinnedTier(of, n_slots, torch.device("cpu"))


TIERS: dict[str, Tier] = {
    kind: lambda of, n_slots, kind=kind: storage.open_tier(of, n_slots, kind)
    for kind in ("auto", "buffered", "mapped")
} | {"pinned (stand-in)": stand_in_for_pinned}


@pytest.mark.parametrize("dtype", stack.DTYPES)
@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_every_tier_brings_the_weights_that_follow_from_the_seed(
    tmp_path: Path, tier: Tier, dtype: str
) -> None:
    spec = replace(TINY, dtype=dtype)
    with open_stack(spec, tmp_path) as held:
        slots = tier(held, 2)
        for slot, (layer, expert) in enumerate(EVERY):
            slots.read(layer, expert, slot % 2)
            expected = spec.expert(expert_weights(spec, layer, expert))
            for found, wanted in zip(slots.weights[slot % 2], expected, strict=True):
                assert torch.equal(found, wanted)
                assert found.shape == wanted.shape
        slots.close()


def test_experts_differ_and_lie_in_whole_pages() -> None:
    weights = [expert_weights(TINY, *at) for at in EVERY]
    assert len({tuple(flat[:8].tolist()) for flat in weights}) == len(EVERY)
    assert TINY.expert_bytes == 12288  # 3 x 32 x 24 x 4 = 9216 bytes, rounded up to pages
    offsets = [TINY.offset(*at) for at in EVERY]
    assert offsets == [12288 * i for i in range(6)]
    assert TINY.file_bytes == 12288 * 6


def test_a_stack_that_is_not_kept_leaves_nothing_behind(tmp_path: Path) -> None:
    with open_stack(TINY, tmp_path) as held:
        assert list(tmp_path.iterdir()) == []
        assert held.load(1, 2)[0].shape == (48, 32)


def test_a_kept_stack_is_found_again_and_another_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    with open_stack(TINY, tmp_path, keep=True) as first:
        assert not first.reused
        assert first.path is not None
    with open_stack(TINY, tmp_path) as again:
        assert again.reused
        assert again.path == first.path
    with open_stack(replace(TINY, seed=1), tmp_path) as other:
        assert not other.reused
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".json"}


def _flip_a_byte(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[100] ^= 1
    path.write_bytes(held)


SPOILT: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: os.truncate(path, 12288),
    "a byte of the first expert changed": _flip_a_byte,
    "facts missing": lambda path: path.with_suffix(".json").unlink(),
    "facts of another": lambda path: path.with_suffix(".json").write_text('{"format": 0}'),
    "facts that are no JSON": lambda path: path.with_suffix(".json").write_text("{"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_kept_file_that_is_not_this_stack_is_written_again(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    with open_stack(TINY, tmp_path, keep=True) as first:
        path = first.path
    assert path is not None
    spoil(path)
    with open_stack(TINY, tmp_path, keep=True) as again:
        assert not again.reused
        assert torch.equal(again.load(0, 0)[0], TINY.expert(expert_weights(TINY, 0, 0))[0])
    with open_stack(TINY, tmp_path, keep=True) as third:
        assert third.reused


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = stack.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stack.shutil, "disk_usage", lambda path: usage._replace(free=73_728))
    with pytest.raises(KernelError, match="73728 bytes of experts, 73728 bytes free"):
        open_stack(TINY, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KernelError, match="no such folder"):
        open_stack(TINY, tmp_path / "missing")


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(stack.os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        open_stack(TINY, tmp_path, keep=True)
    assert list(tmp_path.iterdir()) == []


def test_slots_that_do_not_fit_into_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 50_000)
    with open_stack(TINY, tmp_path) as held:
        storage.open_tier(held, 4)
        with pytest.raises(KernelError, match="5 slots: 61440 bytes, 50000 bytes of memory"):
            storage.open_tier(held, 5)
        for kind in ("mapped", "pinned"):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            with pytest.raises(KernelError, match="all experts.*: .* bytes of memory are free"):
                storage.open_tier(held, 1, kind)


def test_free_memory_is_read_from_the_system(tmp_path: Path) -> None:
    facts = tmp_path / "meminfo"
    facts.write_text("MemTotal: 9 kB\nMemAvailable:      7 kB\n")
    assert memory.available_bytes(facts) == 7 * 1024
    assert memory.available_bytes(tmp_path / "missing") > 1 << 20


def test_a_file_system_that_refuses_direct_reads_is_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_open = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_open(path, flags, *rest)

    monkeypatch.setattr(stack.os, "open", refuse)
    with open_stack(TINY, tmp_path) as held:
        assert storage.open_tier(held, 1).kind == "buffered"
        with pytest.raises(KernelError, match="the file system refuses O_DIRECT"):
            storage.open_tier(held, 1, "direct")


def test_a_file_system_that_opens_and_then_refuses_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, buffers: object, place: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with open_stack(TINY, tmp_path) as held:
        monkeypatch.setattr(storage.os, "preadv", refuse)
        assert storage.open_tier(held, 1).kind == "buffered"


def test_what_was_read_through_the_page_cache_is_dropped_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[tuple[int, int]] = []

    def note(descriptor: int, place: int, n_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        dropped.append((place, n_bytes))

    monkeypatch.setattr(storage.os, "posix_fadvise", note)
    with open_stack(TINY, tmp_path) as held:
        storage.open_tier(held, 1, "buffered").read(1, 0, 0)
    assert dropped == [(0, 0), (3 * 12288, 12288)]


def test_a_tier_that_is_not_here_is_refused_in_words(tmp_path: Path) -> None:
    with open_stack(TINY, tmp_path) as held:
        with pytest.raises(KernelError, match="tier='tape', expected one of auto, direct"):
            storage.open_tier(held, 1, "tape")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU: its tier would be made")
        with pytest.raises(KernelError, match="'pinned' needs a GPU"):
            storage.open_tier(held, 1, "pinned")


def test_a_file_that_ends_too_early_is_an_error_not_old_weights(tmp_path: Path) -> None:
    with open_stack(TINY, tmp_path, keep=True) as held:
        tier = storage.open_tier(held, 1, "buffered")
        assert held.path is not None
        os.truncate(held.path, TINY.file_bytes - 4096)
        with pytest.raises(OSError, match="ends 4096 bytes too early"):
            tier.read(1, 2, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": 0}, "hidden=0, expected at least 1"),
        ({"top_k": 4}, "top_k=4 is above n_experts=3"),
        ({"dtype": "int8"}, "dtype='int8', expected one of float32, bfloat16"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_sizes_that_make_no_stack_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        replace(TINY, **changed)
