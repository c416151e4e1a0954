"""What to decide: which rank holds which expert, with how many replicas, and a bound on the rest.

Read `plan.py` first (the neutral plan), then `placement.py`; engine files are in `export/`.
"""
