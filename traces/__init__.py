"""What runs: model shapes, routing traces, request traces.

Read `routing.py` first (what a captured trace is), then `model.py` (what a model is),
`stats.py` (what a trace says) and `formats/` (where traces come from, one file a format).
"""
