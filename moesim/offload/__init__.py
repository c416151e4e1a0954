"""One box, a model larger than its fast memory: where experts are found, moved and computed.

Read `decide.py` first: what happens at every layer of every forward pass, in the order a runtime
issues it. `decide_kernel.py` is the same loop compiled for the built-in policies; `costs.py` prices
the work, `moesim/lower/offload.py` puts decisions and prices on streams and pools, `simulate.py`
runs all of it and measures.
"""
