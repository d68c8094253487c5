"""These kernels compute block_causal_attention on CUDA. Triton is imported when the op first runs there."""
