"""Patches of whole UTF-8 characters, and entropy contexts that start anew at newlines, against plain Python."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import blt_kernels as bk
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig
from blt_kernels.models.characters import character_ends, whole_characters
from blt_kernels.nn import TransformerConfig
from blt_kernels.testing import SCRIPTS, assert_equal, binary, invalid_utf8, offsets_of, real_text

TEXT = "".join(SCRIPTS.values())


def ends_of(tokens: list[int]) -> list[bool]:
    """Return after which ids Python's decoder expects no more bytes."""
    held, ends = b"", []
    for token in tokens:
        held = b"" if token < 4 else held + bytes([token - 4])
        while held:
            try:
                held = held.decode()[:0].encode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                held = held[error.end :]
        ends.append(not held)
    return ends


def starts_of(tokens: list[int], wanted: list[bool], longest: int | None = None) -> list[int]:
    """Return starts of a document's patches, one byte at a time."""
    ends = ends_of(tokens)
    starts, begin, last_end = [0], 0, 0
    for i in range(len(tokens)):
        if i == 0 or (wanted[i] and ends[i]):
            starts.append(i + 1)
            begin = i + 1
        elif ends[i] and longest and any((at - begin) % longest == 0 for at in range(last_end + 1, i + 2)):
            starts.append(i + 1)
        if i == 0 or ends[i]:
            last_end = i + 1
    return oracle.within(set(starts), len(tokens))


# These are bytes on both sides of every limit, and special ids.
BYTES = [0x0A, 0x61, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE4, 0xED, 0xEF]
BYTES += [0xF0, 0xF3, 0xF4, 0xF5, 0xFF]
IDS = st.sampled_from([0, 1, 2, 3, *(byte + 4 for byte in BYTES)])
TOKENS = st.lists(IDS | st.integers(0, 259), max_size=12) | st.text(max_size=6).map(lambda s: bk.to_ids(s).tolist())
DOCUMENTS = st.lists(TOKENS, max_size=4)


def packed(documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(list(itertools.chain(*documents)), dtype=torch.int64)
    return ids, offsets_of([len(document) for document in documents])


@given(DOCUMENTS)
def test_characters_end_where_a_decoder_expects_no_more(documents: list[list[int]]) -> None:
    ids, rows = packed(documents)
    expected = list(itertools.chain(*(ends_of(document) for document in documents)))
    assert character_ends(ids, rows).tolist() == expected
    assert character_ends(ids.int(), rows).tolist() == expected


def test_every_beginning_of_a_character() -> None:
    """All pairs of bytes agree, and so do their continuations of three and four bytes."""
    edges = [0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xE4, 0xFF]
    sequences = [[a, b] for a in range(256) for b in range(256)]
    sequences += [[a, b, c, d] for a in range(0xE0, 256) for b in edges for c in edges for d in (0x80, 0x41, 0xE4)]
    documents = [[byte + 4 for byte in sequence] for sequence in sequences]
    ends = character_ends(*packed(documents)).tolist()
    assert ends == list(itertools.chain(*map(ends_of, documents)))


@pytest.mark.slow
@given(DOCUMENTS, st.none() | st.integers(1, 9) | st.just((1 << 63) - 1), st.integers(0, 9))
def test_whole_characters(documents: list[list[int]], longest: int | None, seed: int) -> None:
    ids, rows = packed(documents)
    wanted = torch.rand(ids.shape[0], generator=torch.Generator().manual_seed(seed)) < 0.3
    got = whole_characters(wanted, ids, rows, longest)
    for document, start, end in zip(documents, rows[:-1].tolist(), rows[1:].tolist(), strict=True):
        expected = starts_of(document, wanted[start:end].tolist(), longest)
        assert [0, *((i + 1) for i in got[start:end].nonzero().flatten().tolist())] == (expected or [0])
        alone = whole_characters(wanted[start:end], ids[start:end], offsets_of([end - start]), longest)
        assert_equal(alone, got[start:end])
        for size in range(end - start):  # a decision needs no later byte
            prefix = slice(start, start + size)
            assert_equal(whole_characters(wanted[prefix], ids[prefix], offsets_of([size]), longest), got[prefix])


@given(st.text(max_size=30), st.integers(1, 9), st.integers(0, 9))
def test_patches_of_text(text: str, longest: int, seed: int) -> None:
    ids = bk.to_ids("." + text)
    wanted = torch.rand(ids.shape[0], generator=torch.Generator().manual_seed(seed)) < 0.2
    got = whole_characters(wanted, ids, offsets_of([ids.shape[0]]), longest)
    starts = [0, *(i + 1 for i in got.nonzero().flatten().tolist() if i + 1 < ids.shape[0]), ids.shape[0]]
    patches = [bk.to_bytes(ids[a:b]).decode() for a, b in itertools.pairwise(starts)]  # each of them is text
    assert "".join(patches) == "." + text
    assert all(len(patch.encode()) <= longest + 3 for patch in patches)
    if text.isascii():
        plain = bk.patch_starts(wanted.float(), threshold=0.5, max_patch_length=longest)
        assert_equal(bk.patch_starts(got.float(), threshold=0.5), plain)


# --- models -----------------------------------------------------------------------------------------------------------

LAYERS = TransformerConfig(32, 1, 2, ffn_dim=64, window=8)
BYTE_LM = ByteLMConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=64, window=8, threshold=5.1)
BASE = BLTConfig(LAYERS, LAYERS, LAYERS, BYTE_LM, ngram_vocab=97, threshold=5.1, whole_characters=True)
CONFIGS = {
    "entropy": BASE,
    "entropy, monotonic": dataclasses.replace(BASE, threshold=0.0, monotonic=True),
    "entropy, both": dataclasses.replace(BASE, threshold=5.0, threshold_add=0.0),
    "entropy, capped": dataclasses.replace(BASE, threshold=5.2, max_patch_length=5),
    "entropy, newlines": dataclasses.replace(BASE, reset_at_newlines=True),
    "space": dataclasses.replace(BASE, patching="space", patcher=None),
    "space, capped": dataclasses.replace(BASE, patching="space", patcher=None, max_patch_length=2),
    "static": dataclasses.replace(BASE, patching="static", patch_size=3, patcher=None),
    "byte": dataclasses.replace(BASE, patching="byte", patcher=None),
    "bpe": dataclasses.replace(BASE, patching="bpe", patcher=None),
}
LINES = [line.encode() for line in SCRIPTS.values()]


