"""Benches of ngram_hash_embed: real text, the six tables of the released BLT models, against loops of embeddings.

The tables take 6 GB forward. Forward and backward together have smaller ones: a dense gradient is as large as they are.
Tables of different sizes have 1536 to 49152 rows, as those of Bolmo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timing
import torch
from common import assert_agree, name_of, nbytes, normal, steps
from peers import ngram_hash_embed as peers
from timing import OURS, Comparison, Make
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import assert_equal, real_text

NGRAMS = (3, 4, 5, 6, 7, 8)
DIFFERENT = (1536, 3072, 6144, 12288, 24576, 49152)
ALPHABET = 260
SAMPLE = 16  # so many columns are compared with fp64


@dataclass(frozen=True)
class Sizes:
    """The inputs are tokens ``[rows, length]`` and tables ``[vocab, width]``."""

    rows: int = 8
    length: int = 8192
    vocab: int = 500002
    trained_vocab: int = 100002
    width: int = 512
    dtype: torch.dtype = torch.float32


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield the hash, forward, and both kinds of gradient."""
    sizes = Sizes(2, 256, 1009, 499, 32) if small else Sizes()
    if device == "cuda":
        sizes = replace(sizes, width=2 * sizes.width, dtype=torch.bfloat16)
    yield partial(hash_comparison, sizes, device)
    yield partial(forward_comparison, sizes, (sizes.vocab,) * len(NGRAMS), device)
    yield partial(forward_comparison, sizes, DIFFERENT, device)
    for grad in ("dense", "sparse"):
        yield partial(backward_comparison, sizes, grad, device)


def text(sizes: Sizes, device: str) -> Tensor:
    return bk.to_ids(real_text(sizes.rows * sizes.length), device=device).view(sizes.rows, sizes.length)


def hash_comparison(sizes: Sizes, device: str) -> Comparison:
    tokens = text(sizes, device)
    implementations = {
        OURS: lambda: bk.ngram_hash(tokens, ngram_sizes=NGRAMS, vocab=sizes.vocab),
        "facebookresearch/blt": lambda: peers.blt_hashes(tokens, NGRAMS, sizes.vocab),
    }
    if hashes := peers.transformers_hashes():
        implementations["transformers"] = lambda: hashes(tokens, NGRAMS, sizes.vocab)

    def agree(results: dict[str, Any]) -> None:
        for result in results.values():
            assert_equal(result, results["facebookresearch/blt"])

    return Comparison(
        "ngram_hash",
        f"{list(tokens.shape)}, n-grams of 3 to 8",
        "int64",
        implementations,
        nbytes(tokens) * (1 + len(NGRAMS)),
        timing.copies(tokens),
        2 * nbytes(tokens),
        agree,
        device=device,
    )


@dataclass(frozen=True)
class Inputs:
    """Holds tokens, the rows of the fused table that their n-grams hash to ``[T, N]``, and tables of `vocab` rows."""

    tokens: Tensor
    rows: Tensor
    fused: Tensor
    byte_table: Tensor
    vocab: tuple[int, ...]

    @property
    def tables(self) -> list[Tensor]:
        """Return the fused table as N leaves that share its memory."""
        return [x.detach().requires_grad_(x.requires_grad) for x in self.fused.split(self.vocab)]


def inputs(sizes: Sizes, vocab: tuple[int, ...], trained: bool, device: str) -> Inputs:
    tokens = text(sizes, device)
    hashes = bk.ngram_hash(tokens, ngram_sizes=NGRAMS, vocab=vocab).flatten(1)
    first_rows = torch.tensor([sum(vocab[:n]) for n in range(len(vocab))], device=device)
    rows = (hashes.T + first_rows).contiguous()
    # torch's own generator is unusable on a GPU from a failed capture until the next one that succeeds.
    generator = torch.Generator(device).manual_seed(0)
    fused = torch.empty(sum(vocab), sizes.width, dtype=sizes.dtype, device=device)
    fused.uniform_(-1, 1, generator=generator)
    byte_table = normal(ALPHABET, sizes.width, dtype=sizes.dtype, device=device)
    return Inputs(tokens, rows, fused.requires_grad_(trained), byte_table.requires_grad_(trained), vocab)


