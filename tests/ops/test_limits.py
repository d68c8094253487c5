"""Windows and lengths up to the largest integer mean what they say; beyond it, an error names the argument."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from cases import CASES
from inputs import documents, make_layout, random_normal
from model_cases import CONFIGS, build
from model_cases import documents as tokens_and_rows
from op_calls import make, run
from op_case import OpCase
from torch.utils.flop_counter import FlopCounterMode

import blt_kernels as bk
import blt_kernels.flops
from blt_kernels import PatchLayout
from blt_kernels.reference.ngram_hash_embed import PRIMES
from blt_kernels.testing import assert_equal

LARGE = (2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
ATTENTION = [c for c in CASES if c.op == "block_causal_attention" and c.label in ("causal", "both sides", "keys")]


def run_with(case: OpCase, arguments: dict[str, Any], **options: Any) -> Any:
    return run(case, case.function, {**arguments, **options})


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_a_long_window_is_none(case: OpCase, device: str) -> None:
    arguments = make(case, device, 90, 1)
    expected = run_with(case, arguments, window=None)
    for window in LARGE:
        assert_equal(run_with(case, arguments, window=window), expected, name=f"window = {window}")


def test_more_queries_than_keys_with_a_long_window(device: str) -> None:
    """The first queries are aligned with keys before the first: position - window is the smallest there is."""
    q, k, v = (random_normal(n, 2, 8, dtype=torch.float32, seed=n).to(device) for n in (40, 3, 3))
    offsets = [torch.tensor([0, n], device=device) for n in (40, 3)]
    for causal in (True, False):
        expected = bk.block_causal_attention(q, k, v, *offsets, causal=causal)
        for window in LARGE:
            assert_equal(bk.block_causal_attention(q, k, v, *offsets, causal=causal, window=window), expected)


def test_flops_of_a_long_window() -> None:
    q = torch.zeros(9, 1, 8)
    counted = []
    for window in (None, *LARGE):
        with FlopCounterMode(display=False) as counter:
            bk.block_causal_attention(q, q, q, window=window, causal=False)
        counted.append(counter.get_total_flops())
    assert counted == [4 * 8 * 9 * 9] * 6


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_long_window_of_patches_reaches_back_to_the_start(direction: str, device: str) -> None:
    case = next(c for c in CASES if c.name == f"patch_cross_attention[{direction}, window]")
    arguments = make(case, device, 60, 1)
    expected = run_with(case, arguments, window=arguments["layout"].capacity)
    for window in LARGE:
        assert_equal(run_with(case, arguments, window=window), expected, name=f"window = {window}")


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("name", ["byte_lm", "blt_cross_windows", "blt_static", "megabyte_extended"])
def test_models_take_long_windows(name: str, ops: str) -> None:
    tokens, rows = tokens_and_rows((40, 0, 9))
    config: Any = CONFIGS[name][1]
    logits = []
    for size in (None, *LARGE[::2]):
        changes: dict[str, Any] = {} if name != "byte_lm" else {"window": size}
        for field in ("encoder", "decoder", "global_transformer", "local_transformer", "patcher"):
            if getattr(config, field, None) is not None:
                changes[field] = dataclasses.replace(getattr(config, field), window=size)
        if name.startswith("blt"):
            changes["max_patch_length"] = size
            changes["cross_attn_window_encoder"] = changes["cross_attn_window_decoder"] = size or 1000
        if name == "blt_static":
            changes["patch_size"] = size or 1000
        with torch.no_grad():
            logits.append(build(name, ops, **changes)(tokens, rows))
    for other in logits[1:]:
        assert_equal(other, logits[0])


# --- patches ----------------------------------------------------------------------------------------------------------


def test_long_patches_are_not_cut(device: str) -> None:
    cu_seqlens = documents(150, 1).to(device)
    entropy = random_normal(150, dtype=torch.float32, seed=1).to(device)
    never = bk.patch_starts(entropy, cu_seqlens, threshold=1e30)
    whole = PatchLayout.from_cuts(torch.zeros(150, dtype=torch.bool), cu_seqlens.cpu()).to(device)
    for size in LARGE:
        assert_equal(bk.patch_starts(entropy, cu_seqlens, threshold=1e30, max_patch_length=size), never)
        assert_equal(bk.topk_patch(entropy, size, cu_seqlens), never)
        assert_equal(bk.static_patch(cu_seqlens, size, num_bytes=150), never)
        assert_equal(bk.static_patch(cu_seqlens, 1, size, num_bytes=150), whole)
        assert_equal(bk.static_patch(cu_seqlens, size, size, num_bytes=150), whole)
        assert_equal(bk.boundary_patch(entropy, cu_seqlens, threshold=0.5, first=size), whole)
        assert_equal(bk.boundary_patch(entropy > 0, cu_seqlens, first=size, at="start"), whole)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_delimiter_of_any_size(dtype: torch.dtype, device: str) -> None:
    tokens = torch.tensor([5, 1, -1, 2**31 - 1, -(2**31), 7], dtype=dtype, device=device)
    none = bk.delimiter_patch(tokens, 9).to_lengths(True).tolist()
    assert none == [[1, 6]]
    for id in (*LARGE[1:], 2**32 + 5, 2**32 - 1, -(2**31) - 1, -(2**63)):
        assert bk.delimiter_patch(tokens, id).to_lengths(True).tolist() == none, id
    assert bk.delimiter_patch(tokens, 2**31 - 1).to_lengths(True).tolist() == [[1, 3, 3]]
    wide = torch.tensor([5, 2**32 + 5, 5, 2**63 - 1, 5], device=device)
    assert bk.delimiter_patch(wide, 2**32 + 5).to_lengths(True).tolist() == [[1, 1, 4]]
    assert bk.delimiter_patch(wide, 2**63 - 1).to_lengths(True).tolist() == [[1, 3, 2]]


def test_thresholds_of_any_size(device: str) -> None:
    entropy = torch.tensor([1.0, 2.0, 3.0, 2.0], device=device)
    for threshold in (1e300, 10**300, float("inf"), 2**63):
        assert bk.patch_starts(entropy, threshold=threshold).to_lengths(True).tolist() == [[1, 4]]
        assert bk.patch_starts(entropy, threshold=-threshold).to_lengths(True).tolist() == [[1] * 5]


def test_a_capacity_beyond_int32_is_named() -> None:
    cu_seqlens, entropy = torch.tensor([0, 5]), torch.zeros(5)
    tokens = torch.zeros(5, dtype=torch.int64)
    for size in LARGE[1:]:
        for call in (
            lambda n: bk.patch_starts(entropy, threshold=1.0, max_patches=n),
            lambda n: bk.entropy_patch(entropy[:, None], threshold=1.0, max_patches=n),
            lambda n: bk.topk_patch(entropy, 4, max_patches=n),
            lambda n: bk.static_patch(cu_seqlens, 4, max_patches=n),
            lambda n: bk.space_patch(tokens, max_patches=n),
            lambda n: bk.delimiter_patch(tokens, 3, max_patches=n),
            lambda n: PatchLayout.from_cuts(tokens > 0, cu_seqlens.int(), n),
            lambda n: build("blt").patch(tokens + 4, max_patches=n),
        ):
            with pytest.raises(ValueError, match=rf"max_patches: expected at most .*, as int32 ids count, got {size}"):
                call(size)
    largest = bk.patch_starts(entropy.to("meta"), threshold=1.0, max_patches=2**31 - 1)
    assert largest.capacity == 2**31 - 1


def test_kernels_refuse_a_capacity_beyond_int32(backend: str, device: str) -> None:
    """Called without the public function."""
    offsets = torch.tensor([0, 5], dtype=torch.int32, device=device)
    for size in (2**31, 2**32 + 1, 2**63 - 1):
        with pytest.raises((RuntimeError, ValueError), match="max_patches: expected"):
            torch.ops.blt_kernels.static_patch_fwd(offsets, 5, 2, 1, size)


# --- n-grams ----------------------------------------------------------------------------------------------------------


def hashes(rows: list[list[int]], size: int, prime: int, vocab: int) -> list[int]:
    """Return hashes by the definition: ids of 0 before the document add nothing but a power."""
    result = []
    for row in rows:
        for end in range(1, len(row) + 1):
            window = row[max(0, end - size) : end]
            total = sum(id * pow(prime, size - len(window) + j, 2**64) for j, id in enumerate(window))
            result.append(((total + 2**63) % 2**64 - 2**63) % vocab)
    return result


@pytest.mark.parametrize("sizes", [(1, 6, 7, 8), (3, 2**31 - 1, 2**31), (2**32 + 1, 2**62), (2**63 - 1, 1)])
def test_ngrams_of_any_length(sizes: tuple[int, ...], device: str) -> None:
    rows = [[5, 200, 7, 7, 259, 4], [], [9], [4] * 7]
    tokens = torch.tensor(list(itertools.chain(*rows)), device=device)
    cu_seqlens = torch.tensor([0, *(len(row) for row in rows)], device=device).cumsum(0)
    for vocab in (1, 53, *LARGE):
        expected = [hashes(rows, size, prime, vocab) for prime in PRIMES[:2] for size in sizes]
        actual = bk.ngram_hash(tokens, cu_seqlens, ngram_sizes=sizes, num_functions=2, vocab=vocab)
        assert actual.tolist() == expected, vocab


def test_embeddings_of_ngrams_of_any_length(device: str) -> None:
    tokens = torch.tensor([5, 200, 7, 7, 259, 4, 9], device=device)
    cu_seqlens = torch.tensor([0, 5, 7], device=device)
    sizes = (3, 2**31, 2**63 - 1)
    rows = bk.ngram_hash(tokens, cu_seqlens, ngram_sizes=sizes, vocab=53)
    for grad in ("dense", "sparse"):
        tables = [random_normal(53, 4, dtype=torch.float64, seed=i).to(device).requires_grad_() for i in range(3)]
        out = bk.ngram_hash_embed(tokens, tables, None, cu_seqlens, ngram_sizes=sizes, grad=grad)
        torch.testing.assert_close(out, sum(table[row] for table, row in zip(tables, rows, strict=True)))
        out.backward(torch.ones_like(out))
        for table, row in zip(tables, rows, strict=True):
            counts = torch.bincount(row, minlength=53).double()
            assert_equal(table.grad.to_dense(), counts[:, None].expand(53, 4).contiguous())


def test_shards_of_a_table_of_any_size(device: str) -> None:
    tokens = torch.tensor([5, 200, 7], device=device)
    for vocab in LARGE[1:]:
        row = int(bk.ngram_hash(tokens, ngram_sizes=(3,), vocab=vocab)[0, 2])
        table = random_normal(9, 4, dtype=torch.float32, seed=1).to(device)
        low = row - 4
        out = bk.ngram_hash_embed(tokens, table, ngram_sizes=(3,), row_range=(low, low + 9), vocab=vocab)
        assert_equal(out[2], table[4])


# --- beyond the largest integer, and more positions than int32 counts -------------------------------------------------


def test_an_int_beyond_int64_is_named(device: str) -> None:
    tokens = torch.tensor([5, 6, 7], device=device)
    cu_seqlens, entropy, q = torch.tensor([0, 3], device=device), torch.zeros(3, device=device), torch.zeros(3, 1, 8)
    q = q.to(device)
    layout = bk.byte_patch(cu_seqlens, num_bytes=3)
    calls: dict[str, Any] = {
        "window": lambda n: bk.block_causal_attention(q, q, q, window=n),
        "window ": lambda n: bk.patch_cross_attention(
            q, q, q, layout, direction="encode", queries_per_patch=1, window=n
        ),
        "queries_per_patch": lambda n: bk.patch_cross_attention(
            q, q, q, layout, direction="encode", queries_per_patch=n
        ),
        "max_patch_length": lambda n: bk.patch_starts(entropy, threshold=1.0, max_patch_length=n),
        "max_patches": lambda n: bk.patch_starts(entropy, threshold=1.0, max_patches=n),
        "size": lambda n: bk.static_patch(cu_seqlens, n, num_bytes=3),
        "first": lambda n: bk.static_patch(cu_seqlens, 1, n, num_bytes=3),
        "num_bytes": lambda n: bk.static_patch(cu_seqlens, 1, num_bytes=n),
        "patch_size": lambda n: bk.topk_patch(entropy, n),
        "id": lambda n: bk.delimiter_patch(tokens, n),
        "vocab": lambda n: bk.ngram_hash(tokens, vocab=n),
        "ngram_sizes": lambda n: bk.ngram_hash(tokens, ngram_sizes=(3, n), vocab=5),
    }
    for name, call in calls.items():
        for value in (2**63, 2**64 + 1, 10**400):
            with pytest.raises(ValueError, match=rf"^{name.strip()}: expected a value <= 2\*\*63 - 1, got {value}$"):
                call(value)
    with pytest.raises(ValueError, match="threshold: expected a number that a float holds, got an int of 1329 bits"):
        bk.patch_starts(entropy, threshold=10**400)
    for size in LARGE:
        with pytest.raises(ValueError, match=r"q: expected shape \[C \* K = 3 \* "):
            calls["queries_per_patch"](size)


def test_any_number_of_queries_for_no_patch(device: str) -> None:
    layout = make_layout(0, 1).to(device)
    nothing = torch.zeros(0, 2, 8, device=device)
    for direction, count in itertools.product(("encode", "decode"), LARGE):
        out = bk.patch_cross_attention(nothing, nothing, nothing, layout, direction=direction, queries_per_patch=count)
        assert out.shape == (0, 2, 8)


def test_more_positions_than_int32_counts_are_named() -> None:
    tokens = torch.empty(2**16, 2**15, dtype=torch.int64, device="meta")
    q = torch.empty(2**16, 2**15, 1, 8, device="meta")
    packed, offsets = q.view(2**31, 1, 8), torch.tensor([0, 3], device="meta")
    calls: dict[str, Any] = {
        "tokens": lambda: bk.space_patch(tokens),
        "tokens ": lambda: bk.ngram_hash(tokens, vocab=5),
        "logits": lambda: bk.entropy_patch(q[:, :, 0], threshold=1.0),
        "entropy": lambda: bk.patch_starts(tokens.float(), threshold=1.0),
        "q": lambda: bk.block_causal_attention(packed, packed, packed),
        "q ": lambda: bk.block_causal_attention(q, q, q),
        "cu_seqlens_q": lambda: bk.block_causal_attention(packed, packed, packed, offsets),
        "num_bytes": lambda: bk.static_patch(offsets, 4, num_bytes=2**31),
    }
    for name, call in calls.items():
        message = rf"^{name.strip()}: expected at most 2\*\*31 - 1 positions, which int32 offsets reach, got 2147483648"
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("used", [2**31, 2**32 + 1, 2**63 - 1])
def test_keys_beyond_a_document_do_not_count(used: int) -> None:
    q = torch.zeros(3, 1, 8)
    with pytest.raises(ValueError, match=f"seqused_k: expected 0 to 3 keys, the length of document 0, got {used}"):
        bk.block_causal_attention(q, q, q, torch.tensor([0, 3]), seqused_k=torch.tensor([used]))


@pytest.mark.parametrize("offset", [2**31, 2**32 + 3, 2**63 - 1])
def test_offsets_are_not_narrowed(offset: int) -> None:
    tokens = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"cu_seqlens: expected offsets .* at most at 5, got \[0, {offset}\]"):
        bk.space_patch(tokens, torch.tensor([0, offset]))
