"""Finds the lengths in bytes of a BPE tokenizer's tokens. It needs tokenizers, a dependency of transformers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from blt_kernels._files import LIST_BYTES, shortened


def load_tokenizer(path: str | os.PathLike[str], option: str = "tokenizer") -> Any:
    """The tokenizer in a ``tokenizer.json``, or in a directory that has one. Messages call the path `option`.

    Raises
    ------
    ImportError
        tokenizers is not installed.
    FileNotFoundError, ValueError
        There is no such file, or it holds no tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError("BPE patching needs tokenizers: pip install tokenizers") from None
    file = Path(path, "tokenizer.json") if os.path.isdir(path) else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{option}: expected a tokenizer.json or a directory with one, found no {file}")
    if file.stat().st_size > LIST_BYTES // 4:
        raise ValueError(f"{option}: expected at most {LIST_BYTES // 4:,} bytes in {file}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # what tokenizers raises has no class of its own
        reason = shortened(str(error))[1:-1]
        raise ValueError(f"{option}: expected a tokenizer.json, got {file}: {reason}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_lengths(tokenizer: Any, data: bytes, name: str = "data", option: str = "tokenizer") -> list[int]:
    """Lengths in bytes of the tokens that `data` is made of; they sum to its length.

    They are exact: the tokens are spelled out, in the alphabet of byte-level BPE or in that of SentencePiece with byte
    fallback, and compared with the data. A space that the tokenizer puts before the text is no part of the first token.

    Parameters
    ----------
    tokenizer
        A ``tokenizers.Tokenizer``, a fast tokenizer of transformers, or the path of a ``tokenizer.json``.
    data : bytes
        UTF-8.
    name, option : str
        What messages call the data and the tokenizer.

    Raises
    ------
    ImportError, FileNotFoundError
        As in `load_tokenizer`.
    TypeError
        `tokenizer` is none of these.
    ValueError
        The data is no UTF-8, or the tokens do not spell it: the tokenizer changes the text, as one does that lowers its
        case, or has no token for some of it.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer, option)
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(tokenizer, "get_added_tokens_decoder"):
        kinds = "a tokenizers.Tokenizer, a fast tokenizer of transformers or the path of a tokenizer.json"
        raise TypeError(f"{option}: expected {kinds}, got {type(tokenizer).__name__}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        where = f"0x{data[error.start]:02X} at byte {error.start}"
        raise ValueError(f"{name}: expected UTF-8 for the tokenizer, got {where}") from None
    encoding = tokenizer.encode(text, add_special_tokens=False)
    added = {id: token.content.encode() for id, token in tokenizer.get_added_tokens_decoder().items()}
    attempts = []
    for spell in (_spell_byte_level, _spell_sentence_piece):
        pieces = [spell(token, added.get(id)) for token, id in zip(encoding.tokens, encoding.ids, strict=True)]
        spelled = b"".join(pieces)
        if spelled[:1] == b" " and len(spelled) == len(data) + 1:  # one that the tokenizer puts in front
            pieces[0], spelled = pieces[0][1:], spelled[1:]
        if spelled == data:
            return [len(piece) for piece in pieces if piece]
        attempts.append((_first_difference(spelled, data), spelled))
    at, spelled = max(attempts)
    there = f"{spelled[at : at + 8]!r} where the text has {data[at : at + 8]!r}, at byte {at}"
    raise ValueError(f"{option}: expected one whose tokens spell the text, got {there}")


def _first_difference(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE: itself if it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _alphabet()


def _spell_byte_level(token: str, added: bytes | None) -> bytes:
    if added is not None:
        return added
    return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in token)


def _spell_sentence_piece(token: str, added: bytes | None) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode() if added is None else added
