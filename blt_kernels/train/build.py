"""The model that a training run begins as."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from blt_kernels.models import BLT, BLTConfig, ByteLM, MegaByte, load_model, load_patcher
from blt_kernels.models.base import ByteModel
from blt_kernels.models.checkpoint import llama
from blt_kernels.models.config import RULE_FIELDS
from blt_kernels.models.stored_config import config_from_dict
from blt_kernels.train import checks, data
from blt_kernels.train.config import TrainConfig

MODELS: dict[str, type[ByteModel]] = {"entropy": ByteLM, "blt": BLT, "megabyte": MegaByte}


def build_model(config: TrainConfig) -> ByteModel:
    """Return the model that a run begins as: the model in `init`, or a freshly initialised one.

    Raises
    ------
    FileNotFoundError, ValueError
        A file is not there or holds another model, or `init` contradicts another option; the message names it.
    """
    model = _initial_model(config) if config.init is not None else _fresh_model(config)
    if model.config_class is BLTConfig:
        patching = model.config.patching
        data.check_patching("--set patching", patching)
        unread = sorted(config.overrides.keys() & RULE_FIELDS - model.config.patch_rule.keys())
        if unread:
            raise ValueError(f"overrides: {unread[0]}: expected none, since patching {patching!r} does not read it")
        if patching != "entropy" and config.patcher is not None:
            raise ValueError(f"patcher: expected None, since patching is {patching!r}, got {config.patcher}")
    return model


def _fresh_model(config: TrainConfig) -> ByteModel:
    """Return a fresh model. The patcher of a BLT is loaded, and with `init_global` its global transformer too."""
    values = {**_preset(config), **config.overrides}
    if config.model != "blt":
        cls: Any = MODELS[config.model]
        return cls(_config(cls.config_class, values), config.ops)
    if "patcher" in config.overrides:
        raise ValueError("overrides: patcher: expected the option patcher, which gives its configuration too")
    if config.init_global is not None and "global_transformer" not in config.overrides:
        with checks.reading("init_global"):
            values["global_transformer"] = asdict(llama.read_config(config.init_global))
    patcher = None
    if values["patching"] == "entropy":
        patcher = _patcher(config)
        values["threshold"] = config.overrides.get("threshold", patcher.config.threshold)
    model_config = _config(BLTConfig, {**values, "patcher": patcher and asdict(patcher.config)})
    if config.init_global is not None:
        with checks.reading("init_global"):
            llama.check_files(model_config, config.init_global)
    model = BLT(model_config, config.ops)
    if patcher is not None:
        assert model.patcher is not None  # the configuration has one
        model.patcher.load_state_dict(patcher.state_dict())
    if config.init_global is not None:
        with checks.reading("init_global"):
            llama.load_global_transformer(model, config.init_global)
    return model


def _config(cls: type, values: dict[str, Any]) -> Any:
    """Return a configuration; its errors name the option `overrides`."""
    try:
        return config_from_dict(cls, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"overrides: {error}") from error


def _initial_model(config: TrainConfig) -> ByteModel:
    """Return the model in `init`, in fp32: a BLT with its own patcher, unless `patcher` is given."""
    assert config.init is not None
    cls = MODELS[config.model]
    with checks.reading("init"):
        model = load_model(config.init, config.ops, dtype=torch.float32)
    if type(model) is not cls:
        expected, got = cls.__name__, type(model).__name__
        raise ValueError(f"init: expected a {expected}, since model is {config.model!r}, got a {got} in {config.init}")
    given = dict(config.overrides)
    if isinstance(model, BLT) and model.config.patching == "entropy":
        if config.patcher is not None:
            model.patcher = _patcher(config).requires_grad_(False)
            threshold = config.overrides.get("threshold", model.patcher.config.threshold)
            model.config = replace(model.config, patcher=model.patcher.config, threshold=threshold)
        elif model.patcher is None:
            raise ValueError(f"patcher: expected an entropy model, since there is none in {config.init}, got None")
    if config.preset is not None:
        preset = _preset(config)
        given = {**{name: preset[name] for name in preset if name not in ("threshold", "patcher")}, **given}
    wanted = _config(type(model.config), {**asdict(model.config), **given})
    for name in given:
        has, want = getattr(model.config, name), getattr(wanted, name)
        if has != want:
            option = f"--set {name}" if name in config.overrides else f"preset {config.preset!r}: {name}"
            raise ValueError(f"{option}: expected {has!r}, as in {config.init}, got {want!r}")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the parameter may be the mapped file
    return model


def _preset(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of the configuration that `preset` names."""
    config_class: Any = MODELS[config.model].config_class
    return asdict(config_class() if config.preset == "paper" else config_class.small())


def _patcher(config: TrainConfig) -> ByteLM:
    if config.patcher is None:
        return ByteLM.bundled(config.ops)
    with checks.reading("patcher"):
        return load_patcher(config.patcher, config.ops)
