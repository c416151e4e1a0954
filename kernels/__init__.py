"""What was measured: Triton kernels with torch references; imported as `moesim_kernels`.

Read `grouped_gemm.py` first (the experts of a layer), then `runner.py` (the benchmarks). Needs
torch, triton and numpy only, and nothing of the other packages.
"""
