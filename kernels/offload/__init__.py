"""A small real runtime: an MoE layer stack whose experts live in a slower tier, every step timed.

Read `run.py` first (one token after another through all layers), then `policy.py` (which expert
is read when, and into which slot), `reader.py` (who reads it), `storage.py` (from where), and
`measure.py` (calibrate, run the policies in rounds, hand back what was measured).
"""
