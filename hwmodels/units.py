"""Text with a unit to a number in SI units and back; the only place where units are read.

`GB` is 10**9 bytes, `GiB` is 2**30, `Gb` and `Gbit` are bits. A number without a unit is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from hwmodels.errors import HardwareError

_DECIMAL: Mapping[str, int] = MappingProxyType(
    {"f": -15, "p": -12, "n": -9, "u": -6, "µ": -6, "μ": -6, "m": -3, "": 0}
    | {"k": 3, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
)
_BINARY: Mapping[str, int] = MappingProxyType({"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50})
# Unit to (dimension, size in that dimension's own unit); integer operations count as FLOP.
_ATOMS: Mapping[str, tuple[str, Fraction]] = MappingProxyType(
    {
        "B": ("B", Fraction(1)),
        "b": ("B", Fraction(1, 8)),
        "bit": ("B", Fraction(1, 8)),
        "s": ("s", Fraction(1)),
        "h": ("s", Fraction(3600)),
        "FLOP": ("FLOP", Fraction(1)),
        "OP": ("FLOP", Fraction(1)),
        "J": ("J", Fraction(1)),
        "W": ("W", Fraction(1)),
        "USD": ("USD", Fraction(1)),
        "Hz": ("Hz", Fraction(1)),
        "SM": ("SM", Fraction(1)),  # streaming multiprocessors, compute units
    }
)
_PER_SECOND: Mapping[str, str] = MappingProxyType(
    {"FLOPS": "FLOP", "OPS": "OP", "bps": "b"}  # FLOPS is FLOP/s
)
_TEXT = re.compile(r"\s*(?P<number>\d{1,20}(\.\d{1,20})?(e[+-]?\d{1,2})?)\s*(?P<unit>\S*)\s*", re.A)
_LARGEST_TEXT = 80


def parse(text: str, unit: str) -> float:
    """The quantity in text, as a multiple of unit: parse("3.2 TB/s", "B/s") is 3.2e12.

    text    a number >= 0 and a unit of the same dimension: "80 GiB", "1.3 us", "989 TFLOPS",
            "1.3 pJ/bit", "3.99 USD/h"; the result is the nearest float, without rounding between
    unit    what to measure in, usually SI: "B", "B/s", "s", "FLOP/s", "W", "J/B", "USD/h"
    raises  HardwareError for a bare number, an unknown unit or another dimension
    """
    match = _TEXT.fullmatch(text) if len(text) <= _LARGEST_TEXT else None
    if match is None:
        raise HardwareError(f"{_shown(text)} is not a number >= 0 with a unit, expected {unit}")
    if not match["unit"]:
        raise HardwareError(f"{_shown(text)} has no unit, expected {unit}")
    dimension, size = _dimension(match["unit"], text)
    wanted, wanted_size = _dimension(unit, unit)
    if dimension != wanted:
        raise HardwareError(f"{_shown(text)} is in {match['unit']}, expected {unit}")
    return float(Fraction(match["number"]) * size / wanted_size)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LARGEST_TEXT else text[:_LARGEST_TEXT] + "...")


def _dimension(unit: str, text: str) -> tuple[str, Fraction]:
    """(dimension as "numerator/denominator", size)."""
    for suffix, atom in _PER_SECOND.items():
        if unit.endswith(suffix):
            unit = unit.removesuffix(suffix) + atom + "/s"
    parts = unit.split("/")
    if len(parts) > 2:
        raise HardwareError(f"{_shown(text)}: unit {unit!r} is not known")
    top, size = _atom(parts[0], text)
    if len(parts) == 1:
        return top, size
    bottom, divisor = _atom(parts[1], text)
    return f"{top}/{bottom}", size / divisor


def _atom(word: str, text: str) -> tuple[str, Fraction]:
    for atom, (dimension, size) in _ATOMS.items():
        if not word.endswith(atom):
            continue
        prefix = word.removesuffix(atom)
        if prefix in _DECIMAL:
            return dimension, size * Fraction(10) ** _DECIMAL[prefix]
        if prefix in _BINARY and dimension == "B":
            return dimension, size * 2 ** _BINARY[prefix]
    raise HardwareError(f"{_shown(text)}: unit {word!r} is not known")


_PREFIXES = MappingProxyType(
    {exponent: prefix for prefix, exponent in _DECIMAL.items() if prefix not in ("K", "µ", "μ")}
)


def format_quantity(value: float, unit: str, digits: int = 3) -> str:
    """Value with a decimal prefix, for people: format_quantity(3.35e12, "B/s") is "3.35 TB/s".

    unit    SI unit without a prefix; prices ("USD/h") never get one
    digits  significant digits, at least 3; trailing zeros are dropped
    """
    rounded = float(f"{value:.{digits}g}")
    exponent = 0
    if rounded and not unit.startswith("USD"):
        exponent = 3 * math.floor(math.log10(abs(rounded)) / 3 + 1e-12)
        exponent = max(min(_PREFIXES), min(max(_PREFIXES), exponent))
    return f"{rounded / 10.0**exponent:.{digits}g} {_PREFIXES[exponent]}{unit}"
