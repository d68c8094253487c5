"""Trains one model on the processes that torchrun starts: DDP or FSDP2, and hash tables sharded by rows.

The ranks share each step's batch, and their losses add up to its mean, so gradients are sums over ranks and not means.
Losses are multiplied by the number of ranks before backward, since DDP and FSDP2 divide by it. The sharded hash tables
are in `blt_kernels.distributed`.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blt_kernels.distributed import TableShards, shard_hash_tables
from blt_kernels.ids import BYTE_OFFSET
from blt_kernels.models import BLT
from blt_kernels.models.base import ByteModel
from blt_kernels.nn import CrossAttention, TransformerLayer
from blt_kernels.train import checks


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and this one's device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def sum(self, *values: float) -> list[float]:
        """Return values summed over the ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def first(self, value: bool) -> bool:
        """Return the value of rank 0."""
        return bool(self.sum(float(value and self.rank == 0))[0])

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)


@contextmanager
def start(device: str) -> Iterator[Ranks]:
    """Yield the ranks that torchrun started, or those of an existing process group, or this process alone.

    The CPU communicates by gloo, CUDA by nccl.
    """
    own, begin = torch.device(device), not dist.is_initialized() and is_launched()
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
    ranks = Ranks(own, dist.get_rank(), dist.get_world_size())
    try:
        yield ranks
    except RuntimeError as error:
        if not is_of_lost_rank(error):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ConnectionError(f"rank {ranks.rank} has lost another rank, whose message says why: {reason}") from error
    # DDP is freed before the process group: its destructor joins gloo's threads while it holds the GIL, which they may
    # need to free a tensor.
    gc.collect()
    if begin:  # after an error it would wait for ranks that may have ended
        dist.destroy_process_group()


def is_of_lost_rank(error: BaseException) -> bool:
    """Return whether gloo, nccl or their store has lost the connection to another process."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    words = ("gloo/transport", "onnection closed by peer", "onnection reset by peer", "remote process exited")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")  # that torchrun gives its processes


def is_launched() -> bool:
    """Return whether torchrun has started this process.

    Raises
    ------
    ValueError
        Some of the variables that torchrun sets are missing or no numbers.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        for name in ("WORLD_SIZE", "RANK"):
            if (
                name in os.environ and os.environ.get("WORLD_SIZE") != "1"
            ):  # each process would train alone, all in one directory
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
    """Move a model, the same on all ranks, to their devices, and return the module to call in its place.

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
    left_out: set[nn.Parameter] = set()  # parameters that DDP or FSDP2 leaves alone
    if isinstance(model, BLT) and (shard_tables or parallel == "fsdp"):
        shard_hash_tables(model, mesh)
        left_out = set(model.encoder_hash_tok_embedding.parameters())
    model.to(ranks.device)
    if parallel == "ddp":
        # DDP has no other way to leave parameters out.
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
    """Return the context of forward and backward of a micro-batch: DDP sums gradients over ranks after the last one.

    FSDP2 sums them after each, since it accumulates shards.
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
    """Return whether parameters have no gradient with this configuration. DDP then looks for them in every step."""
    ids = torch.arange(BYTE_OFFSET, BYTE_OFFSET + 8, device=next(model.parameters()).device)
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return any(grad is None for grad in torch.autograd.grad(model.loss(ids), used, allow_unused=True))
