"""Every patching rule: hand-worked cases, and what wrong input is told. See test_patching.py for the rest."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch

import blt_kernels as bk
from blt_kernels.models.config import RELEASED_THRESHOLD
from blt_kernels.testing import offsets_of

# --- hand-worked ------------------------------------------------------------------------------------------------------
# Lengths count the byte to come. They are what facebookresearch/blt's patcher gives with include_next_token. Entropy 0
# is the highest, so that reading it would show.

ENTROPY = [9.0, 2.0, 1.0, 0.5, 3.0, 3.0, 0.0, 2.5, 1.0, 2.0]
RULES: dict[str, dict[str, Any]] = {
    "global": {"threshold": 1.5},
    "monotonic": {"threshold": 0.4, "monotonic": True},
    "threshold_add": {"threshold": 1.5, "threshold_add": 0.4},
    "max_patch_length": {"threshold": 2.4, "max_patch_length": 3},
    "monotonic and max_patch_length": {"threshold": 1.9, "monotonic": True, "max_patch_length": 3},
    "threshold_add is ignored": {"threshold": 0.4, "threshold_add": 99.0, "monotonic": True},
}
BY_RULE_AND_SIZE = [
    ("global", 10, [1, 1, 3, 1, 2, 2, 1]),
    ("global", 9, [1, 1, 3, 1, 2, 2]),
    ("global", 8, [1, 1, 3, 1, 2, 1]),
    ("global", 4, [1, 1, 3]),
    ("global", 3, [1, 1, 2]),
    ("global", 2, [1, 1, 1]),
    ("global", 1, [1, 1]),
    ("global", 0, [1]),
    ("monotonic", 10, [1, 1, 3, 3, 2, 1]),
    ("monotonic", 9, [1, 1, 3, 3, 2]),
    ("monotonic", 8, [1, 1, 3, 3, 1]),
    ("monotonic", 3, [1, 1, 2]),
    ("monotonic", 2, [1, 1, 1]),
    ("monotonic", 1, [1, 1]),
    ("monotonic", 0, [1]),
    ("threshold_add", 10, [1, 1, 3, 3, 2, 1]),
    ("threshold_add", 9, [1, 1, 3, 3, 2]),
    ("threshold_add", 3, [1, 1, 2]),
    ("threshold_add", 2, [1, 1, 1]),
    ("threshold_add", 1, [1, 1]),
    ("threshold_add", 0, [1]),
    ("max_patch_length", 10, [1, 3, 1, 1, 2, 3]),
    ("max_patch_length", 9, [1, 3, 1, 1, 2, 2]),
    ("max_patch_length", 8, [1, 3, 1, 1, 2, 1]),
    ("max_patch_length", 4, [1, 3, 1]),
    ("max_patch_length", 3, [1, 3]),
    ("max_patch_length", 2, [1, 2]),
    ("max_patch_length", 1, [1, 1]),
    ("monotonic and max_patch_length", 10, [1, 1, 3, 3, 3]),
    ("monotonic and max_patch_length", 8, [1, 1, 3, 3, 1]),
    ("threshold_add is ignored", 10, [1, 1, 3, 3, 2, 1]),
]


@pytest.mark.parametrize(("rule", "size", "expected"), BY_RULE_AND_SIZE)
def test_rules_by_hand(rule: str, size: int, expected: list[int], device: str) -> None:
    layout = bk.patch_starts(torch.tensor(ENTROPY[:size], device=device), **RULES[rule])
    assert layout.to_lengths(include_next_byte=True).tolist() == [expected]


def test_threshold_add_suppresses_start_3_only(device: str) -> None:
    rising = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], device=device)
    layout = bk.patch_starts(rising, threshold=0.5, threshold_add=0.5)
    assert layout.to_lengths(include_next_byte=True).tolist() == [[1, 1, 2, 1, 1, 1]]
    assert bk.patch_starts(rising, threshold=0.5, monotonic=True).to_lengths().tolist() == [[1] * 6]


def test_the_threshold_is_strict(device: str) -> None:
    entropy = torch.tensor([0.0, 0.5, 0.5, 0.75, 0.5], device=device)
    assert bk.patch_starts(entropy, threshold=0.5).to_lengths().tolist() == [[1, 3, 1]]
    assert bk.patch_starts(entropy, threshold=0.25, monotonic=True).to_lengths().tolist() == [[1, 1, 3]]


def test_long_patches_are_cut_from_the_left(device: str) -> None:
    flat = torch.zeros(10, device=device)
    limits = {"threshold": 1.0, "max_patch_length": 4}
    assert bk.patch_starts(flat, **limits).to_lengths().tolist() == [[1, 4, 4, 1]]
    assert bk.patch_starts(flat, **limits).to_lengths(include_next_byte=True).tolist() == [[1, 4, 4, 2]]
    # The byte to come is the tenth after the first, and the ninth of its patch: it opens one.
    assert bk.patch_starts(flat[:9], **limits).to_lengths(include_next_byte=True).tolist() == [[1, 4, 4, 1]]
    ones = bk.patch_starts(flat, threshold=1.0, max_patch_length=1)
    assert ones.to_lengths(include_next_byte=True).tolist() == [[1] * 11]


def test_all_fields_by_hand(device: str) -> None:
    entropy = torch.tensor([9.0, 0.0, 2.0, 0.0, 9.0, 9.0, 2.0], device=device)
    layout = bk.patch_starts(entropy, offsets_of([4, 0, 1, 2], device=device), threshold=1.0)
    assert {f.name: getattr(layout, f.name).tolist() for f in fields(layout)} == {
        "patch_offsets": [0, 1, 3, 4, 5, 6, 7, 7],
        "cu_patches": [0, 3, 3, 4, 6],
        "patch_ids": [0, 1, 1, 2, 3, 4, 5],
        "decode_ids": [0, 0, 1, 1, 3, 4, 5],
        "decode_offsets": [0, 2, 4, 4, 5, 6, 7, 7],
        "cu_seqlens": [0, 4, 4, 5, 7],
        "overflowed": [False],
    }


def test_capacity_by_hand(device: str) -> None:
    entropy = torch.full((9,), 5.0, device=device)
    layout = bk.patch_starts(entropy, offsets_of([5, 0, 3, 1], device=device), threshold=1.0, max_patches=6)
    # 5 + 3 + 1 patches are wanted. The first document takes 4 and leaves one for each of the other two.
    assert layout.to_lengths().tolist() == [[1, 1, 1, 2], [0, 0, 0, 0], [3, 0, 0, 0], [1, 0, 0, 0]]
    assert layout.patch_ids.tolist() == [0, 1, 2, 3, 3, 4, 4, 4, 5]
    # A document that lost starts has none for its byte to come either.
    assert layout.decode_ids.tolist() == [0, 1, 2, 2, 2, -1, -1, -1, 5]
    assert layout.overflowed.tolist() == [True]
    fits = bk.patch_starts(entropy, offsets_of([5, 0, 3, 1], device=device), threshold=1.0, max_patches=9)
    assert fits.overflowed.tolist() == [False]
    assert fits.decode_ids.tolist() == list(range(9))


def test_space_by_hand(device: str) -> None:
    def lengths(data: bytes) -> list[int]:
        return bk.space_patch(bk.to_ids(data, device=device)).to_lengths(include_next_byte=True)[0].tolist()

    assert lengths("ab, cd  é€ x-1\n".encode()) == [1, 2, 4, 4, 3, 2, 2, 1]
    assert lengths(b"ab,") == [1, 2, 1]
    assert lengths(b"ab") == [1, 2]
    assert lengths(b"a") == [1, 1]
    assert lengths(b"") == [1]
    assert lengths(b"  a ") == [1, 3, 1]
    specials = torch.tensor([70, 2, 70, 1, 1, 80], device=device)
    assert bk.space_patch(specials).to_lengths(include_next_byte=True).tolist() == [[1, 1, 2, 1, 2]]


def test_static_and_byte_by_hand(device: str) -> None:
    cu_seqlens = torch.tensor([0, 10, 10, 11, 15], device=device)
    static = bk.static_patch(cu_seqlens, 4, num_bytes=15)
    assert static.to_lengths().tolist() == [[1, 4, 4, 1], [0] * 4, [1, 0, 0, 0], [1, 3, 0, 0]]
    megabyte = bk.static_patch(cu_seqlens, 4, first=4, num_bytes=15)
    assert megabyte.to_lengths().tolist() == [[4, 4, 2], [0] * 3, [1, 0, 0], [4, 0, 0]]
    assert megabyte.decode_ids.tolist() == [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1, -1, 4]
    assert bk.byte_patch(cu_seqlens, num_bytes=15).patch_offsets.tolist() == list(range(16))
    assert bk.byte_patch(cu_seqlens, num_bytes=20).patch_ids.tolist() == [*range(15), *[-1] * 5]


def test_delimiter_by_hand(device: str) -> None:
    tokens = torch.tensor([70, 3, 70, 70, 3, 3, 70], device=device)
    assert bk.delimiter_patch(tokens, 3).to_lengths(include_next_byte=True).tolist() == [[1, 1, 3, 1, 2]]
    assert bk.delimiter_patch(tokens[:2], 3).to_lengths(include_next_byte=True).tolist() == [[1, 1, 1]]
    assert bk.delimiter_patch(torch.tensor([3, 70, 3], device=device), 3).to_lengths().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(10, [1, 4, 1, 2, 3]), (9, [1, 4, 1, 4]), (8, [1, 4, 1, 3]), (4, [1, 4]), (3, [1, 3]), (1, [1, 1])],
)
def test_topk_by_hand(size: int, expected: list[int], device: str) -> None:
    layout = bk.topk_patch(torch.tensor(ENTROPY[:size], device=device), 2)
    assert layout.to_lengths(include_next_byte=True).tolist() == [expected]


def test_bf16_is_compared_in_fp32(device: str) -> None:
    # The BLT threshold rounds to this very number in bf16, where it would not be above itself.
    entropy = torch.tensor([0.0, 1.3359375, 0.0], dtype=torch.bfloat16, device=device)
    assert bk.patch_starts(entropy, threshold=RELEASED_THRESHOLD).to_lengths().tolist() == [[1, 1, 1]]
    just_below = torch.tensor([0.0, 1.3354419469833374, 0.0], device=device)  # it is one fp32 ulp below
    for dtype in (torch.float32, torch.float64):
        assert bk.patch_starts(just_below.to(dtype), threshold=RELEASED_THRESHOLD).to_lengths().tolist() == [[1, 2]]


def test_topk_with_nan_takes_it_for_the_highest(device: str) -> None:
    entropy = torch.tensor([0.0, 1.0, math.nan, 2.0, math.inf, 1.0, 0.0, 3.0], device=device)
    assert bk.topk_patch(entropy, 2).to_lengths().tolist() == [[1, 2, 2, 3]]
    everything = bk.topk_patch(torch.full((4000,), math.nan, device=device), 3)
    assert int(everything.num_patches) == 4000 // 3 - 2 + 2


# --- wrong input ------------------------------------------------------------------------------------------------------

X, E, IDS = torch.zeros(4, 5), torch.zeros(4), torch.zeros(4, dtype=torch.int64)
CU = torch.tensor([0, 4], dtype=torch.int32)
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("no tensor", lambda: bk.entropy_patch([1.0], threshold=1.0), TypeError, "logits.*list"),
    ("integer logits", lambda: bk.entropy_patch(IDS[:, None], threshold=1.0), TypeError, "logits.*int64"),
    ("flat logits", lambda: bk.entropy_patch(E, threshold=1.0), ValueError, r"logits.*\[4\]"),
    ("no alphabet", lambda: bk.entropy_patch(X[:, :0], threshold=1.0), ValueError, "logits.*alphabet.*0"),
    ("threshold None", lambda: bk.entropy_patch(X, threshold=None), TypeError, "threshold.*None"),
    ("threshold tensor", lambda: bk.patch_starts(E, threshold=E), TypeError, "threshold"),
    ("threshold_add", lambda: bk.patch_starts(E, threshold=1.0, threshold_add="1"), TypeError, "threshold_add.*'1'"),
    ("monotonic", lambda: bk.patch_starts(E, threshold=1.0, monotonic=1), TypeError, "monotonic.*1"),
    (
        "max_patch_length",
        lambda: bk.patch_starts(E, threshold=1.0, max_patch_length=0),
        ValueError,
        "max_patch_length.*0",
    ),
    ("fraction", lambda: bk.patch_starts(E, threshold=1.0, max_patch_length=1.5), TypeError, r"max_patch_length.*1\.5"),
    (
        "compare",
        lambda: bk.patch_starts(E, threshold=1.0, compare="bf16"),
        ValueError,
        "compare.*'fp32', 'model'.*'bf16'",
    ),
    ("max_patches", lambda: bk.patch_starts(E, CU, threshold=1.0, max_patches=0), ValueError, "max_patches.*0"),
    ("no room", lambda: bk.byte_patch(torch.tensor([0, 1, 2]), max_patches=1), ValueError, "max_patches.*2.*1"),
    ("cu_seqlens float", lambda: bk.patch_starts(E, CU.float(), threshold=1.0), TypeError, "cu_seqlens.*float32"),
    ("cu_seqlens list", lambda: bk.patch_starts(E, [0, 4], threshold=1.0), TypeError, "cu_seqlens.*list"),
    ("cu_seqlens matrix", lambda: bk.patch_starts(E, CU[None], threshold=1.0), ValueError, "cu_seqlens"),
    ("cu_seqlens empty", lambda: bk.patch_starts(E, CU[:0], threshold=1.0), ValueError, "cu_seqlens"),
    ("cu_seqlens start", lambda: bk.patch_starts(E, CU + 1, threshold=1.0), ValueError, r"cu_seqlens.*\[1, 5\]"),
    ("cu_seqlens end", lambda: bk.patch_starts(E, CU * 2, threshold=1.0), ValueError, r"cu_seqlens.*4.*\[0, 8\]"),
    ("cu_seqlens falls", lambda: bk.space_patch(IDS, torch.tensor([0, 3, 2])), ValueError, r"cu_seqlens.*\[0, 3, 2\]"),
    ("cu_seqlens and rows", lambda: bk.space_patch(IDS[None], CU), ValueError, r"cu_seqlens.*padded.*\[1, 4\]"),
    ("float tokens", lambda: bk.space_patch(E), TypeError, "tokens.*float32"),
    ("id", lambda: bk.delimiter_patch(IDS, 1.0), TypeError, r"id.*1\.0"),
    ("size", lambda: bk.static_patch(CU, 0), ValueError, "size.*0"),
    ("first", lambda: bk.static_patch(CU, 2, 0), ValueError, "first.*0"),
    ("num_bytes", lambda: bk.static_patch(CU, 2, num_bytes=3), ValueError, "cu_seqlens.*3"),
    ("patch_size", lambda: bk.topk_patch(E, 4.5), TypeError, r"patch_size.*4\.5"),
]


@pytest.mark.parametrize(("call", "error", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
