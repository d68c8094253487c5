"""Checkpoints: transformers' BLT has the same logits, patches, losses and gradients, and reads what we write."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote

import oracle
import oracle_bytelatent
import pytest
import torch
from torch import Tensor
from transformers_blt import CASES, LENGTH, WINDOW, batch, merged, their_model

from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, load_model
from blt_kernels.models.checkpoint import bytelatent_fields, read_config, transformers_fields
from blt_kernels.models.checkpoint.fields import Values
from blt_kernels.models.checkpoint.transformers import read_blt
from blt_kernels.nn import TransformerConfig

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def folder(request, tmp_path):
    """Return directory and model of a case."""
    model = their_model(request.param)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


def their_logits(model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def starts(lengths: Tensor, end: int) -> list[list[int]]:
    """Return where patches start, up to `end` inclusive, from padded lengths of either convention."""
    return [sorted({0, *(s for s in row if s <= end)}) for row in (lengths.cumsum(1) - lengths).tolist()]


@pytest.mark.parametrize("folder", CASES, indirect=True)
def test_equals_transformers(folder) -> None:
    path, theirs = folder
    ours, tokens, config = BLT.from_pretrained(path), batch(), theirs.config
    exact_end = config.max_patch_length is None  # else transformers drops the decision after the last byte
    if ours.config.patching == "entropy":
        options = {"threshold": config.patching_threshold, "max_patch_length": config.max_patch_length}
        lengths = theirs.model.patcher(tokens, patch_size=4, **options)[1]
        assert {len(row) for row in starts(lengths, LENGTH)} != {LENGTH}
        end = LENGTH if exact_end else LENGTH - 1
        assert starts(ours.patch(tokens).to_lengths(include_next_byte=True), end) == starts(lengths, end)
    else:
        assert ours.patch(tokens).patch_lengths.tolist() == [1] * tokens.numel()

    known = slice(None, None if exact_end else -1)
    logits = ours(tokens)
    assert logits.std() > 0.3
    torch.testing.assert_close(logits[:, known], their_logits(theirs, tokens)[:, known], rtol=0, atol=1e-5)
    for short in (tokens[:1], tokens[:, :2], tokens[:, :1]):
        torch.testing.assert_close(ours(short)[:, known], their_logits(theirs, short)[:, known], rtol=0, atol=1e-5)

    loss = ours.loss(tokens)
    loss.backward()
    expected = theirs(tokens, labels=tokens, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss * math.log(2), expected, rtol=1e-6, atol=0)
    gradients = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    scale = max(g.abs().max().item() for g in gradients.values() if g is not None) * math.log(2)
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            nats = parameter.grad * math.log(2)
            torch.testing.assert_close(nats, gradients[name], rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("folder", CASES, indirect=True)
def test_round_trip(folder, tmp_path) -> None:
    path, theirs = folder
    ours = BLT.from_pretrained(path)
    ours.save_pretrained(tmp_path / "ours")
    before, after = (safetensors.load_file(p / "model.safetensors") for p in (path, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again, information = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(information.values())
    assert torch.equal(their_logits(again, batch()), their_logits(theirs, batch()))
    assert BLT.from_pretrained(tmp_path / "ours").config == ours.config


OLD_STYLE = {
    "rope_theta": 300.0,
    "rope_scaling": {"rope_type": "default"},
    "norm_eps": 0.5,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": None,
}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            **{f"{part}_config": OLD_STYLE for part in ("encoder", "global", "patcher")},
            "decoder_config": {**OLD_STYLE, "hidden_size_global": 64},
        },
    ],
)
def test_keys_that_are_missing_mean_what_they_do_in_transformers(values: dict, tmp_path) -> None:
    blt = pytest.importorskip("transformers.models.blt")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blt", **values}))
    few = read_blt(Values.read(tmp_path / "config.json"))
    blt.BltConfig(**values).save_pretrained(tmp_path)
    assert few == read_blt(Values.read(tmp_path / "config.json"))


@pytest.mark.parametrize("folder", ["released"], indirect=True)
def test_another_patcher(folder, tmp_path) -> None:
    other = ByteLM(ByteLMConfig(48, 1, 2, window=WINDOW, threshold=5.0))
    other.save_pretrained(tmp_path / "other")
    model = BLT.from_pretrained(folder[0], patcher=tmp_path / "other")
    assert model.config.patcher == dataclasses.replace(other.config, ffn_dim=256)
    assert torch.equal(model.patcher(batch()), other(batch()))
    assert not any(p.requires_grad for p in model.patcher.parameters())


def test_what_we_built_is_read_by_transformers(tmp_path) -> None:
    blt = pytest.importorskip("transformers.models.blt")
    local = TransformerConfig(32, 2, 2, window=WINDOW)
    config = BLTConfig(
        local, TransformerConfig(48, 2, 2), local, ByteLMConfig(32, 2, 2, window=WINDOW), ngram_vocab=53,
        split_documents=True, global_across_documents=True, eos_id=9, threshold=5.1,
    )  # fmt: skip
    ours = BLT(config)
    ours.save_pretrained(tmp_path)
    theirs, tokens = blt.BltForCausalLM.from_pretrained(tmp_path).eval(), batch()
    tokens[tokens == 9] = 4  # it knows no documents
    torch.testing.assert_close(their_logits(theirs, tokens), ours(tokens), rtol=0, atol=1e-5)
    again = BLT.from_pretrained(tmp_path)
    assert (again.config.split_documents, again.config.global_across_documents, again.config.eos_id) == (True, True, 9)
    tokens[1, 5] = 9
    assert torch.equal(again(tokens), ours(tokens))
    ours.to(torch.bfloat16).save_pretrained(tmp_path)  # this overwrites the file that `again` has mapped
    assert {p.dtype for p in BLT.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    assert theirs.config.dtype == torch.float32
    assert blt.BltConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again(batch()).isfinite().all()


@pytest.mark.parametrize("folder", ["released", "grouped_heads"], indirect=True)
def test_the_patcher_alone(folder, tmp_path) -> None:
    path, theirs = folder
    ours, tokens = ByteLM.from_pretrained(path), batch()
    assert ours.config.threshold == theirs.config.patching_threshold
    logits = theirs.model.patcher(tokens)[2]
    torch.testing.assert_close(ours(tokens), logits, rtol=0, atol=4e-5)  # its head is four times as large
    assert all(p.requires_grad for p in ours.parameters())
    ours.save_pretrained(tmp_path / "ours")
    again, information = type(theirs.model.patcher).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(information.values())
    assert torch.equal(again(tokens)[2], logits)
    loaded = ByteLM.from_pretrained(tmp_path / "ours", split_documents=True)
    assert loaded.config == dataclasses.replace(ours.config, split_documents=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("folder", ["released"], indirect=True)
def test_shards_dtypes_and_changes(folder, tmp_path) -> None:
    path, theirs = folder
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = BLT.from_pretrained(path), BLT.from_pretrained(tmp_path / "shards")
    assert whole.config == shards.config
    assert torch.equal(whole(batch()), shards(batch()))
    assert all(not p.requires_grad for p in shards.patcher.parameters())
    assert all(p.requires_grad for name, p in shards.named_parameters() if not name.startswith("patcher."))
    assert {p.dtype for p in BLT.from_pretrained(path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    reference = BLT.from_pretrained(path, "reference", split_documents=True, patching="static", patch_size=3)
    assert reference.config == dataclasses.replace(whole.config, split_documents=True, patching="static", patch_size=3)
    assert torch.equal(reference.lm_head.weight, whole.lm_head.weight)
    with pytest.raises(TypeError, match="documents"):
        BLT.from_pretrained(path, documents=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at the memory map of Linux")
@pytest.mark.parametrize("folder", ["released"], indirect=True)
def test_weights_are_the_mapped_file(folder) -> None:
    model = BLT.from_pretrained(folder[0])
    pattern = r"(\w+)-(\w+) .*" + re.escape(str(folder[0] / "model.safetensors"))
    maps = [[int(x, 16) for x in m] for m in re.findall(pattern, Path("/proc/self/maps").read_text())]
    assert all(any(low <= p.data_ptr() < high for low, high in maps) for p in model.parameters())


@pytest.mark.parametrize("folder", ["released"], indirect=True)
def test_keys_that_do_not_fit_are_named(folder) -> None:
    path = folder[0]
    tensors = safetensors.load_file(path / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.local_decoder.norm.weight")
    tensors["model.patcher.extra"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(3, 32)
    safetensors.save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit BLT") as error:
        BLT.from_pretrained(path)
    for problem in (
        "missing model.local_decoder.norm.weight",
        "unknown model.extra.weight",
        "unknown model.patcher.extra",
        "lm_head.weight of shape [3, 32], expected [260, 32]",
    ):
        assert problem in str(error.value)
    with pytest.raises(ValueError, match=r"does not fit ByteLM: unknown model.patcher.extra$"):
        ByteLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected 'blt', got 'llama'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False"),
        ({"quantization_config": {"bits": 4}}, r"config.json: quantization_config: expected None, got {'bits': 4}"),
        ({"global_config": {"per_layer_config": {"0": {}}}}, "global_config.per_layer_config: expected None, got "),
        ({"cross_attn_window": 2}, "config.json: expected the fields of BltConfig, got cross_attn_window as well"),
        ({"decoder_config": {"window": 2}}, "decoder_config: expected the fields of BltLocalDecoderConfig, got window"),
        ({"encoder_config": {"vocab_size": 300}}, "encoder_config.vocab_size: expected 260, got 300"),
        ({"encoder_config": {"cross_attn_k": 3}}, "encoder_config.cross_attn_k: expected 2, got 3"),
        ({"decoder_config": {"cross_attn_k": 3}}, "decoder_config.cross_attn_k: expected 2, got 3"),
        ({"decoder_config": {"hidden_size_global": 32}}, "decoder_config.hidden_size_global: expected 48, got 32"),
        ({"patcher_config": {"head_dim": 8}}, "patcher_config.head_dim: expected 16, got 8"),
        ({"patcher_config": {"hidden_act": "relu"}}, "patcher_config.hidden_act: expected 'silu', got 'relu'"),
        ({"patch_size": None}, "patch_size: expected a number, .* got None"),
        ({"patching_threshold": None}, "patching_threshold: expected float, got None"),
        ({"encoder_hash_byte_group_nb_functions": 12}, "num_functions: expected at most 11, got 12"),
        ({"encoder_hash_byte_group_size": [3, "4"]}, "ngram_sizes: expected an int, got '4'"),
        ({"global_config": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1, got 0.5"),
        ({"global_config": {"rope_parameters": {"beta": 1}}}, "'llama3', got beta as well"),
        ({"global_config": {"num_attention_heads": 5, "head_dim": None}}, "global_config: dim: expected a multiple of"),
        ({"eos_id": 260}, "eos_id: expected a value < vocab_size = 260, got 260"),
        ({"encoder_config": {"hidden_act": "gelu"}}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"global_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type: expected 'default' or 'llama3'"),
    ],
)
@pytest.mark.parametrize("folder", ["released"], indirect=True)
def test_configurations_that_are_not_ours_say_why(folder, changes: dict, message: str) -> None:
    file = folder[0] / "config.json"
    file.write_text(json.dumps(merged(json.loads(file.read_text()), changes)))
    with pytest.raises(ValueError, match=message):
        BLT.from_pretrained(folder[0])


TABLES = {
    "BltConfig": transformers_fields.BLT_CONFIG,
    "BltLocalEncoderConfig": transformers_fields.ENCODER_CONFIG,
    "BltLocalDecoderConfig": transformers_fields.DECODER_CONFIG,
    "BltGlobalTransformerConfig": transformers_fields.GLOBAL_CONFIG,
    "BltPatcherConfig": transformers_fields.PATCHER_CONFIG,
    "LlamaConfig": transformers_fields.LLAMA_CONFIG,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_field_of_transformers_is_known(name: str) -> None:
    pytest.importorskip("transformers.models.blt")
    import transformers.models.blt.configuration_blt as blt
    import transformers.models.llama.configuration_llama as llama

    cls, table = getattr(blt if name.startswith("Blt") else llama, name), TABLES[name]
    assert table.owner == name
    stored = set(cls().to_dict()) | {field.name for field in dataclasses.fields(cls)}
    assert {key for key in stored if not key.startswith("_")} <= {*table.read, *table.fixed, *table.ignored}
    assert not {*table.read} & {*table.fixed} | {*table.read, *table.fixed} & table.ignored


LAYERS = TransformerConfig(32, 2, 4, num_kv_heads=2, window=WINDOW)
SMALL = BLTConfig(
    dataclasses.replace(LAYERS, num_layers=1),
    TransformerConfig(48, 1, 2),
    LAYERS,
    ByteLMConfig(32, 1, 2, window=WINDOW),
    ngram_vocab=31,
    cross_attn_grouped_heads=True,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patching": "space"}, "config.patching, .*expected 'entropy', got 'space'"),
        ({"monotonic": True}, "config.monotonic, "),
        ({"threshold_add": 0.1}, "config.threshold_add, "),
        ({"patcher": None}, "config.patcher: "),
        ({"cross_attn_grouped_heads": False}, "config.cross_attn_grouped_heads, "),
        ({"cross_attn_heads": 2}, "config.cross_attn_heads, .*expected 4, got 2"),
        ({"cross_attn_window_decoder": 3}, "config.cross_attn_window_decoder, "),
        ({"encoder": LAYERS, "cross_attn_all_layers_encoder": True}, "config.pool_every_layer, "),
        ({"decoder": dataclasses.replace(LAYERS, window=9)}, "config.decoder.window, .*expected 7, got 9"),
        ({"global_transformer": TransformerConfig(48, 1, 2, window=3)}, "config.global_transformer.window, "),
        ({"whole_characters": True}, "config.whole_characters, .*expected False, got True"),
        ({"whole_characters": True, "patching": "byte"}, "config.whole_characters, "),
        ({"reset_at_newlines": True}, "config.reset_at_newlines, "),
        (
            {"patcher": dataclasses.replace(SMALL.patcher, reset_at_newlines=True)},
            "config.patcher.reset_at_newlines, .*expected False, got True",
        ),
    ],
)
def test_what_transformers_would_compute_otherwise_is_not_written(changes: dict, message: str, tmp_path) -> None:
    model = BLT(SMALL)
    model.config = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_the_patcher_of_transformers_would_compute_otherwise_is_not_written(tmp_path) -> None:
    model = ByteLM(dataclasses.replace(SMALL.patcher, reset_at_newlines=True))
    with pytest.raises(ValueError, match=r"config.reset_at_newlines, .*expected False, got True"):
        model.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    model.save(tmp_path / "model.safetensors")
    assert ByteLM.load(tmp_path / "model.safetensors").config == model.config


# --- facebookresearch/blt: files made here ----------------------------------------------------------------------------

ARGS = {
    "vocab_size": 260, "dim_global": 48, "dim_local_encoder": 32, "dim_local_decoder": 32, "dim_token": None,
    "n_layers_global": 2, "n_layers_local_encoder": 2, "n_layers_local_decoder": 2, "n_heads_global": 2,
    "n_heads_local_encoder": 2, "n_heads_local_decoder": 2, "n_kv_heads": None, "n_kv_heads_global": 1,
    "ffn_dim_multiplier": 1.0, "multiple_of": 16, "norm_eps": 1e-4, "rope_theta": 500000.0, "head_dim": None,
    "cross_attn_encoder": True, "cross_attn_decoder": True, "cross_attn_init_by_pooling": True, "cross_attn_k": 2,
    "cross_attn_nheads": 4, "cross_attn_all_layers_encoder": True, "cross_attn_all_layers_decoder": True,
    "cross_attn_window_encoder": None, "cross_attn_window_decoder": 3, "use_rope": True, "pm_size": 0,
    "downsampling_by_pooling": "max", "encoder_hash_byte_group_size": "3,4", "encoder_hash_byte_group_vocab": 31,
    "encoder_hash_byte_group_nb_functions": 2, "encoder_enable_byte_ngrams": False,
    "local_attention_window_len": WINDOW, "patching_mode": "byte", "patching_threshold": 9.0,
    "attn_impl": "xformers", "attn_bias_type": "block_causal", "eos_id": 2,
}  # fmt: skip
RULES = {"patching_mode": "entropy", "threshold": 5.1, "threshold_add": 0.01, "monotonicity": False, "patch_size": 4.5}
ENTROPY = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 260, "ffn_dim_multiplier": 1.0, "rope_theta": 7.0}
THEIR_LAYERS = TransformerConfig(32, 2, 2, ffn_dim=96, window=WINDOW, norm_eps=1e-4)
EXPECTED = BLTConfig(
    THEIR_LAYERS,
    TransformerConfig(48, 2, 2, num_kv_heads=1, ffn_dim=128, norm_eps=1e-4),
    THEIR_LAYERS,
    ByteLMConfig(32, 2, 2, ffn_dim=256, window=512, split_documents=True),
    ngram_sizes=(3, 4),
    ngram_vocab=31,
    num_functions=2,
    cross_attn_all_layers_encoder=True,
    cross_attn_heads=4,
    cross_attn_window_decoder=3,
    threshold=5.1,
    threshold_add=0.01,
    split_documents=True,
)
THEIR_NAMES = (
    ("self_attn", "attention"), ("mlp.gate_proj", "feed_forward.w1"), ("mlp.down_proj", "feed_forward.w2"),
    ("mlp.up_proj", "feed_forward.w3"), ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("q_norm", "cross_attn_norm_q"), ("k_norm", "cross_attn_norm_kv"),
    ("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"), ("o_proj", "wo"), ("embed_tokens", "tok_embeddings"),
)  # fmt: skip


def foreign_names(weights: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    state = {}
    for name, value in weights.items():
        for ours, theirs in THEIR_NAMES:
            name = name.replace(ours, theirs)
        state[name.replace("lm_head", head)] = value.clone()
    if head != "output":
        for i, table in enumerate(state.pop("encoder_hash_tok_embedding.weight").split(31)):
            state[f"encoder_hash_tok_embedding.{i}.weight"] = table.clone()
    return state


@pytest.fixture
def theirs(tmp_path):
    """Return the root of ``blt/`` and ``entropy_model/``, with params.json and consolidated.pth, and their model."""
    torch.manual_seed(0)
    model = BLT(EXPECTED)
    for name, part, head, values in (
        ("blt", BLT(dataclasses.replace(EXPECTED, patcher=None)), "local_decoder.output", {"model": ARGS}),
        ("entropy_model", model.patcher, "output", {"entropy_model": ENTROPY, "model": None}),
    ):
        if name == "blt":
            part.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("patcher.")})
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.json").write_text(json.dumps({**values, "data": {"patcher_args": RULES}}))
        state = {**foreign_names(part.state_dict(), head), "rope_embeddings.freqs_cis": torch.zeros(2)}
        torch.save({"model": state, "optim": {}}, tmp_path / name / "consolidated.pth")
    return tmp_path, model


def test_consolidated_files_of_facebookresearch(theirs) -> None:
    root, expected = theirs
    model = BLT.from_pretrained(root / "blt")  # the entropy model lies beside it
    assert model.config == expected.config == EXPECTED
    assert not any(p.requires_grad for p in model.patcher.parameters())
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model(batch()), expected(batch()))
    entropy_model = ByteLM.from_pretrained(root / "entropy_model")
    assert torch.equal(entropy_model(batch()), expected.patcher(batch()))
    (root / "entropy_model").rename(root / "blt" / "entropy_model")
    assert torch.equal(BLT.from_pretrained(root / "blt")(batch()), expected(batch()))
    (root / "blt" / "entropy_model").rename(root / "elsewhere")
    assert torch.equal(BLT.from_pretrained(root / "blt", patcher=root / "elsewhere")(batch()), expected(batch()))
    alone = BLT.from_pretrained(root / "blt", dtype=torch.bfloat16)
    assert alone.patcher is None
    assert {p.dtype for p in alone.parameters()} == {torch.bfloat16}


def test_load_model_tells_directories_apart(theirs, tmp_path) -> None:
    root, model = theirs
    model.patcher.save_pretrained(tmp_path / "patcher")
    model.patcher.save(tmp_path / "patcher.safetensors")
    blt = BLT(SMALL)
    blt.save_pretrained(tmp_path / "whole")
    for path, expected in (
        (root / "blt", model),
        (root / "entropy_model", model.patcher),
        (tmp_path / "patcher", model.patcher),
        (tmp_path / "patcher.safetensors", model.patcher),
        (tmp_path / "whole", blt),
    ):
        loaded = load_model(path)
        assert type(loaded) is type(expected)
        assert torch.equal(load_model(path, dtype=torch.float64)(batch()).float(), loaded.double()(batch()).float())
        assert all(torch.equal(x.double(), loaded.state_dict()[n]) for n, x in expected.state_dict().items())


def hub_layout(root: Path) -> None:
    """Turn ``blt`` and ``entropy_model`` into what PyTorchModelHubMixin writes, with the training arguments beside."""
    for name, key in (("blt", "model"), ("entropy_model", "entropy_model")):
        folder = root / name
        params = json.loads((folder / "params.json").read_text())
        (folder / "config.json").write_text(json.dumps({"args": params[key]}))
        safetensors.save_file(torch.load(folder / "consolidated.pth")["model"], folder / "model.safetensors")
        (folder / "consolidated.pth").unlink()
        (folder / "params.json").rename(folder / "train_args.json")


def test_hub_layout_of_facebookresearch(theirs) -> None:
    root, expected = theirs
    hub_layout(root)
    args = {**ENTROPY, "sliding_window": WINDOW, "norm_eps": 1e-4, "n_kv_heads": None, "multiple_of": 256}
    args |= {"attn_impl": "xformers", "attn_bias_type": "local_block_causal"}
    (root / "entropy_model" / "config.json").write_text(json.dumps({"args": args}))
    model = BLT.from_pretrained(root / "blt", patcher=root / "entropy_model")
    patcher = dataclasses.replace(EXPECTED.patcher, window=WINDOW, rope_theta=7.0, norm_eps=1e-4)
    assert model.config == dataclasses.replace(EXPECTED, patcher=patcher)
    assert torch.equal(model.local_decoder.norm.weight, expected.local_decoder.norm.weight)
    with pytest.raises(ValueError, match="expected the arguments of an entropy model, got vocab_size, dim_global"):
        ByteLM.from_pretrained(root / "blt")
    with pytest.raises(ValueError, match=r"config.json: expected the arguments of a BLT, got args$"):
        BLT.from_pretrained(root / "entropy_model")
    (root / "blt" / "train_args.json").unlink()
    bare = BLT.from_pretrained(root / "blt").config
    assert (bare.patching, bare.threshold, bare.threshold_add) == ("byte", 9.0, None)  # these are the model's arguments


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cross_attn_init_by_pooling", False, "cross_attn_init_by_pooling: expected True, got False"),
        ("downsampling_by_pooling", "avg", "downsampling_by_pooling: expected 'max', got 'avg'"),
        ("dim_token", 16, "dim_token: expected 32, got 16"),
        ("head_dim", 8, "head_dim: expected 16, got 8"),
        ("dim_local_encoder", ..., "dim_local_decoder: expected 512, got 32"),  # this is the default of that class
        ("dim_global", 32, "dim_global: expected another width than dim_local_decoder, .* got 32"),
        ("use_rope", False, "use_rope: expected True, got False"),
        ("encoder_enable_byte_ngrams", True, "encoder_enable_byte_ngrams: expected False, got True"),
        ("cross_attn_encoder", ..., "cross_attn_encoder: expected True, got False"),
        ("cross_attn_k", None, "cross_attn_k: expected a value, got None"),
        ("cross_attn_nheads", None, "cross_attn_nheads: expected a value, got None"),
        ("encoder_hash_byte_group_size", None, "encoder_hash_byte_group_size: expected a value, got None"),
        ("encoder_hash_byte_group_size", "3;4", "encoder_hash_byte_group_size: expected numbers between commas"),
        ("encoder_hash_byte_group_size", [], "ngram_sizes: expected a sequence of at least one int"),
        ("encoder_hash_byte_group_nb_functions", 12, "num_functions: expected at most 11, got 12"),
        ("attn_impl", "fmha", "attn_impl: expected 'xformers', 'sdpa' or 'flex_attention', got 'fmha'"),
        ("attn_bias_type", "local_block_causal", "attn_bias_type: expected one of None, 'causal', 'block_causal', got"),
        ("local_attention_window_len", None, "local_attention_window_len: expected a window, got None"),
        ("eos_id", None, "eos_id: expected an id, .* got None"),
        ("eos_id", 0, "eos_id: expected an id, and with attn_bias_type 'block_causal' not 0, got 0"),
        ("eos_id", 260, "eos_id: expected a value < vocab_size = 260, got 260"),
        ("patching_mode", "", "patching_mode: expected a mode, .* got ''"),
        ("patching_mode", "static", "patching_mode: expected 'entropy', 'space', 'byte' or 'bpe', got 'static'"),
        ("n_heads_global", 5, "params.json: model: dim: expected a multiple of"),
        ("multiple_of", 0, "multiple_of: expected a value >= 1, got 0"),
        ("dim_global", "48", "model.dim_global: expected int, got '48'"),
        ("monotonicity", None, "monotonicity: expected bool, got None"),
        (
            "efficient_attn",
            "sdpa",
            "model: expected the fields of ByteLatentTransformerArgs, got efficient_attn as well",
        ),
        ("patch_size", 4.0, "use_local_encoder_transformer: expected True, since dim_global / patch_size is not 32"),
        ("n_layers_global", 3, "missing global_transformer.layers.2.attention.wq.weight"),
        (
            "encoder_hash_byte_group_vocab",
            30,
            r"encoder_hash_tok_embedding.3.weight of shape \[31, 32\], expected \[30",
        ),
        ("encoder_hash_byte_group_nb_functions", 1, "unknown encoder_hash_tok_embedding.2.weight"),
    ],
)
def test_arguments_of_facebookresearch_that_are_not_ours_say_why(theirs, key: str, value: object, message: str) -> None:
    args = {**ARGS, key: value}
    if value is ...:
        del args[key]
    (theirs[0] / "blt" / "params.json").write_text(json.dumps({"model": args}))
    with pytest.raises(ValueError, match=message):
        BLT.from_pretrained(theirs[0] / "blt")


def test_unknown_fields_that_are_null_ask_for_nothing(theirs) -> None:
    file = theirs[0] / "blt" / "params.json"
    expected = read_config(file.parent)
    values = json.loads(file.read_text())
    values["model"]["efficient_attn"] = values["data"]["patcher_args"]["newlines"] = None
    file.write_text(json.dumps(values))
    assert read_config(file.parent) == expected


def test_patching_modes_of_facebookresearch(theirs) -> None:
    file = theirs[0] / "blt" / "params.json"
    file.write_text(json.dumps({"model": ARGS, "data": {"patcher_args": {**RULES, "patching_mode": "static"}}}))
    with pytest.raises(ValueError, match="patching_mode: expected 'entropy', 'space', 'byte' or 'bpe', got 'static'"):
        BLT.from_pretrained(file.parent)
    file.write_text(json.dumps({"model": ARGS, "data": {"patcher_args": {**RULES, "patching_mode": "bpe"}}}))
    assert BLT.from_pretrained(file.parent).config.patching == "bpe"
    rules = {"patching_mode": "space", "max_patch_length": 3}
    file.write_text(json.dumps({"model": ARGS, "data": {"patcher_args": rules}}))
    config = BLT.from_pretrained(file.parent).config
    assert (config.patching, config.max_patch_length) == ("space", 3)
    assert config.threshold == ByteLMConfig().threshold  # this is the default of that class, not the model's
    for rules, message in (
        ({"threshold": None}, "data.patcher_args.threshold: expected float, got None"),
        ({"newlines": True}, "data.patcher_args: expected the fields of PatcherArgs, got newlines as well"),
    ):
        file.write_text(json.dumps({"model": ARGS, "data": {"patcher_args": rules}}))
        with pytest.raises(ValueError, match=message):
            BLT.from_pretrained(file.parent)


# Each has changes of ARGS, and the masks that the oracle shall use where the code has others.
FOREIGN: dict[str, tuple[dict, dict]] = {
    "block_causal": ({}, {}),
    "causal": ({"attn_bias_type": "causal"}, {}),
    "missing": ({"attn_bias_type": ..., "attn_impl": ..., "eos_id": ...}, {"attn_bias_type": "causal", "eos_id": 2}),
    "sdpa": ({"attn_impl": "sdpa"}, {}),
    "flex": ({"attn_impl": "flex_attention"},
             {"attn_bias_type": "causal", "local_attention_window_len": 1000, "eos_id": 1000}),
    "another_end": ({"eos_id": 9}, {}),
    "no_end_of_documents": ({"eos_id": 0, "attn_bias_type": "causal"}, {}),
    "windows": ({"cross_attn_window_encoder": 2, "cross_attn_all_layers_encoder": False, "n_kv_heads": 1}, {}),
    "more_ids": ({"pm_size": 5, "cross_attn_all_layers_decoder": False}, {}),
    "share": ({"dim_token": None, "dim_global": 64, "patch_size": 2.0, "head_dim": None}, {}),
}  # fmt: skip


def text_row() -> list[int]:
    """Return words, with EOS in and between them, and the id 9."""
    row = [1, *(b + 4 for b in b"first of the texts"), 2, 1, *(b + 4 for b in b"a second one, longer"), 2, 70]
    row[10] = row[25] = 9
    return row


def random_state(path: Path) -> dict[str, Tensor]:
    """Return weights for the configuration in `path`, under facebookresearch/blt's names: all of them tell."""
    config = read_config(path)
    torch.manual_seed(0)
    model = BLT(config) if isinstance(config, BLTConfig) else ByteLM(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.startswith("patcher."):
                value.uniform_(0.5, 1.5) if "norm" in name else value.normal_(0, 0.3)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("patcher.")}
    return foreign_names(state, "local_decoder.output" if isinstance(config, BLTConfig) else "output")


