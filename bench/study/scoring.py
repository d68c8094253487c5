"""Measures a trained model on texts: nats of whole texts, each a row of its own behind BOS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from blt_kernels.models.base import ByteModel
from blt_kernels.nn import next_byte_targets
from study.patching import Patching
from study.readers import Reader, packed

_CALL_IDS, _CALL_LOGITS = 1 << 14, 1 << 27  # the most of a call


class Scorer:
    """Computes nats of texts. Those of a model over tokens are of the tokens that its tokenizer cuts a text into."""

    def __init__(self, model: ByteModel, reader: Reader, patching: Patching | None) -> None:
        self.model, self.reader, self.patching = model.eval(), reader, patching

    def nats(self, texts: Sequence[str]) -> list[float]:
        """Return ``-log p`` of every text."""
        limit = min(_CALL_IDS, _CALL_LOGITS // self.model.config.vocab_size)
        found: list[float] = []
        group: list[np.ndarray] = []
        for text in texts:
            ids = self.reader.encode(text)
            if group and sum(map(len, group)) + len(ids) > limit:
                found += self._score(group)
                group = []
            group.append(ids)
        return found + (self._score(group) if group else [])

    def nats_after(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return ``-log p`` of prompts with what follows them.

        Of the choices after one prompt, it has the order of ``-log p(choice | prompt)``.
        """
        return self.nats([prompt + choice for prompt, choice in pairs])

    def nats_of_groups(self, groups: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
        """Return `nats` of the texts of each group."""
        return {group: self.nats(texts) for group, texts in groups.items()}

    @torch.no_grad()
    def _score(self, group: Sequence[np.ndarray]) -> list[float]:
        ids, offsets = packed(group)
        options = {} if self.patching is None else {"layout": self.patching.of(ids, offsets)}
        logits = self.model(ids, offsets, **options)
        nats = F.cross_entropy(logits.float(), next_byte_targets(ids, offsets), ignore_index=-100, reduction="none")
        return torch.segment_reduce(nats, "sum", offsets=offsets.long()).tolist()


def num_bytes(text: str) -> int:
    return len(text.encode())
