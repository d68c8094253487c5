"""Who computes block_causal_attention on CUDA: what is delegated, how it is asked for, and what is refused.

The packages need a GPU. In their places stands a function in plain PyTorch that takes their arguments and leaves open
what they leave open: rows beyond the documents hold anything, and values are read beyond a document, with weights of 0.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

import blt_kernels
from blt_kernels.cli import doctor
from blt_kernels.ops import block_causal_attention as op
from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import assert_close, offsets_of
from blt_kernels.triton import attention_flash

NAN = float("nan")
TILE = 16


# --- stand-ins for the packages ---------------------------------------------------------------------------------------


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int],
    sides: tuple[int, int], scale: float | None, used: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Bottom-right aligned, `sides` keys before a query's own position and behind it, all of them if negative."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    for x in (q, k, v):
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        assert not any(stride % 8 for stride in x.stride()[:-1])
    out, lse = torch.full_like(q, NAN), torch.full((q.shape[1], q.shape[0]), NAN)
    repeat = q.shape[1] // k.shape[1]
    for b in range(cu_q.shape[0] - 1):
        rows, start = slice(cu_q[b], cu_q[b + 1]), int(cu_k[b])
        n, m = int(cu_q[b + 1] - cu_q[b]), int(cu_k[b + 1] - start if used is None else used[b])
        assert n <= longest[0]
        assert m <= longest[1]
        ahead = torch.arange(m) - (torch.arange(n)[:, None] + m - n)
        seen = torch.ones(n, m, dtype=torch.bool)
        for side, distance in zip(sides, (-ahead, ahead), strict=True):
            seen &= (distance <= side) if side >= 0 else True
        keys, values = (
            x.repeat_interleave(repeat, 1).float() for x in (k[start : start + m], v[start : start + m + TILE])
        )
        scores = torch.einsum("qhe,khe->hqk", q[rows].float(), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~seen, -math.inf)
        lse[:, rows] = scores.logsumexp(-1).masked_fill(~seen.any(1), math.inf)
        weights = torch.zeros(q.shape[1], n, values.shape[0])
        weights[..., :m] = scores.softmax(-1).masked_fill(~seen, 0)
        out[rows] = torch.einsum("hqk,khe->qhe", weights, values).to(q.dtype)
    return out, lse


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), return_attn_probs=False,
):  # fmt: skip
    """The arguments of hopper/flash_attn_interface.py that are used here."""
    assert return_attn_probs
    longest, sides = (max_seqlen_q, max_seqlen_k), (window_size[0], 0 if causal else window_size[1])
    return flash(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, sides, softmax_scale, seqused_k)


def flash_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_k=None,
    softmax_scale=None, causal=False, window_size=(None, None), return_lse=False,
):  # fmt: skip
    """The arguments of flash_attn/cute/interface.py that are used here: None is no bound."""
    assert return_lse
    sides = [-1 if side is None else side for side in window_size]
    longest, sides = (max_seqlen_q, max_seqlen_k), (sides[0], 0 if causal else sides[1])
    return flash(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, sides, softmax_scale, seqused_k)


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None,
):  # fmt: skip
    assert return_aux.lse
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return flash(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), window_size, scale, seqused_k)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):  # fmt: skip
    assert return_aux.lse
    return flash(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), window_size, scale, None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable], None]]:
    """Put a stand-in where its package would be; what a test has chosen is undone."""

    def put(function: Callable) -> None:
        if function in (flash_3, flash_4):
            name = "flash_attn_interface" if function is flash_3 else "flash_attn.cute"
            module = ModuleType(name)
            module.flash_attn_varlen_func = function
            monkeypatch.setitem(sys.modules, name.split(".")[0], module)
            monkeypatch.setitem(sys.modules, name, module)
        else:
            monkeypatch.setattr(varlen, "varlen_attn", function)
            monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        attention_flash.find.cache_clear()

    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    attention_flash.find.cache_clear()
    yield put
    blt_kernels.set_attention_backend("auto")
    attention_flash.find.cache_clear()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Record what Triton's launcher is called with, in the place of launching it."""
    calls: list[tuple] = []
    monkeypatch.setattr(op, "_triton_forward", lambda *arguments: calls.append(arguments) or ("Triton",))
    return calls


