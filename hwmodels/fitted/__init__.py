"""Operators priced as they were measured: a physical formula with fitted constants, then trees.

Read `model.py` first: an OperatorModel turns work on a device into seconds. `parts.py` says what a
family of operators must tell of its work; each family is a file of its own (`gemm.py`,
`experts.py`, `attention.py`, `latent_attention.py`, `collectives.py`). `formula.py` and
`trees.py` are the two stages of the fit, `tables.py` reads measured tables, `store.py` keeps
what was fitted.
"""
