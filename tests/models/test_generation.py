"""Generation: greedy output is the argmax of full forwards, drafts change nothing, and random output has the model's
distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import model_cases
import pytest
import torch
from tiers import slow, slow_unless
from torch import Tensor, nn
from transformers_blt import batch, their_model

from blt_kernels import to_ids
from blt_kernels.ids import BOS, EOS
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig
from blt_kernels.models import state as states
from blt_kernels.models.base import ByteModel
from blt_kernels.models.generate import Generated, prompt_ids
from blt_kernels.models.sampling import Sampling
from blt_kernels.models.state import ByteState
from blt_kernels.nn import TransformerConfig

PROMPTS = ["hello wörld", b"", torch.tensor([1, 50, 60, 70]), "abcabcabcabcab" * 5]
MODELS = ("byte_lm", "blt", "megabyte_extended")


def kinds_of_drafts(model: ByteModel) -> list[str]:
    kinds = ["prompt"]
    if not isinstance(model, ByteLM):
        kinds.append("decoder")
    if getattr(model, "patcher", None) is not None:
        kinds.append("patcher")
    return kinds


def check_greedy(model: ByteModel, prompts: Any, out: Generated) -> None:
    """Every id is the argmax of an uncached forward, and every row ends where it says."""
    ids, ends = prompt_ids(prompts, model.config), getattr(model.config, "eos_id", EOS)
    texts = [prompt + written for prompt, written in zip(ids, out.ids, strict=True)]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(map(len, texts))])
    with torch.no_grad():
        logits = model(torch.tensor([x for text in texts for x in text]), cu_seqlens)
    best = logits.argmax(-1).split([len(text) for text in texts])
    for prompt, written, expected, reason in zip(ids, out.ids, best, out.reasons, strict=True):
        assert written == expected[len(prompt) - 1 : -1].tolist()
        assert ends not in written[:-1]
        assert (reason == "eos") == (written[-1] == ends)


def check_statistics(model: ByteModel, prompts: Any, out: Generated) -> None:
    found, ids = out.statistics, prompt_ids(prompts, model.config)
    assert found.prompt_bytes == sum(map(len, ids))
    assert found.bytes == sum(map(len, out.ids))
    assert found.drafted == sum(drafted * n for (drafted, _), n in found.rounds.items())
    assert found.accepted == sum(accepted * n for (_, accepted), n in found.rounds.items())
    assert all(0 <= accepted <= drafted > 0 for drafted, accepted in found.rounds)
    # The last id of a row is written, but not read any more.
    texts = [prompt + written[:-1] for prompt, written in zip(ids, out.ids, strict=True)]
    state = model.new_state(len(texts))
    with torch.no_grad():
        state.extend(torch.tensor([x for text in texts for x in text]), list(map(len, texts)))
    assert found.patches == sum(state.num_patches)


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_unless(model_cases.CONFIGS, MODELS))
def test_greedy_output_is_the_argmax_of_full_forwards(name: str) -> None:
    model = model_cases.build(name)
    plain = model.generate(PROMPTS, max_new_bytes=24)
    check_greedy(model, PROMPTS, plain)
    check_statistics(model, PROMPTS, plain)
    rounds = max(map(len, plain.ids)) - 1
    assert plain.statistics.drafted == 0
    assert max(plain.statistics.passes.values()) == rounds
    assert all(n == rounds for part, n in plain.statistics.passes.items() if part != "global")
    for draft in kinds_of_drafts(model):
        drafted = model.generate(PROMPTS, max_new_bytes=24, draft=draft)
        assert (drafted.ids, drafted.reasons) == (plain.ids, plain.reasons)
        check_statistics(model, PROMPTS, drafted)


RULES: dict[str, dict[str, Any]] = {
    "threshold_add": {"threshold_add": 0.02, "threshold": 0.02},
    "monotonic": {"monotonic": True, "threshold": 0.01, "max_patch_length": 5},
    "max_patch_length": {"max_patch_length": 2, "threshold": 5.3},
    "whole_characters": {"whole_characters": True, "max_patch_length": 3},
    "byte": {"patching": "byte", "patcher": None},
    "space": {"patching": "space", "patcher": None, "max_patch_length": 2, "queries_per_patch": 1},
}


@pytest.mark.parametrize("rule", slow_unless(RULES, ["monotonic", "whole_characters"]))
def test_no_draft_changes_greedy_output_with_any_rule(rule: str) -> None:
    model = model_cases.build("blt", **RULES[rule])
    plain = model.generate(PROMPTS, max_new_bytes=16)
    check_greedy(model, PROMPTS, plain)
    for draft in kinds_of_drafts(model):
        out = model.generate(PROMPTS, max_new_bytes=16, draft=draft)
        assert out.ids == plain.ids
        check_statistics(model, PROMPTS, out)


@pytest.mark.parametrize("draft_bytes", slow_unless([1, 3, 16], [3]))
@pytest.mark.parametrize("name", MODELS)
def test_no_draft_changes_greedy_output(name: str, draft_bytes: int) -> None:
    model = model_cases.build(name)
    plain = model.generate(PROMPTS, max_new_bytes=24)
    other = model_cases.build("byte_lm", window=3, num_layers=1)  # this one has another window and other weights
    for draft in (*kinds_of_drafts(model), other, other.bfloat16(), model):
        out = model.generate(PROMPTS, max_new_bytes=24, draft=draft, draft_bytes=draft_bytes)
        assert out.ids == plain.ids
        check_statistics(model, PROMPTS, out)
        assert max((drafted for drafted, _ in out.statistics.rounds), default=0) <= draft_bytes
        if draft is model:
            assert out.statistics.accepted == out.statistics.drafted
            assert out.statistics.passes["draft"] > 0
            part = {"byte_lm": "byte_lm", "blt": "decoder"}.get(name, "local")
            assert out.statistics.passes[part] < max(map(len, out.ids)) - 1


@pytest.mark.parametrize(
    ("name", "draft"), [("blt", "patcher"), slow("blt_space", "decoder"), slow("megabyte", "decoder")]
)
def test_many_rows_of_very_different_lengths(name: str, draft: str) -> None:
    """Far longer than the windows, and 64 of them."""
    model = model_cases.build(name)
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 400, *torch.randint(1, 90, (62,), generator=generator).tolist()]
    prompts = [torch.randint(4, 260, (n,), generator=generator) for n in lengths]
    out = model.generate(prompts, max_new_bytes=10, draft=draft)
    check_greedy(model, prompts, out)
    check_statistics(model, prompts, out)


@pytest.mark.parametrize("name", ["byte_lm", "blt"])
def test_models_of_documents(name: str) -> None:
    """A prompt with EOS and newlines in it starts documents anew, where the model was trained so."""
    options = {"split_documents": True, "reset_at_newlines": True, "eos_id": 100}
    if name == "blt":
        options["patcher"] = replace(model_cases.BYTE_LM, **options)
    model = model_cases.build(name, **options)
    prompts = [[1, 50, 100, 14, 60, 70, 100], [1, 14, 14, 80], [100]]
    plain = model.generate(prompts, max_new_bytes=24)
    check_greedy(model, prompts, plain)
    for draft in kinds_of_drafts(model):
        out = model.generate(prompts, max_new_bytes=24, draft=draft)
        assert out.ids == plain.ids
        check_statistics(model, prompts, out)


@pytest.mark.parametrize("name", slow_unless(MODELS, ["blt"]))
def test_half_precision_and_training_mode(name: str) -> None:
    model = model_cases.build(name, dtype=torch.bfloat16).train()
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith("patcher"))
    for draft in (None, *kinds_of_drafts(model), model):
        out = model.generate(PROMPTS, max_new_bytes=6, draft=draft, temperature=1e-9)
        assert all(out.ids)
        check_statistics(model, PROMPTS, out)
    assert model.training


CHECKPOINTS = {
    "released": 0.7,
    "one_query": 0.4,
    "four_queries": 0.8,
    "all_encoder_layers": 0.6,
    "first_decoder_layer": 0.9,
    "hash_functions": 0.2,
    "grouped_heads": 0.5,
    "no_window": 0.7,
    "bytes": 0.7,
}


@pytest.mark.parametrize("case", slow_unless(CHECKPOINTS, ["released"]))
def test_checkpoints_write_what_transformers_writes_without_its_cache(case: str, tmp_path) -> None:
    theirs, prompt = their_model(case), batch(1, 20)
    if theirs.model.patcher is not None:
        entropy = theirs.model.patcher(batch())[0]
        theirs.config.patching_threshold = entropy.quantile(CHECKPOINTS[case]).item()
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(prompt, max_new_tokens=24, do_sample=False, use_cache=False)[0, 20:].tolist()
    ours = BLT.from_pretrained(tmp_path)
    for draft in (None, *kinds_of_drafts(ours)):
        assert ours.generate(prompt, max_new_bytes=24, draft=draft).ids == [expected]


# --- at random --------------------------------------------------------------------------------------------------------

SAMPLE = {"temperature": 0.9, "top_k": 100, "top_p": 0.95, "min_p": 1e-3, "max_new_bytes": 16}


@pytest.mark.parametrize("name", slow_unless(MODELS, ["blt"]))
def test_a_row_gives_what_it_gives_alone(name: str) -> None:
    model = model_cases.build(name)
    for draft in (None, *kinds_of_drafts(model), model_cases.build("byte_lm", window=3)):
        together = model.generate(PROMPTS, draft=draft, **SAMPLE)
        for row, prompt in enumerate(PROMPTS):
            others: list[Any] = [b""] * row + [prompt]  # row r draws from (seed, r)
            alone = model.generate(others, draft=draft, **SAMPLE)
            assert (alone.ids[row], alone.reasons[row]) == (together.ids[row], together.reasons[row])


def test_seeds_repeat_and_differ() -> None:
    model = model_cases.build("byte_lm")
    twice = [model.generate(["same", "same"], seed=7, **SAMPLE).ids for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0][0] != twice[0][1]
    assert twice[0] != model.generate(["same", "same"], seed=8, **SAMPLE).ids
    assert model.generate("same", seed=7, **SAMPLE).ids == twice[0][:1]


def test_a_temperature_of_almost_nothing_is_greedy() -> None:
    model = model_cases.build("blt")
    greedy = model.generate(PROMPTS, max_new_bytes=12).ids
    for draft in (None, "patcher", "decoder"):
        assert model.generate(PROMPTS, max_new_bytes=12, temperature=1e-9, draft=draft).ids == greedy


ALPHABET, ROWS, NEW = 6, 1500, 4
TINY = TransformerConfig(16, 1, 2, ffn_dim=32, window=4)
TINY_LM = ByteLMConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=32, window=4, vocab_size=ALPHABET, threshold=1.05)
TINY_MODELS: dict[str, tuple[type[ByteModel], Any]] = {
    "byte_lm": (ByteLM, TINY_LM),
    "blt": (BLT, BLTConfig(TINY, replace(TINY, window=None), TINY, TINY_LM, vocab_size=ALPHABET, ngram_vocab=97,
                           threshold=1.05)),
    "megabyte": (MegaByte, MegaByteConfig(2, TINY, replace(TINY, window=None), vocab_size=ALPHABET)),
}  # fmt: skip
TINY_PROMPT = [BOS, 3, 4, 5, 0, 3, 4, 5, 1, 3, 4, 5, 3, 3, 4, 5, 4, 3, 4, 5]


def tiny_model(name: str, seed: int = 0) -> ByteModel:
    cls, config = TINY_MODELS[name]
    torch.manual_seed(seed)
    model = model_cases.enlarge_additions(cls(config)).double()
    with torch.no_grad():
        for part in (model, getattr(model, "patcher", None)):
            if part is not None:
                part.lm_head.weight.mul_(2)
                part.lm_head.weight[EOS] /= 4  # this makes EOS rare
    return model


def distribution(model: ByteModel, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Return the probability of every text that may follow the prompt, by forwards over all of them."""
    texts = list(itertools.product(range(ALPHABET), repeat=NEW))
    with torch.no_grad():
        logits = model(torch.tensor([TINY_PROMPT + list(text) for text in texts]))[:, len(TINY_PROMPT) - 1 : -1]
    found: dict[tuple[int, ...], float] = {}
    for text, p in zip(texts, sampling.probabilities(logits).tolist(), strict=True):
        text = text[: text.index(EOS) + 1] if EOS in text else text
        found[text] = math.prod(own[x] for own, x in zip(p, text, strict=False))
    return found


