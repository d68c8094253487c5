"""blt_kernels: kernels for byte-latent language models, as torch ops."""

from blt_kernels.layout import PatchLayout
from blt_kernels.ops.entropy_patch import (
    byte_patch,
    delimiter_patch,
    entropy_patch,
    linear_entropy,
    patch_starts,
    space_patch,
    static_patch,
    token_entropy,
    topk_patch,
)
