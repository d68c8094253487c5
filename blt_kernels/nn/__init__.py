"""`ByteLM`, `BLT` and `MegaByte` are composed of these layers and functions over the ops."""

from blt_kernels.nn.config import (
    TransformerConfig,
)
from blt_kernels.nn.functional import (
    embed_ids,
    known_ids,
    load_ops,
    next_byte_bits,
    next_byte_targets,
)
from blt_kernels.nn.layers import (
    CrossAttention,
    FeedForward,
    SelfAttention,
    TransformerLayer,
)
from blt_kernels.nn.matrices import (
    QuantizedLinear,
    RMSNorm,
    embedding,
    init_normal,
    linear,
)
from blt_kernels.nn.positions import (
    attention_documents,
    layer_ranges,
    rotary_table,
    rotate,
    row_positions,
)

__all__ = [
    "CrossAttention",
    "FeedForward",
    "QuantizedLinear",
    "RMSNorm",
    "SelfAttention",
    "TransformerConfig",
    "TransformerLayer",
    "attention_documents",
    "embed_ids",
    "embedding",
    "init_normal",
    "known_ids",
    "layer_ranges",
    "linear",
    "load_ops",
    "next_byte_bits",
    "next_byte_targets",
    "rotary_table",
    "rotate",
    "row_positions",
]