def p_value(texts: list[list[int]], expected: dict[tuple[int, ...], float]) -> float:
    """Return how probable a chi-square at least as large is; texts that are too rare are one class."""
    assert sum(expected.values()) == pytest.approx(1)
    counts = Counter(map(tuple, texts))
    assert all(expected[text] > 0 for text in counts)
    often = {text for text, p in expected.items() if p * len(texts) >= 5}
    classes = [(counts[text], expected[text] * len(texts)) for text in often]
    rest = sum(p for text, p in expected.items() if text not in often) * len(texts)
    if rest >= 5:
        classes.append((sum(n for text, n in counts.items() if text not in often), rest))
    chi_square = sum((n - mean) ** 2 / mean for n, mean in classes)
    half = torch.tensor([(len(classes) - 1) / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


TINY_DRAFTS = [
    ("byte_lm", None), ("byte_lm", "prompt"), ("byte_lm", "other"), ("blt", "decoder"), ("blt", "patcher"),
    ("blt", "other"), ("megabyte", "decoder"), ("megabyte", "other"),
]  # fmt: skip


def sample(name: str, draft: str | None, **options: Any) -> tuple[ByteModel, Generated]:
    model = tiny_model(name)
    written_by = tiny_model("byte_lm", seed=1) if draft == "other" else draft
    prompts = [TINY_PROMPT] * ROWS
    return model, model.generate(prompts, max_new_bytes=NEW, draft=written_by, seed=3, **options)


@pytest.mark.parametrize(("name", "draft"), [x if x == ("blt", "patcher") else slow(*x) for x in TINY_DRAFTS])
def test_random_output_has_the_distribution_of_the_model(name: str, draft: str | None) -> None:
    options = {"temperature": 0.8, "top_p": 0.97}
    model, out = sample(name, draft, **options)
    expected = distribution(model, Sampling(**options))
    assert p_value(out.ids, expected) > 1e-4
    if draft is not None:
        found = out.statistics
        assert ROWS / 30 < found.accepted < found.drafted
    other = distribution(model, Sampling(1.0))
    assert p_value(out.ids, other) < 1e-6  # the test can tell


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "draft"), [("byte_lm", "prompt"), ("byte_lm", "other"), ("blt", "patcher"), ("megabyte", "decoder")]
)
def test_accepting_every_draft_has_another_distribution(name: str, draft: str, monkeypatch) -> None:
    def accept(self: Sampling, p: Tensor, draft: list[int], q: Tensor | None, random: Any) -> tuple[int, int]:
        return len(draft), self.draw(p[-1:], [random])[0]

    monkeypatch.setattr(Sampling, "verify", accept)
    model, out = sample(name, draft, temperature=1.0)
    assert p_value(out.ids, distribution(model, Sampling(1.0))) < 1e-6


