"""One model on several processes, as torchrun starts them: DDP or FSDP2, and hash tables sharded by rows.

The ranks share each step's batch, and their losses add up to its mean: so gradients are sums, not means, over ranks.
Losses are multiplied by the number of ranks before backward, since DDP and FSDP2 divide by it.

A hash table of gigabytes is read at a few rows for each byte. FSDP2 would gather all of it for that. Instead, rank r
keeps the rows ``[r * V / W, (r + 1) * V / W)`` of every table and adds up, for the bytes of all ranks, what those rows
give (`row_range` of `ngram_hash_embed`); the sums go back to the ranks whose bytes they are. What travels is the ids
and one vector a byte for each rank, and the gradient of a row is complete where the row is.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from blt_kernels.models import BLT
from blt_kernels.nn import BYTE_OFFSET, ByteModel, CrossAttention, TransformerLayer, embed_ids, known_ids
from blt_kernels.ops import _common
from blt_kernels.ops.ngram_hash_embed import ngram_hash_embed
from blt_kernels.tools import checks

TABLES = "encoder_hash_tok_embedding.weight"


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and this one's device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def sum(self, *values: float) -> list[float]:
        """Values summed over the ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def first(self, value: bool) -> bool:
        """What rank 0 says."""
        return bool(self.sum(float(value and self.rank == 0))[0])

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)


def is_first() -> bool:
    """Whether this process is the one of its run that talks.

    Raises
    ------
    ValueError
        Some of the variables that torchrun sets are missing or no numbers.
    """
    return not _launched() or os.environ["RANK"] == "0"


@contextmanager
def start(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, or those of a process group that there is, or this process alone.

    Data on the CPU goes through gloo, on CUDA through nccl.
    """
    own, begin = torch.device(device), not dist.is_initialized() and _launched()
    cuda = own.type == "cuda"
    if begin:
        if cuda:
            checks.check_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if not (dist.is_available() and dist.is_initialized()):
        yield Ranks(own)
        return
    if cuda:
        own = torch.device("cuda", torch.cuda.current_device())
    yield Ranks(own, dist.get_rank(), dist.get_world_size())
    # What holds the group has to go before it: DDP, as the last to do so, would end gloo's threads while it holds the
    # lock of the interpreter, which they wait for if they have a tensor to let go of.
    gc.collect()
    if begin:  # after an error it would wait for ranks that may be gone
        dist.destroy_process_group()


_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")  # that torchrun gives its processes


def _launched() -> bool:
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        for name in ("WORLD_SIZE", "RANK"):
            if name in os.environ and os.environ.get("WORLD_SIZE") != "1":  # each would train alone, in one directory
                got = os.environ[name]
                raise ValueError(f"{name}: expected torchrun, which sets TORCHELASTIC_RUN_ID too, got {got!r} alone")
        return False
    for name in (*_NUMBERS, "MASTER_ADDR"):
        value = os.environ.get(name)
        if not value or (name in _NUMBERS and not value.isdecimal()):
            raise ValueError(f"{name}: expected what torchrun sets, since TORCHELASTIC_RUN_ID is set, got {value!r}")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise ValueError(f"RANK: expected less than WORLD_SIZE = {os.environ['WORLD_SIZE']}, got {os.environ['RANK']}")
    return True


# --- models -----------------------------------------------------------------------------------------------------------


def distribute(model: ByteModel, ranks: Ranks, parallel: str, shard_tables: bool) -> nn.Module:
    """Move a model, the same on all ranks, to their devices, and say what to call in place of it.

    Parameters
    ----------
    model : ByteModel
        Changed in place: with "fsdp" its parameters become DTensors, and hash tables may become `TableShards`.
    ranks : Ranks
    parallel : "ddp" or "fsdp"
        Every rank has the whole model, or a share of each of its parameters. Frozen ones are whole everywhere.
    shard_tables : bool
        With "ddp" too, the hash tables are sharded by rows; with "fsdp" they always are.
    """
    if ranks.world == 1:
        return model.to(ranks.device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    left_out: set[nn.Parameter] = set()  # by DDP or FSDP2
    if isinstance(model, BLT) and (shard_tables or parallel == "fsdp"):
        shard_hash_tables(model, mesh)
        left_out = set(model.encoder_hash_tok_embedding.parameters())
    model.to(ranks.device)
    if parallel == "ddp":
        # The only way there is to tell DDP.
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [name for name, parameter in model.named_parameters() if parameter in left_out]
        )
        unused = _has_unused(model)
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused, gradient_as_bucket_view=True)
    left_out |= {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for module in list(model.modules()):
        if isinstance(module, (TransformerLayer, CrossAttention)) and left_out.isdisjoint(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=left_out)
    # The logits are a view, and nothing is done to them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return model


def synchronised(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of one of several micro-batches: DDP sums gradients over ranks after the last.

    FSDP2 does so after each: what it accumulates is sharded.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def clip_gradients(model: nn.Module, max_norm: float) -> None:
    """Scale all gradients if their norm, over all ranks' shares, is above `max_norm`."""
    from torch.distributed.tensor import DTensor

    shards = {module.weight for module in model.modules() if isinstance(module, TableShards)}
    own: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in model.parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor):
            own.append(grad.to_local())
        elif grad is not None:
            (own if parameter in shards else whole).append(grad)
    norm = nn.utils.get_total_norm(whole)
    if own:
        squares = nn.utils.get_total_norm(own).square()
        dist.all_reduce(squares)
        norm = (norm.to(squares.device).square() + squares).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in own + whole:
        grad.mul_(factor)


