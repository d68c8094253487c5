"""Rows of many bytes: the loss without stored logits, blocks of rows, and layers that backward computes again."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from model_cases import BYTE_LM, CONFIGS, build, documents
from tiers import slow_unless
from torch import Tensor

from blt_kernels.cli import bench
from blt_kernels.models import ByteLM
from blt_kernels.models.base import ByteModel
from blt_kernels.nn import CrossAttention, TransformerLayer, matrices, next_byte_bits, next_byte_targets, recompute

LENGTHS = (1, 50, 0, 3, 90, 4, 33, 1, 0)
BLOCK = 8  # rows of a block in these tests, but 8 times a window at least


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(bench.SOURCE))
    return importlib.import_module("memory")


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make blocks short, and return the number of rows of every block of a layer, in the order of their calls."""
    calls: list[int] = []
    block = TransformerLayer._block

    def counted(self: TransformerLayer, before: Tensor, own: Tensor, *inputs: object) -> Tensor:
        calls.append(own.shape[0])
        return block(self, before, own, *inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(TransformerLayer, "_block", counted)
    monkeypatch.setattr(recompute, "BLOCK_ROWS", BLOCK)
    return calls


def set_recompute(model: torch.nn.Module, value: bool | None) -> None:
    for module in model.modules():
        if isinstance(module, (CrossAttention, TransformerLayer)):
            module.recompute = value


def gradients(model: ByteModel, loss: Tensor) -> dict[str, Tensor]:
    used = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    return {name: grad for name, grad in zip(used, grads, strict=True) if grad is not None}


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("name", slow_unless(CONFIGS, ["byte_lm", "blt", "megabyte", "megabyte_extended"]))
def test_nats_are_those_of_stored_logits(name: str, ops: str) -> None:
    model, (tokens, rows) = build(name, ops), documents()
    targets = next_byte_targets(tokens, rows)
    targets[5] = -100
    for options in ({}, {"strided": True}) if name.startswith("megabyte") else ({},):
        logits = model(tokens, rows, **options)
        expected = F.cross_entropy(logits, targets, reduction="none")
        nats = model(tokens, rows, targets=targets, **options)
        torch.testing.assert_close(nats, expected, rtol=1e-12, atol=1e-12)
        assert nats.eq(0).equal(targets == -100)
        grads, wanted = gradients(model, nats.mean()), gradients(model, expected.mean())
        assert grads.keys() == wanted.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, wanted[key], rtol=1e-10, atol=1e-12, msg=key)
    loss = model.loss(tokens, rows)
    stored = next_byte_bits(model(tokens, rows), next_byte_targets(tokens, rows))
    torch.testing.assert_close(loss, stored, rtol=1e-12, atol=0)
    batch = tokens[:60].view(3, 20)
    packed = torch.arange(0, 61, 20, dtype=torch.int32)
    torch.testing.assert_close(model.loss(batch), model.loss(tokens[:60], packed), rtol=1e-12, atol=0)
    nats = model(batch, targets=next_byte_targets(tokens[:60], packed).view(3, 20))
    assert nats.shape == batch.shape
    torch.testing.assert_close(nats.sum() / (57 * math.log(2)), model.loss(batch), rtol=1e-12, atol=0)


def test_another_head_is_called_on_blocks_of_rows(short_blocks: list[int]) -> None:
    model, (tokens, rows) = build("byte_lm"), documents()
    expected = model.loss(tokens, rows)
    wanted, calls = gradients(model, expected), []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: calls.append(len(logits)))
    loss = model.loss(tokens, rows)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert max(calls) == BLOCK
    assert sum(calls) == len(tokens)
    for key, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte_lm", "megabyte"])
def test_nats_compile_whole_for_every_length(name: str) -> None:
    model, graphs = build(name), []
    torch._dynamo.reset()

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ((5, 0, 13), (3, 9, 22)):
        tokens, rows = documents(lengths)
        targets = next_byte_targets(tokens, rows)
        expected = model(tokens, rows, targets=targets)
        torch.testing.assert_close(compiled(tokens, rows, targets=targets), expected, rtol=0, atol=1e-12)
    assert len(graphs) == 1
    assert any("linear_cross_entropy" in str(node.target) for node in graphs[0].graph.nodes)


