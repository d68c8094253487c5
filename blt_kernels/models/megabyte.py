"""MegaByte (arXiv 2305.07185): a transformer over patches of a fixed size, and one over the bytes of each patch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt_kernels.layout import PatchLayout
from blt_kernels.nn import (
    ALPHABET,
    ByteModel,
    RMSNorm,
    TransformerConfig,
    TransformerLayer,
    embedding,
    linear,
    load_ops,
    rotary_table,
    row_positions,
)
from blt_kernels.ops import _common


@dataclass(frozen=True)
class MegaByteConfig:
    """The defaults are the paper's 1.3B global and 218M local model. `patch_size` byte embeddings make a patch."""

    patch_size: int = 8
    global_transformer: TransformerConfig = TransformerConfig(2048, 24, 16)
    local_transformer: TransformerConfig = TransformerConfig(1024, 15, 16)
    vocab_size: int = ALPHABET

    def __post_init__(self) -> None:
        _common.check_int("patch_size", self.patch_size, 1)
        if self.global_transformer.dim % self.patch_size:
            expected = f"a multiple of patch_size = {self.patch_size}"
            raise ValueError(f"global_transformer.dim: expected {expected}, got {self.global_transformer.dim}")

    @staticmethod
    def small() -> MegaByteConfig:
        """4.6M parameters: trains on a laptop."""
        return MegaByteConfig(
            patch_size=4,
            global_transformer=TransformerConfig(256, 4, 4, window=256),
            local_transformer=TransformerConfig(192, 2, 3),
        )


class MegaByte(ByteModel):
    """MegaByte with Llama's blocks.

    Parameters
    ----------
    config : MegaByteConfig
    ops : "fused" or "reference"
        The public ops, or their plain PyTorch specification.
    """

    config_class = MegaByteConfig

    def __init__(self, config: MegaByteConfig, ops: str = "fused") -> None:
        super().__init__()
        self.config, self.ops = config, load_ops(ops)
        wide, size = config.global_transformer, config.patch_size
        # A local model never sees further than its patch: the window tells the attention as much.
        narrow = self.local_config = replace(config.local_transformer, window=size)
        self.global_embed_tokens = embedding(config.vocab_size, wide.dim // size)
        self.global_embed_first = nn.Parameter(torch.randn(wide.dim) / 2)
        self.global_layers = nn.ModuleList(TransformerLayer(wide, self.ops) for _ in range(wide.num_layers))
        self.global_norm = RMSNorm(wide.dim, wide.norm_eps)
        self.global_to_local = linear(wide.dim // size, narrow.dim)
        self.local_embed_tokens = embedding(config.vocab_size, narrow.dim)
        self.local_embed_first = nn.Parameter(torch.randn(narrow.dim) / 2)
        self.local_layers = nn.ModuleList(TransformerLayer(narrow, self.ops) for _ in range(narrow.num_layers))
        self.norm = RMSNorm(narrow.dim, narrow.norm_eps)
        self.lm_head = linear(narrow.dim, config.vocab_size)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits of the next byte.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[B, S]``
            Ids: byte + 4.
        cu_seqlens : int32 or int64 ``[R+1]``, optional
            Rows of packed tokens; one row if None.

        Returns
        -------
        ``[*tokens.shape, vocab_size]``

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype, shape or value; the message names it.

        Notes
        -----
        A patch predicts its own bytes, from the patches before it and its bytes so far. So that the last byte of a row
        predicts one too, every row gets a slot more than it has bytes: slot s predicts byte s, from slot 1 on.
        """
        _common.check_tensor("tokens", tokens, (1, 2), _common.INTS)
        ids, rows = _common.pack("tokens", tokens, cu_seqlens, trailing=0)
        total, count, size = ids.shape[0], rows.shape[0] - 1, self.config.patch_size
        slot_rows = rows + torch.arange(count + 1, dtype=rows.dtype, device=rows.device)
        # A row of n + 1 slots has ceil((n + 1) / size) <= n / size + 1 patches.
        layout = self.ops.static_patch(
            slot_rows, size=size, first=size, num_bytes=total + count, max_patches=total // size + count
        )
        padded = F.pad(ids, (0, 1))  # so that there is an id to read where there are no bytes
        patches = self._global(padded, layout)  # [C * size, D_L]

        slot = torch.arange(total + count, device=ids.device)
        patch = layout.patch_ids.long().clamp(min=0)
        place = (slot - layout.patch_offsets.long()[patch]) % size  # in its patch
        # Slot s of a row reads byte s - 1. There is one slot more than bytes in every row before.
        previous = self.local_embed_tokens(padded[(slot - _row(slot_rows, slot) - 1).clamp(min=0)])
        x = torch.where((place == 0)[:, None], self.local_embed_first, previous) + patches[patch * size + place]
        table = rotary_table(place, self.local_config, x.dtype)
        for layer in self.local_layers:
            x = layer(x, table, layout.patch_offsets)
        byte = torch.arange(total, device=ids.device)
        next_slot = (byte + _row(rows, byte) + 1).clamp(max=total + count - 1)
        return self.lm_head(self.norm(x[next_slot])).view(*tokens.shape, self.config.vocab_size)

    def _global(self, padded: Tensor, layout: PatchLayout) -> Tensor:
        """What the slots of each patch know of the patches before theirs: ``[C * size, D_L]``."""
        size, capacity = self.config.patch_size, layout.capacity
        patch = torch.arange(capacity, device=padded.device)
        slot = layout.patch_offsets[:-1, None] - size + torch.arange(size, device=padded.device)  # [C, size]
        byte = slot - _row(layout.cu_patches, patch)[:, None]
        x = self.global_embed_tokens(padded[byte.clamp(min=0, max=padded.shape[0] - 1)]).flatten(1)
        positions = row_positions(layout.cu_patches, capacity)
        x = torch.where((positions == 0)[:, None], self.global_embed_first, x)
        table = rotary_table(positions, self.config.global_transformer, x.dtype)
        for layer in self.global_layers:
            x = layer(x, table, layout.cu_patches)
        return self.global_to_local(self.global_norm(x).view(capacity * size, -1))


def _row(offsets: Tensor, index: Tensor) -> Tensor:
    """The row that each index lies in; the number of rows beyond the last."""
    return torch.searchsorted(offsets[1:].contiguous(), index, right=True)