def blt(config: BLTConfig, ops: str = "fused") -> BLT:
    torch.manual_seed(0)
    return BLT(config, ops).double()


def offsets(layout: bk.PatchLayout) -> list[int]:
    return layout.compact().patch_offsets[:-1].tolist()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_scheme_keeps_characters_whole(config: BLTConfig) -> None:
    plain, whole = blt(dataclasses.replace(config, whole_characters=False, max_patch_length=None)), blt(config)
    documents = [*LINES, invalid_utf8(300), binary(200), b"", b"\xe4", TEXT.encode(), real_text(300)]
    ids, rows = bk.to_ids(documents, bos=True, eos=True)
    if config.patching == "bpe":
        ids[torch.arange(len(ids)) % 7 == 2] = 3  # some are inside of characters
    layout = whole.patch(ids, rows)
    assert_equal(blt(config, "reference").patch(ids, rows), layout)
    base = plain.patch(ids, rows)
    wanted = base.decode_ids == base.patch_ids
    sizes = rows.diff().tolist()
    starts = [
        starts_of(document.tolist(), marks.tolist(), config.max_patch_length)
        for document, marks in zip(ids.split(sizes), wanted.split(sizes), strict=True)
    ]
    for name, expected in oracle.layout_of(starts, sizes, layout.capacity).items():
        assert getattr(layout, name).tolist() == expected, name
    for document, starts_of_row, row in zip(documents, starts, ids.split(sizes), strict=True):
        assert [s for s in starts_of_row if s < len(row)] == offsets(whole.patch(row)), document
        assert_equal(whole.patch(row[None]), whole.patch(row))
    same = torch.stack([row[:16] for row in ids.split(sizes) if len(row) >= 16])
    assert_equal(whole.patch(same), whole.patch(same.flatten(), offsets_of([16] * len(same))))
    room = len(sizes) + 5  # this is too little
    assert whole.patch(ids, rows, max_patches=room).capacity == room


def test_whole_characters_of_an_entropy_model() -> None:
    model, config = blt(BASE).patcher, BASE
    assert model is not None
    assert_equal(model.patch(TEXT, whole_characters=True)[1].compact(), blt(config).patch(TEXT))
    _, layout = model.patch(TEXT, threshold=0.0, whole_characters=True)  # all starts that may be are there
    bounds = [*offsets(layout), len(TEXT.encode())]
    assert [TEXT.encode()[a:b].decode() for a, b in itertools.pairwise(bounds)] == list(TEXT)