@pytest.mark.parametrize("case", FOREIGN)
def test_equals_facebookresearch(case: str, tmp_path) -> None:
    changes, masks = FOREIGN[case]
    args = {key: value for key, value in {**ARGS, **changes}.items() if value is not ...}
    (tmp_path / "params.json").write_text(json.dumps({"model": {**args, "patching_mode": "space"}}))
    state = random_state(tmp_path)
    torch.save({"model": state}, tmp_path / "consolidated.pth")
    model, row = BLT.from_pretrained(tmp_path, dtype=torch.float64), text_row()
    lengths = oracle.lengths_of(oracle.space_starts(row), len(row), include_next_byte=True)
    complete = {**args, "encoder_hash_byte_group_size": [3, 4], **masks}
    expected = oracle_bytelatent.blt_logits(state, complete, row, lengths)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(torch.tensor(row)), expected, rtol=0, atol=1e-12)
    batch = torch.tensor([row[:30], row[5:35]])
    for tokens, logits in zip(batch.tolist(), model(batch), strict=True):
        lengths = oracle.lengths_of(oracle.space_starts(tokens), len(tokens), include_next_byte=True)
        expected = oracle_bytelatent.blt_logits(state, complete, tokens, lengths)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    model.save(tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path / "model.safetensors")(batch), model(batch))


