"""Compiled loop of `step_time.py`; its plain form is step_time.moe_parts."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@numba.njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def step_seconds(
    work: tuple[Floats, Floats],
    sent: tuple[Floats, Floats, Floats, Floats],
    constants: Floats,
    out: Floats,
) -> None:
    """Fill out [3, steps, layers] with seconds of dispatch, experts and combine.

    work       copies and distinct slots per rank, [steps, layers, ranks]
    sent       copies over the in-node link (send, receive) and the other one, same shape
    constants  fields of ExpertLaw, AllToAllLaw and bytes per copy, in the order of MoeLaws
    """
    tokens, distinct = work
    up_send, up_recv, out_send, out_recv = sent
    launch, weight, compute, activation = constants[0], constants[1], constants[2], constants[3]
    latency, up_rate, out_rate = constants[4], constants[5], constants[6]
    n_steps, n_layers, n_ranks = tokens.shape
    for step in range(n_steps):
        for layer in range(n_layers):
            longest = 0.0
            up = 0.0
            far = 0.0
            for rank in range(n_ranks):
                copies = tokens[step, layer, rank]
                read = distinct[step, layer, rank] * weight
                busy = max(read, copies * compute) + copies * activation
                busy = launch + busy if copies > 0.0 else 0.0
                longest = max(longest, busy)
                up = max(up, max(up_send[step, layer, rank], up_recv[step, layer, rank]))
                far = max(far, max(out_send[step, layer, rank], out_recv[step, layer, rank]))
            busiest = max(up * up_rate, far * out_rate)
            out[0, step, layer] = latency + busiest * constants[7]
            out[1, step, layer] = longest
            out[2, step, layer] = latency + busiest * constants[8]
