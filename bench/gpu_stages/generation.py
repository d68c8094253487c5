"""Generation: does a state on the GPU give what whole forwards give, what does a byte take, how often does it wait?

The same is asked of the captured graphs of `blt_kernels.models.captured`, which `generate` replays on CUDA.
"""

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
from blt_kernels.models.generate import STEPS
from blt_kernels.models.sampling import Sampling
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

    shape = f"[{rows}], a step behind {prompt.shape[0]} bytes"
    yield from time_steps(target, f"generate {name}", shape, step, steps, lambda: logits[-1].sum().item())
    yield from generate_captured(target, name, model, prompts, torch.cat(new[:steps], 1), shape)


def generate_captured(
    target: Target, name: str, model: ByteModel, prompts: Tensor, expected: Tensor, shape: str
) -> Iterator[Row]:
    """Compare the ids of captured steps with `expected` ``[rows, steps]``, then time such steps and count waits."""
    rows, steps = expected.shape
    state = model.new_state(rows, undo=0)
    first = model.extend(prompts, state=state)[:, -1].argmax(-1)
    captured = STEPS[type(state)](state, Sampling())
    captured.start(first.tolist())
    going, numbers = [True] * rows, [0.0] * rows
    written = [first.tolist(), *(captured.step(going, numbers) for _ in range(steps - 1))]
    same = (expected == torch.tensor(written, device=target.device).T).all(0).int().cumprod(0).sum().item()
    text = f"ok: {same} of {steps} ids are those of the other path"  # rounding may decide between two equal bytes
    yield failed_row(f"generate {name} captured ids", shape, "", OURS, text if same else "other ids from the first on")
    step = partial(captured.step, going, numbers)
    yield from time_steps(target, f"generate {name} captured", shape, step, steps, lambda: None)


def time_steps(
    target: Target, name: str, shape: str, step: Callable[[], object], steps: int, wait: Callable[[], object]
) -> Iterator[Row]:
    """Time steps, and count how often one waits for the device. `wait` waits for all of them."""
    waits = count_waits(target, step)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    ms = (time.perf_counter() - begin) / steps * 1e3
    yield Row(name, shape, "float32", 1, OURS, ms, None, NAN, NAN, None, None, steps)
    yield failed_row(f"{name} waits", shape, "", OURS, f"ok: {waits} times a step for the device")


def count_waits(target: Target, step: Callable[[], object]) -> int:
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
