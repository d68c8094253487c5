"""boundary_patch: against an oracle, hand-worked conventions, thresholds of documents, and every argument error."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from backends import BACKENDS, emulator, launches, use
from hypothesis import given
from hypothesis import strategies as st
from test_patching import check_scheme
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import assert_equal, offsets_of, ragged_layout

SCORES = st.sampled_from([0.0, 0.5, 1.0, 2.0, math.nan, math.inf, -math.inf]) | st.floats(0, 2, width=32)
DOCUMENTS = st.lists(st.lists(SCORES, max_size=12), max_size=5)


def starts_of(scores: list[float], threshold: float, at: str, first: int | None) -> oracle.Starts:
    """Return local starts, that of the byte to come included."""
    size = len(scores)
    starts = {0} | {i + (at == "end") for i, score in enumerate(scores) if score > threshold}
    if first is not None:
        starts = {s for s in starts if s == 0 or s > first} | {first}
    return sorted(s for s in starts if s < size or (s == size and (at == "end" or s == first)))


@given(DOCUMENTS, st.sampled_from(["end", "start"]), st.none() | st.integers(1, 4), st.none() | st.integers(0, 20))
def test_against_oracle(
    device: str, documents: list[list[float]], at: str, first: int | None, room: int | None
) -> None:
    """Scores with one threshold, with one for each document, and bool marks."""
    sizes = [len(d) for d in documents]
    scores = torch.tensor([x for d in documents for x in d], dtype=torch.float32, device=device)
    offsets, thresholds = offsets_of(sizes, device=device), [0.5 + 0.25 * b for b in range(len(documents))]
    options: dict[str, Any] = {"at": at, "first": first, "max_patches": None if room is None else len(sizes) + room}

    def check(marks: Tensor, threshold: float | Tensor | None, limits: list[float]) -> None:
        layout = bk.boundary_patch(marks, offsets, threshold=threshold, **options)
        starts = [starts_of(d, limit, at, first) for d, limit in zip(documents, limits, strict=True)]
        check_scheme(layout, starts, sizes, options["max_patches"])

    check(scores, 0.5, [0.5] * len(sizes))
    check(scores > 0.5, None, [0.5] * len(sizes))
    check(scores, torch.tensor(thresholds, dtype=torch.float64, device=device), thresholds)


def test_conventions(device: str) -> None:
    """A mark ends a patch or starts one; `first` makes the first patch of a document so long."""
    marks = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 0, 0, 0]], dtype=torch.bool, device=device)
    expected = {
        ("end", None): [[3, 2, 1], [1, 1, 4]],
        ("end", 1): [[1, 2, 2, 1], [1, 1, 4, 0]],
        ("end", 2): [[2, 1, 2, 1], [2, 4, 0, 0]],
        ("start", None): [[2, 2, 2], [1, 5, 0]],
        ("start", 1): [[1, 1, 2, 2], [1, 5, 0, 0]],
        ("start", 3): [[3, 1, 2], [3, 3, 0]],
        ("start", 5): [[5, 1], [5, 1]],
        ("end", 9): [[6], [6]],
    }
    for (at, first), lengths in expected.items():
        layout = bk.boundary_patch(marks, at=at, first=first)
        assert layout.to_lengths(include_next_byte=True).tolist() == lengths, (at, first)
    assert_equal(bk.boundary_patch(marks.flatten(), offsets_of([5, 5], device=device)), bk.boundary_patch(marks))


def test_other_schemes_are_marks(device: str) -> None:
    entropy = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).to(device)
    assert_equal(bk.boundary_patch(entropy, threshold=0.6, first=1), bk.patch_starts(entropy, threshold=0.6))
    dense = ragged_layout(200, 3, device=device)
    marks = dense.decode_ids == dense.patch_ids
    again = bk.boundary_patch(marks, dense.cu_seqlens, max_patches=dense.capacity)
    assert_equal(again, dense)


def test_chunks_of_hnet(device: str) -> None:
    """`cu_patches` is H-Net's next_cu_seqlens, and pooling the first byte selects those of its boundary mask."""
    probability = torch.rand(90, generator=torch.Generator().manual_seed(1)).to(device)
    offsets = offsets_of([40, 1, 49], device=device)
    probability[offsets[:-1].long()] = 1.0
    mask, x = probability > 0.5, torch.arange(90.0, device=device)[:, None]
    layout = bk.boundary_patch(probability, offsets, at="start", threshold=0.5).compact()
    assert_equal(bk.patch_pool(x, layout, "first"), x[mask])
    assert layout.cu_patches.tolist() == [0, *mask.cumsum(0)[offsets[1:].long() - 1].tolist()]
    assert_equal(layout.patch_ids.long(), mask.cumsum(0) - 1)