LM_ARGS = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 260, "multiple_of": 16, "eos_id": 2, "norm_eps": 1e-3,
           "rope_theta": 100.0, "attn_impl": "xformers", "attn_bias_type": "local_block_causal",
           "sliding_window": WINDOW}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "masks"),
    [
        ({}, {}),
        ({"eos_id": 9, "n_kv_heads": 1}, {}),
        ({"attn_bias_type": "block_causal", "sliding_window": None}, {}),
        ({"attn_bias_type": "causal", "sliding_window": None}, {}),
        ({"attn_bias_type": None}, {}),  # that code ignores the window then
        ({"attn_bias_type": ..., "attn_impl": ..., "eos_id": ...}, {"attn_bias_type": None, "eos_id": 2}),
        ({"attn_impl": "flex_attention"}, {"attn_bias_type": "causal"}),
    ],
)
def test_equals_the_entropy_model_of_facebookresearch(changes: dict, masks: dict, tmp_path) -> None:
    args = {key: value for key, value in {**LM_ARGS, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps({"args": args}))
    state = random_state(tmp_path)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    model, row = ByteLM.from_pretrained(tmp_path, dtype=torch.float64), text_row()
    expected = oracle_bytelatent.byte_lm_logits(state, {**args, **masks}, row)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(torch.tensor(row)), expected, rtol=0, atol=1e-12)
    model.save(tmp_path / "ours.safetensors")
    assert ByteLM.load(tmp_path / "ours.safetensors").config == model.config
    model.save_pretrained(tmp_path / "theirs")
    again = ByteLM.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config
    assert torch.equal(again(torch.tensor(row)), model(torch.tensor(row)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_bias_type": "causal"}, "sliding_window: expected None, since attn_bias_type is 'causal', got 7"),
        ({"sliding_window": None}, "sliding_window: expected a window, since attn_bias_type is 'local_block_causal'"),
        ({"attn_bias_type": "local"}, "attn_bias_type: expected one of None, 'causal', 'block_causal', 'local_block"),
        ({"attn_impl": None}, "attn_impl: expected 'xformers', 'sdpa' or 'flex_attention', got None"),
        ({"eos_id": None}, "eos_id: expected an id, got None"),
        ({"weight_tying": True}, "args.weight_tying: expected False, got True"),
        ({"head_dim": 4}, "head_dim: expected 16, got 4"),
        ({"n_heads": None}, "n_heads: expected a value, got None"),
        ({"vocab_size": ...}, "vocab_size: expected a value >= 1, got -1"),
        ({"dropout": 0.1}, "args: expected the fields of LMTransformerArgs, got dropout as well"),
    ],
)
def test_arguments_of_entropy_models_that_are_not_ours_say_why(changes: dict, message: str, tmp_path) -> None:
    args = {key: value for key, value in {**LM_ARGS, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps({"args": args}))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("name", sorted(bytelatent_fields.BYTE_LATENT_TRANSFORMER_ARGS.ignored))
def test_ignored_arguments_of_facebookresearch_change_nothing(name: str, tmp_path) -> None:
    (tmp_path / "params.json").write_text(json.dumps({"model": {**ARGS, name: "whatever"}}))
    changed = read_config(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps({"model": ARGS}))
    assert changed == read_config(tmp_path)


@pytest.mark.parametrize("place", ["consolidated.safetensors", "consolidated/consolidated.safetensors"])
def test_consolidated_safetensors(theirs, place: str) -> None:
    root, expected = theirs
    for folder in (root / "blt", root / "entropy_model"):
        state = torch.load(folder / "consolidated.pth")["model"]
        (folder / place).parent.mkdir(exist_ok=True)
        safetensors.save_file(state, folder / place)
        (folder / "consolidated.pth").unlink()
    assert torch.equal(BLT.from_pretrained(root / "blt")(batch()), expected(batch()))


def test_damaged_files_are_named(theirs) -> None:
    root, _ = theirs
    file = root / "blt" / "consolidated.pth"
    whole = file.read_bytes()
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)  # such files are read, not mapped
    BLT.from_pretrained(root / "blt")
    for damaged in (b"", b"abc", b"PK\x03\x04", whole[:2000], whole[:-200], b"\x80\x02" + whole):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"blt/consolidated.pth: expected weights of torch.save, got "):
            BLT.from_pretrained(root / "blt")
    for content in ([1], {"model": [1]}):
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"blt/consolidated.pth: expected weights under 'model', got "):
            BLT.from_pretrained(root / "blt")
    file.unlink()
    (root / "blt" / "consolidated.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"consolidated.safetensors: expected a whole safetensors file"):
        BLT.from_pretrained(root / "blt")
    index = root / "blt" / "model.safetensors.index.json"
    for text, message in (
        ("{", "expected JSON, got "),
        ("[]", "expected a JSON object, got list"),
        ("{}", "weight_map: expected the names of files by those of weights, got {}"),
        ('{"weight_map": 5}', "weight_map: expected a JSON object, got int"),
        ('{"weight_map": {"x": 5}}', "weight_map: expected the names of files by those of weights, got {'x': 5}"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"model.safetensors.index.json: {re.escape(message)}"):
            BLT.from_pretrained(root / "blt")
    index.write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"blt: expected model-1.safetensors, found none"):
        BLT.from_pretrained(root / "blt")
    params = root / "blt" / "params.json"
    for damaged, message in (
        (b"\xff\xfe", "expected JSON, got "),
        (b'{"model": 3}', "model: expected a JSON object, got int"),
        (b"3", "expected a JSON object, got int"),
    ):
        params.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"params.json: {message}"):
            BLT.from_pretrained(root / "blt")


