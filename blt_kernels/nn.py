"""Thin modules over the ops: what `ByteLM`, `BLT` and `MegaByte` are composed of.

Data is packed: ``[T, ...]`` with ``cu_seqlens: int32[R+1]``, where the offsets delimit rows. A row is what positions,
patching and hashing run along. It is one document, or several that each end in EOS: see `attention_documents`.
Llama's blocks: RMSNorm, rotary positions in interleaved pairs, SwiGLU, no biases.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from blt_kernels._autograd import RMSNormFunction, SwiGLUFunction
from blt_kernels._files import whole_file
from blt_kernels.ids import ALPHABET as ALPHABET
from blt_kernels.ids import BOS as BOS
from blt_kernels.ids import BYTE_OFFSET as BYTE_OFFSET
from blt_kernels.ids import EOS as EOS
from blt_kernels.layout import AttentionRanges, PatchLayout
from blt_kernels.ops import _common

Model = TypeVar("Model", bound="ByteModel")

_OPS = {
    "entropy_patch": ("entropy_patch", "patch_starts", "space_patch", "static_patch", "delimiter_patch"),
    "patch_pool": ("patch_pool",),
    "patch_unpool": ("patch_unpool",),
    "ngram_hash_embed": ("ngram_hash_embed",),
    "block_causal_attention": ("block_causal_attention", "attention_ranges"),
    "patch_cross_attention": ("patch_cross_attention",),
}


@cache
def load_ops(kind: str) -> SimpleNamespace:
    """The functions that a model calls, by op name: the public ops (``"fused"``) or their ``"reference"``."""
    _common.check_choice("ops", kind, ("fused", "reference"))
    package, suffix = ("ops", "") if kind == "fused" else ("reference", "_reference")
    functions = {}
    for file, names in _OPS.items():
        module = import_module(f"blt_kernels.{package}.{file}")
        functions.update({name: getattr(module, name + suffix) for name in names})
    return SimpleNamespace(**functions)


# --- rows, positions, documents ---------------------------------------------------------------------------------------


def row_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Index of each entry in its row, int64 ``[total]``; entries beyond the last row count on from its end."""
    position = torch.arange(total, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return position - cu_seqlens.long()[row]


def attention_documents(starts: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Offsets of the documents that attention stays within, from flags at their first entries.

    Parameters
    ----------
    starts : bool ``[T]``
        Rows need no flag: they always start a document.
    cu_seqlens : int32 ``[R+1]``

    Returns
    -------
    int32 ``[D+1]``
        Compact on the CPU. Elsewhere D = T, padded with the last value, since compacting would wait for the device.
    """
    total = starts.shape[0]
    position = torch.arange(total, device=starts.device)
    end = cu_seqlens[-1:].long()
    starts = (starts | (row_positions(cu_seqlens, total) == 0)) & (position < end)
    slot = torch.where(starts, starts.cumsum(0) - 1, total + 1)
    offsets = end.repeat(total + 2).scatter(0, slot, position)[: total + 1].int()
    if _common.readable(starts):
        offsets = offsets[: int(starts.sum()) + 1]
    return offsets


def known_ids(ids: Tensor, cu_seqlens: Tensor, alphabet: int) -> Tensor:
    """Return which ids are in a row and in the alphabet, bool ``[T]``: the others may hold anything."""
    inside = torch.arange(ids.shape[0], device=ids.device) < cu_seqlens[-1]
    return inside & (ids >= 0) & (ids < alphabet)


def embed_ids(table: Callable[[Tensor], Tensor], ids: Tensor, known: Tensor) -> Tensor:
    """The rows of `table`, ``[*ids.shape, D]``; 0, which gets no gradient, for ids that are not `known`."""
    return table(ids.where(known, 0)).where(known[..., None], 0)


def next_byte_targets(tokens: Tensor, cu_seqlens: Tensor, alphabet: int | None = None) -> Tensor:
    """The id after each one in its row, int64 ``[T]``; -100 where there is none, or one outside the alphabet."""
    position = torch.arange(tokens.shape[0], device=tokens.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    end = F.pad(cu_seqlens[1:].long(), (0, 1))[row]
    following = tokens.long().roll(-1)
    there = (position + 1 < end) & (following >= 0)
    if alphabet is not None:
        there &= following < alphabet
    return torch.where(there, following, -100)


def next_byte_bits(logits: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """Mean of ``-log2 p(target)`` over the targets that are not -100, or their sum over `count`, in fp32 or fp64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nats = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return nats / ((targets >= 0).sum().clamp(min=1) * math.log(2) if count is None else count * math.log(2))


def layer_ranges(
    ops: SimpleNamespace, x: Tensor, documents: Tensor, window: int | None, key_documents: Tensor | None = None,
    num_keys: int | None = None,
) -> AttentionRanges | None:  # fmt: skip
    """Return what the self-attention of all layers of a stack shares, from its input ``[T, D]``; None on the CPU.

    There the kernels do not read it.
    """
    if x.device.type == "cpu":
        return None
    return ops.attention_ranges(documents, key_documents, num_queries=x.shape[0], num_keys=num_keys, window=window)


# --- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of layers. `window` is in bytes (or patches) and counts the query itself; None is the whole document.

    `rope_scaling` is that of Llama 3.1: a factor, the turns below which a frequency is divided by it, the turns above
    which it is not, and the length within which turns are counted.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    window: int | None = None
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    rope_scaling: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads"):
            _common.check_int(name, getattr(self, name), 0 if name == "num_layers" else 1)
        for name in ("num_kv_heads", "ffn_dim", "window"):
            if getattr(self, name) is not None:
                _common.check_int(name, getattr(self, name), 1)
        for name in ("rope_theta", "norm_eps"):
            _common.check_number(name, getattr(self, name))
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta: expected a value > 0, got {self.rope_theta}")
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim: expected a multiple of 2 * num_heads = {2 * self.num_heads}, got {self.dim}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, got {self.kv_heads}")
        if self.rope_scaling is not None:
            factor, low, high, length = self.rope_scaling
            if not (min(factor, length) > 0 and low < high):
                raise ValueError(f"rope_scaling: expected factor, low < high, length, got {self.rope_scaling}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward: 8/3 of `dim`, rounded up to a multiple of 256, unless given."""
        return self.ffn_dim or 256 * math.ceil(8 * self.dim / 3 / 256)


def rotary_table(positions: Tensor, config: TransformerConfig, dtype: torch.dtype) -> Tensor:
    """Complex ``exp(i position theta^(-2j/E))``, ``[T, 1, E/2]``: of fp64 for fp64 models, else of fp32."""
    dtype = dtype if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype) / config.head_dim
    period = config.rope_theta**exponent  # positions in a radian
    if config.rope_scaling is not None:
        factor, low, high, length = config.rope_scaling
        kept = ((length / (2 * math.pi * period) - low) / (high - low)).clamp(0, 1)  # of the frequency
        period = period / (kept + (1 - kept) / factor)
    angle = positions.to(dtype)[:, None, None] / period
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs ``(x[2j], x[2j+1])`` of each head ``[T, H, E]``, taken as complex numbers, by their angles."""
    pairs = x.to(table.real.dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)


def init_normal(weight: Tensor, std: float) -> None:
    """Draw `weight` from a normal of deviation `std`, cut at three deviations; fake tensors have nothing to draw."""
    if not isinstance(weight, FakeTensor):  # torch draws until all values fit, which it has to read
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A matrix drawn from a normal of deviation ``in_features^-0.5``, cut at three deviations."""
    layer = nn.Linear(in_features, out_features, bias=False)
    init_normal(layer.weight, in_features**-0.5)
    return layer


def embedding(rows: int, dim: int) -> nn.Embedding:
    """A table drawn from a normal of deviation 0.5: as large as what a layer adds, so that bytes show through."""
    table = nn.Embedding(rows, dim)
    init_normal(table.weight, 0.5)
    return table


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight``, in the weight's dtype: autocast's bf16 activations are widened."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if not _common.readable(x):
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps  # as torch has it
        return RMSNormFunction.apply(x, self.weight, eps)


class SelfAttention(nn.Module):
    """Causal attention within documents, with rotary positions."""

    def __init__(self, config: TransformerConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.attention, self.window, self.head_dim = ops.block_causal_attention, config.window, config.head_dim
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.dim, config.dim)

    def forward(self, x: Tensor, table: Tensor, documents: Tensor, ranges: AttentionRanges | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = self.attention(rotate(q, table), rotate(k, table), v, documents, window=self.window, ranges=ranges)
        return self.o_proj(out.flatten(-2))


class CrossAttention(nn.Module):
    """Attention between patches and bytes. Returns the update of the queries without their residual."""

    def __init__(
        self,
        config: TransformerConfig,
        ops: SimpleNamespace,
        direction: str,
        queries_per_patch: int,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.head_dim, self.window = ops.patch_cross_attention, config.head_dim, window
        self.direction, self.queries_per_patch = direction, queries_per_patch
        self.q_norm = RMSNorm(config.dim, config.norm_eps)
        self.k_norm = RMSNorm(config.dim, config.norm_eps)
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.dim, config.dim)

    def forward(self, queries: Tensor, states: Tensor, layout: PatchLayout) -> Tensor:
        states = self.k_norm(states)
        q = self.q_proj(self.q_norm(queries)).unflatten(-1, (-1, self.head_dim))
        k, v = (p(states).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        out = self.attention(
            q, k, v, layout, direction=self.direction, queries_per_patch=self.queries_per_patch, window=self.window
        )
        return self.o_proj(out.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = linear(config.dim, config.hidden_dim)
        self.up_proj = linear(config.dim, config.hidden_dim)
        self.down_proj = linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(SwiGLUFunction.apply(gate, up) if _common.readable(gate) else F.silu(gate) * up)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with a norm before and a residual around it.

    Layers of the same documents and window can share their ``ranges``: see `attention_ranges`.
    """

    recompute = False  # whether backward computes the layer again: then only its input is kept until there

    def __init__(self, config: TransformerConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = SelfAttention(config, ops)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, table: Tensor, documents: Tensor, ranges: AttentionRanges | None = None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():  # there is nothing random in a layer
            return checkpoint(self._layer, x, table, documents, ranges, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x, table, documents, ranges)

    def _layer(self, x: Tensor, table: Tensor, documents: Tensor, ranges: AttentionRanges | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), table, documents, ranges)
        return x + self.mlp(self.post_attention_layernorm(x))


# --- models -----------------------------------------------------------------------------------------------------------


class ByteModel(nn.Module):
    """A next-byte model: the loss, and one safetensors file with its configuration in the metadata."""

    config_class: type
    config: Any

    @classmethod
    def from_values(cls: type[Model], values: dict[str, Any], ops: str = "fused") -> Model:
        """A fresh model from its configuration as a dictionary (`asdict`, or JSON)."""
        return cls(config_from_dict(cls.config_class, values), ops)

    def check_ids(self, tokens: Tensor, ids: Tensor, cu_seqlens: Tensor) -> None:
        """Raise ValueError if one of `ids`, which are `tokens` packed, is outside the alphabet."""
        padded, alphabet = tokens.dim() == 2, self.config.vocab_size
        _common.check_ids(ids, cu_seqlens, alphabet, "the alphabet of the model", padded=padded)

    def loss(self, tokens: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> Tensor:
        """Bits per byte of next-byte prediction: the mean of ``-log2 p`` over every id that follows another in its row.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[B, S]``
        cu_seqlens : int32 or int64 ``[R+1]``, optional
            Rows of packed tokens; one row if None.
        options
            As in `forward`.

        Returns
        -------
        fp32 (fp64 for an fp64 model), a scalar
            EOS counts as a byte. 0 if nothing is predicted.
        """
        logits = self(tokens, cu_seqlens, **options)
        ids, rows = _common.pack("tokens", tokens, cu_seqlens, trailing=0)
        targets = next_byte_targets(ids, rows, self.config.vocab_size)
        return next_byte_bits(logits.flatten(0, -2), targets)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write weights (as `dtype`, if given) and configuration to one ``.safetensors`` file, all of it or nothing.

        Tied weights are written under each of their names: the model that `load` makes of them has copies.

        Raises
        ------
        ImportError
            safetensors is not installed.
        OSError
            The file cannot be written.
        ValueError
            A parameter is on the meta device, or fake.
        """
        tensors = {name: value.to(dtype) for name, value in self.state_dict().items()}
        metadata = {"format": "pt", "model": type(self).__name__, "config": json.dumps(asdict(self.config))}
        write_safetensors(Path(path), tensors, metadata)

    @classmethod
    def load(
        cls: type[Model],
        path: str | os.PathLike[str],
        ops: str = "fused",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Model:
        """Read what `save` wrote, in the stored dtypes unless `dtype` is given.

        Raises
        ------
        ImportError
            safetensors is not installed.
        OSError
            The file cannot be read.
        ValueError
            The file is damaged or holds another model, its configuration is not one of this version, or keys are
            missing, unknown or of the wrong shape or dtype; the message names the file and them.
        """
        config = stored_config(path, cls.__name__, cls.config_class)
        with open_safetensors(path, device) as file:
            tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            model = cls(config, ops)
        expected = {name: value.shape for name, value in model.state_dict().items()}
        check_tensors(f"{path}: does not fit {cls.__name__}", tensors, expected)
        model.load_state_dict(tensors, assign=True)
        return model


def model_name(path: str | os.PathLike[str]) -> str | None:
    """The class of the model in a file that `ByteModel.save` wrote; None for other safetensors files."""
    with open_safetensors(path) as file:
        return (file.metadata() or {}).get("model")


def stored_config(path: str | os.PathLike[str], name: str, cls: type) -> Any:
    """The configuration, of the class `cls`, in a file of the model `name`; ValueError if it is another file."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("model") != name:
        raise ValueError(f"path: expected a file of {name}, got {metadata.get('model')!r} in {path}")
    try:
        return config_from_dict(cls, json.loads(metadata.get("config", "null")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Rebuild a configuration dataclass, nested ones included, from what `asdict` and JSON made of it."""
    if not isinstance(values, dict):
        raise ValueError(f"config: expected the fields of {cls.__name__}, got {values!r}")
    unknown = sorted(set(values) - {field.name for field in fields(cls)})
    if unknown:
        raise ValueError(f"config: expected the fields of {cls.__name__}, got {', '.join(unknown)} as well")
    hints, arguments = get_type_hints(cls), {}
    for name, value in values.items():
        if isinstance(value, dict):
            nested = next((t for t in (hints[name], *get_args(hints[name])) if is_dataclass(t)), None)
            if nested is None:
                raise ValueError(f"config: expected a value of {cls.__name__}.{name}, got {value}")
            value = config_from_dict(nested, value)  # type: ignore[arg-type]
        value = tuple(value) if isinstance(value, list) else value
        _check_kind(name, value, hints[name])
        arguments[name] = value
    return cls(**arguments)


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError unless a value is of a kind of its field that the classes themselves do not check."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        expected = get_origin(kind) or kind
        if expected in (bool, tuple) or is_dataclass(expected):
            lengths = [len(get_args(kind))] if expected is tuple and Ellipsis not in get_args(kind) else []
            fits = isinstance(value, expected) and (not lengths or len(value) in lengths)
            if not fits and not (value is None and type(None) in kinds):
                raise ValueError(f"{name}: expected {expected.__name__}, got {value}")


def check_tensors(what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError, opening with `what`, unless `tensors` are floats of the names and shapes of `expected`."""
    problems = [f"missing {name}" for name in expected if name not in tensors]
    for name, value in tensors.items():
        if name not in expected:
            problems.append(f"unknown {name}")
        elif tuple(value.shape) != tuple(expected[name]):
            problems.append(f"{name} of shape {list(value.shape)}, expected {list(expected[name])}")
        elif not value.is_floating_point():
            problems.append(f"{name} of {value.dtype}, expected a floating-point dtype")
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file, all of it or nothing: what was mapped from an old file of this name stays as it is.

    The format has no tensors that share memory: those are written under each of their names.

    Raises
    ------
    ImportError
        safetensors is not installed.
    OSError
        The file cannot be written.
    ValueError
        A tensor is on the meta device, or fake.
    """
    module, apart = safetensors_module(), _apart(tensors)
    if path.exists() and not path.is_file():  # safetensors would put a file in its place
        raise OSError(f"{path}: expected a regular file, or none")
    with whole_file(path) as part:
        part.touch()
        mode = part.stat().st_mode  # the user's default, which safetensors does not keep
        try:
            module.torch.save_file(apart, part, metadata)
        except module.SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        part.chmod(mode)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory: copies where they do."""
    result: dict[str, Tensor] = {}
    taken: list[tuple[torch.device, int, int]] = []
    for name, value in tensors.items():
        if value.is_meta or isinstance(value, FakeTensor):
            raise ValueError(f"{name}: expected values to write, got a tensor on the meta device, or a fake one")
        value = value.detach().contiguous()
        start = value.data_ptr()
        end = start + value.nbytes
        if any(value.device == device and start < stop and begin < end for device, begin, stop in taken):
            value = value.clone()
        else:
            taken.append((value.device, start, end))
        result[name] = value
    return result


@contextmanager
def open_safetensors(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Iterator[Any]:
    """Open a file to read tensors from; ValueError if it is damaged."""
    module = safetensors_module()
    try:
        with module.safe_open(path, "pt", device=str(device)) as file:
            yield file
    except module.SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got {error}") from error


def safetensors_module() -> ModuleType:
    """The safetensors package, which the library itself does not depend on."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving and loading models needs safetensors: pip install 'blt-kernels[cli]'") from error
    return safetensors
