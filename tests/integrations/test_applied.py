"""Applied: attributes of other code bases are replaced and come back as they were."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch

from blt_kernels.integrations import _applied
from blt_kernels.integrations._applied import Applied, check_parameters, stock


def theirs() -> types.ModuleType:
    """Return a stand-in for a module of another code base."""
    module = types.ModuleType("theirs")

    class Base:
        def inherited(self) -> str:
            return "stock"

    class Layer(Base):
        @staticmethod
        def fixed() -> str:
            return "stock"

        def own(self) -> str:
            return "stock"

    module.Layer, module.function = Layer, lambda: "stock"  # type: ignore[attr-defined]
    return module


def test_undo_brings_back_the_same_objects() -> None:
    module, slots = theirs(), set(_applied._SLOTS)
    layer, model = module.Layer, module.Layer()
    before = [dict(vars(owner)) for owner in (module, layer, model)]
    applied = Applied("theirs 1.0")
    applied.replace(module, "function", lambda: "ours")
    applied.replace(layer, "inherited", lambda self: "ours")
    applied.replace(layer, "fixed", staticmethod(lambda: "ours"))
    applied.replace(layer, "own", lambda self: "ours")
    applied.replace(model, "own", types.MethodType(lambda self: "bound", model))
    assert [module.function(), model.inherited(), layer.fixed(), model.own()] == ["ours", "ours", "ours", "bound"]
    assert module.Layer().own() == "ours"
    applied.undo()
    applied.undo()
    for owner, values in zip((module, layer, model), before, strict=True):
        assert dict(vars(owner)) == values
        assert all(vars(owner)[name] is value for name, value in values.items())
    assert set(_applied._SLOTS) <= slots


@pytest.mark.parametrize("first", [0, 1])
def test_applied_twice(first: int) -> None:
    """The newest is in place, whichever is undone first the other one stays, and neither wraps the other."""
    layer = theirs().Layer
    own = layer.own
    both = [Applied("theirs 1.0"), Applied("theirs 1.0")]
    for number, applied in enumerate(both):
        applied.replace(layer, "own", lambda self, number=number: number)
        assert layer().own() == number
        assert stock(layer, "own") is own
        assert stock(layer(), "own")() == "stock"
    both[first].undo()
    assert layer().own() == 1 - first
    both[1 - first].undo()
    assert layer.own is own
    assert stock(layer, "own") is own


def test_one_applied_replaces_twice() -> None:
    layer = theirs().Layer
    own = layer.own
    with Applied("theirs 1.0") as applied:
        applied.replace(layer, "own", lambda self: 1)
        applied.replace(layer, "own", lambda self: 2)
        assert layer().own() == 2
    assert layer.own is own


def test_what_others_set_since_stays() -> None:
    model = theirs().Layer()
    applied = Applied("theirs 1.0")
    applied.replace(model, "own", lambda: "ours")
    wrapped = lambda: "hook"  # noqa: E731
    model.own = wrapped
    applied.undo()
    assert model.own is wrapped


def test_an_error_undoes() -> None:
    layer = theirs().Layer

    def fail() -> None:
        with Applied("theirs 1.0") as applied:
            applied.replace(layer, "own", lambda self: "ours")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert layer().own() == "stock"


def test_models_are_not_kept_alive() -> None:
    model, slots = torch.nn.Linear(2, 2), set(_applied._SLOTS)
    applied = Applied("torch")
    applied.replace(model, "forward", types.MethodType(applied.counted("Linear", torch.nn.Linear.forward), model))
    assert model(torch.zeros(1, 2)).shape == (1, 2)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert set(_applied._SLOTS) <= slots
    applied.undo()
    assert applied.report().replaced == {"Linear": 1}


def test_report() -> None:
    layer = theirs().Layer
    applied = Applied("theirs 1.0")
    applied.replace(layer, "own", applied.counted("Layer.own", lambda self: "ours"))
    report = applied.report()
    for _ in range(2):
        layer().own()
        applied.fell_back("Layer.own", "dropout")
    assert report.replaced == {"Layer.own": 0}
    assert applied.report().replaced == {"Layer.own": 2}
    assert applied.report().fell_back == {("Layer.own", "dropout"): 2}
    assert "left to theirs: Layer.own, 2 times: dropout" in str(applied.report())
    applied.undo()
    assert "undone" in str(applied.report())
    assert not applied.report().active


def test_unknown_parameters_are_an_error() -> None:
    def forward(self, x, mask=None, *args, new=1, **kwargs): ...

    check_parameters(forward, ["self", "x", "mask", "new"], "theirs 1.0")
    with pytest.raises(TypeError, match=r"forward of theirs 2\.0: expected .*\(self, x, mask\).*got .*new"):
        check_parameters(forward, ["self", "x", "mask"], "theirs 2.0")
