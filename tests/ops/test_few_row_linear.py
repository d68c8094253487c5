"""few_row_linear: the accuracy of the kernel, its bits, hostile values and strides, and where torch's product runs."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import inputs
import pytest
import torch
import torch.nn.functional as F
from backends import use
from op_calls import has_cpu_kernel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import blt_kernels as bk
import blt_kernels.flops  # this registers the formula of FLOPs
from blt_kernels.nn.matrices import Linear
from blt_kernels.ops import few_row_linear as op
from blt_kernels.ops.few_row_linear import MAX_ROWS, MIN_ROWS, few_row_linear_fwd

OVERLOAD = torch.ops.blt_kernels.few_row_linear_fwd.default
SIZES = ((1, 1), (3, 5), (15, 4), (16, 3), (17, 7), (47, 33), (64, 64), (250, 131), (1023, 9))  # (K, N)
COMPILED = pytest.mark.skipif(not has_cpu_kernel(OVERLOAD), reason="no compiled module")


def normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return inputs.random_normal(rows, width, dtype=torch.float32, seed=seed)


@pytest.mark.parametrize(("width", "outputs"), SIZES)
def test_the_error_is_at_most_that_of_torch(width: int, outputs: int) -> None:
    """The root mean square over all numbers of rows, with a margin for sums of a few terms."""
    weight = normal(outputs, width, seed=1)
    ours, torchs = [], []
    for rows in range(1, 20):
        x = normal(rows, width, seed=rows)
        truth = F.linear(x.double(), weight.double())
        ours.append((few_row_linear_fwd(x, weight) - truth).flatten())
        torchs.append((F.linear(x, weight) - truth).flatten())
    error, bound = (torch.cat(errors).square().mean().sqrt() for errors in (ours, torchs))
    assert error <= 1.5 * bound + 1e-8


@COMPILED
@pytest.mark.parametrize(("width", "outputs"), [*SIZES, (512, 1031)])
def test_bits_of_a_row_depend_neither_on_other_rows_nor_on_threads(width: int, outputs: int) -> None:
    x, weight = normal(19, width), normal(outputs, width, seed=1)
    expected = torch.cat([few_row_linear_fwd(row, weight) for row in x.split(1)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in range(1, 20):
            assert torch.equal(few_row_linear_fwd(x[:rows], weight), expected[:rows])
    assert torch.equal(torch.cat([few_row_linear_fwd(x, w) for w in weight.split(3)], 1), expected)


@pytest.mark.parametrize(("rows", "width", "outputs"), [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_empty(rows: int, width: int, outputs: int) -> None:
    y = few_row_linear_fwd(torch.ones(rows, width), torch.ones(outputs, width))
    assert y.shape == (rows, outputs)
    assert torch.equal(y, torch.zeros(rows, outputs))


@pytest.mark.parametrize("width", [5, 16, 23, 32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_reach_their_products_alone(width: int, value: float) -> None:
    for k in range(width):
        x, weight = torch.ones(6, width), torch.ones(7, width)
        x[2, k] = value
        weight[5, k] = 0  # infinity times 0 is NaN
        x[4, k] = 0
        actual = few_row_linear_fwd(x, weight)
        torch.testing.assert_close(actual, F.linear(x, weight), rtol=0, atol=0, equal_nan=True)
        assert actual.isfinite().sum() == 5 * 7


def test_strides_and_memory_next_to_the_arguments() -> None:
    """Rows end at the end of their memory, or lie between NaN."""
    x, weight = normal(9, 37), normal(11, 37, seed=1)
    expected = few_row_linear_fwd(x, weight)

    def padded(value: Tensor) -> Tensor:
        room = torch.full((value.shape[0] + 2, value.shape[1] + 40), torch.nan)
        room[1:-1, 20:-20] = value
        return room[1:-1, 20:-20]

    changes: tuple[Callable[[Tensor], Tensor], ...] = (padded, lambda value: value.t().contiguous().t())
    for change in changes:
        assert torch.equal(few_row_linear_fwd(change(x), change(weight)), expected)
    repeated = x[:1].expand(9, 37)
    assert torch.equal(few_row_linear_fwd(repeated, weight), expected[:1].expand(9, 11))


def test_opcheck_and_flops() -> None:
    x, weight = normal(5, 37), normal(11, 37, seed=1)
    for arguments in ((x, weight), (x.t().contiguous().t(), weight), (x[:0], weight)):
        torch.library.opcheck(OVERLOAD, arguments)
    with FlopCounterMode(display=False) as counter:
        few_row_linear_fwd(x, weight)
    assert counter.get_total_flops() == 2 * 5 * 37 * 11


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(4), torch.ones(3, 4), "x: expected 2 dimensions"),
        (torch.ones(4, 4), torch.ones(4), "weight: expected 2 dimensions"),
        (torch.ones(4, 4), torch.ones(3, 5), "weight: expected size 4"),
        (torch.ones(4, 4).double(), torch.ones(3, 4).double(), "x: expected dtype Float"),
        (torch.ones(4, 4), torch.ones(3, 4).double(), "weight: expected dtype float32, bfloat16 or int8, got Double"),
    ],
)
@COMPILED
def test_the_operator_names_wrong_arguments(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        few_row_linear_fwd(x, weight)


def test_the_function_names_wrong_arguments() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(TypeError, match="x: expected a tensor"):
        bk.few_row_linear([1.0], x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weight: expected dtype"):
        bk.few_row_linear(x, x.double())
    with pytest.raises(ValueError, match="weight: expected shape"):
        bk.few_row_linear(x, torch.ones(2, 4))


# --- who computes a product -------------------------------------------------------------------------------------------


def calls_kernel(function: Callable[[], Tensor]) -> bool:
    with mock.patch.object(op, "few_row_linear_fwd", wraps=few_row_linear_fwd) as kernel:
        function()
    return kernel.called


LAYER = Linear(512, 1024, bias=False)


class OwnTensor(Tensor):
    """A subclass without changes."""


def test_few_rows_without_gradients_run_on_the_kernel() -> None:
    with torch.no_grad():
        for rows in range(20):
            assert calls_kernel(lambda: LAYER(torch.ones(rows, 512))) == (MIN_ROWS <= rows <= MAX_ROWS)  # noqa: B023
    with torch.inference_mode():
        assert calls_kernel(lambda: LAYER(torch.ones(4, 512)))
    frozen = LAYER.weight.detach()
    assert calls_kernel(lambda: bk.few_row_linear(torch.ones(4, 512), frozen))


def test_torch_computes_everything_else() -> None:
    x, frozen = torch.ones(4, 512), LAYER.weight.detach()
    assert not calls_kernel(lambda: LAYER(x)), "the weight needs a gradient"
    assert not calls_kernel(lambda: bk.few_row_linear(x.clone().requires_grad_(), frozen))
    assert not calls_kernel(lambda: bk.few_row_linear(x[None], frozen))
    assert not calls_kernel(lambda: bk.few_row_linear(x, frozen.t().contiguous().t()))
    assert not calls_kernel(lambda: bk.few_row_linear(x[:, :8], frozen[:, :8])), "too few weights"
    assert not calls_kernel(lambda: bk.few_row_linear(x.double(), frozen.double()))
    assert not calls_kernel(lambda: torch.func.grad(lambda w: bk.few_row_linear(x, w).sum())(frozen))
    assert not calls_kernel(lambda: torch.func.jvp(lambda v: bk.few_row_linear(v, frozen), (x,), (x,))[0])
    assert not calls_kernel(lambda: bk.few_row_linear(x.to("meta"), frozen.to("meta")))
    assert not calls_kernel(lambda: bk.few_row_linear(x, frozen.as_subclass(OwnTensor))), "it may have its own product"
    with torch.autocast("cpu", torch.bfloat16):
        assert bk.few_row_linear(x, frozen).dtype == torch.bfloat16


def test_scales_get_gradients() -> None:
    x, weight = normal(4, 32), torch.ones(3, 32, dtype=torch.int8)
    scale = torch.ones(3, requires_grad=True)
    bk.few_row_linear(x, weight, scale=scale).sum().backward()
    torch.testing.assert_close(scale.grad, x.sum().expand(3))


def test_a_layer_has_gradients_hooks_and_names_of_torchs() -> None:
    layer, theirs = Linear(512, 1024), torch.nn.Linear(512, 1024)
    theirs.load_state_dict(layer.state_dict())
    x = normal(4, 512)
    with torch.no_grad():
        assert torch.equal(layer(x), theirs(x)), "with a bias"
    layer.bias = theirs.bias = None
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), theirs(x))
    for module in (layer, theirs):
        module(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, theirs.weight.grad)
    assert len(outputs) == 2


@pytest.mark.slow
def test_a_compiled_layer_takes_any_number_of_rows() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(LAYER, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (3, 5, 20):
            x = normal(rows, 512)
            assert torch.equal(compiled(x), F.linear(x, LAYER.weight))


def test_the_reference_is_torchs_product() -> None:
    x, weight = normal(5, 37), normal(11, 37, seed=1)
    with use("reference"):
        assert torch.equal(few_row_linear_fwd(x, weight), F.linear(x, weight))
