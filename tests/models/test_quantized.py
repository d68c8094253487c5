"""Models whose matrices are stored in bf16 or int8: what they compute, what they share, and what generation reports."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from model_cases import build
from torch import Tensor, nn

from blt_kernels.models.base import ByteModel
from blt_kernels.nn import QuantizedLinear
from blt_kernels.reference.few_row_linear import dequantized

MODELS = ("byte_lm", "blt", "megabyte")
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
EVERY_KIND = pytest.mark.parametrize("weights", ["bf16", "int8"])
PROMPTS = ["The quick brown fox", "", "an example\nof text"]


def exact_copy(model: ByteModel) -> ByteModel:
    """Return the model with ordinary matrices that hold the quantized values."""
    other = copy.deepcopy(model)
    for module in list(other.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, QuantizedLinear):
                outputs, inputs = layer.weight.shape
                plain = nn.Linear(inputs, outputs, bias=False)
                like = torch.empty(0, dtype=next(other.parameters()).dtype)
                plain.weight = nn.Parameter(dequantized(layer.weight, layer.scale, like))
                setattr(module, name, plain)
    return other


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1.0, -2.0, 0.4], [1e-42, 0.0, 0.0], [3e38, -1e38, 1.0]])
def test_rounding_of_a_row(values: list[float]) -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([values])
    quantized = QuantizedLinear(layer, torch.int8)
    largest = max(map(abs, values))
    assert quantized.scale is not None
    assert quantized.weight.abs().max() == (127 if largest > 1e-30 else 0)
    error = dequantized(quantized.weight, quantized.scale, layer.weight) - layer.weight
    assert error.abs().max() <= largest / 127 / 2 * 1.001 + 1e-37
    assert math.isfinite(quantized.error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_weight_changes_its_sign_where_the_scale_is_rounded(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 300, bias=False, dtype=dtype)
    quantized = QuantizedLinear(layer, torch.int8)
    assert quantized.scale is not None
    assert quantized.scale.dtype == dtype
    exact = layer.weight.detach().float()
    error = dequantized(quantized.weight, quantized.scale, layer.weight).float() - exact
    assert (error.abs() <= exact.abs().amax(1, keepdim=True) / 127).all()
    assert quantized.error < 0.01


@EVERY_KIND
def test_the_error_is_that_of_the_matrix(weights: str) -> None:
    layer = nn.Linear(300, 200, bias=False)
    quantized = QuantizedLinear(layer, torch.bfloat16 if weights == "bf16" else torch.int8)
    difference = dequantized(quantized.weight, quantized.scale, layer.weight) - layer.weight
    assert quantized.error == pytest.approx(float(difference.norm().detach() / layer.weight.norm().detach()), rel=1e-4)
    assert 0 < quantized.error < 0.01


@EVERY_KIND
@EVERY_MODEL
def test_equals_the_model_with_the_rounded_matrices(name: str, weights: str) -> None:
    model = build(name, dtype=torch.float32).quantized(weights)
    exact = exact_copy(model).double()
    ids = torch.arange(70, 130)
    torch.testing.assert_close(model(ids).double(), exact(ids), rtol=0, atol=1e-4)
    state = model.new_state()
    logits = torch.cat([model.extend(part, state=state) for part in ids.split([20, 1, 1, 5, 33])])
    torch.testing.assert_close(logits.double(), exact(ids), rtol=0, atol=1e-4)
    assert model.generate(PROMPTS, max_new_bytes=12).ids == exact.generate(PROMPTS, max_new_bytes=12).ids


@EVERY_MODEL
def test_all_matrices_but_the_output_are_quantized_and_the_rest_is_shared(name: str) -> None:
    model = build(name, dtype=torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = model.quantized("int8")
    own = dict(model.named_parameters())
    for key, value in quantized.named_parameters():
        assert value is own[key]
    rounded = {key for key in own if key not in dict(quantized.named_parameters())}
    matrices = ("_proj.weight", "_projection.weight", "global_to_local.weight")
    assert rounded == {key for key in own if key.endswith(matrices) and not key.startswith("patcher.")}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert copy.deepcopy(quantized).generate("a", max_new_bytes=3).ids == quantized.generate("a", max_new_bytes=3).ids


def test_patches_stay_as_they_are() -> None:
    model = build("blt", dtype=torch.float32)
    states = [m.new_state() for m in (model, model.quantized("int8"))]
    for state in states:
        state.model.extend(torch.arange(70, 170) % 90 + 40, state=state)
    assert states[0].patch_starts == states[1].patch_starts
    assert len(states[0].patch_starts[0]) > 3


@EVERY_KIND
def test_generation_quantizes_and_says_so(weights: str) -> None:
    model = build("byte_lm", dtype=torch.float32)
    out = model.generate(PROMPTS, max_new_bytes=5, weights=weights)
    assert out.ids == model.quantized(weights).generate(PROMPTS, max_new_bytes=5).ids
    assert 0 < out.statistics.weight_error < 0.01
    assert model.generate(PROMPTS, max_new_bytes=5).statistics.weight_error == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    quantized = build("byte_lm", dtype=dtype).quantized("int8")
    ids = torch.arange(70, 80)
    logits: Tensor = quantized(ids)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, exact_copy(quantized)(ids), rtol=0, atol=0)


def test_errors(tmp_path: Path) -> None:
    model = build("byte_lm", dtype=torch.float32)
    with pytest.raises(ValueError, match="weights: expected one of 'bf16', 'int8', got 'int4'"):
        model.quantized("int4")
    with pytest.raises(ValueError, match="weights: expected one of"):
        model.generate("a", max_new_bytes=1, weights="fp8")
    quantized = model.quantized("int8")
    with pytest.raises(ValueError, match="weights: expected a model that is not quantized"):
        quantized.quantized("bf16")
    with pytest.raises(ValueError, match="model: expected one that is not quantized"):
        quantized.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layer: expected one without a bias"):
        QuantizedLinear(nn.Linear(2, 2), torch.int8)
    with pytest.raises(ValueError, match="dtype: expected"):
        QuantizedLinear(nn.Linear(2, 2, bias=False), torch.int4)
