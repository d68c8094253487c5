"""Training on two ranks, over gloo: DDP, FSDP2, hash tables sharded by rows, checkpoints for other numbers of ranks.

Two processes take all the runs of `WORKER`, in turn; the tests look at what they left behind. Then torchrun starts two
more, which go on with a run that was killed.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

from blt_kernels import distributed, ngram_hash_embed
from blt_kernels.cli.base import package_version
from blt_kernels.models import BLT, load_model
from blt_kernels.models.config import BLTConfig
from blt_kernels.nn import TransformerConfig, TransformerLayer, recompute
from blt_kernels.train import data, loop, save_patches
from blt_kernels.train import log as train_log
from blt_kernels.train import parallel as train_parallel
from blt_kernels.train import state as train_state
from blt_kernels.train.build import build_model
from blt_kernels.train.config import TrainConfig

pytestmark = pytest.mark.slow

STEPS, KILLED_AT = 6, 3
PATIENCE = 600  # it is in seconds, for busy machines
LOCAL = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "window": 4}
# The encoder pools at every layer: the cross attention of its first layer gets no gradient. The patcher is frozen. The
# rows of the tables cannot be halved. Some runs read their patches, which the others compute.
MODEL: dict[str, Any] = {
    "encoder": LOCAL,
    "global_transformer": {"dim": 48, "num_layers": 2, "num_heads": 2, "ffn_dim": 64},
    "decoder": {**LOCAL, "num_layers": 1},
    "ngram_vocab": 61,
    "cross_attn_all_layers_encoder": True,
    "pool_every_layer": True,
}
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp", "accumulate": 2, "patches": "patches"},
    "ddp-tables": {"parallel": "ddp", "shard_tables": True},
    "fsdp": {"parallel": "fsdp", "accumulate": 2, "checkpoint_activations": True, "patches": "patches"},
    "fsdp-megabyte": {
        "parallel": "fsdp",
        "model": "megabyte",
        "steps": 3,
        "overrides": {"global_transformer": MODEL["global_transformer"], "local_transformer": LOCAL},
    },
    "fsdp-entropy": {"parallel": "fsdp", "model": "entropy", "overrides": LOCAL, "steps": 3},
}
OPTIONS: dict[str, Any] = {"batch_bytes": 500, "context": 100, "warmup": 2, "heldout": 0.15, "learning_rate": 0.002}


def config(root: Path, name: str, **changes: Any) -> TrainConfig:
    options = {"model": "blt", "overrides": MODEL, "steps": STEPS, "eval_every": 2, **OPTIONS}
    options |= {"paths": [root / "corpus"], "out": root / name, "log_every": 1, "tensorboard": False, **changes}
    if "patches" in options:
        options["patches"] = root / options["patches"]
    return TrainConfig(**options)


def losses(out: Path) -> list[tuple[int, float]]:
    """Return every number that was logged about the loss, in order."""
    lines = train_log.read_log(out / "log.jsonl")
    return [(line["step"], line[key]) for line in lines for key in line if key.endswith("bits_per_byte")]


# --- on two ranks -----------------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_train_parallel
test_train_parallel.work(int(sys.argv[2]), Path(sys.argv[3]))
"""


def count_blocks() -> list[int]:
    """Return a list that grows with every block that a layer computes."""
    calls: list[int] = []
    block = TransformerLayer._block
    TransformerLayer._block = lambda *inputs: (calls.append(1), block(*inputs))[1]
    return calls


def work(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    meeting, timeout = f"file://{root}/meeting", timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timeout)
    torch.save(sharded_embedding(rank), root / f"embedding-{rank}.pt")
    whole, calls = recompute.BLOCK_ROWS, count_blocks()
    for name, changes in RUNS.items():
        # Layers of 125 bytes that backward computes again are in blocks of 32 on these ranks, and alone they are not.
        recompute.BLOCK_ROWS = 8 if changes.get("checkpoint_activations") else whole
        calls.clear()
        loop.train(config(root, name, **changes))
        assert bool(calls) == bool(changes.get("checkpoint_activations")), name
    (root / f"done-{rank}").touch()

    record = loop._Run.record

    def killed(run: loop._Run, bits: float, speed: float) -> None:
        record(run, bits, speed)
        if run.step == KILLED_AT:
            os._exit(1)

    loop._Run.record = killed
    loop.train(config(root, "killed", parallel="fsdp", checkpoint_every=2))


def embedding_inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return other numbers of bytes and rows on every rank, and bytes beyond the last row, which hold anything."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(4, 12, (40 - 17 * rank,), generator=generator)
    rows = [torch.tensor([0, 3, 3, 38]), torch.tensor([0, 23])][rank]
    grad = torch.randn(len(tokens), 6, dtype=torch.float64, generator=generator)
    tokens[rows[-1] :], grad[rows[-1] :] = -100, torch.nan
    return tokens, rows, grad


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    sizes = (2 * 3 * 11, 260)
    return tuple(torch.randn(size, 6, dtype=torch.float64, generator=generator) for size in sizes)