class Surprise:
    def __reduce__(self):
        return print, ("run by unpickling",)


def test_consolidated_weights_have_a_key(theirs) -> None:
    torch.save({"optim": {}, "step": 1}, theirs[0] / "blt" / "consolidated.pth")
    with pytest.raises(ValueError, match=r"consolidated.pth: expected weights under 'model', got optim, step"):
        BLT.from_pretrained(theirs[0] / "blt")


def test_pickled_code_is_not_run(theirs, capsys) -> None:
    torch.save({"model": {"tok_embeddings.weight": Surprise()}}, theirs[0] / "blt" / "consolidated.pth")
    with pytest.raises(ValueError, match=r"consolidated.pth: expected weights of torch.save, got .*Weights only"):
        BLT.from_pretrained(theirs[0] / "blt")
    assert not capsys.readouterr().out


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_the_hub(theirs, tmp_path, monkeypatch) -> None:
    """A repository ``owner/name`` with folders in it, downloaded by a stand-in."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository: str, file: str, revision: str | None = None) -> str:
        asked.append((repository, file, revision))
        if not (tmp_path / file).is_file():
            raise hub.errors.EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = BLT.from_pretrained("facebook/blt/blt", revision="main")
    assert torch.equal(model(batch()), theirs[1](batch()))
    assert ("facebook/blt", "blt/consolidated.pth", "main") in asked
    assert ("facebook/blt", "entropy_model/consolidated.pth", "main") in asked
    assert {repository for repository, _, _ in asked} == {"facebook/blt"}
    with pytest.raises(FileNotFoundError, match=r"facebook/blt: expected config.json or params.json, found none"):
        BLT.from_pretrained("facebook/blt")


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the hub does for the files in `root`, or with the error that a test chooses."""

    root: Path
    failure: str | None = None  # applies only to files in entropy_model/ if `late`
    late = False
    asked: ClassVar[list[tuple[str, str]]]  # lists the revision and name of every file
    COMMIT = "0" * 40
    CODES: ClassVar = {"EntryNotFound": 404, "RepoNotFound": 401, "RevisionNotFound": 404, "GatedRepo": 403, "": 503}

    def do_GET(self) -> None:
        revision, name = unquote(self.path).split("/resolve/", 1)[1].split("/", 1)
        self.asked.append((revision, name))
        file, failure = self.root / name, self.failure
        if failure is None or (self.late and not name.startswith("entropy_model/")):
            failure = None if file.is_file() else "EntryNotFound"
        if failure == "silence":
            self.close_connection = True
            return
        self.send_response(200 if failure is None else self.CODES[failure])
        self.send_header("X-Repo-Commit", self.COMMIT)
        if failure is None:
            content = file.read_bytes()
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
        else:
            self.send_header("X-Error-Code", failure)
            self.send_header("Content-Length", "0")
        self.end_headers()
        if failure is None and self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *args: object) -> None:
        """Write nothing."""


