"""Backends of block_causal_attention on CUDA: arguments of FlashAttention, results, refusals, the choice."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

import blt_kernels
from blt_kernels.cli import doctor
from blt_kernels.ops import _attention_backend
from blt_kernels.reference.block_causal_attention import AttentionMask, block_causal_attention_fwd_reference
from blt_kernels.testing import assert_close, offsets_of
from blt_kernels.triton.block_causal_attention import flash

FLASH_3, FLASH_4, VARLEN = flash.PACKAGES
NAN = float("nan")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    blt_kernels.set_attention_backend("triton")


def inputs(queries: int, keys: int, heads: tuple[int, int] = (2, 2), head_dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    return [torch.randn(*size, head_dim, generator=generator).bfloat16() for size in sizes]


def mask_of(cu_q: Tensor, cu_k: Tensor | None = None, **changed: Any) -> AttentionMask:
    options = {"window": None, "causal": True, "scale": None, "seqused_k": None} | changed
    return AttentionMask(cu_q, cu_k, **options)


# --- what packages are asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({}, (-1, 0)),
        ({"causal": False}, (-1, -1)),
        ({"window": 1}, (0, 0)),
        ({"window": 7}, (6, 0)),
        ({"window": 7, "causal": False}, (6, 6)),
        ({"window": 10**12}, (36, 0)),
    ],
)
def test_windows(options: dict[str, Any], sides: tuple[int, int]) -> None:
    """Packages count the keys before a query and behind it, and not the query itself: negative, or None, is all."""
    q, k, _ = inputs(36, 36)
    mask = mask_of(offsets_of([1, 20, 0, 12]), **options)
    named = [flash.arguments(package, q, k, mask, 0.3) for package in flash.PACKAGES]
    assert named[0]["window_size"] == named[2]["window_size"] == sides
    assert named[1]["window_size"] == tuple(None if side < 0 else side for side in sides)
    assert [x.get("softmax_scale", x.get("scale")) for x in named] == [0.3] * 3
    assert [x.get("causal") for x in named] == [mask.causal, mask.causal, None]  # varlen_attn takes it from the window


def test_lengths_and_used_keys() -> None:
    """A maximum of 1 would make a batch of what are documents; used lengths are within those of the caches."""
    q, k, _ = inputs(1, 5, heads=(4, 2))
    used = torch.tensor([30, 2, -3], dtype=torch.int32)
    mask = mask_of(offsets_of([0, 1, 0]), offsets_of([1, 3, 1]), seqused_k=used)
    for package, names in ((FLASH_3, ("max_seqlen_q", "max_seqlen_k")), (VARLEN, ("max_q", "max_k"))):
        named = flash.arguments(package, q, k, mask, None)
        assert tuple(named[name] for name in names) == (2, 5)
        assert named["seqused_k"].tolist() == [1, 2, 0]
    assert named["enable_gqa"] is True
    assert named["scale"] == 0.25


def test_installed_torch_takes_the_arguments() -> None:
    """Unknown arguments are refused, so a new name in torch would turn delegation off without a word."""
    known = inspect.signature(varlen.varlen_attn).parameters
    q, k, _ = inputs(4, 4)
    assert flash.arguments(VARLEN, q, k, mask_of(offsets_of([4])), None).keys() <= known.keys()


def test_heads_begin_at_16_bytes() -> None:
    """Slices of a projection stay where they are if they are aligned."""
    fused = torch.randn(20, 3, 2, 16).bfloat16()
    assert flash._aligned(fused[:, 1]).data_ptr() == fused[:, 1].data_ptr()
    odd = torch.randn(20 * 2 * 16 + 1).bfloat16()[1:].view(20, 2, 16)
    for x in (odd, fused[:, 1].mT.contiguous().mT):
        copy = flash._aligned(x)
        assert copy.data_ptr() % 16 == 0
        assert copy.stride() == (32, 16, 1)
        assert torch.equal(copy, x)


# --- what becomes of results ------------------------------------------------------------------------------------------


def test_what_packages_leave_open_is_settled() -> None:
    """Queries without keys get 0 and -inf; no value that is masked for all queries reaches a package."""
    q, k, v = inputs(16, 38, heads=(6, 2))
    used = torch.tensor([3, 9, 2, 1, 0], dtype=torch.int32)
    mask = mask_of(offsets_of([3, 9, 2, 1, 0]), offsets_of([20, 4, 0, 8, 5]), seqused_k=used)
    expected = block_causal_attention_fwd_reference(q, k, v, *mask.offsets, None, True, None, used)
    masked = expected[1].isinf()
    v[3:20] = v[28:] = NAN  # these keys are unused

    def package(q: Tensor, k: Tensor, v: Tensor, **_named: Any) -> tuple[Tensor, Tensor]:
        assert v.isfinite().all()
        out = expected[0].masked_fill(masked[..., None], NAN)
        return out, expected[1].masked_fill(masked, math.inf).mT

    results = flash._run(flash.Found(package), {}, q, k, v, mask)
    assert masked[12:].any()
    assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(results, expected, strict=True))
    with pytest.raises(RuntimeError, match=r"lse: expected shape \[6, 16\] of test_attention_backend, got \[16, 6\]"):
        flash._run(flash.Found(lambda *_, **__: (q, q[..., 0])), {}, q, k, v, mask)


def test_nothing_is_delegated_where_nothing_is_attended() -> None:
    for queries, keys, documents in ((0, 4, 1), (4, 0, 1), (4, 4, 0)):
        zeros = torch.zeros(documents + 1, dtype=torch.int32)
        out, lse = flash.forward(*inputs(queries, keys), mask_of(zeros, zeros), None)
        assert not out.any()
        assert lse.dtype == torch.float32
        assert (lse == -math.inf).all()


@pytest.mark.skipif(not any(flash.usable()), reason="no package with variable-length flash attention can be used")
@pytest.mark.parametrize("window", [None, 1, 7, 10**12])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_is_the_reference(causal: bool, window: int | None) -> None:
    """A GPU takes zero-length and one-byte documents, and queries beyond the last one, which hold NaN."""
    q, k, v = (x.cuda() for x in inputs(36, 36, head_dim=64))
    offsets = offsets_of([1, 20, 0, 12], device="cuda")
    q[33:], k[33:], v[33:] = NAN, NAN, NAN
    blt_kernels.set_attention_backend("flash")
    options = (window, causal, 0.3, None)
    out, lse = torch.ops.blt_kernels.block_causal_attention_fwd(q, k, v, offsets, None, *options, None, 4)
    eager, truth = (
        block_causal_attention_fwd_reference(*(x.to(dtype) for x in (q, k, v)), offsets, None, *options)
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert_close(out, eager[0], truth[0])
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------

NINE = mask_of(offsets_of([9]))
USED = torch.tensor([4], dtype=torch.int32)
TORCH_2_11 = frozenset(("cu_seq_q", "cu_seq_k", "max_q", "max_k", "return_aux", "scale", "window_size"))
ALL = TORCH_2_11 | {"seqused_k", "enable_gqa"}


@pytest.mark.parametrize(
    ("package", "parameters", "change", "message"),
    [
        (VARLEN, ALL, {"q": inputs(9, 9)[0].float()}, "q: expected bfloat16 or float16, got torch.float32"),
        (VARLEN, ALL, {"q": inputs(9, 9, head_dim=20)[0]}, "q: expected a head width .* at most 256, got 20"),
        (FLASH_4, ALL, {"q": inputs(9, 9, head_dim=136)[0]}, "q: expected a head width .* at most 128, got 136"),
        (VARLEN, ALL, {"scale": -0.5}, "scale: expected a positive number, got -0.5"),
        (VARLEN, ALL, {"scale": 0.0}, "scale: expected a positive number, got 0.0"),
        (VARLEN, ALL, {"mask": mask_of(offsets_of([0] * 65536))}, "cu_seqlens_q: expected at most 65535 documents"),
        (VARLEN, TORCH_2_11, {"mask": mask_of(offsets_of([9]), seqused_k=USED)}, "seqused_k: expected None in this v"),
        (VARLEN, TORCH_2_11, {"q": inputs(9, 9, (4, 2))[0]}, "enable_gqa: this version has no such argument"),
    ],
)
def test_refusals(package: flash.Package, parameters: frozenset[str], change: dict[str, Any], message: str) -> None:
    case = {"q": inputs(9, 9)[0], "mask": NINE, "scale": None}
    for own, expected in ((case | change, message), (case, "None")):
        named = flash.arguments(VARLEN, own["q"], inputs(9, 9)[1], own["mask"], own["scale"])
        assert re.match(expected, str(flash.refuses(package, flash.Found(print, parameters), named, **own)))


def test_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 3 is for Hopper."""
    monkeypatch.setattr(flash, "architecture", lambda _: (8, 0))
    q, k, _ = inputs(9, 9)
    for package, refusal in ((FLASH_3, "q: expected a GPU of compute capability 9.x, got 8.x"), (VARLEN, None)):
        named = flash.arguments(package, q, k, NINE, None)
        assert flash.refuses(package, flash.Found(print, frozenset(named)), named, q, NINE, None) == refusal


