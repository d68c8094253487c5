"""The runs of the study: what models read, how runs are trained, resumed and measured, and what the command writes."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blt_kernels.ids import BOS, EOS
from blt_kernels.testing import real_text
from blt_kernels.train import data

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study import command, families, measuring, plan, runs, training
from study.corpus import Corpus
from study.families import FAMILIES, PATCHER, Model
from study.plan import Plan, Scope, larger, next_rate
from study.readers import ByteReader
from study.runs import Job, Lab
from study.scoring import Scorer

RATE = 4e-3


def small(model: Model) -> Model:
    """Return a model of the same kind that trains in no time."""
    if model.kind == "entropy":
        config = families.byte_lm(32, 1, None, vocab_size=model.config.vocab_size)
    elif model.kind == "megabyte":
        config = families.MegaByteConfig(8, families.layers(64, 1), families.layers(32, 1))
    else:
        config = families.blt(model.config.patching, 32, 1, families.layers(32, 1), ngram_vocab=64)
    return replace(model, config=config)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("text")
    text = real_text(60000).replace(b"\0", b"").decode(errors="ignore")
    for number in range(20):
        (folder / f"{number}.txt").write_text(text[2000 * number : 2000 * (number + 1)], encoding="utf-8")
    rest = text[40000:]
    heldout = {"python": [rest[i : i + 500] for i in range(0, 6000, 500)], "german": ["Straße für Äpfel und Öl"] * 3}
    sources = data.find_sources([folder])
    return Corpus(sources, sources[:2], heldout, {"python": 30000, "german": 10000}, {"digest": "of a test"})


@pytest.fixture(scope="module")
def lab(corpus: Corpus, tmp_path_factory) -> Lab:
    """Return a lab with a patcher that has learned little."""
    lab = Lab(tmp_path_factory.mktemp("work"), corpus)
    job = Job(PATCHER, 0.03, 0, RATE)
    runs.perform(lab, job, quiet)
    lab.patcher = lab.folder(job) / "weights.pt"
    return lab


def quiet(name: str, part: float, text: str) -> None:
    pass


# --- readers and patches ----------------------------------------------------------------------------------------------


def test_tokens_and_bytes_read_the_same_text(lab: Lab) -> None:
    rows, reader = lab.batches(0).rows(3), lab.reader(4096)
    ids, offsets, num_bytes = reader.read(rows)
    of_bytes, byte_offsets, expected = ByteReader().read(rows)
    assert len(offsets) == len(byte_offsets)
    assert expected - 8 <= num_bytes <= expected
    for i in range(len(rows)):
        tokens = ids[offsets[i] : offsets[i + 1]].tolist()
        read = of_bytes[byte_offsets[i] : byte_offsets[i + 1]][1:]
        assert tokens[0] == BOS
        assert (tokens[-1] == EOS) == (read.numel() > 0 and int(read[-1]) == EOS)
        text = bytes((read[read > 3] - 4).tolist()).decode(errors="ignore")
        assert reader.tokenizer.decode([t for t in tokens if t > 3], skip_special_tokens=False) == text
    assert len(ids) < len(of_bytes) / 2


def test_characters_that_a_row_cuts_are_no_text_to_tokens(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("aäöü", encoding="utf-8")
    (source,) = data.find_sources([tmp_path / "x"])
    # Ids are BOS, a, two bytes each of ä, ö and ü, EOS. The row begins within ä and ends within ü.
    ids, _, num_bytes = lab.reader(4096).read([data.Row(source, 2, 5)])
    assert num_bytes == 2
    assert lab.reader(4096).tokenizer.decode(ids[1:].tolist()) == "ö"


def test_stored_entropies_are_those_of_the_pieces(lab: Lab) -> None:
    source = lab.corpus.train[3]
    for number in range(data.num_pieces(source.size, runs.CONTEXT)):
        piece = data.find_piece(source, number, runs.CONTEXT)
        expected = lab.entropies.of(*data.read_rows([piece]))
        stored = lab.entropies.of_rows([piece])
        assert torch.allclose(stored[number > 0 :], expected[number > 0 :], atol=1e-4)


@pytest.mark.parametrize("rule", [{}, {"monotonic": True}, {"max_patch_length": 12}], ids=str)
def test_patches_have_the_size_that_is_asked_for(lab: Lab, rule: dict) -> None:
    model = replace(families.entropy_of("A"), rule=rule, name=f"entropy {rule}")
    assert lab.cost(model).patch_size == pytest.approx(4.5, rel=0.03)
    rows = lab.sample()
    offsets = torch.tensor(np.cumsum([0, *(row.length for row in rows)]), dtype=torch.int32)
    longest = int(lab.patching(model).of_rows(rows, offsets).patch_lengths.max())
    assert longest <= rule.get("max_patch_length", runs.CONTEXT)


# --- models -----------------------------------------------------------------------------------------------------------


def test_sizes_of_a_family_cost_what_they_should(lab: Lab) -> None:
    for make in FAMILIES.values():
        costs = [lab.cost(make(size)).mflops for size in families.SIZES]
        assert costs == sorted(costs)
    longer = [lab.cost(model) for model in families.longer_patches()]
    assert [round(cost.patch_size * 2) / 2 for cost in longer] == [4.5, 6, 8]
    assert max(cost.mflops for cost in longer) < 1.1 * min(cost.mflops for cost in longer)


def test_hash_tables_of_a_transformer_read_no_other_row() -> None:
    model = families.build(next(m for m in families.variants() if m.change == "tables"), 0).eval()
    torch.nn.init.normal_(model.embed_tokens.tables.weight)
    ids = torch.randint(4, 260, (40,), dtype=torch.int32)
    together = model(ids, torch.tensor([0, 25, 40], dtype=torch.int32))
    assert torch.allclose(together[25:], model(ids[25:]), atol=1e-5)
    changed = ids.clone()
    changed[30] += 1 if changed[30] < 200 else -1
    assert not torch.allclose(together[35], model(changed, torch.tensor([0, 25, 40], dtype=torch.int32))[35], atol=1e-4)


def test_parts_that_are_left_out_have_no_effect(lab: Lab) -> None:
    without = next(m for m in families.variants() if m.change == "no tables")
    model = families.build(without, 0)
    assert not model.encoder_hash_tok_embedding.weight.any()
    assert not model.encoder_hash_tok_embedding.weight.requires_grad
    random = next(m for m in families.variants() if m.change == "random tables")
    assert families.build(random, 0).encoder_hash_tok_embedding.weight.any()
    plain = families.build(next(m for m in families.variants() if m.change == "no encoder cross attention"), 0)
    assert not any(name.startswith("local_encoder.cross") for name, _ in plain.named_parameters())
    base, uncrossed = (
        lab.cost(m).mflops
        for m in (
            families.entropy_of("B"),
            next(m for m in families.variants() if m.change == "no encoder cross attention"),
        )
    )
    assert 0.9 * base < uncrossed < base


def test_what_is_added_to_embeddings_begins_at_zero() -> None:
    with_tables = next(m for m in families.variants() if m.change == "tables")
    for model in (families.space_of("A"), families.megabyte_of("A"), with_tables, families.bytes_of("A")):
        built, name = families.build(model, 0), families.begins_at_zero(model)
        assert {n for n, parameter in built.named_parameters() if not parameter.any()} == {name} - {None}
        built(torch.randint(4, 260, (40,), dtype=torch.int32)).square().mean().backward()
        assert name is None or built.get_parameter(name).grad.any()


def test_a_global_transformer_begins_as_layers_over_tokens() -> None:
    tokens, blt = (families.build(model, seed) for seed, model in enumerate(families.over_layers_of_tokens()))
    runs.begin_as(blt, tokens.state_dict())
    for name, value in tokens.layers.state_dict().items():
        assert blt.global_transformer.layers.state_dict()[name].equal(value)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_nats_of_a_text_do_not_depend_on_the_texts_beside_it(lab: Lab, family: str) -> None:
    model = small(FAMILIES[family]("A"))
    scorer = Scorer(families.build(model, 0), lab.reader(model.vocabulary), lab.patching(FAMILIES[family]("A")))
    texts = ["Straße", lab.corpus.heldout["python"][0], "a", lab.corpus.heldout["python"][1]]
    together = scorer.nats(texts)
    assert together == pytest.approx([scorer.nats([text])[0] for text in texts], rel=1e-4)
    ids = torch.from_numpy(scorer.reader.encode(texts[0]))
    layout = {} if scorer.patching is None else {"layout": scorer.patching.of(ids, torch.tensor([0, len(ids)]).int())}
    logits = scorer.model(ids, **layout)
    assert together[0] == pytest.approx(F.cross_entropy(logits[:-1], ids[1:].long(), reduction="sum").item(), rel=1e-4)
    assert scorer.nats([]) == []


def test_a_run_goes_on_where_it_was_killed(lab: Lab, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    model = small(FAMILIES["bytes"]("A"))
    job = Job(model, 20 * 3e-6 * lab.cost(model).mflops * runs.BATCH, 0, RATE)
    at_once, killed = (Lab(tmp_path / name, lab.corpus) for name in ("at once", "killed"))
    assert at_once.steps(job) == 20
    expected = runs.perform(at_once, job, quiet)

    def kill(name: str, part: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.perform(killed, job, kill)
    assert torch.load(killed.folder(job) / "checkpoint.pt", weights_only=True)["values"]["step"] == 10
    found = runs.perform(killed, job, quiet)
    assert replace(found, cpu_seconds=0.0) == replace(expected, cpu_seconds=0.0)
    weights = [torch.load(x.folder(job) / "weights.pt", weights_only=True) for x in (at_once, killed)]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    assert not (killed.folder(job) / "checkpoint.pt").exists()
    assert found.trained_bytes == pytest.approx(20 * runs.BATCH, rel=0.02)
    assert len(found.curve) == 20


def test_runs_differ_by_what_they_depend_on(lab: Lab, tmp_path: Path) -> None:
    job = Job(small(families.entropy_of("A")), 0.01, 0, RATE)
    (tmp_path / "begin.pt").write_bytes(b"weights")
    others = [
        replace(job, seed=1),
        replace(job, learning_rate=1e-3),
        replace(job, tflops=0.02),
        replace(job, init=tmp_path / "begin.pt"),
        replace(job, global_scale=0.1),
        *(
            replace(job, model=replace(job.model, **changed))
            for changed in ({"patch_size": 6.0}, {"rule": {"monotonic": True}}, {"change": "no tables"})
        ),
    ]
    assert len({lab.folder(x) for x in (job, *others)}) == 1 + len(others)
    assert lab.folder(job) == Lab(lab.work, lab.corpus, lab.patcher).folder(job)


def test_other_held_out_text_needs_no_other_training(lab: Lab, monkeypatch) -> None:
    job = Job(PATCHER, 0.03, 0, RATE)
    whole = runs.perform(lab, job, quiet)
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(command, "MIN_GROUP_BYTES", 0)
    half = runs.perform(Lab(lab.work, command.shortened(lab.corpus, 0.5)), job, quiet)
    assert half.excerpts["python"] == whole.excerpts["python"][:6]
    assert runs.perform(lab, job, quiet) == whole


def test_bits_have_the_weights_of_the_training_text(lab: Lab) -> None:
    outcome = runs.perform(lab, Job(PATCHER, 0.03, 0, RATE), quiet)
    sizes = {group: sum(len(text.encode()) for text in texts) for group, texts in lab.corpus.heldout.items()}
    python, german = (outcome.bits[group] / sizes[group] for group in ("python", "german"))
    assert outcome.bits_per_byte(lab.corpus) == pytest.approx(0.75 * python + 0.25 * german)


def test_the_next_learning_rate_is_beyond_the_best() -> None:
    assert next_rate({2.0: 3.0, 4.0: 2.0, 8.0: 2.5}) is None
    assert next_rate({2.0: 1.0, 4.0: 2.0, 8.0: 2.5}) == 1.0
    assert next_rate({2.0: 3.0, 4.0: 2.0, 8.0: 1.5}) == 16.0
    assert next_rate({2.0: 5.0, 4.0: 4.0, 8.0: 3.0, 16.0: 2.0, 32.0: 1.0}) is None


def test_learning_rates_are_halved_while_that_is_better(lab: Lab, monkeypatch) -> None:
    best = {"bytes": 1e-3, "MegaByte": 8e-3, "tokens 4k": 2e-3}
    monkeypatch.setattr(plan, "FAMILIES", {name: FAMILIES[name] for name in best})
    made = Plan(lab, Scope(), 1)

    def bits(job: Job) -> float:
        return abs(math.log2(job.learning_rate / best[job.model.family]))

    monkeypatch.setattr(made, "perform", lambda jobs: jobs)
    monkeypatch.setattr(made, "bits", bits)
    made.rates = dict.fromkeys(best, 4e-3)
    made.lower_rates()
    assert made.rates == {"bytes": 1e-3, "MegaByte": 4e-3, "tokens 4k": 2e-3}


def test_larger_sizes_are_tried_while_they_are_better(lab: Lab, monkeypatch) -> None:
    best = {"bytes": "C", "MegaByte": "A", "BLT-Space": "S", "tokens 4k": "B"}  # of the largest budget
    monkeypatch.setattr(plan, "FAMILIES", {name: FAMILIES[name] for name in best})
    scope = Scope(seeds=1)
    made = Plan(lab, scope, 1)
    tried: dict[str, str] = dict.fromkeys(best, "")

    def perform(jobs: list[Job]) -> list[Job]:
        for job in jobs:
            if job.tflops == scope.large:
                tried[job.model.family] = "".join(sorted({*tried[job.model.family], job.model.size}, key="SABC".index))
        return jobs

    def bits(job: Job) -> float:  # the best sizes of the middle budget are A, and S of BLT-Space
        size = best[job.model.family] if job.tflops == scope.large else "A"
        size = "S" if job.model.family == "BLT-Space" else size
        return abs("SABC".index(job.model.size) - "SABC".index(size))

    monkeypatch.setattr(made, "perform", perform)
    monkeypatch.setattr(made, "bits", bits)
    made.rates = dict.fromkeys(best, 4e-3)
    made.compare_families()
    assert made.best == best
    assert tried == {"bytes": "ABC", "MegaByte": "AB", "BLT-Space": "SA", "tokens 4k": "ABC"}
    assert larger("C") == ""


# --- the command ------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_whole_study(lab: Lab, tmp_path: Path, monkeypatch) -> None:
    """All parts of a study of small models: runs, scores, settings and report; the second call trains nothing."""
    few = {name: lambda size, make=make: small(make(size)) for name, make in FAMILIES.items() if name != "tokens 32k"}
    monkeypatch.setattr(plan, "FAMILIES", few)
    monkeypatch.setattr(plan, "entropy_of", few["BLT-Entropy"])
    monkeypatch.setattr(plan, "over_layers_of_tokens", lambda: [*map(small, families.over_layers_of_tokens())])
    monkeypatch.setattr(plan, "longer_patches", lambda: [small(model) for model in families.longer_patches()])
    monkeypatch.setattr(plan, "variants", lambda size: [small(model) for model in families.variants(size)[3:5]])
    monkeypatch.setattr(measuring, "QUESTIONS", 3)
    monkeypatch.setattr(measuring, "NOISED_BYTES", 1000)
    scope = Scope(small=0.002, middle=0.004, large=0.006, patcher=0.03, seeds=2)
    options = (lab.corpus, tmp_path / "work", scope, 1)
    command.study(*options, tmp_path / "out")
    found = rows_of(tmp_path / "out" / "runs.csv")
    assert {row["family"] for row in found} == {*few, "patcher"}
    for row in found:
        per_step = 3e6 * float(row["mflops"]) * runs.BATCH
        assert int(row["steps"]) == max(2, round(1e12 * float(row["tflops"]) / per_step))
        assert 1 < float(row["bits"]) < 10
    names = {row["model"] for row in found}
    assert {"BLT-Entropy 128 from tokens", "bytes B with tables", "BLT-Entropy B, patches of 8"} <= names
    scores = rows_of(tmp_path / "out" / "scores.csv")
    assert {row["kind"] for row in scores} == {"text", "noise", "task", "misspelling"}
    assert {row["run"] for row in scores} == {row["run"] for row in found}
    sizes, *excerpts = rows_of(tmp_path / "out" / "excerpts.csv")
    by_run = {row["run"]: row for row in found}
    assert {row["run"] for row in excerpts} <= {run for run, row in by_run.items() if row["seed"] == "0"}
    assert {by_run[row["run"]]["model"] for row in excerpts} == names - {"patcher"}
    for row in excerpts:
        # The first excerpts are those of the first group.
        (of_group,) = (s for s in scores if s["run"] == row["run"] and s["kind"] == "text" and s["group"] == "python")
        count = int(of_group["count"])
        assert sum(float(row[str(i)]) for i in range(count)) == pytest.approx(float(of_group["bits"]), rel=1e-4)
        assert sum(int(sizes[str(i)]) for i in range(count)) == int(of_group["bytes"])
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["scope"]["seeds"] == 2
    assert settings["models"].keys() == names
    assert settings["models"]["bytes B with tables"]["change"] == "tables"
    assert (settings["models"]["BLT-Entropy S"]["threshold"] or 0) > 0
    assert settings["models"]["BLT-Space S"]["threshold"] is None
    assert settings["shares"] == lab.corpus.shares
    assert settings["learning_rates"].keys() == few.keys()

    noised, answers = (rows_of(tmp_path / "out" / f"{name}.csv") for name in ("noised", "answers"))
    for row in scores:
        if row["kind"] == "noise":
            (bits,) = (list(x.values())[2:] for x in noised if (x["run"], x["noise"]) == (row["run"], row["name"]))
            assert sum(map(float, bits)) == pytest.approx(float(row["bits"]), rel=1e-4)
        elif row["kind"] != "text":
            key = row["run"], row["kind"], row["name"]
            (right,) = (list(x.values())[3:] for x in answers if (x["run"], x["kind"], x["name"]) == key)
            assert sum(x == "1" for x in right) == int(row["right"])

    (scored,) = (tmp_path / "work" / "runs" / excerpts[0]["run"]).glob("excerpts-*.json")
    scored.unlink()  # is scored again
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("trained again"))
    command.study(*options, tmp_path / "again")
    assert rows_of(tmp_path / "again" / "runs.csv") == found
    assert rows_of(tmp_path / "again" / "scores.csv") == scores
    assert rows_of(tmp_path / "again" / "excerpts.csv") == [sizes, *excerpts]


def test_held_out_text_is_shortened_by_group(corpus: Corpus, monkeypatch) -> None:
    monkeypatch.setattr(command, "MIN_GROUP_BYTES", 200)
    shortened = command.shortened(corpus, 0.5)
    assert shortened.heldout == {"python": corpus.heldout["python"][:6], "german": corpus.heldout["german"]}
    assert shortened.measured == 0.5


def test_questions_and_noised_text_are_shortened_too(corpus: Corpus, monkeypatch) -> None:
    monkeypatch.setattr(measuring, "QUESTIONS", 8)
    monkeypatch.setattr(measuring, "NOISED_BYTES", 4000)
    for measured in (1.0, 0.5):
        suite = measuring.make_suite(replace(corpus, measured=measured))
        assert {len(asked) for asked in suite.questions["task"].values()} == {8 * measured}
        sizes = [len(text.encode()) for text in suite.noises["clean"]]
        assert sum(sizes[:-1]) < 4000 * measured <= sum(sizes)


def test_the_short_study_has_less_of_everything(monkeypatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def prepare(work: Path, languages: bool) -> Corpus:
        return Corpus([], [], {"python": ["x" * 1000] * 200}, {"python": 1}, {})

    def study(corpus: Corpus, work: Path, scope: Scope, processes: int, out: Path) -> None:
        asked[work.name] = corpus, scope, out.name

    monkeypatch.setattr(command, "prepare", prepare)
    monkeypatch.setattr(command, "study", study)
    others = ("--short", "--scale=2", "--seeds=5", "--parts", "f", "rates")
    for name, options in (("long", ()), ("short", ("--short",)), ("other", others)):
        command.main(["--work", str(tmp_path / name), *options])
    assert asked["long"][1] == Scope()
    assert asked["short"][1] == plan.SHORT
    assert asked["other"][1] == replace(
        plan.SHORT, small=0.4, middle=1.5, large=4.0, patcher=1.0, seeds=5, parts=("rates", "f")
    )
    assert [asked[name][2].startswith("study-short-") for name in asked] == [False, True, True]
    assert [len(asked[name][0].heldout["python"]) for name in asked] == [100, 25, 25]


def test_the_short_study_has_the_rates_that_were_found() -> None:
    newest = max((Path(command.RESULTS)).glob("study-2*"), key=lambda path: path.name)
    assert json.loads((newest / "settings.json").read_text())["learning_rates"] == plan.SHORT.rates


@pytest.mark.parametrize("arguments", [["--scale", "0"], ["--jobs", "0"], ["--parts", "z"], ["--seeds", "0"]], ids=str)
def test_wrong_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
