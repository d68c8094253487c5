"""Ids outside the alphabet, and what lies beyond the last document: it may hold anything, and has no influence.

Sizes: test_limits.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from backends import traffic
from cases import CASES
from inputs import random_normal
from model_cases import CONFIGS, LENGTHS, build, documents
from op_calls import make, tensors_of, with_grad
from op_case import OpCase
from tiers import slow_unless
from torch import Tensor

import blt_kernels as bk
from blt_kernels import PatchLayout
from blt_kernels.ids import EOS
from blt_kernels.models import BLT, MegaByte
from blt_kernels.models.base import ByteModel
from blt_kernels.nn import next_byte_bits, next_byte_targets
from blt_kernels.testing import assert_equal

NAN, INF = float("nan"), float("inf")

GARBAGE_IDS = (EOS, -100, 260, 14, 2**40, -(2**63), 2**63 - 1, 3, 132)
"""Ids beyond the last row are filled with these: a newline (14), a delimiter (3) and half a character (132) too."""


def with_tail(tokens: Tensor, ids: tuple[int, ...] = GARBAGE_IDS) -> Tensor:
    return torch.cat([tokens, torch.tensor(ids, dtype=tokens.dtype)])


# --- ops --------------------------------------------------------------------------------------------------------------

TAIL, TAIL_PATCHES = 9, 6  # so many bytes lie beyond the last document, and patches beyond P
CASES_WITH_DOCUMENTS = [c for c in CASES if c.has_documents]


def garbage(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return values that spoil whatever they take part in, another one in each row."""
    if dtype.is_floating_point:
        most = torch.finfo(dtype).max
        values: list[Any] = [NAN, INF, -INF, most, -most]
    elif dtype == torch.bool:
        values = [True, False, True]
    else:
        info = torch.iinfo(dtype)
        values = [max(info.min, min(id, info.max)) for id in GARBAGE_IDS]
    rows = torch.tensor([values[i % len(values)] for i in range(shape[0])], dtype=dtype)
    return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


def longer(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, garbage((rows, *x.shape[1:]), x.dtype).to(x.device)])


def longer_layout(layout: PatchLayout) -> PatchLayout:
    """Return the layout with TAIL bytes in no document, and room for TAIL_PATCHES patches more."""
    nothing = layout.patch_ids.new_full((TAIL,), -1)
    return dataclasses.replace(
        layout,
        patch_offsets=torch.cat([layout.patch_offsets, layout.patch_offsets[-1:].expand(TAIL_PATCHES)]),
        patch_ids=torch.cat([layout.patch_ids, nothing]),
        decode_ids=torch.cat([layout.decode_ids, nothing]),
        decode_offsets=torch.cat([layout.decode_offsets, layout.decode_offsets[-1:].expand(TAIL_PATCHES)]),
    )


def rows_beyond(name: str, arguments: dict[str, Any]) -> int:
    """Return how many rows an argument gets beyond its last one that counts."""
    on_patches = name == "y" or ("direction" in arguments and (name == "q") == (arguments["direction"] == "encode"))
    return TAIL_PATCHES * arguments.get("queries_per_patch", 1) if on_patches else TAIL


