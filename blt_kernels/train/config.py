"""Defines the options of training and of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from blt_kernels._checks import check_choice
from blt_kernels.train import checks

_ONLY_FOR = {  # each option is for these models
    **dict.fromkeys(("init_global", "patches", "patcher", "shard_tables"), ("blt",)),
    "global_learning_rate": ("blt", "megabyte"),
}


@dataclass(frozen=True)
class TrainConfig:
    """The options that a run depends on. Those of the command line are described beside the fields.

    `overrides` replaces fields of the configuration that `preset` names. `batch_bytes` ids make a step, in pieces of at
    most `context`. `out` is left out where it lies inside of `paths`. `bf16` is autocast. An entropy model is saved
    with the threshold that makes patches of `patch_size` bytes on held-out files, or on those of the training if none
    is held out.

    `checkpoint_activations` and `compile` give the same numbers, up to rounding. `init_global` is read as
    `blt_kernels.models.checkpoint.llama` says: the global transformer gets its shape, unless `overrides` has one.
    `init` is read by `blt_kernels.models.load_model`: `preset` and `overrides` may then only repeat what it has.

    `patches` is a folder of stored patches (see `blt_kernels.train.stored_patches`): a BLT that patches as they were
    made reads them instead of running its entropy model, and on the CPU ends in bitwise the same weights.
    """

    model: Annotated[str, Doc("entropy, blt or megabyte.")]
    paths: Annotated[Sequence[Path], Doc("Files and directories to learn.")]
    out: Path
    preset: Annotated[str | None, Doc("Size of the model: small or paper; small if not given.")] = None
    overrides: dict[str, Any] = field(default_factory=dict)
    patcher: Annotated[Path | None, Doc("Entropy model of a BLT; if not given, that of --init or in the package.")] = (
        None
    )
    include: Annotated[Sequence[str], Doc("Names to take from directories.")] = ("*",)
    heldout: Annotated[
        float, Doc("Fraction of the files to keep for measuring. Each file is drawn by itself; few may give none.")
    ] = 0.05
    seed: Annotated[int, Doc("Seed of the split, the order of the data and the first weights.")] = 0
    steps: Annotated[
        int, Doc("Steps in all. A run may go on with more, at the learning rates of a run of that length.")
    ] = 3000
    batch_bytes: Annotated[int, Doc("Bytes in a step.")] = 4096
    context: Annotated[int, Doc("The most bytes of a file in one piece.")] = 2048
    learning_rate: Annotated[float, Doc("Learning rate after the warm-up, from which it falls along a cosine.")] = 3e-3
    final_learning_rate: Annotated[float, Doc("Learning rate at the last step.")] = 3e-5
    warmup: Annotated[int, Doc("Steps in which the learning rate rises.")] = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    bf16: Annotated[bool, Doc("Train in bf16: faster on GPUs, and on CPUs with AMX.")] = False
    save_bf16: Annotated[bool, Doc("Save in bf16: half the size.")] = False
    patch_size: Annotated[
        float, Doc("Mean bytes of a patch, for which the threshold of an entropy model is chosen.")
    ] = 4.5
    ops: str = "fused"
    accumulate: Annotated[int, Doc("Micro-batches in a rank's share of a step.")] = 1
    checkpoint_activations: Annotated[
        bool | None,
        Doc("Keep only the inputs of layers; backward computes the layers again. If not given, for long batches."),
    ] = None
    compile: Annotated[bool, Doc("Compile the layers with torch.compile.")] = False
    parallel: Annotated[str, Doc("How the ranks of torchrun share the work: ddp or fsdp.")] = "ddp"
    shard_tables: Annotated[bool, Doc("Shard a BLT's hash tables by rows over the ranks; fsdp always does.")] = False
    init: Annotated[
        Path | None,
        Doc(
            "Model to begin as, with its configuration: a run, a safetensors file, or a directory of transformers or "
            "facebookresearch/blt. Optimiser and learning rate begin anew."
        ),
    ] = None
    init_global: Annotated[Path | None, Doc("Llama that the global transformer of a BLT begins as.")] = None
    global_learning_rate: Annotated[
        float | None, Doc("Learning rate of the global transformer's layers; that of the others if not given.")
    ] = None
    device: Annotated[str, Doc("cpu or cuda.")] = "cpu"
    eval_every: Annotated[int, Doc("Steps between measurements on held-out files.")] = 500
    eval_bytes: Annotated[int, Doc("The most bytes of a measurement; the last one takes all.")] = 1 << 18
    checkpoint_every: Annotated[int, Doc("Steps between checkpoints.")] = 200
    checkpoint_seconds: Annotated[float, Doc("The most seconds between checkpoints.")] = 60.0
    log_every: int = 10
    patches: Annotated[Path | None, Doc("For a BLT: patches that patch --save stored, read in place of patching.")] = (
        None
    )
    keep: Annotated[int, Doc("How many checkpoints to keep, the newest ones.")] = 1
    tensorboard: Annotated[
        bool | None, Doc("Write TensorBoard events; if not given, they are written where it is installed.")
    ] = None

    def __post_init__(self) -> None:
        check_choice("model", self.model, ("entropy", "blt", "megabyte"))
        check_choice("preset", self.preset or "small", ("small", "paper"))
        check_choice("parallel", self.parallel, ("ddp", "fsdp"))
        for name, models in _ONLY_FOR.items():
            value = getattr(self, name)
            if self.model not in models and value is not None and value is not False:
                expected = False if value is True else None
                raise ValueError(f"{name}: expected {expected}, since model is {self.model!r}, got {value}")
        if self.init is not None and self.init_global is not None:
            raise ValueError(f"init_global: expected None beside init, got {self.init_global}")
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
        checks.check_fraction("heldout", self.heldout)
        checks.check_device(self.device)


@dataclass(frozen=True)
class EvalConfig:
    """A model, the files to measure it on, and how.

    `split` is "all", or one side of the split that training with the same `heldout`, `seed`, `include` and paths makes.
    """

    checkpoint: Annotated[Path, Doc("A run, the model.safetensors of one, or the directory of a checkpoint.")]
    paths: Annotated[Sequence[Path], Doc("Files and directories to measure on.")]
    include: Annotated[Sequence[str], Doc("Names to take from directories.")] = ("*",)
    split: Annotated[str, Doc("all, or heldout or train: one side of what `train` makes of these paths.")] = "all"
    heldout: Annotated[float, Doc("Fraction that was held out in training.")] = 0.05
    seed: Annotated[int, Doc("Seed of the training.")] = 0
    batch_bytes: Annotated[int, Doc("Bytes at a time.")] = 16384
    context: Annotated[int, Doc("The most bytes of a file in one piece.")] = 2048
    ngram: Annotated[bool, Doc("With --split heldout: an order-3 n-gram model of the other side too.")] = False
    bf16: Annotated[bool, Doc("Measure in bf16.")] = False
    strided: Annotated[bool, Doc("MegaByte's strided inference: two passes.")] = False
    ops: str = "fused"
    device: Annotated[str, Doc("cpu or cuda.")] = "cpu"

    def __post_init__(self) -> None:
        check_choice("split", self.split, ("all", "heldout", "train"))
        if self.ngram and self.split != "heldout":
            raise ValueError(f"ngram: expected split='heldout', since it trains on the other side, got {self.split!r}")
        for name in ("batch_bytes", "context"):
            checks.check_count(name, getattr(self, name), 2)
        checks.check_fraction("heldout", self.heldout)
        checks.check_device(self.device)
