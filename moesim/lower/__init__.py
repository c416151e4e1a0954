"""A step of work, lowered to a Program for the engine.

Read `layer_costs.py` (what the parts of a step cost), then `expert_parallel.py`.
"""
