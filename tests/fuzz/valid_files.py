"""Small valid files for every loader, and calls of the loaders that are functions of the package."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blt_kernels import bpe
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig
from blt_kernels.models.checkpoint import bytelatent, llama
from blt_kernels.models.checkpoint.transformers import names_of as transformers_names
from blt_kernels.models.weights import write_safetensors
from blt_kernels.nn import TransformerConfig
from blt_kernels.train import data, loop, state, stored_patches
from blt_kernels.train import log as train_log
from blt_kernels.train.build import build_model
from blt_kernels.train.config import TrainConfig
from blt_kernels.train.parallel import Ranks

TEXT = b"It was the best of times,\nit was the worst of times.\n" * 3
IDS = torch.tensor([1, *(byte + 4 for byte in TEXT[:24])])
LOCAL = TransformerConfig(16, 1, 2, ffn_dim=16, window=8)
WIDE = TransformerConfig(32, 2, 2, ffn_dim=16)
LM = ByteLMConfig(16, 1, 2, ffn_dim=16, window=8)
BLT_CONFIG = BLTConfig(LOCAL, WIDE, LOCAL, LM, ngram_sizes=(3, 4), ngram_vocab=7, threshold=5.0)


def _seeded(model: type[nn.Module], config: Any) -> Any:
    torch.manual_seed(0)
    return model(config)


@torch.no_grad()
def run_model(model: Any) -> None:
    """Run a model that was accepted on a short text."""
    model.eval()(IDS)


# Our own files


def save_lm(folder: Path) -> None:
    _seeded(ByteLM, LM).save(folder / "model.safetensors")


def save_blt(folder: Path) -> None:
    _seeded(BLT, BLT_CONFIG).save(folder / "model.safetensors")


def save_megabyte(folder: Path) -> None:
    config = MegaByteConfig(2, WIDE, LOCAL, cross_patch=1, conv_sizes=(3,))
    _seeded(MegaByte, config).save(folder / "model.safetensors")


# transformers' files


def save_transformers(folder: Path) -> None:
    _seeded(BLT, replace(BLT_CONFIG, cross_attn_grouped_heads=True)).save_pretrained(folder)


def save_transformers_patcher(folder: Path) -> None:
    _seeded(ByteLM, LM).save_pretrained(folder)


def save_shards(folder: Path) -> None:
    save_transformers(folder)
    weights = _seeded(BLT, replace(BLT_CONFIG, cross_attn_grouped_heads=True)).state_dict()
    named = {transformers_names(name)[0]: value for name, value in weights.items()}
    (folder / "model.safetensors").unlink()
    _write_shards(folder, named)


def _write_shards(folder: Path, named: dict[str, torch.Tensor]) -> None:
    halves = [dict(list(named.items())[::2]), dict(list(named.items())[1::2])]
    places = {}
    for i, half in enumerate(halves):
        write_safetensors(folder / f"model-{i}.safetensors", half, {})
        places |= dict.fromkeys(half, f"model-{i}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


LLAMA = {"rope_theta": 3000.0, "rope_scaling": (8.0, 1.0, 4.0, 32.0)}


def save_llama(folder: Path) -> None:
    values = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 16, "rms_norm_eps": 1e-5, "rope_theta": 3000.0,
        "max_position_embeddings": 64, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    layers = _seeded(BLT, _blt_around(llama.read_config(folder))).global_transformer.layers
    _write_shards(folder, {f"model.layers.{name}": value for name, value in layers.state_dict().items()})


def _blt_around(config: TransformerConfig) -> BLTConfig:
    return replace(BLT_CONFIG, global_transformer=config, patcher=None, patching="space")


def load_llama(folder: Path) -> None:
    """Read the weights into a model with the sizes of the valid files, unless the configuration has others."""
    llama.load_global_transformer(_seeded(BLT, _blt_around(replace(WIDE, num_kv_heads=1, **LLAMA))), folder)


# facebookresearch/blt's files

ARGS = {
    "vocab_size": 260, "dim_global": 48, "dim_local_encoder": 32, "dim_local_decoder": 32, "dim_token": None,
    "n_layers_global": 1, "n_layers_local_encoder": 1, "n_layers_local_decoder": 1, "n_heads_global": 2,
    "n_heads_local_encoder": 2, "n_heads_local_decoder": 2, "ffn_dim_multiplier": 1.0, "multiple_of": 16,
    "cross_attn_encoder": True, "cross_attn_decoder": True, "cross_attn_init_by_pooling": True, "cross_attn_k": 2,
    "cross_attn_nheads": 4, "cross_attn_all_layers_encoder": True, "cross_attn_all_layers_decoder": True,
    "use_rope": True, "pm_size": 0, "downsampling_by_pooling": "max", "encoder_hash_byte_group_size": "3,4",
    "encoder_hash_byte_group_vocab": 31, "encoder_hash_byte_group_nb_functions": 1,
    "encoder_enable_byte_ngrams": False, "local_attention_window_len": 8, "patching_mode": "entropy",
    "attn_impl": "xformers", "attn_bias_type": "block_causal", "eos_id": 2,
}  # fmt: skip
RULES = {"patching_mode": "entropy", "threshold": 5.1, "monotonicity": False, "patch_size": 4.5}
ENTROPY = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 260, "ffn_dim_multiplier": 1.0}


def save_bytelatent(folder: Path, legacy: bool = False, hub: bool = False) -> None:
    """Write what facebookresearch/blt writes, with an archive or, as before torch 1.6, without; or as on the hub."""
    for name, key, values in (("", "model", ARGS), ("entropy_model", "entropy_model", ENTROPY)):
        place = folder / name
        place.mkdir(exist_ok=True)
        params = {key: values, "data": {"patcher_args": RULES}}
        (place / ("config.json" if hub else "params.json")).write_text(json.dumps({"args": values} if hub else params))
        if hub:
            (place / "train_args.json").write_text(json.dumps(params))
        from blt_kernels.models.checkpoint import read_config

        config = read_config(place)
        tables = 0 if name else 2
        if not name:
            config = replace(config, patcher=None)
        weights: dict[str, torch.Tensor] = {}
        for own, value in _seeded(ByteLM if name else BLT, config).state_dict().items():
            parts = bytelatent.names_of(own, tables)
            weights |= {part: rows.clone() for part, rows in zip(parts, value.chunk(len(parts)), strict=True)}
        if hub:
            write_safetensors(place / "model.safetensors", weights, {})
        else:
            kept = {"model": weights, "optim": {"step": 1}}
            torch.save(kept, place / "consolidated.pth", _use_new_zipfile_serialization=not legacy)


# Training and its files


def save_run(folder: Path) -> None:
    (folder / "text").write_bytes(TEXT)
    loop.train(training(folder, steps=2))
    for file in (folder / "run").glob("*"):
        if file.name in ("loss.png", "lock"):
            file.unlink()


def training(folder: Path, steps: int) -> TrainConfig:
    sizes = {name: value for name, value in asdict(LM).items() if name in ("dim", "num_layers", "num_heads", "ffn_dim")}
    return TrainConfig(
        "entropy", [folder / "text"], folder / "run", overrides=sizes, heldout=0, steps=steps, batch_bytes=64,
        context=32, tensorboard=False, log_every=1,
    )  # fmt: skip


def _begin(folder: Path, model: str, overrides: dict[str, Any], **options: Any) -> None:
    build_model(TrainConfig(model, [folder], folder / "run", overrides=overrides, **options))


def begin_as_llama(folder: Path) -> None:
    layers = asdict(LOCAL)
    overrides = {"encoder": layers, "decoder": layers, "ngram_vocab": 7, "patching": "space"}
    _begin(folder, "blt", overrides, init_global=folder)


def begin_as_lm(folder: Path) -> None:
    _begin(folder, "entropy", {}, init=folder / "model.safetensors")


def begin_with_patcher(folder: Path) -> None:
    layers = asdict(LOCAL)
    overrides = {"encoder": layers, "global_transformer": layers, "decoder": layers, "ngram_vocab": 7}
    _begin(folder, "blt", overrides, patcher=folder)


def save_checkpoint(folder: Path) -> None:
    model, optimizer = _trained()
    state.save(folder / "checkpoint", 2, model, optimizer, CHECKPOINT_VALUES, Ranks(torch.device("cpu")))


CHECKPOINT_VALUES = {"options": {"steps": 3}, "config": asdict(LM), "step": 2, "seconds": 1.5, "heldout_bits": None}


def _trained() -> tuple[Any, torch.optim.Optimizer]:
    model = _seeded(ByteLM, LM)
    optimizer = torch.optim.AdamW(model.parameters())
    model.loss(IDS).backward()
    optimizer.step()
    return model, optimizer


def load_checkpoint(folder: Path) -> None:
    path = state.latest(folder / "checkpoint")
    if path is None:
        raise FileNotFoundError(f"{folder}: there is no complete checkpoint")
    state.read_values(path)
    model = _seeded(ByteLM, LM)
    state.load(path, model, torch.optim.AdamW(model.parameters()), Ranks(torch.device("cpu")))
    state.load_weights(path, model)


def _patching_model() -> BLT:
    return _seeded(BLT, replace(BLT_CONFIG, patching="space", patcher=None))


def save_patches(folder: Path) -> None:
    from blt_kernels.train import save_patches as writer

    (folder / "text").write_bytes(TEXT)
    writer.save(folder / "stored", data.find_sources([folder / "text"]), _patching_model(), 32)
    (folder / "stored" / "lock").unlink()


def load_patches(folder: Path) -> None:
    stored = stored_patches.StoredPatches(folder / "stored")
    model = _patching_model()
    sources = data.find_sources([folder / "text"])
    stored.check(stored_patches.provenance(model, 32, False), sources)
    for row in (row for rows in data.heldout_rows(sources, 64, 32) for row in rows):
        if len(stored.boundaries(row)) != row.length:
            raise AssertionError("there are not as many boundaries as bytes")


def resume_patches(folder: Path) -> None:
    from blt_kernels.train import save_patches as writer

    writer.save(folder / "stored", data.find_sources([folder / "text"]), _patching_model(), 32)


def resume_unfinished(folder: Path) -> None:
    save_patches(folder)
    index = json.loads((folder / "stored" / "index.json").read_text())
    (folder / "stored" / "index.json").write_text(json.dumps({**index, "sha256": None}))
    (folder / "stored" / "done").write_bytes(b"\0")


def save_log(folder: Path) -> None:
    lines = [{"step": i, "bits_per_byte": 8.0 / i, "heldout_bits_per_byte": 7.0} for i in range(1, 5)]
    lines.append({"step": 4, "heldout_bits_per_byte": 7.5, "final": True})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def load_log(folder: Path) -> Any:
    return train_log.read_log(folder / "log.jsonl"), folder


def draw_log(read: Any) -> None:
    train_log.draw_curve(read[1] / "log.jsonl", read[1] / "loss.png")
    train_log.Log(read[1], 2, False).close()


# Tokenizers, texts, tables


def save_tokenizer(folder: Path) -> None:
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def load_tokenizer(folder: Path) -> Any:
    tokenizer = bpe.load_tokenizer(folder)
    lengths = bpe.token_lengths(tokenizer, TEXT, option=f"tokenizer {folder}")
    if sum(lengths) != len(TEXT):
        raise AssertionError("the lengths of the tokens do not add up")


def save_texts(folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    texts = {"a/one": TEXT, "a/b/two\n\x1b": TEXT[:5], "é": b"\xff" * 9, "empty": b"", "nul": b"\0x"}
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    (folder / "a" / "loop").symlink_to("..")


def load_texts(folder: Path) -> None:
    sources = data.find_sources([folder])
    for rows in data.heldout_rows(sources, 64, 16):
        data.read_rows(rows)


def save_table(folder: Path) -> None:
    (folder / "table.csv").write_text("op,shape,dtype,threads,seconds\npatch_pool,1,float32,1,0.1\n")


def load_table(folder: Path) -> None:
    bench = str(Path(__file__).parents[2] / "bench")
    if bench not in sys.path:  # the modules of benches import each other by their bare names
        sys.path.append(bench)
    import timing

    timing.read_csv(folder / "table.csv")


def save_hub_cache(folder: Path) -> None:
    cached = folder / "models--owner--blt"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_bytelatent(cached / "snapshots" / ("0" * 40), hub=True)


def load_hub_cache(folder: Path) -> Any:
    from huggingface_hub import constants

    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(folder), True
    try:
        return BLT.from_pretrained("owner/blt")
    except (OSError, ValueError) as error:
        if "owner/blt" in str(error):
            raise type(error)(f"{folder}: {error}") from error
        raise