# --- where a row ends -------------------------------------------------------------------------------------------------


class Scripted(ByteModel):
    """Writes a text, whatever it reads: id n of a row is followed by id n of the text."""

    def __init__(self, data: str | bytes | list[int]) -> None:
        super().__init__()
        self.text = torch.tensor(data) if isinstance(data, list) else to_ids(data)
        self.config = SimpleNamespace(vocab_size=264)
        self.lm_head = nn.Linear(1, 264)

    def new_state(self, rows: int = 1, *, undo: int = 64) -> ByteState:
        return ScriptedState(self, rows, undo)


class ScriptedState(ByteState):
    def extend(self, ids: Tensor, counts: list[int]) -> Tensor:
        _, positions = self._append(ids, counts)
        self.passes["script"] += 1
        return nn.functional.one_hot(self.model.text[positions.clamp(max=len(self.model.text) - 1)], 264).double()

    def _holds(self, lengths: list[int]) -> list[bool]:
        return [True] * len(lengths)


TEXT = "eins, zwei — drei, vier: 12 € und mehr, ja"


@pytest.mark.parametrize("right", [0, 1, 2, 7, 30, 99])
@pytest.mark.parametrize(
    ("stop", "end"),
    [
        (["zwei"], "zwei"),
        (["i — d"], "i — d"),
        ([b"\x82\xac"], "€"),
        (["—", "— d", "wei —"], "—"),
        (["rei, v", "ei, vi"], "rei, v"),
        (["ei, vi", "rei, vier"], "ei, vi"),
        ("mehr", "mehr"),
        ([TEXT], TEXT),
        (["e"], "e"),
        (["e" + TEXT], ""),
    ],
)
def test_rows_end_with_a_stop_string(stop: Any, end: str, right: int) -> None:
    """The first of them that is complete, wherever rounds and drafts end."""
    model, length = Scripted(TEXT), len(TEXT.encode())
    draft = Scripted(TEXT.encode()[:right] + bytes(200))
    out = model.generate([b"", b""], max_new_bytes=length, stop=stop, draft=draft, draft_bytes=11)
    expected = TEXT[: TEXT.index(end) + len(end)] if end else TEXT
    assert out.text == [expected] * 2
    assert out.reasons == ["stop" if end else "length"] * 2
    assert out.statistics.accepted <= 2 * len(expected.encode())
    assert out.ids == model.generate([b"", b""], max_new_bytes=length, stop=stop).ids


