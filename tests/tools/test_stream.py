"""Streams cut piece by piece against the ops on the whole of them."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import blt_kernels as bk
from blt_kernels.cli.patch import stream
from blt_kernels.cli.patch.rules import Rules, Scheme, parse_byte
from blt_kernels.cli.patch.stream import StreamCutter, cut, threshold_for_target
from blt_kernels.models import ByteLM
from blt_kernels.models.characters import patches_of_whole_characters
from blt_kernels.models.config import ByteLMConfig
from blt_kernels.testing import SCRIPTS, assert_equal, binary, invalid_utf8, real_text

RULES = {
    "entropy": Rules(threshold=1.0),
    "entropy, capped": Rules(threshold=2.0, max_patch_length=3),
    "both": Rules(threshold=0.5, threshold_add=0.25),
    "both, capped": Rules(threshold=1.5, threshold_add=0.5, max_patch_length=5),
    "monotonic": Rules(threshold=0.75, monotonic=True),
    "monotonic, capped": Rules(threshold=2.5, monotonic=True, max_patch_length=2),
    "space": Rules(Scheme.space),
    "static, default": Rules(Scheme.static),
    "static 1": Rules(Scheme.static, patch_size=1),
    "static 3": Rules(Scheme.static, patch_size=3),
    "static 7": Rules(Scheme.static, patch_size=7),
    "static, huge": Rules(Scheme.static, patch_size=(1 << 31) - 1),
    "byte": Rules(Scheme.byte),
    "delimiter, default": Rules(Scheme.delimiter),
    "delimiter, space": Rules(Scheme.delimiter, delimiter=32),
    "delimiter 0": Rules(Scheme.delimiter, delimiter=0),
    "delimiter 255": Rules(Scheme.delimiter, delimiter=255),
}
RULES |= {
    f"{name}, whole characters": replace(RULES[name], whole_characters=True)
    for name in ("entropy", "both, capped", "monotonic, capped", "space", "static 3", "byte", "delimiter 255")
}
TINY = ByteLMConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=64, window=16)


def whole(rules: Rules, data: bytes, entropy: Tensor) -> list[int]:
    """Return starts of the patches by the public ops."""
    tokens, everything = bk.to_ids(data), torch.tensor([0, len(data)])
    if rules.scheme is Scheme.entropy:
        assert rules.threshold is not None
        layout = bk.patch_starts(
            entropy,
            threshold=rules.threshold,
            threshold_add=rules.threshold_add,
            monotonic=rules.monotonic,
            max_patch_length=None if rules.whole_characters else rules.max_patch_length,
        )
    elif rules.scheme is Scheme.space:
        layout = bk.space_patch(tokens)
    elif rules.scheme is Scheme.static:
        layout = bk.static_patch(everything, rules.patch_size or 4)
    elif rules.scheme is Scheme.byte:
        layout = bk.byte_patch(everything)
    else:
        layout = bk.delimiter_patch(tokens, (10 if rules.delimiter is None else rules.delimiter) + 4)
    if rules.whole_characters:
        layout = patches_of_whole_characters(layout, tokens, rules.max_patch_length)
    return offsets(layout)


def pieced(rules: Rules, data: bytes, entropy: Tensor, sizes: list[int]) -> list[int]:
    """Return starts of the patches when the stream comes in pieces of `sizes`, over and over."""
    cutter, at, starts = StreamCutter(rules), 0, []
    for size in itertools.cycle(sizes):
        piece = cutter.push(data[at : at + size], entropy[at : at + size])
        assert piece.offset == at
        assert piece.data == data[at : at + size]
        starts += piece.starts.tolist()
        at += size
        if at >= len(data):
            return starts


# The rules tell these bytes apart: letters, spaces, first and later bytes of UTF-8, delimiters. Entropies are few, so
# equal neighbours and thresholds that are hit exactly are frequent.
BYTES = st.lists(st.sampled_from([*b"ab .\n", 0, 0x80, 0xC3, 0xE4, 0xBD, 0xF0, 0xFF]), max_size=40).map(bytes)
BYTES |= st.text("ab .\né你🙂", max_size=20).map(str.encode)
LEVELS = st.sampled_from([0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.5])


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@given(data=BYTES, sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), more=st.data())
def test_pieces_make_the_whole(rules: Rules, data: bytes, sizes: list[int], more: st.DataObject) -> None:
    entropy = torch.tensor(more.draw(st.lists(LEVELS, min_size=len(data), max_size=len(data))))
    assert pieced(rules, data, entropy, sizes) == whole(rules, data, entropy)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 500])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_pieces_make_the_whole_on_every_kind_of_bytes(rules: Rules, size: int) -> None:
    data = real_text(200) + "".join(SCRIPTS.values()).encode()[:300] + invalid_utf8(150) + binary(150)
    entropy = torch.rand(len(data), generator=torch.Generator().manual_seed(0)) * 4
    starts = whole(rules, data, entropy)
    assert starts[0] == 0
    assert pieced(rules, data, entropy, [size]) == starts


def test_topk_needs_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules(Scheme.topk, patch_size=5)
    with pytest.raises(ValueError, match="--scheme topk: ranks all bytes at once"):
        StreamCutter(rules)
    model, data = tiny_model(), real_text(3000)
    pieces = list(cut(split(data, 700), rules, model)[1])
    starts = bk.topk_patch(entropy_of(data, model), 5).compact().patch_offsets[:-1]
    assert_equal(torch.cat([piece.starts for piece in pieces]), starts.long())
    monkeypatch.setattr(stream, "AT_ONCE_LIMIT", 2999)
    with pytest.raises(ValueError, match=r"--scheme topk: .* expected at most 2999 bytes, got more"):
        list(cut(split(data, 700), rules, model)[1])


def test_bpe_needs_everything(tmp_path: Path) -> None:
    """A tokenizer of single bytes, apart from the three of one character and a word."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("ä", "½"), ("ä½", "ł"), ("a", "b")]
    tokens = [*alphabet, *("".join(merge) for merge in merges)]
    model = tokenizers.models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rules, data = Rules(Scheme.bpe, tokenizer=tmp_path), "abab 你é".encode()
    for whole, expected in ((False, [0, 1, 2, 4, 5, 8, 9]), (True, [0, 1, 2, 4, 5, 8])):  # 1 is always a start
        used, pieces = cut(split(data, 2), replace(rules, whole_characters=whole))
        assert torch.cat([piece.starts for piece in pieces]).tolist() == expected
    assert used.record() == {"scheme": "bpe", "whole_characters": True, "tokenizer": str(tmp_path)}
    assert used.describe() == f"tokens of {tmp_path}, whole characters"
    model = tiny_model()
    (piece,) = cut(split(data, 2), rules, model)[1]  # entropies are asked for
    assert_equal(piece.entropy, entropy_of(data, model))
    assert [p.starts.tolist() for p in cut([], rules)[1]] == [[]]
    with pytest.raises(
        ValueError, match="--scheme bpe: tokenizes all bytes at once, so it cannot be cut piece by piece"
    ):
        StreamCutter(rules)
    with pytest.raises(ValueError, match="--scheme bpe: expected UTF-8 for the tokenizer, got 0xFF at byte 1"):
        list(cut([b"a\xff"], rules)[1])
    with pytest.raises(FileNotFoundError, match=r"--tokenizer: expected a tokenizer\.json or a directory with one"):
        cut([], replace(rules, tokenizer=tmp_path / "none"))


