"""facebookresearch/blt with the ops under it, beside an oracle and beside itself.

The modules are stand-ins of the same names and signatures, in tests/stand_ins/bytelatent.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import oracle_bytelatent
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from blt_kernels.integrations import bytelatent
from blt_kernels.integrations.bytelatent import xformers as stand_in

pytestmark = pytest.mark.skipif(find_spec("xformers") is not None, reason="the tests are of the stand-in for xformers")
STAND_INS = Path(__file__).parents[1] / "stand_ins"
EOS = 2


class CodeBase:
    """The modules by their names without "bytelatent.", with "_" for a dot."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(f"bytelatent.{name.replace('_', '.', 1) if name[0] in 'dm' else name}")


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("bytelatent", "xformers")]:
        del sys.modules[name]


@pytest.fixture
def code_base(monkeypatch: pytest.MonkeyPatch) -> Iterator[CodeBase]:
    forget()
    monkeypatch.syspath_prepend(str(STAND_INS))
    yield CodeBase()
    forget()


# --- models -----------------------------------------------------------------------------------------------------------


def arguments(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "vocab_size": 260,
            "dim_global": 24,
            "dim_local_encoder": 16,
            "dim_local_decoder": 16,
            "n_layers_global": 2,
            "n_layers_local_encoder": 2,
            "n_layers_local_decoder": 2,
            "n_heads_global": 3,
            "n_heads_local_encoder": 2,
            "n_heads_local_decoder": 2,
            "cross_attn_nheads": 4,
            "cross_attn_k": 2,
            "cross_attn_window_encoder": None,
            "cross_attn_window_decoder": None,
            "cross_attn_all_layers_encoder": False,
            "cross_attn_all_layers_decoder": True,
            "encoder_hash_byte_group_size": [3, 4],
            "encoder_hash_byte_group_nb_functions": 2,
            "encoder_hash_byte_group_vocab": 53,
            "downsampling_by_pooling": "max",
            "local_attention_window_len": 5,
            "attn_impl": "xformers",
            "attn_bias_type": "block_causal",
            "norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "eos_id": EOS,
            **changed,
        }
    )


def model_of(code_base: CodeBase, dtype: torch.dtype = torch.float64, **changed: Any) -> nn.Module:
    torch.manual_seed(0)
    model = code_base.model_blt.ByteLatentTransformer(arguments(**changed)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.2)
    return model


