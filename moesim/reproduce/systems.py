"""The published systems by name, each a module of this package with a function `claims`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import MappingProxyType

from moesim.errors import SimulationError
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources

SYSTEMS: Mapping[str, str] = MappingProxyType(
    {
        "local-routing-consistency": "local_routing_consistency",
        "expertflow": "expertflow",
        "read-me": "read_me",
        "fate": "fate",
        "pre-gated-moe": "pre_gated_moe",
        "hybrimoe": "hybrimoe",
        "moe-lens": "moe_lens",
        "moe-lightning": "moe_lightning",
        "d2moe": "d2moe",
        "premoe": "premoe",
        "super-experts": "super_experts",
        "duplex": "duplex",
        "sn40l": "sn40l",
        "symbolic-moe": "symbolic_moe",
        "blockffn": "blockffn",
        "fiddler": "fiddler",
        "mixtral-offloading": "mixtral_offloading",
        "moe-infinity": "moe_infinity",
        "ktransformers": "ktransformers",
        "llama-cpp": "llama_cpp",
        "flexgen": "flexgen",
    }
)


def check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names themselves, all known ones for none; SimulationError lists the known ones."""
    for name in names:
        if name not in SYSTEMS:
            raise SimulationError(f"system {name!r} is unknown, known: {', '.join(SYSTEMS)}")
    return names or tuple(SYSTEMS)


def claims_of(name: str, sources: Sources) -> list[Claim]:
    """All claims of one system, simulated now."""
    module = import_module(f"moesim.reproduce.{SYSTEMS[name]}")
    found: list[Claim] = module.claims(sources)
    return found


def paper_of(name: str) -> str:
    """Title and number of the paper that a system was published in."""
    return str(import_module(f"moesim.reproduce.{SYSTEMS[name]}").PAPER)


def all_claims(
    names: tuple[str, ...], sources: Sources, n_workers: int = 1
) -> Iterator[tuple[str, list[Claim]]]:
    """Systems with their claims, in the order given; several at a time with n_workers > 1."""
    if n_workers <= 1 or len(names) == 1:
        for name in names:
            yield name, claims_of(name, sources)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(n_workers, mp_context=get_context("spawn")) as pool:
        running = [(name, pool.submit(claims_of, name, sources)) for name in names]
        for name, claims in running:
            yield name, claims.result()
