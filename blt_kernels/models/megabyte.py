"""MegaByte (arXiv 2305.07185): a transformer over patches of a fixed size, and one over the bytes of each patch.

Patch k is bytes ``[kP, (k+1)P)`` of a row. For it, the global model reads the P byte embeddings of patch k - 1, end to
end (a learned vector for k = 0). Its output is cut into P parts, which one shared matrix projects to the width of the
local model. The embedding of byte ``kP + p - 1`` is added to part p (a learned vector for p = 0). From these sums the
local model, which runs on every patch by itself, predicts bytes ``kP + p``. The extensions of the paper's section 2.3
are options: convolutions before bytes are cut into patches, keys of the patch before, and two passes at inference.

Three things differ from the paper. The blocks are Llama's, where those of the paper have ReLU. The output matrix is not
the local embedding. Positions are rotary, of patches in their row and of bytes in their patch, where the paper adds
embeddings of positions to those of bytes, and has rotary ones where the patch before is read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels.layout import PatchLayout
from blt_kernels.models.base import ByteModel, check_targets
from blt_kernels.models.config import MegaByteConfig
from blt_kernels.models.cross_patch import CrossPatch, CrossPatchAttention
from blt_kernels.models.megabyte_state import MegaByteState
from blt_kernels.nn import (
    RMSNorm,
    TransformerLayer,
    embed_ids,
    embedding,
    init_normal,
    known_ids,
    layer_ranges,
    linear,
    load_ops,
    rotary_table,
    row_positions,
)


class CausalConvolution(nn.Module):
    """Computes ``x + silu(conv(norm(x)))`` along rows: byte t reads bytes ``t - size + 1`` to t, zeros before its row.

    The paper gives filter sizes only. This filter mixes all channels and has no bias; norm and residual are those of
    the other blocks.
    """

    def __init__(self, dim: int, size: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, norm_eps)
        self.weight = nn.Parameter(torch.empty(dim, dim, size))  # as in nn.Conv1d, the last tap reads the byte itself
        init_normal(self.weight, (dim * size) ** -0.5)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return packed rows ``[T, D]`` from such; `positions` ``[T]`` are those of the bytes in their rows."""
        dim, _, size = self.weight.shape
        taps = F.linear(self.norm(x), self.weight.permute(2, 0, 1).flatten(0, 1)).unflatten(-1, (size, dim))
        out = taps[:, -1]
        for back in range(1, size):
            out = out + torch.where((positions >= back)[:, None], taps[:, -1 - back].roll(back, 0), 0)
        return x + F.silu(out)


