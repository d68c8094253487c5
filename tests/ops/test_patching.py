"""Every patching rule against an oracle in plain Python, on every kind of bytes, and its properties."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from typing import Any

import oracle
import pytest
import torch
from backends import emulator, order, use
from hypothesis import given
from hypothesis import strategies as st
from test_entropy_patch import RULES
from test_layout import check_decode_offsets
from tiers import slow
from torch import Tensor

import blt_kernels as bk
from blt_kernels.reference import entropy_patch as reference
from blt_kernels.testing import (
    SCRIPTS,
    assert_equal,
    binary,
    invalid_utf8,
    offsets_of,
    ragged_logits,
    real_text,
)


def as_lists(layout: bk.PatchLayout) -> dict[str, Any]:
    return {f.name: getattr(layout, f.name).tolist() for f in fields(layout)}


def packed(documents: list[list[float]], device: str) -> tuple[Tensor, Tensor]:
    values = [x for document in documents for x in document]
    return torch.tensor(values, dtype=torch.float32, device=device), offsets_of(
        [len(d) for d in documents], device=device
    )


def ids(documents: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    values = [x for document in documents for x in document]
    return torch.tensor(values, dtype=torch.int64, device=device), offsets_of(
        [len(d) for d in documents], device=device
    )


# --- against the oracle -----------------------------------------------------------------------------------------------

# There are few different values, so equal neighbours, rises and thresholds that are hit exactly are frequent.
ENTROPIES = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 5.5]),
    st.floats(0, 6, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
DOCUMENTS = st.lists(st.lists(ENTROPIES, max_size=12), max_size=5)
FINITE_DOCUMENTS = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 5.5]), max_size=16), max_size=5)
TOKENS = st.lists(st.lists(st.one_of(st.integers(0, 259), st.sampled_from([3, 36, 69, 74])), max_size=16), max_size=5)
THRESHOLDS = st.one_of(st.sampled_from([0.0, 0.5, 1.0, -0.5]), st.floats(-1, 6))
ANY_RULE = st.fixed_dictionaries(
    {
        "threshold": THRESHOLDS,
        "threshold_add": st.none() | THRESHOLDS,
        "monotonic": st.booleans(),
        "max_patch_length": st.none() | st.integers(1, 6),
    }
)
ROOM = st.none() | st.integers(0, 20)


def capacity(room: int | None, documents: list[list[Any]]) -> int | None:
    return None if room is None else len(documents) + room


def check_scheme(layout: bk.PatchLayout, starts: list[list[int]], sizes: list[int], max_patches: int | None) -> None:
    assert as_lists(layout) == oracle.layout_of(starts, sizes, max_patches)
    check_decode_offsets(layout)
    if not bool(layout.overflowed):
        for include_next_byte in (False, True):
            rows = [oracle.lengths_of(s, n, include_next_byte) for s, n in zip(starts, sizes, strict=True)]
            width = max(map(len, rows), default=0)
            expected = [row + [0] * (width - len(row)) for row in rows]
            assert layout.to_lengths(include_next_byte).tolist() == expected


@given(DOCUMENTS, ANY_RULE, ROOM)
def test_patch_starts_against_oracle(
    device: str, documents: list[list[float]], rule: dict[str, Any], room: int | None
) -> None:
    entropy, cu_seqlens = packed(documents, device)
    max_patches = capacity(room, documents)
    layout = bk.patch_starts(entropy, cu_seqlens, **rule, max_patches=max_patches)
    starts = [oracle.entropy_starts(d, **rule) for d in documents]
    check_scheme(layout, starts, [len(d) for d in documents], max_patches)


@given(TOKENS, ROOM)
def test_space_patch_against_oracle(device: str, documents: list[list[int]], room: int | None) -> None:
    max_patches = capacity(room, documents)
    layout = bk.space_patch(*ids(documents, device), max_patches=max_patches)
    check_scheme(layout, [oracle.space_starts(d) for d in documents], [len(d) for d in documents], max_patches)


@given(TOKENS, st.integers(0, 259) | st.sampled_from([3, 36]), ROOM)
def test_delimiter_patch_against_oracle(device: str, documents: list[list[int]], id: int, room: int | None) -> None:
    tokens, cu_seqlens = ids(documents, device)
    max_patches = capacity(room, documents)
    layout = bk.delimiter_patch(tokens, id, cu_seqlens, max_patches=max_patches)
    starts = [oracle.delimiter_starts(d, id) for d in documents]
    check_scheme(layout, starts, [len(d) for d in documents], max_patches)


@given(st.lists(st.integers(0, 30), max_size=5), st.integers(1, 8), st.integers(1, 8), ROOM)
def test_static_patch_against_oracle(device: str, sizes: list[int], size: int, first: int, room: int | None) -> None:
    max_patches = None if room is None else len(sizes) + room
    cu_seqlens, num_bytes = offsets_of(sizes, device=device), sum(sizes)
    layout = bk.static_patch(cu_seqlens, size, first, num_bytes=num_bytes, max_patches=max_patches)
    check_scheme(layout, [oracle.static_starts(n, size, first) for n in sizes], sizes, max_patches)
    if size == first == 1:
        assert_equal(bk.byte_patch(cu_seqlens, num_bytes=num_bytes, max_patches=max_patches), layout)


@given(FINITE_DOCUMENTS, st.integers(1, 6), ROOM)
def test_topk_patch_against_oracle(
    device: str, documents: list[list[float]], patch_size: int, room: int | None
) -> None:
    entropy, cu_seqlens = packed(documents, device)
    max_patches = capacity(room, documents)
    layout = bk.topk_patch(entropy, patch_size, cu_seqlens, max_patches=max_patches)
    starts = [oracle.topk_starts(d, patch_size) for d in documents]
    check_scheme(layout, starts, [len(d) for d in documents], max_patches)


# --- every scheme on every kind of bytes ------------------------------------------------------------------------------

CONTENT = {
    **{name: text.encode() for name, text in SCRIPTS.items()},
    "sources": real_text(3000, 1),
    "invalid UTF-8": invalid_utf8(1500),
    "binary": binary(1500),
    "empty": b"",
    "one byte": b"\xff",
}


@pytest.mark.parametrize("data", CONTENT.values(), ids=CONTENT)
def test_every_scheme_on_every_content(data: bytes, device: str) -> None:
    tokens = bk.to_ids(data, device=device)
    size = len(data)
    whole = torch.tensor([0, size], device=device)
    entropy = (tokens * 37 % 101).float() / 25  # it is a function of the content
    values, id = entropy.tolist(), int(tokens[size // 2]) if size else 0
    schemes = {
        "space": (bk.space_patch(tokens), oracle.space_starts(tokens.tolist())),
        "delimiter": (bk.delimiter_patch(tokens, id), oracle.delimiter_starts(tokens.tolist(), id)),
        "static": (bk.static_patch(whole, 6, num_bytes=size), oracle.static_starts(size, 6)),
        "byte": (bk.byte_patch(whole, num_bytes=size), oracle.static_starts(size, 1)),
        "topk": (bk.topk_patch(entropy, 5), oracle.topk_starts(values, 5)),
    }
    for name, rule in RULES.items():
        schemes[name] = (bk.patch_starts(entropy, **rule), oracle.entropy_starts(values, **rule))
    for name, (layout, starts) in schemes.items():
        assert layout.patch_offsets[: int(layout.num_patches)].tolist() == [s for s in starts if s < size], name
        expected = oracle.lengths_of(starts, size, True)
        assert layout.to_lengths(include_next_byte=True).tolist() == [expected], name


# --- properties -------------------------------------------------------------------------------------------------------


@given(DOCUMENTS, ANY_RULE, ROOM)
def test_patches_fill_their_documents(
    device: str, documents: list[list[float]], rule: dict[str, Any], room: int | None
) -> None:
    entropy, cu_seqlens = packed(documents, device)
    layout = bk.patch_starts(entropy, cu_seqlens, **rule, max_patches=capacity(room, documents))
    sizes = [len(d) for d in documents]
    assert layout.to_lengths().sum(1).tolist() == sizes
    offsets = set(layout.patch_offsets.tolist())
    assert offsets >= set(cu_seqlens.tolist()), "a patch crosses the edge of a document"
    counts = layout.cu_patches.diff()
    assert ((counts > 0) == (cu_seqlens.diff() > 0)).all(), "a document without a patch, or a patch of no document"
    assert (layout.patch_lengths[: int(layout.num_patches)] > 0).all()
    assert (layout.patch_lengths[int(layout.num_patches) :] == 0).all()
    if rule["max_patch_length"] and not bool(layout.overflowed):
        assert (layout.patch_lengths <= rule["max_patch_length"]).all()


@given(DOCUMENTS, ANY_RULE)
def test_packed_is_each_document_alone(device: str, documents: list[list[float]], rule: dict[str, Any]) -> None:
    entropy, cu_seqlens = packed(documents, device)
    together = bk.patch_starts(entropy, cu_seqlens, **rule)
    patches = together.cu_patches.tolist()
    for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        alone = bk.patch_starts(entropy[start:end], **rule)
        assert (alone.patch_ids + patches[b]).tolist() == together.patch_ids[start:end].tolist()
        decode = torch.where(alone.decode_ids < 0, -1, alone.decode_ids + patches[b])
        assert decode.tolist() == together.decode_ids[start:end].tolist()


@given(st.integers(0, 4), st.integers(0, 12), ANY_RULE, st.integers(0, 9))
def test_padded_is_packed(device: str, rows: int, size: int, rule: dict[str, Any], seed: int) -> None:
    logits = ragged_logits((rows, size, 11), seed, device=device)
    cu_seqlens = torch.arange(rows + 1, device=device) * size
    entropy, layout = bk.entropy_patch(logits, **rule)
    flat_entropy, flat_layout = bk.entropy_patch(logits.flatten(0, 1), cu_seqlens, **rule)
    assert entropy.shape == (rows, size)
    assert_equal((entropy.flatten(), layout), (flat_entropy, flat_layout))
    assert_equal(bk.token_entropy(logits), entropy)
    assert_equal(bk.patch_starts(entropy, **rule), layout)
    tokens = (logits[..., 0] * 60).long().clamp(-100, 100) + 104
    assert_equal(bk.space_patch(tokens), bk.space_patch(tokens.flatten(), cu_seqlens))
    assert_equal(bk.delimiter_patch(tokens, 104), bk.delimiter_patch(tokens.flatten(), 104, cu_seqlens))
    assert_equal(bk.topk_patch(entropy, 3), bk.topk_patch(entropy.flatten(), 3, cu_seqlens))


@given(FINITE_DOCUMENTS, st.floats(0, 3), st.floats(0, 3))
def test_a_higher_threshold_gives_fewer_patches(device: str, documents: list[list[float]], a: float, b: float) -> None:
    entropy, cu_seqlens = packed(documents, device)
    fine, coarse = (bk.patch_starts(entropy, cu_seqlens, threshold=t) for t in sorted((a, b)))
    assert set(fine.patch_offsets.tolist()) >= set(coarse.patch_offsets.tolist())
    assert int(fine.num_patches) >= int(coarse.num_patches)


@pytest.mark.slow
@given(FINITE_DOCUMENTS, THRESHOLDS)
def test_a_boundary_needs_no_later_byte(device: str, documents: list[list[float]], threshold: float) -> None:
    """Streaming: patches of a prefix are those of the whole, the last one apart, which may go on."""
    for document in documents:
        entropy = torch.tensor(document, device=device)
        whole = bk.patch_starts(entropy, threshold=threshold, max_patch_length=5)
        for size in range(1, len(document)):
            prefix = bk.patch_starts(entropy[:size], threshold=threshold, max_patch_length=5)
            assert prefix.patch_ids.tolist() == whole.patch_ids[:size].tolist()
            assert prefix.decode_ids.tolist() == whole.decode_ids[:size].tolist()


# --- many bytes -------------------------------------------------------------------------------------------------------

SIZES = {
    "one document": [6000],
    "long and short": [1, 0, 2047, 1, 2048, 2, 0, 0, 2049, 3],
    "edges of chunks": [2048, 2048, 0, 1],
    "empty ones": [0] * 3000 + [5] + [0] * 2000 + [2100],
    "many": [3, 1, 0, 2] * 900,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("max_patch_length", [None, 4, 2500])
@pytest.mark.parametrize("share", [None, 0.01, 0.5, 2.0])
def test_layouts_of_many_bytes(
    sizes: list[int], max_patch_length: int | None, share: float | None, device: str
) -> None:
    """Documents and patches that cross what kernels work on, with room for all, some and hardly any of the patches."""
    cu_seqlens, num_bytes = offsets_of(sizes, device=device), sum(sizes) + 7
    generator = torch.Generator().manual_seed(num_bytes)
    # Some stretches have no start, others have many.
    entropy = torch.rand(num_bytes, generator=generator) - torch.linspace(0.95, 0.0, num_bytes)
    entropy = entropy.roll(num_bytes // 3).to(device)
    tokens = torch.randint(4, 260, (num_bytes,), generator=generator).to(device)
    room = None if share is None else len(sizes) + int(share * num_bytes)
    rules = {"threshold": 0.0, "max_patch_length": max_patch_length, "max_patches": room}
    assert_equal(
        bk.patch_starts(entropy, cu_seqlens, **rules), reference.patch_starts_reference(entropy, cu_seqlens, **rules)
    )
    assert_equal(
        bk.space_patch(tokens, cu_seqlens, max_patches=room), reference.space_patch_reference(tokens, cu_seqlens, room)
    )
    assert_equal(
        bk.static_patch(cu_seqlens, 9, 4, num_bytes=num_bytes, max_patches=room),
        reference.static_patch_reference(cu_seqlens, num_bytes, 9, 4, room),
    )


# --- CUDA kernels on the emulator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_and_launches(dtype: torch.dtype) -> None:
    """Bytes as in the headers: an entropy, two ids and two offsets; on top of the logits."""
    num_bytes = 4096
    logits = ragged_logits((num_bytes, 260), dtype=dtype)
    cu_seqlens = offsets_of([1000, 0, 3000, 96])
    of_layout, of_logits = num_bytes * (4 + 16), num_bytes * (260 * dtype.itemsize + 8)
    with use("emulated"):
        emulator().take_launches()
        entropy, _ = bk.entropy_patch(logits, cu_seqlens, threshold=1.3)
        launches = emulator().take_launches()
        assert len(launches) == 2
        assert sum(x.read + x.written for x in launches) <= 1.1 * (of_logits + of_layout)
        for name, rule in RULES.items():
            bk.patch_starts(entropy, cu_seqlens, **rule)
            launches = emulator().take_launches()
            assert len(launches) == 2, name
            assert sum(x.read + x.written for x in launches) <= 1.1 * of_layout, name


def test_padded_text_takes_no_launch_for_its_offsets() -> None:
    """Kernels know the offsets of documents of one length, and write them beside the layout."""
    logits = ragged_logits((5, 700, 30))
    tokens = (logits[..., 0] * 60).long().clamp(-100, 100) + 104
    calls: dict[str, Any] = {
        "entropy_patch": lambda: bk.entropy_patch(logits, threshold=2.0, max_patches=900)[1],
        "patch_starts": lambda: bk.patch_starts(logits[..., 0], threshold=1.0, max_patch_length=9),
        "space_patch": lambda: bk.space_patch(tokens),
        "delimiter_patch": lambda: bk.delimiter_patch(tokens, 104),
        "topk_patch": lambda: bk.topk_patch(logits[..., 0], 4),
        "one document": lambda: bk.space_patch(tokens.flatten()),
        "empty documents": lambda: bk.space_patch(tokens[:, :0], max_patches=5),
    }
    for name, call in calls.items():
        expected = call()
        with use("emulated"), torch.profiler.profile() as profile:
            assert_equal(call(), expected)
        made = {event.key for event in profile.key_averages()} & {"aten::arange", "aten::mul"}
        assert not made, (name, made)


@pytest.mark.parametrize("max_patches", [None, 100])
def test_layouts_are_the_same_in_any_order_of_threads(max_patches: int | None) -> None:
    entropy, cu_seqlens = ragged_logits((5000,)), offsets_of([3000, 0, 1, 1900, 60])
    rules = {"threshold": 1.0, "threshold_add": 0.5, "max_patch_length": 20, "max_patches": max_patches}
    with use("emulated"):
        expected = bk.patch_starts(entropy, cu_seqlens, **rules), bk.topk_patch(entropy, 5, cu_seqlens)
        for name in ("BACKWARD", "RANDOM"):
            with order(name, seed=2):
                assert_equal(
                    (bk.patch_starts(entropy, cu_seqlens, **rules), bk.topk_patch(entropy, 5, cu_seqlens)), expected
                )


def sparse_boundaries(num_bytes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw entropies above 0 in few places, and documents of any length, so that patches reach over many chunks."""
    generator = torch.Generator().manual_seed(seed)

    def places(count: int) -> Tensor:
        return torch.randint(1, num_bytes, (count,), generator=generator)

    entropy = torch.zeros(num_bytes)
    entropy[places(12)] = 1.0
    inner = places(4).sort().values
    return entropy, torch.cat([torch.zeros(1), inner, inner[-1:], torch.tensor([num_bytes - 9])]).int()


