"""Calls every public function with extreme arguments: each call is refused by name, or gives the right value.

A call is a valid one of `op_targets` with one or two arguments replaced by `mutations`, in a context such as autocast.
Its number decides everything about it: ``judge(make_call(number))`` repeats one.
"""

from __future__ import annotations

import contextlib
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from inspect import isgenerator
from random import Random
from typing import Any

import torch
from op_calls import cast, floats_of, map_tensors, run, tensors_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from blt_kernels import PatchLayout
from blt_kernels.testing import assert_equal
from fuzz import workers
from fuzz.mutations import mutate
from fuzz.op_targets import Arguments, Target, targets

SIZES = (0, 1, 2, 9, 40, 40, 40)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGE = 1e15
FEW = 10**6  # the reference takes no more elements than these
_NO_MEMORY = re.compile(
    r"not enough memory|API call failed|tried to allocate|alloc_cpu|[Oo]verflow|too large|too big|bad_alloc"
)
_HUGE = re.compile(r"announces|\d{10}|e\+")  # labels of what may need more memory than there is
# These errors of torch say themselves which of its modes is in the way of which operator.
_OF_TORCH = re.compile(
    r"convert all Tensors to FakeTensors|[Ii]nference tensor|meta tensors?$|InferenceMode|variable_excluded"
    r"|^blt_kernels\.\w+\.default$"  # of a tensor subclass that has no such operator
)
_OF_TRACING = ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode")
_OFFSETS = r"(offsets|ids|cu_patches|(patch|decode)_(offsets|ids)|cu_seqlens(_[qk])?|seqused_k)"
_FIELDS = re.compile(rf"\b{_OFFSETS}: expected|for argument '{_OFFSETS}'")


@dataclass
class Call:
    """Has a target, its arguments, the labels of those that were replaced, and the context."""

    target: Target
    arguments: Arguments
    changed: dict[str, str]
    context: str
    dtype: torch.dtype

    def __str__(self) -> str:
        changes = "; ".join(f"{name}: {label}" for name, label in self.changed.items())
        where = "" if self.context == "plain" else f" under {self.context}"
        return f"{self.target.name} with {changes}{where}, {str(self.dtype).removeprefix('torch.')}"


# --- making calls -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _default_fp64() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic mode": _deterministic,
    "default dtype fp64": _default_fp64,
    "default device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "meta tensors": contextlib.nullcontext,
    "fake tensors": FakeTensorMode,
    "vmap": contextlib.nullcontext,
}
BATCHED = (
    "logits",
    "tokens",
    "entropy",
    "marks",
    "hidden",
    "x",
    "y",
    "q",
)  # vmap has a batch of the first one there is
WITHOUT_VALUES = ("meta tensors", "fake tensors")


@cache
def _targets() -> list[Target]:
    return targets()


def make_call(number: int, only: str = "") -> Call | None:
    """Return the call of this number, of the targets whose op contains `only`; None where torch cannot make it."""
    random = Random(number)
    chosen = [target for target in _targets() if only in target.op]
    target = chosen[number % len(chosen)]
    dtype = random.choice(DTYPES)
    try:
        arguments = target.make(dtype, random.choice(SIZES), random.randrange(7))
    except AssertionError:  # a valid call of this dtype or size calls no such operator
        return None
    names = [name for name in dict.fromkeys([*arguments, *target.parameters]) if name != "self"] or ["self"]
    changed = {}
    for name in random.sample(names, min(len(names), random.choice((1, 1, 1, 2)))):
        others = [x for other, x in arguments.items() if other != name and isinstance(x, Tensor)]
        try:
            if others and isinstance(arguments.get(name), Tensor) and random.random() < 0.05:
                label, value = "memory of another argument", random.choice(others).view(arguments[name].shape)
            else:
                label, value = mutate(random, arguments.get(name))
        except Exception:
            return None
        if target.lenient and "announces" in label:
            return None  # a layer takes as long as its input is
        changed[name], arguments[name] = label, value
    without = () if target.case else ("vmap",) if target.raw else ("vmap", *WITHOUT_VALUES)
    contexts = [name for name in CONTEXTS if name not in without]
    context = random.choice(contexts) if random.random() < 0.3 else "plain"
    return Call(target, arguments, changed, context, dtype)


# --- judging them -----------------------------------------------------------------------------------------------------


