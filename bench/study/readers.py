"""Reads text for a model: as bytes, or as the tokens of a BPE tokenizer that is trained on the same text.

Both read the same rows (`blt_kernels.train.data.Row`). The first id of a row is context; the others are the text that
is predicted. For tokens the context is BOS. Bytes of a character that the ends of a row cut are no text to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blt_kernels._files import whole_file
from blt_kernels.ids import BOS, EOS, to_ids
from blt_kernels.train import data

Batch = tuple[Tensor, Tensor, int]  # ids, offsets of rows, bytes that are predicted


class ByteReader:
    """Reads text as bytes: id = byte + 4, with BOS in front."""

    digest = "bytes"

    def read(self, rows: Sequence[data.Row]) -> Batch:
        """Return rows of files end to end."""
        ids, offsets = data.read_rows(rows)
        return ids, offsets, sum(row.length - 1 for row in rows)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, behind BOS."""
        return to_ids(text.encode(), bos=True, dtype=torch.int32).numpy()


class TokenReader:
    """Reads text as the tokens of a BPE tokenizer over bytes, as `train_tokenizer` makes it."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(path))
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def read(self, rows: Sequence[data.Row]) -> Batch:
        """Return rows of files end to end."""
        ids, num_bytes = [], 0
        for row in rows:
            values = data.read_ids(*row)[1:]
            ends = values.size > 0 and values[-1] == EOS
            text = (values[: values.size - ends] - 4).astype(np.uint8).tobytes().decode("utf-8", errors="ignore")
            ids.append(np.append(self.encode(text), np.array([EOS] * int(ends), np.int32)))
            num_bytes += len(text.encode()) + int(ends)
        return *packed(ids), num_bytes

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, behind BOS."""
        return np.array([BOS, *self.tokenizer.encode(text, add_special_tokens=False).ids], dtype=np.int32)


Reader = ByteReader | TokenReader


def packed(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return ids end to end, and the offsets of their rows."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(offsets)


def train_tokenizer(sources: Sequence[data.Source], vocabulary: int, path: Path) -> None:
    """Train byte-level BPE (as GPT-2 has it) on files, and write it. BOS and EOS have the ids that bytes have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<boe>", "<bos>", "<eos>", "<bpe>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(sources), trainer)
    with whole_file(path) as part:
        tokenizer.save(str(part))


def _texts(sources: Sequence[data.Source]) -> Iterator[str]:
    for source in sources:
        yield source.path.read_text(encoding="utf-8", errors="ignore")
