"""blt_kernels: kernels for byte-latent language models (BLT, MegaByte), as torch ops.

Every name below is a function on tensors, apart from `PatchLayout`, the ragged layout that they share,
`AttentionRanges`, which layers share, `to_ids` and `to_bytes`, which convert text, and `set_attention_backend` with
`attention_backend`: who computes attention on CUDA.
The models are in `blt_kernels.models`, the layers in `blt_kernels.nn`, optimizers for large tables in
`blt_kernels.optim`, helpers for tests in `blt_kernels.testing`.
"""

from blt_kernels import _extension, optim
from blt_kernels._version import __version__
from blt_kernels.ids import to_bytes, to_ids
from blt_kernels.layout import AttentionRanges, PatchLayout
from blt_kernels.ops.block_causal_attention import (
    attention_backend,
    attention_ranges,
    block_causal_attention,
    set_attention_backend,
)
from blt_kernels.ops.entropy_patch import (
    byte_patch,
    delimiter_patch,
    entropy_patch,
    patch_starts,
    space_patch,
    static_patch,
    topk_patch,
)
from blt_kernels.ops.ngram_hash_embed import ngram_hash, ngram_hash_embed
from blt_kernels.ops.patch_cross_attention import patch_cross_attention
from blt_kernels.ops.patch_pool import patch_pool
from blt_kernels.ops.patch_unpool import patch_unpool
from blt_kernels.ops.token_entropy import linear_entropy, token_entropy

_extension.load_cpu()
_extension.load_cuda()

__all__ = [
    "AttentionRanges",
    "PatchLayout",
    "__version__",
    "attention_backend",
    "attention_ranges",
    "block_causal_attention",
    "byte_patch",
    "delimiter_patch",
    "entropy_patch",
    "linear_entropy",
    "ngram_hash",
    "ngram_hash_embed",
    "optim",
    "patch_cross_attention",
    "patch_pool",
    "patch_starts",
    "patch_unpool",
    "set_attention_backend",
    "space_patch",
    "static_patch",
    "to_bytes",
    "to_ids",
    "token_entropy",
    "topk_patch",
]