def job(number: int, only: str = "") -> Iterator[dict[str, Any]]:
    """Tell the op of a call, then what came of it: "refused", "right", "ran", "memory", "none made" or "found"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        call = make_call(number, only)
        if call is None:
            yield {"op": "", "outcome": "none made"}
            return
        yield {"op": call.target.op, "call": str(call)}
        try:
            outcome, detail = judge(call)
        except Exception as error:  # of the harness, or of the reference
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome, detail = "found", f"no verdict: {error!r} at {where.filename}:{where.lineno}"
        yield {"outcome": outcome, "detail": detail[:600]}


def judge(call: Call) -> tuple[str, str]:
    """Return what came of a call, and why."""
    target = call.target
    before = map_tensors(_copy, call.arguments)
    try:
        with CONTEXTS[call.context]() as mode:
            try:
                given = _converted(call, mode)
            except (RuntimeError, AssertionError):  # torch cannot make such a tensor
                return "none made", ""
            out = _called(call, given)
    except Exception as error:
        return _refused(call, error)
    leaves = tensors_of(out)
    if call.context in WITHOUT_VALUES or not all(_has_values(x) for x in (*leaves, *tensors_of(call.arguments))):
        return "ran", ""
    for x in leaves:
        if x.numel() <= FEW:
            x.clone()  # every element can be read
    unchanged = {name: x for name, x in call.arguments.items() if name not in target.in_place}
    try:
        assert_equal(_few(unchanged), _few({name: before[name] for name in unchanged}), name="arguments")
        if any(x.numel() > FEW for x in tensors_of(call.arguments)):
            return "ran", ""
        if target.in_place:
            return _right_in_place(call, before, out) if target.reference is not None else ("ran", "")
        if any(isgenerator(x) for x in call.arguments.values()):  # the first call has used it up
            return "ran", ""
        with CONTEXTS[call.context]():
            assert_equal(_few(_called(call, call.arguments)), _few(out), name="second call")
        return _right(call, out) if target.reference is not None else ("ran", "")
    except AssertionError as error:
        return "found", f"wrong value: {error}"


def _converted(call: Call, mode: Any) -> Arguments:
    """Return the arguments as the context asks for them."""
    if call.context == "meta tensors":
        return map_tensors(lambda x: x.to("meta"), call.arguments)
    if call.context == "fake tensors":
        return map_tensors(mode.from_tensor, call.arguments)
    return dict(call.arguments)


def _called(call: Call, arguments: Arguments) -> Any:
    """Return the result of a call, of one entry of a batch of two for vmap."""
    target = call.target
    name = next((name for name in BATCHED if isinstance(arguments.get(name), Tensor)), None)
    if call.context != "vmap" or name is None or not _has_values(arguments[name]):
        return target.function(**arguments)
    batch = torch.stack([arguments[name], arguments[name]])
    out = torch.vmap(lambda x: target.function(**{**arguments, name: x}))(batch)
    return map_tensors(lambda x: x[1], out)


def _few(tree: Any) -> list[Tensor]:
    """Return tensors that are small enough to be compared."""
    return [_plain(x) for x in tensors_of(tree) if x.numel() <= FEW]


def _has_values(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and x.layout == torch.strided and not x.is_nested


def _copy(x: Tensor) -> Tensor:
    return _plain(x) if _has_values(x) and x.numel() <= FEW else x


def _plain(x: Tensor) -> Tensor:
    """Return a contiguous tensor of the same values, without anything special."""
    if not _has_values(x) or x.numel() > FEW:
        return x
    with torch.no_grad():
        return x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _refused(call: Call, error: Exception) -> tuple[str, str]:
    """Return "refused" where the error is of the right type and names an argument."""
    text = str(error)
    if "_kernel<" in text:
        return "found", f"the emulator found: {text}"
    announced = any(_HUGE.search(label) for label in call.changed.values())
    if announced and (isinstance(error, MemoryError) or _NO_MEMORY.search(text)):
        return "memory", text
    names = [*call.arguments, *call.target.parameters, "layout"]
    if "self" in names:  # a layout
        names += [f.name for f in fields(PatchLayout)]
    if isinstance(error, KeyError) and text == "'params'":
        return "refused", text  # torch's optimizers miss the name in a dict
    named = re.match(rf"({'|'.join(map(re.escape, names))})\b", text) is not None
    named = named or any(re.search(rf"\b{re.escape(name)}\b", text) for name in call.changed)
    if isinstance(error, (ValueError, TypeError, NotImplementedError, FileNotFoundError)) and named:
        return "refused", text
    if call.target.raw:
        return "refused", text  # operators must not crash; the public functions explain
    if call.target.lenient or _OF_TORCH.search(text) or type(error).__name__ in _OF_TRACING:
        return "refused", text
    if "layout" in call.changed and call.context in WITHOUT_VALUES:
        return "refused", text  # fakes do not look
    if "positions do not fit into int32" in text:  # CUDA takes one position less than the CPU
        return "refused", text
    if _FIELDS.search(text) and ("layout" in call.changed or "subclass" in call.changed.values()):
        return "refused", text  # the kernels look at what a layout holds, and at the values of subclasses
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/blt_kernels/" in f.filename]
    where = f" at {frames[-1].filename.rpartition('/blt_kernels/')[2]}:{frames[-1].lineno}" if frames else ""
    return "found", f"unnamed {type(error).__name__}{where}: {text}"


def _right(call: Call, out: Any) -> tuple[str, str]:
    """Compare with the reference, in fp64 and in the dtype of the arguments: outputs and gradients."""
    target, arguments = call.target, map_tensors(_plain, call.arguments)
    # Operators convert such ints to floats; references are called without them.
    arguments = {name: float(x) if type(x) is int and abs(x) >= 2**63 else x for name, x in arguments.items()}
    if "cu_seqlens" in call.changed and arguments["cu_seqlens"] is None:
        return "ran", ""  # references always take offsets
    if "layout" in call.changed and any(": " in label for label in call.changed.values()):
        return "ran", ""  # no value is right for garbage in a layout
    if _is_beyond(target.op, arguments):
        return "ran", ""
    case = target.case
    if call.context == "autocast" and case is not None and case.autocast:
        if any(x.dtype == torch.float64 for x in floats_of(arguments)):
            return "ran", ""
        arguments = cast(arguments, torch.bfloat16)
    try:
        truth = _truth(target.reference, arguments)
    except TypeError:  # references take no None that stands for a default
        return "ran", ""
    _compare([out, *truth], "output", arguments)
    differentiates = case is not None and case.differentiable and call.context in ("plain", "deterministic mode")
    # In the gradients of a reference, masked entries count: 0 * inf is NaN.
    if not differentiates or not all((x.abs() < _LARGE).all() for x in floats_of(arguments)):
        return "right", ""
    if any("announces" in label for label in call.changed.values()):
        return "right", ""  # gradients may take more memory than there is
    if any(x.is_inference() for x in tensors_of(call.arguments)):
        return "right", ""  # torch saves no inference tensors
    if any(label.startswith("expanded") or label.endswith("everywhere") for label in call.changed.values()):
        return "right", ""  # large numbers cancel in the gradients of attention to equal keys
    if all(x.is_floating_point() for x in tensors_of({name: arguments[name] for name in case.differentiable})):
        truth = _truth(lambda **given: run(case, case.reference, given)[1], arguments)
        _compare([run(case, case.function, call.arguments)[1], *truth], "gradient", arguments)
    return "right", ""


def _right_in_place(call: Call, before: Arguments, out: Any) -> tuple[str, str]:
    """Compare with the reference what a call returns and what it has changed; `before` are its arguments before it."""
    if call.context == "autocast" or not all(x.isfinite().all() for x in floats_of(before)):
        return "ran", ""

    def reference(**given: Any) -> Any:
        given = map_tensors(Tensor.clone, given)
        assert call.target.reference is not None
        return call.target.reference(**given), [given[name] for name in call.target.in_place]

    _compare(
        [(out, [call.arguments[name] for name in call.target.in_place]), *_truth(reference, before)], "output", before
    )
    return "right", ""


def _is_beyond(op: str, arguments: Arguments) -> bool:
    """Return whether the order of sums and products decides between numbers, infinity and NaN."""
    if op == "ema_scan":
        return not (arguments["p"].abs() <= 2).all()
    if op in ("patch_pool", "patch_unpool", "token_entropy", "entropy_patch", "patch_starts", "ngram_hash_embed"):
        return False
    if any((x.abs() >= _LARGE).any() or x.isnan().any() for x in floats_of(arguments)):
        return True  # with a NaN in v, masked queries of the reference have one too
    return not abs(arguments.get("scale") or 1.0) < _LARGE if op.endswith("attention") else False


def _truth(reference: Callable[..., Any], arguments: Arguments) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results of a reference in the dtype of the arguments, and in fp64.

    In fp64 the first are the truth with the error of fp32, scaled down, as in `op_calls.plain`.
    """
    exact = cast(arguments, torch.float64)
    truth = tensors_of(reference(**exact))
    if not all(x.dtype == torch.float64 for x in floats_of(arguments)):
        return tensors_of(reference(**arguments)), truth
    rough, of_rough = (
        tensors_of(reference(**cast(cast(arguments, torch.float32), d))) for d in (torch.float32, torch.float64)
    )
    scale = 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return [
        t + (r.double() - e).nan_to_num(0, 0, 0) * scale if t.is_floating_point() else t
        for t, r, e in zip(truth, rough, of_rough, strict=True)
    ], truth