# --- who is chosen ----------------------------------------------------------------------------------------------------


def test_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blt_kernels.attention_backend() == "triton"
    with pytest.raises(ValueError, match="backend: expected one of 'triton', 'flash', got 'FA3'"):
        blt_kernels.set_attention_backend("FA3")
    reason = flash.Found(None, reason="absent")
    monkeypatch.setattr(flash, "find", lambda _package: reason)
    with pytest.raises(RuntimeError, match=r"FlashAttention 3: absent; FlashAttention 4: absent; varlen_attn"):
        blt_kernels.set_attention_backend("flash")
    monkeypatch.setattr(_attention_backend, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="backend: 'flash' needs Triton"):
        blt_kernels.set_attention_backend("flash")
    assert blt_kernels.attention_backend() == "triton"


def test_doctor_shows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    found = {FLASH_4: flash.Found(print)}
    monkeypatch.setattr(flash, "find", lambda package: found.get(package, flash.Found(None, reason="absent")))
    doctor.run(as_json=True, color="never")
    facts = json.loads(capsys.readouterr().out)["attention"]
    assert facts.pop("packages") == {"FlashAttention 3": "absent", "FlashAttention 4": None, VARLEN.name: "absent"}
    assert facts == {"backend": "triton", "forward": "Triton"}
    blt_kernels.set_attention_backend("flash")
    assert doctor.owners()["block_causal_attention"]["CUDA"] == "FlashAttention 4"
    doctor.run(as_json=False, color="never")
    out = capsys.readouterr().out
    assert "attention on CUDA  backend flash: FlashAttention 4" in out
    assert "FlashAttention 4: can be used" in out
