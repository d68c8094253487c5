"""CUDA graphs: every op captures, forward and backward; nothing of what a capture forbids happens in Python.

On a GPU each op is captured and replayed. Without one, the same calls run on tensors of "meta" (`capture_rules`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_rules import DEVICE, forbidden
from cases import CASES
from cuda_graphs import replaced, warm_up
from op_calls import backward, cotangents_of, forward, make, map_tensors, tensors_of
from op_case import OpCase
from torch import Tensor

from blt_kernels.models.captured import capture
from blt_kernels.testing import assert_equal

DENSE = [c for c in CASES if not c.sparse]  # the size of a sparse gradient depends on the data: its launcher waits


# --- what a capture forbids -------------------------------------------------------------------------------------------


X = torch.empty(6, 3, device=DEVICE)
FORBIDDEN: dict[str, Callable[[], Any]] = {
    "cpu": X.cpu,
    "item": lambda: X[0, 0].item(),
    "tolist": X.tolist,
    "to_cpu": lambda: X.to("cpu", torch.float64),
    "nonzero": X.nonzero,
    "mask": lambda: X[X > 0],
    "set_by_mask": lambda: X.clone().index_put_((X > 0,), torch.ones((), device=DEVICE)),
    "if": lambda: 1 if X.sum() > 0 else 2,
    "unique": X.unique,
    "repeat_interleave": lambda: X[0].repeat_interleave(torch.empty(3, dtype=torch.int64, device=DEVICE)),
    "tensor": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
    "as_tensor": lambda: torch.as_tensor([1, 2], device=DEVICE),
    "new_tensor": lambda: X.new_tensor([1.0, 2.0]),
    "arange_to": lambda: torch.arange(3).to(DEVICE),
    "pageable_copy": lambda: torch.empty(3, device=DEVICE).copy_(torch.zeros(3)),
    "index_of_the_host": lambda: X[torch.tensor([0, 2])],
    "list_index": lambda: X[[0, 2]],
    "number_copied": lambda: torch.zeros(()).to(DEVICE),
}
ALLOWED: dict[str, Callable[[], Any]] = {
    "arange_there": lambda: torch.arange(3, dtype=torch.int32, device=DEVICE) * 2 + X[0],
    "number_as_argument": lambda: X * torch.tensor(2.0),
    "filled": lambda: torch.full((3,), 2.0, device=DEVICE),
    "gather": lambda: X[torch.arange(2, device=DEVICE)],
    "on_the_host_alone": lambda: (torch.arange(3).tolist(), torch.tensor([1]).item(), torch.ones(3).nonzero()),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_capture_forbids_is_seen(name: str) -> None:
    assert forbidden(FORBIDDEN[name])


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_capture_allows_is_not(name: str) -> None:
    assert not forbidden(ALLOWED[name])


# --- the ops ----------------------------------------------------------------------------------------------------------


BY_BYTE = {
    "logits",
    "hidden",
    "targets",
    "entropy",
    "tokens",
    "marks",
    "x",
    "p",
}  # these arguments have a row for each byte
BY_DOCUMENT = ("seqused_k", "threshold")  # these have one entry for each document, if they are tensors


def padded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return two documents of one length: ``[2, S, ...]`` for whatever has a row for each byte, and no offsets."""
    layout = arguments.get("layout")
    by_byte = BY_BYTE & arguments.keys()
    if "q" in arguments:
        by_byte |= {"q", "k", "v"} if layout is None else {"k", "v"} if arguments["direction"] == "encode" else {"q"}

    def two(x: Tensor) -> Tensor:
        return x[: x.shape[0] // 2 * 2].unflatten(0, (2, -1))

    changed = {
        **{name: two(arguments[name]) for name in by_byte},
        **{name: arguments[name][:2] for name in BY_DOCUMENT if isinstance(arguments.get(name), Tensor)},
    }
    return {name: changed.get(name, x) for name, x in arguments.items() if not name.startswith("cu_seqlens")}


def takes_padded(case: OpCase) -> bool:
    return not (BY_BYTE | {"q"}).isdisjoint(signature(case.function).parameters)


CALLS = [
    *(pytest.param(case, case.function, False, id=f"{case.name}-packed") for case in DENSE),
    *(pytest.param(case, case.function, True, id=f"{case.name}-padded") for case in DENSE if takes_padded(case)),
    *(pytest.param(case, case.reference, False, id=f"{case.name}-reference") for case in DENSE),
]


@pytest.mark.parametrize(("case", "function", "is_padded"), CALLS)
def test_ops_do_nothing_that_a_capture_forbids(case: OpCase, function: Callable[..., Any], is_padded: bool) -> None:
    """The references too: they compute what no kernel takes, such as attention in fp64."""
    arguments = make(case, "cpu", 40, 1)
    arguments = map_tensors(lambda x: x.to(DEVICE), padded(arguments) if is_padded else arguments)
    out, _ = forward(case, function, arguments)
    cotangents = cotangents_of(case, out)
    assert not forbidden(lambda: backward(case, *forward(case, function, arguments), cotangents))


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("options", [{}, {"window": 5, "cached": True}], ids=["own", "cache"])
def test_triton_launchers_do_nothing_that_a_capture_forbids(
    queries: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launchers of attention are in Python; its kernels are not run."""
    jit = pytest.importorskip("triton.runtime.jit")
    from blt_kernels.triton.block_causal_attention.backward import block_causal_attention_bwd_cuda
    from blt_kernels.triton.block_causal_attention.forward import block_causal_attention_fwd_cuda
    from blt_kernels.triton.block_causal_attention.ranges import block_causal_attention_ranges_fwd_cuda

    launched: list[str] = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *_args, **_kwargs: launched.append(self.__name__))
    keys = 3000 if options.get("cached") else 2 * queries
    q, k = (torch.empty(n, h, 64, dtype=torch.bfloat16, device=DEVICE) for n, h in ((2 * queries, 4), (keys, 2)))
    offsets = torch.empty(3, dtype=torch.int32, device=DEVICE)
    rest = (offsets, *((offsets, 5) if "cached" in options else (None, None)), True, None)
    rest = (*rest, torch.empty(2, dtype=torch.int32, device=DEVICE) if "cached" in options else None)

    def both() -> None:
        out, lse = block_causal_attention_fwd_cuda(q, k, k, *rest)
        block_causal_attention_bwd_cuda(out, q, k, k, out, lse, *rest)

    assert not forbidden(both)
    few = "cached" in options and queries < 40
    assert any(("decode" if few else "fwd") in name for name in launched), launched
    assert any("dkdv" in name for name in launched), launched
    # Forward makes intervals of queries once, backward those of queries and keys at once.
    assert sum("ranges" in name for name in launched) <= 2, launched

    made = block_causal_attention_ranges_fwd_cuda(offsets, rest[1], q.shape[0], keys, *rest[2:4], rest[5])
    launched.clear()

    def given() -> None:
        out, lse = block_causal_attention_fwd_cuda(q, k, k, *rest, made)
        block_causal_attention_bwd_cuda(out, q, k, k, out, lse, *rest, made)

    assert not forbidden(given)
    # Forward makes its own if the batch also has documents of few queries, which it leaves to decoding.
    own = "decode" in "".join(launched) and "block_causal_attention_fwd_kernel" in launched
    assert sum("ranges" in name for name in launched) == own, launched


@pytest.mark.parametrize("operator", ["fwd", "bwd"])
def test_triton_kernels_are_not_compiled_in_a_capture(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before anything that would end the capture."""
    jit = pytest.importorskip("triton.runtime.jit")
    from blt_kernels.ops import block_causal_attention as op

    q, offsets = torch.empty(0, 2, 32), torch.zeros(1, dtype=torch.int32)
    arguments = (*[q] * (3 if operator == "fwd" else 5), *([] if operator == "fwd" else [q[..., 0]]), offsets)
    run = {"fwd": op._forward_cuda, "bwd": op._backward_cuda}[operator]
    run(*arguments, None, None, True, None, None)
    modules = [module for name, module in sys.modules.items() if name.startswith("blt_kernels.triton.")]
    kernels = {x for m in modules for name, x in vars(m).items() if name.endswith("_kernel")}
    assert len(kernels) >= 6
    compiled: list[Any] = []
    monkeypatch.setattr(jit.JITFunction, "compile", lambda *_args, **_options: compiled.append(1), raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for kernel in kernels:
        with pytest.raises(RuntimeError, match=f"{kernel.__name__} is not compiled .*: run the same call once before"):
            kernel._do_compile(None, None, 0, None, None, None, False)
    assert not compiled


def test_launchers_copy_nothing_to_the_host_but_sizes_of_sparse_gradients() -> None:
    """The tests above do not notice a launcher of CUDA C++ that waits for the device."""
    sources = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
    waits_for_device = r"DeviceType::CPU|cudaMemcpy|Synchronize|torch::stable::to\(|torch::stable::copy_"
    found = {path.name: len(re.findall(waits_for_device, path.read_text())) for path in sources.glob("*.cu")}
    assert {name: count for name, count in found.items() if count} == {"ngram_hash_embed.cu": 2}  # both are on one line


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph(case: OpCase) -> None:
    first, second = (make(case, "cuda", 300, seed) for seed in (18, 19))
    second = {name: x if isinstance(x, Tensor) else first[name] for name, x in second.items()}
    if any(a.shape != b.shape for a, b in zip(tensors_of(first), tensors_of(second), strict=True)):
        second = map_tensors(Tensor.clone, first)
    cotangents = warm_up(lambda: cotangents_of(case, forward(case, case.function, first)[0]))

    def step(arguments: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        return backward(case, *forward(case, case.function, arguments), cotangents)

    warm_up(lambda: step(first))
    graph, captured = capture(lambda: step(first))
    replaced(tensors_of(first), tensors_of(second))
    graph.replay()
    assert_equal(captured, step(second))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_failed_cuda_capture_leaves_nothing_behind() -> None:
    stream, x = torch.cuda.current_stream(), torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        capture(lambda: (x * 2).sum().item())
    assert torch.cuda.current_stream() == stream
    warm_up(lambda: x * 3)
    graph, captured = capture(lambda: x * 3)
    graph.replay()
    assert (captured == 3).all()
    assert (torch.ones(5, device="cuda") * 2).sum().item() == 10
