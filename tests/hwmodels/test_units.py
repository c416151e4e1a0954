"""Units: what is read, what is refused, and that writing and reading agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import HardwareError
from hwmodels.units import format_quantity, parse


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("3.2 TB/s", "B/s", 3.2e12),
        ("80GiB", "B", 80 * 2**30),
        ("80 GB", "B", 80e9),
        ("400 Gb/s", "B/s", 50e9),
        ("400 Gbps", "B/s", 50e9),
        ("64 Gbit", "B", 8e9),
        ("2.73 us", "s", 2.73e-6),
        ("2.73 µs", "s", 2.73e-6),
        ("5 ms", "s", 5e-3),
        ("989 TFLOPS", "FLOP/s", 989e12),
        ("989 TFLOP/s", "FLOP/s", 989e12),
        ("1979 TOPS", "FLOP/s", 1979e12),
        ("3.59 pJ/bit", "J/B", 28.72e-12),
        ("0.32 pJ/FLOP", "J/FLOP", 0.32e-12),
        ("700 W", "W", 700.0),
        ("3.99 USD/h", "USD/h", 3.99),
        ("3600 USD/h", "USD/s", 1.0),
        (" 0 B ", "B", 0.0),
    ],
)
def test_quantities_are_read_to_the_nearest_float(text: str, unit: str, value: float) -> None:
    assert parse(text, unit) == value


@pytest.mark.parametrize(
    ("text", "unit", "message"),
    [
        ("3", "B", "'3' has no unit, expected B"),
        ("3e9", "B/s", "has no unit"),
        ("3 GB", "B/s", "is in GB, expected B/s"),
        ("3 GB/s", "FLOP/s", "is in GB/s, expected FLOP/s"),
        ("3 gb", "B", "unit 'gb' is not known"),
        ("3 XB", "B", "unit 'XB' is not known"),
        ("3 GiW", "W", "unit 'GiW' is not known"),
        ("3 B/s/s", "B/s", "is not known"),
        ("-3 GB", "B", "not a number >= 0"),
        ("nan GB", "B", "not a number >= 0"),
        ("inf GB", "B", "not a number >= 0"),
        ("1e999 GB", "B", "not a number >= 0"),
        ("GB", "B", "not a number >= 0"),
        ("", "B", "not a number >= 0"),
        ("9" * 5000 + " B", "B", "not a number >= 0"),
    ],
)
def test_a_bare_number_or_a_wrong_dimension_is_refused(text: str, unit: str, message: str) -> None:
    with pytest.raises(HardwareError, match=message) as caught:
        parse(text, unit)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.35e12, "B/s", "3.35 TB/s"),
        (1.34e-6, "s", "1.34 us"),
        (999.9e9, "B", "1 TB"),
        (0.001, "s", "1 ms"),
        (0.0, "B", "0 B"),
        (12.29, "USD/h", "12.3 USD/h"),
        (28.72e-12, "J/B", "28.7 pJ/B"),
        (989e12, "FLOP/s", "989 TFLOP/s"),
    ],
)
def test_quantities_are_written_with_the_fitting_prefix(value: float, unit: str, text: str) -> None:
    assert format_quantity(value, unit) == text


@given(
    st.floats(1e-14, 1e20),
    st.sampled_from(["B", "B/s", "s", "FLOP/s", "W", "J/B", "USD/h"]),
)
def test_what_is_written_reads_back(value: float, unit: str) -> None:
    assert parse(format_quantity(value, unit, digits=15), unit) == pytest.approx(value, rel=1e-13)
    assert parse(format_quantity(value, unit), unit) == pytest.approx(value, rel=0.006)


@given(st.text("0123456789.eE+-kKMGTPiBbs/FLOPW ", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    value = 0.0
    try:
        value = parse(text, "B/s")
    except HardwareError as error:
        value = float(len(str(error)) > 0)
    assert value >= 0
