"""The global transformer of a BLT from Llama: the same layers, whatever the shape, and errors for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blt_kernels.models import BLT, BLTConfig
from blt_kernels.models.checkpoint.llama import load_global_transformer, read_config
from blt_kernels.nn import TransformerConfig, rotary_table
from blt_kernels.train import loop
from blt_kernels.train.build import build_model
from blt_kernels.train.config import TrainConfig
from blt_kernels.train.parallel import Ranks

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "rope_theta": 3000.0,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 256,
}
LOCAL = TransformerConfig(24, 1, 2, ffn_dim=32, window=16)


def make_llama(path: Path, **changes: Any) -> Any:
    """Write a Llama with random weights, as transformers does, and return it."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, parameter in llama.named_parameters():  # they are large enough for every part to matter
            parameter.normal_(0, 1 if "norm" in name else 0.2)
    llama.save_pretrained(path, max_shard_size=40_000)
    return llama


def make_blt(config: TransformerConfig) -> BLT:
    return BLT(BLTConfig(LOCAL, config, LOCAL, patching="space", patcher=None, ngram_vocab=16))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 3000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Of the four frequencies of a head, the first is kept, the second lies between, the others are divided by 8.
SCALED = {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 100}}


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 6, "tie_word_embeddings": True}, SCALED],
    ids=["gqa", "mha", "scaled"],
)
@pytest.mark.parametrize("head", [True, False], ids=["with_head", "without"])
def test_the_layers_are_those_of_llama(head: bool, changes: dict[str, Any], tmp_path: Path) -> None:
    llama = make_llama(tmp_path, **changes)
    if not head:
        llama.model.save_pretrained(tmp_path, max_shard_size=40_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    config = read_config(tmp_path)
    kv_heads = changes.get("num_key_value_heads", 2)
    assert (config.dim, config.num_layers, config.num_heads, config.kv_heads) == (48, 3, 6, kv_heads)
    assert (config.hidden_dim, config.rope_theta, config.norm_eps, config.window) == (80, 3000.0, 1e-3, None)
    assert config.rope_scaling == ((8.0, 1.0, 4.0, 100.0) if changes is SCALED else None)
    model = make_blt(config).double()
    others = {n: v.clone() for n, v in model.state_dict().items() if not n.startswith("global_transformer.layers.")}
    load_global_transformer(model, tmp_path)
    state = model.state_dict()
    assert all(state[name].equal(value) for name, value in others.items())

    x = torch.randn(2, 70, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    llama.double().model.norm = nn.Identity()
    with torch.no_grad():
        expected = llama.model(inputs_embeds=x).last_hidden_state
        table = rotary_table(torch.arange(70).repeat(2), config, x.dtype)
        offsets = torch.tensor([0, 70, 140], dtype=torch.int32)
        got = model.global_transformer(x.flatten(0, 1), table, offsets)
    # transformers computes its angles in fp32: at position 70 they are off by 70 * 2^-24 = 4e-6.
    error = (got.view(2, 70, 48) - expected).abs().max() / expected.abs().max()
    assert error < 4e-6


def edit(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type: expected 'llama', got 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({"mlp_bias": True}, "mlp_bias: expected False, got True"),
        ({"head_dim": 16}, "head_dim: expected 8, got 16"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters.low_freq_factor: expected a number, got None",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, got 0.5"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: expected None, got {'bits': 4}"),
        ({"sliding_window": 9}, "expected the fields of LlamaConfig, got sliding_window as well"),
        ({"hidden_size": "48"}, "hidden_size: expected int, got '48'"),
        ({"num_attention_heads": 0}, "config.json: num_heads: expected a value >= 1, got 0"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
            "rope_type: expected 'default' or 'llama3', got 'linear'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_layers_lack_is_an_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    read_config(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters=None, rope_theta=77, rope_scaling=None, head_dim=None, num_key_value_heads=None)
    config = read_config(tmp_path)
    assert (config.rope_theta, config.kv_heads) == (77.0, 6)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "nowhere")


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    make_llama(tmp_path)
    wide = read_config(tmp_path)
    for field, value in (("num_layers", 2), ("num_kv_heads", 3), ("ffn_dim", 88), ("rope_theta", 10000.0)):
        other = TransformerConfig(**{**vars(wide), field: value})
        with pytest.raises(ValueError, match=rf"global_transformer\.{field}: expected .* got {value}"):
            load_global_transformer(make_blt(other), tmp_path)
    edit(tmp_path, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"unknown layers\.2\.input_layernorm\.weight"):
        load_global_transformer(make_blt(read_config(tmp_path)), tmp_path)


def test_training_begins_with_llama_and_its_own_learning_rate(tmp_path: Path) -> None:
    make_llama(tmp_path / "llama")
    (tmp_path / "text").write_text("the quick brown fox; " * 40)
    local = {**vars(LOCAL)}
    changes = {"encoder": local, "decoder": local, "patching": "space", "ngram_vocab": 16}
    options: dict[str, Any] = {"overrides": changes, "heldout": 0.0, "batch_bytes": 100, "tensorboard": False}
    options |= {"init_global": tmp_path / "llama", "learning_rate": 1e-2, "warmup": 0}
    config = TrainConfig("blt", [tmp_path / "text"], tmp_path / "run", global_learning_rate=1e-3, clip=1e9, **options)
    model = build_model(config)
    assert isinstance(model, BLT)
    assert model.config.global_transformer == read_config(tmp_path / "llama")
    fresh = make_blt(model.config.global_transformer)
    load_global_transformer(fresh, tmp_path / "llama")
    layers = model.global_transformer.layers.state_dict()
    assert all(layers[name].equal(value) for name, value in fresh.global_transformer.layers.state_dict().items())

    run = loop._Run(config, Ranks(torch.device("cpu")))
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.advance()
    for name, value in run.model.named_parameters():  # the first step of Adam is as long as the learning rate
        rate = 1e-3 if name.startswith("global_transformer.layers.") else 1e-2
        moved = (value - before[name]).abs().max().item()
        assert 0.5 * rate < moved < 2.5 * rate, name
    for wrong in ({"model": "megabyte"}, {"model": "entropy", "init_global": None, "global_learning_rate": 1e-3}):
        with pytest.raises(ValueError, match="expected None, since model is"):
            TrainConfig(**{"paths": [], "out": tmp_path, **options, **wrong})
