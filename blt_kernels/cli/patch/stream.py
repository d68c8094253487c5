"""Cuts files and streams of any size into patches, in bounded memory.

Bytes flow through generators in pieces: `read` -> `with_entropy` (the model, in blocks on a fixed grid) -> `cut` (the
rule, on the public ops) -> counts, drawings or JSON. The result does not depend on how a source is split into
pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import torch
from torch import Tensor

from blt_kernels.cli.patch.rules import AT_ONCE, Rules, Scheme, load_tokenizer
from blt_kernels.ids import to_ids
from blt_kernels.models import ByteLM
from blt_kernels.models.characters import character_ends, cut_long_patches, patches_of_whole_characters
from blt_kernels.models.threshold import find_threshold
from blt_kernels.ops.token_entropy import token_entropy

READ_SIZE = 1 << 20  # bytes read at once
SAMPLE_SIZE = 1 << 20  # bytes on which the threshold of a target size is found
AT_ONCE_LIMIT = 16 << 20  # bytes that a scheme holds which needs all at once
# Bytes before a piece that an op gets again. The rules of a document's start concern three bytes, and the end of a
# character depends on a byte and the two before it.
CONTEXT = 4


@dataclass(frozen=True)
class Piece:
    """Some bytes of a stream, and the patches that start in them.

    `starts` holds offsets in the stream, int64, rising. `entropy` is fp32, one a byte, None where none was computed.
    """

    offset: int
    data: bytes
    entropy: Tensor | None
    starts: Tensor


class StreamCutter:
    """Cuts a stream piece by piece, exactly as the ops cut the whole of it.

    It carries from piece to piece the last `CONTEXT` bytes and entropies, so that the rules of a document's start apply
    only to bytes that have been decided before; the start of the patch that `max_patch_length` is cutting; and the end
    of the last character before the next byte.
    """

    def __init__(self, rules: Rules) -> None:
        if rules.scheme in AT_ONCE:
            what = f"{AT_ONCE[rules.scheme]} all bytes at once"
            raise ValueError(f"--scheme {rules.scheme.value}: {what}, so it cannot be cut piece by piece")
        self.rules = rules
        self.position = 0
        self._tokens = torch.empty(0, dtype=torch.int32)
        self._entropy = torch.empty(0)
        self._patch_start = 0
        self._character_end = -1

    def push(self, data: bytes, entropy: Tensor | None = None) -> Piece:
        """Cut the next bytes. `entropy` ``[len(data)]`` goes into the piece; schemes that do not need it allow None."""
        offset, seen = self.position, self._tokens.shape[0]
        if not data:
            return Piece(offset, data, entropy, torch.empty(0, dtype=torch.int64))
        tokens = torch.cat([self._tokens, to_ids(data, dtype=torch.int32)])
        self._tokens = tokens[-CONTEXT:]
        both = None
        if self.rules.needs_entropy:
            assert entropy is not None
            both = torch.cat([self._entropy, entropy.float()])
            self._entropy = both[-CONTEXT:]
        local = self.rules.layout(tokens, both, offset - seen).compact().patch_offsets[:-1]
        starts = local[int(torch.searchsorted(local, seen)) :].long() + (offset - seen)
        self.position += len(data)
        between = None  # whether a patch may start at each byte, between characters
        if self.rules.whole_characters:
            ends = character_ends(tokens, torch.tensor([0, tokens.shape[0]], dtype=torch.int32))
            between = torch.cat([torch.tensor([True]), ends])[seen : seen + len(data)]
            between[: max(2 - offset, 0)] = True
            starts = starts[between[starts - offset]]
        if self.rules.max_patch_length is not None:
            starts = self._cut_long_patches(starts, between, offset, self.rules.max_patch_length)
        return Piece(offset, data, entropy, starts)

    def _cut_long_patches(self, starts: Tensor, between: Tensor | None, offset: int, longest: int) -> Tensor:
        at = torch.arange(offset, self.position)
        boundaries = torch.zeros(at.shape, dtype=torch.bool).index_fill(0, starts - offset, True)
        ends = torch.ones_like(boundaries) if between is None else between
        start, end = torch.full_like(at, self._patch_start), torch.full_like(at, self._character_end)
        cuts = cut_long_patches(boundaries, ends, at, at == offset, start, longest, end)
        self._patch_start = int(torch.where(boundaries, at, start).max())
        self._character_end = int(torch.where(ends, at, end).max())
        return at[cuts]


def read(source: BinaryIO) -> Iterator[bytes]:
    """Yield the bytes of an open file in pieces."""
    return iter(lambda: source.read(READ_SIZE), b"")


def regroup(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the same bytes in pieces of exactly `size`, apart from the last one."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        whole = len(rest) - len(rest) % size
        for begin in range(0, whole, size):
            yield bytes(rest[begin : begin + size])
        del rest[:whole]
    if rest:
        yield bytes(rest)


def with_entropy(
    pieces: Iterable[bytes], model: ByteLM, reset_at_newlines: bool | None = None
) -> Iterator[tuple[bytes, Tensor]]:
    """Yield bytes and their entropies in nats, fp32. The context restarts at newlines if the model or the caller asks.

    A byte's entropy depends on the `context` bytes before it and on no others: every layer looks back ``window - 1``
    bytes. So blocks are computed on their own, each after the context in front of it. They lie on a fixed grid, because
    the same byte in a block of another shape would be rounded differently.
    """
    if model.config.window is None:
        raise ValueError("--model: expected a model with an attention window, got one that looks back without end")
    context = model.config.num_layers * (model.config.window - 1)
    before = b""
    for block in regroup(pieces, max(2048, 4 * context)):
        seen = before + block
        ids = to_ids(seen, dtype=torch.int32)
        with torch.inference_mode():
            entropy = token_entropy(model(ids, reset_at_newlines=reset_at_newlines))
        yield block, entropy[len(before) :].float()
        before = seen[max(len(seen) - context, 0) :]


def threshold_for_target(data: bytes, entropy: Tensor, rules: Rules) -> float:
    """Return the threshold at which the mean size of patches is nearest to ``rules.target_size``.

    It is found on bytes with entropies ``[T]``.
    """
    assert rules.target_size is not None

    def mean_size(threshold: float) -> float:
        piece = StreamCutter(replace(rules, threshold=threshold, target_size=None)).push(data, entropy)
        return len(data) / max(piece.starts.shape[0], 1)

    return find_threshold(mean_size, entropy, rules.target_size)


def cut(pieces: Iterable[bytes], rules: Rules, model: ByteLM | None = None) -> tuple[Rules, Iterator[Piece]]:
    """Cut a stream of bytes.

    Parameters
    ----------
    pieces
        The bytes, split in any way.
    rules
        A `target_size` is turned into a threshold on the first `SAMPLE_SIZE` bytes; without either, the threshold is
        the model's.
    model
        Where given, entropies are computed even if the scheme does not need them.

    Returns
    -------
    rules, pieces
        The rules with the threshold filled in, and the cut pieces.

    Raises
    ------
    ValueError
        The scheme needs all bytes at once, and there are more than `AT_ONCE_LIMIT`.
    """
    if rules.tokenizer is not None:
        load_tokenizer(rules.tokenizer)  # it raises before anything is read
    if rules.needs_entropy and model is None:
        raise ValueError(f"model: expected a ByteLM for --scheme {rules.scheme.value}, got None")
    if rules.needs_entropy and model is not None and model.config.reset_at_newlines:
        rules = replace(rules, reset_at_newlines=True)
    if rules.scheme in AT_ONCE:
        return rules, _cut_at_once(pieces, rules, model)
    stream: Iterator[tuple[bytes, Tensor | None]] = ((piece, None) for piece in pieces)
    if model is not None:
        stream = with_entropy(pieces, model, rules.reset_at_newlines or None)
    if rules.target_size is not None:
        sample, size = [], 0
        for block, entropy in stream:
            sample.append((block, entropy))
            size += len(block)
            if size >= SAMPLE_SIZE:
                break
        data = b"".join(block for block, _ in sample)
        entropies = torch.cat([torch.empty(0), *(entropy for _, entropy in sample if entropy is not None)])
        rules = replace(rules, threshold=threshold_for_target(data, entropies, rules), target_size=None)
        stream = itertools.chain(sample, stream)
    elif model is not None and rules.scheme is Scheme.entropy and rules.threshold is None:
        rules = replace(rules, threshold=model.config.threshold)
    cutter = StreamCutter(rules)
    return rules, (cutter.push(block, entropy) for block, entropy in stream)


def _cut_at_once(pieces: Iterable[bytes], rules: Rules, model: ByteLM | None) -> Iterator[Piece]:
    held, size = [], 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size > AT_ONCE_LIMIT:
            what = f"{AT_ONCE[rules.scheme]} all bytes at once"
            raise ValueError(f"--scheme {rules.scheme.value}: {what}, expected at most {AT_ONCE_LIMIT} bytes, got more")
    data = b"".join(held)
    entropy = None
    if model is not None:
        blocks = with_entropy(held, model, rules.reset_at_newlines or None)
        entropy = torch.cat([e for _, e in blocks] or [torch.empty(0)])
    tokens = to_ids(data, dtype=torch.int32)
    layout = rules.layout(tokens, entropy)
    if rules.whole_characters:
        layout = patches_of_whole_characters(layout, tokens)
    yield Piece(0, data, entropy, layout.compact().patch_offsets[:-1].long())
