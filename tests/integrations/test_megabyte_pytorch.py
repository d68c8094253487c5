"""MEGABYTE-pytorch with its attention on block_causal_attention, beside the package's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blt_kernels.integrations import megabyte

package = pytest.importorskip("MEGABYTE_pytorch")
attend = pytest.importorskip("MEGABYTE_pytorch.attend")
LABEL = megabyte.LABEL


def model_of(flash: bool, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"dim": (48, 32, 24), "depth": (2, 1, 2), "max_seq_len": (7, 4, 3), "dim_head": 16, "heads": 3}
    return package.MEGABYTE(num_tokens=260, flash_attn=flash, **{**sizes, **options}).double().eval()


def ids_of(rows: int = 2, length: int = 61) -> Tensor:
    return torch.randint(1, 260, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    loss = model(ids, return_loss=True)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


def close(ours: list[Tensor | None], theirs: list[Tensor | None], tolerance: float) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rel_pos", [False, True])
@pytest.mark.parametrize("flash", [False, True])
def test_logits_and_gradients_are_the_packages(flash: bool, rel_pos: bool) -> None:
    """Compare in fp64, so that rounding does not hide an error, and in fp32 within the 1e-5 that is promised."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = model_of(flash, rel_pos=rel_pos, pos_emb=True).to(dtype)
        for rows, length in ((2, 61), (1, 1), (3, 12)):
            ids = ids_of(rows, length)
            logits, theirs = model(ids), gradients(model, ids)
            with megabyte.apply() as applied:
                torch.testing.assert_close(model(ids), logits, rtol=tolerance, atol=tolerance)
                close(gradients(model, ids), theirs, tolerance)
            assert applied.report().replaced == {LABEL: 10}  # five layers, twice
            assert not applied.report().fell_back


def test_an_empty_prompt_and_generation() -> None:
    model = model_of(True)
    empty = ids_of(2, 0)
    expected = model(empty)
    torch.manual_seed(2)
    written = model.generate(ids_of(2, 70), temperature=0.0)
    with megabyte.apply():
        torch.testing.assert_close(model(empty), expected)
        torch.manual_seed(2)
        assert torch.equal(model.generate(ids_of(2, 70), temperature=0.0), written)


def test_only_the_given_model_is_replaced_and_undo_is_bitwise() -> None:
    model, other, ids = model_of(False), model_of(False), ids_of()
    before, method = model(ids), attend.Attend.forward
    applied = megabyte.apply(model)
    assert not torch.equal(model(ids), before)  # another order of summation
    assert torch.equal(other(ids), before)
    assert applied.report().replaced == {LABEL: 5}
    with megabyte.apply(model) as again:
        model(ids)
    assert again.report().replaced == {LABEL: 5}
    assert applied.report().replaced == {LABEL: 5}
    applied.undo()
    assert torch.equal(model(ids), before)
    assert attend.Attend.forward is method
    assert all("forward" not in vars(module) for module in model.modules())


def heads(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("flash", [False, True])
def test_one_head_of_keys_and_padded_heads(flash: bool) -> None:
    """Attend takes keys without a head axis, and `[B, H, S, E]` in any order of memory."""
    layer = attend.Attend(causal=True, flash=flash).eval()
    q, k, v = heads(2, 3, 9, 16), heads(2, 9, 16), heads(2, 9, 17)[..., 1:]
    expected = layer(q, k, v)
    with megabyte.apply():
        torch.testing.assert_close(layer(q, k, v), expected)
        torch.testing.assert_close(layer(q.transpose(1, 2).contiguous().transpose(1, 2), k, v), expected)


LEFT_OUT: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "a mask": lambda: (attend.Attend(causal=True).eval(), {"mask": torch.ones(2, 9, dtype=torch.bool)}),
    "attention that is not causal": lambda: (attend.Attend(causal=False), {}),
    "dropout in training": lambda: (attend.Attend(causal=True, dropout=0.5).train(), {}),
    "queries and keys of different lengths": lambda: (attend.Attend(causal=True).eval(), {"k": heads(2, 3, 11, 16)}),
}


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_what_is_left_to_the_package(reason: str) -> None:
    layer, options = LEFT_OUT[reason]()
    k = options.pop("k", heads(2, 3, 9, 16))
    call = (heads(2, 3, 9, 16), k, k)
    torch.manual_seed(3)
    expected = layer(*call, **options)
    with megabyte.apply() as applied:
        torch.manual_seed(3)
        assert torch.equal(layer(*call, **options), expected)
    report = applied.report()
    assert report.fell_back == {(LABEL, reason): 1}
    assert reason in str(report)


def test_copies_stay_changed() -> None:
    model, ids = model_of(True), ids_of()
    with megabyte.apply(model) as applied:
        copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(ids), model(ids), rtol=1e-10, atol=1e-10)
    assert applied.report().replaced == {LABEL: 5}


def test_dropout_is_taken_in_evaluation() -> None:
    model, ids = model_of(True, attn_dropout=0.5), ids_of()
    expected = model(ids)
    with megabyte.apply() as applied:
        torch.testing.assert_close(model(ids), expected)
        model.train()(ids)
    assert applied.report().replaced == {LABEL: 5}
    assert applied.report().fell_back == {(LABEL, "dropout in training"): 5}


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="model: expected an Attend of MEGABYTE-pytorch in it, got Linear"):
        megabyte.apply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module or None, got 'x'"):
        megabyte.apply("x")
    monkeypatch.setattr(attend.Attend, "forward", lambda self, q, k, v, mask=None, bias=None: q)
    with pytest.raises(TypeError, match=r"MEGABYTE-pytorch .*got \(self, q, k, v, mask, bias\)"):
        megabyte.apply()