def small_blt() -> BLT:
    local, wide = TransformerConfig(6, 1, 1, ffn_dim=8), TransformerConfig(12, 1, 1, ffn_dim=8)
    tables: dict[str, Any] = {"ngram_vocab": 11, "ngram_sizes": (2, 3, 5), "num_functions": 2}
    return BLT(BLTConfig(local, wide, local, patching="byte", patcher=None, **tables))


def sharded_embedding(rank: int) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    model = small_blt().double()
    hashed, bytes_ = tables()
    with torch.no_grad():
        model.encoder_hash_tok_embedding.weight.copy_(hashed)
    mesh = init_device_mesh("cpu", (2,))
    distributed.shard_hash_tables(model, mesh)
    shards = model.encoder_hash_tok_embedding
    weight = shards.weight
    assert weight.shape == (6, 6 - rank, 6)
    bytes_.requires_grad_()
    tokens, rows, grad = embedding_inputs(rank)
    out = model.ops.ngram_hash_embed(tokens, weight, bytes_, rows, ngram_sizes=(2, 3, 5), num_functions=2)
    out.backward(grad)
    nothing = model.ops.ngram_hash_embed(tokens[:0], weight, bytes_, rows[:1], ngram_sizes=(2, 3, 5), num_functions=2)
    assert nothing.shape == (0, 6)
    return {"out": out.detach(), "tables": shards.whole(weight.grad).full_tensor(), "bytes": bytes_.grad}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Return the folder of runs on two ranks and on one. They run once for all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if hasattr(request.config, "workerinput") else base) / "parallel"
    with FileLock(f"{root}.lock"):
        if not root.exists():
            train_everywhere(root)
    assert all((root / f"done-{rank}").exists() for rank in range(2))
    return root


def train_everywhere(root: Path) -> None:
    (root / "corpus").mkdir(parents=True)
    for i in range(20):
        (root / "corpus" / f"{i}.txt").write_text(f"file {i}: " + f"the quick brown fox {i}; " * (3 + i))
    alone = config(root, "alone-blt")
    sources = data.find_sources(alone.paths)
    save_patches.save(root / "patches", sources, build_model(alone), alone.context)
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent)]
    workers = [subprocess.Popen([*command, str(rank), str(root)], env=environment()) for rank in range(2)]
    try:
        torch.set_num_threads(1)
        loop.train(alone)
        for name in ("megabyte", "entropy"):
            loop.train(config(root, f"alone-{name}", **RUNS[f"fsdp-{name}"]))
        for worker in workers:
            worker.wait(timeout=PATIENCE)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


# --- what they left behind --------------------------------------------------------------------------------------------


def test_a_sharded_embedding_is_the_whole_one(root: Path) -> None:
    """In fp64, with other bytes on each rank. Gradients of tables are means over ranks, those of bytes a rank's own."""
    hashed, bytes_ = (table.requires_grad_() for table in tables())
    sizes: dict[str, Any] = {"ngram_sizes": (2, 3, 5), "num_functions": 2}
    gradients = []
    for rank in range(2):
        got = torch.load(root / f"embedding-{rank}.pt", weights_only=True)
        tokens, rows, grad = embedding_inputs(rank)
        out = ngram_hash_embed(tokens, hashed, bytes_, rows, **sizes)
        torch.testing.assert_close(got["out"], out, rtol=1e-14, atol=1e-14)
        (own,) = torch.autograd.grad(out, bytes_, grad, retain_graph=True)
        torch.testing.assert_close(got["bytes"], own, rtol=1e-14, atol=1e-14)
        gradients.append(torch.autograd.grad(out, hashed, grad)[0])
        mean = got["tables"].flatten(0, 1)
    torch.testing.assert_close(mean, sum(gradients) / 2, rtol=1e-14, atol=1e-14)


def same(one: Path, other: Path, steps: int = STEPS) -> None:
    """Compare losses to rounding, in training and on held-out bytes."""
    expected = [entry for entry in losses(other) if entry[0] <= steps]
    got = losses(one)[: len(expected)]
    assert [step for step, _ in got] == [step for step, _ in expected]
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in expected], rel=2e-6)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_have_the_losses_of_one(name: str, root: Path) -> None:
    alone = f"alone-{RUNS[name].get('model', 'blt')}"
    steps = RUNS[name].get("steps", STEPS)
    assert len(losses(root / alone)) == steps + steps // 2 + 1
    assert losses(root / alone)[-1][1] < losses(root / alone)[0][1] - 0.5  # they learn
    same(root / name, root / alone)
    one, two = (load_model(root / run / "model.safetensors") for run in (alone, name))
    assert type(one) is type(two)
    if name == "fsdp-entropy":
        assert two.config.threshold == pytest.approx(one.config.threshold, rel=1e-4)
        two.config = replace(two.config, threshold=one.config.threshold)
    assert one.config == two.config
    expected = one.state_dict()
    for key, value in two.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)  # Adam magnifies rounding


