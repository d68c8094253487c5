"""The rules by which ``blt-kernels patch`` cuts bytes into patches: a scheme and its options."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from torch import Tensor
from typing_extensions import Doc

from blt_kernels import bpe
from blt_kernels.ids import BYTE_OFFSET, to_bytes
from blt_kernels.layout import PatchLayout
from blt_kernels.ops import entropy_patch as ops


class Scheme(str, Enum):
    """The schemes that cut bytes into patches."""

    entropy = "entropy"
    space = "space"
    static = "static"
    byte = "byte"
    delimiter = "delimiter"
    topk = "topk"
    bpe = "bpe"


# These schemes need all bytes at once; the word says why.
AT_ONCE = {Scheme.topk: "ranks", Scheme.bpe: "tokenizes"}
ENTROPY_SCHEMES = (Scheme.entropy, Scheme.topk)
# The schemes that an option is for. The others raise an error for it.
_OPTIONS = {
    **dict.fromkeys(("threshold", "target_size", "threshold_add", "monotonic", "max_patch_length"), (Scheme.entropy,)),
    "patch_size": (Scheme.static, Scheme.topk),
    "delimiter": (Scheme.delimiter,),
    "reset_at_newlines": ENTROPY_SCHEMES,
    "tokenizer": (Scheme.bpe,),
}


@dataclass(frozen=True)
class Rules:
    """Holds a scheme and its options. Thresholds are in nats, sizes in bytes; None is the default.

    Raises
    ------
    ValueError
        An option is out of range, or is not for this scheme; the message names it as on the command line.
    """

    scheme: Annotated[Scheme, Doc("How bytes are cut.")] = Scheme.entropy
    threshold: Annotated[float | None, Doc("Nats above which a patch starts; the model's own if not given.")] = None
    target_size: Annotated[
        float | None, Doc("Find the threshold that makes patches of this many bytes on average.")
    ] = None
    monotonic: Annotated[bool, Doc("Compare the rise of the entropy.")] = False
    threshold_add: Annotated[float | None, Doc("Nats that the entropy must rise by as well.")] = None
    max_patch_length: Annotated[int | None, Doc("Cut longer patches, in bytes.")] = None
    patch_size: Annotated[int | None, Doc("Bytes, for static and topk; 4 if not given.")] = None
    delimiter: int | None = None
    whole_characters: Annotated[
        bool, Doc("Start no patch inside of a UTF-8 character, but for the second byte of a file.")
    ] = False
    reset_at_newlines: Annotated[bool, Doc("Start the context of the entropy model anew at every newline.")] = False
    tokenizer: Annotated[Path | None, Doc("For bpe: a tokenizer.json, or a directory with one.")] = None

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
        """True if the scheme reads entropies."""
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
            lengths = bpe.token_lengths(load_tokenizer(self.tokenizer), data, "--scheme bpe", "--tokenizer")
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
        """Return the options that are set, as a JSON object."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["tokenizer"] = None if self.tokenizer is None else str(self.tokenizer)
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def describe(self) -> str:
        """Return the rule in words."""
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


def parse_byte(name: str, text: str) -> int:
    r"""Return the byte that `text` stands for: one ASCII character, an escape such as ``\n``, or ``0x`` and digits."""
    escapes = {r"\n": 10, r"\t": 9, r"\r": 13, r"\0": 0}
    if text in escapes:
        return escapes[text]
    if len(text) == 1 and text.isascii():
        return ord(text)
    if re.fullmatch("0x[0-9a-fA-F]{1,2}", text):
        return int(text, 16)
    raise ValueError(f"{name} {text!r}: expected one ASCII character, an escape such as \\n, or a byte such as 0x0A")


@functools.lru_cache(maxsize=1)
def load_tokenizer(path: Path) -> Any:
    """Load a tokenizer, once for all files of a call."""
    return bpe.load_tokenizer(path, "--tokenizer")


def _flag(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag} {value}"
