"""`TARGETS`: every public function, raw operator, optimizer, layer and model with a valid call, for `fuzz.ops`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import inputs
import torch
from cases import CASES
from model_cases import build, documents
from op_calls import Recorder, make, raw_calls
from op_case import OpCase
from torch import Tensor

import blt_kernels as bk
from blt_kernels import PatchLayout
from blt_kernels import nn as bk_nn
from blt_kernels.ids import to_bytes, to_ids
from blt_kernels.integrations import hnet
from blt_kernels.reference.few_row_layer import few_row_layer_reference

Arguments = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """Describes one function with a valid call of it.

    Attributes
    ----------
    op : what finds are counted by
    label : what is special about the call
    function : called with the arguments by name
    make : (dtype, num_bytes, seed) -> its arguments
    reference : computes the right value from the same arguments, or None
    case : whose gradients are compared, too, or None
    raw : whether this is an operator, which may also raise RuntimeError, and takes garbage offsets
    lenient : whether errors of torch are fine, as those of any module
    in_place : names of the arguments that a call changes
    """

    op: str
    label: str
    function: Callable[..., Any]
    make: Callable[[torch.dtype, int, int], Arguments]
    reference: Callable[..., Any] | None = None
    case: OpCase | None = None
    raw: bool = False
    lenient: bool = False
    in_place: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}[{self.label}]" if self.label else self.op

    @property
    def parameters(self) -> list[str]:
        """Return the names of the arguments, also of those that the valid call leaves out."""
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return [name for name, p in inspect.signature(self.function).parameters.items() if p.kind not in kinds]


# --- ops and the operators behind them --------------------------------------------------------------------------------


def _of_case(case: OpCase) -> Target:
    def arguments(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
        return make(case, "cpu", num_bytes, seed, dtype if dtype in case.dtypes else None)

    return Target(case.function.__name__, case.label, case.function, arguments, case.reference, case)


def _raw(case: OpCase, number: int, operator: torch._ops.OpOverload) -> Target:
    names = [argument.name for argument in operator._schema.arguments]

    def arguments(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
        calls = raw_calls(case, make(case, "cpu", num_bytes, seed, dtype if dtype in case.dtypes else None))
        return dict(zip(names, calls[number][1], strict=False))  # arguments with defaults may be missing

    def function(**given: Any) -> Any:
        return operator(*given.values())

    return Target(operator._schema.name.partition("::")[2], case.name, function, arguments, raw=True)


@cache
def _operators() -> list[Target]:
    found: dict[str, int] = {}
    targets = []
    for case in CASES:
        for number, (operator, _) in enumerate(raw_calls(case, make(case, "cpu", 30, 1))):
            found[operator.name()] = found.get(operator.name(), 0) + 1
            if found[operator.name()] <= 3:  # other cases of the operator differ in options alone
                targets.append(_raw(case, number, operator))
    return targets


# --- layers of few rows, and optimizers -------------------------------------------------------------------------------


def _make_layer(stored: torch.dtype) -> Callable[[torch.dtype, int, int], Arguments]:
    def arguments(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
        rows, dim, hidden, slots = min(num_bytes, 5), 12, 20, 30
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(dtype)

        sizes = (8, dim), (4, dim), (4, dim), (dim, 8), (hidden, dim), (hidden, dim), (dim, hidden)
        weights = [normal(*size) * 0.3 for size in sizes]
        scales = []
        if stored == torch.int8:
            scales = [torch.rand(size[0], generator=random).to(dtype) * 0.01 for size in sizes]
            weights = [(weight * 100).clamp(-127, 127).to(torch.int8) for weight in weights]
        angle = torch.rand(rows, 1, 2, generator=random)
        table = torch.polar(torch.ones_like(angle), angle)
        return {
            "x": normal(rows, dim),
            "weights": weights,
            "scales": scales,
            "input_norm": normal(dim),
            "post_norm": normal(dim),
            "eps": 1e-5,
            "table": table.to(torch.complex128) if dtype == torch.float64 else table,
            "keys": normal(slots, 1, 4),
            "values": normal(slots, 1, 4),
            "index": torch.arange(rows) + 3,
            "cu_seqlens_q": torch.tensor([0, rows], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, rows + 3], dtype=torch.int32),
            "window": None,
        }

    return arguments


def _make_layer_step(stored: torch.dtype) -> Callable[[torch.dtype, int, int], Arguments]:
    layer = _make_layer(stored)
    names = [argument.name for argument in torch.ops.blt_kernels.few_row_layer_step.default._schema.arguments]

    def arguments(_dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
        with Recorder() as recorder:
            bk.few_row_layer(**layer(torch.float32, num_bytes, seed))
        return dict(zip(names, recorder.calls[0][1], strict=True))

    return arguments


def _make_step(adagrad: bool) -> Callable[[torch.dtype, int, int], Arguments]:
    def arguments(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
        values = {
            "table": inputs.random_normal(50, 5, dtype=dtype, seed=seed),
            **({"sums": torch.rand(50, dtype=torch.promote_types(dtype, torch.float32))} if adagrad else {}),
            "rows": torch.arange(min(num_bytes, 20)) * 2,
            "values": inputs.random_normal(min(num_bytes, 20), 5, dtype=dtype, seed=seed + 1),
            "lr": 0.1,
        }
        return values | ({"eps": 1e-6} if adagrad else {})

    return arguments


def _optimize(optimizer: type[torch.optim.Optimizer]) -> Callable[..., Tensor]:
    names = ("lr",) if optimizer is bk.optim.SGD else ("lr", "eps", "initial_accumulator_value")

    def step(params: Tensor, gradient: Tensor, lr: float, eps: float, initial_accumulator_value: float) -> Tensor:
        values = {"lr": lr, "eps": eps, "initial_accumulator_value": initial_accumulator_value}
        table = params.detach().requires_grad_(params.is_floating_point()) if isinstance(params, Tensor) else params
        made = optimizer([table], **{name: values[name] for name in names})
        with torch.no_grad():
            try:
                table.grad = gradient
            except (RuntimeError, TypeError) as error:  # torch itself refuses it
                raise ValueError(f"gradient: {error}") from None
        made.step()
        return table.detach()

    return step


def _make_optimizer(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    step = _make_step(False)(dtype, num_bytes, seed)
    gradient = torch.sparse_coo_tensor(step["rows"][None], step["values"], (50, 5), check_invariants=False)
    return {"params": step["table"], "gradient": gradient, "lr": 0.1, "eps": 1e-6, "initial_accumulator_value": 0.1}


# --- layouts, ids, H-Net ----------------------------------------------------------------------------------------------


def _make_lengths(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    lengths = torch.randint(0, 5, (3, num_bytes // 3 + 1), generator=torch.Generator().manual_seed(seed))
    seq_len = int(lengths.sum(1).max())
    lengths[:, -1] += seq_len - lengths.sum(1)
    return {"lengths": lengths, "seq_len": (None, seq_len)[seed % 2], "padding": None, "max_patches": None}


def _make_ids(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    ids = torch.randint(0, 3, (2, num_bytes), generator=torch.Generator().manual_seed(seed)).cumsum(1)
    return {"patch_ids": ids, "decode_ids": ids - 1, "slots": int(ids.max()) + 1 if num_bytes else 1}


def _make_cuts(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    return {"cuts": torch.arange(num_bytes) % 4 == 0, "cu_seqlens": inputs.documents(num_bytes, seed)}


def _make_layout(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    return {"self": inputs.make_layout(num_bytes, seed, ("", "overflow", "tail", "slots")[seed % 4])}


def _make_chunk(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    x = inputs.random_normal(num_bytes, 5, dtype=dtype, seed=seed)
    return {
        "hidden_states": x,
        "boundary_mask": torch.arange(num_bytes) % 3 == 0,
        "cu_seqlens": inputs.documents(num_bytes, seed),
    }


def _make_dechunk(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    chunks, layout = hnet.chunk(**_make_chunk(dtype, num_bytes, seed))
    return {"chunks": chunks, "boundary_prob": torch.rand(num_bytes), "layout": layout}


def _make_text(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    text = "né\U0001f600 x" * num_bytes
    data: list[Any] = [text, text.encode(), torch.tensor(list(text.encode()), dtype=torch.uint8), [text, b"x", ""]]
    return {"data": data[seed % 4], "bos": True, "eos": False, "dtype": torch.int64, "device": None}


def _make_bytes(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    ids = torch.randint(0, 260, (num_bytes,), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "cu_seqlens": (None, inputs.documents(num_bytes, seed))[seed % 2], "special": "drop"}


# --- layers and models ------------------------------------------------------------------------------------------------

MODELS = ("byte_lm", "blt", "blt_space", "megabyte")


@cache
def _model(name: str) -> Any:
    return build(name, dtype=torch.float32).eval()


def _make_tokens(_dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    tokens, rows = documents((num_bytes, 0, 3), seed)
    return {"tokens": tokens, "cu_seqlens": rows}


def _extend(model: Any) -> Callable[..., Any]:
    def extend(tokens: Any, cu_seqlens: Any, rows: Any, undo: Any, lengths: Any, select: Any) -> Any:
        lengths, select = (list(x) if inspect.isgenerator(x) else x for x in (lengths, select))
        state = model.new_state(rows, undo=undo)
        first = model.extend(tokens, cu_seqlens, state=state)
        state.truncate(lengths)
        state.select(select)
        return first, state.lengths, [state.row_ids(row) for row in range(state.rows)]

    return extend


def _make_extend(dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    made = _make_tokens(dtype, num_bytes, seed)
    return {**made, "rows": 3, "undo": 8, "lengths": [num_bytes // 2, 0, 2], "select": [2, 0, -1]}


def _make_generate(_dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
    options: Arguments = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.01}
    return {
        "prompts": ["x" * num_bytes, b"y"],
        "max_new_bytes": 3,
        **(options if seed % 2 else {"temperature": 0.0}),
        "seed": 1,
        "stop": ["ab", b"q"],
        "draft": None,
        "draft_bytes": 2,
        "weights": None,
        "captured": None,
    }


def _generate(model: Any) -> Callable[..., Any]:
    return lambda **options: model.generate(**options).ids


def _layer_functions() -> list[Target]:
    """Return functions of `blt_kernels.nn`, which check nothing: they must not crash."""

    def ids(num_bytes: int) -> Tensor:
        return torch.arange(num_bytes) + 4

    def table(num_bytes: int) -> Tensor:
        return bk_nn.rotary_table(torch.arange(num_bytes), _model("byte_lm").config, torch.float32)

    made: list[tuple[Callable[..., Any], Callable[[torch.dtype, int, int], Arguments]]] = [
        (bk_nn.next_byte_targets, lambda d, n, s: {"tokens": ids(n), "cu_seqlens": inputs.documents(n, s)}),
        (bk_nn.next_byte_bits, lambda d, n, s: {"logits": torch.zeros(n, 9, dtype=d), "targets": ids(n) % 9}),
        (bk_nn.row_positions, lambda d, n, s: {"cu_seqlens": inputs.documents(n, s), "total": n}),
        (bk_nn.attention_documents, lambda d, n, s: {"starts": ids(n) > 6, "cu_seqlens": inputs.documents(n, s)}),
        (bk_nn.rotate, lambda d, n, s: {"x": inputs.random_normal(n, 2, 16, dtype=d, seed=s), "table": table(n)}),
        (
            bk_nn.rotary_table,
            lambda d, n, s: {"positions": ids(n), "config": _model("byte_lm").config, "dtype": torch.float32},
        ),
    ]
    return [Target(f"nn.{function.__name__}", "", function, make, lenient=True) for function, make in made]


def _models() -> list[Target]:
    targets = []
    for name in MODELS:
        model = _model(name)
        methods = ["forward", "loss", *(["patch"] if hasattr(model, "patch") else [])]
        targets += [Target(f"{type(model).__name__}.{m}", name, getattr(model, m), _make_tokens) for m in methods]
        targets.append(Target(f"{type(model).__name__}.extend", name, _extend(model), _make_extend))
        targets.append(Target(f"{type(model).__name__}.generate", name, _generate(model), _make_generate))
    layer = _model("byte_lm").layers[0]

    def make_layer(_dtype: torch.dtype, num_bytes: int, seed: int) -> Arguments:
        table = bk_nn.rotary_table(torch.arange(num_bytes), _model("byte_lm").config, torch.float32)
        x = inputs.random_normal(num_bytes, 32, dtype=torch.float32, seed=seed)
        return {"x": x, "table": table, "documents": inputs.documents(num_bytes, seed)}

    targets.append(Target("TransformerLayer.forward", "", layer.forward, make_layer, lenient=True))
    return targets


def targets() -> list[Target]:
    """Return all of them."""
    steps = torch.ops.blt_kernels
    layer = (few_row_layer_reference, None)
    return [
        *map(_of_case, CASES),
        *_operators(),
        *(
            Target(
                "few_row_layer",
                str(stored),
                bk.few_row_layer,
                _make_layer(stored),
                layer[0],
                in_place=("keys", "values"),
            )
            for stored in (torch.float32, torch.int8)
        ),
        Target(
            "sgd_step", "", lambda **x: steps.sgd_step(*x.values()), _make_step(False), raw=True, in_place=("table",)
        ),
        *(
            Target(
                "few_row_layer_step",
                str(stored),
                lambda **x: steps.few_row_layer_step(*x.values()),
                _make_layer_step(stored),
                raw=True,
                in_place=("keys", "values"),
            )
            for stored in (torch.float32, torch.int8)
        ),
        Target(
            "rowwise_adagrad_step",
            "",
            lambda **x: steps.rowwise_adagrad_step(*x.values()),
            _make_step(True),
            raw=True,
            in_place=("table", "sums"),
        ),
        Target("optim.SGD", "", _optimize(bk.optim.SGD), _make_optimizer, in_place=("params",)),
        Target("optim.RowwiseAdagrad", "", _optimize(bk.optim.RowwiseAdagrad), _make_optimizer, in_place=("params",)),
        Target("PatchLayout.from_lengths", "", PatchLayout.from_lengths, _make_lengths),
        Target("PatchLayout.from_ids", "", PatchLayout.from_ids, _make_ids),
        Target("PatchLayout.from_cuts", "", PatchLayout.from_cuts, _make_cuts),
        Target("PatchLayout.to_lengths", "", PatchLayout.to_lengths, _make_layout),
        Target("PatchLayout.compact", "", PatchLayout.compact, _make_layout),
        Target("PatchLayout.to", "", PatchLayout.to, lambda *x: {**_make_layout(*x), "device": "cpu"}),
        Target("hnet.chunk", "", hnet.chunk, _make_chunk),
        Target("hnet.dechunk", "", hnet.dechunk, _make_dechunk),
        Target("to_ids", "", to_ids, _make_text),
        Target("to_bytes", "", to_bytes, _make_bytes),
        Target("set_attention_backend", "", bk.set_attention_backend, lambda *_: {"backend": "triton"}),
        *_layer_functions(),
        *_models(),
    ]
