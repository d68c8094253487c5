"""MegaByte against the paper's equations, written out per document, per patch and per position."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.models import MegaByte, MegaByteConfig
from blt_kernels.models.megabyte import CausalConvolution
from blt_kernels.models.weights import write_safetensors
from blt_kernels.nn import TransformerConfig, next_byte_bits, next_byte_targets

P = 4
GLOBAL = TransformerConfig(24, 2, 2, num_kv_heads=1, ffn_dim=40, window=2)
LOCAL = TransformerConfig(16, 2, 2, num_kv_heads=1, ffn_dim=24)
PAPER = (3, 5, 7)
OPTIONS: dict[str, MegaByteConfig] = {
    "plain": MegaByteConfig(P, GLOBAL, LOCAL),
    "cross": MegaByteConfig(P, GLOBAL, LOCAL, cross_patch=1),
    "cross_whole_patch": MegaByteConfig(P, GLOBAL, replace(LOCAL, num_kv_heads=None), cross_patch=P),
    "conv": MegaByteConfig(P, replace(GLOBAL, window=None), LOCAL, conv_sizes=PAPER),
    "cross_conv": MegaByteConfig(P, GLOBAL, LOCAL, cross_patch=3, conv_sizes=(2, 1)),
    "odd_patches": MegaByteConfig(3, GLOBAL, LOCAL, cross_patch=2, conv_sizes=PAPER),
    "patches_of_one": MegaByteConfig(1, GLOBAL, LOCAL, cross_patch=1),
    "patches_of_two": MegaByteConfig(2, GLOBAL, LOCAL, cross_patch=1, conv_sizes=(3,)),
}
LENGTHS = (1, 0, P - 1, P, P + 1, 0, 4 * P + 2, 1)


def build(config: MegaByteConfig, ops: str = "fused", dtype: torch.dtype = torch.float64) -> MegaByte:
    torch.manual_seed(0)
    return MegaByte(config, ops).to(dtype)


def documents(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(4, 260, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor([0, *lengths]).cumsum(0).int()


def other(token: Tensor) -> Tensor:
    return 4 + (token + 100) % 256


# --- the paper's equations --------------------------------------------------------------------------------------------


class Paper:
    """Logits of one document of ids. Weights are taken from a model by name; nothing else is."""

    def __init__(self, model: MegaByte) -> None:
        self.config, self.weights = model.config, dict(model.named_parameters())

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean() + eps).sqrt() * self.weights[f"{name}.weight"]

    def heads(self, name: str, x: Tensor, config: TransformerConfig, position: int | None) -> list[Tensor]:
        """Return a projection cut into heads, turned to its position unless that is None."""
        vectors = (self.weights[f"{name}.weight"] @ x).split(config.head_dim)
        if position is None:
            return list(vectors)
        turned = []
        for vector in vectors:
            pairs = []
            for j in range(config.head_dim // 2):
                angle = torch.tensor(position * config.rope_theta ** (-2 * j / config.head_dim), dtype=torch.float64)
                a, b = vector[2 * j], vector[2 * j + 1]
                pairs += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
            turned.append(torch.stack(pairs))
        return turned

    def layer(self, name: str, groups: list[list[Tensor]], config: TransformerConfig, reach: int) -> list[list[Tensor]]:
        """Apply a transformer layer to groups of vectors: each attends to itself and to the end of the one before."""
        attention, eps = f"{name}.self_attn", config.norm_eps
        out = []
        for g, group in enumerate(groups):
            before = groups[g - 1][len(groups[g - 1]) - reach :] if g else []
            keys, values = [], []
            for j, x in enumerate(before + group):
                x = self.norm(f"{name}.input_layernorm", x, eps)
                keys.append(self.heads(f"{attention}.k_proj", x, config, j - len(before)))
                values.append(self.heads(f"{attention}.v_proj", x, config, None))
            outputs = []
            for i, x in enumerate(group):
                queries = self.heads(f"{attention}.q_proj", self.norm(f"{name}.input_layernorm", x, eps), config, i)
                last = len(before) + i
                attended = range(0 if config.window is None else max(0, last - config.window + 1), last + 1)
                read = []
                for h, query in enumerate(queries):
                    kv = h // (config.num_heads // config.kv_heads)
                    scores = torch.stack([query @ keys[j][kv] for j in attended]) / config.head_dim**0.5
                    read.append(sum(p * values[j][kv] for p, j in zip(scores.softmax(0), attended, strict=True)))
                x = x + self.weights[f"{attention}.o_proj.weight"] @ torch.cat(read)
                y = self.norm(f"{name}.post_attention_layernorm", x, eps)
                gate, up, down = (self.weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
                outputs.append(x + down @ (F.silu(gate @ y) * (up @ y)))
            out.append(outputs)
        return out

    def __call__(self, ids: list[int]) -> Tensor:
        config, weights = self.config, self.weights
        wide, size = config.global_transformer, config.patch_size
        bytes_in = [weights["global_embed_tokens.weight"][i] for i in ids]
        for c, taps in enumerate(config.conv_sizes):
            name = f"patch_convolutions.{c}"
            normed = [self.norm(f"{name}.norm", x, wide.norm_eps) for x in bytes_in]
            filters = weights[f"{name}.weight"]
            sums = [
                sum(filters[:, :, taps - 1 - d] @ normed[t - d] for d in range(min(taps, t + 1)))
                for t in range(len(bytes_in))
            ]
            bytes_in = [x + F.silu(y) for x, y in zip(bytes_in, sums, strict=True)]
        # Position n, which has no byte yet, is predicted too: patches cover n + 1 positions.
        count = len(ids) // size + 1
        patches = [weights["global_embed_first"]]
        patches += [torch.cat(bytes_in[(k - 1) * size : k * size]) for k in range(1, count)]
        for i in range(wide.num_layers):
            (patches,) = self.layer(f"global_layers.{i}", [patches], wide, 0)
        patches = [self.norm("global_norm", x, wide.norm_eps) for x in patches]
        groups = []
        for k in range(count):
            group = []
            for p in range(min(size, len(ids) + 1 - k * size)):
                width = wide.dim // size
                x = weights["global_to_local.weight"] @ patches[k][p * width : (p + 1) * width]
                own = weights["local_embed_tokens.weight"][ids[k * size + p - 1]] if p else weights["local_embed_first"]
                group.append(x + own)
            groups.append(group)
        local = replace(config.local_transformer, window=None)
        for i in range(local.num_layers):
            groups = self.layer(f"local_layers.{i}", groups, local, config.cross_patch)
        out = [weights["lm_head.weight"] @ self.norm("norm", x, local.norm_eps) for group in groups for x in group]
        return torch.stack(out)  # these are positions 0 to n

    def strided(self, ids: list[int]) -> Tensor:
        """Figure 5: the first half of a patch from the first pass, the second half from one that starts there."""
        size = self.config.patch_size
        half = (size + 1) // 2
        first, second = self(ids), self(ids[half:])
        rows = [
            second[t - half] if t >= size and t % size >= half else first[t]  # patch 0 of the second pass is not used
            for t in range(len(ids) + 1)
        ]
        return torch.stack(rows)


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_gradients_are_those_of_the_equations(name: str) -> None:
    models, (tokens, rows) = [build(OPTIONS[name], ops) for ops in ("fused", "reference")], documents()
    paper = Paper(models[0])
    expected = torch.cat([paper(tokens[a:b].tolist())[1:] for a, b in pairwise(rows.tolist())])
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (expected * weight).sum().backward()
    wanted = {key: p.grad for key, p in models[0].named_parameters()}
    models[0].zero_grad()
    for model in models:
        logits = model(tokens, rows)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
        (logits * weight).sum().backward()
        for key, p in model.named_parameters():
            if OPTIONS[name].patch_size == 1 and key == "local_embed_tokens.weight":
                assert wanted[key] is None  # no byte has another before it in its patch
                assert p.grad.abs().max() == 0
                continue
            largest = wanted[key].abs().max().item()
            assert largest > 1e-3, key  # every parameter is reached
            torch.testing.assert_close(p.grad, wanted[key], rtol=0, atol=1e-11 * largest, msg=key)


@pytest.mark.parametrize("name", ["plain", "cross_conv", "odd_patches", "patches_of_one"])
@torch.no_grad()
def test_strided_logits_are_the_first_halves_of_two_passes(name: str) -> None:
    model, (tokens, rows) = build(OPTIONS[name]), documents((1, 0, 3, 4, 5, 6, 7, 13, 0))
    paper = Paper(model)
    expected = torch.cat([paper.strided(tokens[a:b].tolist())[1:] for a, b in pairwise(rows.tolist())])
    strided, once = model(tokens, rows, strided=True), model(tokens, rows)
    torch.testing.assert_close(strided, expected, rtol=0, atol=1e-11)
    assert strided.equal(once) == (name == "patches_of_one")
    loss = next_byte_bits(strided, next_byte_targets(tokens, rows))
    torch.testing.assert_close(model.loss(tokens, rows, strided=True), loss)
    padded = model(tokens[:26].view(2, 13), strided=True)
    torch.testing.assert_close(padded[1], model(tokens[13:26], strided=True), rtol=0, atol=1e-12)


# --- who reads what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_byte_changes_the_predictions_after_it_alone_and_nothing_in_other_documents(name: str) -> None:
    model, (tokens, rows) = build(OPTIONS[name]), documents((6, 1, 13, 5))
    for strided in (False, True):
        logits = model(tokens, rows, strided=strided)
        for i in range(len(tokens)):
            changed = tokens.clone()
            changed[i] = other(tokens[i])
            same = (model(changed, rows, strided=strided) == logits).all(-1)
            assert same[:i].all()
            assert not same[i]
            assert same[int(rows[rows > i].min()) :].all()


@pytest.mark.parametrize("strided", [False, True])
@torch.no_grad()
def test_rows_need_not_cover_the_tokens(strided: bool) -> None:
    model, (tokens, _) = build(OPTIONS["cross_conv"]), documents((15,))
    rows = torch.tensor([0, 5, 11])
    covered = model(tokens[:11], rows, strided=strided)
    torch.testing.assert_close(model(tokens, rows, strided=strided)[:11], covered, rtol=0, atol=1e-12)
    for size in (0, 2):
        assert model(tokens[:size], torch.tensor([0]), strided=strided).shape == (size, 260)


def local_readers(config: MegaByteConfig, byte: int, total: int) -> list[int]:
    """Return the bytes that the local model alone lets `byte` change, of one document."""
    model = build(config)
    model.global_to_local.weight.data.zero_()
    tokens, _ = documents((total,))
    changed = tokens.clone()
    changed[byte] = other(tokens[byte])
    with torch.no_grad():
        return (1 + (model(tokens) != model(changed)).any(-1).nonzero().flatten()).tolist()


def test_cross_patch_reaches_the_last_places_of_the_patch_before() -> None:
    one = MegaByteConfig(P, GLOBAL, replace(LOCAL, num_layers=1))
    two = MegaByteConfig(P, GLOBAL, replace(LOCAL, num_layers=2))
    # Byte 5 is read at place 2 of the patch of bytes 4 to 7.
    assert local_readers(one, 5, 20) == [6, 7]
    assert local_readers(replace(one, cross_patch=1), 5, 20) == [6, 7]
    assert local_readers(replace(one, cross_patch=2), 5, 20) == [6, 7, 8, 9, 10, 11]
    assert local_readers(replace(two, cross_patch=1), 5, 20) == [6, 7, 8, 9, 10, 11]  # they read it through place 3
    assert local_readers(replace(two, cross_patch=P), 5, 20) == list(range(6, 16))
    assert local_readers(replace(one, cross_patch=P), 7, 20) == []  # a patch never reads its last byte
    assert build(replace(one, cross_patch=2)).state_dict().keys() == build(one).state_dict().keys()


def test_a_convolution_knows_nothing_of_patches() -> None:
    torch.manual_seed(0)
    stack = [CausalConvolution(6, size, 1e-5).double() for size in PAPER]
    x = torch.randn(40, 6, dtype=torch.float64)

    def run(x: Tensor, positions: Tensor) -> Tensor:
        for convolution in stack:
            x = convolution(x, positions)
        return x

    whole = run(x, torch.arange(40))
    reach = sum(PAPER) - len(PAPER)
    torch.testing.assert_close(run(x[7:], torch.arange(33))[reach:], whole[7 + reach :], rtol=0, atol=1e-12)
    assert not torch.isclose(run(x[7:], torch.arange(33))[:reach], whole[7 : 7 + reach]).all(-1).any()
    normed = F.pad(stack[0].norm(x).T[None], (2, 0))
    torch.testing.assert_close(stack[0](x, torch.arange(40)), x + F.silu(F.conv1d(normed, stack[0].weight))[0].T)


# --- files, compilation, arguments ------------------------------------------------------------------------------------


def test_a_file_from_before_the_extensions_loads(tmp_path) -> None:
    model, (tokens, rows) = build(OPTIONS["plain"]), documents()
    values = asdict(model.config)
    for name in ("cross_patch", "conv_sizes"):
        del values[name]
    metadata = {"model": "MegaByte", "config": json.dumps(values)}
    write_safetensors(tmp_path / "old.safetensors", model.state_dict(), metadata)
    loaded = MegaByte.load(tmp_path / "old.safetensors")
    assert loaded.config == model.config
    assert loaded(tokens, rows).equal(model(tokens, rows))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strided"), [("plain", False), ("cross_conv", True)])
def test_compiles_whole_for_every_length(name: str, strided: bool) -> None:
    one = {"global_transformer": replace(GLOBAL, num_layers=1), "local_transformer": replace(LOCAL, num_layers=1)}
    model, graphs = build(replace(OPTIONS[name], **one)), []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for lengths in ((5, 0, 13), (3, 9, 22)):
        tokens, rows = documents(lengths)
        expected = model(tokens, rows, strided=strided)
        torch.testing.assert_close(compiled(tokens, rows, strided=strided), expected, rtol=0, atol=1e-12)
    assert len(graphs) == 1


def test_arguments_that_do_not_fit_say_why() -> None:
    with pytest.raises(ValueError, match=r"patch_size: expected a value >= 1, got 0"):
        MegaByteConfig(0)
    with pytest.raises(ValueError, match=r"global_transformer.dim: expected a multiple of patch_size = 5, got 24"):
        MegaByteConfig(5, GLOBAL, LOCAL)
    with pytest.raises(ValueError, match=r"cross_patch: expected a value >= 0, got -1"):
        MegaByteConfig(cross_patch=-1)
    with pytest.raises(ValueError, match=r"cross_patch: expected at most patch_size = 8, got 9"):
        MegaByteConfig(cross_patch=9)
    with pytest.raises(ValueError, match=r"conv_sizes: expected a value >= 1, got 0"):
        MegaByteConfig(conv_sizes=(3, 0))
    with pytest.raises(TypeError, match=r"conv_sizes: expected an int, got 3.5"):
        MegaByteConfig(conv_sizes=(3.5,))