def test_targets_that_do_not_fit_say_why() -> None:
    tokens = documents()[0]
    for name in ("byte_lm", "blt", "megabyte"):
        model = build(name)
        with pytest.raises(ValueError, match=r"targets: expected shape that of tokens = \[76\], got \[75\]"):
            model(tokens, targets=tokens[1:])
        with pytest.raises(TypeError, match=r"targets: expected dtype in int64, got torch.int32"):
            model(tokens, targets=tokens.int())
        with pytest.raises(ValueError, match=r"targets: expected ids from 0 to 259"):
            model(tokens, targets=torch.full_like(tokens, 260))


@pytest.mark.parametrize("plain", [True, False])
def test_the_loss_holds_no_logits(plain: bool, memory: ModuleType) -> None:
    torch.manual_seed(0)
    head, count = matrices.linear(16, 260), 40_000
    if not plain:
        head.register_forward_hook(lambda *_: None)
    x, targets = torch.randn(count, 16, requires_grad=True), torch.randint(260, (count,))
    ops = build("byte_lm").ops
    held = memory.peak_extra_bytes(lambda: matrices.target_nats(ops, head, x, targets).sum().backward())
    assert held < 4 * 260 * count  # the logits in fp32


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("window", [1, 2, 7])
def test_layers_in_blocks_are_the_same(window: int, ops: str, short_blocks: list[int]) -> None:
    config = dataclasses.replace(BYTE_LM, window=window)
    torch.manual_seed(0)
    model = ByteLM(config, ops).double()
    tokens, rows = documents(LENGTHS)
    tokens = F.pad(tokens, (0, 3), value=7)  # three more belong to no row
    size = max(BLOCK, 8 * window)
    of_layer = [min(size, len(tokens) - i) for i in range(0, len(tokens), size)]

    set_recompute(model, False)
    expected = model(tokens, rows)
    wanted = gradients(model, model.loss(tokens, rows))
    assert not short_blocks
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, rows), expected, rtol=0, atol=1e-12)
    assert short_blocks == 2 * of_layer
    short_blocks.clear()
    set_recompute(model, True)
    loss = model.loss(tokens, rows)
    assert short_blocks == 2 * of_layer
    grads = gradients(model, loss)
    assert len(short_blocks) == 4 * len(of_layer)  # backward computes them again
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", slow_unless(CONFIGS, ["blt", "megabyte"]))
def test_models_in_blocks_are_the_same(name: str, short_blocks: list[int]) -> None:
    model, (tokens, rows) = build(name), documents(LENGTHS)
    set_recompute(model, False)
    with pytest.MonkeyPatch.context() as whole:
        whole.setattr(recompute, "BLOCK_ROWS", 10_000)
        options = {} if name[:3] != "blt" else {"layout": model.patch(tokens, rows)}
        expected = model.loss(tokens, rows, **options)
        wanted = gradients(model, expected)
    assert not short_blocks
    set_recompute(model, True)
    loss = model.loss(tokens, rows)  # the patches are found in blocks too
    assert bool(short_blocks) == (name != "megabyte_extended")  # its local layers read the patch before
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = gradients(model, loss)
    assert grads.keys() == wanted.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-10, atol=1e-12, msg=key)


def test_entropies_in_blocks_are_the_same(short_blocks: list[int]) -> None:
    model, (tokens, rows) = build("byte_lm"), documents(LENGTHS)
    tokens = F.pad(tokens, (0, 3), value=7)
    (entropy, layout) = model.patch(tokens, rows)
    with pytest.MonkeyPatch.context() as whole:
        whole.setattr(recompute, "BLOCK_ROWS", 10_000)
        expected, expected_layout = model.patch(tokens, rows)
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-12)
    assert entropy[-3:].tolist() == [0, 0, 0]
    assert layout.compact().patch_offsets.equal(expected_layout.compact().patch_offsets)


