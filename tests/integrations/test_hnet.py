"""H-Net with the ops under it, beside the same computed one row at a time.

The modules are stand-ins of the same names and signatures, in tests/stand_ins/hnet.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blt_kernels.integrations import hnet
from blt_kernels.testing import offsets_of

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (40, 1, 7, 63)
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def code_base(stand_ins: None) -> Callable[[str], ModuleType]:
    return lambda name: import_module(f"hnet.modules.{name}")


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    for x, y in zip(ours, theirs, strict=True):
        if isinstance(y, Tensor):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, check_dtype=y.is_floating_point())
        else:
            assert x == y


def marks_of(*shape: int, mean: float = 4.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 1 / mean


class Stage(nn.Module):
    """One stage of H-Net around any network over chunks."""

    def __init__(self, dc: ModuleType, width: int, network: nn.Module) -> None:
        super().__init__()
        self.routing_module, self.chunk_layer = dc.RoutingModule(width), dc.ChunkLayer()
        self.dechunk_layer, self.network = dc.DeChunkLayer(width), network

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        routed = self.routing_module(x, cu_seqlens=cu_seqlens, mask=mask)
        inner, cu_chunks, _, used = self.chunk_layer(x, routed.boundary_mask, cu_seqlens, mask=mask)
        inner = self.network(inner, cu_chunks, used) if isinstance(self.network, Stage) else self.network(inner)
        out = self.dechunk_layer(inner, routed.boundary_mask, routed.boundary_prob, cu_chunks, mask=mask)
        return out * routed.selected_probs + x


def two_stages(dc: ModuleType) -> Stage:
    torch.manual_seed(0)
    return Stage(dc, 32, Stage(dc, 32, nn.Sequential(nn.Linear(32, 32), nn.Tanh())))


def outputs(model: nn.Module, x: Tensor, **arguments: Any) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = model(leaf, **arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    if arguments.get("mask") is not None:
        grad, out = grad * arguments["mask"][..., None], out * arguments["mask"][..., None]
    return [out.detach(), *torch.autograd.grad(out, [leaf, *model.parameters()], grad)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_stages_over_packed_documents(code_base: Callable[[str], ModuleType], dtype: torch.dtype) -> None:
    """Outputs and gradients of the input, of both routers and of the innermost network."""
    model = two_stages(code_base("dc")).to(dtype)
    x, cu_seqlens = torch.randn(sum(LENGTHS), 32, dtype=dtype), offsets_of(list(LENGTHS))
    theirs = outputs(model, x, cu_seqlens=cu_seqlens)
    with hnet.apply(attention=False) as applied:
        close(outputs(model, x, cu_seqlens=cu_seqlens), theirs, TOLERANCES[dtype])
    assert applied.report().replaced == {"ChunkLayer.forward": 2, "DeChunkLayer.forward": 2}
    assert not applied.report().fell_back


def test_two_stages_over_padded_rows(code_base: Callable[[str], ModuleType]) -> None:
    """A padded row computes what it computes as a document."""
    model = two_stages(code_base("dc")).double()
    mask = torch.arange(50) < torch.tensor([50, 1, 17])[:, None]
    x = torch.randn(3, 50, 32, dtype=torch.float64) * mask[..., None]
    theirs = outputs(model, x, mask=mask)
    with hnet.apply(attention=False) as applied:
        close(outputs(model, x, mask=mask), theirs, 1e-7)
        packed = model(x[mask], cu_seqlens=torch.tensor([0, 50, 51, 68]))
        torch.testing.assert_close(model(x, mask=mask)[mask], packed)
    assert not applied.report().fell_back


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_chunks_and_averages(code_base: Callable[[str], ModuleType], dtype: torch.dtype) -> None:
    """The results of each layer alone; probabilities are fp32 where vectors are bf16."""
    dc, cu_seqlens = code_base("dc"), offsets_of(list(LENGTHS)).long()
    marks = marks_of(sum(LENGTHS))
    marks[cu_seqlens[:-1]] = True
    x = torch.randn(sum(LENGTHS), 64).to(dtype)
    p = torch.rand(sum(LENGTHS), dtype=torch.promote_types(dtype, torch.float32))
    p[cu_seqlens[:-1]] = 1
    layers = dc.ChunkLayer(), dc.DeChunkLayer(64)

    def results() -> list[Any]:
        leaves = x.clone().requires_grad_(), p.clone().requires_grad_()
        chunks, cu_chunks, longest, mask = layers[0](leaves[0], marks, cu_seqlens)
        out = layers[1](chunks, marks, torch.stack([1 - leaves[1], leaves[1]], -1), cu_chunks)
        return [chunks, cu_chunks, longest, mask, out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    theirs = results()
    with hnet.apply():
        close(results(), theirs, TOLERANCES[dtype])
    chunks, layout = hnet.chunk(x, marks, cu_seqlens)
    close([chunks, layout.cu_patches, hnet.dechunk(chunks, p, layout)], [*theirs[:2], theirs[4]], TOLERANCES[dtype])


@pytest.mark.parametrize("lengths", [(0,), (0, 5), (5, 0, 0, 3), (1, 1), ()])
def test_empty_documents(code_base: Callable[[str], ModuleType], lengths: tuple[int, ...]) -> None:
    """Empty documents have no chunks; H-Net itself raises for some of them."""
    total, cu_seqlens = sum(lengths), offsets_of(list(lengths))
    marks = marks_of(total, mean=2)
    marks[[begin for begin in cu_seqlens[:-1].tolist() if begin < total]] = True
    x, p = torch.randn(total, 32, dtype=torch.float64), torch.rand(total, dtype=torch.float64)
    chunks, layout = hnet.chunk(x, marks, cu_seqlens)
    assert torch.equal(chunks, x[marks])
    out = hnet.dechunk(chunks, p, layout)
    assert out.shape == x.shape
    if total:
        both = torch.stack([1 - p, p], -1)
        expected = code_base("dc").DeChunkLayer(32)(chunks, marks, both, layout.cu_patches)
        torch.testing.assert_close(out, expected)
    with hnet.apply():
        if lengths:
            own, cu_chunks, longest, _ = code_base("dc").ChunkLayer()(x, marks, cu_seqlens)
            assert torch.equal(own, chunks)
            assert longest == int(cu_chunks.diff().max())
            again = code_base("dc").DeChunkLayer(32)(own, marks, torch.stack([1 - p, p], -1), cu_chunks)
            assert torch.equal(again, out)


def test_prefill_keeps_the_last_average(code_base: Callable[[str], ModuleType]) -> None:
    dc = code_base("dc")
    marks, mask = marks_of(2, 30), torch.arange(30) < torch.tensor([30, 12])[:, None]
    marks[:, 0] = True
    marks &= mask
    p = torch.rand(2, 30, 2, dtype=torch.float64)
    chunks, _, _, used = dc.ChunkLayer()(torch.randn(2, 30, 32, dtype=torch.float64), marks, mask=mask)
    layer = dc.DeChunkLayer(32)

    def results() -> list[Tensor]:
        state = dc.DeChunkState(torch.zeros(2, 32, dtype=torch.float64))
        return [layer(chunks, marks, p, inference_params=state, mask=mask), state.last_value]

    theirs = results()
    with hnet.apply() as applied:
        close(results(), theirs, 1e-7)
        assert torch.equal(dc.ChunkLayer()(torch.zeros(2, 30, 4), marks, mask=mask)[3], used)
    assert not applied.report().fell_back


def test_what_is_left_to_hnet(code_base: Callable[[str], ModuleType]) -> None:
    """H-Net's assertions still raise, and it computes rows without a chunk itself."""
    dc = code_base("dc")
    x, nothing, state = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool), dc.DeChunkState(torch.zeros(2, 32))
    chunk, dechunk, p = dc.ChunkLayer(), dc.DeChunkLayer(32), torch.rand(2, 5, 2)
    with hnet.apply() as applied:
        with pytest.raises(AssertionError):
            chunk(x, nothing)
        assert chunk(x, nothing, mask=nothing)[0].shape == (2, 0, 32)
        with pytest.raises(AssertionError, match="Mask must be provided"):
            dechunk(x, ~nothing, p, inference_params=state)
        with pytest.raises(AssertionError, match="First token"):
            dechunk(x, nothing, p, inference_params=state, mask=~nothing)
    prefill = "prefill of rows that do not start with a boundary, or without a mask"
    assert applied.report().fell_back == {
        ("ChunkLayer.forward", "neither documents nor a mask"): 1,
        ("ChunkLayer.forward", "rows without a chunk"): 1,
        ("DeChunkLayer.forward", prefill): 2,
    }


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [-1, 0, 1, 5, 1000, (-1, -1), (3, -1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(code_base: Callable[[str], ModuleType], window: int | tuple[int, int], scale: float | None) -> None:
    """Self-attention of rows and documents, and cross attention to longer keys of fewer heads."""
    mha = code_base("mha")
    own = mha.FlashCausalSelfAttention(softmax_scale=scale, window_size=window)
    other = mha.FlashCausalCrossAttention(softmax_scale=scale, window_size=window)
    queries, keys = offsets_of([9, 1, 20]), offsets_of([12, 4, 20])
    tensors = [
        torch.randn(shape, dtype=torch.float64).requires_grad_()
        for shape in ((2, 30, 3, 4, 32), (30, 3, 4, 32), (2, 7, 4, 32), (2, 19, 2, 2, 32), (30, 4, 32), (36, 2, 2, 32))
    ]

    def results() -> list[Tensor]:
        rows, packed, q, kv, q_packed, kv_packed = tensors
        outs = [
            own(rows),
            own(packed, cu_seqlens=queries, max_seqlen=20),
            other(q, kv),
            other(q_packed, kv_packed, cu_seqlens=queries, max_seqlen=20, cu_seqlens_k=keys, max_seqlen_k=20),
        ]
        return [*outs, *torch.autograd.grad(sum(out.sin().sum() for out in outs), tensors)]

    theirs = results()
    with hnet.apply(chunking=False) as applied:
        close(results(), theirs, 1e-9)
    assert applied.report().replaced == {"FlashCausalSelfAttention.forward": 2, "FlashCausalCrossAttention.forward": 2}


# --- apply ------------------------------------------------------------------------------------------------------------


def test_one_model_apply_twice_and_undo(code_base: Callable[[str], ModuleType]) -> None:
    dc = code_base("dc")
    model, other, x = two_stages(dc), two_stages(dc), torch.randn(30, 32)
    cu_seqlens, stock = torch.tensor([0, 30]), dc.ChunkLayer.forward
    before = model(x, cu_seqlens=cu_seqlens)
    first = hnet.apply(model)
    model(x, cu_seqlens=cu_seqlens)
    other(x, cu_seqlens=cu_seqlens)
    assert first.report().replaced["ChunkLayer.forward"] == 2
    with hnet.apply() as everywhere, hnet.apply(model) as second:
        model(x, cu_seqlens=cu_seqlens)
        other(x, cu_seqlens=cu_seqlens)
    assert second.report().replaced["DeChunkLayer.forward"] == 2
    assert everywhere.report().replaced["DeChunkLayer.forward"] == 2
    first.undo()
    assert dc.ChunkLayer.forward is stock
    assert torch.equal(model(x, cu_seqlens=cu_seqlens), before)
    assert set(everywhere.report().replaced) == set(hnet.REPLACES)


def test_copies_stay_changed_and_pickles_are_the_code_bases_own(code_base: Callable[[str], ModuleType]) -> None:
    model, x, cu_seqlens, stored = two_stages(code_base("dc")), torch.randn(30, 32), torch.tensor([0, 30]), io.BytesIO()
    with hnet.apply(model) as applied:
        copied = copy.deepcopy(model)
        torch.save(model, stored)
    expected = model(x, cu_seqlens=cu_seqlens)
    assert not applied.report().replaced["ChunkLayer.forward"]
    close([copied(x, cu_seqlens=cu_seqlens)], [expected], 1e-5)
    assert applied.report().replaced["ChunkLayer.forward"] == 2
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert torch.equal(loaded(x, cu_seqlens=cu_seqlens), expected)
    with hnet.apply() as everywhere, hnet.apply(loaded) as one:
        loaded(x, cu_seqlens=cu_seqlens)
    assert everywhere.report().replaced["ChunkLayer.forward"] == 0
    assert one.report().replaced["ChunkLayer.forward"] == 2


def test_wrong_models_and_signatures(code_base: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"model: expected a layer of hnet\.modules\.dc or hnet\.modules\.mha in it, got Lin"
    ):
        hnet.apply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module or None, got 'x'"):
        hnet.apply("x")
    with pytest.raises(TypeError, match=r"attention: expected True or False, got 'yes'"):
        hnet.apply(attention="yes")
    with pytest.raises(ValueError, match=r"attention, chunking: expected one of them to be True"):
        hnet.apply(attention=False, chunking=False)
    monkeypatch.setattr(code_base("dc").ChunkLayer, "forward", lambda self, hidden_states, marks: None)
    with pytest.raises(TypeError, match=r"of hnet unknown: expected parameters \(self, hidden_states, boundary_mask"):
        hnet.apply()


@pytest.mark.skipif(find_spec("hnet") is not None, reason="hnet is installed")
def test_without_hnet() -> None:
    with pytest.raises(ModuleNotFoundError, match="hnet"):
        hnet.apply()


def test_the_page(stand_ins: None) -> None:
    examples = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "integrations" / "hnet.md").read_text(), flags=re.DOTALL)
    (example,) = [example for example in examples if "integrations import hnet" in example]
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["applied"].report().replaced == dict.fromkeys(hnet.REPLACES, 0)
    names["applied"].undo()