def with_beyond(case: OpCase, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the same documents in longer tensors, which hold garbage behind them."""
    result = dict(arguments)
    for name in ("logits", "entropy", "tokens", "marks", "x", "p", "y", "q", "k", "v"):
        if name in arguments:
            result[name] = longer(arguments[name], rows_beyond(name, arguments))
    if "layout" in arguments:
        result["layout"] = longer_layout(arguments["layout"])
    if "num_bytes" in arguments:
        result["num_bytes"] += TAIL
    return result


def split_rows(out: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Split an output of the longer call into what the shorter one has, and the rest; the hashes are ``[N, T]``."""
    dim = next(d for d in range(out.dim()) if out.shape[d] != inside.shape[d])
    return out.narrow(dim, 0, inside.shape[dim]), out.narrow(dim, inside.shape[dim], out.shape[dim] - inside.shape[dim])


@pytest.mark.parametrize("case", CASES_WITH_DOCUMENTS, ids=lambda case: case.name)
def test_rows_beyond_have_no_influence_on_ops(case: OpCase, backend: str, device: str) -> None:
    """Outputs and gradients are the same bit for bit; beyond, outputs are what the docstrings say, gradients 0."""
    for dtype in [d for d in case.dtypes if d in (torch.float32, torch.bfloat16, torch.int64)]:
        arguments = make(case, device, 130, 3, dtype)
        if "layout" not in arguments and case.op in ("entropy_patch", "boundary_patch"):
            arguments["max_patches"] = arguments.get("max_patches", 130)  # the capacity would differ otherwise
        arguments = with_grad(case, arguments)
        more = with_grad(case, with_beyond(case, arguments))
        expected, actual = (tensors_of(case.function(**x)) for x in (arguments, more))
        exact = backend != "reference" or case.op != "block_causal_attention"  # it sums in blocks of all rows
        cotangents: tuple[list[Tensor], list[Tensor]] = ([], [])
        for e, a in zip(expected, actual, strict=True):
            if e.shape == a.shape:
                assert_equal(a, e)
                kept = e
            else:
                own, rest = split_rows(a, e)
                compare(own, e, exact)
                # -1 is no patch, -inf the logsumexp of no key, and offsets go on with the end of the last document.
                assert (rest == 0).all() or (rest == (-INF if a.is_floating_point() else rest.flatten()[0])).all()
                assert a.is_floating_point() or rest.min() in (-1, 0, int(e.flatten()[-1]))
                kept = own
            if a.requires_grad:
                cotangent = random_normal(*kept.shape, dtype=kept.dtype, seed=4).to(device)
                cotangents[0].append(cotangent)
                cotangents[1].append(cotangent if e.shape == a.shape else longer(cotangent, a.shape[0] - e.shape[0]))
        if not case.differentiable:
            continue
        grads = []
        for x, outputs, given in ((arguments, expected, cotangents[0]), (more, actual, cotangents[1])):
            leaves = tensors_of({name: x[name] for name in case.differentiable})
            got = torch.autograd.grad([o for o in outputs if o.requires_grad], leaves, given)
            grads.append([g.to_dense() if g.is_sparse else g for g in got])
        for e, a in zip(*grads, strict=True):
            if e.shape == a.shape:
                compare(a, e, exact)
            else:
                own, rest = split_rows(a, e)
                compare(own, e, exact)
                assert (rest == 0).all()


def compare(actual: Tensor, expected: Tensor, exact: bool) -> None:
    if exact:
        assert_equal(actual, expected)
    else:
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=8 * torch.finfo(actual.dtype).eps * (1 + scale))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (5, 0), (0, 5)])
def test_empty_documents_before_what_is_beyond(lengths: tuple[int, ...], device: str) -> None:
    """No documents, empty ones alone, and an empty one first or last."""
    total = sum(lengths)
    rows = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    logits = longer(random_normal(total, 30, dtype=torch.float32, seed=1).to(device), TAIL).requires_grad_()
    entropy, layout = bk.entropy_patch(logits, rows, threshold=2.5, max_patches=max(total, len(lengths)))
    assert (entropy[total:] == 0).all()
    assert entropy[:total].min() > 0 if total else True
    assert (layout.patch_ids[total:] == -1).all()
    entropy.backward(longer(torch.ones(total, device=device), TAIL))
    assert (logits.grad[total:] == 0).all()
    assert logits.grad.isfinite().all()
    x = longer(random_normal(total, 8, dtype=torch.float32, seed=2).to(device), TAIL).requires_grad_()
    pooled = bk.patch_pool(x, layout, ("max", "mean"))
    (pooled.sum() + bk.patch_unpool(pooled, layout, "decode").sum()).backward()
    assert pooled.isfinite().all()
    assert (x.grad[total:] == 0).all()
    assert x.grad.isfinite().all()


def test_entropy_of_rows_beyond_is_not_read_and_has_no_second_derivative(backend: str, device: str) -> None:
    rows = torch.tensor([0, 3, 7], device=device)
    logits = random_normal(7, 11, dtype=torch.float64, seed=5).to(device)
    grads = []
    for x in (logits, longer(logits, 5)):
        x = x.clone().requires_grad_()
        upstream = torch.ones(x.shape[0], dtype=x.dtype, device=device).requires_grad_()
        entropy, _ = bk.entropy_patch(x, rows, threshold=1.0)
        (first,) = torch.autograd.grad(entropy, x, upstream, create_graph=True)
        second = torch.autograd.grad(first[:7].square().sum(), (x, upstream))
        grads.append([first.detach(), *second])
    for short, long in zip(*grads, strict=True):
        torch.testing.assert_close(long[:7], short, rtol=0, atol=1e-14)
        assert (long[7:] == 0).all()
    if backend == "emulated":
        few, many = (
            traffic(lambda x=x: bk.entropy_patch(x, rows, threshold=1.0))  # type: ignore[misc]
            for x in (logits, torch.cat([logits, logits.expand(7, 11).repeat(100, 1)]))
        )
        assert many - few < 700 * 11 * 8 / 2  # 700 more rows take 16 bytes of entropy and log_sum each, and some layout


