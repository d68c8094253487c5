"""Bytes to ids and back, and models that take text."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import build

import blt_kernels as bk
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig
from blt_kernels.nn import TransformerConfig, positions
from blt_kernels.testing import SCRIPTS, assert_equal

TEXT = "".join(SCRIPTS.values()) + "\0"
DATA = TEXT.encode()
IDS = [byte + 4 for byte in DATA]
KINDS = {
    "str": TEXT,
    "bytes": DATA,
    "bytearray": bytearray(DATA),
    "memoryview": memoryview(DATA),
    "array": array.array("B", DATA),
    "numpy": np.frombuffer(DATA, np.uint8),
    "numpy, every other byte": np.repeat(np.frombuffer(DATA, np.uint8), 2)[::2],
    "tensor": torch.tensor(list(DATA), dtype=torch.uint8),
    "tensor, every other byte": torch.tensor(list(DATA), dtype=torch.uint8).repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_kind_of_text(data: Any, dtype: torch.dtype) -> None:
    expected = torch.tensor(IDS, dtype=dtype)
    assert_equal(bk.to_ids(data, dtype=dtype), expected)
    both = torch.tensor([1, *IDS, 2], dtype=dtype)
    assert_equal(bk.to_ids(data, bos=True, eos=True, dtype=dtype), both)
    assert_equal(bk.to_ids(data, bos=True, dtype=dtype), both[:-1])
    assert_equal(bk.to_ids(data, eos=True, dtype=dtype), both[1:])
    documents = [data, b"", data, "x"]
    packed, cu_seqlens = bk.to_ids(documents, eos=True, dtype=dtype)
    assert_equal(packed, torch.tensor([*IDS, 2, 2, *IDS, 2, 124, 2], dtype=dtype))
    size = len(IDS) + 1
    assert_equal(cu_seqlens, torch.tensor([0, size, size + 1, 2 * size + 1, 2 * size + 3], dtype=torch.int32))
    assert_equal(bk.to_ids(tuple(documents), eos=True, dtype=dtype), (packed, cu_seqlens))
    assert bk.to_bytes(packed, cu_seqlens) == [DATA, b"", DATA, b"x"]


@given(st.lists(st.binary(max_size=9), max_size=5), st.booleans(), st.booleans())
def test_round_trip(documents: list[bytes], bos: bool, eos: bool) -> None:
    packed, cu_seqlens = bk.to_ids(documents, bos=bos, eos=eos)
    assert cu_seqlens.diff().tolist() == [len(document) + bos + eos for document in documents]
    assert bk.to_bytes(packed, cu_seqlens) == documents
    assert bk.to_bytes(packed) == b"".join(documents)
    for document in documents:
        assert bk.to_bytes(bk.to_ids(document, bos=bos, eos=eos)) == document


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_padded(kind: Any) -> None:
    rows = kind([[0, 65, 255], [66, 1, 2]], dtype={np.array: np.uint8, torch.tensor: torch.uint8}[kind])
    assert_equal(bk.to_ids(rows), torch.tensor([[4, 69, 259], [70, 5, 6]]))
    assert_equal(bk.to_ids(rows, bos=True, eos=True), torch.tensor([[1, 4, 69, 259, 2], [1, 70, 5, 6, 2]]))
    assert bk.to_bytes(bk.to_ids(rows, bos=True)) == [b"\0A\xff", b"B\1\2"]


def test_nothing() -> None:
    for empty in ("", b"", bytearray(), np.empty(0, np.uint8), torch.empty(0, dtype=torch.uint8)):
        assert_equal(bk.to_ids(empty), torch.empty(0, dtype=torch.int64))
    assert_equal(bk.to_ids([]), (torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)))
    assert_equal(bk.to_ids(np.empty((2, 0), np.uint8), eos=True), torch.full((2, 1), 2))
    assert bk.to_bytes([]) == b""
    assert bk.to_bytes(torch.empty(2, 0, dtype=torch.int32)) == [b"", b""]
    assert bk.to_bytes(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)) == []


def test_ids_do_not_share_the_memory_of_text() -> None:
    data = bytearray(b"ab")
    out = bk.to_ids(data)
    data[0] = 0
    assert out.tolist() == [101, 102]


def test_device() -> None:
    assert bk.to_ids("ab", device="meta").device.type == "meta"
    assert bk.to_ids(torch.empty(3, dtype=torch.uint8, device="meta"), bos=True).device.type == "meta"
    assert all(x.device.type == "meta" for x in bk.to_ids(["ab"], device="meta"))
    assert all(x.device.type == "meta" for x in bk.to_ids([], device="meta"))


def test_special_ids_are_dropped_or_refused() -> None:
    tokens = torch.tensor([1, 69, 3, 70, 2, -100, 0])
    assert bk.to_bytes(tokens) == b"AB"
    assert bk.to_bytes(tokens, torch.tensor([0, 3, 5])) == [b"A", b"B"], "ids beyond the last document are left out"
    assert bk.to_bytes(torch.tensor([69, 70]), special="raise") == b"AB"
    with pytest.raises(
        ValueError, match=r"ids: expected values from 4 to 259, since special is 'raise', got 3 at pos.* 1"
    ):
        bk.to_bytes(torch.tensor([69, 3]), special="raise")
    for special in ("drop", "raise"):
        with pytest.raises(ValueError, match=r"ids: .*, got 260 at position 1"):
            bk.to_bytes([69, 260], special=special)
    assert bk.to_bytes(torch.tensor([69, 260]), torch.tensor([0, 1])) == [b"A"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bk.to_ids(5),
            TypeError,
            "data: expected a str, bytes, a uint8 array or tensor, or a list of them, got int",
        ),
        (lambda: bk.to_ids([1, 2]), TypeError, r"data\[0\]: expected a str, bytes, a uint8 array or tensor, got int"),
        (lambda: bk.to_ids(["a", ["b"]]), TypeError, r"data\[1\]: expected a str, .*, got list"),
        (lambda: bk.to_ids(torch.tensor([1])), TypeError, "data: expected text of dtype uint8, got torch.int64"),
        (
            lambda: bk.to_ids(np.array([1])),
            TypeError,
            r"data: expected unsigned bytes \(uint8\), got a buffer of format 'l'",
        ),
        (lambda: bk.to_ids(np.array([1], np.int8)), TypeError, "got a buffer of format 'b'"),
        (
            lambda: bk.to_ids(np.zeros((1, 1, 1), np.uint8)),
            ValueError,
            r"expected 1 or 2 dimensions, got shape \[1, 1, 1\]",
        ),
        (
            lambda: bk.to_ids([np.zeros((1, 1), np.uint8)]),
            ValueError,
            r"data\[0\]: expected 1 dimensions, got shape \[1, 1\]",
        ),
        (
            lambda: bk.to_ids("ab\ud800"),
            ValueError,
            r"data: expected text that UTF-8 can encode, got '\\ud800' at position 2",
        ),
        (
            lambda: bk.to_ids("a", dtype=torch.int16),
            TypeError,
            "dtype: expected torch.int32 or torch.int64, got torch.int16",
        ),
        (lambda: bk.to_bytes(torch.tensor([1.0])), TypeError, "ids: expected integers, got torch.float32"),
        (
            lambda: bk.to_bytes(torch.tensor([5], device="meta")),
            ValueError,
            "ids: expected a tensor that has values, got one on device meta",
        ),
        (lambda: bk.to_bytes(torch.tensor(5)), ValueError, "ids: expected 1 or 2 dimensions"),
        (lambda: bk.to_bytes(torch.tensor([5]), torch.tensor([0, 2])), ValueError, "cu_seqlens: expected offsets"),
        (lambda: bk.to_bytes(torch.tensor([[5]]), torch.tensor([0, 1])), ValueError, "cu_seqlens: expected None"),
        (lambda: bk.to_bytes([5], special="keep"), ValueError, "special: expected one of 'drop', 'raise', got 'keep'"),
    ],
)
def test_errors_name_argument_value_and_expectation(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- models -----------------------------------------------------------------------------------------------------------

LAYERS = TransformerConfig(32, 1, 2, ffn_dim=64, window=8)
BYTE_LM = ByteLMConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=64, window=8, threshold=5.1)


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    config = BLTConfig(LAYERS, LAYERS, LAYERS, BYTE_LM, ngram_vocab=97, threshold=5.1)
    space = BLTConfig(LAYERS, LAYERS, LAYERS, None, ngram_vocab=97, patching="space")
    return {"byte_lm": ByteLM(BYTE_LM), "blt": BLT(config), "blt_space": BLT(space)}


@pytest.mark.parametrize("name", ["byte_lm", "blt", "blt_space"])
def test_patch_takes_text(name: str) -> None:
    model = models()[name]
    for data in KINDS.values():
        assert_equal(model.patch(data), model.patch(torch.tensor(IDS)))
    documents = ["one", b"two \xff", "", TEXT]
    assert_equal(model.patch(documents), model.patch(*bk.to_ids(documents)))
    offsets = torch.tensor([0, 7, len(IDS)])
    assert_equal(model.patch(DATA, offsets), model.patch(torch.tensor(IDS), offsets))
    rows = torch.tensor(list(DATA[:60]), dtype=torch.uint8).view(3, 20)
    assert_equal(model.patch(rows), model.patch(rows.long() + 4))
    with pytest.raises(ValueError, match="cu_seqlens: expected None, since tokens is a list of documents"):
        model.patch(documents, offsets)
    with pytest.raises(TypeError, match=r"tokens: expected a str, bytes, .* got float"):
        model.patch(1.5)
    with pytest.raises(TypeError, match=r"tokens: expected .*float32"):
        model.patch(torch.tensor([1.5]))


@pytest.mark.parametrize("name", ["byte_lm", "blt", "megabyte"])
def test_a_default_device_changes_nothing_on_the_cpu(name: str) -> None:
    """Text is on the CPU whatever the default device is, and tables that a process keeps stay there."""
    model = build(name)
    positions._kept_rotations.cache_clear()
    with torch.device("meta"):
        ids, offsets = bk.to_ids(["one", b""])
        assert (ids.device.type, offsets.device.type) == ("cpu", "cpu")
        assert bk.to_bytes(ids, offsets) == [b"one", b""]
        written = model.generate(["abc", "d"], max_new_bytes=3).ids
    assert model.generate(["abc", "d"], max_new_bytes=3).ids == written
