"""BPE patching: delimiters between the tokens of a tokenizer, as facebookresearch/blt has them."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import blt_kernels as bk
from blt_kernels import bpe
from blt_kernels.models import BLT, BLTConfig
from blt_kernels.nn import TransformerConfig
from blt_kernels.testing import assert_equal

tokenizers = pytest.importorskip("tokenizers")
models, normalizers, pre_tokenizers = tokenizers.models, tokenizers.normalizers, tokenizers.pre_tokenizers

MERGES = ["t h", "th e", "{0} the", "e n", "en d", "{0} end", "{0} {0}"]


def model(space: str, alphabet: list[str], **options: object) -> Any:
    """Return tokens: the alphabet, and "the" and "end" with and without a space in front."""
    merges = [tuple(merge.format(space).split()) for merge in MERGES]
    tokens = [*dict.fromkeys([*alphabet, *("".join(merge) for merge in merges)])]
    return models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges, **options)


def byte_level(add_prefix_space: bool = False) -> Any:
    """Return a tokenizer like those of GPT-2 and Llama 3."""
    tokenizer = tokenizers.Tokenizer(model("Ġ", sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.add_special_tokens(["<|the énd|>"])
    return tokenizer


def sentence_piece() -> Any:
    """Return one like Llama 2's: it adds a space in front, writes "▁" for spaces, and bytes where there is no piece."""
    alphabet = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁thend"]
    tokenizer = tokenizers.Tokenizer(model("▁", alphabet, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


TOKENIZERS = {
    "byte level": byte_level(),
    "byte level, space in front": byte_level(True),
    "SentencePiece": sentence_piece(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.text(max_size=20) | st.text("then dof,lir你好 ", max_size=20))
def test_tokens_spell_the_text(kind: str, text: str) -> None:
    text = text.replace("▁", "")
    tokenizer, data = TOKENIZERS[kind], text.encode()
    lengths = bpe.token_lengths(tokenizer, data)
    assert sum(lengths) == len(data)
    assert all(length > 0 for length in lengths)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert len(encoding.tokens) - 1 <= len(lengths) <= len(encoding.tokens), (
        "a space in front may be a token of its own"
    )
    if kind == "byte level":  # a space in front shifts the offsets in characters that tokenizers gives
        ends = {len(text[:end].encode()) for _, end in encoding.offsets}
        assert ends <= {0, *itertools.accumulate(lengths)}


@pytest.mark.parametrize(
    ("kind", "text", "pieces"),
    [
        ("byte level", "the end ü", [b"the", b" end", b" ", b"\xc3", b"\xbc"]),
        ("byte level", "the<|the énd|>the", [b"the", "<|the énd|>".encode(), b"the"]),
        ("byte level, space in front", "the end", [b"the", b" end"]),
        ("byte level, space in front", " the", [b" the"]),
        ("SentencePiece", "the end 你", [b"the", b" end", b" ", b"\xe4", b"\xbd", b"\xa0"]),
        ("SentencePiece", "  end", [b" ", b" end"]),
        ("SentencePiece", "A", [b"A"]),
        ("SentencePiece", "", []),
    ],
)
def test_by_hand(kind: str, text: str, pieces: list[bytes]) -> None:
    lengths = bpe.token_lengths(TOKENIZERS[kind], text.encode())
    bounds = [0, *itertools.accumulate(lengths)]
    got = [text.encode()[a:b] for a, b in itertools.pairwise(bounds)]
    assert got == pieces


def test_delimiters_in_ids(tmp_path: Path) -> None:
    """A delimiter before every token, as in facebookresearch/blt's fixture: 1 3 80 105 120 3 43 3 119 ... 2."""
    tokenizer, text = TOKENIZERS["byte level"], "the end ü"
    pieces = [b"the", b" end", b" ", b"\xc3", b"\xbc"]
    expected = [1, *itertools.chain(*([3, *(byte + 4 for byte in piece)] for piece in pieces)), 2]
    ids = bk.to_ids(text, bos=True, eos=True, tokenizer=tokenizer)
    assert ids.tolist() == expected
    assert bk.to_bytes(ids) == text.encode()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        assert_equal(bk.to_ids(text, bos=True, eos=True, tokenizer=path), ids)
    both, cu_seqlens = bk.to_ids([text.encode(), "", text], bos=True, eos=True, dtype=torch.int32, tokenizer=tokenizer)
    assert both.tolist() == [*expected, 1, 2, *expected]
    assert cu_seqlens.tolist() == [0, len(expected), len(expected) + 2, 2 * len(expected) + 2]


def test_fast_tokenizers_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["byte level"])
    assert_equal(bk.to_ids("the end ü", tokenizer=theirs), bk.to_ids("the end ü", tokenizer=TOKENIZERS["byte level"]))


def test_patches_are_tokens() -> None:
    """A patch ends with the delimiter of the token after it, as facebookresearch/blt has it."""
    layers = TransformerConfig(32, 1, 2, ffn_dim=64)
    blt = BLT(BLTConfig(layers, layers, layers, None, ngram_vocab=97, patching="bpe"))
    for text in ("the end ü", b"x", ["x"], torch.zeros(2, dtype=torch.uint8)):  # these are no delimiters
        with pytest.raises(ValueError, match=r"tokens: expected ids of `to_ids\(..., tokenizer=...\)`, .* got text"):
            blt.patch(text)
    ids = bk.to_ids("the end ü", bos=True, eos=True, tokenizer=TOKENIZERS["byte level"])
    layout = blt.patch(ids)
    patches = bk.to_bytes(ids, layout.patch_offsets)
    assert patches == [b"", b"", b"the", b" end", b" ", b"\xc3", b"\xbc"]
    assert layout.patch_lengths.tolist() == [1, 1, 4, 5, 2, 2, 2]
    assert blt(ids).shape == (len(ids), 260)


def test_errors_name_argument_value_and_expectation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    with pytest.raises(ValueError, match=r"data\[1\]: expected UTF-8 for the tokenizer, got 0xFF at byte 1"):
        bk.to_ids(["x", b"a\xff"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"data: expected 1 dimensions, got shape \[1, 1\]"):
        bk.to_ids(torch.zeros(1, 1, dtype=torch.uint8), tokenizer=tokenizer)
    with pytest.raises(TypeError, match=r"tokenizer: expected a tokenizers.Tokenizer, .* got int"):
        bk.to_ids("x", tokenizer=5)
    tokenizer.normalizer = normalizers.Lowercase()
    message = r"tokenizer: expected one whose tokens spell the text, got b'end' where the text has b'End', at byte 2"
    with pytest.raises(ValueError, match=message):
        bk.to_ids("x End", tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError, match=rf"tokenizer: expected a tokenizer.json .* found no {tmp_path}"):
        bk.to_ids("x", tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"tokenizer: expected a tokenizer.json, got {tmp_path}"):
        bk.to_ids("x", tokenizer=tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="BPE patching needs tokenizers: pip install tokenizers"):
        bk.to_ids("x", tokenizer=tmp_path)