# --- models -----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CONFIGS},
    "byte_lm, split": ("byte_lm", {"split_documents": True, "reset_at_newlines": True}),
    "blt, split": ("blt", {"split_documents": True, "whole_characters": True, "reset_at_newlines": True}),
    "blt, bpe": ("blt", {"patching": "bpe", "max_patch_length": 3, "patcher": None}),
    "blt, byte": ("blt", {"patching": "byte", "patcher": None, "split_documents": True}),
    "blt, rules": ("blt", {"threshold_add": 0.01, "max_patch_length": 4}),
}


def results(model: ByteModel, tokens: Tensor, rows: Tensor, beyond: float = 0.0, **options: Any) -> list[Tensor]:
    """Return logits, loss, and their gradients in the parameters; `beyond` is the upstream gradient of rows beyond."""
    logits = model(tokens, rows, **options)
    upstream = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view_as(logits)
    upstream[int(rows[-1]) :] = beyond
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logits, parameters, upstream, allow_unused=True)
    loss = model.loss(tokens, rows, **options)
    more = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
    return [logits.detach(), loss.detach(), *(torch.zeros(()) if g is None else g for g in (*grads, *more))]


@pytest.mark.parametrize("lengths", slow_unless([LENGTHS, (9, 0), (0, 0), ()], [LENGTHS]))
@pytest.mark.parametrize("name", OPTIONS)
def test_ids_beyond_have_no_influence_on_models(name: str, lengths: tuple[int, ...]) -> None:
    """Whatever they are, all bits are the same; without them, all numbers are to rounding: products have fewer rows."""
    model = build(OPTIONS[name][0], **OPTIONS[name][1])
    tokens, rows = documents(lengths)
    total = len(tokens)
    kinds = [{}, {"strided": True}] if isinstance(model, MegaByte) else [{}]
    if isinstance(model, BLT):
        kinds = [{"layout": None}, {"layout": longer_layout(model.patch(tokens, rows))}]
    for options in kinds:
        same = results(model, torch.cat([tokens, tokens.new_full((TAIL,), 7)]), rows, **options)
        spoilt = results(model, with_tail(tokens), rows, beyond=1e30, **options)
        assert_equal(spoilt, same)
        assert (spoilt[0][total:] == 0).all()
        assert all(x.isfinite().all() for x in spoilt)
        if total and "layout" not in options:
            short = results(model, tokens, rows, **options)
            short[0] = torch.cat([short[0], short[0].new_zeros(TAIL, 260)])
            torch.testing.assert_close(spoilt, short, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("name", [name for name in OPTIONS if "megabyte" not in name])
def test_patches_do_not_depend_on_ids_beyond(name: str, ops: str) -> None:
    model = build(OPTIONS[name][0], ops, **OPTIONS[name][1])
    tokens, rows = documents()
    short, long = (model.patch(x, rows, max_patches=80) for x in (tokens, with_tail(tokens)))
    if isinstance(short, tuple):
        entropies = torch.cat([short[0], short[0].new_zeros(TAIL)])
        # A row of torch's products may depend on the number of rows in its last bit, which ours do not.
        precision = 0.0 if ops == "fused" else 1e-12
        torch.testing.assert_close(long[0], entropies, rtol=precision, atol=precision)
        short, long = short[1], long[1]
    nothing = torch.full((TAIL,), -1, dtype=torch.int32)
    for field in dataclasses.fields(PatchLayout):
        expected = getattr(short, field.name)
        expected = torch.cat([expected, nothing]) if field.name in ("patch_ids", "decode_ids") else expected
        assert_equal(getattr(long, field.name), expected, name=field.name)


@pytest.mark.parametrize("name", ["byte_lm, split", "blt, split", "blt_space", "megabyte_extended"])
def test_reference_models_ignore_ids_beyond(name: str) -> None:
    fused, reference = (build(OPTIONS[name][0], ops, **OPTIONS[name][1]) for ops in ("fused", "reference"))
    tokens, rows = documents()
    torch.testing.assert_close(
        results(reference, with_tail(tokens), rows, beyond=1e30),
        results(fused, with_tail(tokens), rows),
        atol=1e-10,
        rtol=1e-10,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte_lm, split", "blt, split", "megabyte_extended"])
def test_compiled_models_ignore_ids_beyond(name: str) -> None:
    model = build(OPTIONS[name][0], **OPTIONS[name][1])
    tokens, rows = documents((9, 0, 12))
    torch._dynamo.reset()
    loss = torch.compile(model.loss, backend="eager")(with_tail(tokens), rows)
    torch.testing.assert_close(loss, model.loss(tokens, rows), rtol=1e-10, atol=0)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.loss(tokens, rows).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-10)


def test_targets_beyond_are_not_predicted() -> None:
    tokens, rows = documents()
    targets = next_byte_targets(with_tail(tokens), rows)
    assert_equal(targets[: len(tokens)], next_byte_targets(tokens, rows))
    assert (targets[len(tokens) :] == -100).all()


# --- ids outside the alphabet -----------------------------------------------------------------------------------------


def calls(model: Any) -> dict[str, Any]:
    functions = {"forward": model, "loss": model.loss}
    if isinstance(model, MegaByte):
        functions["strided"] = lambda *arguments: model(*arguments, strided=True)
    else:
        functions["patch"] = model.patch
    return functions


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("name", ["byte_lm", "blt", "blt_space", "blt_static", "megabyte", "megabyte_extended"])
@pytest.mark.parametrize(
    ("wrong", "dtype"), [(260, torch.int32), (-1, torch.int64), (-100, torch.int32), (2**40, torch.int64)]
)
def test_an_id_outside_the_alphabet_is_named(name: str, ops: str, wrong: int, dtype: torch.dtype) -> None:
    model = build(name, ops, torch.float32)
    tokens, rows = documents()
    tokens = tokens.to(dtype)
    tokens[5] = wrong
    message = f"tokens: expected ids from 0 to 259, the alphabet of the model, got {wrong}$"
    for what, call in calls(model).items():
        with pytest.raises(ValueError, match=message):
            call(tokens, rows)
        with pytest.raises(ValueError, match=message):
            call(tokens)
        assert what
    padded = tokens[:60].view(3, 20)
    for call in calls(model).values():
        with pytest.raises(ValueError, match=rf"got {wrong}\. Every id of padded tokens is in a document"):
            call(padded)


def test_a_given_layout_does_not_skip_the_check() -> None:
    tokens, rows = documents()
    model = build("blt", "reference")
    layout = model.patch(tokens, rows)
    tokens[3] = 300
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 259, the alphabet of the model, got 300"):
        model(tokens, rows, layout=layout)


def test_ngram_hash_embed_says_that_padded_ids_are_in_documents() -> None:
    tokens = torch.tensor([[5, 6], [7, -100]])
    with pytest.raises(ValueError, match=r"rows of byte_table, got -100\. Every id of padded tokens is in a document"):
        bk.ngram_hash_embed(tokens, torch.zeros(6 * 7, 4), torch.zeros(260, 4))
    with pytest.raises(ValueError, match="byte_table: expected at least one row"):
        bk.ngram_hash_embed(tokens, torch.zeros(6 * 7, 4), torch.zeros(0, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte_lm", "megabyte_extended"])
def test_compiled_models_read_no_table_at_an_unknown_id(name: str) -> None:
    """Such an id has no embedding and is not predicted if values are not checked, as on a GPU."""
    model = build(name, dtype=torch.float32)
    tokens, rows = documents((9, 12))
    tokens[[4, 8, 15]] = torch.tensor([260, -100, 2**40])
    torch._dynamo.reset()
    loss = torch.compile(model.loss, backend="eager")(tokens, rows)
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_targets_outside_the_alphabet_are_not_predicted() -> None:
    targets = next_byte_targets(torch.tensor([5, 260, -3, 7, 6]), torch.tensor([0, 5]), 260)
    assert targets.tolist() == [-100, -100, 7, 6, -100]
    assert next_byte_bits(torch.zeros(5, 260), targets).item() == pytest.approx(torch.tensor(260.0).log2().item())
