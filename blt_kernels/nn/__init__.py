"""`ByteLM`, `BLT` and `MegaByte` are composed of these layers and functions over the ops."""

from blt_kernels.nn.config import TransformerConfig as TransformerConfig
from blt_kernels.nn.few_rows import run_layers as run_layers
from blt_kernels.nn.functional import embed_ids as embed_ids
from blt_kernels.nn.functional import known_ids as known_ids
from blt_kernels.nn.functional import load_ops as load_ops
from blt_kernels.nn.functional import next_byte_bits as next_byte_bits
from blt_kernels.nn.functional import next_byte_targets as next_byte_targets
from blt_kernels.nn.layers import CrossAttention as CrossAttention
from blt_kernels.nn.layers import FeedForward as FeedForward
from blt_kernels.nn.layers import SelfAttention as SelfAttention
from blt_kernels.nn.layers import TransformerLayer as TransformerLayer
from blt_kernels.nn.matrices import QuantizedLinear as QuantizedLinear
from blt_kernels.nn.matrices import RMSNorm as RMSNorm
from blt_kernels.nn.matrices import embedding as embedding
from blt_kernels.nn.matrices import init_normal as init_normal
from blt_kernels.nn.matrices import linear as linear
from blt_kernels.nn.positions import attention_documents as attention_documents
from blt_kernels.nn.positions import layer_ranges as layer_ranges
from blt_kernels.nn.positions import rotary_table as rotary_table
from blt_kernels.nn.positions import rotate as rotate
from blt_kernels.nn.positions import row_positions as row_positions

# Every class and function here is public by the line that imports it.
__all__ = [name for name, value in vars().items() if callable(value) and name[0] != "_"]
