"""What was measured: microbenchmarks on real devices; imported as `moesim_kernels`."""