def _compare(results: list[Any], name: str, arguments: Arguments) -> None:
    """Assert that integers are equal, and that errors of floats are at most eight times what they may be at best.

    `results` are those of the call, of the reference in its dtype, and the truth. Rounding moves no number by more than
    that; a few numbers tell no more, and `op_calls.check` judges many.
    """
    eps = max((torch.finfo(x.dtype).eps for x in floats_of(arguments)), default=0.0)
    for i, (actual, eager, truth) in enumerate(zip(*map(tensors_of, results), strict=True)):
        where = f"{name} {i}"
        if not actual.is_floating_point():
            assert actual.dtype == eager.dtype, f"{where}: {actual.dtype}, expected {eager.dtype}"
            if not torch.equal(actual, eager):
                assert_equal(actual, truth, name=where)
            continue
        assert actual.shape == truth.shape, f"{where}: shape {list(actual.shape)}, expected {list(truth.shape)}"
        actual, eager, rounded = actual.detach(), eager.detach().to(actual.dtype), truth.detach().to(actual.dtype)
        # A number that only rounding makes finite or not is not compared.
        odd = (rounded.isnan() & eager.isnan()) | (rounded.isinf() & (eager == rounded))
        wrong = odd & (actual != rounded) & ~(actual.isnan() & rounded.isnan())
        finite = rounded.isfinite() & eager.isfinite()
        if finite.any():
            tiny = max(torch.finfo(actual.dtype).tiny, 1e-30)
            values, best, exact = (x[finite].double() for x in (actual, eager, truth.detach()))
            allowed = 8 * float((best - exact).abs().max() + eps * exact.abs().max()) + tiny
            wrong = wrong.masked_scatter(finite, ~((values - exact).abs() <= allowed))
        at = wrong.nonzero()[:1].tolist()
        assert not at, f"{where}: {actual[wrong][0]}, expected {truth[wrong][0]} at {at[0]}"


