"""FLOPs: the paper's numbers, this implementation's against what is counted while it runs, and the command."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import theirs  # noqa: F401 (a fixture)
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from blt_kernels import block_causal_attention, linear_cross_entropy, patch_cross_attention
from blt_kernels.cli import app
from blt_kernels.cli.flops import read_config, with_window
from blt_kernels.flops import PAPER_SIZES, Part, Rows, count_flops, counted_parts, paper_flops
from blt_kernels.ids import to_ids
from blt_kernels.layout import PatchLayout
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig
from blt_kernels.nn import TransformerConfig
from blt_kernels.testing import offsets_of, real_text

CONTEXT = 16384


def tokens_model(dim: int, layers: int, vocab: int) -> ByteLMConfig:
    return ByteLMConfig(dim=dim, num_layers=layers, num_heads=dim // 128, window=None, vocab_size=vocab)


# --- the paper --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch_size", "expected"), [(4.5, 3.45e9), (6, 2.63e9), (8, 2.03e9)])
def test_largest_size(patch_size: float, expected: float) -> None:
    # These come from the project's notes on the paper, for rows of 16384 bytes.
    assert paper_flops(PAPER_SIZES["8B"], patch_size, CONTEXT).total.forward == pytest.approx(expected, rel=2e-3)


def test_llama_3_8b() -> None:
    # The same notes say: a token has 4.4 bytes, and the formula's feed-forward is four times the width.
    per_token = paper_flops(tokens_model(4096, 32, 128256), 1, CONTEXT / 4.4).total.forward
    assert per_token / 4.4 == pytest.approx(3.39e9, rel=2e-3)


@pytest.mark.parametrize(("size", "share"), [("400M", 0.38), ("1B", 0.36)])
def test_share_of_the_local_decoder_with_patches_of_8(size: str, share: float) -> None:
    flops = paper_flops(PAPER_SIZES[size], 8, CONTEXT)
    assert flops.parts["decoder"].forward / flops.total.forward == pytest.approx(share, abs=5e-3)


def test_formula_by_hand() -> None:
    config = BLTConfig(
        encoder=TransformerConfig(4, 1, 1, window=3),
        global_transformer=TransformerConfig(6, 2, 1),
        decoder=TransformerConfig(4, 1, 1, window=7),
        queries_per_patch=2,
        patcher=ByteLMConfig(dim=2, num_layers=1, num_heads=1, window=None, vocab_size=10),
    )
    flops = paper_flops(config, 4, 20)
    expected = {
        "encoder": 4 * 4 * 2 + 8 * 16 + 16 * 16,
        "encoder cross": (4 * 4 * 2.5 + (2 * 2 + 2) * 2 * 16) * 2 / 4,
        "global": 2 * (4 * 6 * 3 + 8 * 36 + 16 * 36) / 4,
        "decoder cross": 4 * 4 * 1.5 + (2 * 0.5 + 2) * 2 * 16,
        "decoder": 4 * 4 * 4 + 8 * 16 + 16 * 16,
        "output": 2 * 4 * 256,
    }
    assert {name: part.forward for name, part in flops.parts.items()} == expected
    assert {name: part.backward for name, part in flops.parts.items()} == {k: 2 * v for k, v in expected.items()}
    assert flops.total.forward == sum(expected.values())
    assert flops.patcher == 4 * 2 * 10.5 + 8 * 4 + 16 * 4 + 2 * 2 * 10
    assert flops.patcher_training == 3 * flops.patcher
    assert flops.with_patcher == Part(flops.total.forward + flops.patcher, flops.total.backward)
    # A run of 100 bytes: with a patcher that is given, with stored patches, and with the training of the patcher.
    paper = 3 * 100 * sum(expected.values())
    assert flops.training(100, patched_bytes=0) == pytest.approx(paper)
    assert flops.training(100) == pytest.approx(paper + 100 * flops.patcher)
    assert flops.training(100, patched_bytes=20, patcher_bytes=50) == pytest.approx(paper + 170 * flops.patcher)

    spaces = paper_flops(replace(config, patching="space"), 4, 20)
    assert spaces.with_patcher == spaces.total == flops.total


# --- this implementation ----------------------------------------------------------------------------------------------

LOCAL = TransformerConfig(32, 2, 4, window=20)
SMALL = BLTConfig(
    encoder=LOCAL,
    global_transformer=TransformerConfig(48, 2, 2, window=30, num_kv_heads=1),
    decoder=replace(LOCAL, num_kv_heads=2, window=9),
    patcher=ByteLMConfig(dim=16, num_layers=1, num_heads=1, window=None),
    ngram_vocab=50,
    patching="space",
)
MODELS = {
    "blt": SMALL,
    "no projection, K = 4": replace(
        SMALL, queries_per_patch=4, global_transformer=TransformerConfig(128, 1, 2), cross_attn_heads=2
    ),
    "every layer of the encoder": replace(SMALL, cross_attn_all_layers_encoder=True),
    "pooled anew": replace(SMALL, cross_attn_all_layers_encoder=True, pool_every_layer=True),
    "one layer of the decoder": replace(SMALL, cross_attn_all_layers_decoder=False, cross_attn_grouped_heads=True),
    "static patches": replace(SMALL, patching="static", patch_size=3, patcher=None),
    "token model": ByteLMConfig(dim=32, num_layers=2, num_heads=2, window=None, vocab_size=4096),
    "byte model": ByteLMConfig(dim=48, num_layers=2, num_heads=3, num_kv_heads=1, window=40, ffn_dim=100),
    "megabyte": MegaByteConfig(4, TransformerConfig(64, 2, 2, window=20), TransformerConfig(32, 3, 2)),
    "megabyte, extended": MegaByteConfig(
        4, TransformerConfig(64, 1, 2), TransformerConfig(32, 1, 2), cross_patch=3, conv_sizes=(3, 5)
    ),
}


def build(config):
    return {BLTConfig: BLT, ByteLMConfig: ByteLM, MegaByteConfig: MegaByte}[type(config)](config)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_counted_while_running(config) -> None:
    torch.manual_seed(0)
    lengths = [300, 1, 77, 4, 3]
    tokens, rows, model = to_ids(real_text(sum(lengths))), offsets_of(lengths), build(config)
    patches = [0] * len(lengths)
    if isinstance(model, BLT):
        layout = model.patch(tokens, rows)
        patches = layout.cu_patches.diff().tolist()
    with FlopCounterMode(display=False) as counter:
        loss = model.loss(tokens, rows)
        parts, forward = counted_parts(counter.get_flop_counts()), counter.get_total_flops()
        loss.backward()
        backward = counter.get_total_flops() - forward
    flops = count_flops(config, Rows(lengths, patches))
    assert flops.patcher == 0  # none of these patches by entropy
    assert parts == {name: part.forward for name, part in flops.parts.items()}
    assert flops.total.forward == forward
    assert flops.total.backward == backward


def test_counted_patcher() -> None:
    config = replace(SMALL, patching="entropy")
    tokens = to_ids(real_text(200))
    model = BLT(config)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    flops = count_flops(config, Rows.of(model.patch(tokens)))
    parts = counted_parts(counter.get_flop_counts())
    assert parts["patcher"] == flops.patcher
    assert counter.get_total_flops() == flops.with_patcher.forward


def test_counted_steps_with_a_patcher() -> None:
    tokens, model = to_ids(real_text(200)), BLT(replace(SMALL, patching="entropy"))
    flops = count_flops(model.config, Rows.of(model.patch(tokens))).per_byte(200)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens).backward()
    assert counter.get_total_flops() == pytest.approx(flops.training(200))
    with FlopCounterMode(display=False) as of_patcher:
        model.patcher.requires_grad_().loss(tokens).backward()
    both = counter.get_total_flops() + of_patcher.get_total_flops()
    assert both == pytest.approx(flops.training(200, patcher_bytes=200))


def test_a_byte_of_a_token_model() -> None:
    # The text has 40 bytes in 10 tokens: attention and matrices cost those of tokens, and a byte a fortieth of them.
    config = ByteLMConfig(dim=8, num_layers=1, num_heads=1, window=None, ffn_dim=16, vocab_size=4096)
    parts = count_flops(config, Rows([10], [0])).per_byte(40).parts
    assert parts["output"] == Part(10 * 2 * 8 * 4096 / 40, 10 * 4 * 8 * 4096 / 40)
    layer = 10 * 2 * (4 * 8 * 8 + 3 * 8 * 16) + 4 * 8 * (10 * 11 / 2)
    assert parts["decoder"].forward == pytest.approx(layer / 40)


def test_windows_of_cross_attention_are_within_a_percent() -> None:
    config = replace(SMALL, cross_attn_window_encoder=2, cross_attn_window_decoder=3)
    tokens, model = to_ids(real_text(2000)), BLT(config)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens).backward()
    total = count_flops(config, Rows.of(model.patch(tokens))).total
    assert counter.get_total_flops() == pytest.approx(total.forward + total.backward, rel=0.01)


def test_even_rows_are_within_a_percent_of_real_patches() -> None:
    tokens, model = to_ids(real_text(4000)), BLT(SMALL)
    layout = model.patch(tokens)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens).backward()
    even = count_flops(SMALL, Rows.even(4000, 4000 / int(layout.num_patches))).total
    assert counter.get_total_flops() == pytest.approx(even.forward + even.backward, rel=0.01)


def counted(function, *inputs) -> tuple[int, int]:
    """Return FLOPs forward and backward."""
    inputs = [x.requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as counter:
        out = function(*inputs)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def test_loss_from_hidden_states() -> None:
    # Backward multiplies the logits again, and then for the gradients of both inputs.
    hidden, weight, targets = torch.randn(7, 5), torch.randn(11, 5), torch.arange(7)
    product = 2 * 7 * 5 * 11
    assert counted(lambda x, w: linear_cross_entropy(x, w, targets), hidden, weight) == (product, 3 * product)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("lengths", ["same", "cache", "used"])
def test_pairs_of_self_attention(causal: bool, window: int | None, lengths: str) -> None:
    rng = random.Random(f"{causal}{window}{lengths}")
    queries = [rng.randrange(6) for _ in range(4)]
    keys = queries if lengths == "same" else [rng.randrange(9) for _ in range(4)]
    used = [rng.randint(0, n) for n in keys] if lengths == "used" else keys
    heads, kv_heads, width = 4, 2, 8
    options = {"window": window, "causal": causal}
    if lengths == "used":
        options["seqused_k"] = torch.tensor(used)
    forward, backward = counted(
        lambda q, k, v: block_causal_attention(q, k, v, offsets_of(queries), offsets_of(keys), **options),
        torch.randn(sum(queries), heads, width),
        *(torch.randn(sum(keys), kv_heads, width) for _ in range(2)),
    )
    pairs = 0
    for n, m in zip(queries, used, strict=True):
        for i in range(n):
            own = i + m - n
            for j in range(m):
                behind = causal and j > own
                far = window is not None and (j <= own - window or j >= own + window)
                pairs += not (behind or far)
    assert (forward, backward) == (4 * heads * width * pairs, 10 * heads * width * pairs)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("window", [None, 2, 50])
def test_pairs_of_cross_attention(direction: str, window: int | None) -> None:
    vectors, heads, width, size = 3, 2, 8, 40
    boundaries = torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.3
    layout = PatchLayout.from_cuts(boundaries, offsets_of([25, 0, 1, 14])).compact()
    count = layout.capacity * vectors
    sizes = (count, size, size) if direction == "encode" else (size, count, count)
    forward, backward = counted(
        lambda q, k, v: patch_cross_attention(
            q, k, v, layout, direction=direction, queries_per_patch=vectors, window=window
        ),
        *(torch.randn(n, heads, width) for n in sizes),
    )
    row_of = torch.searchsorted(layout.cu_patches[1:], torch.arange(layout.capacity), right=True).tolist()
    pairs = 0
    for byte in range(size):
        own = int(layout.patch_ids[byte]) if direction == "encode" else int(layout.decode_ids[byte])
        for patch in range(layout.capacity):
            away = patch - own if direction == "encode" else own - patch
            pairs += own >= 0 and row_of[patch] == row_of[own] and 0 <= away < (window or 1)
    pairs *= vectors
    assert (forward, backward) == (4 * heads * width * pairs, 10 * heads * width * pairs)


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, ["flops", *map(str, arguments)], prog_name="blt-kernels", env={"COLUMNS": "80"})


def records(*arguments: object) -> list[dict]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_five_sizes() -> None:
    found = records()
    assert [(r["model"], r["patch_size"]) for r in found] == [(n, p) for n in PAPER_SIZES for p in (4.5, 6, 8)]
    for record in found:
        paper = paper_flops(PAPER_SIZES[record["model"]], record["patch_size"], CONTEXT)
        assert record["paper"]["forward"] == paper.total.forward
        assert record["paper"]["training"] == pytest.approx(3 * paper.total.forward)
        # The formula has no wider feed-forwards and projections, so it gives a little less.
        assert 1 < record["implementation"]["forward"] / record["paper"]["forward"] < 1.05
        for column in (record["paper"], record["implementation"]):
            for line in ("forward", "training"):
                assert column[f"{line} + patcher"] == pytest.approx(column[line] + column["patcher"])


def test_tables() -> None:
    result = run("8B", "megabyte-small", "--patch-sizes", "6", "--context", "8192")
    assert result.exit_code == 0, result.output
    assert "rows of 8,192 bytes" in result.stdout
    flops = paper_flops(PAPER_SIZES["8B"], 6, 8192)
    line = next(line for line in result.stdout.splitlines() if line.split()[:1] == ["forward"])
    assert line.split()[1] == f"{flops.total.forward / 1e6:,.0f}"
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80


def test_window() -> None:
    narrow, wide = (records("1B", "--patch-sizes", "6", *more)[0] for more in ([], ["--window", "1024"]))
    assert narrow["paper"]["global"] == wide["paper"]["global"]
    assert wide["paper"]["encoder"] - narrow["paper"]["encoder"] == 4 * 1024 * 512 / 2
    assert with_window(ByteLMConfig(), 7).window == 7
    assert with_window(MegaByteConfig(), 7) == MegaByteConfig()


def test_measure(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(real_text(2500))
    config = replace(SMALL, patching="entropy", patcher=ByteLMConfig(dim=16, num_layers=1, num_heads=1, window=8))
    BLT(config).save(tmp_path / "model.safetensors")
    arguments = [tmp_path / "model.safetensors", "--patch-sizes", "5", "--context", "600", "--measure", "--text", text]
    measured = records(*arguments)[0]["measured"]
    assert measured["bytes"] == 2506  # BOS, EOS and the id that each of four cuts repeats are included
    assert measured["bytes"] / measured["patches"] == pytest.approx(5, rel=0.05)
    assert {"encoder", "encoder cross", "global", "projections", "patcher", "backward"} < set(measured["flops"])
    for formula, counted in (line.values() for line in measured["flops"].values()):
        assert formula == pytest.approx(counted, rel=0.01)
        assert counted > 0
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    assert len(re.findall(r"[+-]0\.0\d\d%", shown.stdout)) == len(measured["flops"])


def test_configurations_of_files(tmp_path: Path, theirs) -> None:  # noqa: F811
    model = ByteLM(ByteLMConfig(dim=16, num_layers=1, num_heads=1, window=9))
    model.save(tmp_path / "byte.safetensors")
    assert read_config(str(tmp_path / "byte.safetensors")) == model.config
    model.save_pretrained(tmp_path / "patcher")
    assert asdict(read_config(str(tmp_path / "patcher"))) == asdict(ByteLM.from_pretrained(tmp_path / "patcher").config)

    folder, model = theirs
    assert read_config(str(folder / "blt")) == model.config
    assert read_config(str(folder / "entropy_model")) == model.patcher.config


def test_configuration_of_transformers(tmp_path: Path) -> None:
    config = replace(
        SMALL,
        encoder=replace(LOCAL, num_layers=1),
        decoder=replace(LOCAL, num_layers=1),
        patching="entropy",
        global_transformer=TransformerConfig(48, 2, 2),
    )
    model = BLT(config)
    model.save_pretrained(tmp_path)
    assert read_config(str(tmp_path)) == BLT.from_pretrained(tmp_path).config


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert "expected config.json or params.json" in run(tmp_path).output
    result = run("9B")
    assert result.exit_code == 1
    assert "expected a file, a directory or one of 400M, 1B" in result.output
    assert run("--patch-sizes", "six").exit_code == 2
    assert (
        "--patch-sizes: expected 1 to context = 100 bytes, got 200"
        in run("--context", 100, "--patch-sizes", 200).output
    )
    assert "expected at most 1,000,000,000 parameters" in run("8B", "--measure").output
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    assert "expected a file of ByteLM, BLT, MegaByte, got None" in run(other).output