@pytest.mark.parametrize("eos_at", [0, 1, 3, 9])
def test_rows_end_with_eos_inside_of_a_draft(eos_at: int) -> None:
    ids = to_ids(TEXT).tolist()
    model = Scripted([*ids[:eos_at], EOS, *ids[eos_at:]])
    for draft in (model, Scripted(TEXT)):
        out = model.generate(["", [BOS]], max_new_bytes=40, draft=draft, draft_bytes=30)
        assert out.ids == [[*ids[:eos_at], EOS]] * 2
        assert out.bytes == [TEXT.encode()[:eos_at]] * 2
        assert out.reasons == ["eos", "eos"]
        assert out.statistics.bytes == 2 * (eos_at + 1)
        assert out.statistics.accepted <= out.statistics.bytes - 2


def test_a_draft_costs_a_pass_of_the_model_a_round() -> None:
    model = Scripted(TEXT)
    plain = model.generate(b"", max_new_bytes=33).statistics
    assert (plain.passes, plain.bytes, plain.drafted, plain.rounds) == ({"script": 32}, 33, 0, {})
    found = model.generate(b"", max_new_bytes=33, draft=model, draft_bytes=8).statistics
    # The prompt's pass gives the first of 33 bytes. Drafts of 4, 8 and 8 give one more each, as does the last of 8.
    assert found.rounds == {(4, 4): 1, (8, 8): 3}
    assert found.passes == {"script": 4, "draft": 28}
    assert (found.bytes, found.drafted, found.accepted) == (33, 28, 28)


