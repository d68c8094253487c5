"""Flash attention of other packages, in the place of the forward kernel of block_causal_attention on CUDA.

Only what is exactly the same is delegated. What packages leave open is settled here: rows beyond the last document and
queries that see no key give 0, and -inf as lse. They load whole tiles, with weights of 0 for what is not seen, so
values that no query may see are zeroed first. The backward stays ours: from `out` and `lse` it is the same, and it is
the same bit for bit from run to run.

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

from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.triton.attention_launch import architecture, padded_width

Function = Callable[..., Any]

MOST_DOCUMENTS = 65535  # a dimension of the grid of torch's kernel
FASTER: frozenset[tuple[str, int, int, bool]] = frozenset()
"""What "auto" delegates: (package, major number of the compute capability, padded head width, windowed). Entries come
from measurements of ``bench/bench_block_causal_attention.py``, and none is on record yet."""


@dataclass(frozen=True)
class Package:
    """One that has variable-length flash attention.

    Attributes
    ----------
    name, module, function
        What it is called, and the function that is imported.
    majors
        Major numbers of the compute capabilities whose GPUs it is used on.
    widest
        Head width up to which it is used.
    arguments
        Keyword arguments from offsets, longest documents, keys to each side, causal, scale, used keys and whether heads
        are grouped.
    """

    name: str
    module: str
    function: str
    majors: tuple[int, ...]
    widest: int
    arguments: Callable[..., dict[str, Any]]


def _dao_arguments(
    returns: str, unlimited: int | None, offsets: tuple[Tensor, Tensor], longest: tuple[int, int],
    sides: tuple[int, int], causal: bool, scale: float, used: Tensor | None, _grouped: bool,
) -> dict[str, Any]:  # fmt: skip
    named: dict[str, Any] = {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1]}
    named |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1], "softmax_scale": scale, "causal": causal}
    named |= {"window_size": tuple(unlimited if side < 0 else side for side in sides), returns: True}
    return named if used is None else {**named, "seqused_k": used}


def _torch_arguments(
    offsets: tuple[Tensor, Tensor], longest: tuple[int, int],
    sides: tuple[int, int], _causal: bool, scale: float, used: Tensor | None, grouped: bool,
) -> dict[str, Any]:  # fmt: skip
    from torch.nn.attention.varlen import AuxRequest

    named: dict[str, Any] = {"cu_seq_q": offsets[0], "cu_seq_k": offsets[1], "max_q": longest[0], "max_k": longest[1]}
    named |= {"scale": scale, "window_size": sides, "return_aux": AuxRequest(lse=True)}
    named |= {"enable_gqa": True} if grouped else {}
    return named if used is None else {**named, "seqused_k": used}


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
def find(package: Package) -> tuple[Function | None, str]:
    """Return its function, or None and why there is none; it is imported once a process."""
    try:
        function: Function = getattr(importlib.import_module(package.module), package.function)
    except ModuleNotFoundError as error:
        return None, f"no module named {error.name}"
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}"
    if package.module.startswith("torch.") and not torch.backends.cuda.is_flash_attention_available():
        return None, "this build of torch has no flash attention"
    return function, ""


def found() -> Iterator[tuple[Package, Function]]:
    """Yield the packages that can be used on this machine."""
    for package in PACKAGES:
        function, _ = find(package)
        if function is not None:
            yield package, function


def delegate(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    causal: bool,
    scale: float | None,
    seqused_k: Tensor | None,
    _ranges: Tensor | None = None,
    num_documents: int = 1,
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return what computes forward in the place of Triton, with the arguments of the operator; None for Triton.

    Raises
    ------
    ValueError
        The backend is "flash", and no package takes this case; the message names argument, value and what is expected.
    """
    nothing = not q.shape[0] or not k.shape[0] or (cu_seqlens_q is not None and cu_seqlens_q.shape[0] < 2)
    if backend == "triton" or nothing or (backend == "auto" and not FASTER):
        return None
    cu_seqlens_q, cu_seqlens_k = reference.offsets_of(q, k, cu_seqlens_q, cu_seqlens_k, num_documents)
    refusals = []
    for package, function in found():
        named = _arguments(package, q, k, cu_seqlens_q, cu_seqlens_k, window, causal, scale, seqused_k)
        refusal = _refusal(package, function, named, q, cu_seqlens_q, scale)
        key = package.name, architecture(q)[0], padded_width(q.shape[-1]), window is not None
        if refusal is not None:
            refusals.append(f"{refusal} ({package.name})")
        elif backend == "flash" or key in FASTER:
            return partial(_forward, function, named)
    if backend == "auto":
        return None
    raise ValueError("; ".join(refusals) + '. The attention backend is "flash": "auto" and "triton" take this')


