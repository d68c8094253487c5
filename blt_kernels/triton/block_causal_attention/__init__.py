"""Kernels of block_causal_attention on CUDA. Triton is imported when the op runs there for the first time."""
