"""Generation: does a state on the GPU give what whole forwards give, what does a byte take, how often does it wait?"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from timing import OURS, Row, failed_row
from torch import Tensor

from blt_kernels.ids import to_ids
from blt_kernels.models import BLT, BLTConfig, ByteLM, MegaByte, MegaByteConfig
from blt_kernels.models.base import ByteModel
from gpu_stages import Case
from gpu_stages.target import Target

TEXT = b"def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n"
NAN = float("nan")


def generation_cases(target: Target) -> list[Case]:
    """Return each model with one row and with eight."""
    sizes = (1, 2) if target.rehearsal else (1, 8)
    names = ("ByteLM", "BLT", "MegaByte")
    found = [Case(f"{n} rows {r}", partial(generate, name=n, rows=r)) for r in sizes for n in names]
    return [case for case in found if target.wants(case.name)]


def build(name: str, device: str) -> ByteModel:
    """Return the model of the package, or a small one with random weights."""
    torch.manual_seed(0)
    if name == "ByteLM":
        return ByteLM.bundled(device=device).eval()
    model: ByteModel = BLT(BLTConfig.small()) if name == "BLT" else MegaByte(MegaByteConfig.small())
    return model.eval().to(device)


def generate(target: Target, name: str, rows: int) -> Iterator[Row]:
    """Compare the logits of steps with those of one forward, then time steps and count what they wait for."""
    model, steps = build(name, target.device), 4 if target.rehearsal else 32
    prompt = to_ids(TEXT * (1 if target.rehearsal else 8), device=target.device)
    state = model.new_state(rows)
    prompts = prompt.repeat(rows, 1)
    logits = [model.extend(prompts, state=state)[:, -1]]
    new: list[Tensor] = []

    def step() -> None:
        new.append(logits[-1].argmax(-1, keepdim=True))
        logits.append(model.extend(new[-1], state=state)[:, -1])

    for _ in range(steps):
        step()
    with torch.no_grad():
        whole = model(torch.cat([prompts, *new], 1))[:, prompt.shape[0] - 1 :]
    torch.testing.assert_close(torch.stack(logits, 1), whole, atol=2e-3, rtol=2e-3)

    waits = count_waits(target, step)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    logits[-1].sum().item()  # wait for all of them
    ms = (time.perf_counter() - begin) / steps * 1e3
    shape = f"[{rows}], a step behind {prompt.shape[0]} bytes"
    yield Row(f"generate {name}", shape, "float32", 1, OURS, ms, None, NAN, NAN, None, None, steps)
    yield failed_row(f"generate {name} waits", shape, "", OURS, f"ok: {waits} times a step for the device")


def count_waits(target: Target, step: Callable[[], None]) -> int:
    """Return how often a step of the model waits for the device."""
    if target.rehearsal:
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in found)
