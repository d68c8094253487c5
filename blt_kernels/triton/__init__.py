"""Kernels of block_causal_attention on CUDA, in Triton. Triton is imported when an op runs there for the first time."""
