"""The package has kernels for byte-latent language models (BLT, MegaByte), as torch ops.

Every name below is a function on tensors, apart from `PatchLayout`, the ragged layout that they share,
`AttentionRanges`, which layers share, `to_ids` and `to_bytes`, which convert text, and `set_attention_backend` and
`attention_backend`, which choose the kernels of attention on CUDA.
The models are in `blt_kernels.models`, the layers in `blt_kernels.nn`, optimizers for large tables in
`blt_kernels.optim`, helpers for tests in `blt_kernels.testing`. `blt_kernels.integrations` puts the ops under the
models of other code bases.
"""

from blt_kernels import _extension, optim
from blt_kernels._version import __version__ as __version__
from blt_kernels.ids import to_bytes as to_bytes
from blt_kernels.ids import to_ids as to_ids
from blt_kernels.layout import AttentionRanges as AttentionRanges
from blt_kernels.layout import PatchLayout as PatchLayout
from blt_kernels.ops._attention_backend import attention_backend as attention_backend
from blt_kernels.ops._attention_backend import set_attention_backend as set_attention_backend
from blt_kernels.ops.block_causal_attention import attention_ranges as attention_ranges
from blt_kernels.ops.block_causal_attention import block_causal_attention as block_causal_attention
from blt_kernels.ops.boundary_patch import boundary_patch as boundary_patch
from blt_kernels.ops.ema_scan import ema_scan as ema_scan
from blt_kernels.ops.entropy_patch import byte_patch as byte_patch
from blt_kernels.ops.entropy_patch import delimiter_patch as delimiter_patch
from blt_kernels.ops.entropy_patch import entropy_patch as entropy_patch
from blt_kernels.ops.entropy_patch import patch_starts as patch_starts
from blt_kernels.ops.entropy_patch import space_patch as space_patch
from blt_kernels.ops.entropy_patch import static_patch as static_patch
from blt_kernels.ops.entropy_patch import topk_patch as topk_patch
from blt_kernels.ops.few_row_layer import few_row_layer as few_row_layer
from blt_kernels.ops.few_row_linear import few_row_linear as few_row_linear
from blt_kernels.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from blt_kernels.ops.ngram_hash_embed import ngram_hash as ngram_hash
from blt_kernels.ops.ngram_hash_embed import ngram_hash_embed as ngram_hash_embed
from blt_kernels.ops.patch_cross_attention import patch_cross_attention as patch_cross_attention
from blt_kernels.ops.patch_pool import patch_pool as patch_pool
from blt_kernels.ops.patch_unpool import patch_unpool as patch_unpool
from blt_kernels.ops.token_entropy import linear_entropy as linear_entropy
from blt_kernels.ops.token_entropy import token_entropy as token_entropy

_extension.load_cpu()
_extension.load_cuda()

# An op is public by the line that imports it: every function and class here is.
__all__ = ["__version__", "optim", *(name for name, value in vars().items() if callable(value) and name[0] != "_")]
