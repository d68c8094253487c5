"""block_causal_attention under autograd, autocast and torch.compile; the ranges that layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from blt_kernels import attention_ranges, block_causal_attention, static_patch
from blt_kernels.models.blt import BLT, LocalEncoder
from blt_kernels.models.byte_lm import ByteLM
from blt_kernels.models.config import BLTConfig, ByteLMConfig, MegaByteConfig
from blt_kernels.models.megabyte import MegaByte
from blt_kernels.nn import TransformerConfig, TransformerLayer, load_ops, rotary_table, row_positions
from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import offsets_of

pytestmark = pytest.mark.triton


def test_backward_against_autograd_of_the_reference(device: str) -> None:
    cu_q, cu_k = torch.tensor([0, 7, 7, 12], device=device), torch.tensor([0, 5, 6, 15], device=device)
    leaves = [randn(n, h, 3, seed=n, device=device).requires_grad_() for n, h in ((13, 4), (16, 2), (16, 2))]
    options = {"window": 4, "seqused_k": torch.tensor([5, 0, 8], device=device)}
    out = block_causal_attention(*leaves, cu_q, cu_k, **options)
    expected = reference.block_causal_attention_reference(*leaves, cu_q, cu_k, **options)
    grad = randn(13, 4, 3, seed=9, device=device)
    ours, theirs = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *x: block_causal_attention(*x, cu_q, cu_k, **options), leaves)


def test_lse_is_not_differentiable(device: str) -> None:
    q = torch.ones(3, 1, 4, device=device, requires_grad=True)
    for function in (block_causal_attention, reference.block_causal_attention_reference):
        out, lse = function(q, q, q, return_lse=True)
        assert out.requires_grad
        assert not lse.requires_grad


def test_autocast_is_that_of_torch_attention(device: str) -> None:
    q, k, v = (randn(2, 6, 2, 8, seed=i, device=device, dtype=torch.float32).requires_grad_() for i in range(3))
    grad = randn(2, 6, 2, 8, seed=3, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        out = block_causal_attention(q, k, v.bfloat16())
        assert out.dtype == F.scaled_dot_product_attention(q, k, v.bfloat16()).dtype == torch.bfloat16
        grads = torch.autograd.grad(out, (q, k, v), grad)
        double = block_causal_attention(q.double(), k.double(), v.double())
    assert all(g.dtype == torch.float32 for g in grads)
    assert torch.equal(out, block_causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert torch.equal(double, block_causal_attention(q.double(), k.double(), v.double()))


# --- compiled and traced ----------------------------------------------------------------------------------------------

CONFIG = TransformerConfig(32, 2, 2, num_kv_heads=1, ffn_dim=32, window=9)


class Encoder(nn.Module):
    """Runs the local encoder of BLT: two layers, pooling, and cross attention from patches to bytes."""

    def __init__(self) -> None:
        super().__init__()
        config = BLTConfig(CONFIG, CONFIG, CONFIG, patching="space", patcher=None, queries_per_patch=2)
        self.encoder = LocalEncoder(config, load_ops("fused"))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        layout = static_patch(cu_seqlens, 4, num_bytes=x.shape[0])
        table = rotary_table(row_positions(cu_seqlens, x.shape[0]), CONFIG, x.dtype)
        return torch.cat([y.flatten() for y in self.encoder(x, table, cu_seqlens, layout)])


@pytest.mark.slow
def test_an_encoder_compiles_once_for_all_lengths() -> None:
    """Forward and backward, without a break in the graph; a second compilation is an error."""
    torch.manual_seed(0)
    model = Encoder()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for again, lengths in enumerate(([20, 0, 17], [30, 1, 2, 8, 40])):
        x, cu_seqlens = randn(sum(lengths), 32, dtype=torch.float32).requires_grad_(), offsets_of(lengths)
        results = []
        with torch._dynamo.config.patch(error_on_recompile=bool(again)):
            for function in (compiled, model):
                out = function(x, cu_seqlens)
                results.append(
                    [out, *torch.autograd.grad(out.sin().sum(), (x, *model.parameters()), allow_unused=True)]
                )
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_tracing_for_cuda() -> None:
    """Fake tensors of a GPU, which need not be there, show shapes and dtypes of forward and backward."""
    with FakeTensorMode():
        q, k = (torch.empty(2, 9, heads, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        used = torch.empty(2, device="cuda", dtype=torch.int64)
        out, lse = block_causal_attention(q, k, k, window=5, seqused_k=used, return_lse=True)
        cu_seqlens = torch.empty(3, device="cuda", dtype=torch.int32)
        packed = [x.flatten(0, 1) for x in (out, q, k, k, out, lse)]
        backward = torch.ops.blt_kernels.block_causal_attention_bwd
        grads = backward(*packed, cu_seqlens, None, 5, True, None, used.int(), None, 2)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
    assert (lse.shape, lse.dtype) == (q.shape[:-1], torch.float32)
    assert all(g.shape == x.shape and g.dtype == x.dtype for g, x in zip(grads, packed[1:4], strict=True))


# --- ranges -----------------------------------------------------------------------------------------------------------


def attends(intervals: Tensor, rows: int, others: int) -> Tensor:
    """Return which of the others each row attends to, bool ``[rows, others]``; neither end of the intervals falls."""
    first, last = intervals.view(2, -1)
    assert bool((first.diff() >= 0).all() and (last.diff() >= 0).all())
    other = torch.arange(others)
    return ((other >= first[:rows, None]) & (other < last[:rows, None])).cpu()


@given(st.data())
def test_ranges_are_what_is_attended_to(data: st.DataObject) -> None:
    lengths = st.lists(st.integers(0, 6), min_size=1, max_size=4)
    queries = data.draw(lengths)
    keys = data.draw(st.none() | st.lists(st.integers(0, 6), min_size=len(queries), max_size=len(queries)))
    used = data.draw(st.none() | st.tuples(*(st.integers(0, n) for n in keys or queries)))
    beyond = data.draw(st.integers(0, 5))
    totals = [sum(n) + beyond for n in (queries, keys or queries)]
    offsets = (offsets_of(queries), None if keys is None else offsets_of(keys))
    options = {
        "window": data.draw(st.sampled_from([None, 1, 2, 5, 2**40])),
        "causal": data.draw(st.booleans()),
        "seqused_k": None if used is None else torch.tensor(used, dtype=torch.int32),
    }
    mask = reference.AttentionMask(*offsets, scale=None, **options)
    first, last = mask.keys_of_queries(*totals)
    key = torch.arange(totals[1])
    expected = (key >= first[:, None]) & (key < last[:, None])
    results = []
    for function in (attention_ranges, reference.attention_ranges_reference):
        ranges = function(*offsets, num_queries=totals[0], num_keys=totals[1], **options)
        of_queries, of_keys = ranges.intervals.split([-(-n // 4) * 8 for n in totals])
        assert torch.equal(attends(of_queries, *totals), expected)
        assert torch.equal(attends(of_keys, *totals[::-1]), expected.mT)
        results.append(ranges.intervals)
    assert torch.equal(*results)


def test_ranges_change_nothing(device: str) -> None:
    offsets = offsets_of([5, 0, 9], device=device)
    ranges = attention_ranges(offsets, num_queries=15, window=4)
    results = []
    for shared in (None, ranges):
        q, k, v = (randn(15, 2, 8, seed=seed, device=device).requires_grad_() for seed in range(3))
        out = block_causal_attention(q, k, v, offsets, window=4, ranges=shared)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)))
        results[-1] += torch.autograd.grad(results[-1][1].square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def calls_in_models(model: nn.Module, *arguments: Any) -> list[tuple[str, Any]]:
    """Return calls of attention's operators in a forward and backward pass on "meta": name, and `ranges`."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            name = func.name().removeprefix("blt_kernels::block_causal_attention_")
            result = func(*args, **(kwargs or {}))
            if name in ("fwd", "bwd", "ranges_fwd"):
                calls.append((name, result if name == "ranges_fwd" else args[-2]))
            return result

    with Recorder():
        model(*arguments).sum().backward()
    return calls