# --- many of them -----------------------------------------------------------------------------------------------------


def fuzz(numbers: range, only: str = "", deadline: float | None = None) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Run these calls; return how many of each op came to what, and the finds, one of a kind."""
    _targets()  # children share them
    counts: Counter[tuple[str, str]] = Counter()
    finds: dict[str, str] = {}
    for result in workers.run(lambda number: job(number, only), numbers, deadline):
        if "died" in result:  # before there is a call, torch has died making one of its arguments
            made = "op" in result
            result = {"op": ""} | result | {"outcome": "found" if made else "none made", "detail": result["died"]}
        counts[result["op"], result["outcome"]] += 1
        if result["outcome"] == "found":
            kind = f"{result['op']}: {re.sub('[0-9]+', '#', result['detail'])[:120]}"
            finds.setdefault(kind, f"call {result['number']}: {result['call']}: {result['detail']}")
    return counts, list(finds.values())


def main(seconds: float = 60.0, seed: int = 0, only: str = "") -> int:
    """Fuzz for so long, print the counts by op and the finds, and return the number of finds."""
    torch.set_num_threads(1)
    begin = time.monotonic()
    first = seed * 10**7
    counts, finds = fuzz(range(first, first + 10**7), only, begin + seconds)
    outcomes = sorted({outcome for _, outcome in counts})
    print(f"{'op':45}" + "".join(f"{outcome:>12}" for outcome in outcomes))
    for op in sorted({op for op, _ in counts}):
        print(f"{op:45}" + "".join(f"{counts[op, outcome]:12}" for outcome in outcomes))
    print(
        f"{'all ' + str(sum(counts.values())):45}"
        + "".join(f"{sum(n for (_, o), n in counts.items() if o == outcome):12}" for outcome in outcomes)
    )
    print(*finds, sep="\n")
    return len(finds)
