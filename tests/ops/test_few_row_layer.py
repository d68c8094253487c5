"""few_row_layer: its accuracy, its bits, the cache, wrong arguments, and which layers run on the kernel."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import inputs
import pytest
import torch
from op_calls import has_cpu_kernel
from torch import Tensor, nn

import blt_kernels as bk
from blt_kernels._checks import Documents
from blt_kernels.nn import TransformerConfig, TransformerLayer, few_rows, load_ops, rotary_table, run_layers
from blt_kernels.nn.cache import CachedKeys
from blt_kernels.nn.matrices import Linear, QuantizedLinear, RMSNorm
from blt_kernels.ops import few_row_layer as op
from blt_kernels.ops.few_row_layer import MAX_ROWS
from blt_kernels.reference.few_row_layer import few_row_layer_reference, few_row_layer_step_reference
from blt_kernels.testing import assert_equal

OVERLOAD = torch.ops.blt_kernels.few_row_layer_step.default
COMPILED = pytest.mark.skipif(not has_cpu_kernel(OVERLOAD), reason="no compiled module")
CONFIG = TransformerConfig(dim=48, num_layers=1, num_heads=6, num_kv_heads=2, ffn_dim=77)
SLOTS, LENGTHS = 40, (5, 12, 1, 20)  # documents have so many keys; two slots belong to none


@dataclass(frozen=True)
class Call:
    """Has the arguments of `few_row_layer`, in order."""

    x: Tensor
    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    input_norm: Tensor
    post_norm: Tensor
    eps: float
    table: Tensor
    keys: Tensor
    values: Tensor
    index: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    window: int | None

    def run(self, function: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, and the keys and values after the call."""
        cache = self.keys.clone(), self.values.clone()
        arguments = vars(self) | dict(zip(("keys", "values"), cache, strict=True))
        return function(*arguments.values()), *cache

    def in_fp64(self) -> Call:
        """Return the same call with matrices that hold the values of these, without scales."""
        scales = self.scales or [torch.ones(len(w)) for w in self.weights]
        weights = tuple(w.double() * s.double()[:, None] for w, s in zip(self.weights, scales, strict=True))
        changes: dict[str, Any] = {
            name: value.double()
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.dtype == torch.float32
        }
        return replace(self, **changes, weights=weights, scales=(), table=self.table.to(torch.complex128))


