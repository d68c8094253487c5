"""Dynamic chunking: routing, chunks, smoothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class RoutingModuleOutput:
    boundary_prob: Tensor
    boundary_mask: Tensor
    selected_probs: Tensor


@dataclass
class DeChunkState:
    last_value: Tensor


class RoutingModule(nn.Module):
    """A vector that points elsewhere than the one before it is a boundary, and so is the first one of a document."""

    def __init__(self, d_model: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.q_proj_layer = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)
        self.k_proj_layer = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        inference_params: Any = None,
    ) -> RoutingModuleOutput:
        packed = hidden_states[None] if cu_seqlens is not None else hidden_states
        before, after = self.q_proj_layer(packed[:, :-1]), self.k_proj_layer(packed[:, 1:])
        moved = (1 - torch.cosine_similarity(before, after, dim=-1)) / 2
        p = torch.cat([torch.ones_like(packed[:, :1, 0]), moved.clamp(0, 1)], 1)
        if cu_seqlens is not None:
            starts = torch.zeros(hidden_states.shape[0], dtype=torch.bool)
            starts[cu_seqlens[:-1].long()] = True
            p = torch.where(starts, 1, p[0])
        boundary_mask = p > 0.5
        if mask is not None:
            boundary_mask = boundary_mask & mask
        both = torch.stack([1 - p, p], -1)
        return RoutingModuleOutput(both, boundary_mask, both.amax(-1, keepdim=True))


class ChunkLayer(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        boundary_mask: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, int | None, Tensor | None]:
        assert mask is not None or cu_seqlens is not None
        if cu_seqlens is not None:
            counts = [int(boundary_mask[begin:end].sum()) for begin, end in pairwise(cu_seqlens.tolist())]
            ends = torch.tensor([0, *counts]).cumsum(0)
            return hidden_states[boundary_mask], ends, max(counts), None
        rows = [row[marks] for row, marks in zip(hidden_states, boundary_mask, strict=True)]
        length = max(len(row) for row in rows)
        padded = torch.stack([torch.cat([row, row.new_zeros(length - len(row), row.shape[1])]) for row in rows])
        used = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
        return padded, None, None, used


class DeChunkLayer(nn.Module):
    def __init__(self, d_model: int, dtype: torch.dtype = torch.bfloat16, block_size: int = 256, headdim: int = 32):
        super().__init__()
        assert d_model % headdim == 0
        self.d_model = d_model

    def forward(
        self,
        hidden_states: Tensor,
        boundary_mask: Tensor,
        boundary_prob: Tensor,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if inference_params is not None:
            assert mask is not None, "Mask must be provided"
            assert boundary_mask[:, 0].all(), "First token must be a boundary"
        probability = boundary_prob[..., -1]
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        if cu_seqlens is not None:
            starts = set(cu_seqlens.tolist())
            out = self._row(hidden_states.to(wide), boundary_mask, probability, starts)
            return out.to(hidden_states.dtype)
        rows = zip(hidden_states.to(wide), boundary_mask, probability, strict=True)
        out = torch.stack([self._row(*row, {0}) for row in rows])
        if inference_params is not None:
            inference_params.last_value.copy_(out[:, -1])
        return out.to(hidden_states.dtype)

    @staticmethod
    def _row(chunks: Tensor, marks: Tensor, probability: Tensor, starts: set[int]) -> Tensor:
        """Walk the bytes; `starts` are the chunks with which documents start."""
        average, number, out = torch.zeros_like(chunks[:1].sum(0)), 0, []
        for mark, p in zip(marks.tolist(), probability.to(chunks.dtype), strict=True):
            if mark:
                weight = p.clamp(1e-4, 1 - 1e-4)
                before = torch.zeros_like(average) if number in starts else average
                average = weight * chunks[number] + (1 - weight) * before
                number += 1
            out.append(average)
        return torch.stack(out)
