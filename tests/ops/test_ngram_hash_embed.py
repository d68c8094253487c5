"""ngram_hash and ngram_hash_embed: hashes by hand, in exact integers and in transformers, gradients, shards, errors.

Last, what only the emulator can tell of the CUDA kernels: bytes moved, orders, values of arguments that make no sense.
"""

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
from torch.utils._pytree import tree_leaves

from blt_kernels import ngram_hash, ngram_hash_embed
from blt_kernels.ids import to_ids
from blt_kernels.reference import ngram_hash_embed as reference
from blt_kernels.testing import assert_close, document_lengths, offsets_of, real_text

PRIMES = (1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133, 2860486313,
          5463458053, 3367900313)  # fmt: skip
SIZES, FUNCTIONS, V, D, A = (3, 1, 5), 2, 41, 4, 260
N = len(SIZES) * FUNCTIONS
NAN = float("nan")


def exact_hash(document: list[int], i: int, size: int, prime: int, vocab: int) -> int:
    window = [document[j] if j >= 0 else 0 for j in range(i - size + 1, i + 1)]
    total = sum(token * prime**j for j, token in enumerate(window))
    return ((total + 2**63) % 2**64 - 2**63) % vocab


def text(num_bytes: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return to_ids(real_text(num_bytes, seed), device=device)


def parameters(device: str = "cpu", dtype: torch.dtype = torch.float64, rows: int = V) -> tuple[Tensor, Tensor]:
    """Return a fused table and a byte table."""
    generator = torch.Generator().manual_seed(7)
    tables = torch.randn(N * rows, D, dtype=torch.float64, generator=generator).to(device, dtype)
    return tables, torch.randn(A, D, dtype=torch.float64, generator=generator).to(device, dtype)


def embed(tokens: Tensor, tables: Any, byte_table: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
    return ngram_hash_embed(tokens, tables, byte_table, *args, ngram_sizes=SIZES, num_functions=FUNCTIONS, **options)


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_hash_by_hand(device: str) -> None:
    p = PRIMES[0]
    tokens = torch.tensor([5, 6, 7, 8, 9], device=device)
    hashes = ngram_hash(tokens, torch.tensor([0, 3, 4], device=device), ngram_sizes=(1, 2, 3), vocab=10**6)
    # Documents 5 6 7 and 8; 9 belongs to none. The oldest byte of a window is multiplied by 1.
    assert hashes.tolist() == [
        [5, 6, 7, 8, 0],
        [5 * p % 10**6, (5 + 6 * p) % 10**6, (6 + 7 * p) % 10**6, 8 * p % 10**6, 0],
        [5 * p**2 % 10**6, (5 * p + 6 * p**2) % 10**6, (5 + 6 * p + 7 * p**2) % 10**6, 8 * p**2 % 10**6, 0],
    ]
    # 200 * p**7 wraps around to a negative number; the remainder is the floored one.
    wrapped = (200 * p**7 + 2**63) % 2**64 - 2**63
    assert wrapped < 0
    got = ngram_hash(torch.tensor([200], device=device), ngram_sizes=(8,), vocab=500002)
    assert got.tolist() == [[wrapped % 500002]]


def test_every_prime(device: str) -> None:
    """Tables are ordered by function, then by size."""
    tokens, sizes = text(30, device=device), (2, 9)
    hashes = ngram_hash(tokens, ngram_sizes=sizes, num_functions=11, vocab=10007)
    values = tokens.tolist()
    expected = [[exact_hash(values, i, n, p, 10007) for i in range(30)] for p in PRIMES for n in sizes]
    assert hashes.tolist() == expected
    assert hashes.dtype == torch.int64


@given(st.lists(st.lists(st.integers(0, 259), max_size=12), max_size=4), st.integers(1, 12), st.integers(1, 2**40))
def test_any_documents_in_exact_integers(device: str, documents: list[list[int]], size: int, vocab: int) -> None:
    tokens = torch.tensor([token for document in documents for token in document], dtype=torch.int64, device=device)
    cu_seqlens = offsets_of([len(d) for d in documents], device=device)
    hashes = ngram_hash(tokens, cu_seqlens, ngram_sizes=(size,), num_functions=2, vocab=vocab)
    expected = [[exact_hash(d, i, size, p, vocab) for d in documents for i in range(len(d))] for p in PRIMES[:2]]
    assert hashes.tolist() == expected


@pytest.mark.parametrize("vocab", [1, 2, 3, 256, 2**31 - 1, 2**32 + 1, 2**62, 2**62 + 1, 2**63 - 1])
def test_every_kind_of_remainder(vocab: int, device: str) -> None:
    tokens = torch.tensor([2**31 - 1, -(2**31), 0, 259, 4, 4, 4, 4, 4, -1], dtype=torch.int32, device=device)
    values = tokens.tolist()
    expected = [[exact_hash(values, i, n, PRIMES[0], vocab) for i in range(10)] for n in (1, 2, 8)]
    assert ngram_hash(tokens, ngram_sizes=(1, 2, 8), vocab=vocab).tolist() == expected


@pytest.mark.parametrize("vocab", [1, 30000, 500002])
def test_agrees_with_transformers(vocab: int, device: str) -> None:
    blt = pytest.importorskip("transformers.models.blt.modeling_blt")
    tokens = text(600, device=device).view(3, 200)
    hashes = ngram_hash(tokens, num_functions=3, vocab=vocab).view(3, 6, 3, 200)
    for function in range(3):
        for i, size in enumerate(range(3, 9)):
            theirs = blt.byte_group_hash_function(tokens, size, prime=PRIMES[function], max_hash=vocab)
            assert torch.equal(hashes[function, i], theirs)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_short_documents(length: int, device: str) -> None:
    tokens, (tables, byte_table) = text(length, device=device), parameters(device)
    for offsets in ([0, length], [0, 0, length, length], [0]):
        cu_seqlens = torch.tensor(offsets, device=device)
        hashes = ngram_hash(tokens, cu_seqlens, ngram_sizes=SIZES, num_functions=FUNCTIONS, vocab=V)
        assert hashes.shape == (N, length)
        leaf = tables.clone().requires_grad_()
        out = embed(tokens, leaf, byte_table, cu_seqlens)
        expected = F.embedding(tokens, byte_table) + sum(tables[i * V + h] for i, h in enumerate(hashes))
        torch.testing.assert_close(out, expected * (len(offsets) > 1), rtol=1e-12, atol=1e-12)
        out.sum().backward()
        assert leaf.grad.sum().item() == pytest.approx(N * D * length * (len(offsets) > 1))


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_embedding_by_hand(device: str) -> None:
    """Tables of 10, 100 ... times the row; the byte table holds the negative id. One byte beyond the documents."""
    tokens = torch.tensor([4, 5, 6], device=device)
    hashes = ngram_hash(tokens, ngram_sizes=(1, 2), num_functions=2, vocab=9)
    tables = [10.0**i * torch.arange(9.0, device=device)[:, None] for i in range(4)]
    byte_table = -torch.arange(300.0, device=device)[:, None]
    cu_seqlens = torch.tensor([0, 2], device=device)
    out = ngram_hash_embed(tokens, tables, byte_table, cu_seqlens, ngram_sizes=(1, 2), num_functions=2)
    digits = [sum(10.0**i * h for i, h in enumerate(hashes[:, byte].tolist())) for byte in range(2)]
    assert out.flatten().tolist() == [digits[0] - 4, digits[1] - 5, 0]
    without = ngram_hash_embed(tokens, tables, None, cu_seqlens, ngram_sizes=(1, 2), num_functions=2)
    assert without.flatten().tolist() == [*digits, 0]
    assert torch.equal(
        ngram_hash_embed(tokens, torch.cat(tables), byte_table, cu_seqlens, ngram_sizes=(1, 2), num_functions=2), out
    )


def test_padded_is_packed(device: str) -> None:
    tokens, (tables, byte_table) = text(60, device=device), parameters(device)
    cu_seqlens = torch.arange(4, device=device) * 20
    padded, options = tokens.view(3, 20), {"ngram_sizes": SIZES, "num_functions": FUNCTIONS}
    for hash_, function in (
        (ngram_hash, ngram_hash_embed),
        (reference.ngram_hash_reference, reference.ngram_hash_embed_reference),
    ):
        hashes = hash_(tokens, cu_seqlens, vocab=V, **options)
        assert torch.equal(hash_(padded, vocab=V, **options), hashes.view(N, 3, 20))
        out = function(tokens, tables, byte_table, cu_seqlens, **options)
        assert torch.equal(function(padded, tables, byte_table, **options), out.view(3, 20, D))
        assert not torch.equal(function(tokens, tables, byte_table, **options), out), (
            "without offsets it is one document"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype, device: str) -> None:
    big = 1 / torch.finfo(dtype).eps * 2  # the next number is 2 more: added one by one, ones are lost
    tables = [torch.full((5, 1), 1.0, dtype=dtype, device=device) for _ in range(6)]
    byte_table = torch.full((A, 1), big, dtype=dtype, device=device)
    out = ngram_hash_embed(text(9, device=device), tables, byte_table)
    assert (out.double() == big + 6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_error_against_looped_embeddings(dtype: torch.dtype, grad: str, device: str) -> None:
    """transformers and facebookresearch/blt add one nn.Embedding after the other."""
    tokens, (tables, byte_table) = text(400, device=device), parameters(device, dtype)
    hashes = ngram_hash(tokens, ngram_sizes=SIZES, num_functions=FUNCTIONS, vocab=V)

    def plain(tables: Tensor, byte_table: Tensor) -> Tensor:
        out = F.embedding(tokens, byte_table)
        for i, row in enumerate(hashes):
            out = out + F.embedding(row + i * V, tables)
        return out

    results = []
    cotangent = torch.randn(400, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for function, cast in ((lambda *x: embed(tokens, *x, grad=grad), dtype), (plain, dtype), (plain, torch.float64)):
        leaves = [x.to(cast).requires_grad_() for x in (tables, byte_table)]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, cotangent.to(cast))
        results.append([out.detach(), *(g.to_dense() for g in grads)])
    for name, *values in zip(("out", "grad_tables", "grad_byte_table"), *results, strict=True):
        assert_close(*values, name=name)


def test_tables_are_not_copied() -> None:
    tables, byte_table = parameters(rows=1000)
    for form in (tables, list(tables.chunk(N))):
        with LargestTensor() as largest:
            embed(text(20), form, byte_table)
            reference.ngram_hash_embed_reference(text(20), form, byte_table, ngram_sizes=SIZES, num_functions=FUNCTIONS)
        assert largest.numel < 1000


# --- gradients --------------------------------------------------------------------------------------------------------


def all_grads(form: str, grad: str, device: str, function: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """Return leaves and their gradients for ragged documents; the last bytes are in none and have NaN gradients."""
    tables, byte_table = parameters(device)
    leaves = [x.clone().requires_grad_() for x in ([tables] if form == "fused" else tables.chunk(N))]
    byte_leaf = byte_table.clone().requires_grad_()
    cotangent = torch.randn(93, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(device)
    cotangent[90:] = NAN if function is None else 0
    options = {"ngram_sizes": SIZES, "num_functions": FUNCTIONS, "grad": grad}
    given_tables = leaves[0] if form == "fused" else leaves
    cu_seqlens = offsets_of(document_lengths(90, 2), device=device)
    out = (function or ngram_hash_embed)(text(93, device=device), given_tables, byte_leaf, cu_seqlens, **options)
    return [*leaves, byte_leaf], list(torch.autograd.grad(out, [*leaves, byte_leaf], cotangent))


@pytest.mark.parametrize("form", ["fused", "list"])
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_backward_against_autograd_of_the_reference(form: str, grad: str, device: str) -> None:
    leaves, ours = all_grads(form, grad, device)
    _, theirs = all_grads(form, grad, device, reference.ngram_hash_embed_reference)
    for leaf, own, other in zip(leaves, ours, theirs, strict=True):
        assert own.layout == other.layout == (torch.strided if grad == "dense" else torch.sparse_coo)
        assert own.shape == leaf.shape
        torch.testing.assert_close(own.to_dense(), other.to_dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["fused", "list"])
def test_sparse_gradients_are_coalesced(form: str, device: str) -> None:
    _, dense = all_grads(form, "dense", device)
    leaves, sparse = all_grads(form, "sparse", device)
    for leaf, whole, part in zip(leaves, dense, sparse, strict=True):
        assert part.is_coalesced()
        torch.sparse_coo_tensor(part.indices(), part.values(), part.shape, is_coalesced=True, check_invariants=True)
        rows = part.indices()[0]
        assert torch.equal(rows, rows.unique())
        assert torch.equal(part.to_dense(), whole)
        assert torch.equal(rows, whole.any(1).nonzero()[:, 0])
        leaf.grad = part
    torch.optim.SparseAdam(leaves).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 8, 24])
def test_rows_of_larger_tensors(width: int, dtype: torch.dtype, device: str) -> None:
    """Strides, starts out of alignment, int32 ids; each bitwise what contiguous tensors give."""
    wide = torch.randn(N * V + A + 300, width + 9, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for first in (0, 1, 8):
        strided = wide[:, first : first + width].split([N * V, A, 300])
        results = []
        for tables, byte_table, cotangent in (strided, [x.clone() for x in strided]):
            leaves = [x.detach().requires_grad_() for x in (tables, byte_table)]
            out = embed(text(300, device=device).int(), *leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent)])
        for own, expected in zip(*results, strict=True):
            assert torch.equal(own, expected)


@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from(["dense", "sparse"]),
    st.booleans(),
)
def test_any_gradient(device: str, lengths: list[int], rows: int, width: int, grad: str, fused: bool) -> None:
    """Few rows, hence long runs; whole numbers, so that sums are exact in any order."""
    generator, total = torch.Generator().manual_seed(sum(lengths) + rows), sum(lengths)
    tokens = torch.randint(4, 7, (total + 2,), generator=generator).to(device)
    cotangent = torch.randint(-9, 9, (total + 2, width), generator=generator).to(device, torch.float32)
    cu_seqlens = offsets_of(lengths, device=device)
    tables = torch.zeros(N * rows, width, device=device)
    results = []
    for function in (ngram_hash_embed, reference.ngram_hash_embed_reference):
        leaves = [x.clone().requires_grad_() for x in ([tables] if fused else tables.chunk(N))]
        byte_leaf = torch.zeros(7, width, device=device, requires_grad=True)
        given_tables, options = leaves[0] if fused else leaves, {"ngram_sizes": SIZES, "num_functions": FUNCTIONS}
        out = function(tokens, given_tables, byte_leaf, cu_seqlens, grad=grad, **options)
        results.append([g.to_dense() for g in torch.autograd.grad(out, [*leaves, byte_leaf], cotangent)])
    for own, expected in zip(*results, strict=True):
        assert torch.equal(own, expected)


@pytest.mark.slow
@pytest.mark.parametrize("grad", ["dense", "sparse"])
@pytest.mark.parametrize(("num_functions", "width"), [(11, 40), (1, 1100)])
def test_many_tables_long_sums_and_wide_rows(num_functions: int, width: int, grad: str, device: str) -> None:
    """67 rows a byte, and up to 3000 bytes a row: numbers are whole, so sums are exact in any order."""
    sizes, rows = (1, 2, 3, 4, 5, 30), 3
    tokens = text(3000, device=device)
    tables = torch.randint(-9, 9, (num_functions * len(sizes) * rows, width), device=device).float().requires_grad_()
    byte_table = torch.randint(-9, 9, (A, width), device=device).float().requires_grad_()
    cotangent = torch.randint(-9, 9, (3000, width), device=device).float()
    results = []
    for function in (ngram_hash_embed, reference.ngram_hash_embed_reference):
        out = function(tokens, tables, byte_table, ngram_sizes=sizes, num_functions=num_functions, grad=grad)
        grads = torch.autograd.grad(out, (tables, byte_table), cotangent)
        results.append([out, *(g.to_dense() for g in grads)])
    for own, expected in zip(*results, strict=True):
        assert torch.equal(own, expected)


def test_gradcheck(device: str) -> None:
    tables, byte_table = parameters(device, rows=3)
    tokens = text(12, device=device) % 7
    leaves = [tables.requires_grad_(), byte_table[:7].clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: embed(tokens, *x), leaves, fast_mode=True)
    chunks = [x.detach().clone().requires_grad_() for x in tables.chunk(N)]
    assert torch.autograd.gradcheck(lambda *x: embed(tokens, list(x)), chunks, fast_mode=True)


@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_frozen_parameters_get_no_gradient(grad: str, device: str) -> None:
    (tables, byte_table), tokens = parameters(device), text(30, device=device)
    chunks = [x.clone() for x in tables.chunk(N)]
    chunks[2].requires_grad_()
    embed(tokens, chunks, byte_table, grad=grad).sum().backward()
    assert [x.grad is not None for x in (*chunks, byte_table)] == [i == 2 for i in range(N + 1)]
    expected = torch.zeros(V, D, dtype=torch.float64, device=device)
    for row in ngram_hash(tokens, ngram_sizes=SIZES, num_functions=FUNCTIONS, vocab=V)[2]:
        expected[row] += 1
    assert torch.equal(chunks[2].grad.to_dense(), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_with_sparse_gradients(backend: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda *x: embed(*x, grad="sparse"), fullgraph=True, dynamic=True, backend=backend)
    for num_bytes in (20, 50):
        tables, byte_table = (x.requires_grad_() for x in parameters())
        function(text(num_bytes), tables, byte_table).sum().backward()
        own = tables.grad
        tables.grad = None
        embed(text(num_bytes), tables, byte_table).sum().backward()
        assert own.layout == torch.sparse_coo
        assert torch.equal(own.to_dense(), tables.grad)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fused", "list"])
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_shards_add_up(form: str, grad: str, device: str) -> None:
    """Every rank holds some rows of every table and a copy of the byte table; an all-reduce adds the outputs."""
    tables, byte_table = (x.to(device) for x in parameters())
    tokens, cu_seqlens = text(90, device=device), offsets_of(document_lengths(88, 2), device=device)
    whole = [x.requires_grad_() for x in (tables, byte_table)]
    expected = embed(tokens, *whole, cu_seqlens)
    cotangent = torch.randn(90, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(device)
    grad_tables, grad_byte_table = torch.autograd.grad(expected, whole, cotangent)
    total = 0
    for low, high in ((0, 1), (1, 30), (30, V)):
        rows = tables.detach().view(N, V, D)[:, low:high]
        shard = [rows.flatten(0, 1).clone()] if form == "fused" else [x.clone() for x in rows]
        leaves = [*(x.requires_grad_() for x in shard), byte_table.detach().clone().requires_grad_()]
        given_tables = leaves[0] if form == "fused" else leaves[:-1]
        out = embed(tokens, given_tables, leaves[-1], cu_seqlens, row_range=(low, high), vocab=V, grad=grad)
        total = total + out
        *own, own_byte = (g.to_dense() for g in torch.autograd.grad(out, leaves, cotangent))
        expected_rows = grad_tables.view(N, V, D)[:, low:high].flatten(0, 1)
        torch.testing.assert_close(torch.cat(own), expected_rows, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_byte, grad_byte_table * (low == 0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


# --- ids and argument errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, A, 2**40])
def test_ids_outside_the_byte_table(bad: int) -> None:
    """An error in eager code on the CPU; where looking would cost, no byte embedding. Beyond the documents all go."""
    tables, byte_table = parameters()
    tokens = text(20)
    tokens[7] = bad
    with pytest.raises(ValueError, match=f"tokens: expected ids from 0 to 259, the rows of byte_table, got {bad}"):
        embed(tokens, tables, byte_table)
    assert embed(tokens, tables).shape == (20, D)
    assert torch.equal(
        embed(tokens, tables, byte_table, torch.tensor([0, 7]))[:7], embed(tokens[:7], tables, byte_table)
    )
    torch._dynamo.reset()
    compiled = torch.compile(embed, fullgraph=True, backend="eager")(tokens, tables, byte_table)
    assert torch.equal(compiled[7], embed(tokens, tables)[7])


GOOD = {"tokens": torch.arange(10), "tables": torch.zeros(12, 3), "byte_table": torch.zeros(260, 3)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": [1, 2]}, TypeError, "tokens: expected a tensor, got list"),
        ({"tokens": torch.zeros(10)}, TypeError, "tokens: expected dtype in int32, int64, got torch.float32"),
        ({"tokens": torch.zeros(1, 1, 1).long()}, ValueError, "tokens: expected 1 or 2 dimensions, got shape"),
        ({"tables": 3}, TypeError, "tables: expected a tensor or a sequence of tensors, got int"),
        ({"tables": [torch.zeros(2, 3)] * 5}, ValueError, r"tables: expected N = .* = 6 tensors, got 5"),
        ({"tables": [torch.zeros(2, 3)] * 5 + [1]}, TypeError, r"tables\[5\]: expected a tensor, got int"),
        (
            {"tables": [torch.zeros(2, 3)] * 5 + [torch.zeros(2, 4)]},
            ValueError,
            r"tables\[5\]: expected the width D = 3 of tables\[0\], got shape \[2, 4\]",
        ),
        (
            {"tables": [torch.zeros(2, 3)] * 5 + [torch.zeros(2, 3).half()]},
            TypeError,
            r"tables\[5\]: expected dtype torch.float32 of tables\[0\], got torch.float16",
        ),
        ({"tables": torch.zeros(12)}, ValueError, r"tables: expected 2 dimensions, got shape \[12\]"),
        ({"tables": torch.zeros(12, 3).int()}, TypeError, "tables: expected dtype in float32.*got torch.int32"),
        ({"tables": torch.zeros(13, 3)}, ValueError, r"tables: expected a multiple of N = 6 rows, got shape \[13, 3\]"),
        ({"tables": torch.zeros(0, 3)}, ValueError, r"tables: expected at least one row a table, got shape \[0, 3\]"),
        ({"tables": torch.zeros(12, 3, device="meta")}, ValueError, "tables: expected device cpu of tokens, got meta"),
        ({"byte_table": torch.zeros(260)}, ValueError, r"byte_table: expected 2 dimensions, got shape \[260\]"),
        ({"byte_table": torch.zeros(260, 4)}, ValueError, r"byte_table: expected the width D = 3 of tables, got shape"),
        ({"byte_table": torch.zeros(260, 3).half()}, TypeError, "byte_table: expected dtype torch.float32 of tables"),
        ({"byte_table": torch.zeros(0, 3)}, ValueError, "byte_table: expected at least one row, got 0"),
        ({"cu_seqlens": torch.tensor([0, 11])}, ValueError, "cu_seqlens: expected offsets .* at most at 10, got"),
        (
            {"tokens": torch.ones(2, 5).long(), "cu_seqlens": torch.tensor([0, 5])},
            ValueError,
            "cu_seqlens: expected None",
        ),
        ({"ngram_sizes": ()}, TypeError, r"ngram_sizes: expected a sequence of at least one int, got \(\)"),
        ({"ngram_sizes": 3}, TypeError, "ngram_sizes: expected a sequence of at least one int, got 3"),
        ({"ngram_sizes": (3, 0)}, ValueError, "ngram_sizes: expected a value >= 1, got 0"),
        ({"ngram_sizes": ("3",)}, TypeError, "ngram_sizes: expected an int, got '3'"),
        ({"num_functions": 0}, ValueError, "num_functions: expected a value >= 1, got 0"),
        ({"num_functions": 12}, ValueError, "num_functions: expected at most 11, got 12"),
        ({"grad": "none"}, ValueError, "grad: expected one of 'dense', 'sparse', got 'none'"),
        (
            {"vocab": 3},
            ValueError,
            r"tables: expected 18 rows, since vocab is 3 and row_range None, got shape \[12, 3\]",
        ),
        ({"row_range": (0, 2)}, ValueError, "vocab: expected the number of rows of a whole table, since row_range is"),
        ({"row_range": 2, "vocab": 9}, TypeError, r"row_range: expected a pair of ints \(lo, hi\), got 2"),
        ({"row_range": (0.0, 2), "vocab": 9}, TypeError, "row_range: expected an int, got 0.0"),
        ({"row_range": (-1, 1), "vocab": 9}, ValueError, "row_range: expected a value >= 0, got -1"),
        (
            {"row_range": (8, 10), "vocab": 9},
            ValueError,
            r"row_range: expected 0 <= lo < hi <= vocab = 9, got \(8, 10\)",
        ),
        ({"row_range": (2, 2), "vocab": 9}, ValueError, r"row_range: expected 0 <= lo < hi <= vocab = 9, got \(2, 2\)"),
        (
            {"row_range": (0, 3), "vocab": 9},
            ValueError,
            r"tables: expected 18 rows, since vocab is 9 and row_range \(0, 3\), got shape \[12, 3\]",
        ),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ngram_hash_embed(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": None}, TypeError, "tokens: expected a tensor, got NoneType"),
        ({"vocab": 0}, ValueError, "vocab: expected a value >= 1, got 0"),
        ({"vocab": 2.5}, TypeError, "vocab: expected an int, got 2.5"),
        ({"num_functions": True}, TypeError, "num_functions: expected an int, got True"),
        ({"ngram_sizes": []}, TypeError, r"ngram_sizes: expected a sequence of at least one int, got \[\]"),
    ],
)
def test_hash_errors(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ngram_hash(**{"tokens": torch.arange(10), "vocab": 5, **change})


# --- the CUDA kernels on the emulator ---------------------------------------------------------------------------------

LARGE = {"ngram_sizes": [3, 4, 5, 6, 7, 8], "functions": [0] * 6}  # BLT has these
EMULATED_BACKWARD = ["ngram_hash_embed_bwd", "ngram_hash_embed_sparse_bwd"]


def emulated(op: str, *arguments: Any) -> tuple[Any, list[Any]]:
    """Return the result of an operator, and its launches."""
    backends.emulator().take_launches()
    result = getattr(torch.ops.blt_emulated, op)(*arguments)
    return result, backends.emulator().take_launches()


def random_tokens(num_bytes: int) -> Tensor:
    return torch.randint(4, A, (num_bytes,), generator=torch.Generator().manual_seed(2))


def assert_traffic(launches: list[Any], minimum: float) -> None:
    moved = sum(launch.read + launch.written for launch in launches)
    assert 0.9 * minimum <= moved <= 1.1 * minimum, {x.kernel: (x.read, x.written) for x in launches}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_of_the_embedding(dtype: torch.dtype) -> None:
    backends.emulator()
    num_bytes, rows, width, tables = 256, 5000, 512, 6
    weights, byte_table = torch.ones(tables * rows, width, dtype=dtype), torch.ones(A, width, dtype=dtype)
    cu_seqlens = torch.tensor([0, 100, num_bytes, 4096], dtype=torch.int32)
    arguments = (cu_seqlens, 3, *LARGE.values())
    out, launches = emulated(
        "ngram_hash_embed_fwd",
        random_tokens(num_bytes),
        [weights],
        byte_table,
        *arguments,
        "dense",
        None,
        [rows] * tables,
    )
    assert (out == tables + 1).all()
    assert len(launches) == 1
    assert_traffic(launches, num_bytes * (8 + (tables + 2) * width * dtype.itemsize))
    _, launches = emulated("ngram_hash_fwd", random_tokens(4096), *arguments, [rows] * tables)
    assert_traffic(launches, 4096 * 8 * (1 + tables))


@pytest.mark.slow
@pytest.mark.parametrize("op", EMULATED_BACKWARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [600, 40000])
def test_traffic_of_the_gradient(rows: int, dtype: torch.dtype, op: str) -> None:
    """Rows are read once a list, and those that were read written; sorting 10 or 16 bits takes two passes.

    A dense gradient is zeroed besides.
    """
    backends.emulator()
    num_bytes, width, lists = 512, 768, 7
    grad_out, tokens = torch.ones(num_bytes, width, dtype=dtype), random_tokens(num_bytes)
    cu_seqlens = torch.tensor([0, 100, num_bytes], dtype=torch.int32)
    result, launches = emulated(op, grad_out, tokens, cu_seqlens, 2, *LARGE.values(), None, [rows] * 6, True, A)
    values = result if op.endswith("embed_bwd") else result[1]
    assert sum(x.sum(dtype=torch.float64).item() for x in values) == lists * num_bytes * width
    hashes = ngram_hash(tokens, cu_seqlens, vocab=rows)
    runs = sum(x.unique().numel() for x in (*hashes, tokens))
    zeroed = sum(x.shape[0] for x in values) if op.endswith("embed_bwd") else 0
    assert sum(x.written for x in launches if x.kernel == "memset") == zeroed * width * dtype.itemsize
    rows_moved, sort, find = lists * num_bytes + runs, 8 + 2 * 26, 8 + 8 + 8
    launches = [x for x in launches if x.kernel != "memset"]
    assert_traffic(launches, rows_moved * width * dtype.itemsize + lists * num_bytes * (sort + find) + 8 * runs)


def sums_by_id(ids: Tensor, op: str, grad_out: Tensor, rows: int = 200) -> tuple[Tensor, list[Any]]:
    """Return the gradient of a table that ids alone choose rows of, and the launches."""
    cu_seqlens = torch.tensor([0, ids.numel()], dtype=torch.int32)
    result, launches = emulated(op, grad_out, ids, cu_seqlens, 1, [1], [0], None, [rows], True, None)
    if op.endswith("embed_bwd"):
        return result[0], launches
    return torch.zeros(rows, grad_out.shape[1]).index_add_(0, result[0][0], result[1][0]), launches


@pytest.mark.parametrize("op", EMULATED_BACKWARD)
def test_long_runs_across_the_levels(op: str) -> None:
    """Lengths and places about multiples of 64 and 64^2; whole numbers, so that sums are exact in any order."""
    backends.emulator()
    lengths = [1, 63, 64, 0, 65, 1, 4095, 4096, 2, 61, 4097, 1, 8192, 0, 0, 12290, 127, 4032, 30]
    generator = torch.Generator().manual_seed(2)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ids = ids[torch.randperm(ids.numel(), generator=generator)]
    grad_out = torch.randint(-9, 9, (ids.numel(), 4), generator=generator).float()
    expected = torch.zeros(200, 4).index_add_(0, ids, grad_out)
    got, launches = sums_by_id(ids, op, grad_out)
    assert torch.equal(got, expected)
    assert sum("chunk_sums" in launch.kernel for launch in launches) == 2
    # A run takes at most 63 readers or sums a level, up and down, with two accesses each.
    assert max(launch.longest for launch in launches if "embed" in launch.kernel) <= 2 * 64 * (2 * 2 + 1)


@pytest.mark.parametrize("rows", [1, 190])
def test_no_thread_adds_up_more_for_long_runs(rows: int) -> None:
    """One row for the whole text takes three levels of sums."""
    backends.emulator()
    num_bytes = 2 * 64**3 + 5000
    ids = torch.arange(num_bytes) % rows
    grad, launches = sums_by_id(ids, "ngram_hash_embed_bwd", torch.ones(num_bytes, 1))
    assert torch.equal(grad[:, 0], ids.bincount(minlength=200).float())
    assert sum("chunk_sums" in launch.kernel for launch in launches) == 3
    assert max(launch.longest for launch in launches) <= 400


def test_sorting_moves_as_many_bytes_for_each_reader_of_a_long_text() -> None:
    """Scans of counts in two levels, and no tile that looks at all tiles before it."""
    backends.emulator()
    moved = []
    for num_bytes in (40 * 2048, 160 * 2048):
        _, launches = sums_by_id(torch.arange(num_bytes) % 190, "ngram_hash_embed_bwd", torch.ones(num_bytes, 1))
        kernels = [launch for launch in launches if "embed" not in launch.kernel and "chunk" not in launch.kernel]
        moved.append({x.kernel: (x.loaded + x.stored) / num_bytes for x in kernels})
        assert max(x.longest for x in kernels if "scan" in x.kernel) <= 2 * 64
    for kernel, each in moved[0].items():
        assert moved[1][kernel] <= max(1.01 * each, 1), kernel


@pytest.mark.parametrize(("rows", "passes"), [(1, 1), (255, 1), (256, 2), (65535, 2), (65536, 3)])
def test_only_digits_of_the_rows_are_sorted(rows: int, passes: int) -> None:
    backends.emulator()
    arguments = (torch.ones(9, 1), random_tokens(9), None, 1, [2], [0], None, [rows], True)
    _, launches = emulated("ngram_hash_embed_bwd", *arguments, None)
    assert sum("scatter" in launch.kernel for launch in launches) == passes


def test_rows_add_up_their_bytes_in_order() -> None:
    """Two tiles have runs too short to be split, so each sum is rounded as one that goes from byte to byte."""
    backends.emulator()
    tokens = torch.randint(4, 204, (3000,), generator=torch.Generator().manual_seed(8))
    grad_out = torch.randn(3000, 1, generator=torch.Generator().manual_seed(9)).exp()
    expected = torch.zeros(300, 1)
    for token, grad in zip(tokens.tolist(), grad_out, strict=True):
        expected[token] += grad
    assert int(tokens.bincount().max()) < 64
    arguments = (grad_out, tokens, None, 1, [1], [0], None, [300], True, 300)
    for grad in emulated("ngram_hash_embed_bwd", *arguments)[0]:  # these are of the table and of the byte table
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("width", [8, 5])
def test_every_order_of_blocks_and_threads_gives_the_same(width: int) -> None:
    """Tiles, chunks and long runs: 2500 bytes of text, some 500 of which are spaces."""
    num_bytes, rows = 2500, 300
    generator = torch.Generator().manual_seed(4)
    weights, byte_table = (torch.randn(n, width, generator=generator) for n in (6 * rows, A))
    grad_out = torch.randn(num_bytes, width, generator=generator)
    cu_seqlens = torch.tensor([0, 1000, 1000, 2499], dtype=torch.int32)

    def run() -> list[Tensor]:
        hashing = (cu_seqlens, 3, *LARGE.values())
        arguments = (grad_out, text(num_bytes), *hashing, None, [rows] * 6, True, A)
        return tree_leaves(
            [
                emulated(
                    "ngram_hash_embed_fwd", text(num_bytes), [weights], byte_table, *hashing, "dense", *arguments[-4:-2]
                ),
                *(emulated(op, *arguments)[0] for op in EMULATED_BACKWARD),
            ]
        )

    backends.emulator()
    expected = [x for x in run() if isinstance(x, Tensor)]
    for name in ("BACKWARD", "RANDOM"):
        with backends.order(name, seed=5):
            got = [x for x in run() if isinstance(x, Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name


@pytest.mark.parametrize("offsets", [[5, 3, -7, 2**31 - 1], [-(2**31), 2**31 - 1], [9, 9, 9], [0, 2**30, 4, 20], [0]])
def test_offsets_and_ids_that_make_no_sense_are_survived(offsets: list[int]) -> None:
    """Results are arbitrary, but nothing outside the tensors is touched, which the emulator would report."""
    backends.emulator()
    tokens = torch.randint(-(2**63), 2**63 - 1, (2100,), generator=torch.Generator().manual_seed(6))
    hashing = (torch.tensor(offsets, dtype=torch.int32), len(offsets) - 1, [1, 30, 4] * 2, [0] * 3 + [1] * 3)
    for vocab in ([7] * 6, [7, 12, 2, 6, 8, 7]):
        emulated("ngram_hash_fwd", tokens, *hashing, vocab)
        emulated("ngram_hash_embed_fwd", tokens, [torch.ones(42, 3)], torch.ones(A, 3), *hashing, "dense", None, vocab)
        for op in EMULATED_BACKWARD:
            emulated(op, torch.ones(2100, 3), tokens, *hashing, [2, 5], vocab, False, A)


def test_too_many_tables_for_a_launch_are_refused() -> None:
    backends.emulator()
    tokens, cu_seqlens = random_tokens(5), torch.tensor([0, 5], dtype=torch.int32)
    hashes, _ = emulated("ngram_hash_fwd", tokens, cu_seqlens, 1, [1] * 128, [0] * 128, [9] * 128)
    assert hashes.shape == (128, 5)
    with pytest.raises(RuntimeError, match="ngram_sizes: expected 1 to 128 tables on CUDA, got 129"):
        emulated("ngram_hash_fwd", tokens, cu_seqlens, 1, [1] * 129, [0] * 129, [9] * 129)
