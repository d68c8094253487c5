"""ngram_hash_embed in plain PyTorch: the specification of `ops.ngram_hash_embed`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.reference._ragged import accumulator, document_offsets, local_index, operator_of

PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)

Lookups = list[tuple[int, Tensor, Tensor]]  # `_lookups` returns them


def ngram_hash_reference(
    tokens: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    ngram_sizes: Sequence[int],
    num_functions: int = 1,
    functions: Sequence[int] | None = None,
    table_order: str = "function_major",
    vocab: int | Sequence[int],
) -> Tensor:
    """Return the row of every byte's n-grams in each table; see `ops.ngram_hash`."""
    sizes, functions = hash_of_tables(ngram_sizes, functions or range(num_functions), table_order)
    rows = [vocab] if isinstance(vocab, int) else vocab
    hashes = ngram_hash_fwd_reference(tokens.flatten(), cu_seqlens, _rows(tokens), sizes, functions, rows)
    return hashes.view(hashes.shape[0], *tokens.shape)


def ngram_hash_fwd_reference(
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    num_documents: int,
    ngram_sizes: Sequence[int],
    functions: Sequence[int] | None,
    vocab: Sequence[int],
) -> Tensor:
    """Return ``sum_j window[j] * prime**j mod vocab``, in int64 that wraps: ``[N, T]``. j = 0 is the oldest byte."""
    local = local_index(tokens.shape[0], document_offsets(tokens, cu_seqlens, num_documents))
    # back[d] is the byte d places before, 0 before the start of its document.
    reach = min(max(ngram_sizes), tokens.shape[0])
    back = [F.pad(tokens.long(), (d, 0))[: local.shape[0]].where(local >= d, 0) for d in range(reach)]
    hashes = []
    count = len(ngram_sizes)
    for size, function, rows in zip(ngram_sizes, _each(functions or [0], count), _each(vocab, count), strict=True):
        total = torch.zeros_like(local)
        for d in range(min(size, reach)):
            total = total + back[d] * _wrap(pow(PRIMES[function], size - 1 - d, 2**64))
        hashes.append(total.remainder(rows))
    return torch.stack(hashes)


def ngram_hash_embed_reference(
    tokens: Tensor,
    tables: Tensor | Sequence[Tensor],
    byte_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    ngram_sizes: Sequence[int] = (3, 4, 5, 6, 7, 8),
    num_functions: int = 1,
    functions: Sequence[int] | None = None,
    table_order: str = "function_major",
    grad: str = "dense",
    row_range: tuple[int, int] | None = None,
    vocab: int | Sequence[int] | None = None,
) -> Tensor:
    """Return the byte embedding plus the rows of the byte's n-grams; see `ops.ngram_hash_embed`."""
    tables = [tables] if isinstance(tables, Tensor) else list(tables)
    sizes, functions = hash_of_tables(ngram_sizes, functions or range(num_functions), table_order)
    rows = [vocab] if isinstance(vocab, int) else vocab
    out = ngram_hash_embed_fwd_reference(
        tokens.flatten(),
        tables,
        byte_table,
        cu_seqlens,
        _rows(tokens),
        sizes,
        functions,
        grad,
        row_range,
        rows,
    )
    return out.view(*tokens.shape, out.shape[-1])


def hash_of_tables(
    ngram_sizes: Sequence[int], functions: Sequence[int], table_order: str
) -> tuple[list[int], list[int]]:
    """Return the n-gram size and the hash function of each table."""
    if table_order == "size_major":
        return [size for size in ngram_sizes for _ in functions], [*functions] * len(ngram_sizes)
    return [*ngram_sizes] * len(functions), [function for function in functions for _ in ngram_sizes]


