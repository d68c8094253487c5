"""The models: fused against reference, causality, independence of rows, files, and transformers' own BLT."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

import oracle
import pytest
import torch
from model_cases import CONFIGS, LENGTHS, LOCAL, build, documents
from torch import Tensor

import blt_kernels as bk
from blt_kernels import PatchLayout
from blt_kernels._checks import Documents
from blt_kernels.ids import BOS, EOS
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig, load_model
from blt_kernels.models.byte_lm import BUNDLED
from blt_kernels.nn import (
    TransformerConfig,
    attention_documents,
    next_byte_bits,
    next_byte_targets,
    rotary_table,
    rotate,
)
from blt_kernels.testing import assert_close


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
def test_fused_and_reference_agree(name: str, dtype: torch.dtype, padded: bool) -> None:
    tokens, rows = documents()
    if padded:
        tokens, rows = tokens[:60].view(3, 20), None
    models = [build(name, ops, dtype) for ops in ("fused", "reference")]
    losses = [model.loss(tokens, rows) for model in models]
    for loss in losses:
        loss.backward()
    # Gradients reach 1e-1 to 1; the two sides sum the same terms in another order, some hundreds of them.
    tolerance = 200 * torch.finfo(dtype).eps
    assert losses[0].dtype == dtype
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    scale = max(p.grad.abs().max().item() for p in models[1].parameters() if p.grad is not None)
    for (key, fused), reference in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (fused.grad is None) == (reference.grad is None) == key.startswith("patcher."), key
        if fused.grad is not None:
            torch.testing.assert_close(fused.grad, reference.grad, rtol=0, atol=tolerance * scale, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_alone_has_the_logits_it_has_among_others(name: str) -> None:
    model, (tokens, rows) = build(name), documents()
    packed = model(tokens, rows)
    for i, length in enumerate(LENGTHS):
        row = slice(int(rows[i]), int(rows[i + 1]))
        alone = model(tokens[row])
        assert alone.shape == (length, 260)
        torch.testing.assert_close(alone, packed[row], rtol=0, atol=1e-12)
        torch.testing.assert_close(model(tokens[row][None])[0], packed[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_byte_changes_a_logit_before_it(name: str) -> None:
    model, (tokens, _) = build(name), documents((24,))
    logits = model(tokens)
    for i in range(24):
        changed = tokens.clone()
        changed[i] = 4 + (changed[i] + 100) % 256
        other = model(changed)
        assert torch.equal(other[:i].argmax(-1), logits[:i].argmax(-1))
        torch.testing.assert_close(other[:i], logits[:i], rtol=0, atol=1e-12)
        assert not torch.allclose(other[i], logits[i])


def test_a_boundary_shows_as_soon_as_it_is_decided_and_not_before() -> None:
    """Byte i reads the patch that its own entropy closes: that decision changes logits[i:] and nothing before."""
    model, (tokens, rows) = build("blt"), documents((12,))
    lengths = ([1, 5, 6], [1, 5, 3, 3], [1, 5, 6, 1])
    layouts = [PatchLayout.from_lengths(torch.tensor([row]), 12) for row in lengths]
    whole, cut, closed = (model(tokens, rows, layout=layout) for layout in layouts)
    different = [~torch.isclose(whole, other).all(-1) for other in (cut, closed)]
    assert different[0].nonzero().flatten().tolist() == [8, 9, 10, 11]  # it is the decision after byte 8
    assert different[1].nonzero().flatten().tolist() == [11]  # it is the decision after the last byte


def test_split_documents_keeps_attention_within_them() -> None:
    tokens, rows = documents((30,))
    tokens[11] = EOS
    changed = tokens.clone()
    changed[9] = 4 + (changed[9] + 100) % 256
    for split in (False, True):
        model = build("byte_lm", split_documents=split)
        reaches = not torch.allclose(model(tokens, rows)[12:], model(changed, rows)[12:], rtol=0, atol=1e-13)
        assert reaches != split


def test_split_documents_ends_the_global_ones_at_the_patch_that_holds_eos() -> None:
    """Hashes, patches and cross attention of a BLT run on through EOS, so the test compares the offsets."""
    tokens, rows = documents((30, 4))
    tokens[11] = tokens[20] = tokens[33] = EOS
    layout = PatchLayout.from_lengths(torch.tensor([[1, 3, 6, 5, 8, 7], [1, 3, 0, 0, 0, 0]]))
    checked = (Documents(rows.int(), 34, 34), Documents(layout.cu_patches, layout.capacity, 8))
    byte_documents, patch_documents = build("blt", split_documents=True)._documents(tokens, *checked, layout)
    assert byte_documents.offsets.tolist() == [0, 12, 21, 30, 34]
    assert patch_documents.offsets.tolist() == [0, 4, 5, 6, 8]
    one = build("blt", split_documents=True)(tokens, rows, layout=layout)
    assert not one.equal(build("blt")(tokens, rows, layout=layout))


def test_split_documents_is_a_no_op_on_rows_that_are_documents() -> None:
    tokens, rows = documents((9, 14, 1))
    tokens[8] = tokens[22] = EOS
    for name in ("byte_lm", "blt"):
        assert build(name, split_documents=True)(tokens, rows).equal(build(name)(tokens, rows))


@pytest.mark.parametrize(
    ("encode", "decode", "last"), [(None, None, 13), (1, 1, 13), (2, None, 18), (None, 2, 18), (2, 2, 23)]
)
def test_cross_attention_reaches_back_over_its_windows(encode: int | None, decode: int | None, last: int) -> None:
    """Byte 8, in patch 2, changes that patch, or the next one too; bytes read the last patch, or the last two."""
    near = dataclasses.replace(LOCAL, num_layers=1, window=1)
    model = build(
        "blt",
        encoder=near,
        decoder=near,
        global_transformer=TransformerConfig(48, 0, 2),
        ngram_sizes=(2,),
        cross_attn_window_encoder=encode,
        cross_attn_window_decoder=decode,
    )
    tokens, rows = documents((24,))
    changed = tokens.clone()
    changed[8] = 4 + (changed[8] + 100) % 256
    layout = PatchLayout.from_lengths(torch.tensor([[1, 5, 4, 5, 5, 4]]))
    same = (model(tokens, rows, layout=layout) == model(changed, rows, layout=layout)).all(-1)
    assert (~same).nonzero().flatten().tolist() == list(range(8, last + 1))


def test_pooling_at_every_layer_leaves_the_last_cross_attention_alone() -> None:
    tokens, rows = documents()
    changes = {"cross_attn_all_layers_encoder": True, "pool_every_layer": True}
    every, last = build("blt", **changes), build("blt")
    state = every.state_dict()
    first = "local_encoder.cross_attn_layers.0."
    for name in [name for name in state if name.startswith(first)]:
        state[name] = state.pop(name.replace(first, "local_encoder.cross_attn_layers.1."))
    last.load_state_dict(state)
    assert every(tokens, rows).equal(last(tokens, rows))
    assert not every(tokens, rows).equal(build("blt", cross_attn_all_layers_encoder=True)(tokens, rows))


def test_attention_documents() -> None:
    starts = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    assert attention_documents(starts, torch.tensor([0, 4, 4, 7])).tolist() == [0, 2, 4, 5, 7]
    assert attention_documents(starts[:0], torch.tensor([0])).tolist() == [0]


def test_targets_and_bits() -> None:
    tokens = torch.tensor([5, 6, 7, 8, 9, 10], dtype=torch.int32)
    targets = next_byte_targets(tokens, torch.tensor([0, 3, 3, 4, 5]))
    assert targets.tolist() == [6, 7, -100, -100, -100, -100]
    logits = torch.zeros(6, 260)
    assert next_byte_bits(logits, targets).item() == pytest.approx(math.log2(260))
    assert next_byte_bits(logits, torch.full_like(targets, -100)).item() == 0
    logits[0, 6] = 2.0
    probability = math.exp(2) / (math.exp(2) + 259)
    expected = (math.log2(260) - math.log2(probability)) / 2
    assert next_byte_bits(logits, targets).item() == pytest.approx(expected)


def test_rotary_positions_by_hand() -> None:
    config = TransformerConfig(4, 1, 1, rope_theta=100.0)
    table = rotary_table(torch.tensor([3]), config, torch.float64)
    turned = rotate(torch.tensor([[[1.0, 0.0, 0.0, 1.0]]], dtype=torch.float64), table)
    expected = [math.cos(3), math.sin(3), -math.sin(0.3), math.cos(0.3)]
    torch.testing.assert_close(turned.flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_brings_the_model_back(name: str, tmp_path) -> None:
    model, (tokens, rows) = build(name, dtype=torch.float32), documents()
    path = tmp_path / "model.safetensors"
    model.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_model(path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert loaded(tokens, rows).equal(model(tokens, rows))
    trained = {key: p.requires_grad for key, p in model.named_parameters()}
    assert {key: p.requires_grad for key, p in loaded.named_parameters()} == trained
    model.save(path, dtype=torch.bfloat16)
    assert {p.dtype for p in load_model(path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(path, dtype=torch.float32).parameters()} == {torch.float32}


def test_files_that_do_not_fit_say_why(tmp_path) -> None:
    from safetensors.torch import save_file

    model, path = build("byte_lm"), tmp_path / "model.safetensors"
    metadata = {"model": "ByteLM", "config": json.dumps(dataclasses.asdict(model.config))}
    tensors = model.state_dict()
    tensors["extra"] = tensors.pop("norm.weight")
    tensors["lm_head.weight"] = torch.zeros(3, 32)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"missing norm.weight.*lm_head.weight of shape \[3, 32\], expected \[260,"):
        ByteLM.load(path)
    with pytest.raises(ValueError, match="expected a file of BLT, got 'ByteLM'"):
        BLT.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="expected a file of ByteLM, BLT, MegaByte, got None"):
        load_model(path)
    save_file(tensors, path, {**metadata, "config": '{"dimension": 3}'})
    with pytest.raises(ValueError, match="got dimension as well"):
        ByteLM.load(path)


def test_arguments_that_do_not_fit_say_why() -> None:
    tokens, rows = documents()
    with pytest.raises(ValueError, match="ops: expected one of 'fused', 'reference', got 'fast'"):
        build("byte_lm", "fast")
    with pytest.raises(TypeError, match="tokens: expected dtype in int32, int64"):
        build("blt")(tokens.float(), rows)
    with pytest.raises(ValueError, match=r"layout: expected 76 bytes in 8 rows, got 12 in 1"):
        build("blt")(tokens, rows, layout=PatchLayout.from_lengths(torch.tensor([[1, 11]])))
    with pytest.raises(ValueError, match="entropy patching has no patcher"):
        build("blt", patcher=None)(tokens, rows)
    with pytest.raises(ValueError, match="patching: expected one of"):
        BLTConfig(patching="words")
    with pytest.raises(ValueError, match=r"decoder.dim: expected encoder.dim = 1024"):
        BLTConfig(decoder=LOCAL)
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads = 4, got 3"):
        TransformerConfig(32, 1, 4, num_kv_heads=3)
    for cls in (BLTConfig, ByteLMConfig):
        with pytest.raises(ValueError, match="eos_id: expected a value < vocab_size = 260, got 260"):
            cls(eos_id=260)
        with pytest.raises(ValueError, match="eos_id: expected a value >= 0, got -1"):
            cls(eos_id=-1)
        with pytest.raises(TypeError, match="threshold: expected a number, got None"):
            cls(threshold=None)
    for name in ("queries_per_patch", "ngram_vocab", "patch_size", "cross_attn_window_encoder", "max_patch_length"):
        with pytest.raises(ValueError, match=f"{name}: expected a value >= 1, got 0"):
            BLTConfig(**{name: 0})
    with pytest.raises(ValueError, match="num_functions: expected at most 11, got 12"):
        BLTConfig(num_functions=12)
    with pytest.raises(ValueError, match="window: expected a value >= 1, got 0"):
        TransformerConfig(32, 1, 4, window=0)
    with pytest.raises(ValueError, match="rope_theta: expected a finite value > 0, got 0"):
        TransformerConfig(32, 1, 4, rope_theta=0)
    with pytest.raises(ValueError, match="expected a multiple of patch_size = 5"):
        MegaByteConfig(patch_size=5)


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("longest", [None, 1, 3])
@pytest.mark.parametrize(
    ("scheme", "rules"),
    [
        ("entropy", {}),
        ("entropy", {"monotonic": True, "threshold": 0.02}),
        ("entropy", {"threshold_add": -0.05}),
        ("space", {}),
        ("static", {"patch_size": 5}),
        ("byte", {}),
        ("bpe", {}),
    ],
)
def test_schemes_of_the_model(scheme: str, rules: dict[str, float], longest: int | None, ops: str) -> None:
    model = build("blt", ops, torch.float32, patching=scheme, max_patch_length=longest, **rules)
    tokens, rows = documents()
    tokens[tokens % 4 == 0] = 3 if scheme == "bpe" else 4  # these are delimiters
    config, documents_of = model.config, tokens.split(LENGTHS)
    if scheme == "entropy":
        entropies = bk.token_entropy(model.patcher(tokens, rows)).split(LENGTHS)
        options = (config.threshold, config.threshold_add, config.monotonic, longest)
        starts = [oracle.entropy_starts(h.tolist(), *options) for h in entropies]
    elif scheme == "space":
        starts = [oracle.split(oracle.space_starts(d.tolist()), len(d), longest) for d in documents_of]
    elif scheme == "bpe":
        starts = [oracle.split(oracle.delimiter_starts(d.tolist(), 3), len(d), longest) for d in documents_of]
    else:
        size = 5 if scheme == "static" else 1
        starts = [oracle.split(oracle.static_starts(n, size), n, longest) for n in LENGTHS]
    found = [len(s) for s in starts]
    assert scheme == "byte" or longest == 1 or max(found) < max(LENGTHS) - 5  # the rule does something
    for room in (None, len(tokens), 12):  # these are exactly enough, the maximum, and too few
        layout = model.patch(tokens, rows, max_patches=room)
        expected = oracle.layout_of(starts, LENGTHS, layout.capacity)
        assert {f.name: getattr(layout, f.name).tolist() for f in dataclasses.fields(layout)} == expected
        logits = model(tokens, rows, layout=layout)  # the patches are given
        torch.testing.assert_close(model(tokens, rows, max_patches=room), logits, rtol=0, atol=0)


def test_capacity_does_not_change_a_blt() -> None:
    model, (tokens, rows) = build("blt"), documents()
    exact = model(tokens, rows)
    torch.testing.assert_close(model(tokens, rows, max_patches=len(tokens)), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lower", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["byte_lm", "blt"])
def test_a_training_step_on_every_device(name: str, lower: torch.dtype | None, installed: str) -> None:
    """Logits and gradients, before and after a step, and weights are about as exact as those of the reference ops."""
    tokens, rows = (x.to(installed) for x in documents((1, 150, 0, 3, 90, 16)))
    patches = build(name).to(installed)  # rounding would move the patches
    given = {"layout": patches.patch(tokens, rows)} if name == "blt" else {}

    def step(ops: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        model = build(name, ops, torch.float32).to(installed, dtype)
        weights = {key: p for key, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(weights.values(), lr=0.1)
        logits = []
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(installed, lower, enabled=lower is not None and dtype == torch.float32):
                logits.append(model(tokens, rows, **given).detach())
                loss = model.loss(tokens, rows, **given)
            loss.backward()
            optimizer.step()
        grads = [p.grad for p in weights.values()]
        return {"logits": logits, "gradients": grads, "weights": list(weights.values())}

    ours, eager, truth = (
        step("fused", torch.float32),
        step("reference", torch.float32),
        step("reference", torch.float64),
    )
    assert all(g.any() for g in truth["gradients"])
    for what, values in ours.items():
        assert_close(values, eager[what], truth[what], name=what)


def test_sizes_of_the_paper() -> None:
    """Parameters of the published models, without allocating them."""
    with torch.device("meta"):
        blt, entropy_model, megabyte = BLT(BLTConfig()), ByteLM(ByteLMConfig()), MegaByte(MegaByteConfig())
    counts = {key: sum(p.numel() for p in module.parameters()) for key, module in blt.named_children()}
    assert counts["encoder_hash_tok_embedding"] == 6 * 500002 * 1024
    assert 0.95e8 < counts["patcher"] == sum(p.numel() for p in entropy_model.parameters()) < 1.05e8
    assert 1.2e9 < counts["global_transformer"] < 1.4e9
    wide = sum(p.numel() for key, p in megabyte.named_parameters() if key.startswith("global_layers"))
    assert 1.1e9 < wide < 1.4e9
    assert 1.8e8 < sum(p.numel() for key, p in megabyte.named_parameters() if key.startswith("local_")) < 2.2e8


SNIPPET = b"""
    def read(self, path, encoding=None):
        \"\"\"Return the contents of the file as a string.\"\"\"
        if not os.path.exists(path):
            raise ValueError("no such file: %r" % path)
        with open(path, encoding=encoding) as f:
            for line in f:
                self.lines.append(line.strip())
        return self.lines
"""


def test_the_bundled_model_knows_python() -> None:
    model = ByteLM.bundled()
    assert BUNDLED.stat().st_size <= 4_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokens = torch.tensor([BOS, *(byte + 4 for byte in SNIPPET)])
    with torch.no_grad():
        assert model.loss(tokens) < 2
        _, layout = model.patch(tokens)
        assert chr(int(model(tokens[: SNIPPET.index(b"turn the") + 1])[-1].argmax()) - 4) == "t"
    assert 3 < len(tokens) / int(layout.num_patches) < 7


@pytest.mark.parametrize("name", ["byte_lm", "blt", "megabyte"])
@pytest.mark.parametrize("ops", ["fused", "reference"])
def test_models_are_pickled(name: str, ops: str) -> None:
    """Processes that are spawned are sent their model."""
    model, (tokens, rows) = build(name, ops), documents((30, 4))
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens, rows), model(tokens, rows))