@pytest.fixture
def fake_hub(theirs, tmp_path, monkeypatch) -> Iterator[type[FakeHub]]:
    """Return a hub with the repository owner/blt, whose entropy model lies in a folder of it, and an empty cache."""
    hub = pytest.importorskip("huggingface_hub")
    root, _ = theirs
    (root / "entropy_model").rename(root / "blt" / "entropy_model")
    handler = type("Handler", (FakeHub,), {"root": root / "blt", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.constants.ENDPOINT, endpoint)
    monkeypatch.setattr(hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(hub.utils._http.time, "sleep", lambda seconds: None)  # it sleeps between attempts
    yield handler
    server.shutdown()
    server.server_close()


FAILURES = {
    "silence": (ConnectionError, r"owner/blt.*: \S+\.json could not be downloaded: RemoteProtocolError"),
    "": (ConnectionError, r"owner/blt.*: the hub does not say whether there is \S+\.json: .*503"),
    "GatedRepo": (PermissionError, "owner/blt: the hub gives no access to it"),
    "RepoNotFound": (FileNotFoundError, "owner/blt: there is no such directory, and no repository on the hub but"),
    "RevisionNotFound": (ValueError, "revision: expected one of owner/blt, got None"),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_what_the_hub_fails_with_is_told(fake_hub, failure: str, late: bool) -> None:
    """Never a missing file; and if the entropy model cannot be reached, no model without it."""
    fake_hub.failure, fake_hub.late = failure, late
    error, message = FAILURES[failure]
    with pytest.raises(error, match=message):
        BLT.from_pretrained("owner/blt")


def test_the_cache_of_the_hub_serves_offline(fake_hub, theirs, monkeypatch) -> None:
    import huggingface_hub as hub

    expected = theirs[1]
    (fake_hub.root / "entropy_model").rename(fake_hub.root / "elsewhere")
    assert BLT.from_pretrained("owner/blt").patcher is None  # the cache notes that
    (fake_hub.root / "elsewhere").rename(fake_hub.root / "entropy_model")
    with pytest.raises(FileNotFoundError, match=r"owner/blt/none: expected config.json or params.json, found none"):
        BLT.from_pretrained("owner/blt/none")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert BLT.from_pretrained("owner/blt").patcher is None
    with pytest.raises(ConnectionError, match=r"owner/other: the hub does not say .* offline"):
        BLT.from_pretrained("owner/other")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert torch.equal(BLT.from_pretrained("owner/blt")(batch()), expected(batch()))
    fake_hub.failure = ""
    assert torch.equal(BLT.from_pretrained("owner/blt")(batch()), expected(batch()))


def test_all_files_are_of_one_commit(fake_hub) -> None:
    """The configuration is looked up on the branch, and every other file in the commit that it came from."""
    BLT.from_pretrained("owner/blt")
    first = ("config.json", "params.json")
    assert {revision for revision, name in fake_hub.asked if name in first} == {"main"}
    assert {revision for revision, name in fake_hub.asked if name not in first} == {fake_hub.COMMIT}
    assert any(name.startswith("entropy_model/") for _, name in fake_hub.asked)


def test_paths_that_are_not_there_say_why(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="expected a directory or a repository on the hub, got /not/there"):
        BLT.from_pretrained("/not/there")
    with pytest.raises(FileNotFoundError, match=r"expected config.json or params.json, found none"):
        ByteLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blt_patcher"}')
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or .*, found none"):
        ByteLM.from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"no directory facebook/blt.* pip install 'blt-kernels\[hub\]'"):
        BLT.from_pretrained("facebook/blt")
