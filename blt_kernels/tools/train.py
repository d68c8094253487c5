"""Training on files, resumable at any moment.

A run is a directory: ``checkpoint.pt`` (model, optimiser, random state, step: replaced atomically), ``log.jsonl``,
``heldout.txt`` (the files that were held out), and at the end ``model.safetensors`` and ``loss.png``. The data of a
step is a function of the seed and the step alone, so that a run that was killed and started again with the same options
goes on from its last checkpoint and ends, on the CPU, in bitwise the same weights.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig
from blt_kernels.nn import ByteModel
from blt_kernels.tools import data
from blt_kernels.tools.evaluate import measure, threshold_for_patch_size

# Options that decide how a run is watched and stored, not what it computes.
_FREE = ("paths", "out", "checkpoint_every", "checkpoint_seconds", "log_every", "device", "patch_size", "save_bf16")
# What the threshold of an entropy model is chosen on. Rows begin with two short patches: they should be long.
_THRESHOLD_BYTES, _THRESHOLD_CONTEXT = 1 << 20, 2048


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on.

    `model` is "entropy", "blt" or "megabyte"; `preset` "small" or "paper"; `overrides` replaces fields of that
    configuration. `batch_bytes` ids make a step, in pieces of at most `context`. A fraction `heldout` of the files is
    never trained on; at most `eval_bytes` of them are measured every `eval_every` steps, all of them at the end.
    `patcher` is the entropy model of a BLT with entropy patching, the bundled one if None.
    A checkpoint is written every `checkpoint_every` steps, and no later than `checkpoint_seconds` after the last.
    `bf16` is autocast: faster on CPUs with AMX, and on GPUs. `save_bf16` halves the size of the final model. An entropy
    model is saved with the threshold that makes patches of `patch_size` bytes on held-out files, if there are any.
    """

    model: str
    paths: Sequence[Path]
    out: Path
    preset: str = "small"
    overrides: dict[str, Any] = field(default_factory=dict)
    patcher: Path | None = None
    include: Sequence[str] = ("*",)
    heldout: float = 0.05
    seed: int = 0
    steps: int = 3000
    batch_bytes: int = 4096
    context: int = 2048
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-5
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    bf16: bool = False
    save_bf16: bool = False
    patch_size: float = 4.5
    ops: str = "fused"
    device: str = "cpu"
    eval_every: int = 500
    eval_bytes: int = 1 << 18
    checkpoint_every: int = 200
    checkpoint_seconds: float = 60.0
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.model not in ("entropy", "blt", "megabyte"):
            raise ValueError(f"model: expected 'entropy', 'blt' or 'megabyte', got {self.model!r}")
        if self.preset not in ("small", "paper"):
            raise ValueError(f"preset: expected 'small' or 'paper', got {self.preset!r}")
        for name in ("steps", "warmup", "eval_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < (name != "warmup"):
                raise ValueError(f"{name}: expected at least {int(name != 'warmup')}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: sent after every step. `heldout_bits` is the last measurement, None before the first."""

    step: int
    steps: int
    bits_per_byte: float
    bytes_per_second: float
    heldout_bits: float | None


@dataclass(frozen=True)
class TrainResult:
    """`model` is the safetensors file; bits per byte are over all `heldout_bytes`, None if nothing is held out."""

    model: Path
    curve: Path
    heldout_bits: float | None
    heldout_bytes: int


def build_model(config: TrainConfig) -> ByteModel:
    """A freshly initialised model; the patcher of a BLT is loaded."""
    config_class: Any = {"entropy": ByteLMConfig, "blt": BLTConfig, "megabyte": MegaByteConfig}[config.model]
    values = {**asdict(config_class.small() if config.preset == "small" else config_class()), **config.overrides}
    if config.model == "entropy":
        return ByteLM.from_values(values, config.ops)
    if config.model == "megabyte":
        return MegaByte.from_values(values, config.ops)
    if values["patching"] != "entropy":
        return BLT.from_values({**values, "patcher": None}, config.ops)
    patcher = ByteLM.load(config.patcher, dtype=torch.float32) if config.patcher else ByteLM.bundled()
    threshold = config.overrides.get("threshold", patcher.config.threshold)
    model = BLT.from_values({**values, "patcher": asdict(patcher.config), "threshold": threshold}, config.ops)
    assert model.patcher is not None  # the configuration has one
    model.patcher.load_state_dict(patcher.state_dict())
    return model


def train(config: TrainConfig, report: Callable[[Progress], None] | None = None) -> TrainResult:
    """Train, or go on training, the run in ``config.out``.

    Raises
    ------
    ImportError
        safetensors or matplotlib is not installed.
    FileNotFoundError
        A path does not exist.
    ValueError
        There is nothing to train on, or ``config.out`` holds a run with other options; the message names them.
    """
    run = _Run(config)
    while run.step < config.steps:
        started = time.perf_counter()
        bits = run.advance()
        speed = config.batch_bytes / (time.perf_counter() - started)
        run.record(bits, speed)
        if report:
            report(Progress(run.step, config.steps, bits, speed, run.heldout_bits))
    return run.finish()


class _Run:
    """One training run: its state, and the files it lives in."""

    def __init__(self, config: TrainConfig) -> None:
        for package in ("safetensors", "matplotlib"):  # better missed now than after the training
            if find_spec(package) is None:
                raise ImportError(f"training needs {package}: pip install 'blt-kernels[cli]'")
        self.config, self.out = config, Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        sources = data.find_sources(config.paths, config.include)
        self.train_sources, self.heldout_sources = data.split_sources(sources, config.heldout, config.seed)
        if not self.train_sources:
            raise ValueError(f"heldout: all of {len(sources)} files are held out at {config.heldout}")
        self.batches = data.PackedBatches(self.train_sources, config.batch_bytes, config.context, config.seed)
        torch.manual_seed(config.seed)
        self.model = build_model(config).to(config.device).train()
        self.optimizer = _optimizer(self.model, config)
        self.step, self.seconds = 0, 0.0
        self.heldout_bits: float | None = None
        self.saved_step, self.saved_at = 0, time.monotonic()
        if (self.out / "checkpoint.pt").exists():
            self._resume()
        else:
            listing = "".join(f"{source.path}\n" for source in self.heldout_sources)
            (self.out / "heldout.txt").write_text(listing, encoding="utf-8")
            self._save()
        self._trim_log()

    def advance(self) -> float:
        """One step; returns its loss in bits per byte."""
        config, started = self.config, time.perf_counter()
        tokens, rows = (t.to(config.device) for t in self.batches.batch(self.step))
        rate = _learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
            loss = self.model.loss(tokens, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - started
        return loss.item()

    def record(self, bits: float, speed: float) -> None:
        """Measure, log and save where it is time to."""
        config = self.config
        if not math.isfinite(bits):
            raise ValueError(f"learning_rate: the loss is {bits} at step {self.step}, after {config.learning_rate}")
        line: dict[str, Any] = {}
        if self.step % config.log_every == 0 or self.step == 1:
            line = {"bits_per_byte": bits, "learning_rate": _learning_rate(config, self.step - 1)}
            line |= {"bytes_per_second": round(speed), "seconds": round(self.seconds, 2)}
        if self.heldout_sources and self.step % config.eval_every == 0:
            self.heldout_bits = self._measure(_first(self.heldout_sources, config.eval_bytes))[0]
            line["heldout_bits_per_byte"] = self.heldout_bits
        if line:
            self._log({"step": self.step, **line})
        late = time.monotonic() - self.saved_at >= config.checkpoint_seconds
        if late or self.step - self.saved_step >= config.checkpoint_every:
            self._save()

    def finish(self) -> TrainResult:
        self._save()
        config, bits, size = self.config, None, 0
        if config.save_bf16:  # what is measured is what is saved
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.copy_(parameter.bfloat16())
        if self.heldout_sources:
            bits, size = self._measure(self.heldout_sources)
            self._log({"step": self.step, "heldout_bits_per_byte": bits, "heldout_bytes": size, "final": True})
        path, curve = self.out / "model.safetensors", self.out / "loss.png"
        if isinstance(self.model, ByteLM) and self.heldout_sources:
            sample = _first(self.heldout_sources, _THRESHOLD_BYTES)
            context = max(config.context, _THRESHOLD_CONTEXT)
            threshold = threshold_for_patch_size(self.model, sample, config.patch_size, config.batch_bytes, context)
            self.model.config = replace(self.model.config, threshold=threshold)
        self.model.save(path, torch.bfloat16 if config.save_bf16 else None)
        draw_curve(self.out / "log.jsonl", curve)
        return TrainResult(path, curve, bits, size)

    def _measure(self, sources: Sequence[data.Source]) -> tuple[float, int]:
        config = self.config
        return measure(self.model, sources, config.batch_bytes, config.context, bf16=config.bf16)

    def _options(self) -> dict[str, Any]:
        options = {name: value for name, value in asdict(self.config).items() if name not in _FREE}
        options["files"] = [source.digest for source in self.train_sources]
        return json.loads(json.dumps(options, default=str))

    def _save(self) -> None:
        state = {
            "options": self._options(),
            "step": self.step,
            "seconds": self.seconds,
            "heldout_bits": self.heldout_bits,
            "random": torch.get_rng_state(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        path, part = self.out / "checkpoint.pt", self.out / "checkpoint.pt.part"
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _resume(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.config.device, weights_only=True)
        options, stored = self._options(), state["options"]
        other = [name for name in options if stored.get(name) != options[name]]
        if other:
            shown = ", ".join(name if name == "files" else f"{name}={stored.get(name)!r}" for name in other)
            raise ValueError(f"out: {self.out} holds a run with other options ({shown}): choose another directory")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        self.step, self.seconds, self.heldout_bits = state["step"], state["seconds"], state["heldout_bits"]
        self.saved_step = self.step

    def _log(self, line: dict[str, Any]) -> None:
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _trim_log(self) -> None:
        """Drop what was logged after the checkpoint, and a line that a kill cut short."""
        path, part = self.out / "log.jsonl", self.out / "log.jsonl.part"
        kept = [line for line in read_log(path) if line["step"] <= self.step and "final" not in line]
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_curve(log: Path, path: Path) -> None:
    """Draw the losses in a log as a PNG: training in bits per byte, smoothed, and held-out measurements."""
    from matplotlib.figure import Figure

    lines = read_log(log)
    train_lines = [line for line in lines if "bits_per_byte" in line]
    held_lines = [line for line in lines if "heldout_bits_per_byte" in line and "final" not in line]
    final = [(line["step"], line["heldout_bits_per_byte"]) for line in lines if "final" in line]
    steps, losses = [line["step"] for line in train_lines], [line["bits_per_byte"] for line in train_lines]
    smooth: list[float] = []
    for loss in losses:
        share = max(0.1, 2 / (len(smooth) + 2))  # a wider average as it goes on
        smooth.append(loss if not smooth else smooth[-1] + share * (loss - smooth[-1]))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, smooth, color="C0", label="training")
    if held_lines:
        held = [line["heldout_bits_per_byte"] for line in held_lines]
        axes.plot(
            [line["step"] for line in held_lines], held, "o-", color="C1", markersize=4, label="held out, a sample"
        )
    if final:
        axes.plot(*final[-1], "*", color="C3", markersize=10, label=f"held out, all: {final[-1][1]:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, min(8.5, max([1.0, *losses]))))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _optimizer(model: ByteModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; only matrices decay, not norms and tables."""
    decays = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
    ids = {id(p) for p in decays}
    keeps = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": keeps, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at the last step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    part = (step - config.warmup) / max(config.steps - 1 - config.warmup, 1)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * part)) / 2


def _first(sources: Sequence[data.Source], limit: int) -> list[data.Source]:
    """The first files up to `limit` bytes in all, at least one. They are ordered by digest: a fair sample."""
    chosen, size = [sources[0]], sources[0].size
    for source in sources[1:]:
        size += source.size
        if size > limit:
            break
        chosen.append(source)
    return chosen