def stored_sizes(path: Path) -> dict[str, list[torch.Size]]:
    """Return names of what a checkpoint holds, and the sizes of the pieces that it is cut into."""
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: [chunk.sizes for chunk in what.chunks] for name, what in stored.items()}


def test_checkpoints_are_sharded(root: Path) -> None:
    """Each rank writes its part, and what is whole on both is written once."""
    sizes = stored_sizes(train_state.latest(root / "fsdp" / "checkpoint"))
    for kind in ("model.{}", "optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq"):
        name = kind.format("encoder_hash_tok_embedding.weight")
        assert sorted(sizes[name]) == [torch.Size([6, 30, 32]), torch.Size([6, 31, 32])]
        name = kind.format("global_transformer.layers.1.mlp.down_proj.weight")
        assert sizes[name] == [torch.Size([24, 64])] * 2
    assert sizes["model.patcher.embed_tokens.weight"] == [torch.Size([260, 256])]
    assert not any(name.startswith("optimizer.patcher.") for name in sizes)
    assert set(sizes) == set(stored_sizes(train_state.latest(root / "alone-blt" / "checkpoint")))


def test_nothing_holds_the_group_when_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last to hold it must not be DDP: then runs under torchrun, on a busy machine, now and then never end."""
    ddp = torch.nn.parallel.DistributedDataParallel
    begin, end = dist.init_process_group, dist.destroy_process_group
    left: list[list[object]] = []

    def end_group() -> None:
        left.append([held for held in gc.get_objects() if isinstance(held, ddp)])
        end()

    meeting = f"file://{tmp_path}/meeting"
    monkeypatch.setattr(dist, "init_process_group", lambda name: begin(name, init_method=meeting, rank=0, world_size=1))
    monkeypatch.setattr(dist, "destroy_process_group", end_group)
    monkeypatch.setattr(train_parallel, "is_launched", lambda: True)
    called: list[str] = []

    def distribute(model: torch.nn.Module, *_: Any) -> torch.nn.Module:
        called.append(type(model).__name__)
        distributed = ddp(model)
        distributed.__dict__["cycle"] = distributed
        return distributed

    monkeypatch.setattr(train_parallel, "distribute", distribute)
    (tmp_path / "corpus").mkdir()
    for i in range(3):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"file {i}: " + "the quick brown fox; " * 9)
    loop.train(config(tmp_path, "run", model="entropy", overrides=LOCAL, steps=1))
    assert called == ["ByteLM"]
    assert left == [[]]


def test_every_rank_needs_rows() -> None:
    assert [distributed._row_range(10, 4, rank) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    with pytest.raises(ValueError, match="ngram_vocab: expected rows for each of 4 ranks, got 9"):
        distributed._row_range(9, 4, 0)


def test_a_run_killed_on_two_ranks_goes_on_alone(root: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(root / "killed", killed)
    assert train_state.latest(killed / "checkpoint").name == str(KILLED_AT - 1)
    steps: list[int] = []
    loop.train(config(root, str(killed)), lambda now: steps.append(now.step))
    assert steps == list(range(KILLED_AT, STEPS + 1))
    same(killed, root / "alone-blt")


def test_a_run_killed_on_two_ranks_goes_on_under_torchrun(root: Path, tmp_path: Path) -> None:
    """The command line divides it over two ranks in another way; bytes of held-out files are measured once."""
    killed = tmp_path / "killed"
    shutil.copytree(root / "killed", killed)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
    options += [f"--set={key}={json.dumps(value)}" for key, value in MODEL.items()]
    options += [f"--steps={STEPS}", "--eval-every=2", "--out", str(killed), "--no-tensorboard"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "blt_kernels", "train", "blt", str(root / "corpus"), "--parallel=ddp"]
    done = subprocess.run(
        [*command, "--shard-tables", *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out: ") == 1
    lines = train_log.read_log(killed / "log.jsonl")
    final, expected = lines[-1], train_log.read_log(root / "alone-blt" / "log.jsonl")[-1]
    assert final["heldout_bytes"] == expected["heldout_bytes"]
    assert final["heldout_bits_per_byte"] == pytest.approx(expected["heldout_bits_per_byte"], rel=2e-6)


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_of_torchrun_ends_without_finalizing(launched: bool) -> None:
    """Its output is there; other processes, and those with an error, are finalized."""
    code = "import atexit, blt_kernels.cli as cli; atexit.register(print, 'finalized'); cli.main()"
    variables = {key: value for key, value in environment().items() if key != "TORCHELASTIC_RUN_ID"}
    variables |= {"TORCHELASTIC_RUN_ID": "some"} if launched else {}

    def lines(option: str) -> tuple[int, list[str]]:
        done = subprocess.run([sys.executable, "-c", code, option], env=variables, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    assert lines("--version") == (0, [package_version(), *["finalized"][launched:]])
    assert lines("--nonsense") == (2, ["finalized"])