STACK = TransformerConfig(16, 3, 2, window=8)
MODELS = {  # (model, stacks that have ranges of their own)
    "ByteLM": (lambda: ByteLM(ByteLMConfig(dim=16, num_layers=3, num_heads=2, window=8)), 1),
    "BLT": (lambda: BLT(blt_config(STACK)), 2),
    "BLT, windows": (lambda: BLT(blt_config(TransformerConfig(16, 3, 2, window=5))), 3),
    "MegaByte": (lambda: MegaByte(MegaByteConfig(4, STACK, STACK)), 2),
    "MegaByte, cross-patch": (lambda: MegaByte(MegaByteConfig(4, STACK, STACK, cross_patch=2)), 2),
}


def blt_config(decoder: TransformerConfig) -> BLTConfig:
    return BLTConfig(
        encoder=STACK, decoder=decoder, global_transformer=TransformerConfig(16, 3, 2), ngram_vocab=64,
        patcher=None, patching="static", patch_size=4,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_finds_ranges_once_a_stack(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformerLayer, "recompute", recompute)
    make, stacks = MODELS[name]
    tokens = torch.randint(4, 260, (40,))
    calls = calls_in_models(make().to("meta"), tokens.to("meta"), offsets_of([13, 27]).to("meta"))
    made = [ranges for operator, ranges in calls if operator == "ranges_fwd"]
    given = [ranges for operator, ranges in calls if operator != "ranges_fwd"]
    assert len(made) == stacks
    assert len(given) >= 2 * 3 * stacks
    assert all(any(x is ranges for ranges in made) for x in given)
    assert not [ranges for _, ranges in calls_in_models(make(), tokens, offsets_of([13, 27])) if ranges is not None]


@pytest.mark.slow
def test_ranges_of_a_compiled_model() -> None:
    """One graph for two lengths, in which they are found once."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Sequence[Any]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(MODELS["ByteLM"][0]().to("meta"), backend=backend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([13, 27], [9, 33]):
            tokens = torch.zeros(sum(lengths), dtype=torch.int64, device="meta")
            compiled(tokens, offsets_of(lengths).to("meta")).sum().backward()
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1
    assert sum("block_causal_attention_ranges_fwd" in name for name in called) == 1