def test_topk_of_whole_characters() -> None:
    model, data = tiny_model(), "".join(SCRIPTS.values()).encode()
    entropy = entropy_of(data, model)
    (piece,) = cut([data], Rules(Scheme.topk, patch_size=3, whole_characters=True), model)[1]
    layout = patches_of_whole_characters(bk.topk_patch(entropy, 3), bk.to_ids(data))
    assert piece.starts.tolist() == offsets(layout)


# --- entropies --------------------------------------------------------------------------------------------------------


def tiny_model() -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(TINY).eval()


def split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def offsets(layout: bk.PatchLayout) -> list[int]:
    return layout.compact().patch_offsets[:-1].tolist()


def entropy_of(data: bytes, model: ByteLM) -> Tensor:
    return torch.cat([entropy for _, entropy in stream.with_entropy([data], model)])


def test_entropies_of_a_stream_are_those_of_the_whole() -> None:
    model, data = tiny_model(), real_text(5000)  # the text has two full blocks and a rest
    with torch.inference_mode():
        expected = bk.token_entropy(model(bk.to_ids(data)))
    got = entropy_of(data, model)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for size in (1, 999, 2048):  # they agree to the last bit, or boundaries would depend on the source
        blocks = list(stream.with_entropy(split(data, size), model))
        assert b"".join(block for block, _ in blocks) == data
        assert_equal(torch.cat([entropy for _, entropy in blocks]), got)


