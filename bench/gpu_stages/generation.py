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
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteModel, MegaByte, MegaByteConfig
from blt_kernels.nn import TransformerConfig
from gpu_stages import Case
from gpu_stages.target import Target

TEXT = b"def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n"
NAN = float("nan")


def generation_cases(target: Target) -> list[Case]:
    """Return each model with one row and with eight."""
    models = tiny_models() if target.rehearsal else small_models()
    sizes = (2,) if target.rehearsal else (1, 8)
    found = [Case(f"{n} rows {r}", partial(generate, name=n, make=m, rows=r)) for r in sizes for n, m in models.items()]
    return [case for case in found if target.wants(case.name)]


Models = dict[str, Callable[[], ByteModel]]


def small_models() -> Models:
    return {
        "ByteLM": ByteLM.bundled,
        "BLT": lambda: BLT(BLTConfig.small()),
        "MegaByte": lambda: MegaByte(MegaByteConfig.small()),
    }


def tiny_models() -> Models:
    layers = TransformerConfig(16, 1, 1, ffn_dim=16, window=8)
    return {
        "BLT": lambda: BLT(BLTConfig(layers, layers, layers, None, patching="space", ngram_vocab=16)),
        "MegaByte": lambda: MegaByte(MegaByteConfig(2, layers, layers)),
    }


def generate(target: Target, name: str, make: Callable[[], ByteModel], rows: int) -> Iterator[Row]:
    """Compare the logits of steps with those of one forward, then time steps and count what they wait for."""
    torch.manual_seed(0)
    model, steps = make().eval().to(target.device), 2 if target.rehearsal else 32
    prompt = to_ids(TEXT[:12] if target.rehearsal else TEXT * 8, device=target.device)
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