def test_errors_of_tensors() -> None:
    vectors, probability = torch.randn(20, 8), torch.rand(20)
    marks = probability > 0.5
    chunks, layout = hnet.chunk(vectors, marks)
    for kind, match, call in (
        (TypeError, "hidden_states: expected dtype", lambda: hnet.chunk(vectors.long(), marks)),
        (ValueError, r"hidden_states: .*got shape \[20\]", lambda: hnet.chunk(probability, marks)),
        (
            TypeError,
            "boundary_mask: expected dtype in bool, got torch.float32",
            lambda: hnet.chunk(vectors, probability),
        ),
        (ValueError, r"boundary_mask: expected shape .*\[20\], got \[5\]", lambda: hnet.chunk(vectors, marks[:5])),
        (ValueError, r"chunks: expected shape \[P, D\] of layout", lambda: hnet.dechunk(vectors, probability, layout)),
        (TypeError, "layout: expected a PatchLayout", lambda: hnet.dechunk(chunks, probability, None)),
        (TypeError, "boundary_prob: expected dtype", lambda: hnet.dechunk(chunks, marks, layout)),
        (ValueError, "boundary_prob: expected the 20 bytes", lambda: hnet.dechunk(chunks, probability[:5], layout)),
    ):
        with pytest.raises(kind, match=match):
            call()


def test_chunks_without_columns() -> None:
    chunks, layout = hnet.chunk(torch.ones(4, 0), torch.tensor([True, False, True, False]))
    assert hnet.dechunk(chunks, torch.full((4,), 0.5), layout).shape == (4, 0)
