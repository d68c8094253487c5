"""`test_ops.py` runs these cases of `ngram_hash_embed` and `ngram_hash`."""

from __future__ import annotations

from functools import partial

import inputs
from op_case import IDS, WIDE, OpCase

import blt_kernels as bk
from blt_kernels.reference.ngram_hash_embed import ngram_hash_embed_reference, ngram_hash_reference

_embed = partial(OpCase, bk.ngram_hash_embed, ngram_hash_embed_reference)
_make_embed = inputs.make_ngram_hash_embed
_BOTH = ("tables", "byte_table")
_DIFFERENT = {"ngram_sizes": (1, 3), "functions": (4, 0), "table_order": "size_major", "vocab": (5, 53, 1, 20)}

CASES = [
    _embed("fused", _make_embed(fused=True), _BOTH),
    _embed("list", _make_embed(byte_table=False, ngram_sizes=(2, 4), num_functions=2), ("tables",)),
    _embed("sparse", _make_embed(grad="sparse"), _BOTH, sparse=True, trace=False),
    _embed("wide", _make_embed(fused=True, width=WIDE), _BOTH, trace=False),
    _embed("sparse, wide", _make_embed(grad="sparse", width=WIDE), _BOTH, sparse=True, trace=False, fast=False),
    _embed("shard", _make_embed(fused=True, row_range=(10, 40), vocab=53, ngram_sizes=(1, 3)), _BOTH),
    _embed("different sizes", _make_embed(fused=True, **_DIFFERENT), _BOTH),
    _embed("different sizes, shard", _make_embed(row_range=(3, 40), **_DIFFERENT), _BOTH, fast=False),
    OpCase(
        bk.ngram_hash,
        ngram_hash_reference,
        "",
        inputs.make_tokens(ngram_sizes=(1, 3, 8), num_functions=2, vocab=1009),
        dtypes=IDS,
    ),
]
