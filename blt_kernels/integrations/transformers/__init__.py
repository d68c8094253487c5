"""One line puts the ops under transformers' BLT: ``blt_kernels.integrations.transformers.apply()``.

It takes transformers 5.17 to 5.24, and checks the parameters of the functions that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from blt_kernels import _checks
from blt_kernels.integrations._applied import Applied, check_parameters, has_own, stock, version_of
from blt_kernels.integrations.transformers import attention as _attention
from blt_kernels.integrations.transformers.embedding import hash_embeddings
from blt_kernels.integrations.transformers.forward import Options, model_forward
from blt_kernels.integrations.transformers.norms import norm
from blt_kernels.integrations.transformers.patching import lengths_from_entropies, patcher_forward
from blt_kernels.integrations.transformers.pooling import patch_reduce
from blt_kernels.integrations.transformers.signatures import PARAMETERS
from blt_kernels.integrations.transformers.signatures import REPLACES as REPLACES

if TYPE_CHECKING:
    from blt_kernels.integrations.transformers.cache import BltCache

__all__ = ["BltCache", "apply"]


def apply(
    model: Any = None,
    *,
    attention: bool = True,
    cross_attention: bool = True,
    hash_embedding: bool = True,
    pooling: bool = True,
    patching: bool = True,
    norms: bool = False,
    cache: bool = True,
    compare: str = "fp32",
) -> Applied:
    """Put the ops under transformers' BLT.

    Parameters
    ----------
    model : torch.nn.Module, optional
        A BLT of transformers, or a module that holds one, as PEFT and DDP do: only this one is changed. If None, the
        classes are, and so every BLT, made before or after.
    attention : bool
        Self-attention of patcher, encoder, global transformer and decoder.
    cross_attention, hash_embedding, pooling : bool
        The op of this name.
    patching : bool
        Entropies and patch boundaries.
    norms : bool
        RMSNorm. In 16 bits it rounds once, where transformers rounds twice.
    cache : bool
        `BltCache`: ``generate()``, and any forward without gradients, keeps what it computed of the bytes before.
    compare : "fp32" or "model"
        Entropies are compared with the threshold in fp32, or in the dtype of the model. With "model", transformers
        itself computes the entropies, so that every decision is its own in 16 bits too.

    Returns
    -------
    Applied
        `report` says what is replaced and what fell back, `undo` puts everything back. A context manager. A copy of a
        changed model is changed as well, and stays so. A pickled one is loaded with the methods of transformers as its
        own attributes: ``apply(model)`` replaces them, and ``apply()`` does not.

    Raises
    ------
    ImportError
        transformers is not installed, or has no BLT.
    TypeError
        This version of transformers has other parameters than its replacements know, or `model` holds no BLT, or one
        with methods of a subclass in place of those to replace. ``apply()`` leaves such methods in place. Or an option
        is no bool.
    ValueError
        `compare` is neither "fp32" nor "model".

    Notes
    -----
    Rows of a batch with an `attention_mask` compute what their real ids compute alone, which transformers does not.
    The report has a line for whatever is left to transformers: dropout in training, attention weights, masks that are
    not ``[B, S]``, and tables that are no plain ``nn.Embedding``, whose lookups are left to their modules.

    "blt_kernels" becomes an ``attn_implementation`` of transformers, for models that nothing else is applied to.

    Examples
    --------
    >>> from transformers.models.blt import BltConfig, BltForCausalLM
    >>> from blt_kernels.integrations.transformers import apply
    >>> part = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    >>> local = {**part, "hidden_size_global": 64}
    >>> parts = {"patcher_config": part, "encoder_config": local, "decoder_config": local}
    >>> parts["global_config"] = {**part, "hidden_size": 64}
    >>> model = BltForCausalLM(BltConfig(encoder_hash_byte_group_vocab=53, **parts))
    >>> with apply(model) as applied:
    ...     logits = model(torch.randint(4, 260, (1, 9)), use_cache=False).logits
    >>> logits.shape, applied.report().replaced["BltModel.forward"]
    (torch.Size([1, 9, 260]), 1)
    """
    for name, option in (
        ("attention", attention), ("cross_attention", cross_attention), ("hash_embedding", hash_embedding),
        ("pooling", pooling), ("patching", patching), ("norms", norms), ("cache", cache),
    ):  # fmt: skip
        _checks.check_bool(name, option)
    _checks.check_choice("compare", compare, ("fp32", "model"))
    import transformers
    from transformers.models.blt import modeling_blt as modeling

    code_base = f"transformers {version_of(transformers)}"
    for path, expected in PARAMETERS.items():
        check_parameters(_found(modeling, path), expected, code_base)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if model is not None and not any(isinstance(module, modeling.BltModel) for module in modules):
        raise TypeError(f"model: expected a BLT of {code_base}, or a module that holds one, got {type(model).__name__}")
    applied = Applied(code_base)

    def replace(path: str, make: Callable[[Any], Any], static: bool = False) -> None:
        """Replace a method, of the class or of the instances that the model holds, by what is made of the stock one."""
        cls, name = getattr(modeling, path.split(".")[0]), path.split(".")[1]
        new = make(stock(cls, name))
        new.__name__ = name  # pickle stores bound methods by name
        new.is_replacement = True
        if model is None:
            applied.replace(cls, name, staticmethod(new) if static else new)
        bound = _without_self(new) if static else new
        for owner in _instances(model, cls):
            # accelerate keeps the forward that its hooks surround under another name.
            own = "_old_forward" if "_old_forward" in vars(owner) and name == "forward" else name
            if own == name and has_own(owner, cls, name):
                applied.undo()
                got = f"{type(owner).__name__} with a {name} of its own"
                raise TypeError(f"model: expected the {path} of {code_base} in it, got {got}")
            applied.replace(owner, own, MethodType(bound, owner))
        applied.add_label(path)

    embed = stock(modeling, "compute_hash_embeddings")
    if hash_embedding:
        embed = hash_embeddings(applied, embed)
        applied.add_label("compute_hash_embeddings")
        if model is None:
            applied.replace(modeling, "compute_hash_embeddings", embed)
    options = Options(applied, modeling, attention, cross_attention, pooling, patching, compare, embed)
    if attention:
        replace("BltSelfAttention.forward", lambda old: _attention.self_attention(applied, modeling, old))
        _attention.register()
    if cross_attention:
        replace("BltCrossAttention.forward", lambda old: _attention.cross_attention(applied, old))
    if pooling:
        replace("BltLocalEncoder.patch_reduce", lambda old: patch_reduce(applied, old))
    if patching:
        replace(
            "BltPatcher.patch_lengths_from_entropies",
            lambda old: lengths_from_entropies(applied, old, compare),
            static=True,
        )
    if (attention or patching) and compare == "fp32":
        replace("BltPatcher.forward", lambda old: patcher_forward(applied, modeling, old, attention, patching))
    if norms:
        replace("BltRMSNorm.forward", lambda old: norm(applied, old))
    if cache:
        from blt_kernels.integrations.transformers.caching import Caching  # imports transformers

        caching = Caching(applied, compare)
        replace("BltModel.forward", lambda old: caching.forward(model_forward(options, old)))
        replace("BltForCausalLM._prepare_cache_for_generation", caching.preparation)
    else:
        replace("BltModel.forward", lambda old: model_forward(options, old))
    return applied


def __getattr__(name: str) -> Any:
    """Import `BltCache` when it is first used: it needs transformers, whose import takes seconds."""
    if name != "BltCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blt_kernels.integrations.transformers.cache import BltCache

    return BltCache


def _without_self(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


def _found(modeling: Any, path: str) -> Any:
    """Return a function or method of transformers without any replacement."""
    owner, _, name = path.rpartition(".")
    return stock(getattr(modeling, owner) if owner else modeling, name)


def _instances(model: Any, cls: type) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, cls)) if model is not None else iter(())
