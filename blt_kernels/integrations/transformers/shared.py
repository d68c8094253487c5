"""A `blt_kernels` BLT of the parameters of a transformers ``BltModel``: one set of weights, read by both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.blt import modeling_blt

from blt_kernels.integrations._applied import has_own
from blt_kernels.integrations.transformers.patching import has_windows
from blt_kernels.models import BLT
from blt_kernels.models.checkpoint.fields import Values
from blt_kernels.models.checkpoint.transformers import read_blt
from blt_kernels.nn.matrices import Linear

# Fields of the configuration that a user may set on a model that exists. The others are sizes.
_RULES = ("patching_mode", "patching_threshold", "patch_size", "patch_in_forward", "max_patch_length",
          "local_attention_window_len")  # fmt: skip


class NotSharedError(Exception):
    """The parameters cannot be shared. The message is the reason that reports give."""


class SharedBLT:
    """Keeps the BLT of one ``BltModel``. It refers to the model's own parameters, so updates in place take effect.

    Parameters
    ----------
    compare : "fp32" or "model"
        As in `apply`.
    """

    def __init__(self, compare: str) -> None:
        self.compare = compare
        self.blt: BLT | None = None
        self.seen: object = None  # what `blt` was made for, apart from modules and parameters
        self.links: list[tuple[dict[str, Any], str, Any]] = []

    def get(self, model: Any, begins: bool) -> BLT:
        """Return the BLT. It is made anew after a parameter or a module was replaced.

        Parameters
        ----------
        model : BltModel
        begins : bool
            Whether a text begins: only then are rules of patching, hooks and dtypes compared with those before.

        Raises
        ------
        NotSharedError
        """
        table = model.local_encoder.embed_tokens.weight
        stale = self.blt is None or any(held.get(name) is not value for held, name, value in self.links)
        if not stale and self.blt is not None:
            own = self.blt.lm_head.weight
            stale = (own.dtype, own.device) != (table.dtype, table.device)
        if begins:
            kinds = [(p.dtype, p.device) for p in model.parameters()]
            seen = [getattr(model.config, name) for name in _RULES], _hooked(model), kinds
            stale, self.seen = stale or seen != self.seen, seen
        if self.blt is None or stale:
            self.blt = None
            blt = _refer(_new_blt(model), model)
            if self.compare == "model":
                _compare_as_transformers(blt, table.dtype)
            self.blt, self.links = blt, list(_links(model))
        return self.blt


def _links(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield what holds each module and each parameter: a dict and a key."""
    for module in model.modules():
        for held in (module._modules, module._parameters):
            for name, value in held.items():
                yield held, name, value


def _hooked(model: nn.Module) -> list[str]:
    """Return the names of modules with hooks, apart from those by which transformers captures outputs."""
    names = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        own = any("output_capturing" not in getattr(hook, "__module__", "") for hook in hooks)
        if own or "_hf_hook" in vars(module):  # accelerate's hooks replace `forward`
            names.append(name)
    return names


def _new_blt(model: Any) -> BLT:
    """Return a BLT of the same configuration on the meta device."""
    # BltForCausalLM keeps the head, and transformers knows no documents.
    values = {**model.config.to_dict(), "tie_word_embeddings": False, "split_documents": False}
    patcher = {**(values.get("patcher_config") or {}), "split_documents": False}
    if not has_windows(modeling_blt):
        values["local_attention_window_len"] = patcher["sliding_window"] = None
    values["patcher_config"] = patcher
    try:
        config = read_blt(Values(Path("config"), "", values))
        with torch.device("meta"):
            return BLT(config).eval()
    except ValueError as error:
        raise NotSharedError(str(error)) from error


def _refer(blt: BLT, model: Any) -> BLT:
    """Make `blt` refer to the parameters of `model`, and to its modules where they are no plain ``nn.Linear``."""
    parts, hooked = dict(model.named_modules()), _hooked(model)
    for name, theirs in parts.items():
        # BltModel's forward surrounds the cache. Modules with parameters or hooks of accelerate are checked below.
        if name and not theirs._parameters and "_hf_hook" not in vars(theirs):
            cls = next((c for c in type(theirs).__mro__ if c.__module__ == modeling_blt.__name__), None)
            if cls is not None and has_own(theirs, cls, "forward"):
                raise NotSharedError(f"{name}: expected the forward of {cls.__name__}, got one of its own")
    kinds = set()
    for name, ours in list(blt.named_modules()):
        if not ours._parameters or name == "lm_head":
            continue
        theirs = parts.get(name)
        if theirs is None:
            raise NotSharedError(f"{name}: expected a module of this name, found none")
        if name in hooked or not _is_plain(theirs):
            if "_hf_hook" in vars(theirs) or not isinstance(ours, Linear):
                raise NotSharedError(f"{name}: expected a plain module without hooks, got {type(theirs).__name__}")
            parent, _, own = name.rpartition(".")
            blt.get_submodule(parent)._modules[own] = theirs
            continue
        weight = theirs._parameters["weight"]
        if type(weight) is not nn.Parameter or weight.is_meta:
            got = "one on the meta device" if weight is not None and weight.is_meta else type(weight).__name__
            raise NotSharedError(f"{name}.weight: expected a plain parameter, got {got}")
        ours._parameters["weight"] = weight
        kinds.add((weight.device, weight.dtype))
    called = {name for name, module in blt.named_modules() if module is parts.get(name)}
    ignored = [name for name in hooked if not any(name == c or name.startswith(f"{c}.") for c in called)]
    if ignored:
        raise NotSharedError(f"{ignored[0] or 'BltModel'}: expected no hooks, found some")
    if len(kinds) > 1:
        got = " and ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise NotSharedError(f"parameters: expected one dtype on one device, got {got}")
    ((device, dtype),) = kinds
    # A state has the dtype and the device of the head, and calls it where it computes a row anew.
    head = torch.zeros(1, blt.config.decoder.dim, device=device, dtype=dtype)
    blt.lm_head.weight = nn.Parameter(head, requires_grad=False)
    return blt


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module computes what its parameter ``weight`` says, and nothing else."""
    known = type(module) in (nn.Linear, nn.Embedding, modeling_blt.BltRMSNorm)
    return known and module._parameters.get("bias") is None and "weight" in module._parameters


def _compare_as_transformers(blt: BLT, dtype: torch.dtype) -> None:
    """Compare entropies with the threshold as transformers does: both rounded to the dtype of the model."""
    blt.config = replace(blt.config, threshold=torch.tensor(blt.config.threshold, dtype=dtype).item())
    blt.ops = SimpleNamespace(**{**vars(blt.ops), "token_entropy": _entropy_in_model_dtype})


def _entropy_in_model_dtype(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()
