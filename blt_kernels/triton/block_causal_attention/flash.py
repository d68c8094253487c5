"""FlashAttention of other packages, in the place of the forward kernel of block_causal_attention on CUDA.

Only what is exactly the same is delegated. What packages leave open is settled here: queries beyond the last document,
and those that attend to nothing, get 0, and -inf as lse. Packages load whole tiles, with weights of 0 for masked pairs,
so values that no query attends to are zeroed first. The backward stays ours: from `out` and `lse` it is the same, bit
for bit from run to run.

No length is read from the device: the packages are told that a document may be as long as all of them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from blt_kernels.reference.block_causal_attention import AttentionMask, attended_keys
from blt_kernels.triton.block_causal_attention.launch import architecture

MAX_DOCUMENTS = 65535  # torch's kernel has a dimension of its grid for them


@dataclass(frozen=True)
class Package:
    """Describes a package with variable-length flash attention.

    Attributes
    ----------
    name, module, function
        The name of the package, and the module and name of the function.
    majors
        Major numbers of the compute capabilities whose GPUs it is used on.
    max_head_dim
        Head width up to which it is used.
    arguments
        Keyword arguments from offsets, maximum lengths, keys to each side, causal, scale and whether heads are grouped.
    """

    name: str
    module: str
    function: str
    majors: tuple[int, ...]
    max_head_dim: int
    arguments: Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """The function of a package and the names of its parameters, or the reason why it cannot be used."""

    function: Callable[..., Any] | None
    parameters: frozenset[str] = frozenset()
    reason: str = ""


def _dao_arguments(
    returns: str, unlimited: int | None, offsets: tuple[Tensor, Tensor], max_lengths: tuple[int, int],
    sides: tuple[int, int], causal: bool, scale: float, _grouped: bool,
) -> dict[str, Any]:  # fmt: skip
    named: dict[str, Any] = {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1]}
    named |= {"max_seqlen_q": max_lengths[0], "max_seqlen_k": max_lengths[1], "softmax_scale": scale, "causal": causal}
    return named | {"window_size": tuple(unlimited if side < 0 else side for side in sides), returns: True}


def _torch_arguments(
    offsets: tuple[Tensor, Tensor], max_lengths: tuple[int, int],
    sides: tuple[int, int], _causal: bool, scale: float, grouped: bool,
) -> dict[str, Any]:  # fmt: skip
    from torch.nn.attention.varlen import AuxRequest

    named: dict[str, Any] = {"cu_seq_q": offsets[0], "cu_seq_k": offsets[1]}
    named |= {"max_q": max_lengths[0], "max_k": max_lengths[1], "scale": scale, "window_size": sides}
    return named | {"return_aux": AuxRequest(lse=True)} | ({"enable_gqa": True} if grouped else {})


PACKAGES = (  # the first one that takes a case is used
    Package(
        "FlashAttention 3", "flash_attn_interface", "flash_attn_varlen_func", (9,), 256,
        partial(_dao_arguments, "return_attn_probs", -1),
    ),
    Package(
        "FlashAttention 4", "flash_attn.cute", "flash_attn_varlen_func", (9, 10), 128,
        partial(_dao_arguments, "return_lse", None),
    ),
    Package(
        "varlen_attn of torch", "torch.nn.attention.varlen", "varlen_attn", (8, 9, 10, 11, 12), 256, _torch_arguments
    ),
)  # fmt: skip


@cache
def find(package: Package) -> Found:
    """Import the function of a package, once a process."""
    try:
        function = getattr(importlib.import_module(package.module), package.function)
    except ModuleNotFoundError as error:
        return Found(None, reason=f"no module named {error.name}")
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return Found(None, reason=f"{type(error).__name__}: {error}")
    if package.module.startswith("torch.") and not torch.backends.cuda.is_flash_attention_available():
        return Found(None, reason="this build of torch has no flash attention")
    return Found(function, frozenset(inspect.signature(function).parameters))


def usable() -> Iterator[tuple[Package, Found]]:
    """Yield the packages that can be used on this machine."""
    found = ((package, find(package)) for package in PACKAGES)
    return ((package, function) for package, function in found if function.function is not None)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float | None) -> tuple[Tensor, Tensor]:
    """Compute `out` and `lse` of the operator with the first package that takes the case.

    Raises
    ------
    ValueError
        No package takes this case; the message names argument, value and what is expected.
    """
    if not q.shape[0] or not k.shape[0] or not mask.num_documents:
        return q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    mask, refusals = mask.with_offsets(q, k), []
    for package, found in usable():
        named = arguments(package, q, k, mask, scale)
        refusal = refuses(package, found, named, q, mask, scale)
        if refusal is None:
            return _run(found, named, q, k, v, mask)
        refusals.append(f"{refusal} ({package.name})")
    raise ValueError("; ".join(refusals) + '. The attention backend is "flash": "triton" takes this')


def arguments(package: Package, q: Tensor, k: Tensor, mask: AttentionMask, scale: float | None) -> dict[str, Any]:
    """Return the keyword arguments of a package but for q, k and v."""
    # With 1 as the longest, some kernels take documents for those of a batch of one query each, of which none is empty.
    max_lengths = max(q.shape[0], 2), max(k.shape[0], 2)
    reach = -1 if mask.window is None else min(mask.window - 1, max(max_lengths))  # the query itself is not counted
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    sides = reach, 0 if mask.causal else reach
    named = package.arguments(mask.offsets, max_lengths, sides, mask.causal, factor, q.shape[1] != k.shape[1])
    if mask.seqused_k is not None:
        named["seqused_k"] = torch.minimum(mask.seqused_k.clamp(min=0), mask.offsets[1].diff())
    return named


def refuses(
    package: Package, found: Found, named: dict[str, Any], q: Tensor, mask: AttentionMask, scale: float | None
) -> str | None:
    """Return why a package does not take a case, or None."""
    major, head_dim = architecture(q)[0], q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q: expected bfloat16 or float16, got {q.dtype}"
    if head_dim % 8 or head_dim > package.max_head_dim:
        return f"q: expected a head width that is a multiple of 8, at most {package.max_head_dim}, got {head_dim}"
    if major not in package.majors:
        majors = ", ".join(f"{n}.x" for n in package.majors)
        return f"q: expected a GPU of compute capability {majors}, got {major}.x"
    if scale is not None and not scale > 0:
        return f"scale: expected a positive number, got {scale}"
    if mask.num_documents > MAX_DOCUMENTS:
        return f"cu_seqlens_q: expected at most {MAX_DOCUMENTS} documents, got {mask.num_documents}"
    unknown = named.keys() - found.parameters
    if "seqused_k" in unknown:
        return "seqused_k: expected None in this version, got a tensor"
    if unknown:
        return f"{min(unknown)}: this version has no such argument"
    return None


def _run(
    found: Found, named: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask
) -> tuple[Tensor, Tensor]:
    """Return `out` and `lse` as the operator does, from a package's `out` and ``lse [H, Tq]``, a natural logarithm."""
    assert found.function is not None
    first, last = mask.keys_of_queries(q.shape[0], k.shape[0])
    masked = first >= last
    v = v.masked_fill(~attended_keys(first, last, k.shape[0])[:, None, None], 0)
    with torch.no_grad(), torch.cuda.device_of(q):
        out, lse, *_ = found.function(_aligned(q), _aligned(k), _aligned(v), **named)
    if lse.shape != q.shape[1::-1]:
        expected, module = list(q.shape[1::-1]), found.function.__module__
        raise RuntimeError(f"lse: expected shape {expected} of {module}, got {list(lse.shape)}")
    out = out.masked_fill(masked[:, None, None], 0)
    return out.contiguous(), lse.mT.masked_fill(masked[:, None], -torch.inf).contiguous()


def _aligned(x: Tensor) -> Tensor:
    """Return `x`, or a copy, whose heads begin at multiples of 16 bytes: packages load that much at a time."""
    begins = x.data_ptr() % 16 == 0 and not any(stride % 8 for stride in x.stride()[:-1])
    return x if begins and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