@pytest.mark.parametrize("first", range(0, 12))
def test_documents_within_positions(first: int) -> None:
    offsets = torch.tensor([0, 0, 3, 3, 4, 9, 9], dtype=torch.int32)
    for stop in range(first + 1, 13):
        own = recompute.documents_within(offsets, first, stop)
        assert own.dtype == torch.int32
        assert own[0] == 0
        of = [int((offsets <= first + i).sum()) for i in range(stop - first) if first + i < 9]
        inside = [int((own <= i).sum()) for i in range(stop - first) if i < own[-1]]
        assert len(of) == len(inside) == own[-1]
        assert [a == b for a, b in zip(of[1:], of, strict=False)] == [
            a == b for a, b in zip(inside[1:], inside, strict=False)
        ]


# --- what backward keeps ----------------------------------------------------------------------------------------------


def test_sizes_decide_what_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("byte_lm", dtype=torch.float32), documents()[0]
    layer = model.layers[0]
    calls: list[int] = []
    whole = TransformerLayer._layer
    monkeypatch.setattr(TransformerLayer, "_layer", lambda *inputs: (calls.append(1), whole(*inputs))[1])

    def count(limit: int, setting: bool | None = None) -> int:
        monkeypatch.setitem(recompute.KEPT_BYTES, "cpu", limit)
        set_recompute(model, setting)
        calls.clear()
        model.loss(tokens).backward()
        return len(calls)

    kept = 4 * layer.kept * len(tokens)
    assert layer.kept == 2 * (6 * 32 + 2 * 16 + 3 * 64)  # two layers with one key and value head of 16
    assert count(kept) == 2
    assert count(kept - 1) == 4
    assert count(kept, True) == 4
    assert count(0, False) == 2
    with torch.no_grad():
        calls.clear()
        model(tokens)
    assert len(calls) == 2


def test_torch_func_computes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("byte_lm"), documents()[0]
    used, targets = dict(model.named_parameters()), tokens.roll(-1)
    wanted = gradients(model, model(tokens, targets=targets).sum())
    monkeypatch.setitem(recompute.KEPT_BYTES, "cpu", 0)

    def nats(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, tokens, {"targets": targets}).sum()

    for name, grad in torch.func.grad(nats)(used).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-12, msg=name)


def test_the_estimate_is_what_a_stack_keeps() -> None:
    model = build("byte_lm", dtype=torch.float32)
    table, documents_ = torch.ones(4000, 1, 8, dtype=torch.complex64), torch.tensor([0, 4000], dtype=torch.int32)
    x = torch.randn(4000, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        if saved.shape[0] == len(x) and saved.is_floating_point():
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = x
        for layer in model.layers:
            out = layer(out, table, documents_)
    assert sum(kept.values()) == pytest.approx(4 * model.layers[0].kept * len(x), rel=0.05)


def test_memory_of_recomputed_layers(memory: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer keeps its input, and backward holds what one block of one layer needs."""
    config = dataclasses.replace(BYTE_LM, num_layers=4, ffn_dim=256, window=16)
    monkeypatch.setattr(recompute, "BLOCK_ROWS", 1024)
    torch.manual_seed(0)
    model, tokens = ByteLM(config), torch.randint(4, 260, (20_000,))
    step: Callable[[], None] = lambda: model.loss(tokens).backward()  # noqa: E731
    step()  # makes the gradients of the weights
    states = 4 * config.dim * len(tokens)
    set_recompute(model, False)
    assert memory.peak_extra_bytes(step) > 100 * states
    monkeypatch.setitem(recompute.KEPT_BYTES, "cpu", 0)
    set_recompute(model, None)
    assert memory.peak_extra_bytes(step) < 16 * states
    with torch.no_grad():
        assert memory.peak_extra_bytes(lambda: model.patch(tokens)) < 8 * states
