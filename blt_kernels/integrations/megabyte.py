"""MEGABYTE-pytorch (lucidrains) on `block_causal_attention`: `apply` replaces ``Attend.forward``."""

from __future__ import annotations

from importlib.metadata import version
from types import MethodType
from typing import Any

from torch import Tensor, nn

from blt_kernels.integrations._applied import Applied, check_model, check_parameters, stock
from blt_kernels.ops.block_causal_attention import block_causal_attention

LABEL = "Attend.forward"
# Maps what `apply` replaces to the op that computes it.
REPLACES = {LABEL: "block_causal_attention"}


def apply(model: nn.Module | None = None) -> Applied:
    """Run the attention of MEGABYTE-pytorch on `block_causal_attention`, with ``flash_attn=True`` and without.

    Parameters
    ----------
    model : nn.Module, optional
        Only the layers of this model are replaced; the class, and so every model, if None.

    Returns
    -------
    Applied
        Its `undo` brings the code base's own attention back. Dropout in training, masks, attention that is not causal,
        and queries and keys of different lengths are left to the code base; `report` counts them.
        A copy of a changed model is changed as well, and stays so.

    Raises
    ------
    ModuleNotFoundError
        MEGABYTE-pytorch is not installed.
    TypeError
        ``Attend.forward`` takes other parameters than in version 0.3.6; the message names them. Or `model` is no
        module.
    ValueError
        The model has no ``Attend``.

    Examples
    --------
    >>> import torch
    >>> from MEGABYTE_pytorch import MEGABYTE
    >>> from blt_kernels.integrations import megabyte
    >>> model = MEGABYTE(num_tokens=260, dim=(64, 32), depth=(1, 1), max_seq_len=(16, 4), heads=2).eval()
    >>> with megabyte.apply(model) as applied:
    ...     logits = model(torch.randint(0, 260, (1, 64)))
    >>> applied.report().replaced
    {'Attend.forward': 2}
    """
    check_model(model)
    from MEGABYTE_pytorch.attend import Attend  # an optional package

    code_base = f"MEGABYTE-pytorch {version('MEGABYTE-pytorch')}"
    theirs = stock(Attend, "forward")
    check_parameters(theirs, ("self", "q", "k", "v", "mask"), code_base)
    layers = [Attend] if model is None else [module for module in model.modules() if isinstance(module, Attend)]
    if not layers:
        raise ValueError(f"model: expected an Attend of MEGABYTE-pytorch in it, got {type(model).__name__}")
    applied = Applied(code_base)
    ours = applied.counted(LABEL, _attend)

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        reason = _left_out(self, q, k, mask)
        if reason:
            applied.fell_back(LABEL, reason)
            return theirs(self, q, k, v, mask=mask)
        return ours(q, k, v)

    for layer in layers:
        applied.replace(layer, "forward", forward if layer is Attend else MethodType(forward, layer))
    return applied


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from ``[B, H, S, E]`` to keys and values of the same shape, or to one head of them, ``[B, S, E]``."""
    k, v = (x.unsqueeze(1) if x.ndim == 3 else x for x in (k, v))
    out = block_causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _left_out(attend: Any, q: Tensor, k: Tensor, mask: Tensor | None) -> str | None:
    """Return why a call is left to the code base, or None."""
    if mask is not None:
        return "a mask"
    if not attend.causal:
        return "attention that is not causal"
    if attend.training and attend.dropout > 0:
        return "dropout in training"
    if q.shape[-2] != k.shape[-2]:
        return "queries and keys of different lengths"
    return None
