"""Models under `torch.compile`'s default backend, which rewrites and fuses what "aot_eager" leaves as it is.

Compiling one takes half a minute: so each model here has many of the options that change its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from model_cases import BYTE_LM, LOCAL, SMALL_BLT, SMALL_MEGABYTE, documents, enlarge_additions
from torch import Tensor

from blt_kernels.ids import EOS
from blt_kernels.models import BLT, ByteLM, MegaByte
from blt_kernels.models.base import ByteModel
from blt_kernels.nn import next_byte_bits, next_byte_targets

GROUPED = replace(LOCAL, num_kv_heads=1)
MODELS: dict[str, tuple[type[ByteModel], object, dict[str, object]]] = {
    "byte_lm": (ByteLM, replace(BYTE_LM, split_documents=True, reset_at_newlines=True), {}),
    "blt_entropy": (
        BLT,
        replace(
            SMALL_BLT,
            cross_attn_all_layers_encoder=True,
            cross_attn_heads=4,
            cross_attn_window_encoder=2,
            cross_attn_window_decoder=3,
            split_documents=True,
            monotonic=True,
            threshold=0.01,
            max_patch_length=5,
            whole_characters=True,
        ),
        {},
    ),
    "blt_transformers": (
        BLT,
        replace(
            SMALL_BLT,
            encoder=GROUPED,
            decoder=GROUPED,
            cross_attn_grouped_heads=True,
            cross_attn_all_layers_decoder=False,
            pool_every_layer=True,
            num_functions=2,
            ngram_sizes=(2, 4),
            patching="space",
            patcher=None,
        ),
        {"max_patches": 60},
    ),
    "megabyte": (MegaByte, SMALL_MEGABYTE, {}),
    "megabyte_extended": (MegaByte, replace(SMALL_MEGABYTE, cross_patch=3, conv_sizes=(3,)), {"strided": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str) -> None:
    tokens, rows = documents_with_ends()
    options = MODELS[name][2]

    def logits_and_loss(model: ByteModel) -> tuple[Tensor, Tensor]:
        logits = model(tokens, rows, **options)
        # The logits enter the gradients directly too, since the loss does not show their scale.
        return logits, next_byte_bits(logits, next_byte_targets(tokens, rows)) + logits.square().mean()

    check_compiled(name, logits_and_loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte_lm", "blt_entropy", "megabyte"])
def test_loss_without_stored_logits(name: str) -> None:
    tokens, rows = documents_with_ends()
    options = MODELS[name][2]

    def nats_and_loss(model: ByteModel) -> tuple[Tensor, Tensor]:
        nats = model(tokens, rows, targets=next_byte_targets(tokens, rows), **options)
        return nats, nats.square().mean()

    check_compiled(name, nats_and_loss)


def documents_with_ends() -> tuple[Tensor, Tensor]:
    tokens, rows = documents()
    tokens[7], tokens[20] = EOS, ord("\n") + 4
    return tokens, rows


def check_compiled(name: str, call: Callable[[ByteModel], tuple[Tensor, Tensor]]) -> None:
    """Compiled code is as far from eager code as fp32 rounds, which eager code in fp64 shows.

    `call` returns an output and a loss, whose gradients are compared too.
    """
    cls, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = enlarge_additions(cls(config))

    def run(model: ByteModel, call: Callable[[ByteModel], tuple[Tensor, Tensor]]) -> list[Tensor]:
        out, loss = call(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [out.detach(), loss.detach(), *torch.autograd.grad(loss, parameters)]

    torch._dynamo.reset()
    compiled = run(model, torch.compile(call, fullgraph=True))
    eager = run(model, call)
    exact = run(model.double(), call)
    for i, (a, e, x) in enumerate(zip(compiled, eager, exact, strict=True)):
        error, rounding = ((y - x).abs().max().item() for y in (a, e))
        assert error <= 8 * max(rounding, 1e-7 * x.abs().max().item()), f"{name}: result {i}"
