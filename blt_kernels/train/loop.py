"""Trains on files. A run may be killed and resumed at any moment.

A run is a directory: ``checkpoint`` (see `blt_kernels.train.state`), ``log.jsonl``, ``tensorboard``,
``heldout.txt`` (the files that were held out), ``lock``, which keeps other processes from it, and at the end
``model.safetensors`` and ``loss.png``. The data of a step is a function of the seed and the step alone, so a run that
was killed and started again with the same options goes on from its last checkpoint, and ends in bitwise the same
weights on the CPU.

torchrun starts a run on several processes: ``torchrun --nproc-per-node 2 -m blt_kernels train ...``. They share the
rows of each step, as micro-batches do. The loss is the mean over all predicted bytes of the step, so its numbers do
not depend on ranks and micro-batches, up to rounding, and a run may go on with other numbers of them.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from blt_kernels._files import locked, shortened, write_text
from blt_kernels.models import BLT, ByteLM
from blt_kernels.models.base import ByteModel
from blt_kernels.models.stored_config import config_from_dict
from blt_kernels.nn import CrossAttention, TransformerLayer, next_byte_targets
from blt_kernels.nn.functional import mean_bits
from blt_kernels.train import data, parallel, state
from blt_kernels.train.build import MODELS, build_model
from blt_kernels.train.config import TrainConfig
from blt_kernels.train.evaluate import measure, threshold_for_patch_size
from blt_kernels.train.log import Log, draw_curve
from blt_kernels.train.optimizer import learning_rate, make_optimizer
from blt_kernels.train.row_patches import RowPatches
from blt_kernels.train.stored_patches import StoredPatches, model_digest, provenance

# A resumed run may change these options: they change its results by rounding only.
_FREE = (
    *("paths", "out", "checkpoint_every", "checkpoint_seconds", "log_every", "tensorboard", "patch_size", "save_bf16"),
    *("device", "accumulate", "checkpoint_activations", "compile", "parallel", "shard_tables", "patches", "keep"),
)
# The threshold of an entropy model is measured on so many bytes. Rows are long: each begins with two short patches.
_THRESHOLD_BYTES, _THRESHOLD_CONTEXT = 1 << 20, 2048


@dataclass(frozen=True)
class Progress:
    """Holds the state of a run after a step. `heldout_bits` is the last measurement, None before the first."""

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


def train(
    config: TrainConfig,
    report: Callable[[Progress], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train the run in ``config.out``, or resume it, on all ranks if there are several.

    Parameters
    ----------
    config : TrainConfig
    report : callable, optional
        Called after every step, on rank 0.
    resumed : callable, optional
        Called with the step of the checkpoint that a run goes on from, on rank 0, unless no step is left.

    Raises
    ------
    ImportError
        safetensors or matplotlib is not installed, or TensorBoard if it is asked for.
    FileNotFoundError
        A path does not exist.
    ValueError
        There is nothing to train on, ``config.out`` holds a run with other options or one that began with other content
        in the files of options, or another process is training there; the message names them.
    """
    out = Path(config.out)
    if out.is_dir() and os.path.realpath(out) in map(os.path.realpath, config.paths):
        raise ValueError(f"out: expected another directory than the paths to train on, got {out}")
    with parallel.start(config.device) as ranks, locked(out, "out") if ranks.rank == 0 else nullcontext():
        return _train(config, report, resumed, ranks)


def _train(
    config: TrainConfig,
    report: Callable[[Progress], None] | None,
    resumed: Callable[[int], None] | None,
    ranks: parallel.Ranks,
) -> TrainResult:
    """Train. It is a function of its own so that the run is freed before the process group ends."""
    run = _Run(config, ranks)
    if resumed and ranks.rank == 0 and 0 < run.step < config.steps:
        resumed(run.step)
    while run.step < config.steps:
        started = time.perf_counter()
        bits = run.advance()
        speed = config.batch_bytes / (time.perf_counter() - started)
        run.record(bits, speed)
        if report and ranks.rank == 0:
            report(Progress(run.step, config.steps, bits, speed, run.heldout_bits))
    return run.finish()


