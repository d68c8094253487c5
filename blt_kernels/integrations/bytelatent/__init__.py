"""One line puts the ops under facebookresearch/blt: ``blt_kernels.integrations.bytelatent.apply()``.

Names and parameters are those of commit 9774ed4. A function is replaced in every module of the code base that has
imported it by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from blt_kernels import _checks
from blt_kernels.integrations._applied import Applied, check_parameters, stock
from blt_kernels.integrations.bytelatent import attention as _attention
from blt_kernels.integrations.bytelatent import encoder, xformers
from blt_kernels.integrations.bytelatent import patching as _patching
from blt_kernels.integrations.bytelatent.replacement import Function, Place

__all__ = ["apply"]

# These modules define what is replaced, or import it by name.
MODULES = (
    "base_transformer", "data.patcher", "distributed", "model.blt", "model.latent_transformer", "model.local_models",
    "model.utils", "transformer",
)  # fmt: skip
NO_RECOMPUTE = "distributed.default_no_recompute_ops"


@dataclass(frozen=True)
class Replacement:
    """Says what `apply` replaces.

    Attributes
    ----------
    path : module, class and function, without "bytelatent."
    option : the argument of `apply` that turns it off
    by : the op, or whatever else computes it
    make : returns the replacement
    parameters : those of the stock function
    """

    path: str
    option: str
    by: str
    make: Callable[[Place], Function]
    parameters: tuple[str, ...]


REPLACEMENTS = (
    Replacement(
        "model.utils.create_causal_mask", "attention", "documents and windows without a matrix",
        _attention.create_causal_mask,
        ("seqlen", "attn_impl", "attn_bias_type", "eos_id", "tokens", "sliding_window"),
    ),
    Replacement(
        "base_transformer.Attention.forward", "attention", "block_causal_attention", _attention.attention_forward,
        ("self", "x", "freq_cis", "tok_idx", "mask", "attn_impl"),
    ),
    Replacement(
        "model.blt.cross_attn_mask", "attention", "PatchLayout", _attention.cross_attn_mask,
        ("patch_ids", "patch_lengths", "N", "patches_as_queries", "cross_attn_k", "window", "block_mask"),
    ),
    Replacement(
        "model.latent_transformer.CrossAttention.forward", "attention", "patch_cross_attention",
        _attention.cross_attention_forward, ("self", "x", "kv", "mask"),
    ),
    Replacement(
        "model.blt.compute_hash_embeddings", "hash_embedding", "ngram_hash_embed", encoder.compute_hash_embeddings,
        ("local_encoder_tokens", "local_encoder", "encoder_hash_tok_embedding", "encoder_hash_byte_group_nb_functions",
         "encoder_hash_byte_group_size", "encoder_hash_byte_group_vocab"),
    ),
    Replacement(
        "model.utils.pooling_downsample", "pooling", "patch_pool", encoder.pooling_downsample,
        ("h", "max_num_patches", "pooling_mode", "patch_ids"),
    ),
    Replacement("data.patcher.entropy", "patching", "token_entropy", _patching.entropy, ("scores",)),
    Replacement(
        "data.patcher.calculate_entropies", "patching", "the entropy model, without padding of short rows",
        _patching.calculate_entropies,
        ("tokens", "entropy_model", "patching_batch_size", "device", "enable_grad"),
    ),
    Replacement(
        "data.patcher.Patcher.patch", "patching", "patch_starts, space_patch", _patching.patch,
        ("self", "tokens", "include_next_token", "preds", "entropies", "threshold"),
    ),
    Replacement(
        "model.blt.patch_ids_from_lengths", "patching", "torch.searchsorted", _patching.patch_ids_from_lengths,
        ("patch_lengths", "seq_len"),
    ),
)  # fmt: skip
# Maps what `apply` replaces to what computes it.
REPLACES = {replacement.path: replacement.by for replacement in REPLACEMENTS} | {NO_RECOMPUTE: "the same and our ops"}


def apply(
    *,
    attention: bool = True,
    hash_embedding: bool = True,
    pooling: bool = True,
    patching: bool = True,
    stand_in_for_xformers: bool = True,
) -> Applied:
    """Put the ops under facebookresearch/blt, for every model, made before or after.

    Parameters
    ----------
    attention : bool
        Self-attention and cross attention. With ``attn_impl`` "xformers" or "blt_kernels", a new name for the same,
        attention stays within documents and windows, on every device. "flex_attention" and "sdpa" stay what they are
        there: causal attention along the whole row.
    hash_embedding, pooling : bool
        The sum of the byte and hash embeddings; pooling of bytes to patches.
    patching : bool
        Entropies, boundaries by entropy and at spaces, and the patch ids of bytes. An entropy model runs on rows of
        fewer than 8192 bytes without padding.
    stand_in_for_xformers : bool
        Where xformers is not installed, without which the code base does not import, make ``import xformers`` give a
        stand-in for the names that it needs. It stays after `undo`.

    Returns
    -------
    Applied
        `report` says what is replaced and what fell back, `undo` puts everything back; it is a context manager, too.
        Modules of the code base that are imported before `undo` import the replacements, and keep them.

    Raises
    ------
    ModuleNotFoundError
        facebookresearch/blt cannot be imported: its folder is not in ``sys.path``, or it or a package that it imports
        is not installed.
    TypeError
        A function has other parameters than at commit 9774ed4; the message names it. Or an option is no bool.

    Examples
    --------
    ::

        from blt_kernels.integrations import bytelatent

        applied = bytelatent.apply()
        print(applied.report())
    """
    options = {"attention": attention, "hash_embedding": hash_embedding, "pooling": pooling, "patching": patching}
    for name, option in {**options, "stand_in_for_xformers": stand_in_for_xformers}.items():
        _checks.check_bool(name, option)
    if stand_in_for_xformers and find_spec("xformers") is None:
        xformers.install()
    modules = {name: import_module(f"bytelatent.{name}") for name in MODULES}
    code_base = f"facebookresearch/blt {_version()}"
    for replacement in REPLACEMENTS:
        owner, name, _ = _found(modules, replacement.path)
        check_parameters(stock(owner, name), replacement.parameters, code_base)
    applied = Applied(code_base)
    for replacement in REPLACEMENTS:
        if not options[replacement.option]:
            continue
        owner, name, home = _found(modules, replacement.path)
        theirs = stock(owner, name)
        applied.add_label(replacement.path)
        new = replacement.make(Place(applied, replacement.path, theirs, home, modules))
        for place in [owner] if isinstance(owner, type) else _holders(name, theirs):
            applied.replace(place, name, new)
    if attention:
        distributed, name, ops = modules["distributed"], NO_RECOMPUTE.split(".")[1], torch.ops.blt_kernels
        kept = {ops.block_causal_attention_fwd.default, ops.patch_cross_attention_fwd.default}
        applied.replace(distributed, name, stock(distributed, name) | kept)
    return applied


def _found(modules: dict[str, ModuleType], path: str) -> tuple[Any, str, ModuleType]:
    """Return the owner of what is replaced, a module or a class, its name there, and its module."""
    home = next(name for name in modules if path.startswith(f"{name}.") and path[len(name) + 1 :].count(".") < 2)
    *classes, name = path.removeprefix(f"{home}.").split(".")
    return reduce(getattr, classes, modules[home]), name, modules[home]


def _holders(name: str, theirs: Any) -> Iterator[ModuleType]:
    """Yield the modules of the code base that have a function under its name, in place or replaced."""
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "bytelatent" and name in vars(module) and stock(module, name) is theirs:
            yield module


def _version() -> str:
    try:
        return version("bytelatent")
    except PackageNotFoundError:
        return "of unknown version"
