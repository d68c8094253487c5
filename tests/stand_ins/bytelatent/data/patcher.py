"""Patching, one row and one byte at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bytelatent.transformer import LMTransformer  # noqa: F401


def entropy(scores: Tensor) -> Tensor:
    log_p = scores.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def calculate_entropies(
    tokens: Tensor, entropy_model: Any, patching_batch_size: int, device: str | None = None, enable_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Run all rows as one context, padded to the length of the model's."""
    context = getattr(entropy_model, "max_length", 8192)
    parts = []
    with torch.set_grad_enabled(enable_grad):
        for part in tokens.flatten().split(context * patching_batch_size):
            padded = torch.cat([part, part.new_zeros(-part.numel() % context)]).view(-1, context)
            parts.append(entropy_model(padded).flatten(0, 1)[: part.numel()])
        preds = torch.cat(parts)
        return entropy(preds).view(tokens.shape), preds.view(tokens.shape[0], -1)


def is_space_like(token: int) -> bool:
    byte = token - 4
    alphanumeric = chr(byte).isalnum() if 0 <= byte < 128 else False
    return not alphanumeric and not 0x80 <= byte < 0xC0


class Patcher:
    def __init__(self, patcher_args: Any) -> None:
        for name, value in vars(patcher_args).items():
            setattr(self, name, value)

    def patch(
        self,
        tokens: Tensor,
        include_next_token: bool = False,
        preds: Tensor | None = None,
        entropies: Tensor | None = None,
        threshold: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        scores = None
        if self.patching_mode == "entropy":
            if entropies is not None:
                scores = entropies.float()
            elif preds is not None:
                scores = entropy(preds)
            else:
                scores, _ = calculate_entropies(tokens, self.entropy_model, self.patching_batch_size, self.device)
            limit = self.threshold if threshold is None else threshold
            starts = [self.by_entropy(row, limit) for row in scores]
        elif self.patching_mode == "space":
            starts = [self.at_spaces(row) for row in tokens.tolist()]
        else:
            starts = [list(range(tokens.shape[1] + 1)) for _ in tokens]
        total = tokens.shape[1] + include_next_token
        rows = [self.cut([b - a for a, b in pairwise([s for s in row if s < total] + [total])]) for row in starts]
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows]), scores

    def by_entropy(self, row: Tensor, limit: float) -> list[int]:
        starts = [0, 1]
        for i in range(1, len(row)):
            above, rise = bool(row[i] > limit), row[i] - row[i - 1]
            if self.monotonicity:
                above = i == 1 or bool(rise > limit)
            elif self.threshold_add is not None:
                above = i == 1 or (i != 2 and above and bool(rise > self.threshold_add))
            starts += [i + 1] if above else []
        return starts

    def at_spaces(self, row: list[int]) -> list[int]:
        ends = [(is_space_like(x) and not (i and is_space_like(row[i - 1]))) or x < 4 for i, x in enumerate(row)]
        return [0, 1, *(i + 1 for i in range(1, len(row)) if ends[i])]

    def cut(self, lengths: list[int]) -> list[int]:
        most = self.max_patch_length
        if most is None:
            return lengths
        return [part for n in lengths for part in [most] * ((n - 1) // most) + [n - (n - 1) // most * most]]
