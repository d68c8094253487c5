"""Patches of files and streams of any size, in bounded memory.

Bytes flow through generators in pieces: `read` -> `with_entropy` (the model, in blocks on a fixed grid) -> `cut` (the
rule, on the public ops) -> whatever counts, draws or prints. How a source happens to be split never shows in the
result.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch import Tensor

from blt_kernels import bpe
from blt_kernels.ids import BYTE_OFFSET, to_bytes, to_ids
from blt_kernels.layout import PatchLayout
from blt_kernels.models.characters import character_ends, patches_of_whole_characters
from blt_kernels.ops import entropy_patch as ops
from blt_kernels.ops.token_entropy import token_entropy
from blt_kernels.train import checks

if TYPE_CHECKING:
    from blt_kernels.models.byte_lm import ByteLM

READ_SIZE = 1 << 20  # bytes read at once
SAMPLE_SIZE = 1 << 20  # bytes that a target size is turned into a threshold on
AT_ONCE_LIMIT = 16 << 20  # bytes that a scheme which has to see everything will hold
# Bytes before a piece that an op sees again: a document's start decides about its first three bytes itself, and whether
# a byte ends a character is known from it and the two before.
CONTEXT = 4


class Scheme(str, Enum):
    """How bytes are cut into patches."""

    entropy = "entropy"
    space = "space"
    static = "static"
    byte = "byte"
    delimiter = "delimiter"
    topk = "topk"
    bpe = "bpe"


# Schemes that have to see everything, and what they do with it.
AT_ONCE = {Scheme.topk: "ranks", Scheme.bpe: "tokenizes"}
ENTROPY_SCHEMES = (Scheme.entropy, Scheme.topk)
# Which schemes an option is for; the others refuse it instead of ignoring it.
_OPTIONS = {
    "threshold": (Scheme.entropy,),
    "target_size": (Scheme.entropy,),
    "threshold_add": (Scheme.entropy,),
    "monotonic": (Scheme.entropy,),
    "max_patch_length": (Scheme.entropy,),
    "patch_size": (Scheme.static, Scheme.topk),
    "delimiter": (Scheme.delimiter,),
    "reset_at_newlines": ENTROPY_SCHEMES,
    "tokenizer": (Scheme.bpe,),
}


@dataclass(frozen=True)
class Rules:
    """A scheme and its numbers. Thresholds are in nats, sizes in bytes; None is the default.

    Raises
    ------
    ValueError
        An option is out of range, or is not for this scheme; the message names it as on the command line.
    """

    scheme: Scheme = Scheme.entropy
    threshold: float | None = None
    target_size: float | None = None
    threshold_add: float | None = None
    monotonic: bool = False
    max_patch_length: int | None = None
    patch_size: int | None = None
    delimiter: int | None = None
    whole_characters: bool = False
    reset_at_newlines: bool = False
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for name, schemes in _OPTIONS.items():
            value = getattr(self, name)
            if value is not None and value is not False and self.scheme not in schemes:
                expected, got = " or ".join(s.value for s in schemes), self.scheme.value
                raise ValueError(f"{_flag(name, value)}: expected --scheme {expected}, got --scheme {got}")
        for name in ("threshold", "threshold_add"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{_flag(name, value)}: expected a finite number of nats")
        for name in ("max_patch_length", "patch_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 1 << 31:
                raise ValueError(f"{_flag(name, value)}: expected a number of bytes from 1 to 2147483647")
        if self.target_size is not None:
            if not (self.target_size >= 1 and math.isfinite(self.target_size)):
                raise ValueError(f"{_flag('target_size', self.target_size)}: expected a mean of at least 1 byte")
            if self.threshold is not None:
                raise ValueError(f"{_flag('target_size', self.target_size)}: expected no --threshold beside it")
        if self.scheme is Scheme.bpe and self.tokenizer is None:
            raise ValueError("--scheme bpe: expected --tokenizer beside it")
        if self.monotonic and self.threshold_add is not None:
            raise ValueError(f"{_flag('threshold_add', self.threshold_add)}: expected no --monotonic beside it")

    @property
    def needs_entropy(self) -> bool:
        """Does the scheme look at entropies?"""
        return self.scheme in ENTROPY_SCHEMES

    def layout(self, tokens: Tensor, entropy: Tensor | None, offset: int = 0) -> PatchLayout:
        """Cut ids `tokens` ``[T]`` (byte + 4) with entropies `entropy` ``[T]``, the first of which is byte `offset`.

        `whole_characters` and `max_patch_length` are not applied.
        """
        if self.scheme is Scheme.space:
            return ops.space_patch(tokens)
        if self.scheme is Scheme.delimiter:
            return ops.delimiter_patch(tokens, (ord("\n") if self.delimiter is None else self.delimiter) + BYTE_OFFSET)
        if self.scheme in (Scheme.static, Scheme.byte):
            size = 1 if self.scheme is Scheme.byte else self.patch_size or 4
            documents = torch.tensor([0, tokens.shape[0]], dtype=torch.int32)
            # Starts are at 0 and at 1 + multiples of the size; `first` is the distance to the next one.
            return ops.static_patch(documents, size, first=-(-offset // size) * size + 1 - offset)
        if self.scheme is Scheme.bpe:
            assert self.tokenizer is not None
            data = cast("bytes", to_bytes(tokens))
            lengths = bpe.token_lengths(_tokenizer(self.tokenizer), data, "--scheme bpe", "--tokenizer")
            ends = torch.zeros(tokens.shape[0])
            ends[torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1] = 1
            return ops.patch_starts(ends, threshold=0.5)
        assert entropy is not None
        if self.scheme is Scheme.topk:
            return ops.topk_patch(entropy, self.patch_size or 4)
        assert self.threshold is not None, "`cut` fills it in"
        return ops.patch_starts(
            entropy, threshold=self.threshold, threshold_add=self.threshold_add, monotonic=self.monotonic
        )

    def record(self) -> dict[str, Any]:
        """What is set, as a JSON object."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["tokenizer"] = None if self.tokenizer is None else str(self.tokenizer)
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def describe(self) -> str:
        """The rule in words."""
        cap = "" if self.max_patch_length is None else f", at most {self.max_patch_length} bytes"
        whole = ", whole characters" if self.whole_characters else ""
        anew = ", context anew at newlines" if self.reset_at_newlines else ""
        return f"{self._describe_scheme()}{cap}{whole}{anew}"

    def _describe_scheme(self) -> str:
        if self.scheme is Scheme.entropy:
            if self.monotonic:
                return f"entropy rises by more than {self.threshold:.4g} nats"
            rise = "" if self.threshold_add is None else f", and rises by more than {self.threshold_add:.4g}"
            return f"entropy > {self.threshold:.4g} nats{rise}"
        if self.scheme is Scheme.topk:
            return f"top-k entropies, {self.patch_size or 4} bytes on average"
        if self.scheme is Scheme.static:
            return f"every {self.patch_size or 4} bytes"
        if self.scheme is Scheme.delimiter:
            return f"after each byte 0x{10 if self.delimiter is None else self.delimiter:02X}"
        if self.scheme is Scheme.bpe:
            return f"tokens of {self.tokenizer}"
        return "after spaces and punctuation" if self.scheme is Scheme.space else "every byte"


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

    What is carried from piece to piece: the last `CONTEXT` bytes and entropies, so that the rules of a document's start
    only meet bytes that have been decided before; where the patch started that `max_patch_length` is cutting; and where
    the last character ended before the next byte.
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
        between = None  # characters: may a patch start at each byte?
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
        begin = torch.full_like(at, self._patch_start)
        begin[starts - offset] = starts
        begin = begin.cummax(0).values
        self._patch_start = int(begin[-1])
        if between is None:
            return at[(at - begin) % longest == 0]
        # As in `blt_kernels.models.characters`: the first place between characters at or after a multiple of `longest`.
        ends = torch.cat([torch.tensor([self._character_end]), torch.where(between, at, -1)]).cummax(0).values
        self._character_end = int(ends[-1])
        return at[between & ((at - begin) // longest > (ends[:-1] - begin) // longest)]


def load_model(path: Path | None = None) -> ByteLM:
    """The entropy model in a safetensors file or in the directory of a checkpoint, or the one in the package.

    Of a BLT, it is the patcher inside, with the threshold of the BLT.

    Raises
    ------
    ImportError
        safetensors is not installed; the message has the command.
    FileNotFoundError, ValueError
        There is no such file, which the message says how to get, or it holds no ByteLM.
    """
    from blt_kernels.models.base import model_name
    from blt_kernels.models.blt import BLT
    from blt_kernels.models.byte_lm import BUNDLED, ByteLM

    try:
        from safetensors import SafetensorError
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--model: needs safetensors: pip install 'blt-kernels[cli]'") from None
    file = BUNDLED if path is None else path
    if file.is_dir():
        with checks.reading("model"):
            return ByteLM.from_pretrained(file, dtype=torch.float32).eval()
    if not file.is_file():
        train = "train one: blt-kernels train entropy PATH..."
        if path is None:
            raise ValueError(f"--model: the package has no {file.name} in it; install it again, or {train}")
        raise ValueError(
            f"--model {path}: expected a file or a directory. Leave it out to use the model in the package, or {train}"
        )
    try:
        if model_name(file) == BLT.__name__:
            blt = BLT.load(file, dtype=torch.float32)
            if blt.patcher is None:
                raise ValueError("the BLT in it has none")
            blt.patcher.config = replace(blt.patcher.config, threshold=blt.config.threshold)
            return blt.patcher.eval()
        return ByteLM.load(file, dtype=torch.float32).eval()
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"--model {file}: expected a ByteLM in safetensors: {error}") from error


def read(source: BinaryIO) -> Iterator[bytes]:
    """The bytes of an open file in pieces."""
    while data := source.read(READ_SIZE):
        yield data


def regroup(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of exactly `size`, the last one aside."""
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
    """Bytes and their entropies in nats, fp32. The context starts anew at newlines if the model says so or is told to.

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


def find_threshold(data: bytes, entropy: Tensor, rules: Rules) -> float:
    """The threshold at which the mean patch size of bytes with entropies ``[T]`` is nearest to ``rules.target_size``.

    By bisection: a higher threshold makes no more patches, whatever the rule. Only with `max_patch_length` and
    `whole_characters` together may it make a few more; then another threshold may be nearer.
    """
    target = rules.target_size
    assert target is not None

    def size(threshold: float) -> float:
        piece = StreamCutter(replace(rules, threshold=threshold, target_size=None)).push(data, entropy)
        return len(data) / max(piece.starts.shape[0], 1)

    finite = entropy[entropy.isfinite()]
    top = float(finite.max()) + 1 if finite.numel() else 1.0
    low, high = -top, top  # rises lie between the two, and so do entropies
    for _ in range(40):
        middle = (low + high) / 2
        if size(middle) < target:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda threshold: abs(size(threshold) - target))


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
        The scheme has to see all bytes at once, and there are more than `AT_ONCE_LIMIT`.
    """
    if rules.tokenizer is not None:
        _tokenizer(rules.tokenizer)  # fails before anything is read
    if model is None:
        if rules.needs_entropy:
            raise ValueError(f"model: expected a ByteLM for --scheme {rules.scheme.value}, got None")
        if rules.scheme in AT_ONCE:
            return rules, _cut_at_once(pieces, rules, model)
        cutter = StreamCutter(rules)
        return rules, (cutter.push(piece) for piece in pieces)
    if rules.needs_entropy and model.config.reset_at_newlines:
        rules = replace(rules, reset_at_newlines=True)
    if rules.scheme in AT_ONCE:
        return rules, _cut_at_once(pieces, rules, model)
    stream = with_entropy(pieces, model, rules.reset_at_newlines or None)
    if rules.target_size is not None:
        sample, size = [], 0
        for block, entropy in stream:
            sample.append((block, entropy))
            size += len(block)
            if size >= SAMPLE_SIZE:
                break
        data = b"".join(block for block, _ in sample)
        entropies = torch.cat([entropy for _, entropy in sample] or [torch.empty(0)])
        rules = replace(rules, threshold=find_threshold(data, entropies, rules), target_size=None)
        stream = itertools.chain(sample, stream)
    elif rules.scheme is Scheme.entropy and rules.threshold is None:
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


def parse_byte(name: str, text: str) -> int:
    r"""The byte that `text` stands for: one ASCII character, an escape such as ``\n``, or two digits after ``0x``."""
    escapes = {r"\n": 10, r"\t": 9, r"\r": 13, r"\0": 0}
    if text in escapes:
        return escapes[text]
    if len(text) == 1 and text.isascii():
        return ord(text)
    if re.fullmatch("0x[0-9a-fA-F]{1,2}", text):
        return int(text, 16)
    raise ValueError(f"{name} {text!r}: expected one ASCII character, an escape such as \\n, or a byte such as 0x0A")


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Any:
    return bpe.load_tokenizer(path, "--tokenizer")


def _flag(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag} {value}"