def _has_unused(model: ByteModel) -> bool:
    """Whether the configuration leaves parameters without gradient: then DDP has to look for them in every step."""
    ids = torch.arange(BYTE_OFFSET, BYTE_OFFSET + 8, device=next(model.parameters()).device)
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return any(grad is None for grad in torch.autograd.grad(model.loss(ids), used, allow_unused=True))


# --- hash tables ------------------------------------------------------------------------------------------------------


class TableShards(nn.Module):
    """The rows that this rank has of every hash table, in the place of a BLT's embedding.

    Parameters
    ----------
    tables : ``[N, V, D]``
        The whole tables, the same on all ranks.
    mesh : DeviceMesh
        Of one dimension.

    Attributes
    ----------
    weight : Parameter ``[N, hi - lo, D]``
        No DTensor: the gradients of one that cannot be cut evenly would be whole on every rank.
    row_range : (int, int)
        ``(lo, hi)``, as DTensor cuts dimension 1.

    Raises
    ------
    ValueError
        A rank would have no row.
    """

    def __init__(self, tables: Tensor, mesh: Any) -> None:
        super().__init__()
        self.mesh, self.shape = mesh, tables.shape
        self.row_range = low, high = _row_range(tables.shape[1], mesh.size(), mesh.get_local_rank())
        self.weight = nn.Parameter(tables[:, low:high].to(mesh.device_type, copy=True).contiguous())

    def whole(self, value: Tensor) -> Tensor:
        """The tables ``[N, V, D]``, or what there is of their shape, as a DTensor that shares the memory of `value`."""
        from torch.distributed.tensor import DTensor, Shard

        _, rows, width = self.shape
        stride = (rows * width, width, 1)
        return DTensor.from_local(value, self.mesh, [Shard(1)], run_check=False, shape=self.shape, stride=stride)


def shard_hash_tables(model: BLT, mesh: Any) -> None:
    """Put `TableShards` in a model, and `sharded_ngram_hash_embed` among the functions that it calls."""
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
    """`ngram_hash_embed` of every rank's own tokens, of tables whose rows are shared among the ranks.

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

    Notes
    -----
    Like DDP and FSDP2, backward leaves a row the mean, over ranks, of its gradients. The ranks tell each other how many
    tokens they have, which on CUDA waits for the device.
    """
    group, width = shards.mesh.get_group(), tables.shape[-1]
    ids, rows = _common.pack("tokens", tokens, cu_seqlens, trailing=0)
    if byte_table is not None:
        _common.check_ids(ids, rows, byte_table.shape[0], "the rows of byte_table", padded=tokens.dim() == 2)
    everyones, everyones_rows, capacity = _gather_tokens(ids, rows, group)
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
    inside = torch.arange(ids.shape[0], device=ids.device) < rows[-1]
    return out.where(inside[:, None], 0).view(*tokens.shape, width)


def _row_range(vocab: int, world: int, rank: int) -> tuple[int, int]:
    size = -(-vocab // world)
    if vocab <= size * (world - 1):
        raise ValueError(f"ngram_vocab: expected rows for each of {world} ranks, got {vocab}")
    return rank * size, min((rank + 1) * size, vocab)


def _gather_tokens(ids: Tensor, rows: Tensor, group: Any) -> tuple[Tensor, Tensor, int]:
    """All ranks' tokens ``[W * capacity]``, padded to the `capacity` of the longest, and the offsets of their rows."""
    world = dist.get_world_size(group)
    sizes = ids.new_empty(world, 2, dtype=torch.int64)
    dist.all_gather(list(sizes.unbind()), sizes.new_tensor([ids.shape[0], rows.shape[0]]), group=group)
    capacity, count = (max(size, 1) for size in sizes.amax(0).tolist())
    # Rows that a rank lacks are empty, and begin where its last one ends.
    offsets = torch.cat([rows, rows[-1:].expand(count - rows.shape[0])])
    own = torch.cat([F.pad(ids.int(), (0, capacity - ids.shape[0])), offsets])
    gathered = own.new_empty(world, capacity + count)
    dist.all_gather(list(gathered.unbind()), own, group=group)
    first = torch.arange(world, dtype=torch.int32, device=ids.device)[:, None] * capacity
    # Between the tokens of two ranks lies a row of padding.
    return gathered[:, :capacity].flatten(), (gathered[:, capacity:] + first).flatten(), capacity


class _SumOverRanks(torch.autograd.Function):
    """``[W, T, D]``, of each rank for all, to ``[T, D]``: the sum over ranks of what they have for this one."""

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
