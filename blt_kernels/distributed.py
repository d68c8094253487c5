"""Shards hash tables by rows over the ranks of a mesh.

Each byte reads a few rows of a hash table of gigabytes. FSDP2 would gather the whole table for that. Instead, rank r
of W keeps the rows ``[r * V / W, (r + 1) * V / W)`` of every table and sums, for the bytes of all ranks, the rows that
it has (`row_range` of `ngram_hash_embed`). Each rank then receives the sums of its own bytes. The ranks exchange ids
and one vector a byte for each rank, and the gradient of a row is complete on the rank that has the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from blt_kernels import _checks
from blt_kernels.models import BLT
from blt_kernels.nn import embed_ids, known_ids
from blt_kernels.ops.ngram_hash_embed import ngram_hash_embed


class TableShards(nn.Module):
    """Holds the rows that this rank has of every hash table, in the place of a BLT's embedding.

    Parameters
    ----------
    tables : ``[N, V, D]``
        The whole tables, the same on all ranks.
    mesh : DeviceMesh
        Of one dimension.

    Attributes
    ----------
    weight : Parameter ``[N, hi - lo, D]``
        It is no DTensor: the gradients of a DTensor that cannot be cut evenly would be whole on every rank.
    row_range : (int, int)
        ``(lo, hi)``, as DTensor cuts dimension 1.

    Raises
    ------
    ValueError
        A rank would have no row.

    Examples
    --------
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> shards = TableShards(torch.randn(6, 100, 8), torch.distributed.init_device_mesh("cpu", (1,)))
    >>> torch.distributed.destroy_process_group()
    >>> shards.row_range
    (0, 100)
    """

    def __init__(self, tables: Tensor, mesh: Any) -> None:
        super().__init__()
        self.mesh, self.shape = mesh, tables.shape
        self.row_range = low, high = _row_range(tables.shape[1], mesh.size(), mesh.get_local_rank())
        self.weight = nn.Parameter(tables[:, low:high].to(mesh.device_type, copy=True).contiguous())

    def whole(self, value: Tensor) -> Tensor:
        """Return the tables of all ranks.

        Parameters
        ----------
        value : ``[N, hi - lo, D]``
            What this rank has of them.

        Returns
        -------
        DTensor ``[N, V, D]``
            It shares the memory of `value`.
        """
        from torch.distributed.tensor import DTensor, Shard

        _, rows, width = self.shape
        stride = (rows * width, width, 1)
        return DTensor.from_local(value, self.mesh, [Shard(1)], run_check=False, shape=self.shape, stride=stride)


def shard_hash_tables(model: BLT, mesh: Any) -> None:
    """Put `TableShards` in a model, and `sharded_ngram_hash_embed` among the functions that it calls.

    Parameters
    ----------
    model : BLT
        The same on all ranks. It is changed in place.
    mesh : DeviceMesh
        Of one dimension.

    Raises
    ------
    ValueError
        A rank would have no row.

    Examples
    --------
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> model = BLT(BLTConfig.small())
    >>> shard_hash_tables(model, torch.distributed.init_device_mesh("cpu", (1,)))
    >>> model(to_ids("a text")).shape
    torch.Size([6, 260])
    >>> torch.distributed.destroy_process_group()
    """
    tables = model.encoder_hash_tok_embedding.weight.detach().unflatten(0, (-1, model.config.ngram_vocab))
    shards = model.encoder_hash_tok_embedding = TableShards(tables, mesh)  # type: ignore[assignment]
    embed = partial(sharded_ngram_hash_embed, shards=shards)
    model.ops = SimpleNamespace(**{**vars(model.ops), "ngram_hash_embed": embed})


def sharded_ngram_hash_embed(
    tokens: Tensor,
    tables: Tensor,
    byte_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    shards: TableShards,
    ngram_sizes: Sequence[int] = (3, 4, 5, 6, 7, 8),
    num_functions: int = 1,
) -> Tensor:
    """Return `ngram_hash_embed` of every rank's own tokens, from tables whose rows are on different ranks.

    All ranks of the mesh have to call it, forward and backward. They may have different numbers of tokens.

    Parameters
    ----------
    tokens, byte_table, cu_seqlens, ngram_sizes, num_functions
        As in `ngram_hash_embed`; the byte table is whole on every rank.
    tables : ``[N, hi - lo, D]``
        The weight of `shards`.
    shards : TableShards

    Returns
    -------
    dtype of the tables ``[*tokens.shape, D]``

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Notes
    -----
    As in DDP and FSDP2, the gradient of a row is its mean over ranks. The ranks exchange their numbers of tokens, which
    waits for the device on CUDA.

    Examples
    --------
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> tables, ids = torch.randn(6, 100, 8), to_ids("a text")
    >>> shards = TableShards(tables, torch.distributed.init_device_mesh("cpu", (1,)))
    >>> out = sharded_ngram_hash_embed(ids, shards.weight, shards=shards)
    >>> bool((out == ngram_hash_embed(ids, tables.flatten(0, 1))).all())
    True
    >>> torch.distributed.destroy_process_group()
    """
    group, width = shards.mesh.get_group(), tables.shape[-1]
    ids, rows = _checks.pack("tokens", tokens, cu_seqlens, trailing=0)
    if byte_table is not None:
        _checks.check_ids(ids, rows, byte_table.shape[0], "the rows of byte_table", padded=tokens.dim() == 2)
    everyones, everyones_rows, capacity = _gather_tokens(ids, rows.offsets, group)
    parts = ngram_hash_embed(
        everyones,
        tables.flatten(0, 1),
        None,
        everyones_rows,
        ngram_sizes=ngram_sizes,
        num_functions=num_functions,
        row_range=shards.row_range,
        vocab=shards.shape[1],
    )
    out = _SumOverRanks.apply(parts.view(-1, capacity, width), group)[: ids.shape[0]]
    if byte_table is not None:
        out = out + embed_ids(partial(F.embedding, weight=byte_table), ids, known_ids(ids, rows, byte_table.shape[0]))
    inside = torch.arange(ids.shape[0], device=ids.device) < rows.offsets[-1]
    return out.where(inside[:, None], 0).view(*tokens.shape, width)


def _row_range(vocab: int, world: int, rank: int) -> tuple[int, int]:
    size = -(-vocab // world)
    if vocab <= size * (world - 1):
        raise ValueError(f"ngram_vocab: expected rows for each of {world} ranks, got {vocab}")
    return rank * size, min((rank + 1) * size, vocab)


def _gather_tokens(ids: Tensor, rows: Tensor, group: Any) -> tuple[Tensor, Tensor, int]:
    """Return all ranks' tokens ``[W * capacity]``, padded to the longest, the offsets of their rows, and `capacity`."""
    world = dist.get_world_size(group)
    sizes = ids.new_empty(world, 2, dtype=torch.int64)
    dist.all_gather(list(sizes.unbind()), sizes.new_tensor([ids.shape[0], rows.shape[0]]), group=group)
    capacity, count = (max(size, 1) for size in sizes.amax(0).tolist())
    # Rows that a rank lacks are empty and begin where its last row ends.
    offsets = torch.cat([rows, rows[-1:].expand(count - rows.shape[0])])
    own = torch.cat([F.pad(ids.int(), (0, capacity - ids.shape[0])), offsets])
    gathered = own.new_empty(world, capacity + count)
    dist.all_gather(list(gathered.unbind()), own, group=group)
    first = torch.arange(world, dtype=torch.int32, device=ids.device)[:, None] * capacity
    # A row of padding separates the tokens of two ranks.
    return gathered[:, :capacity].flatten(), (gathered[:, capacity:] + first).flatten(), capacity


class _SumOverRanks(torch.autograd.Function):
    """Sums over ranks: each has a part for every rank, ``[W, T, D]``, and gets the sum of its own, ``[T, D]``."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, list(parts.unbind()), group=group)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        world = dist.get_world_size(ctx.group)
        grads = grad_out.new_empty(world, *grad_out.shape)
        dist.all_gather(list(grads.unbind()), grad_out / world, group=ctx.group)
        return grads, None