@pytest.mark.slow
def test_compiled_without_a_graph_break() -> None:
    model = blt(CONFIGS["space, capped"])
    compiled = torch.compile(model.patch, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (200, 331):
        ids = bk.to_ids(TEXT.encode()[:size])
        assert_equal(compiled(ids).compact(), model.patch(ids))


def test_max_patch_length_is_checked() -> None:
    model = blt(BASE).patcher
    assert model is not None
    for longest, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="max_patch_length: expected"):
            model.patch("text", whole_characters=True, max_patch_length=longest)


def test_nothing_waits_for_the_device() -> None:
    """A read of a value would fail on the meta device."""
    with torch.device("meta"):
        boundaries, ids = torch.empty(9, dtype=torch.bool), torch.empty(9, dtype=torch.int64)
        rows = torch.empty(3, dtype=torch.int32)
    assert whole_characters(boundaries, ids, rows, 4).shape == (9,)


# --- newlines ---------------------------------------------------------------------------------------------------------


def contexts(data: bytes) -> list[bytes]:
    """Return the contexts of the entropy model: each newline begins one."""
    head, *lines = data.split(b"\n")
    return [head, *(b"\n" + line for line in lines)]


@pytest.mark.parametrize("data", [real_text(600), b"\n\n\na\n", b"no newline", b"\n", b""], ids=len)
@pytest.mark.parametrize("ops", ["fused", "reference"])
def test_context_starts_anew_at_newlines(data: bytes, ops: str) -> None:
    torch.manual_seed(0)
    model = ByteLM(dataclasses.replace(BYTE_LM, reset_at_newlines=True), ops).double()
    logits = model(bk.to_ids(data))
    alone = [model(bk.to_ids(line)) for line in contexts(data)]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-12)
    plain = ByteLM(BYTE_LM, ops).double()
    plain.load_state_dict(model.state_dict())
    for kind in (logits, plain(bk.to_ids(data), reset_at_newlines=True)):
        assert_equal(kind, logits)
    assert_equal(plain(bk.to_ids(data)), model(bk.to_ids(data), reset_at_newlines=False))
    if len(data) > 99:
        assert not torch.allclose(plain(bk.to_ids(data)), logits)


@pytest.mark.parametrize("split_documents", [False, True])
def test_newlines_in_packed_and_padded_rows(split_documents: bool) -> None:
    torch.manual_seed(0)
    model = ByteLM(dataclasses.replace(BYTE_LM, reset_at_newlines=True, split_documents=split_documents)).double()
    documents = ["a\nbc", "", "\n", "line\n\nline", "x"]
    ids, rows = bk.to_ids(documents, eos=True)
    expected = torch.cat([model(bk.to_ids(document, eos=True)) for document in documents])
    torch.testing.assert_close(model(ids, rows), expected, rtol=0, atol=1e-12)
    together = model(ids)  # EOS ends a context only with split_documents
    alone = torch.cat([model(bk.to_ids(document, eos=True)) for document in documents])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12) == split_documents
    padded = torch.stack([bk.to_ids("ab\ncd"), bk.to_ids("\nefgh")])
    expected = torch.stack([model(row) for row in padded])
    torch.testing.assert_close(model(padded), expected, rtol=0, atol=1e-12)


def test_newlines_of_a_blt() -> None:
    """The option of the BLT resets the entropy model only, as that of the entropy model does."""
    data = real_text(600)
    plain, own = BASE, dataclasses.replace(BASE, reset_at_newlines=True)
    inner = dataclasses.replace(BASE, patcher=dataclasses.replace(BYTE_LM, reset_at_newlines=True))
    models: dict[str, Any] = {"plain": blt(plain), "own": blt(own), "inner": blt(inner)}
    layouts = {name: model.patch(data) for name, model in models.items()}
    assert offsets(layouts["own"]) == offsets(layouts["inner"]) != offsets(layouts["plain"])
    ids = bk.to_ids(data)
    assert_equal(*(models[name](ids, layout=layouts["plain"]) for name in ("plain", "own")))
    for name in ("own", "inner"):
        assert BLT.from_values(dataclasses.asdict(models[name].config)).config == models[name].config
