"""Triton kernels for CUDA. Each has a plain torch equal beside its caller: the CPU uses it, tests compare with it."""
