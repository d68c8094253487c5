"""Kernels in Triton, by op, and what they share."""
