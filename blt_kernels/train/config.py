"""The options of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blt_kernels.train import checks, data


@dataclass(frozen=True)
class TrainConfig:
    """The options that a run depends on.

    `model` is "entropy", "blt" or "megabyte". `preset` is "small", as for None, or "paper"; `overrides` replaces fields
    of that configuration. `batch_bytes` ids make a step, in pieces of at most `context`. A share `heldout` of the files
    is never trained on; at most `eval_bytes` of them are measured every `eval_every` steps, all of them at the end.
    `patcher` is the entropy model of a BLT with entropy patching; if None, that of `init`, or the bundled one.
    `out` is left out where it lies inside of `paths`. A checkpoint is written every `checkpoint_every` steps, and no
    later than `checkpoint_seconds` after the last. `bf16` is autocast: faster on CPUs with AMX, and on GPUs.
    `save_bf16` halves the size of the final model. An entropy model is saved with the threshold that makes patches of
    `patch_size` bytes on held-out files, or on those of the training if none is held out.

    `accumulate` micro-batches of a rank make its share of a step. `checkpoint_activations` computes every layer twice
    to keep only its input, with the same numbers. `compile` compiles the layers, once for all lengths. On several
    ranks, `parallel` is "ddp" or "fsdp", and `shard_tables` shares out the rows of a BLT's hash tables with "ddp" too.

    `init_global` is a Llama checkpoint, see `blt_kernels.models.checkpoint.llama`: the global transformer of a BLT gets
    its shape, unless `overrides` has one, and begins with its weights. `global_learning_rate` is the `learning_rate` of
    that transformer's layers, with the same course. `tensorboard` asks for events, or for none; None wants them if it
    is installed.

    `init` is a model of that kind, as `blt_kernels.models.load_model` reads it, that the run begins as: it has the
    configuration and the weights, and a BLT its patcher, unless `patcher` is another one. `preset` and `overrides` may
    then only repeat what the model has.

    The learning rate rises for `warmup` steps and falls along a cosine until the last of `steps`. A run may go on with
    more `steps`: from there on it has the learning rate that a run of that length has at the same step. `keep` is how
    many checkpoints, the newest ones, stay.

    `patches` is a folder of stored patches (see `blt_kernels.train.stored_patches`): a BLT that patches as they were
    made reads them instead of running its entropy model, and on the CPU ends in bitwise the same weights.
    """

    model: str
    paths: Sequence[Path]
    out: Path
    preset: str | None = None
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
    accumulate: int = 1
    checkpoint_activations: bool = False
    compile: bool = False
    parallel: str = "ddp"
    shard_tables: bool = False
    init_global: Path | None = None
    global_learning_rate: float | None = None
    tensorboard: bool | None = None
    patches: Path | None = None
    init: Path | None = None
    keep: int = 1

    def __post_init__(self) -> None:
        if self.model not in ("entropy", "blt", "megabyte"):
            raise ValueError(f"model: expected 'entropy', 'blt' or 'megabyte', got {self.model!r}")
        if self.preset not in (None, "small", "paper"):
            raise ValueError(f"preset: expected 'small' or 'paper', got {self.preset!r}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel: expected 'ddp' or 'fsdp', got {self.parallel!r}")
        for name in ("init_global", "patches", "patcher"):
            if self.model != "blt" and getattr(self, name) is not None:
                raise ValueError(f"{name}: expected None, since model is {self.model!r}, got {getattr(self, name)}")
        if self.init is not None and self.init_global is not None:
            raise ValueError(f"init_global: expected None beside init, got {self.init_global}")
        if self.model == "entropy" and self.global_learning_rate is not None:
            got = self.global_learning_rate
            raise ValueError(f"global_learning_rate: expected None, since model is 'entropy', got {got}")
        for name in ("batch_bytes", "context"):
            checks.check_count(name, getattr(self, name), 2)
        for name in ("steps", "eval_every", "eval_bytes", "checkpoint_every", "log_every", "accumulate", "keep"):
            checks.check_count(name, getattr(self, name), 1)
        for name in ("warmup", "seed"):
            checks.check_count(name, getattr(self, name), 0)
        checks.check_finite("learning_rate", self.learning_rate, 0, exclusive=True)
        checks.check_finite("final_learning_rate", self.final_learning_rate, 0)
        if self.global_learning_rate is not None:
            checks.check_finite("global_learning_rate", self.global_learning_rate, 0, exclusive=True)
        checks.check_finite("checkpoint_seconds", self.checkpoint_seconds, 0)
        checks.check_finite("patch_size", self.patch_size, 1)
        data.check_heldout(self.heldout)
        checks.check_device(self.device)
        if self.shard_tables and self.model != "blt":
            raise ValueError(f"shard_tables: expected False, since model is {self.model!r}, got True")