def test_long_documents_of_many_thresholds(device: str) -> None:
    """More bytes than a block of CUDA has, documents that end between blocks, empty ones, and marks at all ends."""
    lengths = [2048, 0, 1, 2047, 0, 0, 3000, 5]
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(sum(lengths), generator=generator)
    offsets, limits = offsets_of(lengths), torch.rand(len(lengths), generator=generator)
    scores[offsets[1:].long() - 1] = 2.0
    limits[0] = torch.nan
    for at in ("end", "start"):
        layout = bk.boundary_patch(
            scores.to(device), offsets.to(device), at=at, threshold=limits.to(device), max_patches=4000
        )
        with use("reference"):
            assert_equal(
                layout.to("cpu"), bk.boundary_patch(scores, offsets, at=at, threshold=limits, max_patches=4000)
            )


def test_it_compiles_with_thresholds() -> None:
    compiled = torch.compile(bk.boundary_patch, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, size in ((2, 30), (3, 50)):
            scores, limits = torch.rand(rows, size), torch.rand(rows)
            expected = bk.boundary_patch(scores, threshold=limits, first=1)
            assert_equal(compiled(scores, threshold=limits, first=1), expected)


def test_it_takes_two_launches() -> None:
    scores = torch.rand(5000)
    names = [launch.kernel.split("<")[0] for launch in launches(lambda: bk.boundary_patch(scores, threshold=0.5))]
    assert names == ["blt::prepare_layout_kernel", "blt::patch_layout_kernel"]


@pytest.mark.parametrize("seed", range(3))
def test_offsets_that_are_garbage_lead_nowhere(seed: int) -> None:
    """No access outside of the tensors, which the emulator would tell; what comes out is arbitrary."""
    emulator()
    generator = torch.Generator().manual_seed(seed)
    scores, limits = torch.rand(3000, generator=generator), torch.rand(20, generator=generator)
    for low, high in ((-9, 3009), (-(2**31), 2**31 - 1), (3000, 3001)):
        offsets = torch.randint(low, high, (21,), generator=generator, dtype=torch.int64).int()
        with use("emulated"):
            for at in ("end", "start"):
                torch.ops.blt_kernels.boundary_patch_fwd(scores, offsets, 0, None, limits, at, 7, 30)
                torch.ops.blt_kernels.boundary_patch_fwd(scores > 0.5, offsets, 0, None, None, at, None, None)


MARKS, SCORE = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("marks", "options", "error", "message"),
    [
        ([True], {}, TypeError, "marks: expected a tensor, got list"),
        (torch.zeros(3, dtype=torch.int64), {}, TypeError, "marks: expected dtype in .*int64"),
        (torch.zeros(1, 2, 3), {"threshold": 1.0}, ValueError, r"marks: expected 1 or 2 dimensions.*\[1, 2, 3\]"),
        (MARKS, {"threshold": 1.0}, ValueError, "threshold: expected None for marks of torch.bool, got 1.0"),
        (SCORE, {}, ValueError, "threshold: expected a number or a tensor for marks of torch.float32, got None"),
        (SCORE, {"threshold": math.nan}, ValueError, "threshold: expected a number, got nan"),
        (SCORE, {"threshold": "high"}, TypeError, "threshold: expected a number, got 'high'"),
        (SCORE, {"threshold": torch.zeros(3)}, ValueError, r"threshold: expected shape \[B\] = \[2\], got \[3\]"),
        (SCORE, {"threshold": torch.zeros(2).long()}, TypeError, "threshold: expected dtype in .*int64"),
        (SCORE, {"threshold": torch.zeros(2, device="meta")}, ValueError, "threshold: expected device cpu of marks"),
        (MARKS, {"at": "middle"}, ValueError, "at: expected one of 'end', 'start', got 'middle'"),
        (MARKS, {"first": 0}, ValueError, "first: expected a value >= 1, got 0"),
        (MARKS, {"first": 1.5}, TypeError, "first: expected an int, got 1.5"),
        (MARKS, {"max_patches": 1}, ValueError, r"max_patches: expected at least one patch a document \(2\), got 1"),
    ],
)
def test_wrong_arguments_are_named(marks: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bk.boundary_patch(marks, **options)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"], indirect=True)
def test_the_operator_checks_its_arguments_too(backend: str, device: str) -> None:
    marks, scores = (x.flatten().to(device) for x in (MARKS, SCORE))
    fwd = torch.ops.blt_kernels.boundary_patch_fwd
    for arguments, message in (
        ((marks, None, 2, 1.0, None, "end", None, None), "expected 0 of threshold and thresholds"),
        ((scores, None, 2, None, torch.zeros(3, device=device), "end", None, None), "thresholds: expected size 2"),
        (
            (scores, None, 2, None, torch.zeros(2, device=device).double(), "end", None, None),
            "thresholds: expected dtype",
        ),
        ((scores, None, 2, 1.0, None, "e", None, None), "at: expected end or start, got e"),
        ((scores, None, 2, 1.0, None, "end", 0, None), "first: expected a value >= 1, got 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fwd(*arguments)
