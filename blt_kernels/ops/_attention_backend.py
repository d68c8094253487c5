"""The backend of block_causal_attention computes its forward on CUDA: kernels of this package, or another package."""

from __future__ import annotations

import importlib.util

from blt_kernels import _checks
from blt_kernels.triton.block_causal_attention import flash

HAS_TRITON = importlib.util.find_spec("triton") is not None
_backend = "triton"


def set_attention_backend(backend: str) -> None:
    """Choose who computes the forward of `block_causal_attention` on CUDA, in this process. The backward is Triton's.

    Parameters
    ----------
    backend : "triton" or "flash"
        - "triton", which is the default: the kernels of this package.
        - "flash": FlashAttention 3 (`flash_attn_interface`), FlashAttention 4 (`flash_attn.cute`) or torch's own
          `varlen_attn`, the first one that is installed and takes the case exactly as it is. Where none does, the
          call raises ValueError and names what is in the way: fp32 and fp64, head widths that are no multiple of 8,
          scales that are not positive, `seqused_k` or grouped heads with a version that does not know them.

    Raises
    ------
    ValueError
        `backend` is something else.
    RuntimeError
        "flash" where Triton is missing or no package can be used; the message says why.

    Notes
    -----
    Compiled code follows from its next call on, without being compiled again. ``blt-kernels doctor`` says what is
    installed. Results are the same within rounding, with one difference: the packages read whole tiles, with weights of
    0, so that with "flash" an infinity or NaN in a value of one document makes NaN of queries of the document before
    it. They are not told the longest document, which only the device knows, so torch's `varlen_attn` launches blocks
    for all documents as if each were the longest possible: it is slow for many of them.

    Examples
    --------
    >>> set_attention_backend("triton")
    >>> attention_backend()
    'triton'
    """
    global _backend
    _checks.check_choice("backend", backend, ("triton", "flash"))
    if backend == "flash" and not HAS_TRITON:
        raise RuntimeError("backend: 'flash' needs Triton for the backward: pip install triton")
    if backend == "flash" and not any(flash.usable()):
        reasons = "; ".join(f"{package.name}: {flash.find(package).reason}" for package in flash.PACKAGES)
        raise RuntimeError(f"backend: no package for 'flash' can be used. {reasons}")
    _backend = backend


def attention_backend() -> str:
    """Return who computes the forward of `block_causal_attention` on CUDA in this process.

    Returns
    -------
    str
        "triton" or "flash", as `set_attention_backend` was called; "triton" before.

    Examples
    --------
    >>> attention_backend()
    'triton'
    """
    return _backend