class _Run:
    """One training run: its state and its files."""

    def __init__(self, config: TrainConfig, ranks: parallel.Ranks) -> None:
        for package in ("safetensors", "matplotlib"):  # a missing package is told before the training, not after it
            if find_spec(package) is None:
                raise ImportError(f"training needs {package}: pip install 'blt-kernels[train]'")
        self.config, self.ranks, self.out = config, ranks, Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        sources = data.find_sources(config.paths, config.include, left_out=self.out)
        self.train_sources, self.heldout_sources = data.split_sources(sources, config.heldout, config.seed)
        if not self.train_sources:
            raise ValueError(f"heldout: all of {len(sources)} files are held out at {config.heldout}")
        self.batches = data.PackedBatches(self.train_sources, config.batch_bytes, config.context, config.seed)
        torch.manual_seed(config.seed)
        self.model = build_model(config).train()
        self.called = parallel.distribute(self.model, ranks, config.parallel, config.shard_tables)
        _prepare_layers(self.model, config)
        self.optimizer = make_optimizer(self.model, config)
        self.step, self.seconds = 0, 0.0
        self.heldout_bits: float | None = None
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.log: Log | None = None
        checkpoint = state.latest(self.out / "checkpoint")
        if checkpoint is None and (self.out / "log.jsonl").exists():
            raise ValueError(f"out: {self.out} holds the log of a run but no checkpoint: choose another directory")
        ranks.barrier()  # all ranks have looked before one of them writes
        if checkpoint is not None:
            self._resume(checkpoint)
        self.patches = self._row_patches()
        if checkpoint is None:
            if ranks.rank == 0:
                listing = "".join(f"{source.path}\n" for source in self.heldout_sources)
                write_text(self.out / "heldout.txt", listing)
            self._save()
        self.log = Log(self.out, self.step, config.tensorboard) if ranks.rank == 0 else None

    def advance(self) -> float:
        """Take one step and return its loss in bits per byte."""
        config, ranks, started = self.config, self.ranks, time.perf_counter()
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        predicted, parts = max(self.batches.predicted(self.step), 1), ranks.world * config.accumulate
        bits = torch.zeros((), device=ranks.device)
        for part in range(ranks.rank, parts, ranks.world):
            batch = self.batches.rows(self.step, part, parts)
            tokens, rows = (t.to(ranks.device) for t in data.read_rows(batch))
            targets = next_byte_targets(tokens, rows)
            options = {} if self.patches is None else {"layout": self.patches.layout(batch)}
            with parallel.synchronised(self.called, last=part + ranks.world >= parts):
                with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.bf16):
                    nats = self.called(tokens, rows, targets=targets, **options)
                loss = mean_bits(nats, targets, predicted)
                (loss * ranks.world).backward()
            bits += loss.detach()
        parallel.clip_gradients(self.model, config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        (total,) = ranks.sum(bits.item())
        self.seconds += time.perf_counter() - started
        return total

    def record(self, bits: float, speed: float) -> None:
        """Measure, log and save, each at its steps."""
        config = self.config
        if not math.isfinite(bits):
            raise ValueError(f"learning_rate: the loss is {bits} at step {self.step}, after {config.learning_rate}")
        line: dict[str, Any] = {}
        if self.step % config.log_every == 0 or self.step == 1:
            line = {"bits_per_byte": bits, "learning_rate": learning_rate(config, self.step - 1)}
            line |= {"bytes_per_second": round(speed), "seconds": round(self.seconds, 2)}
        if self.heldout_sources and self.step % config.eval_every == 0:
            self.heldout_bits = self._measure(_first(self.heldout_sources, config.eval_bytes))[0]
            line["heldout_bits_per_byte"] = self.heldout_bits
        if line and self.log:
            self.log.write({"step": self.step, **line})
        late = self.ranks.first(time.monotonic() - self.saved_at >= config.checkpoint_seconds)
        if late or self.step - self.saved_step >= config.checkpoint_every:
            self._save()

    def finish(self) -> TrainResult:
        self._save()
        config, bits, size = self.config, None, 0
        if config.save_bf16:  # the measured weights are those that are saved
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.copy_(parameter.bfloat16())
        if self.heldout_sources:
            bits, size = self._measure(self.heldout_sources)
        changes = {}
        if isinstance(self.model, ByteLM):
            sample = _first(self.heldout_sources or self.train_sources, _THRESHOLD_BYTES)
            context = max(config.context, _THRESHOLD_CONTEXT)
            threshold = threshold_for_patch_size(self.model, sample, config.patch_size, config.batch_bytes, context)
            changes["threshold"] = threshold
        path, curve = self.out / "model.safetensors", self.out / "loss.png"
        if self.log:
            if bits is not None:
                line = {"step": self.step, "heldout_bits_per_byte": bits, "heldout_bytes": size, "final": True}
                self.log.write(line)
            self.log.close()
            model = self._whole_model()
            model.config = replace(model.config, **changes)
            model.save(path, torch.bfloat16 if config.save_bf16 else None)
            draw_curve(self.out / "log.jsonl", curve)
        self.ranks.barrier()
        return TrainResult(path, curve, bits, size)

    def _whole_model(self) -> ByteModel:
        """Return the model, or a copy with the weights of the checkpoint where its parameters may be sharded."""
        if self.ranks.world == 1:
            return self.model
        cls: Any = MODELS[self.config.model]
        model = cls(self.model.config, self.config.ops)  # the files of `build_model` may have changed
        checkpoint = state.latest(self.out / "checkpoint")
        assert checkpoint is not None  # there is always one
        state.load_weights(checkpoint, model)
        return model

    def _measure(self, sources: Sequence[data.Source]) -> tuple[float, int]:
        config = self.config
        size, context = config.batch_bytes, config.context
        return measure(self.model, sources, size, context, bf16=config.bf16, ranks=self.ranks, patches=self.patches)

    def _row_patches(self) -> RowPatches | None:
        config, model, stored = self.config, self.model, None
        if not isinstance(model, BLT):
            return None
        if config.patches is not None:
            stored = StoredPatches(config.patches)
            made_with = provenance(model, config.context, config.bf16)
            stored.check(made_with, [*self.train_sources, *self.heldout_sources])
        return RowPatches(model, config.context, config.bf16, stored)

    def _options(self) -> dict[str, Any]:
        options = {name: value for name, value in asdict(self.config).items() if name not in _FREE}
        options["preset"] = self.config.preset or "small"
        options["files"] = [source.digest for source in self.train_sources]
        return json.loads(json.dumps(options, default=str))

    def _save(self) -> None:
        if self.log:  # the lines of the steps before a checkpoint are not written again
            self.log.sync()
        values = {
            "options": self._options(),
            "config": asdict(self.model.config),
            "step": self.step,
            "seconds": self.seconds,
            "heldout_bits": self.heldout_bits,
        }
        keep = self.config.keep
        state.save(self.out / "checkpoint", self.step, self.model, self.optimizer, values, self.ranks, keep)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _resume(self, checkpoint: Path) -> None:
        values, options = state.read_values(checkpoint), self._options()
        stored = {**_defaults(), **values["options"]}  # an older version may have had fewer options
        if unknown := sorted(stored.keys() - options.keys() - set(_FREE)):
            version = f"by another version of blt-kernels, with the option {unknown[0]}"
            raise ValueError(f"out: {self.out} holds a run {version}: choose another directory")
        other = [name for name in options if name != "steps" and stored.get(name) != options[name]]
        if other:
            shown = ", ".join(name if name == "files" else f"{name}={shortened(stored.get(name))}" for name in other)
            raise ValueError(f"out: {self.out} holds a run with other options ({shown}): choose another directory")
        if options["steps"] < stored["steps"]:
            raise ValueError(f"steps: expected at least {stored['steps']}, as {self.out} has, got {options['steps']}")
        self._check_files(values["config"])
        patcher = self._patcher_digest()
        state.load(checkpoint, self.model, self.optimizer, self.ranks)
        if patcher != self._patcher_digest():
            raise self._changed("patcher" if self.config.patcher or not self.config.init else "init", "other weights")
        self.step, self.seconds, self.heldout_bits = values["step"], values["seconds"], values["heldout_bits"]
        self.saved_step = self.step
        if self.ranks.rank == 0:
            if not os.access(checkpoint.parent, os.W_OK | os.X_OK):  # told before the steps to the next checkpoint
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(checkpoint.parent))
            # `keep` may have become smaller.
            state.prune(checkpoint.parent, self.config.keep)

    def _check_files(self, began_with: dict[str, Any]) -> None:
        """Raise ValueError unless the files that options name give the configuration that the run began with."""
        try:  # an older version may have had fewer fields
            began_with = asdict(config_from_dict(type(self.model.config), began_with))
        except (TypeError, ValueError) as error:
            raise ValueError(f"out: {self.out} holds a model of another version of blt-kernels: {error}") from error
        old, new = (_flat(json.loads(json.dumps(values))) for values in (began_with, asdict(self.model.config)))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if not names:
            return
        config, tops = self.config, {name.partition(".")[0] for name in names}
        if tops <= {"patcher", "threshold"} and (config.patcher or not config.init):
            option = "patcher"
        else:
            option = "init" if config.init else "init_global" if config.init_global else "preset"
        shown = (f"{name}: expected {shortened(old.get(name))}, got {new.get(name)!r}" for name in names)
        raise self._changed(option, "; ".join(shown))

    def _changed(self, option: str, what: str) -> ValueError:
        """Return the error that a file has changed."""
        name = getattr(self.config, option) or ("the bundled one" if option == "patcher" else "small")
        began = f"has changed since the run in {self.out} began"
        return ValueError(f"{option}: {name} {began} ({what}): bring it back, or choose another directory")

    def _patcher_digest(self) -> str | None:
        patcher = getattr(self.model, "patcher", None)
        return patcher and model_digest(patcher)