def _arguments(
    package: Package, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, window: int | None,
    causal: bool, scale: float | None, seqused_k: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    # With 1 as the longest, some kernels take documents for rows of a batch, which may hold empty ones here.
    longest = max(q.shape[0], 2), max(k.shape[0], 2)
    reach = -1 if window is None else min(window - 1, max(longest))  # the query itself is not counted
    if seqused_k is not None:
        seqused_k = torch.minimum(seqused_k.clamp(min=0), cu_k.diff())
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    sides = reach, 0 if causal else reach
    return package.arguments((cu_seqlens_q, cu_k), longest, sides, causal, factor, seqused_k, q.shape[1] != k.shape[1])


def _refusal(
    package: Package, function: Function, named: dict[str, Any], q: Tensor, cu_seqlens_q: Tensor, scale: float | None
) -> str | None:
    """Return why a package does not take a case, or None."""
    major, width, documents = architecture(q)[0], q.shape[-1], cu_seqlens_q.shape[0] - 1
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q: expected bfloat16 or float16, got {q.dtype}"
    if width % 8 or width > package.widest:
        return f"q: expected a head width that is a multiple of 8, at most {package.widest}, got {width}"
    if major not in package.majors:
        majors = ", ".join(f"{n}.x" for n in package.majors)
        return f"q: expected a GPU of compute capability {majors}, got {major}.x"
    if scale is not None and not scale > 0:
        return f"scale: expected a positive number, got {scale}"
    if documents > MOST_DOCUMENTS:
        return f"cu_seqlens_q: expected at most {MOST_DOCUMENTS} documents, got {documents}"
    unknown = named.keys() - inspect.signature(function).parameters.keys()
    if "seqused_k" in unknown:
        return "seqused_k: expected None in this version, got a tensor"
    if unknown:
        return f"{sorted(unknown)[0]}: this version has no such argument"
    return None


def _forward(
    function: Function, named: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, window: int | None, causal: bool, _scale: float | None, seqused_k: Tensor | None,
    _ranges: Tensor | None = None, num_documents: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `out` and `lse` as the operator does, from a package's `out` and ``lse [H, Tq]``, a natural logarithm."""
    cu_seqlens_q, cu_seqlens_k = reference.offsets_of(q, k, cu_seqlens_q, cu_seqlens_k, num_documents)
    first, last, live = reference.visible(q, k, cu_seqlens_q, cu_seqlens_k, window, causal, seqused_k)
    unseen = first >= last
    v = v.masked_fill(~live[:, None, None], 0)
    with torch.no_grad(), torch.cuda.device_of(q):
        out, lse, *_ = function(_aligned(q), _aligned(k), _aligned(v), **named)
    if lse.shape != q.shape[1::-1]:
        raise RuntimeError(
            f"lse: expected shape {list(q.shape[1::-1])} of {function.__module__}, got {list(lse.shape)}"
        )
    out = out.masked_fill(unseen[:, None, None], 0)
    return out.contiguous(), lse.mT.masked_fill(unseen[:, None], -torch.inf).contiguous()


def _aligned(x: Tensor) -> Tensor:
    """Return `x`, or a copy, whose heads begin at multiples of 16 bytes: packages load that much at a time."""
    begins = x.data_ptr() % 16 == 0 and not any(stride % 8 for stride in x.stride()[:-1])
    return x if begins and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
