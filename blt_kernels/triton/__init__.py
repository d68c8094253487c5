"""Kernels in Triton: block_causal_attention on CUDA. Imported when an op runs there for the first time."""