def rows_of(tables: Sequence[Tensor], count: int) -> list[int]:
    """Return the rows of each of `count` tables, or of all, where no shard is asked for."""
    return [tables[0].shape[0] // count] if len(tables) < count else [table.shape[0] for table in tables]


def held_rows(row_range: Sequence[int] | None, vocab: Sequence[int], count: int) -> list[int]:
    """Return how many rows of each of `count` tables a shard has: those that lie in row_range, or all."""
    whole = _each(vocab, count)
    if row_range is None:
        return whole
    low, high = row_range
    return [max(min(high, rows) - low, 0) for rows in whole]


def _each(values: Sequence[int], count: int) -> list[int]:
    """Return a value for each of `count` tables, from one for each or one for all."""
    return [*values] * count if len(values) == 1 else [*values]


def _lookups(
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    num_documents: int,
    ngram_sizes: Sequence[int],
    functions: Sequence[int] | None,
    row_range: Sequence[int] | None,
    vocab: Sequence[int],
    fused: bool,
    alphabet: int | None,
) -> Lookups:
    """Return, for each table, the byte table last: its number of rows, the rows read ``[n, T]``, and which count."""
    cu_seqlens = document_offsets(tokens, cu_seqlens, num_documents)
    inside = local_index(tokens.shape[0], cu_seqlens) >= 0
    low, sizes = 0 if row_range is None else row_range[0], held_rows(row_range, vocab, len(ngram_sizes))
    rows = ngram_hash_fwd_reference(tokens, cu_seqlens, num_documents, ngram_sizes, functions, vocab) - low
    hits = torch.stack([(row >= 0) & (row < size) for row, size in zip(rows, sizes, strict=True)]) & inside
    if fused:
        rows = torch.stack([row + sum(sizes[:n]) for n, row in enumerate(rows)]).where(hits, 0)
        lookups = [(sum(sizes), rows, hits)]
    else:
        rows = rows.where(hits, 0)
        lookups = [(size, rows[i : i + 1], hits[i : i + 1]) for i, size in enumerate(sizes)]
    if alphabet is not None:  # of all shards, the one that begins at row 0 reads the byte table
        known = inside & (tokens >= 0) & (tokens < alphabet) & (low == 0)
        lookups.append((alphabet, tokens.long().clamp(0, alphabet - 1)[None], known[None]))
    return lookups


def ngram_hash_embed_fwd_reference(
    tokens: Tensor,
    tables: Sequence[Tensor],
    byte_table: Tensor | None,
    cu_seqlens: Tensor | None,
    num_documents: int,
    ngram_sizes: Sequence[int],
    functions: Sequence[int] | None,
    grad: str,
    row_range: Sequence[int] | None,
    vocab: Sequence[int] | None,
) -> Tensor:
    """out[i] = byte_table[tokens[i]] + sum over tables of table[hash[i]], added up in fp32 and rounded once."""
    alphabet, fused = None if byte_table is None else byte_table.shape[0], len(tables) == 1
    vocab = rows_of(tables, len(ngram_sizes)) if vocab is None else vocab
    lookups = _lookups(tokens, cu_seqlens, num_documents, ngram_sizes, functions, row_range, vocab, fused, alphabet)
    every = [*tables] if byte_table is None else [*tables, byte_table]
    out = torch.zeros(tokens.shape[0], every[0].shape[1], dtype=accumulator(every[0]), device=tokens.device)
    pairs = list(zip(lookups, every, strict=True))
    for (size, rows, hits), table in pairs[len(tables) :] + pairs[: len(tables)]:  # the byte table is first
        if size == 0:
            out = out + table.sum(0)  # adds zeros, and the gradient is an empty tensor
            continue
        for row, hit in zip(rows, hits, strict=True):
            out = out + F.embedding(row, table, sparse=grad == "sparse").where(hit[:, None], 0)
    return out.to(every[0].dtype)


@operator_of(_lookups)
def ngram_hash_embed_bwd_reference(grad_out: Tensor, lookups: Lookups) -> list[Tensor]:
    """Dense gradients of the tables and, given `alphabet`, of the byte table: every row sums the bytes that read it."""
    grads = []
    for size, rows, hits in lookups:
        # Lookups that miss go to one more row, which is cut off.
        grad = grad_out.new_zeros(size + 1, grad_out.shape[1], dtype=accumulator(grad_out))
        for row in rows.where(hits, size):
            grad.index_add_(0, row, grad_out.to(grad.dtype))
        grads.append(grad[:size].to(grad_out.dtype, copy=True))
    return grads


@operator_of(_lookups)
def ngram_hash_embed_sparse_bwd_reference(grad_out: Tensor, lookups: Lookups) -> tuple[list[Tensor], list[Tensor]]:
    """Give the same gradients as rows in rising order, int64 ``[M]``, and their values ``[M, D]``."""
    all_rows, all_values = [], []
    for size, rows, hits in lookups:
        # Lookups that miss go to one more row, which sorts last and is always there to be cut off.
        keys = F.pad(rows.where(hits, size).flatten(), (0, 1), value=size)
        unique, inverse = keys.unique(return_inverse=True)
        values = grad_out.new_zeros(unique.shape[0], grad_out.shape[1], dtype=accumulator(grad_out))
        for slot in inverse[:-1].view_as(rows):
            values.index_add_(0, slot, grad_out.to(values.dtype))
        all_rows.append(unique[:-1].clone())
        all_values.append(values[:-1].to(grad_out.dtype, copy=True))
    return all_rows, all_values


def _wrap(x: int) -> int:
    """Wrap x around to an int64."""
    return (x + 2**63) % 2**64 - 2**63


def _rows(tokens: Tensor) -> int:
    """Return the number of documents where no offsets are given: the rows of ``[B, S]``, or a single one."""
    return tokens.shape[0] if tokens.dim() == 2 else 1
