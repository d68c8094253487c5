"""Derivatives of whole models beyond one backward pass: of gradients, and by `torch.func`."""

from __future__ import annotations

import pytest
import torch
from model_cases import CONFIGS, build, documents
from torch import Tensor
from torch.func import functional_call, grad, vmap

from blt_kernels.models.base import ByteModel

pytestmark = pytest.mark.slow


def trained(model: ByteModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_penalty(name: str) -> None:
    """The gradient of ``|gradient of the loss|^2``: fused as reference, and both as differences of gradients say."""
    tokens, rows = documents((17, 0, 9))
    penalties = []
    for ops in ("fused", "reference"):
        model = build(name, ops)
        parameters = list(trained(model).values())

        def penalty(model: ByteModel = model, parameters: list[Tensor] = parameters) -> Tensor:
            return sum(
                g.square().sum() for g in torch.autograd.grad(model.loss(tokens, rows), parameters, create_graph=True)
            )

        grads = torch.autograd.grad(penalty(), parameters)
        direction = [g / torch.cat([g.flatten() for g in grads]).norm() for g in grads]
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=step)
            values.append(penalty().detach())
        slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
        torch.testing.assert_close((values[0] - values[1]) / 2e-5, slope, rtol=1e-5, atol=0)
        penalties.append(grads)
    for key, fused, reference in zip(trained(build(name)), *penalties, strict=True):
        torch.testing.assert_close(fused, reference, rtol=0, atol=1e-9 * slope, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_each_row(name: str) -> None:
    """``vmap(grad(loss))`` over rows of one length."""
    model, (tokens, _) = build(name), documents()
    parameters, rows = trained(model), tokens[:45].view(3, 15)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row,)).square().mean()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, rows)
    for i, row in enumerate(rows):
        expected = dict(
            zip(parameters, torch.autograd.grad(loss(parameters, row), list(parameters.values())), strict=True)
        )
        for key, value in expected.items():
            torch.testing.assert_close(each[key][i], value, rtol=0, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_mode_raises(name: str) -> None:
    model, (tokens, rows) = build(name), documents()
    parameters = trained(model)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda p: functional_call(model, p, (tokens, rows)), (parameters,), (parameters,))
