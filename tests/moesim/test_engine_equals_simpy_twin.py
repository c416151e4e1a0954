"""The compiled engine against its specification in SimPy.

Long programs that keep several shared pools full without a pause are chaotic: in the benchmark's
case a change of one size by 1e-14 grows a thousandfold with every thousand tasks, so no two
implementations agree on them to 1e-9. The long programs here have gaps and waits, as real ones.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from moesim.engine import run
from moesim.program import Program
from tests.oracles.engine_simpy import simulate
from tests.oracles.random_programs import programs, random_program


def assert_equal_timelines(program: Program) -> None:
    fast, plain = run(program), simulate(program)
    np.testing.assert_allclose(fast.start_s, plain.start_s, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fast.end_s, plain.end_s, rtol=1e-9, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(programs())
def test_engine_and_twin_agree_on_any_small_program(program: Program) -> None:
    assert_equal_timelines(program)


@pytest.mark.parametrize("seed", range(4))
def test_engine_and_twin_agree_on_a_long_program_with_many_streams(seed: int) -> None:
    rng = np.random.default_rng(seed)
    program = random_program(rng, n_tasks=1500, n_streams=12, n_pools=5)
    assert_equal_timelines(program)
