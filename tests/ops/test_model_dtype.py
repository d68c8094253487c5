"""compare="model": entropies and thresholds are compared in the dtype of the model, as torch and transformers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import assert_equal, offsets_of

MODEL_RULES: list[dict[str, Any]] = [{}, {"monotonic": True}, {"threshold_add": 0.1001}, {"max_patch_length": 5}]
ABOVE = 1.3355  # bf16 and fp16 round it to 1.3359375, which is above it in fp32
SPREAD = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-7, torch.float64: 3e-8}


def torch_starts(h: Tensor, threshold_add: float | None = None, monotonic: bool = False, **_: Any) -> Tensor:
    """Return which bytes of rows ``[B, S]`` start a patch, the byte to come included, in arithmetic of torch."""
    rise = h[:, 1:] - h[:, :-1]
    starts = torch.ones(h.shape[0], h.shape[1] + 1, dtype=torch.bool)
    if monotonic:
        starts[:, 3:] = rise[:, 1:] > ABOVE
    elif threshold_add is not None:
        starts[:, 3:] = (rise[:, 1:] > threshold_add) & (h[:, 2:] > ABOVE)
        starts[:, 3] = False
    else:
        starts[:, 2:] = h[:, 1:] > ABOVE
    return starts


def near_thresholds(dtype: torch.dtype) -> Tensor:
    """Return entropies ``[4, 500]``; many, and many of their differences, round to a threshold in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    h = ABOVE + SPREAD[dtype] * torch.randn(4, 500, dtype=torch.float64, generator=generator)
    h[1, ::3] -= 0.1
    h[2:, ::2] -= ABOVE
    return h.to(dtype)


@pytest.mark.parametrize("rule", MODEL_RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_models_dtype_compares_as_torch_does(dtype: torch.dtype, rule: dict[str, Any], device: str) -> None:
    h = near_thresholds(dtype)
    layout = bk.patch_starts(h.to(device), threshold=ABOVE, compare="model", **rule).to("cpu")
    starts = torch_starts(h, **rule)
    if "max_patch_length" in rule:  # a longer patch is cut from the left
        for row in starts:
            for i in range(1, 501):
                row[i] |= not row[i - 4 : i].any() if i >= 5 else False
    opens = (layout.decode_ids == layout.patch_ids).view(4, 500)
    assert_equal(opens, starts[:, 1:])
    if dtype != torch.float32:
        other = bk.patch_starts(h.to(device), threshold=ABOVE, **rule).to("cpu")
        assert not torch.equal(layout.patch_ids, other.patch_ids), "fp32 decides the same"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_compared_in_their_dtype(dtype: torch.dtype, device: str) -> None:
    """Entropies come out as ever; decisions are those of entropies rounded once."""
    logits = torch.randn(3000, 7, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    offsets = offsets_of([1000, 0, 2000], device=device)
    for rule in MODEL_RULES:
        options = {"threshold": ABOVE, "compare": "model", **rule}
        entropy, layout = bk.entropy_patch(logits, offsets, **options)
        plain, other = bk.entropy_patch(logits, offsets, **{**options, "compare": "fp32"})
        assert_equal(entropy, plain)
        assert_equal(layout, bk.patch_starts(entropy.to(dtype), offsets, **options))
        if dtype == torch.bfloat16 and not rule:
            assert not torch.equal(layout.patch_ids, other.patch_ids), "fp32 decides the same"


def test_decisions_of_transformers_in_bf16(device: str) -> None:
    """Its entropies of bf16 logits, and its comparison: thousands of decisions, none of which differs."""
    modeling = pytest.importorskip("transformers.models.blt.modeling_blt")
    logits = 1.9 * torch.randn(4, 1500, 64, generator=torch.Generator().manual_seed(0))
    entropy = torch.distributions.Categorical(logits=logits.bfloat16()).entropy()
    assert entropy.dtype == torch.bfloat16
    threshold = float(entropy.float().median()) - 0.001  # bf16 rounds it to the median, which many entropies are
    theirs = modeling.BltPatcher.patch_lengths_from_entropies(entropy, sequence_length=1500, threshold=threshold)
    lengths = {
        compare: bk.patch_starts(entropy.to(device), threshold=threshold, compare=compare).to_lengths(padding=-1)
        for compare in ("model", "fp32")
    }
    assert lengths["model"].tolist() == theirs.tolist()
    assert lengths["fp32"].tolist() != theirs.tolist()
