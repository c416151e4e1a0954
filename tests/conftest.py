"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development data beside the checkout; the test skips, visibly, without it."""
    if not (SHARED / "traces").is_dir():
        pytest.skip("needs ../shared (development data), which is not part of the project")
    return SHARED