def ragged(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Return ids with an EOS inside of rows and at an end, and patch lengths that sum to S + 1 and differ in number."""
    chosen = random.Random(size)
    lengths = []
    for row in range(rows):
        parts = [1]
        while (left := size + 1 - sum(parts)) > 0:
            parts.append(min(left, chosen.randint(1, 3 + 3 * row)))
        lengths.append(parts)
    tokens = torch.randint(4, 260, (rows, size), generator=torch.Generator().manual_seed(size))
    tokens[0, size // 3], tokens[-1, -1] = EOS, EOS
    width = max(map(len, lengths))
    return tokens, torch.tensor([parts + [0] * (width - len(parts)) for parts in lengths])


def gradients(model: nn.Module, logits: Tensor) -> list[Tensor]:
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad((logits * weights).sum(), list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if x is None else x for x, p in zip(found, model.parameters(), strict=True)]


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "new_name": {"attn_impl": "blt_kernels", "attn_bias_type": "causal", "cross_attn_all_layers_encoder": True},
    "windows": {"cross_attn_k": 1, "cross_attn_window_encoder": 2, "cross_attn_window_decoder": 3},
    "first_layer": {"cross_attn_k": 4, "cross_attn_all_layers_decoder": False, "local_attention_window_len": 1},
    "eight_vectors": {"cross_attn_k": 8, "local_attention_window_len": 100},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_the_oracle(code_base: CodeBase, name: str) -> None:
    """Compare with the oracle, one row at a time: in fp64, where rounding hides nothing, and in fp32 within 1e-5."""
    applied = bytelatent.apply()
    for size in (1, 2, 3, 23):
        model = model_of(code_base, **CONFIGS[name])
        tokens, lengths = ragged(2, size)
        state = dict(model.named_parameters())
        expected = torch.stack(
            [
                oracle_bytelatent.blt_logits(state, vars(model.args), row, [n for n in parts if n])
                for row, parts in zip(tokens.tolist(), lengths.tolist(), strict=True)
            ]
        )
        logits = model(tokens, lengths)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        exact = gradients(model, expected)
        for actual, wanted in zip(gradients(model, logits), exact, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-8)
        model.float()
        logits = model(tokens, lengths)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
        actual, wanted = (torch.cat([x.flatten() for x in every]) for every in (gradients(model, logits), exact))
        assert float((actual - wanted).norm()) <= 1e-5 * float(wanted.norm())
    report = applied.report()
    assert not report.fell_back
    assert not [path for path, calls in report.replaced.items() if not calls and not path.startswith("data.")]


def test_a_model_is_what_it_is_without_documents(code_base: CodeBase) -> None:
    """The code base itself, on its dense masks: causal attention of sdpa, padded rows, every part."""
    bytelatent.apply().undo()
    model = model_of(code_base, attn_impl="sdpa", attn_bias_type="causal", downsampling_by_pooling="max")
    tokens, lengths = ragged(3, 20)
    expected = model(tokens, lengths)
    with bytelatent.apply() as applied:
        torch.testing.assert_close(model(tokens, lengths), expected)
    assert not applied.report().fell_back
    assert torch.equal(model(tokens, lengths), expected)
    for option in ("attention", "hash_embedding", "pooling", "patching"):
        with bytelatent.apply(**{option: False}) as applied:
            torch.testing.assert_close(model(tokens, lengths), expected)
        absent = {entry.path for entry in bytelatent.REPLACEMENTS if entry.option == option}
        assert set(applied.report().replaced) == set(bytelatent.REPLACES) - absent - {bytelatent.NO_RECOMPUTE}


def test_an_entropy_model_keeps_its_documents_and_window(code_base: CodeBase) -> None:
    bytelatent.apply()
    args = arguments(
        dim=16, n_layers=2, n_heads=2, attn_bias_type="local_block_causal", sliding_window=4, attn_impl="xformers"
    )
    torch.manual_seed(0)
    model = code_base.transformer.LMTransformer(args).double()
    tokens, _ = ragged(2, 19)
    expected = [oracle_bytelatent.byte_lm_logits(model.state_dict(), vars(args), row) for row in tokens.tolist()]
    torch.testing.assert_close(model(tokens), torch.stack(expected))


# --- what is replaced -------------------------------------------------------------------------------------------------


def attributes(code_base: CodeBase) -> dict[tuple[str, str], Any]:
    """Return everything in the modules and classes of the code base."""
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "bytelatent"}
    found = {(name, key): value for name, module in modules.items() for key, value in vars(module).items()}
    classes = {value for value in found.values() if isinstance(value, type) and value.__module__ in modules}
    return found | {(cls.__qualname__, key): value for cls in classes for key, value in vars(cls).items()}


def changed(before: dict[tuple[str, str], Any], code_base: CodeBase) -> set[str]:
    after = attributes(code_base)
    return {f"{owner}.{name}".removeprefix("bytelatent.") for owner, name in after if after[owner, name] is not
            before.get((owner, name))}  # fmt: skip


EVERY_PLACE = {
    "Attention.forward",
    "CrossAttention.forward",
    "Patcher.patch",
    "data.patcher.calculate_entropies",
    "data.patcher.entropy",
    "distributed.default_no_recompute_ops",
    "model.blt.compute_hash_embeddings",
    "model.blt.cross_attn_mask",
    "model.blt.patch_ids_from_lengths",
    "model.latent_transformer.create_causal_mask",
    "model.local_models.create_causal_mask",
    "model.utils.create_causal_mask",
    "model.utils.pooling_downsample",
    "transformer.create_causal_mask",
}


def test_every_copy_is_replaced_and_comes_back(code_base: CodeBase) -> None:
    bytelatent.apply().undo()
    before = attributes(code_base)
    first = bytelatent.apply()
    assert changed(before, code_base) == EVERY_PLACE
    second = bytelatent.apply()
    assert changed(before, code_base) == EVERY_PLACE
    first.undo()
    assert changed(before, code_base) == EVERY_PLACE
    second.undo()
    assert changed(before, code_base) == set()


@pytest.mark.parametrize("entry", bytelatent.REPLACEMENTS, ids=lambda entry: entry.path)
def test_other_parameters_are_an_error_that_names_them(
    code_base: CodeBase, entry: bytelatent.Replacement, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytelatent.apply().undo()
    *path, name = entry.path.split(".")
    is_method = path[-1][0].isupper()
    owner: Any = importlib.import_module(".".join(["bytelatent", *path[: len(path) - is_method]]))
    owner = getattr(owner, path[-1]) if is_method else owner
    before = attributes(code_base)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, lambda self, something_new: None)
        with pytest.raises(TypeError, match=r"of facebookresearch/blt .*got \(self, something_new\)"):
            bytelatent.apply()
    assert changed(before, code_base) == set()


def test_options_that_are_no_bools() -> None:
    for option in ("attention", "hash_embedding", "pooling", "patching", "stand_in_for_xformers"):
        with pytest.raises(TypeError, match=f"^{option}: expected True or False, got 1"):
            bytelatent.apply(**{option: 1})


def test_without_the_code_base_or_xformers(code_base: CodeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        bytelatent.apply(stand_in_for_xformers=False)
    forget()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(STAND_INS)])
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="bytelatent"):
        bytelatent.apply()


def test_example_of_the_page(code_base: CodeBase) -> None:
    text = (Path(__file__).parents[2] / "docs" / "integrations" / "bytelatent.md").read_text()
    (example,) = [part for part in text.split("```py\n")[1:] if "integrations import bytelatent" in part]
    exec(example.split("```")[0], {})
    assert code_base.transformer.create_causal_mask is code_base.model_utils.create_causal_mask
    assert "blt_kernels" in code_base.transformer.create_causal_mask.__module__


# --- attention --------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(code_base: CodeBase) -> nn.Module:
    torch.manual_seed(0)
    return code_base.base_transformer.Attention(12, 4, 3, 1, 1e4).double()


def test_masks_that_ours_takes(code_base: CodeBase) -> None:
    """Grouped heads, masks by name, and no mask, which is attention to the whole row."""
    bytelatent.apply().undo()
    layer, x = layer_of(code_base), normal(2, 7, 12)
    positions = code_base.base_transformer.rotations(4, 7, 1e4)
    calls = [("sdpa", "causal"), ("sdpa", None), ("xformers", None)]
    expected = [layer(x, positions, mask=mask, attn_impl=name) for name, mask in calls]
    with bytelatent.apply() as applied:
        for (name, mask), wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(layer(x, positions, mask=mask, attn_impl=name), wanted)
        flex = code_base.model_utils.create_causal_mask(7, "flex_attention", None)
        torch.testing.assert_close(layer(x, positions, mask=flex, attn_impl="flex_attention"), expected[0])
    assert applied.report().replaced["base_transformer.Attention.forward"] == 4
    assert not applied.report().fell_back


def test_masks_that_are_left_to_the_code_base(code_base: CodeBase) -> None:
    bytelatent.apply().undo()
    layer, x, cross = layer_of(code_base), normal(2, 7, 12), code_base.model_latent_transformer.CrossAttention
    positions, dense = code_base.base_transformer.rotations(4, 7, 1e4), torch.eye(7, dtype=torch.bool)
    torch.manual_seed(0)
    cross = cross(12, 4, 3, 3, 1e-5).double()
    expected = [layer(x, positions, mask=dense), cross(x, x, dense), cross(x, x)]
    with bytelatent.apply() as applied:
        found = [layer(x, positions, mask=dense), cross(x, x, dense), cross(x, x)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        layer.kv_cache = SimpleNamespace(update=lambda k, v, tok_idx: (k, v))
        layer(x, positions, mask="causal")
        with pytest.raises(TypeError, match=r"mask: expected one of create_causal_mask .*, got a mask of type Tensor"):
            layer(x, positions, mask=dense, attn_impl="blt_kernels")
    attention, crossed = "base_transformer.Attention.forward", "model.latent_transformer.CrossAttention.forward"
    assert applied.report().fell_back == {
        (attention, "a mask of type Tensor"): 1,
        (crossed, "a mask of type Tensor"): 1,
        (crossed, "no mask"): 1,
        (attention, "a kv_cache"): 1,
    }


def test_cross_attention_takes_the_mask_of_flex_attention_and_grouped_heads(code_base: CodeBase) -> None:
    bytelatent.apply().undo()
    torch.manual_seed(0)
    cross, x = code_base.model_latent_transformer.CrossAttention(12, 4, 3, 1, 1e-5).double(), normal(2, 7, 12)
    expected = cross(x, x, torch.ones(7, 7, dtype=torch.bool).tril())
    patches = torch.tensor([[1, 2, 3, 1], [1, 6, 0, 0]])
    ids = code_base.model_blt.patch_ids_from_lengths(patches, 7)
    by_patch = [(normal(2, 8, 12), x, True), (x, normal(2, 8, 12), False)]
    masks = [code_base.model_blt.cross_attn_mask(ids, patches, 7, q, 2, 2) for _, _, q in by_patch]
    dense = [cross(q, kv, mask) for (q, kv, _), mask in zip(by_patch, masks, strict=True)]
    with bytelatent.apply() as applied:
        torch.testing.assert_close(
            cross(x, x, code_base.model_utils.create_causal_mask(7, "flex_attention", None)), expected
        )
        for (q, kv, as_queries), wanted in zip(by_patch, dense, strict=True):
            mask = code_base.model_blt.cross_attn_mask(ids, patches, 7, as_queries, 2, 2, block_mask=False)
            torch.testing.assert_close(cross(q, kv, mask), wanted)
        with pytest.raises(ValueError, match="N: expected the 7 bytes of a row of patch_ids, got 8"):
            code_base.model_blt.cross_attn_mask(ids, patches, 8)
        with pytest.raises(ValueError, match="tokens, eos_id: expected both"):
            code_base.model_utils.create_causal_mask(7, "blt_kernels", "block_causal", eos_id=2)
        with pytest.raises(ValueError, match="sdpa has no block_causal"):
            code_base.model_utils.create_causal_mask(7, "sdpa", "block_causal")
    assert not applied.report().fell_back


def test_checkpointing_does_not_recompute_attention(code_base: CodeBase) -> None:
    bytelatent.apply()
    layer, x = layer_of(code_base), normal(2, 7, 12).requires_grad_()
    positions = code_base.base_transformer.rotations(4, 7, 1e4)
    ran = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func)
            return func(*args, **(kwargs or {}))

    policy = code_base.distributed.get_default_policy()
    for context in (None, lambda: create_selective_checkpoint_contexts(policy)):
        ran.clear()
        with Count():
            options = {} if context is None else {"context_fn": context}
            checkpoint(layer, x, positions, mask="causal", use_reentrant=False, **options).sum().backward()
        attention = torch.ops.blt_kernels.block_causal_attention_fwd.default
        assert ran.count(attention) == (2 if context is None else 1)
    ours = {torch.ops.blt_kernels.patch_cross_attention_fwd.default, attention}
    assert ours <= code_base.distributed.default_no_recompute_ops


# --- hash embedding and pooling ---------------------------------------------------------------------------------------

HASH = "model.blt.compute_hash_embeddings"


def hooked(model: nn.Module) -> None:
    model.encoder_hash_tok_embedding[1].register_forward_hook(lambda module, inputs, out: 2 * out)


def wrapped(model: nn.Module) -> None:
    model.local_encoder.tok_embeddings = nn.Sequential(model.local_encoder.tok_embeddings)


def longer(model: nn.Module) -> None:
    model.encoder_hash_tok_embedding[0] = nn.Embedding(60, 16, dtype=torch.float64)


UNREADABLE: dict[str, Callable[[nn.Module], None]] = {
    "the hash tables have hooks or a forward of their own": hooked,
    "the byte table are Sequential, no plain Embedding": wrapped,
    "tables of other than 53 rows": longer,
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_tables_that_only_their_modules_may_read(code_base: CodeBase, reason: str) -> None:
    bytelatent.apply().undo()
    model = model_of(code_base)
    UNREADABLE[reason](model)
    tokens, _ = ragged(2, 11)
    call = (tokens, model.local_encoder, model.encoder_hash_tok_embedding, 2, [3, 4], 53)
    expected = code_base.model_blt.compute_hash_embeddings(*call)
    with bytelatent.apply() as applied:
        torch.testing.assert_close(code_base.model_blt.compute_hash_embeddings(*call), expected)
        assert code_base.model_blt.compute_hash_embeddings(tokens, None, None, 2, [3], 53) is None
    assert applied.report().fell_back == {(HASH, f"lookups: {reason}"): 1}


@pytest.mark.parametrize("mode", ["max", "min", "avg", "mean", "max-min", "avg+max+min"])
def test_pooling_modes(code_base: CodeBase, mode: str) -> None:
    bytelatent.apply().undo()
    h, ids = normal(2, 9, 5), torch.tensor([[0, 1, 1, 1, 2, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    pool = code_base.model_utils.downsample
    expected = pool(h, 5, patch_ids=ids, downsampling_by_pooling=mode)
    with bytelatent.apply():
        torch.testing.assert_close(pool(h, 5, patch_ids=ids, downsampling_by_pooling=mode), expected)
        with pytest.raises(ValueError, match="pooling_mode: expected avg, mean, min or max in it, got 'sum'"):
            code_base.model_utils.pooling_downsample(h, 5, "sum", ids)


# --- patching ---------------------------------------------------------------------------------------------------------


def patcher_of(code_base: CodeBase, **changed: Any) -> Any:
    defaults = {
        "patching_mode": "entropy",
        "threshold": 1.335442066192627,
        "threshold_add": None,
        "max_patch_length": None,
        "patch_size": 4.5,
        "patching_batch_size": 1,
        "device": "cpu",
        "monotonicity": False,
        "log_time": False,
        "entropy_model": None,
    }
    return code_base.data_patcher.Patcher(SimpleNamespace(**{**defaults, **changed}))


def test_patch_lengths(code_base: CodeBase) -> None:
    """Rows of many lengths, by each rule, with the byte to come and without."""
    bytelatent.apply().undo()
    chosen, replaced = random.Random(0), bytelatent.apply()
    ours = code_base.data_patcher.Patcher.patch
    replaced.undo()
    for case in range(300):
        rows, size = chosen.choice([1, 2, 3]), chosen.choice([1, 2, 3, 4, 9, 21])
        numbers = torch.Generator().manual_seed(case)
        patcher = patcher_of(
            code_base,
            patching_mode=chosen.choice(["entropy", "entropy", "space"]),
            threshold=chosen.choice([0.5, 1.335442, 99.0]),
            threshold_add=chosen.choice([None, 0.1, -0.2]),
            monotonicity=chosen.random() < 0.25,
            max_patch_length=chosen.choice([None, None, 1, 2, 4]),
        )
        tokens = torch.randint(0, 260, (rows, size), generator=numbers)
        scores = {"entropies": torch.rand(rows, size, generator=numbers) * 3}
        if chosen.random() < 0.5:
            scores = {"preds": torch.randn(rows, size, 12, generator=numbers) * 2}
        options = {**scores, "include_next_token": chosen.random() < 0.7, "threshold": chosen.choice([None, 1.0])}
        lengths, entropies = patcher.patch(tokens, **options)
        found, found_entropies = ours(patcher, tokens, **options)
        assert found.dtype == lengths.dtype
        assert found.tolist() == lengths.tolist()
        if entropies is None:
            assert found_entropies is None
        else:
            torch.testing.assert_close(found_entropies, entropies)
    fell_back = replaced.report().fell_back
    assert set(fell_back) == {("data.patcher.Patcher.patch", "max_patch_length at spaces")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"patching_mode": "byte"}, "patching_mode byte"), ({"log_time": True}, "log_time")],
)
def test_patching_that_is_left_to_the_code_base(code_base: CodeBase, changes: dict[str, Any], reason: str) -> None:
    bytelatent.apply().undo()
    tokens, patcher = torch.randint(0, 260, (2, 9)), patcher_of(code_base, **changes)
    entropies = torch.rand(2, 9) * 3
    expected = patcher.patch(tokens, True, entropies=entropies)[0]
    with bytelatent.apply() as applied:
        assert torch.equal(patcher.patch(tokens, True, entropies=entropies)[0], expected)
    assert applied.report().fell_back == {("data.patcher.Patcher.patch", reason): 1}


def test_a_model_patches_with_its_entropy_model_without_padding(code_base: CodeBase) -> None:
    """The context of 8192 bytes is not filled up for 24 bytes, and the patches are the same."""
    bytelatent.apply().undo()
    args = arguments(dim=8, n_layers=1, n_heads=1, attn_bias_type="local_block_causal", sliding_window=4)
    torch.manual_seed(0)
    entropy_model = code_base.transformer.LMTransformer(args)
    nn.init.normal_(entropy_model.output.weight)
    sizes: list[tuple[int, ...]] = []
    entropy_model.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape)))
    model, (tokens, _) = model_of(code_base), ragged(2, 12)
    model.patcher = patcher_of(code_base, entropy_model=entropy_model, threshold=3.5)
    expected = model.patcher.patch(tokens, True)
    with bytelatent.apply() as applied:
        lengths, entropies = model.patcher.patch(tokens, True)
        assert lengths.shape[1] not in (2, 13)  # a threshold that cuts somewhere
        assert torch.equal(lengths, expected[0])
        torch.testing.assert_close(entropies, expected[1])
        torch.testing.assert_close(model(tokens), model(tokens, lengths))
        found, _ = code_base.data_patcher.calculate_entropies(tokens, entropy_model, 1, enable_grad=True)
        assert found.requires_grad
        plain = code_base.data_patcher.calculate_entropies(tokens, entropy_model.forward, 1)[0]
        torch.testing.assert_close(plain, found.detach())
    assert sizes == [(1, 8192), (1, 24), (1, 24), (1, 24)]
    assert applied.report().fell_back == {("data.patcher.calculate_entropies", "no LMTransformer"): 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_as_the_code_base_compares(code_base: CodeBase, dtype: torch.dtype) -> None:
    """Entropies of half precision are the code base's, and so is every decision, near the threshold too."""
    bytelatent.apply().undo()
    logits = torch.randn(9, 90, 40, generator=torch.Generator().manual_seed(0)) * 3
    logits, tokens = logits.to(dtype), torch.zeros(9, 90, dtype=torch.long)
    rules: list[dict[str, Any]] = [{}, {"monotonicity": True, "threshold": 0.1}, {"threshold_add": 0.1}]
    for rule in rules:
        patcher = patcher_of(code_base, **rule)
        expected = patcher.patch(tokens, True, preds=logits)
        with bytelatent.apply() as applied:
            lengths, entropies = patcher.patch(tokens, True, preds=logits)
        assert torch.equal(lengths, expected[0])
        if dtype == torch.float64:
            torch.testing.assert_close(entropies, expected[1])
        else:
            assert torch.equal(entropies, expected[1])
            assert applied.report().fell_back == {("data.patcher.entropy", f"logits of {dtype}"): 1}


# --- the stand-in for xformers ----------------------------------------------------------------------------------------


def test_stand_in_for_xformers(code_base: CodeBase) -> None:
    stand_in.install()
    import xformers.ops
    import xformers.profiler
    from xformers.ops import fmha

    assert find_spec("xformers") is not None
    q, k, v = (normal(2, 9, 2, 4, seed=seed) for seed in range(3))
    position = torch.arange(9)
    distance = position[:, None] - position
    document = torch.tensor([0] * 4 + [1] * 5)
    same = document[:, None] == document
    bias = fmha.attn_bias
    masks = [
        (None, torch.ones(9, 9, dtype=torch.bool)),
        (bias.LowerTriangularMask(), distance >= 0),
        (bias.LocalAttentionFromBottomRightMask(window_left=2, window_right=0), (distance >= 0) & (distance < 3)),
        (bias.BlockDiagonalCausalMask.from_seqlens([4, 5, 4, 5]), same & (distance >= 0)),
        (
            bias.BlockDiagonalCausalMask.from_seqlens(q_seqlen=[4, 5, 4, 5]).make_local_attention(2),
            same & (distance >= 0) & (distance < 2),
        ),
    ]
    for mask, dense in masks:
        out = fmha.memory_efficient_attention(q, k, v, attn_bias=mask)
        expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=dense)
        torch.testing.assert_close(out, expected.transpose(1, 2))
        assert mask is None or isinstance(mask, xformers.ops.AttentionBias)
    with pytest.raises(TypeError, match="attn_bias: expected a mask of this stand-in for xformers, got Tensor"):
        fmha.memory_efficient_attention(q, k, v, attn_bias=dense)
    with pytest.raises(ValueError, match="window_right: expected 0"):
        bias.LocalAttentionFromBottomRightMask(window_left=2, window_right=1)
    xformers.profiler.step()
    with pytest.raises(ModuleNotFoundError, match="profiling needs xformers itself"):
        xformers.profiler.profile(output_dir="x")
