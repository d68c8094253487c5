"""The training of one run. It may be killed at any moment and goes on from its last checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blt_kernels._files import whole_file
from blt_kernels.models.base import ByteModel
from blt_kernels.nn import next_byte_bits, next_byte_targets
from blt_kernels.train import data
from blt_kernels.train.config import TrainConfig
from blt_kernels.train.optimizer import learning_rate, make_optimizer
from blt_kernels.train.parallel import clip_gradients
from study.patching import Patching
from study.readers import Reader

CHECKPOINT_SECONDS = 60.0
CURVE_POINTS = 100

WatchOne = Callable[[float, str], None]  # is called with the share of the run that is done, and a text


@dataclass(frozen=True)
class Trained:
    """Holds what a run ends as.

    `curve` has the training loss in bits per byte, means over a hundredth of the run each. `seconds` are process time.
    """

    weights: dict[str, Tensor]
    trained_bytes: int
    seconds: float
    curve: list[float]


def train(
    model: ByteModel,
    batches: data.PackedBatches,
    reader: Reader,
    patching: Patching | None,
    config: TrainConfig,
    watch: WatchOne,
) -> Trained:
    """Train `config.steps` steps, or those that are left of them."""
    optimizer = make_optimizer(model.train(), config)
    path = config.out / "checkpoint.pt"
    values: dict[str, Any] = {"step": 0, "bytes": 0, "seconds": 0.0, "bits": []}
    if path.exists():
        stored = torch.load(path, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        values = stored["values"]
    saved, started = time.monotonic(), time.process_time()
    for step in range(values["step"], config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step) * group["scale"]
        rows = batches.rows(step)
        ids, offsets, num_bytes = reader.read(rows)
        options = {} if patching is None else {"layout": patching.of_rows(rows, offsets)}
        loss = next_byte_bits(model(ids, offsets, **options), next_byte_targets(ids, offsets), max(num_bytes, 1))
        loss.backward()
        clip_gradients(model, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        bits = loss.item()
        if not math.isfinite(bits):
            raise ValueError(f"learning_rate: the loss is {bits} at step {step}, at {config.learning_rate}")
        values["bits"].append(bits)
        values |= {"step": step + 1, "bytes": values["bytes"] + num_bytes}
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            values["seconds"] += time.process_time() - started
            _save(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "values": values})
            saved, started = time.monotonic(), time.process_time()
        if step % 10 == 9:
            watch(values["step"] / config.steps, f"{sum(values['bits'][-100:]) / len(values['bits'][-100:]):.2f} bits")
    seconds = values["seconds"] + time.process_time() - started
    return Trained(model.state_dict(), values["bytes"], seconds, _curve(values["bits"]))


def _save(path: Path, state: dict[str, Any]) -> None:
    with whole_file(path) as part:
        torch.save(state, part)


def _curve(bits: list[float]) -> list[float]:
    """Return the means over `CURVE_POINTS` equal parts."""
    parts = min(CURVE_POINTS, len(bits))
    bounds = [len(bits) * i // parts for i in range(parts + 1)]
    return [sum(bits[a:b]) / (b - a) for a, b in pairwise(bounds)]
