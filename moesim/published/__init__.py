"""Published runs of offloading engines, read from a table in words, predicted and scored.

`rows.py` reads (with `words.py`), `predict.py` predicts by the layers of an engine (`engines.py`,
constants fitted by `fit.py`), `scores.py` scores. `streamed_rows.py` does the same for offline runs
that stream all weights.
"""
