"""The microbenchmarks, one family a file; read `points.py` (what is measured) first."""