def _defaults() -> dict[str, Any]:
    """Return the options that have defaults, as JSON, without those that a resumed run may change."""
    found = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}
    return json.loads(json.dumps({name: value for name, value in found.items() if name not in _FREE}, default=str))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of a configuration and of those in it, by names such as ``encoder.dim``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _prepare_layers(model: ByteModel, config: TrainConfig) -> None:
    """Set the layers to compute their activations again, and compile them.

    They are compiled one by one: between them, in eager code, layouts are trimmed to their patches on the CPU. Layers
    of one shape share their code, which is compiled once with gradients and once without.
    """
    if config.compile:  # the layers have more shapes than dynamo allows by default
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for layer in model.modules():
        if isinstance(layer, (CrossAttention, TransformerLayer)):
            layer.recompute = config.checkpoint_activations
        trained = isinstance(layer, TransformerLayer) and all(p.requires_grad for p in layer.parameters())
        if trained and config.compile:  # `forward` alone: FSDP2's hooks around it would break the graph
            layer.forward = torch.compile(layer.forward, dynamic=True)


def _first(sources: Sequence[data.Source], limit: int) -> list[data.Source]:
    """Return the first files up to `limit` bytes in all, at least one. The order by digest makes a fair sample."""
    ends = accumulate(source.size for source in sources)
    return [source for source, end in zip(sources, ends, strict=True) if end <= limit] or [sources[0]]