def operator_arguments(
    x: Tensor, weights: Any, scales: Any, input_norm: Tensor, post_norm: Tensor, eps: float, table: Tensor,
    keys: Tensor, values: Tensor, *documents: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the arguments of the operator for those of `few_row_layer`."""
    return (
        x,
        weights,
        scales,
        (input_norm, post_norm),
        eps,
        table,
        (keys,),
        (values,),
        *documents,
        (),
        (),
        None,
        None,
        None,
    )


def few_row_layer_step(*arguments: Any) -> Tensor:
    return op.few_row_layer_step(*operator_arguments(*arguments))


def make(counts: tuple[int, ...], window: int | None = None, dtype: torch.dtype = torch.float32) -> Call:
    """Return a call with `counts` new entries at the end of each document of LENGTHS."""
    torch.manual_seed(0)
    total, E, G = sum(counts), CONFIG.head_dim, CONFIG.kv_heads
    sizes = ((48, 48), (G * E, 48), (G * E, 48), (48, 48), (77, 48), (77, 48), (48, 77))
    matrices = [nn.Linear(k, n, bias=False) for n, k in sizes]
    scales: tuple[Tensor, ...] = ()
    if dtype != torch.float32:
        quantized = [QuantizedLinear(matrix, dtype) for matrix in matrices]
        weights = tuple(q.weight for q in quantized)
        scales = tuple(q.scale for q in quantized if q.scale is not None)
    else:
        weights = tuple(matrix.weight.detach() for matrix in matrices)
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    slots = [end - count + i for end, count in zip(ends, counts, strict=True) for i in range(count)]
    positions = [n - count + i for n, count in zip(LENGTHS, counts, strict=True) for i in range(count)]
    return Call(
        inputs.random_normal(total, 48, dtype=torch.float32, seed=1),
        weights,
        scales,
        *(1 + 0.1 * torch.randn(48) for _ in range(2)),
        1e-5,
        rotary_table(torch.tensor(positions, dtype=torch.int64), CONFIG, torch.float32),
        *(inputs.random_normal(SLOTS, G, E, dtype=torch.float32, seed=s) for s in (2, 3)),
        torch.tensor(slots, dtype=torch.int64),
        *(torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (counts, LENGTHS)),
        window,
    )


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("counts", [(1, 0, 0, 0), (1, 1, 1, 1), (3, 2, 1, 8), (5, 12, 1, 20), (0, 0, 0, 0)])
def test_equals_the_reference_in_fp64(counts: tuple[int, ...], dtype: torch.dtype, window: int | None) -> None:
    call = make(counts, window, dtype)
    truth = call.in_fp64().run(few_row_layer_reference)
    for function in (few_row_layer_step, bk.few_row_layer):
        for actual, expected in zip(call.run(function), truth, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def stack(counts: tuple[int, ...], dtype: torch.dtype = torch.float32, crosses: int = 2) -> tuple[Any, ...]:
    """Return the operator's arguments for three layers, the first `crosses` of which read patches of three vectors.

    There is a head if `crosses` is odd.
    """
    layer, total = make(counts, 7, dtype), sum(counts)
    torch.manual_seed(1)
    vectors = [
        [inputs.random_normal(6, 3, 2, 12, dtype=torch.float32, seed=s + i) for i in range(crosses)] for s in (4, 7)
    ]
    weights: list[Tensor] = []
    scales: list[Tensor] = []
    norms: list[Tensor] = []
    for i in range(3):
        if i < crosses:
            for n, k in ((96, 48), (48, 96)):
                matrix = nn.Linear(k, n, bias=False)
                stored = matrix if dtype == torch.float32 else QuantizedLinear(matrix, dtype)
                weights.append(stored.weight.detach())
                scales += [] if dtype != torch.int8 else [stored.scale]  # type: ignore[list-item]
            norms.append(1 + 0.1 * torch.randn(48))
        own = [w.roll(i, 1) for w in layer.weights]
        weights += own
        scales += layer.scales
        norms += [layer.input_norm, layer.post_norm]
    caches = ([cache.roll(i, 0).clone() for i in range(3)] for cache in (layer.keys, layer.values))
    documents = layer.index, layer.cu_seqlens_q, layer.cu_seqlens_k, layer.window
    head = (1 + 0.1 * torch.randn(48), 0.1 * torch.randn(29, 48)) if crosses % 2 else (None, None)
    patches = torch.tensor([4, -1, 0, 5, 2, 2, 3, -1] * 5, dtype=torch.int32)[:total]
    return layer.x, weights, scales, norms, layer.eps, layer.table, *caches, *documents, *vectors, patches, *head


def in_fp64(x: Any) -> Any:
    if isinstance(x, list):
        return [in_fp64(y) for y in x]
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


@pytest.mark.parametrize("crosses", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("counts", [(1, 0, 0, 0), (3, 2, 1, 8), (0, 0, 0, 0)])
def test_a_stack_with_cross_attention_equals_the_reference_in_fp64(
    counts: tuple[int, ...], dtype: torch.dtype, crosses: int
) -> None:
    arguments = stack(counts, dtype, crosses)
    exact = list(in_fp64(list(arguments)))
    if dtype == torch.int8:
        exact[1] = [w.double() * s.double()[:, None] for w, s in zip(arguments[1], arguments[2], strict=True)]
    exact[2] = []
    expected = few_row_layer_step_reference(*exact)
    actual = op.few_row_layer_step(*arguments)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5)
    for cache, other in zip((*arguments[6], *arguments[7]), (*exact[6], *exact[7]), strict=True):
        torch.testing.assert_close(cache.double(), other, rtol=1e-5, atol=2e-5)


@COMPILED
def test_a_stack_is_its_layers_one_after_another() -> None:
    """The results are the same bits, for any number of threads."""
    x, weights, _scales, norms, eps, table, keys, values, *documents = stack((3, 2, 1, 8), crosses=0)[:12]
    caches = [y.clone() for y in keys], [y.clone() for y in values]
    expected = x
    for i, cache in enumerate(zip(*caches, strict=True)):
        own = weights[7 * i : 7 * i + 7], (), *norms[2 * i : 2 * i + 2]
        expected = few_row_layer_step(expected, *own, eps, table, *cache, *documents)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(op.few_row_layer_step(*stack((3, 2, 1, 8), crosses=0)), expected)


@COMPILED
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hostile_patches_reach_their_readers_alone(value: float) -> None:
    arguments = stack((1, 1, 1, 1), crosses=1)
    expected = op.few_row_layer_step(*arguments)
    arguments = stack((1, 1, 1, 1), crosses=1)
    arguments[12][0][4] = value
    actual = op.few_row_layer_step(*arguments)
    assert torch.equal(actual[1:], expected[1:])
    assert actual[0].isnan().all()


@COMPILED
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, [], "weights: expected 25, got 0"),
        (3, [], "norms: expected 8, got 0"),
        (6, [], "weights: expected 4, got 25"),
        (7, [], "values: expected 3, got 0"),
        (12, [torch.ones(6, 3, 2, 12)] * 4, "weights: expected 29, got 25"),
        (12, [torch.ones(6, 3, 2, 12)] * 2, ""),
        (12, [torch.ones(6, 3, 2, 11)] * 2, "patch_values: expected size 11"),
        (12, [torch.ones(6, 3, 24)] * 2, "patch_keys: expected 4 dim"),
        (12, [torch.ones(6, 3, 12, 2).transpose(2, 3)] * 2, "patch_keys: expected contiguous entries"),
        (13, [torch.ones(6, 3, 2, 12)], "patch_values: expected 2, got 1"),
        (14, None, "patches: expected a tensor"),
        (14, torch.tensor([0, 1, 2, 6], dtype=torch.int32), "patches: expected values below 6, got 6"),
        (14, torch.tensor([0, 1, 2], dtype=torch.int32), "patches: expected size 4"),
        (15, torch.ones(48), "head: expected one with head_norm"),
        (16, torch.ones(9, 48), "head: expected one with head_norm"),
    ],
)
def test_a_stack_names_wrong_arguments(place: int, value: Any, message: str) -> None:
    arguments = list(stack((1, 1, 1, 1)))
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message) if message else nullcontext():
        op.few_row_layer_step(*arguments)


@COMPILED
def test_bits_of_a_document_depend_neither_on_others_nor_on_threads() -> None:
    call = make((1, 1, 1, 1))
    outputs, *_ = call.run(few_row_layer_step)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for row in range(4):
            counts = torch.zeros(4, dtype=torch.int64).index_fill_(0, torch.tensor(row), 1)
            alone = replace(
                call,
                **{name: getattr(call, name)[row : row + 1] for name in ("x", "table", "index")},
                cu_seqlens_q=torch.tensor([0, *counts.cumsum(0).tolist()], dtype=torch.int32),
            )
            assert torch.equal(alone.run(few_row_layer_step)[0], outputs[row : row + 1])


def test_nothing_but_the_new_entries_of_the_cache_changes() -> None:
    call = make((3, 0, 1, 2))
    _, *caches = call.run(few_row_layer_step)
    others = torch.ones(SLOTS, dtype=torch.bool).index_fill_(0, call.index, False)
    for before, after in zip((call.keys, call.values), caches, strict=True):
        assert torch.equal(before[others], after[others])
        assert (before != after)[call.index].any(-1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_hostile_values_stay_in_their_document(value: float) -> None:
    call = make((2, 2, 1, 1))
    expected = call.run(few_row_layer_step)[0]
    call.x[2, 5] = value
    actual = call.run(few_row_layer_step)[0]
    assert torch.equal(actual[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])
    assert actual[2:4].isnan().all()


def test_strides() -> None:
    call = make((2, 2, 1, 1))
    expected = call.run(few_row_layer_step)[0]
    room = torch.full((6, 100), torch.nan)
    room[:, 20:68] = call.x
    slots = torch.zeros(SLOTS, 3, *call.keys.shape[1:])
    slots[:, 0], slots[:, 2] = call.keys, call.values
    columns = tuple(weight.t().contiguous().t() for weight in call.weights)
    strided = replace(call, x=room[:, 20:68], weights=columns)
    arguments = vars(strided) | {"keys": slots[:, 0], "values": slots[:, 2]}
    assert torch.equal(few_row_layer_step(*arguments.values()), expected)
    assert not slots[:, 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    call = make((2, 2, 1, 1))
    half = {
        name: value.to(dtype)
        for name, value in vars(call).items()
        if isinstance(value, Tensor) and value.dtype == torch.float32
    }
    rounded = replace(call, **half, weights=tuple(weight.to(dtype) for weight in call.weights))
    for actual, expected in zip(rounded.run(bk.few_row_layer), call.run(bk.few_row_layer), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


def test_autocast() -> None:
    call = make((2, 2, 1, 1))
    expected = call.run(bk.few_row_layer)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, exact in zip(call.run(bk.few_row_layer), expected, strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, exact, rtol=0.05, atol=0.05)


def test_any_strides_of_the_cache_and_a_table_of_fp64() -> None:
    call = make((2, 2, 1, 1))
    expected, *cache = call.run(bk.few_row_layer)
    keys, values = (x.clone().transpose(0, 2).contiguous().transpose(0, 2) for x in (call.keys, call.values))
    changed = vars(call) | {"keys": keys, "values": values, "table": call.table.to(torch.complex128)}
    torch.testing.assert_close(bk.few_row_layer(*changed.values()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((keys, values), tuple(cache), rtol=1e-5, atol=1e-5)


def test_a_conjugated_table() -> None:
    call = make((1, 1, 0, 2))
    for table in (call.table, call.table.to(torch.complex128)):
        expected = replace(call, table=table.conj().resolve_conj()).run(bk.few_row_layer)
        assert_equal(replace(call, table=table.conj()).run(bk.few_row_layer), expected)


def test_opcheck() -> None:
    for call in (make((1, 1, 0, 2)), make((1, 1, 0, 2), 3, torch.int8)):
        torch.library.opcheck(OVERLOAD, operator_arguments(*vars(call).values()))
    for dtype, crosses in ((torch.float32, 2), (torch.int8, 3)):
        torch.library.opcheck(OVERLOAD, stack((1, 1, 0, 2), dtype, crosses))


@COMPILED
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.tensor([0, 40, 2, 3])}, "index: expected values from 0 to 39, got 40"),
        ({"index": torch.tensor([0, 1, 2, -1])}, "index: expected values from 0 to 39, got -1"),
        ({"index": torch.tensor([0, 1, 2])}, "index: expected size 4"),
        ({"x": torch.ones(4, 47)}, "weights: expected size 47"),
        ({"x": torch.ones(4, 48).double()}, "x: expected dtype Float"),
        ({"weights": ()}, "weights: expected 7, got 0"),
        ({"scales": (torch.ones(48),)}, "scales: expected 7, got 1"),
        ({"table": torch.ones(4, 1, 3) + 0j}, "table: expected size 4"),
        ({"keys": torch.ones(40, 2, 7)}, "keys: expected heads of even width, got 7"),
        ({"values": torch.ones(39, 2, 8)}, "values: expected size 40"),
        ({"post_norm": torch.ones(47)}, "norms: expected size 48"),
        ({"cu_seqlens_q": torch.tensor([0, 9, 9, 9, 9], dtype=torch.int32)}, "cu_seqlens_q"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 17, 18, 99], dtype=torch.int32)}, "cu_seqlens_k"),
        ({"window": 0}, "window: expected a value >= 1"),
    ],
)
def test_the_operator_names_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        replace(make((1, 1, 1, 1)), **changes).run(few_row_layer_step)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(4, 48, 1)}, ValueError, "x: expected 2 dimensions"),
        ({"weights": ()}, ValueError, "weights: expected 7, of q, k, v"),
        ({"scales": (torch.ones(48),)}, ValueError, "scales: expected 0 or 7, of"),
        ({"keys": torch.ones(40, 2, 8).double()}, TypeError, "keys: expected dtype"),
        ({"values": torch.ones(39, 2, 8)}, ValueError, "values: expected shape"),
        ({"input_norm": torch.ones(47)}, ValueError, "input_norm: expected shape"),
        ({"table": torch.ones(4, 1, 4)}, TypeError, "table: expected dtype"),
        ({"index": torch.tensor([0, 1, 2, 3], dtype=torch.int32)}, TypeError, "index: expected dtype"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 2, 4])}, ValueError, "cu_seqlens_q"),
        ({"window": -1}, ValueError, "window: expected a value >= 1"),
        ({"eps": "small"}, TypeError, "eps: expected a number"),
        ({"table": torch.ones(4, 1, 4, device="meta") + 0j}, ValueError, "table: expected device cpu"),
        ({"index": torch.arange(4, device="meta")}, ValueError, "index: expected device cpu"),
        ({"cu_seqlens_q": torch.tensor([0, 4])}, ValueError, "cu_seqlens_k: expected shape"),
        ({"keys": torch.ones(40, 4, 8), "values": torch.ones(40, 4, 8)}, ValueError, "weights of k: expected shape"),
    ],
)
def test_the_function_names_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(make((1, 1, 1, 1)), **changes).run(bk.few_row_layer)


@pytest.mark.slow
def test_a_compiled_call_agrees() -> None:
    """The default backend of torch.compile composes the layer of torch's functions."""
    torch._dynamo.reset()
    for call in (make((3, 2, 1, 8)), make((1, 1, 1, 1), dtype=torch.int8)):
        for actual, expected in zip(call.run(torch.compile(bk.few_row_layer)), call.run(bk.few_row_layer), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- which layers run on the kernel -----------------------------------------------------------------------------------


def calls_kernel(layer: nn.Module, rows: int = 2, dtype: torch.dtype = torch.float32, ops: str = "fused") -> bool:
    offsets = torch.tensor([0, rows], dtype=torch.int32)
    cu_seqlens = load_ops(ops).offsets(Documents(offsets, rows, rows))
    cache = (torch.zeros(rows, CONFIG.kv_heads, CONFIG.head_dim, dtype=dtype) for _ in range(2))
    documents = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    both = (offsets, offsets) if ops == "fused" else None
    keys = CachedKeys(*cache, torch.arange(rows), documents, both)
    table = rotary_table(torch.arange(rows), CONFIG, dtype)
    with mock.patch.object(few_rows, "few_row_layer_step", wraps=op.few_row_layer_step) as step:
        run_layers((layer,), inputs.random_normal(rows, 48, dtype=dtype, seed=1), table, [keys])
    return step.called


def test_few_cached_rows_without_gradients_run_on_the_kernel() -> None:
    layer = TransformerLayer(CONFIG, load_ops("fused"))
    with torch.no_grad():
        assert calls_kernel(layer)
        assert calls_kernel(layer, MAX_ROWS)
        assert not calls_kernel(layer, MAX_ROWS + 1)
        assert not calls_kernel(TransformerLayer(CONFIG, load_ops("reference")), ops="reference")
        assert not calls_kernel(TransformerLayer(CONFIG, load_ops("fused")).double(), dtype=torch.float64)
        assert not calls_kernel(TransformerLayer(CONFIG, load_ops("fused")).bfloat16(), dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert not calls_kernel(layer)
    assert not calls_kernel(TransformerLayer(CONFIG, load_ops("fused")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_quantized_matrices_run_on_the_kernel_if_all_are(dtype: torch.dtype) -> None:
    layer = TransformerLayer(CONFIG, load_ops("fused"))
    for count, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
        module = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        setattr(module, name, QuantizedLinear(getattr(module, name), dtype))
        with torch.no_grad():
            assert calls_kernel(layer) == (count == 6)


def test_what_was_put_into_a_layer_runs() -> None:
    seen: list[str] = []

    class Doubled(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def change(layer: TransformerLayer, part: str) -> None:
        layer.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))

    for part in ("self_attn", "mlp", "input_layernorm", "self_attn.k_proj", "mlp.down_proj"):
        layer = TransformerLayer(CONFIG, load_ops("fused"))
        change(layer, part)
        with torch.no_grad():
            assert not calls_kernel(layer)
        assert seen.pop() == part
    layer = TransformerLayer(CONFIG, load_ops("fused"))
    layer.self_attn.v_proj = Doubled(48, 16, bias=False)
    with torch.no_grad():
        assert not calls_kernel(layer)


def cast_in_place(layer: TransformerLayer) -> None:
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data.double()


def make_parametrized(layer: TransformerLayer) -> None:
    nn.utils.parametrize.register_parametrization(layer.self_attn.q_proj, "weight", nn.Identity())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.mlp.up_proj.register_forward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer.self_attn, "o_proj", nn.Linear(48, 48, bias=False)),
        lambda layer: setattr(layer.self_attn, "forward", layer.self_attn.forward),
        lambda layer: setattr(layer.self_attn.o_proj, "bias", nn.Parameter(torch.ones(48))),
        lambda layer: setattr(layer.input_layernorm, "eps", 0.5),
        lambda layer: setattr(layer.mlp.gate_proj, "__class__", nn.Linear),
        cast_in_place,
        make_parametrized,
    ],
)
def test_what_is_put_into_a_layer_after_a_call_runs(change: Callable[[TransformerLayer], None]) -> None:
    layer = TransformerLayer(CONFIG, load_ops("fused"))
    with torch.no_grad():
        assert calls_kernel(layer)
        change(layer)
        with mock.patch.object(TransformerLayer, "forward", side_effect=lambda x, *_: x) as forward:
            assert not calls_kernel(layer)
        assert forward.called


def test_a_head_of_another_class_follows_the_kernel() -> None:
    torch.manual_seed(0)
    layer, norm, head = TransformerLayer(CONFIG, load_ops("fused")), RMSNorm(48, 1e-5), Linear(48, 9, bias=False)
    with torch.no_grad():
        expected, called = run_head(layer, norm, head)
        assert called == 1
        hooked = Linear(48, 9, bias=False)
        hooked.weight = head.weight
        hooked.register_forward_hook(lambda _module, _inputs, out: 2 * out)
        actual, called = run_head(layer, norm, hooked)
        assert called == 1
        torch.testing.assert_close(actual, 2 * expected, rtol=1e-5, atol=1e-5)


def run_head(layer: nn.Module, *head: nn.Module) -> tuple[Tensor, int]:
    x, offsets = inputs.random_normal(2, 48, dtype=torch.float32, seed=1), torch.tensor([0, 2], dtype=torch.int32)
    cache = torch.zeros(2, 2, 8), torch.zeros(2, 2, 8), torch.arange(2)
    documents = Documents(offsets, 2, 2)
    keys = CachedKeys(*cache, {"cu_seqlens_q": documents, "cu_seqlens_k": documents}, (offsets, offsets))
    table = rotary_table(torch.arange(2), CONFIG, torch.float32)
    with mock.patch.object(few_rows, "few_row_layer_step", wraps=op.few_row_layer_step) as step:
        return run_layers((layer,), x, table, [keys], head=head), step.call_count


def test_a_weight_that_was_replaced_after_a_call_is_used() -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(CONFIG, load_ops("fused"))
    with torch.no_grad():
        assert calls_kernel(layer)
        layer.mlp.down_proj.weight = nn.Parameter(torch.zeros(48, 77))
        assert calls_kernel(layer)
        stack = few_rows._KNOWN[layer]
    assert stack.weights[6] is layer.mlp.down_proj.weight


def test_what_is_known_of_layers_goes_with_them() -> None:
    layer = TransformerLayer(CONFIG, load_ops("fused"))
    with torch.no_grad():
        assert calls_kernel(layer)
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None


def change_forward(layer: TransformerLayer) -> None:
    layer.mlp.up_proj.forward = lambda x: torch.zeros(*x.shape[:-1], 77)  # type: ignore[method-assign]


def change_order(layer: TransformerLayer) -> None:
    module = layer.self_attn.k_proj
    del layer.self_attn.k_proj
    layer.self_attn.k_proj = module


def add_matrix(layer: TransformerLayer) -> None:
    layer.mlp.unused = Linear(48, 48, bias=False)


def change_eps(layer: TransformerLayer) -> None:
    layer.post_attention_layernorm.eps = 0.5


def take_default_eps(layer: TransformerLayer) -> None:
    layer.input_layernorm.eps = layer.post_attention_layernorm.eps = None


class Halved(Tensor):
    """Computes half of a product with it, by overriding ``F.linear`` as quantized tensors do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 0.5 * out.as_subclass(Tensor) if func is nn.functional.linear else out


def change_weight(layer: TransformerLayer) -> None:
    layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.detach().as_subclass(Halved))


@pytest.mark.parametrize(
    "change", [change_forward, change_order, add_matrix, change_eps, take_default_eps, change_weight]
)
def test_a_changed_layer_computes_what_its_modules_do(change: Callable[[TransformerLayer], None]) -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(replace(CONFIG, num_kv_heads=6), load_ops("fused"))
    change(layer)
    x, offsets = inputs.random_normal(2, 48, dtype=torch.float32, seed=1), torch.tensor([0, 2], dtype=torch.int32)
    table, documents = rotary_table(torch.arange(2), CONFIG, torch.float32), Documents(offsets, 2, 2)
    cache = torch.zeros(2, 6, 8), torch.zeros(2, 6, 8), torch.arange(2)
    keys = CachedKeys(*cache, {"cu_seqlens_q": documents, "cu_seqlens_k": documents}, (offsets, offsets))
    with torch.no_grad():
        actual = run_layers((layer,), x, table, [keys])
        torch.testing.assert_close(actual, layer(x, table, documents), rtol=1e-5, atol=1e-5)
