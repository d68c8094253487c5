"""Measures bits per byte on files, of any model and of the order-3 n-gram baseline.

Only bytes are scored, and not EOS, so that models that know nothing of documents can be compared. Every byte is scored
once. `data.heldout_batches` cuts its context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from blt_kernels.ids import BYTE_OFFSET
from blt_kernels.models import BLT, ByteLM, MegaByte, load_model
from blt_kernels.models.base import ByteModel
from blt_kernels.models.threshold import find_threshold
from blt_kernels.nn import next_byte_targets, row_positions
from blt_kernels.train import checks, data
from blt_kernels.train.config import EvalConfig
from blt_kernels.train.ngram import NgramModel
from blt_kernels.train.parallel import Ranks
from blt_kernels.train.row_patches import RowPatches

Report = Callable[[int, int, float], None]  # is called with bytes done, bytes in all, and bits per byte so far


@dataclass(frozen=True)
class Evaluation:
    """Holds what `evaluate` measured on `num_bytes` of `num_files` files."""

    bits_per_byte: float
    num_bytes: int
    num_files: int
    ngram_bits_per_byte: float | None


def evaluate(config: EvalConfig, report: Report | None = None) -> Evaluation:
    """Measure a checkpoint, of any model that `load_model` reads, on files.

    Raises
    ------
    FileNotFoundError, ValueError
        As `data.find_sources`; the chosen side of the split is empty, `strided` is not for this model, or the
        model has BPE patching, whose delimiters files do not have.
    """
    with checks.reading("checkpoint"):
        model = load_model(config.checkpoint, config.ops, dtype=torch.float32, device=config.device)
    if config.strided and not isinstance(model, MegaByte):
        raise ValueError(f"strided: expected a MegaByte, got a {type(model).__name__} in {config.checkpoint}")
    if isinstance(model, BLT):
        data.check_patching(f"checkpoint {config.checkpoint}, patching", model.config.patching)
    sources = data.find_sources(config.paths, config.include)
    train, held = data.split_sources(sources, config.heldout, config.seed)
    chosen = {"all": sources, "heldout": held, "train": train}[config.split]
    if not chosen:
        raise ValueError(f"split: no files on the {config.split!r} side of {len(sources)} files")
    options: dict[str, Any] = {"strided": True} if config.strided else {}
    size, context = config.batch_bytes, config.context
    bits, num_bytes = measure(model, chosen, size, context, bf16=config.bf16, report=report, **options)
    ngram = NgramModel.train(train).measure(chosen) if config.ngram else None
    return Evaluation(bits, num_bytes, len(chosen), ngram)


@torch.no_grad()
def measure(
    model: ByteModel,
    sources: Sequence[data.Source],
    batch_bytes: int,
    context: int,
    *,
    bf16: bool = False,
    report: Report | None = None,
    ranks: Ranks | None = None,
    patches: RowPatches | None = None,
    **options: Any,
) -> tuple[float, int]:
    """Return bits per byte of a model on `sources`, and the number of bytes.

    `ranks` share the batches; `patches` are those of a BLT, computed if None; `options` are those of its `forward`.
    """
    device = next(model.parameters()).device
    ranks = ranks or Ranks(device)
    total, done, nats = sum(source.size for source in sources), 0, 0.0
    training = model.training
    model.eval()
    if patches is None and isinstance(model, BLT):
        patches = RowPatches(model, context, bf16)
    batches = data.heldout_rows(sources, batch_bytes, context)
    while round_ := list(islice(batches, ranks.world)):
        # All ranks call a sharded model. Where the last round has too few batches, they call it on nothing.
        pieces = round_[ranks.rank] if ranks.rank < len(round_) else []
        tokens, rows = (t.to(device) for t in data.read_rows(pieces))
        if patches is not None:
            options["layout"] = patches.layout(pieces)
        targets = next_byte_targets(tokens, rows)
        targets = targets.masked_fill(targets < BYTE_OFFSET, -100)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            nats += model(tokens, rows, targets=targets, **options).sum().item()
        done += int((targets >= 0).sum())
        if report:
            report(done, total, nats / max(done, 1) / math.log(2))
    model.train(training)
    nats, count = ranks.sum(nats, done)
    return nats / max(count, 1) / math.log(2), int(count)


@torch.no_grad()
def threshold_for_patch_size(
    model: ByteLM, sources: Sequence[data.Source], patch_size: float, batch_bytes: int, context: int
) -> float:
    """Return the entropy in nats above which patches of `sources` start, for patches of `patch_size` bytes on average.

    Every row has two starts whatever the entropies are.
    """
    device = next(model.parameters()).device
    free, num_bytes, forced = [], 0, 0
    for tokens, rows in data.heldout_batches(sources, batch_bytes, context):
        tokens, rows = tokens.to(device), rows.to(device)
        entropy, _ = model.patch(tokens, rows)
        # The entropy of a row's first byte is never read, and after its last byte there is nothing to cut.
        decides = (row_positions(rows, len(tokens)) > 0) & (next_byte_targets(tokens, rows) >= 0)
        free.append(entropy[decides])
        num_bytes, forced = num_bytes + len(tokens), forced + 2 * (len(rows) - 1)
    entropies = torch.cat(free)
    return find_threshold(lambda t: num_bytes / (forced + int((entropies > t).sum())), entropies, patch_size)