@pytest.mark.parametrize("order_of_blocks", ["BACKWARD", slow("RANDOM")])
def test_chunks_of_several_groups(order_of_blocks: str) -> None:
    """The counts of 32 chunks and more are joined, whichever blocks run first. A wait would be a fault."""
    entropy, cu_seqlens = sparse_boundaries(150_000, 3)
    for longest, room in ((None, None), (7, 40), (2048, None), (5000, 40), (70_001, None)):
        rules = {"threshold": 0.5, "max_patch_length": longest, "max_patches": room}
        expected = bk.patch_starts(entropy, cu_seqlens, **rules)
        with use("emulated"), order(order_of_blocks, seed=7):
            assert_equal(bk.patch_starts(entropy, cu_seqlens, **rules), expected)


@pytest.mark.slow
def test_a_block_learns_what_is_before_it_at_a_fixed_cost() -> None:
    """In a text of two sections of 1024 chunks, bytes read for a byte of text are as many as in a short one."""
    size, longest, room = 2**21 + 2**16 + 5000, 70_001, 2000
    entropy, cu_seqlens = sparse_boundaries(size, 4)
    rules = {"threshold": 0.5, "max_patch_length": longest, "max_patches": room}
    expected = bk.patch_starts(entropy, cu_seqlens, **rules)
    with use("emulated"):
        emulator().take_launches()
        assert_equal(bk.patch_starts(entropy, cu_seqlens, **rules), expected)
        prepare, layout = emulator().take_launches()
    assert prepare.read + prepare.written < 0.02 * size
    assert layout.read < 5.1 * size  # 4 for entropy, the rest for counts of at most 63 other chunks
    assert layout.written < 8.1 * size


@pytest.mark.parametrize("seed", range(5))
def test_offsets_that_are_garbage_lead_nowhere(seed: int) -> None:
    """No access outside of the tensors, which the emulator would tell; what comes out is arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes, num_documents = 3000, 20
    entropy = torch.rand(num_bytes, generator=generator)
    tokens = torch.randint(0, 260, (num_bytes,), generator=generator)
    for low, high in ((-9, num_bytes + 9), (-(2**31), 2**31 - 1), (num_bytes, num_bytes + 1)):
        offsets = torch.randint(low, high, (num_documents + 1,), generator=generator, dtype=torch.int64).int()
        with use("emulated"):
            for room in (None, 0, 30):
                torch.ops.blt_kernels.patch_starts_fwd(entropy, offsets, 0, 0.5, 0.1, False, 7, "fp32", room)
                torch.ops.blt_kernels.patch_starts_fwd(entropy, offsets, 0, 0.5, None, False, None, "model", room)
                torch.ops.blt_kernels.space_patch_fwd(tokens, offsets, 0, room)
                torch.ops.blt_kernels.static_patch_fwd(offsets, num_bytes, 5, 2, room)
            torch.ops.blt_kernels.topk_patch_fwd(entropy, offsets, 0, 4, None)