def implementations(data: Inputs, grad: Tensor | None, sparse: bool) -> dict[str, Callable[[], Any]]:
    """Return our op and all peers: forward, or the gradients of the tables and the byte table."""
    tokens, fused, byte_table, tables = data.tokens, data.fused, data.byte_table, data.tables
    one = (fused, byte_table)
    kind, equal = "sparse" if sparse else "dense", len(set(data.vocab)) == 1
    options = {"ngram_sizes": NGRAMS, "grad": kind, "vocab": None if equal else data.vocab}
    found = {
        OURS: steps(lambda: bk.ngram_hash_embed(tokens, fused, byte_table, **options), one, grad),
        "facebookresearch/blt": steps(
            lambda: peers.blt_embed(tokens, tables, byte_table, NGRAMS, sparse=sparse), (*tables, byte_table), grad
        ),
        "embedding_bag, ready ids": steps(
            lambda: peers.bag_embed(tokens, data.rows, fused, byte_table, sparse=sparse), one, grad
        ),
    }
    if equal and (embed := peers.transformers_embed()):
        found["transformers"] = steps(lambda: embed(tokens, fused, byte_table, NGRAMS, sparse=sparse), one, grad)
    return found


def forward_comparison(sizes: Sizes, vocab: tuple[int, ...], device: str) -> Comparison:
    data = inputs(sizes, vocab, False, device)
    rows = vocab[0] if len(set(vocab)) == 1 else f"{min(vocab)} to {max(vocab)}"
    out = torch.empty(*data.tokens.shape, sizes.width, dtype=sizes.dtype, device=device)

    def agree(results: dict[str, Any]) -> None:
        truth = data.byte_table[:, :SAMPLE].double()[data.tokens]
        for row in data.rows.T:
            truth += data.fused[:, :SAMPLE][row].double().view_as(truth)
        assert_agree({name: [r[..., :SAMPLE]] for name, r in results.items()}, [truth], "facebookresearch/blt")

    return Comparison(
        "ngram_hash_embed fwd",
        f"{list(data.tokens.shape)}, {len(NGRAMS)} x [{rows}, {sizes.width}]",
        name_of(sizes.dtype),
        implementations(data, None, False),
        nbytes(data.tokens) + nbytes(out) * (2 + len(NGRAMS)),
        timing.copies(out),
        2 * nbytes(out),
        agree,
        device=device,
    )


def backward_comparison(sizes: Sizes, kind: str, device: str) -> Comparison:
    data = inputs(sizes, (sizes.trained_vocab,) * len(NGRAMS), True, device)
    grad = normal(*data.tokens.shape, sizes.width, seed=1, dtype=sizes.dtype, device=device)

    def agree(results: dict[str, Any]) -> None:
        few = grad.flatten(0, 1)[:, :SAMPLE].double()
        tables = few.new_zeros(data.fused.shape[0], SAMPLE)
        for row in data.rows.T:
            tables.index_add_(0, row, few)
        byte_table = few.new_zeros(ALPHABET, SAMPLE).index_add(0, data.tokens.flatten(), few)
        # Rows of the byte table sum hundreds of terms and are large, so each table is judged by itself.
        sampled = {name: sample(result) for name, result in results.items()}
        for i, truth in enumerate((tables, byte_table)):
            assert_agree({name: [s[i]] for name, s in sampled.items()}, [truth], "embedding_bag, ready ids")

    # Backward reads the gradient for each table, and writes the rows that forward read, or all if dense.
    written = data.fused.shape[0] if kind == "dense" else data.rows.unique().numel()
    work = nbytes(data.tokens) * 2 + nbytes(grad) * (3 + 2 * len(NGRAMS)) + written * sizes.width * grad.element_size()
    return Comparison(
        f"ngram_hash_embed {kind} fwd+bwd",
        f"{list(data.tokens.shape)}, {len(NGRAMS)} x [{sizes.trained_vocab}, {sizes.width}]",
        name_of(sizes.dtype),
        implementations(data, grad, kind == "sparse"),
        work,
        timing.copies(grad),
        2 * nbytes(grad),
        agree,
        device=device,
    )


def sample(grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return some columns of the gradients of all tables, one below the other, and of the byte table."""
    *tables, byte_table = (columns(grad) for grad in grads)
    return torch.cat(tables), byte_table


def columns(grad: Tensor) -> Tensor:
    if grad.layout == torch.strided:
        return grad[:, :SAMPLE]
    rows, values = grad._indices()[0], grad._values()[:, :SAMPLE]
    return values.new_zeros(grad.shape[0], SAMPLE).index_add(0, rows, values)


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_ngram_hash_embed(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