def inputs(queries: int, keys: int, heads: tuple[int, int] = (2, 2), width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    return [torch.randn(*size, width, generator=generator).bfloat16() for size in sizes]


def arguments(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None = None, **changed: Any) -> list:
    options = {"window": None, "causal": True, "scale": None, "seqused_k": None} | changed
    return [q, k, v, cu_q, cu_k, *options.values()]


def check(case: list) -> None:
    """Compare results with the reference, and gradients from these results too."""
    out, lse = op._forward_cuda(*case)
    double = [x.double() for x in case[:3]]
    expected = reference.block_causal_attention_fwd_reference(*case)
    truth = reference.block_causal_attention_fwd_reference(*double, *case[3:])
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert torch.equal(lse == -math.inf, truth[1] == -math.inf)
    assert not out[(truth[1] == -math.inf)].any()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    backward = reference.block_causal_attention_bwd_reference
    results = (out, lse, *backward(grad, *case[:3], out, lse, *case[3:]))
    expected = (*expected, *backward(grad, *case[:3], *expected, *case[3:]))
    truth = (*truth, *backward(grad.double(), *double, *truth, *case[3:]))
    for name, *triple in zip(("out", "lse", "dq", "dk", "dv"), results, expected, truth, strict=True):
        assert_close(*triple, name=name)


# --- what is delegated ------------------------------------------------------------------------------------------------

PACKAGES = [flash_3, flash_4, torch_2_13]


@pytest.mark.parametrize("window", [None, 1, 7, 10**12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("function", [*PACKAGES, torch_2_11])
def test_windows(install: Callable, triton: list, function: Callable, causal: bool, window: int | None) -> None:
    """Zero-length and one-byte documents, and rows beyond the last one, which hold NaN."""
    install(function)
    blt_kernels.set_attention_backend("flash")
    q, k, v = inputs(36, 36)
    q[33:], k[33:], v[33:] = NAN, NAN, NAN
    check(arguments(q, k, v, offsets_of([1, 20, 0, 12]), window=window, causal=causal, scale=0.3))
    assert not triton


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("function", PACKAGES)
def test_caches_and_groups(install: Callable, triton: list, function: Callable, window: int | None) -> None:
    """More keys than queries and fewer, none, used lengths out of range; NaN in values that are not used."""
    install(function)
    blt_kernels.set_attention_backend("flash")
    cu_q, cu_k = offsets_of([3, 9, 2, 1, 0]), offsets_of([20, 4, 0, 8, 5])
    for used in (None, [30, 2, 0, -3, 5]):
        q, k, v = inputs(15, 38, heads=(6, 2))
        if used is not None:
            v[22:24], v[24:32] = NAN, NAN
        v[37:] = NAN
        seqused_k = None if used is None else torch.tensor(used, dtype=torch.int32)
        check(arguments(q, k, v, cu_q, cu_k, window=window, seqused_k=seqused_k))
    assert not triton


def test_one_query(install: Callable) -> None:
    """A longest document of 1 would make a batch of what are documents."""
    install(torch_2_13)
    blt_kernels.set_attention_backend("flash")
    case = arguments(*inputs(1, 5, heads=(4, 2)), offsets_of([0, 1, 0]), offsets_of([1, 3, 1]))
    named = attention_flash._arguments(attention_flash.PACKAGES[2], *case[:2], *case[3:])
    assert (named["max_q"], named["max_k"]) == (2, 5)
    check(case)


def test_strides(install: Callable) -> None:
    """Slices of a projection stay where they are if they are aligned; the stand-in checks that all are."""
    install(flash_3)
    blt_kernels.set_attention_backend("flash")
    fused = torch.randn(20, 3, 2, 16).bfloat16()
    check(arguments(fused[:, 0], fused[:, 1], fused[:, 2], offsets_of([20])))
    assert attention_flash._aligned(fused[:, 1]).data_ptr() == fused[:, 1].data_ptr()
    odd = torch.randn(20 * 2 * 16 + 1).bfloat16()[1:].view(20, 2, 16)
    check(arguments(odd, odd.transpose(1, 2).contiguous().transpose(1, 2), odd, offsets_of([20])))


def test_installed_torch_takes_the_arguments() -> None:
    """What is not known is refused, so a new name in torch would turn delegation off without a word."""
    known = inspect.signature(varlen.varlen_attn).parameters
    q, k, _, *rest = arguments(*inputs(4, 4), offsets_of([4]))
    named = attention_flash._arguments(attention_flash.PACKAGES[2], q, k, *rest)
    assert named.keys() <= known.keys()


def test_results_of_another_shape_are_refused(install: Callable) -> None:
    def transposed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size):
        return query, query.new_zeros(query.shape[:2]).float()

    install(transposed)
    blt_kernels.set_attention_backend("flash")
    with pytest.raises(RuntimeError, match=r"lse: expected shape \[2, 9\] of test_attention_backend, got \[9, 2\]"):
        op._forward_cuda(*arguments(*inputs(9, 9), offsets_of([9])))


# --- what is refused --------------------------------------------------------------------------------------------------

NINE = offsets_of([9])
USED = torch.tensor([4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("function", "case", "message"),
    [
        (flash_3, arguments(*(x.float() for x in inputs(9, 9)), NINE), "q: expected bfloat16 or float16, got torch.fl"),
        (flash_3, arguments(*inputs(9, 9, width=20), NINE), "q: expected a head width .* at most 256, got 20"),
        (flash_4, arguments(*inputs(9, 9, width=136), NINE), "q: expected a head width .* at most 128, got 136"),
        (flash_3, arguments(*inputs(9, 9), NINE, scale=-0.5), "scale: expected a positive number, got -0.5"),
        (flash_3, arguments(*inputs(9, 9), NINE, scale=0.0), "scale: expected a positive number, got 0.0"),
        (
            flash_4,
            arguments(*inputs(9, 9), offsets_of([0] * 65536)),
            "cu_seqlens_q: expected at most 65535 documents, g",
        ),
        (torch_2_11, arguments(*inputs(9, 9), NINE, seqused_k=USED), "seqused_k: expected None in this version, got a"),
        (torch_2_11, arguments(*inputs(9, 9, heads=(4, 2)), NINE), "enable_gqa: this version has no such argument"),
    ],
)
def test_refusals(install: Callable, triton: list, function: Callable, case: list, message: str) -> None:
    install(function)
    blt_kernels.set_attention_backend("flash")
    with pytest.raises(ValueError, match=message):
        op._forward_cuda(*case)
    for backend in ("auto", "triton"):
        blt_kernels.set_attention_backend(backend)
        assert op._forward_cuda(*case) == ("Triton",)


def test_other_gpus(install: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 3 is for Hopper; torch takes what it does not."""
    monkeypatch.setattr(attention_flash, "architecture", lambda _: (8, 0))
    install(flash_3)
    blt_kernels.set_attention_backend("flash")
    case = arguments(*inputs(9, 9), NINE)
    with pytest.raises(ValueError, match=r"q: expected a GPU of compute capability 9.x, got 8.x \(FlashAttention 3\)"):
        op._forward_cuda(*case)
    install(torch_2_13)
    check(case)


# --- who is chosen ----------------------------------------------------------------------------------------------------


def test_auto_is_triton_unless_another_was_measured_to_be_faster(
    install: Callable, triton: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(flash_3)
    assert blt_kernels.attention_backend() == "auto"
    case, windowed = (arguments(*inputs(9, 9), NINE, window=window) for window in (None, 3))
    wide = arguments(*inputs(9, 9, width=20), NINE)
    assert op._forward_cuda(*case) == ("Triton",)
    monkeypatch.setattr(attention_flash, "FASTER", frozenset({("FlashAttention 3", 9, 32, True)}))
    assert doctor.attention()["forward"] == "Triton or FlashAttention 3"
    assert op._forward_cuda(*case) == op._forward_cuda(*wide) == ("Triton",)
    check(windowed)


def test_nothing_is_delegated_where_nothing_is_seen(install: Callable, triton: list) -> None:
    install(flash_3)
    blt_kernels.set_attention_backend("flash")
    for queries, keys, documents in ((0, 4, 1), (4, 0, 1), (4, 4, 0)):
        zeros = torch.zeros(documents + 1, dtype=torch.int32)
        assert op._forward_cuda(*arguments(*inputs(queries, keys), zeros, zeros)) == ("Triton",)


def test_choosing(install: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'triton', 'flash', got 'FA3'"):
        blt_kernels.set_attention_backend("FA3")
    with pytest.raises(
        RuntimeError, match=r"FlashAttention 3: .*; FlashAttention 4: .*; varlen_attn of torch: this bu"
    ):
        blt_kernels.set_attention_backend("flash")
    monkeypatch.setattr(op, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="backend: 'triton' needs Triton"):
        blt_kernels.set_attention_backend("triton")
    assert blt_kernels.attention_backend() == "auto"


def test_doctor_shows_it(install: Callable, capsys: pytest.CaptureFixture) -> None:
    install(flash_4)
    assert doctor.run(as_json=True, color="never") == 0
    facts = json.loads(capsys.readouterr().out)["attention"]
    assert facts.pop("packages") == {
        "FlashAttention 3": "no module named flash_attn_interface",
        "FlashAttention 4": None,
        "varlen_attn of torch": "this build of torch has no flash attention",
    }
    assert facts == {"backend": "auto", "forward": "Triton"}
    blt_kernels.set_attention_backend("flash")
    assert doctor.owner("block_causal_attention_fwd", "CUDA") == "FlashAttention 4"
    assert doctor.run(as_json=False, color="never") == 0
    out = capsys.readouterr().out
    assert "attention on CUDA  backend flash: FlashAttention 4" in out
    assert "FlashAttention 4: can be used" in out
