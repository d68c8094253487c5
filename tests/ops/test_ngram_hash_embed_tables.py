"""ngram_hash_embed with tables of different sizes, in either order, of any of the hash functions."""

from __future__ import annotations

from typing import Any

import backends
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_calls import LargestTensor
from torch import Tensor

from blt_kernels import ngram_hash, ngram_hash_embed
from blt_kernels.ids import to_ids
from blt_kernels.reference import ngram_hash_embed as reference
from blt_kernels.testing import assert_equal, document_lengths, offsets_of, real_text

SIZES, FUNCTIONS, V, D, A = (3, 1), (4, 0, 9), (41, 1, 7, 300, 12, 2), 5, 260
OPTIONS = {"ngram_sizes": SIZES, "functions": FUNCTIONS, "table_order": "size_major"}
N = len(V)


def text(num_bytes: int, device: str = "cpu") -> Tensor:
    return to_ids(real_text(num_bytes, 0), device=device)


def parameters(device: str = "cpu", rows: tuple[int, ...] = V) -> tuple[Tensor, Tensor]:
    """Return a fused table and a byte table of whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(7)
    fused = torch.randint(-9, 9, (sum(rows), D), generator=generator).to(device, torch.float32)
    return fused, torch.randint(-9, 9, (A, D), generator=generator).to(device, torch.float32)


def exact_hashes(document: list[int], sizes: list[int], primes: list[int], rows: list[int]) -> list[list[int]]:
    """Return the row of each byte in each table, in integers of any length."""
    hashes = []
    for size, prime, vocab in zip(sizes, primes, rows, strict=True):
        padded = [0] * (size - 1) + document
        totals = [sum(padded[i + j] * prime**j for j in range(size)) for i in range(len(document))]
        hashes.append([((total + 2**63) % 2**64 - 2**63) % vocab for total in totals])
    return hashes


# --- hashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["function_major", "size_major"])
def test_order_of_tables(order: str, device: str) -> None:
    tokens = text(40, device)
    primes = [reference.PRIMES[f] for f in FUNCTIONS]
    tables = [(size, prime) for prime in primes for size in SIZES]
    if order == "size_major":
        tables = [(size, prime) for size in SIZES for prime in primes]
    sizes, table_primes = map(list, zip(*tables, strict=True))
    hashes = ngram_hash(tokens, ngram_sizes=SIZES, functions=FUNCTIONS, table_order=order, vocab=V)
    assert hashes.tolist() == exact_hashes(tokens.tolist(), sizes, table_primes, list(V))


def test_one_function_of_several(device: str) -> None:
    """The 11 functions one by one give what they give together."""
    tokens = text(50, device).view(2, 25)
    together = ngram_hash(tokens, ngram_sizes=(2, 5), num_functions=11, vocab=1009)
    for function in range(11):
        alone = ngram_hash(tokens, ngram_sizes=(2, 5), functions=(function,), vocab=1009)
        assert_equal(alone, together[2 * function : 2 * function + 2])


def test_agrees_with_the_loop_of_olmo_core(device: str) -> None:
    """allenai/OLMo-core loops over sizes, then over functions, with a number of rows for each table.

    Its hash function is that of facebookresearch/blt and transformers.
    """
    blt = pytest.importorskip("transformers.models.blt.modeling_blt")
    tokens, vocab = text(400, device).view(2, 200), [1536, 3072, 6144, 12288, 24576, 49152]
    hashes = ngram_hash(tokens, ngram_sizes=(3, 4), num_functions=3, table_order="size_major", vocab=vocab)
    table = 0
    for size in (3, 4):
        for function in range(3):
            prime = reference.PRIMES[function]
            assert_equal(hashes[table], blt.byte_group_hash_function(tokens, size, prime, vocab[table]))
            table += 1


@given(
    st.lists(st.integers(0, 259), max_size=12),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 10), st.integers(1, 2**32 - 1)), min_size=1, max_size=5),
)
def test_any_tables_in_exact_integers(device: str, document: list[int], tables: list[tuple[int, int, int]]) -> None:
    """The operator takes a size, a function and a number of rows for each table, in any order."""
    sizes, functions, rows = map(list, zip(*tables, strict=True))
    tokens = torch.tensor(document, dtype=torch.int64, device=device)
    hashes = torch.ops.blt_kernels.ngram_hash_fwd(tokens, None, 1 if document else 0, sizes, functions, rows)
    assert hashes.tolist() == exact_hashes(document, sizes, [reference.PRIMES[f] for f in functions], rows)


# --- embeddings -------------------------------------------------------------------------------------------------------


def looped(tokens: Tensor, tables: Any, byte_table: Tensor, cu_seqlens: Tensor, **_: Any) -> Tensor:
    """Add one embedding after the other."""
    hashes = ngram_hash(tokens, cu_seqlens, vocab=V, **OPTIONS)
    tables = tables.split(V) if isinstance(tables, Tensor) else tables
    inside = (torch.arange(tokens.shape[0], device=tokens.device) < cu_seqlens[-1])[:, None]
    out = F.embedding(tokens, byte_table)
    return sum((F.embedding(row, table) for row, table in zip(hashes, tables, strict=True)), out).where(inside, 0)


@pytest.mark.parametrize("form", ["fused", "list"])
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_forward_and_gradients(form: str, grad: str, device: str) -> None:
    tokens, cu_seqlens = text(300, device), offsets_of(document_lengths(297, 2), device=device)
    fused, byte_table = parameters(device)
    cotangent = torch.randint(-9, 9, (300, D), generator=torch.Generator().manual_seed(3)).to(device, torch.float32)
    results = []
    for function in (ngram_hash_embed, looped, reference.ngram_hash_embed_reference):
        leaves = [x.clone().requires_grad_() for x in ([fused] if form == "fused" else fused.split(V))]
        byte_leaf = byte_table.clone().requires_grad_()
        tables, vocab = (leaves[0], V) if form == "fused" else (leaves, None)
        out = function(tokens, tables, byte_leaf, cu_seqlens, grad=grad, vocab=vocab, **OPTIONS)
        grads = torch.autograd.grad(out, [*leaves, byte_leaf], cotangent)
        if grad == "sparse" and function is ngram_hash_embed:
            for part in grads:
                torch.sparse_coo_tensor(part._indices(), part._values(), part.shape, check_invariants=True)
                assert_equal(part._indices()[0], part._indices()[0].unique())
        results.append([out.detach(), *(g.to_dense() for g in grads)])
    for own, *others in zip(*results, strict=True):
        for other in others:
            assert_equal(own, other)


def test_tied_tables(device: str) -> None:
    """A tensor that stands for several tables gets the sum of their gradients."""
    (fused, _), tokens = parameters(device), text(60, device)
    a, b = (x.clone().requires_grad_() for x in (fused[:41], fused[41:48]))
    hashes = ngram_hash(tokens, vocab=(41, 7, 41, 41, 7, 7), **OPTIONS)
    ngram_hash_embed(tokens, [a, b, a, a, b, b], **OPTIONS).sum().backward()
    for leaf, own in ((a, (0, 2, 3)), (b, (1, 4, 5))):
        counts = torch.bincount(hashes[list(own)].flatten(), minlength=leaf.shape[0]).float()
        assert_equal(leaf.grad, counts[:, None].expand_as(leaf).contiguous())


@pytest.mark.parametrize("form", ["fused", "list"])
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_shards_add_up(form: str, grad: str, device: str) -> None:
    """A shard that begins after the last row of a table has no row of it."""
    tokens = text(90, device)
    whole = [x.requires_grad_() for x in parameters(device)]
    expected = ngram_hash_embed(tokens, *whole, vocab=V, **OPTIONS)
    cotangent = torch.randint(-9, 9, (90, D), generator=torch.Generator().manual_seed(3)).to(device, torch.float32)
    grad_fused, grad_byte_table = torch.autograd.grad(expected, whole, cotangent)
    total = torch.zeros_like(expected)
    for low, high in ((0, 2), (2, 12), (12, 300)):
        rows = [table[low:high] for table in whole[0].detach().split(V)]
        leaves = [x.clone().requires_grad_() for x in ([torch.cat(rows)] if form == "fused" else rows)]
        byte_leaf = whole[1].detach().clone().requires_grad_()
        tables = leaves[0] if form == "fused" else leaves
        options = {"row_range": (low, high), "vocab": V, "grad": grad, **OPTIONS}
        out = ngram_hash_embed(tokens, tables, byte_leaf, **options)
        assert_equal(out.detach(), reference.ngram_hash_embed_reference(tokens, tables, byte_leaf, **options).detach())
        total = total + out.detach()
        *own, own_byte = (g.to_dense() for g in torch.autograd.grad(out, [*leaves, byte_leaf], cotangent))
        assert_equal(torch.cat(own), torch.cat([table[low:high] for table in grad_fused.split(V)]))
        assert_equal(own_byte, grad_byte_table * (low == 0))
    assert_equal(total, expected.detach())


def test_gradcheck(device: str) -> None:
    fused, byte_table = (x.double() for x in parameters(device))
    tokens = text(12, device) % 7
    leaves = [x.clone().requires_grad_() for x in (*fused.split(V), byte_table[:7])]
    function = lambda *x: ngram_hash_embed(tokens, list(x[:-1]), x[-1], **OPTIONS)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_tables_are_not_copied() -> None:
    rows = (700, 1000, 20, 900, 800, 30)
    fused, byte_table = parameters(rows=rows)
    for tables, vocab in ((fused, rows), (list(fused.split(rows)), None)):
        with LargestTensor() as largest:
            ngram_hash_embed(text(20), tables, byte_table, vocab=vocab, **OPTIONS)
        assert largest.numel < 1000


def test_compiles_once_for_any_sizes() -> None:
    torch._dynamo.reset()
    function = lambda tokens, *tables: ngram_hash_embed(tokens, list(tables), ngram_sizes=(2, 4))  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_bytes, rows in ((20, (6, 9)), (33, (12, 7)), (50, (100, 3))):
            leaves = [x.clone().requires_grad_() for x in parameters(rows=rows)[0].split(rows)]
            grads = []
            for call in (compiled, function):
                grads.append(torch.autograd.grad(call(text(num_bytes), *leaves).square().sum(), leaves))
            for own, expected in zip(*grads, strict=True):
                assert_equal(own, expected)


# --- argument errors --------------------------------------------------------------------------------------------------

GOOD = {"tokens": torch.arange(10), "tables": torch.zeros(9, 3), "ngram_sizes": (2, 3), "vocab": (4, 5)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vocab": (4,)}, ValueError, r"vocab: expected an int or N = 2 ints, one for each table, got \(4,\)"),
        ({"vocab": (4, 5.0)}, TypeError, "vocab: expected an int, got 5.0"),
        ({"vocab": (9, 0)}, ValueError, "vocab: expected a value >= 1, got 0"),
        (
            {"vocab": (4, 6)},
            ValueError,
            r"tables: expected 10 rows, since vocab is \(4, 6\) and row_range None, got shape \[9, 3\]",
        ),
        (
            {"tables": [torch.zeros(4, 3)] * 2},
            ValueError,
            r"tables\[1\]: expected 5 rows, since vocab is \(4, 5\) and row_range None, got shape \[4, 3\]",
        ),
        ({"tables": [torch.zeros(4, 3), torch.zeros(0, 3)], "vocab": None}, ValueError, r"tables\[1\]: expected at le"),
        (
            {"row_range": (1, 9)},
            ValueError,
            r"row_range: expected 0 <= lo < hi <= vocab = 5, got \(1, 9\)",
        ),
        ({"functions": 2}, TypeError, "functions: expected a sequence of at least one int, got 2"),
        ({"functions": ()}, TypeError, r"functions: expected a sequence of at least one int, got \(\)"),
        ({"functions": (11,)}, ValueError, "functions: expected numbers from 0 to 10, got 11"),
        ({"functions": (-1,)}, ValueError, "functions: expected a value >= 0, got -1"),
        ({"functions": (True,)}, TypeError, "functions: expected an int, got True"),
        (
            {"functions": (1, 2), "num_functions": 3},
            ValueError,
            r"num_functions: expected none beside functions=\(1, 2\), got 3",
        ),
        (
            {"table_order": "sizes"},
            ValueError,
            "table_order: expected one of 'function_major', 'size_major', got 'sizes'",
        ),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    ngram_hash_embed(**GOOD)
    with pytest.raises(error, match=message):
        ngram_hash_embed(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("sizes", "functions", "vocab", "message"),
    [
        ([2], [0, 1], [5], "functions: expected one entry or one for each of 1 tables, got 2"),
        ([2], [0], [5, 6], "vocab: expected one entry or one for each of 1 tables, got 2"),
        ([2, 3], [0], [], "vocab: expected one entry or one for each of 2 tables, got 0"),
        ([2], [11], [5], "functions: expected 0 to 10, got 11"),
        ([2], [0], [0], "vocab: expected values >= 1, got 0"),
    ],
)
def test_errors_of_the_operator(sizes: list[int], functions: list[int], vocab: list[int], message: str) -> None:
    """Called without the public function."""
    backends.emulator()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.blt_emulated.ngram_hash_fwd(torch.arange(4), None, 1, sizes, functions, vocab)


def test_more_rows_than_uint32_where_sizes_differ_are_refused_on_cuda() -> None:
    backends.emulator()
    arguments = torch.arange(4), None, 1, [1, 1], [0, 0]
    assert torch.ops.blt_emulated.ngram_hash_fwd(*arguments, [2**32 - 1, 3]).tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    with pytest.raises(RuntimeError, match=r"vocab: expected less than 2\*\*32 rows .* got 4294967296"):
        torch.ops.blt_emulated.ngram_hash_fwd(*arguments, [2**32, 3])