def test_contexts_that_start_anew_at_newlines() -> None:
    """Over the edges of blocks, and to the last bit however the source is split; patches are those of the model."""
    model, data = tiny_model().double(), real_text(5000) + b"x" * 2000 + b"\n\n" + real_text(900)
    fresh = ByteLM(replace(model.config, reset_at_newlines=True)).double()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        expected, layout = fresh.patch(data, threshold=5.2)
    entropy = torch.cat([entropy for _, entropy in stream.with_entropy([data], fresh)])
    torch.testing.assert_close(entropy, expected.float(), rtol=1e-6, atol=0)
    assert not torch.allclose(entropy, entropy_of(data, model), atol=1e-3)
    for size in (1, 999, 2048, 9000):
        for patcher, rules in ((fresh, Rules(threshold=5.2)), (model, Rules(threshold=5.2, reset_at_newlines=True))):
            used, pieces = cut(split(data, size), rules, patcher)
            pieces = list(pieces)
            assert_equal(torch.cat([piece.entropy for piece in pieces]), entropy)
            assert torch.cat([piece.starts for piece in pieces]).tolist() == offsets(layout)
            assert used.reset_at_newlines
    assert "context anew at newlines" in used.describe()


def test_a_model_without_a_window_cannot_stream() -> None:
    model = ByteLM(ByteLMConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=64, window=None))
    with pytest.raises(ValueError, match="--model: expected a model with an attention window"):
        list(stream.with_entropy([b"x"], model))


def test_cut_fills_in_the_threshold() -> None:
    model, data = tiny_model(), real_text(4000)
    used, pieces = cut([data], Rules(), model)
    assert used.threshold == model.config.threshold
    used, pieces = cut(split(data, 100), Rules(target_size=3.0), model)
    starts = torch.cat([piece.starts for piece in pieces])
    assert used.target_size is None
    assert starts.tolist() == whole(used, data, entropy_of(data, model))
    assert abs(len(data) / len(starts) - 3.0) < 0.05
    with pytest.raises(ValueError, match="expected a ByteLM for --scheme entropy"):
        cut([data], Rules())


@given(
    st.lists(st.floats(0, 5.5, width=32), max_size=30),
    st.floats(1, 12),
    st.sampled_from(
        [
            Rules(),
            Rules(monotonic=True),
            Rules(threshold_add=0.5),
            Rules(max_patch_length=3),
            Rules(whole_characters=True),
        ]
    ),
)
def test_found_threshold_is_the_nearest(values: list[float], target: float, rules: Rules) -> None:
    entropy = torch.tensor(values, dtype=torch.float32)
    data = ("aé你🙂" * len(values)).encode()[: len(values)]

    def miss(threshold: float) -> float:
        starts = whole(replace(rules, threshold=threshold), data, entropy)
        return abs(len(values) / max(len(starts), 1) - target)

    found = threshold_for_target(data, entropy, replace(rules, target_size=target))
    rises = [b - a for a, b in itertools.pairwise(entropy.tolist())]
    assert miss(found) <= min(map(miss, [-6.0, 6.0, *entropy.tolist(), *rises])) + 1e-9


# --- the rest ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=9), max_size=8), st.integers(1, 7))
def test_regroup(pieces: list[bytes], size: int) -> None:
    groups = list(stream.regroup(pieces, size))
    assert b"".join(groups) == b"".join(pieces)
    assert all(len(group) == size for group in groups[:-1])
    assert all(0 < len(group) <= size for group in groups)


def test_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "READ_SIZE", 4)
    assert list(stream.read(io.BytesIO(b"0123456789"))) == [b"0123", b"4567", b"89"]
    assert list(stream.read(io.BytesIO(b""))) == []


@pytest.mark.parametrize(
    ("text", "byte"),
    [(",", 44), (" ", 32), ("\n", 10), (r"\n", 10), (r"\t", 9), (r"\r", 13), (r"\0", 0), ("0x0A", 10), ("0xff", 255)],
)
def test_parse_byte(text: str, byte: int) -> None:
    assert parse_byte("--delimiter", text) == byte


@pytest.mark.parametrize("text", ["", "ab", "é", "0x", "0x100", "0xg1", r"\q", "10"])
def test_parse_byte_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="expected one ASCII character") as caught:
        parse_byte("--delimiter", text)
    assert f"--delimiter {text!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["threshold", "threshold_add"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_thresholds_are_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}: expected a finite number of nats"):
        Rules(**{name: value})