class MegaByte(ByteModel):
    """Computes MegaByte with Llama's blocks.

    Parameters
    ----------
    config : MegaByteConfig
    ops : "fused" or "reference"
        The public ops, or their plain PyTorch specification.

    Notes
    -----
    `cross_patch` changes no parameter: a model can be trained with one value and run with another.

    Raises
    ------
    ValueError
        `ops` is neither.

    Examples
    --------
    >>> model = MegaByte(MegaByteConfig.small())
    >>> model(to_ids("a text")).shape
    torch.Size([6, 260])
    """

    config_class = MegaByteConfig

    def __init__(self, config: MegaByteConfig, ops: str = "fused") -> None:
        super().__init__()
        self.config, self.ops = config, load_ops(ops)
        wide, size = config.global_transformer, config.patch_size
        # A byte attends to no more keys than this: the window only bounds the work of the attention.
        narrow = self.local_config = replace(config.local_transformer, window=size + config.cross_patch)
        self.global_embed_tokens = embedding(config.vocab_size, wide.dim // size)
        self.global_embed_first = nn.Parameter(torch.randn(wide.dim) / 2)
        self.patch_convolutions = nn.ModuleList(
            CausalConvolution(wide.dim // size, filter_size, wide.norm_eps) for filter_size in config.conv_sizes
        )
        self.global_layers = nn.ModuleList(TransformerLayer(wide, self.ops) for _ in range(wide.num_layers))
        self.global_norm = RMSNorm(wide.dim, wide.norm_eps)
        # The untrained global model adds less to local embeddings than they have: it is noise to them.
        self.global_to_local = linear(wide.dim // size, narrow.dim, gain=0.25)
        self.local_embed_tokens = embedding(config.vocab_size, narrow.dim)
        self.local_embed_first = nn.Parameter(torch.randn(narrow.dim) / 2)
        self.local_layers = nn.ModuleList(TransformerLayer(narrow, self.ops) for _ in range(narrow.num_layers))
        if config.cross_patch:
            for layer in self.local_layers:
                layer.self_attn = CrossPatchAttention(narrow, self.ops)
        self.norm = RMSNorm(narrow.dim, narrow.norm_eps)
        self.lm_head = linear(narrow.dim, config.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | Documents | None = None,
        *,
        strided: bool = False,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return logits of the next byte, or with `targets` their nats.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[B, S]``
            Ids: byte + 4.
        cu_seqlens : int32 or int64 ``[R+1]``, optional
            Rows of packed tokens; one row if None.
        strided : bool
            Strided inference, at twice the cost: a second pass, whose patches lie half a patch later, predicts the
            bytes in the later halves of patches. It reads rows without their first ``ceil(P / 2)`` bytes, as the
            paper's figure 5 draws it. Its first patch of a row, which would know nothing of the row, predicts nothing.
        targets : int64, as `tokens`, optional
            Ids that are predicted, such as those of `blt_kernels.nn.next_byte_targets`; -100 is none.

        Returns
        -------
        ``[*tokens.shape, vocab_size]``
            0 for tokens beyond the last row, which may hold any value and get no gradient. With `targets`, their nats,
            ``-ln p``, in fp32 (fp64 for an fp64 model) ``tokens.shape``, 0 where there is none: logits are not stored.

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype, shape or value; the message names it. An id outside the alphabet is
            an error in eager code on the CPU, where the check costs nothing; elsewhere it has no embedding.
        """
        _checks.check_bool("strided", strided)
        check_targets(targets, tokens)
        ids, rows = self.pack(tokens, cu_seqlens)
        x = self._states(ids, rows)
        if strided:
            x = self._stride(x, ids, rows)
        return self._head(x, tokens, targets)

    def new_state(self, rows: int = 1, *, undo: int = 64) -> MegaByteState:
        return MegaByteState(self, rows, undo)

    def _stride(self, x: Tensor, ids: Tensor, documents: Documents) -> Tensor:
        """Return states: a second pass replaces those of the later half of every patch but a row's first."""
        size, rows = self.config.patch_size, documents.offsets
        shift, byte = (size + 1) // 2, torch.arange(ids.shape[0], device=ids.device)
        later = F.pad((rows.diff() - shift).clamp(min=0).cumsum(0), (1, 0)).to(rows.dtype)  # rows of the second pass
        row = _row(later, byte)
        second = self._states(
            ids[(byte - later[row] + rows[row] + shift).clamp(max=ids.shape[0] - 1)],
            Documents(later, ids.shape[0], None),
        )
        row = _row(rows, byte)
        target = byte - rows[row] + 1  # the position in its row of the byte that this one predicts
        use = (target >= size) & (target % size >= shift)
        index = (later[row] + target - 1 - shift).clamp(min=0, max=ids.shape[0] - 1)
        return torch.where(use[:, None], second[index], x)

    def _states(self, ids: Tensor, byte_rows: Documents) -> Tensor:
        """Return normed states ``[T, D]`` of packed rows, which predict the next byte.

        A patch predicts its own bytes, from the patches before it and its bytes so far. So that the last byte of a row
        predicts one too, every row gets a slot more than it has bytes: slot s predicts byte s, from slot 1 on.
        """
        rows, size = byte_rows.offsets, self.config.patch_size
        total, count = ids.shape[0], rows.shape[0] - 1
        slot_rows = rows + torch.arange(count + 1, dtype=rows.dtype, device=rows.device)
        # A row of n + 1 slots has n // size + 1 patches. There is at least one, which bytes in no row may read.
        capacity = max(total // size + count, 1)
        layout = self.ops.static_patch(slot_rows, size=size, first=size, num_bytes=total + count, max_patches=capacity)
        # One id more is appended, so that there is one to read where there are no bytes.
        known = known_ids(ids, byte_rows, self.config.vocab_size)
        known = torch.ones_like(ids, dtype=torch.bool) if known is None else known
        padded, known = (F.pad(x, (0, 1)) for x in (ids, known))
        patches = self._global(padded, known, rows, layout)  # [C * size, D_L]

        slot = torch.arange(total + count, device=ids.device)
        row = _row(slot_rows, slot)
        place = (slot - slot_rows[row]) % size  # the position in the patch
        # Slot s of a row reads byte s - 1. There is one slot more than bytes in every row before.
        read = (slot - row - 1).clamp(min=0)
        previous = embed_ids(self.local_embed_tokens, padded[read], known[read])
        part = layout.patch_ids.long().clamp(min=0) * size + place
        x = torch.where((place == 0)[:, None], self.local_embed_first, previous) + patches[part]
        x = x.where((slot < slot_rows[-1])[:, None], 0)  # stays 0 in all layers: attention gives 0 outside of rows
        del patches, previous  # of long rows they are large
        table = rotary_table(place, self.local_config, x.dtype)
        window = self.local_config.window
        documents: Any = self.ops.offsets(Documents(layout.patch_offsets, total + count, None))
        if self.config.cross_patch:
            documents = self._cross_patch(layout, x.dtype)
            keys = documents.key_slots.shape[0]
            ranges = layer_ranges(self.ops, x, layout.patch_offsets, window, documents.key_offsets, keys)
        else:
            ranges = layer_ranges(self.ops, x, documents, window)
        for layer in self.local_layers:
            x = layer(x, table, documents, ranges)
        byte = torch.arange(total, device=ids.device)
        next_slot = (byte + _row(rows, byte) + 1).clamp(max=total + count - 1)
        return self.norm(x[next_slot])

    def _global(self, padded: Tensor, known: Tensor, rows: Tensor, layout: PatchLayout) -> Tensor:
        """Return what the global model gives the slots of each patch, from the patches before: ``[C * size, D_L]``."""
        size = self.config.patch_size
        patch = torch.arange(layout.capacity, device=padded.device)
        row = _row(layout.cu_patches, patch)
        slot = layout.patch_offsets[:-1, None] - size + torch.arange(size, device=padded.device)  # [C, size]
        read = (slot - row[:, None]).clamp(min=0, max=padded.shape[0] - 1)
        if self.patch_convolutions:
            x = embed_ids(self.global_embed_tokens, padded, known)
            positions = row_positions(rows, padded.shape[0])
            for convolution in self.patch_convolutions:
                x = convolution(x, positions)
            x = F.embedding(read, x)
        else:
            x = embed_ids(self.global_embed_tokens, padded[read], known[read])
        positions = patch - layout.cu_patches[row]
        x = torch.where((positions == 0)[:, None], self.global_embed_first, x.flatten(1))
        table = rotary_table(positions, self.config.global_transformer, x.dtype)
        ranges = layer_ranges(self.ops, x, layout.cu_patches, self.config.global_transformer.window)
        documents = self.ops.offsets(Documents(layout.cu_patches, layout.capacity, None))
        for layer in self.global_layers:
            x = layer(x, table, documents, ranges)
        return self.global_to_local(self.global_norm(x).unflatten(-1, (size, -1)).flatten(0, 1))

    def _cross_patch(self, layout: PatchLayout, dtype: torch.dtype) -> CrossPatch:
        """Return the keys of every patch. The patch before one is always full, so its end is right before it."""
        reach, size, offsets = self.config.cross_patch, self.config.patch_size, layout.patch_offsets
        count, slots = layout.num_documents, layout.num_bytes
        patch = torch.arange(layout.capacity, device=offsets.device)
        row = _row(layout.cu_patches, patch)
        follows = (patch > layout.cu_patches[row]) & (row < count)
        before = F.pad(follows.int() * reach, (0, 1))  # [C+1], keys of another patch
        key_offsets = offsets + (before.cumsum(0) - before).int()
        # In a row of n bytes, n // size patches follow another.
        key = torch.arange(slots + reach * ((slots - count) // size), device=offsets.device)
        patch = _row(key_offsets, key)
        place = key - key_offsets[patch] - before[patch]
        key_slots = (offsets[patch] + place).clamp(max=slots - 1)
        table = rotary_table(place, self.local_config, dtype)
        of_queries, of_keys = Documents(offsets, slots, None), Documents(key_offsets, key.shape[0], None)
        return CrossPatch(self.ops.offsets(of_queries), self.ops.offsets(of_keys), key_slots, table)


def _row(offsets: Tensor, index: Tensor) -> Tensor:
    """Return the row of each index; the number of rows beyond the last."""
    return torch.searchsorted(offsets[1:].contiguous(), index, right=True)
