"""What it runs on: devices, memories, links, and what an operation costs there.

Read `device.py` and `system.py` first, then `cost.py`; the figures are in `catalog/`.
"""