def test_a_model_that_drafts_goes_on_after_a_wrong_id() -> None:
    draft = TEXT.encode()[:6] + b"?" + TEXT.encode()[7:]
    out = Scripted(TEXT).generate(b"", max_new_bytes=33, draft=Scripted(draft), draft_bytes=8)
    assert out.bytes == [TEXT.encode()[:33]]
    assert out.statistics.rounds == {(4, 4): 2, (8, 0): 1, (1, 1): 1, (2, 2): 1, (8, 8): 1, (6, 6): 1}


def test_the_patcher_drafts_up_to_where_its_entropy_is_high() -> None:
    for threshold, rounds in ((0.01, 0), (9.0, 15)):  # the last id has no room for a draft
        out = model_cases.build("blt", threshold=threshold).generate("a", max_new_bytes=17, draft="patcher")
        assert len(out.ids[0]) == 17
        assert out.statistics.rounds.total() == rounds


@pytest.mark.parametrize("draft", [None, "prompt"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_new_bytes(count: int, draft: str | None) -> None:
    model = model_cases.build("blt")
    out = model.generate(PROMPTS, max_new_bytes=count, draft=draft)
    assert [len(ids) for ids in out.ids] == [count] * 4
    assert out.reasons == ["length"] * 4
    assert out.ids == [ids[:count] for ids in model.generate(PROMPTS, max_new_bytes=2).ids]


def test_rows_end_at_different_times() -> None:
    model = model_cases.build("blt")
    base = model.generate(PROMPTS, max_new_bytes=16)
    stop = [text[n : n + 1] for text, n in zip(base.bytes, (2, 5, 9, 13), strict=True) if n < len(text)]
    plain = model.generate(PROMPTS, max_new_bytes=16, stop=stop)
    assert len(set(map(len, plain.ids))) > 2
    for draft in ("prompt", "decoder", "patcher", model):
        out = model.generate(PROMPTS, max_new_bytes=16, stop=stop, draft=draft)
        assert (out.ids, out.reasons) == (plain.ids, plain.reasons)
        check_statistics(model, PROMPTS, out)


# --- prompts and other arguments --------------------------------------------------------------------------------------


def test_prompts_of_every_kind() -> None:
    model = model_cases.build("byte_lm")
    text = "né"
    expected = model.generate(text, max_new_bytes=5)
    ids, data = to_ids(text, bos=True), text.encode()
    for prompt in (data, bytearray(data), memoryview(data), ids, ids.int(), ids.tolist(), tuple(ids.tolist()), [text],
                   (data,), torch.tensor(list(data), dtype=torch.uint8), ids[None], [ids], [ids.tolist()]):  # fmt: skip
        assert model.generate(prompt, max_new_bytes=5).ids == expected.ids
    numpy = pytest.importorskip("numpy")
    for array in (numpy.array(list(data), dtype=numpy.uint8), ids.numpy(), ids[None].numpy(), [ids.int().numpy()]):
        assert model.generate(array, max_new_bytes=5).ids == expected.ids
    alone = model.generate([BOS], max_new_bytes=5)
    for nothing in ("", b"", torch.empty(0, dtype=torch.int64), [[]], [""]):
        assert model.generate(nothing, max_new_bytes=5).ids == alone.ids
    assert model.generate([], max_new_bytes=5).ids == []
    assert model.generate(torch.stack([ids, ids]), max_new_bytes=5).ids == expected.ids * 2


WRONG = [
    ({"prompts": 3.5}, r"prompts\[0\]: expected str, bytes or ids, got float"),
    ({"prompts": ["a", None]}, r"prompts\[1\]: expected str, bytes or ids, got NoneType"),
    ({"prompts": [[4, "a"]]}, r"prompts\[0\]: expected str, bytes or ids, got list"),
    ({"prompts": ["a", "a\ud800"]}, r"prompts\[1\]: expected text that UTF-8 can encode"),
    ({"prompts": [4, 260]}, r"prompts\[0\]: expected ids from 0 to 259, got 260"),
    ({"prompts": torch.tensor([-1])}, r"prompts\[0\]: expected ids from 0 to 259, got -1"),
    ({"prompts": torch.tensor([1.5])}, r"prompts\[0\]: expected .*int"),
    ({"prompts": torch.ones(1, 2, 3, dtype=torch.int64)}, r"prompts\[0\]: expected 1 dimension"),
    ({"prompts": [torch.ones(2, 3, dtype=torch.uint8)]}, r"prompts\[0\]: expected 1 dimension"),
    ({"max_new_bytes": -1}, "max_new_bytes: expected a value >= 0, got -1"),
    ({"max_new_bytes": 1.5}, "max_new_bytes: expected"),
    ({"temperature": -1}, "temperature: expected"),
    ({"top_k": 0}, "top_k: expected"),
    ({"top_p": 2}, "top_p: expected"),
    ({"min_p": 0}, "min_p: expected"),
    ({"seed": 1.5}, "seed: expected an int, got 1.5"),
    ({"stop": [3]}, r"stop\[0\]: expected bytes or str, got int"),
    ({"stop": ["a", ""]}, r"stop\[1\]: expected at least one byte, got ''"),
    ({"stop": ["\ud800"]}, r"stop\[0\]: expected text that UTF-8 can encode"),
    ({"stop": None}, "stop: expected a sequence of bytes or str, got NoneType"),
    ({"draft": "patcher"}, "draft: expected one of 'prompt', got 'patcher'"),
    ({"draft": 3}, "draft: expected None, one of 'prompt' or a model, got 3"),
    ({"draft": ByteLM}, "draft: expected None, one of 'prompt' or a model, got <class"),
    ({"draft": model_cases.build("byte_lm", vocab_size=300)}, "draft: expected a model of 260 ids, got one of 300"),
    ({"draft_bytes": 0}, "draft_bytes: expected a value >= 1, got 0"),
    ({"max_tokens": 3}, "max_tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_name_themselves(arguments: dict, message: str) -> None:
    model = model_cases.build("byte_lm")
    with pytest.raises((TypeError, ValueError), match=message):
        model.generate(**{"prompts": "a", "max_new_bytes": 2, **arguments})
    arguments["prompt"] = arguments.pop("prompts", "a")
    with pytest.raises((TypeError, ValueError), match=message):
        model.stream(**{"max_new_bytes": 2, **arguments})  # it raises before the first byte


def test_models_say_what_they_cannot_do() -> None:
    for name in ("blt_space", "megabyte"):
        with pytest.raises(ValueError, match="draft: expected one of 'prompt', 'decoder', got 'patcher'"):
            model_cases.build(name).generate("a", max_new_bytes=1, draft="patcher")
    bpe = model_cases.build("blt", patching="bpe", patcher=None)
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected ids of `to_ids.*, since patching is 'bpe', got text"):
        bpe.generate([[1, 3, 50], "text"], max_new_bytes=1)
    out = bpe.generate([[1, 3, 50, 60, 3, 70]], max_new_bytes=20, draft="decoder")
    check_greedy(bpe, [[1, 3, 50, 60, 3, 70]], out)
    with pytest.raises(ValueError, match="prompt: expected one, got 2"):
        bpe.stream([[1, 3, 50], [1, 3]], max_new_bytes=1)
    broken = model_cases.build("byte_lm")
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits: expected numbers, got nan"):
            broken.generate("a", max_new_bytes=1, temperature=temperature)


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [None, "prompt", "decoder", "patcher"])
def test_a_stream_is_what_generate_returns(draft: str | None) -> None:
    model = model_cases.build("blt")
    options = {"max_new_bytes": 40, "draft": draft, "temperature": 0.9, "seed": 4}
    expected = model.generate("abcabcabcabcabc", **options)
    pieces = model.stream("abcabcabcabcabc", **options)
    assert b"".join(pieces) == expected.bytes[0]
    assert pieces.result.ids == expected.ids
    assert pieces.result.statistics.passes == expected.statistics.passes
    assert "".join(model.stream("abcabcabcabcabc", text=True, **options)) == expected.text[0]


@pytest.mark.parametrize("draft_bytes", [0, 1, 2, 5])
def test_text_comes_in_whole_characters(draft_bytes: int) -> None:
    drafts = {"draft": Scripted(TEXT), "draft_bytes": draft_bytes} if draft_bytes else {}
    length = len(TEXT.encode())
    pieces = list(Scripted(TEXT).stream(b"", text=True, max_new_bytes=length, **drafts))
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    if not draft_bytes:
        assert pieces == list(TEXT)
        assert [len(piece) for piece in Scripted(TEXT).stream(b"", max_new_bytes=length)] == [1] * length


def test_bytes_that_are_no_text_are_replaced() -> None:
    data = b"a\xff\xe2\x82b" + "€".encode()
    for cut in range(1, len(data) + 1):
        model = Scripted(data)
        out = model.generate(b"", max_new_bytes=cut)
        assert out.bytes == [data[:cut]]
        pieces = list(model.stream(b"", text=True, max_new_bytes=cut))
        assert "".join(pieces) == out.text[0] == data[:cut].decode(errors="replace")
        assert all(pieces)


def test_ids_that_are_no_bytes_are_left_out() -> None:
    """Special ids lie below the bytes, and in larger alphabets above them, too."""
    model = Scripted([70, 3, 261, 71, 1, 72, EOS])
    out = model.generate(b"", max_new_bytes=9)
    assert out.ids == [[70, 3, 261, 71, 1, 72, EOS]]
    assert out.bytes == [b"BCD"]
    assert list(model.stream(b"", text=True, max_new_bytes=9)) == ["B", "C", "D"]


def test_a_reader_of_a_stream_may_stop_and_compute_gradients() -> None:
    model = model_cases.build("byte_lm")
    for piece in model.stream("a", max_new_bytes=1000):
        assert torch.is_grad_enabled()
        model.loss(to_ids(piece, bos=True)).backward()
        break
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("name", MODELS)
def test_long_prompts_are_read_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_cases.build(name)
    prompts = ["a long prompt of some words", "short", ""]
    options: dict[str, Any] = {"max_new_bytes": 6, "temperature": 0.9}
    expected = [model.generate(prompts, draft=draft, **options).ids for draft in (None, model, "prompt")]
    monkeypatch.setattr(states, "_PART", 5)
    most: list[int] = []
    extend = type(model.new_state()).extend

    def counted(self: ByteState, ids: Tensor, counts: Sequence[int]) -> Tensor:
        most.append(max(counts))
        return extend(self, ids, counts)

    monkeypatch.setattr(type(model.new_state()), "extend", counted)
    assert model.generate(prompts, **options).ids == expected[0]
    assert max(most) == 5
    assert [model.generate(prompts, draft=draft, **options).ids for draft in (model, "prompt")] == expected[1:]
