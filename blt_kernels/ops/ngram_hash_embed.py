"""ngram_hash_embed: the embedding of a byte plus one hashed row for each n-gram that ends at it, in one pass.

With N tables every byte reads N + 1 rows of D values and writes one. Which rows the n-grams hash to is recomputed in
backward, so that nothing of size N * T is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.ops import _autograd, _common
from blt_kernels.reference import ngram_hash_embed as reference


def ngram_hash_embed(
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
    """Sum of the byte embedding and of N hashed n-gram embeddings, N = ``num_functions * len(ngram_sizes)``.

    ``out[i] = byte_table[tokens[i]] + sum_n tables[n][ngram_hash(tokens)[n, i]]``, added up in fp32 (fp64 for fp64
    tables) and rounded once.

    Parameters
    ----------
    tokens : int32 or int64 ``[T]`` or ``[B, S]``
        Ids: byte + 4. Padded tokens are B documents of length S.
    tables : fp32, bf16, fp16 or fp64 ``[V_0 + ... + V_(N-1), D]``, or N tensors ``[V_n, D]``
        Table n has V_n rows, in the order of `table_order`. Never copied. At most 128 on CUDA.
    byte_table : same dtype ``[A, D]``, optional
    cu_seqlens : int32 or int64 ``[B+1]``, optional
        Documents of packed tokens, which no n-gram crosses; one document if None.
    ngram_sizes, num_functions, functions, table_order
        As in `ngram_hash`.
    grad : str
        Gradient of the tables and of `byte_table`: "dense", or "sparse" as from ``nn.Embedding(sparse=True)``, but
        coalesced: every row that was read, once, in rising order. Sparse gradients wait for the device, since their
        size depends on the data.
    row_range : (int, int), optional
        Shard the tables by rows: each holds only the rows ``lo <= row < hi`` of a table of `vocab` rows, none if the
        table ends before `lo`, and n-grams that hash to other rows add nothing. The sum over shards that cover
        ``[0, vocab)`` once is the whole embedding: every shard is given `byte_table`, but only the one with ``lo == 0``
        adds it.
    vocab : int or N ints, optional
        Rows of each whole table, which its hashes are taken modulo. If None, a list of tables has the rows of its
        tensors, and a fused tensor is split into N equal tables. Needed with `row_range`, and where tables of different
        sizes are fused.

    Returns
    -------
    dtype of the tables ``[*tokens.shape, D]``
        0 for bytes beyond the last document, which get no gradient.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device, shape or value; the message names it. An id outside `byte_table`
        is found where looking costs nothing, in eager code on the CPU; elsewhere such a byte has no byte embedding.

    Notes
    -----
    The BLT paper (arXiv 2412.09871), section 3.2.1. The sum is not divided by the number of terms, as in
    facebookresearch/blt.

    Examples
    --------
    >>> tables, byte_table = torch.zeros(2 * 1009, 4), torch.ones(260, 4)  # two tables of 1009 rows
    >>> tokens, cu_seqlens = to_ids(["one", "two"])
    >>> ngram_hash_embed(tokens, tables, byte_table, cu_seqlens, ngram_sizes=(3, 4)).shape
    torch.Size([6, 4])
    """
    sizes, numbers = _check_hash(tokens, ngram_sizes, num_functions, functions, table_order)
    _checks.check_choice("grad", grad, ("dense", "sparse"))
    table_list, rows = _check_tables(tables, tokens, len(sizes), row_range, vocab)
    width = table_list[0].shape[1]
    packed, documents, count = _checks.split_documents("tokens", tokens, cu_seqlens, trailing=0)
    if byte_table is not None:
        _checks.check_like("byte_table", byte_table, (2,), "tables", table_list[0])
        shape = _checks.shape_of("byte_table", byte_table)
        if shape[1] != width:
            raise ValueError(f"byte_table: expected the width D = {width} of tables, got shape {list(shape)}")
        if shape[0] < 1:
            raise ValueError(f"byte_table: expected at least one row, got {shape[0]}")
        _checks.check_ids(packed, documents, shape[0], "the rows of byte_table", padded=tokens.dim() == 2)
    offsets = None if documents is None else documents.offsets
    shard = None if row_range is None else list(row_range)
    out = ngram_hash_embed_fwd(packed, table_list, byte_table, offsets, count, sizes, numbers, grad, shard, rows)
    return out if tokens.dim() == 1 else out.view(*tokens.shape, width)


def ngram_hash(
    tokens: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    ngram_sizes: Sequence[int] = (3, 4, 5, 6, 7, 8),
    num_functions: int = 1,
    functions: Sequence[int] | None = None,
    table_order: str = "function_major",
    vocab: int | Sequence[int],
) -> Tensor:
    """Hash the n-grams that end at each byte: the rows that `ngram_hash_embed` reads.

    ``sum_j window[j] * prime**j mod vocab`` in wrapping int64, where the window is the n ids of the document that end
    at byte i, with ids of 0 before the document's start, and j = 0 is the oldest.

    Parameters
    ----------
    tokens : int32 or int64 ``[T]`` or ``[B, S]``
    cu_seqlens : int32 or int64 ``[B+1]``, optional
        Documents of packed tokens; one document if None.
    ngram_sizes : sequence of int
        Bytes in an n-gram.
    num_functions : int
        Number of hash functions, the first ones of 11. Each has a prime of its own.
    functions : sequence of int, optional
        The hash functions by number, 0 to 10, instead of the first `num_functions`.
    table_order : str
        "function_major": table ``f * len(ngram_sizes) + s`` has function number f and size number s, as in
        transformers and facebookresearch/blt. "size_major": it is table ``s * num_functions + f``, as in
        allenai/OLMo-core.
    vocab : int or N ints
        Number of rows of every table, or of each.

    Returns
    -------
    int64 ``[N, *tokens.shape]``
        In ``[0, vocab)``, in the order of the tables. 0 for bytes beyond the last document.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Examples
    --------
    >>> tokens, cu_seqlens = to_ids(["one", "one"])
    >>> rows = ngram_hash(tokens, cu_seqlens, ngram_sizes=(2,), vocab=1009)
    >>> rows.shape, bool((rows[0, :3] == rows[0, 3:]).all())
    (torch.Size([1, 6]), True)
    """
    sizes, numbers = _check_hash(tokens, ngram_sizes, num_functions, functions, table_order)
    rows = _check_vocab(vocab, len(sizes))
    packed, offsets, documents = _checks.documents_of("tokens", tokens, cu_seqlens, trailing=0)
    hashes = ngram_hash_fwd(packed, offsets, documents, sizes, numbers, rows)
    return hashes if tokens.dim() == 1 else hashes.view(hashes.shape[0], *tokens.shape)


def _check_hash(
    tokens: Tensor, ngram_sizes: Sequence[int], num_functions: int, functions: Sequence[int] | None, table_order: str
) -> tuple[list[int], list[int] | None]:
    """Return the n-gram size of each table, and its hash function: the only one, or None for the first."""
    _checks.check_tensor("tokens", tokens, (1, 2), _checks.INTS)
    _checks.check_choice("table_order", table_order, ("function_major", "size_major"))
    sizes = check_sizes(ngram_sizes, num_functions)
    if functions is None and num_functions == 1:
        return sizes, None
    numbers = range(num_functions) if functions is None else _check_functions(functions, num_functions)
    return reference.hash_of_tables(sizes, numbers, table_order)


def check_sizes(ngram_sizes: Sequence[int], num_functions: int) -> list[int]:
    """Return the sizes as a list; raise TypeError or ValueError for what cannot be hashed."""
    if not isinstance(ngram_sizes, (list, tuple)) or not ngram_sizes:
        raise TypeError(f"ngram_sizes: expected a sequence of at least one int, got {ngram_sizes!r}")
    for size in ngram_sizes:
        _checks.check_int("ngram_sizes", size, 1)
    _checks.check_int("num_functions", num_functions, 1)
    if num_functions > len(reference.PRIMES):
        raise ValueError(f"num_functions: expected at most {len(reference.PRIMES)}, got {num_functions}")
    return list(ngram_sizes)


def _check_functions(functions: Sequence[int], num_functions: int) -> list[int]:
    if not isinstance(functions, (list, tuple)) or not functions:
        raise TypeError(f"functions: expected a sequence of at least one int, got {functions!r}")
    for function in functions:
        _checks.check_int("functions", function, 0)
        if function >= len(reference.PRIMES):
            raise ValueError(f"functions: expected numbers from 0 to {len(reference.PRIMES) - 1}, got {function}")
    if num_functions not in (1, len(functions)):
        raise ValueError(f"num_functions: expected none beside functions={functions!r}, got {num_functions}")
    return list(functions)


def _check_vocab(vocab: int | Sequence[int], count: int) -> list[int]:
    """Return the number of rows of each of `count` tables, or of all."""
    if not isinstance(vocab, (list, tuple)):
        _checks.check_int("vocab", vocab, 1)
        return [vocab]  # type: ignore[list-item]
    for rows in vocab:
        _checks.check_int("vocab", rows, 1)
    if len(vocab) != count:
        raise ValueError(f"vocab: expected an int or N = {count} ints, one for each table, got {vocab!r}")
    return list(vocab)


def _check_tables(
    tables: Tensor | Sequence[Tensor],
    tokens: Tensor,
    count: int,
    row_range: tuple[int, int] | None,
    vocab: int | Sequence[int] | None,
) -> tuple[list[Tensor], list[int] | None]:
    """Return the tables as a list, and `vocab` as a list: the rows of each whole table, or of all."""
    fused = isinstance(tables, Tensor)
    if not fused and not isinstance(tables, (list, tuple, torch.nn.ParameterList)):
        raise TypeError(f"tables: expected a tensor or a sequence of tensors, got {type(tables).__name__}")
    table_list = [tables] if isinstance(tables, Tensor) else list(tables)
    if not fused and len(table_list) != count:
        meaning = "N = num_functions * len(ngram_sizes)"
        raise ValueError(f"tables: expected {meaning} = {count} tensors, got {len(table_list)}")
    for i, table in enumerate(table_list):
        name = "tables" if fused else f"tables[{i}]"
        if i == 0:
            _checks.check_tensor(name, table, 2, _checks.FLOATS)
            _checks.check_same(name, table, "tokens", tokens, dtype=False)
            continue
        _checks.check_like(name, table, (2,), "tables[0]", table_list[0])
        if table.shape[1] != table_list[0].shape[1]:
            width = table_list[0].shape[1]
            raise ValueError(f"{name}: expected the width D = {width} of tables[0], got shape {list(table.shape)}")
    if vocab is not None:
        return table_list, _check_rows(table_list, fused, count, row_range, vocab)
    if row_range is not None:
        raise ValueError("vocab: expected the number of rows of a whole table, since row_range is given, got None")
    if fused:
        total = table_list[0].shape[0]
        if total % count:
            raise ValueError(f"tables: expected a multiple of N = {count} rows, got shape {list(table_list[0].shape)}")
        if total < 1:
            raise ValueError(f"tables: expected at least one row a table, got shape {list(table_list[0].shape)}")
        return table_list, None
    for i, table in enumerate(table_list):
        if table.shape[0] < 1:
            raise ValueError(f"tables[{i}]: expected at least one row, got shape {list(table.shape)}")
    return table_list, None


def _check_rows(
    tables: list[Tensor], fused: bool, count: int, row_range: tuple[int, int] | None, vocab: int | Sequence[int]
) -> list[int]:
    """Return the number of rows of each whole table, or of all."""
    rows = _check_vocab(vocab, count)
    if row_range is not None:
        _check_row_range(row_range, max(rows))
    held = reference.held_rows(row_range, rows, count)
    for i, (table, expected) in enumerate(zip(tables, [sum(held)] if fused else held, strict=True)):
        if table.shape[0] != expected:
            name, given = "tables" if fused else f"tables[{i}]", f"vocab is {vocab} and row_range {row_range}"
            raise ValueError(f"{name}: expected {expected} rows, since {given}, got shape {list(table.shape)}")
    return rows


def _check_row_range(row_range: tuple[int, int], vocab: int) -> None:
    if not isinstance(row_range, (list, tuple)) or len(row_range) != 2:
        raise TypeError(f"row_range: expected a pair of ints (lo, hi), got {row_range!r}")
    low, high = row_range
    _checks.check_int("row_range", low, 0)
    _checks.check_int("row_range", high, 1)
    if not low < high <= vocab:
        raise ValueError(f"row_range: expected 0 <= lo < hi <= vocab = {vocab}, got {tuple(row_range)}")


# --- schemas, references and fakes ------------------------------------------------------------------------------------
# Without cu_seqlens there are num_documents documents of one length. `tables` is a list of N, or of the fused one
# alone. ngram_sizes has an entry for each table, functions and vocab one for each or one for all. If None, functions is
# the first function, vocab the rows of `tables`, and row_range all rows: each list of integers costs torch 0.5 us. In
# backward `fused` says which form the tables have, and `alphabet` is the number of rows of byte_table if it needs a
# gradient too, which comes last; else None.

_HASH = "int[] ngram_sizes, int[]? functions"
_BACKWARD = (
    f"Tensor grad_out, Tensor tokens, Tensor? cu_seqlens, SymInt num_documents, {_HASH},"
    " int[]? row_range, SymInt[] vocab, bool fused, SymInt? alphabet"
)


def _table_sizes(
    ngram_sizes: list[int],
    _functions: list[int] | None,
    row_range: list[int] | None,
    vocab: list[int],
    fused: bool,
    alphabet: int | None,
) -> list[int]:
    """Return the number of rows of each gradient."""
    rows = reference.held_rows(row_range, vocab, len(ngram_sizes))
    return ([sum(rows)] if fused else rows) + ([] if alphabet is None else [alphabet])


def _empty_sparse(
    grad: Tensor, tokens: Tensor, _cu_seqlens: Tensor | None, _documents: int, *arguments: Any
) -> tuple[list[Tensor], list[Tensor]]:
    read = [torch.library.get_ctx().new_dynamic_size() for _ in _table_sizes(*arguments)]
    return [tokens.new_empty(n, dtype=torch.int64) for n in read], [grad.new_empty(n, grad.shape[1]) for n in read]


ngram_hash_fwd = _common.define(
    "ngram_hash_fwd",
    f"(Tensor tokens, Tensor? cu_seqlens, SymInt num_documents, {_HASH}, SymInt[] vocab) -> Tensor hashes",
    reference.ngram_hash_fwd_reference,
    lambda tokens, _cu, _documents, sizes, *_: tokens.new_empty(len(sizes), tokens.shape[0], dtype=torch.int64),
)
ngram_hash_embed_fwd = _common.define(
    "ngram_hash_embed_fwd",
    f"(Tensor tokens, Tensor[] tables, Tensor? byte_table, Tensor? cu_seqlens, SymInt num_documents, {_HASH},"
    " str grad, int[]? row_range, SymInt[]? vocab) -> Tensor out",
    reference.ngram_hash_embed_fwd_reference,
    lambda tokens, tables, *_: tables[0].new_empty(tokens.shape[0], tables[0].shape[1]),
)
ngram_hash_embed_bwd = _common.define(
    "ngram_hash_embed_bwd",
    f"({_BACKWARD}) -> Tensor[] grads",
    reference.ngram_hash_embed_bwd_reference,
    lambda grad, _tokens, _cu, _documents, *hashes: [grad.new_empty(n, grad.shape[1]) for n in _table_sizes(*hashes)],
)
ngram_hash_embed_sparse_bwd = _common.define(
    "ngram_hash_embed_sparse_bwd",
    f"({_BACKWARD}) -> (Tensor[] rows, Tensor[] values)",
    reference.ngram_hash_embed_sparse_bwd_reference,
    _empty_sparse,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
# Like torch's own embeddings, these run in the dtype of their tables under autocast.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, tables, byte_table, cu_seqlens, num_documents, ngram_sizes, functions, grad, row_range, vocab = inputs
    ctx.save_for_backward(tokens, cu_seqlens)
    ctx.num_documents, ctx.grad = num_documents, grad
    rows = reference.rows_of(tables, len(ngram_sizes)) if vocab is None else vocab
    ctx.hash = ngram_sizes, functions, row_range, rows, len(tables) < len(ngram_sizes)
    ctx.alphabet = None if byte_table is None else byte_table.shape[0]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    hashing = *ctx.hash, ctx.alphabet if ctx.needs_input_grad[2] else None
    arguments = grad_out, *ctx.saved_tensors, ctx.num_documents, *hashing
    if ctx.grad == "dense":
        grads = ngram_hash_embed_bwd(*arguments)
    else:
        found = zip(*ngram_hash_embed_sparse_bwd(*arguments), _table_sizes(*hashing), strict=True)
        grads = [
            torch.sparse_coo_tensor(
                rows[None], values, (size, grad_out.shape[1]), is_coalesced=True, check_invariants=False
            )
            for rows, values, size in found
        ]
    needed = [g if n else None for g, n in zip(grads, ctx.needs_input_grad[1], strict=False)]
    return None, needed, (grads[-1] if ctx.needs_input_grad[2] else None)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:3])
    num_documents, ngram_sizes, functions, row_range, vocab, _fused, alphabet = inputs[3:]
    ctx.hash = num_documents, ngram_sizes, functions, "dense", row_range, vocab
    ctx.has_byte_table = alphabet is not None


# The backward is linear in the gradient, and the forward is its derivative.
def _second_backward(ctx: Any, *cotangents: Tensor) -> Tensor:
    tokens, cu_seqlens = ctx.saved_tensors
    tables, byte_table = list(cotangents), None
    if ctx.has_byte_table:
        byte_table = tables.pop()
    return ngram_hash_embed_fwd(tokens, tables, byte_table, cu_seqlens, *ctx.hash)


def _no_second_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError('grad: expected "dense" where gradients are differentiated again, got "sparse"')


_autograd.register_autograd("ngram_hash_embed_fwd", _backward, setup_context=_save)
_autograd.register_autograd("ngram_hash_embed_bwd", _second_backward, setup_context=_save_gradients)
_autograd.register_autograd("ngram_hash_embed_sparse_bwd", _no_second_backward, setup_context=lambda *_: None)
