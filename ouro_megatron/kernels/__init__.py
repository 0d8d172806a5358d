"""Triton kernels for CUDA. Each has a plain torch equal beside its caller, which the CPU uses and tests compare with."""
