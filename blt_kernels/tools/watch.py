"""``blt-kernels train`` and ``blt-kernels eval``: a live bar while they run, and what they found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blt_kernels.tools import evaluate, train
from blt_kernels.tools.render import Color, console
from blt_kernels.tools.train_parallel import is_first

_PLAIN_EVERY = 100  # steps between lines where there is no terminal to draw a bar on


def run_train(config: train.TrainConfig, color: Color = Color.auto) -> None:
    """Train with a bar of bits per byte and bytes per second on stderr, then say where things are.

    Of several ranks, the first one talks.
    """
    if not is_first():
        train.train(config)
        return
    shown = console(color, stderr=True)
    smooth = None

    with _bar(f"train {config.model}", config.steps, color) as advance:

        def report(now: train.Progress) -> None:
            nonlocal smooth
            share = max(0.05, 1 / now.step)
            smooth = now.bits_per_byte if smooth is None else (1 - share) * smooth + share * now.bits_per_byte
            text = f"{smooth:.3f} bits/byte, {now.bytes_per_second:,.0f} bytes/s"
            if now.heldout_bits is not None:
                text += f", held out {now.heldout_bits:.3f}"
            advance(now.step, text)
            if not shown.is_terminal and (now.step % _PLAIN_EVERY == 0 or now.step == now.steps):
                shown.print(f"step {now.step}/{now.steps}: {text}")

        result = train.train(config, report)
    out = console(color)
    if result.heldout_bits is not None:
        out.print(f"held out: {result.heldout_bits:.4f} bits per byte over {result.heldout_bytes:,} bytes")
    out.print(f"model: {result.model}", soft_wrap=True)
    out.print(f"loss curve: {result.curve}", soft_wrap=True)


def run_eval(config: evaluate.EvalConfig, *, as_json: bool, color: Color = Color.auto) -> None:
    """Evaluate with a bar on stderr, then print the result, as JSON if asked for."""
    with _bar("eval", None, color) as advance:
        result = evaluate.evaluate(config, lambda done, total, bits: advance(done, f"{bits:.3f} bits/byte", total))
    out = console(color)
    if as_json:
        out.print(json.dumps(asdict(result)), soft_wrap=True)
        return
    size = f"{result.num_bytes:,} bytes in {result.num_files:,} files"
    out.print(f"{result.bits_per_byte:.4f} bits per byte over {size}")
    if result.ngram_bits_per_byte is not None:
        out.print(f"{result.ngram_bits_per_byte:.4f} bits per byte with the order-3 n-gram model")


@contextmanager
def _bar(title: str, total: int | None, color: Color) -> Iterator[Callable[..., None]]:
    """A bar on a terminal's stderr; yields ``advance(completed, text, total=None)``."""
    shown = console(color, stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeRemainingColumn(), console=shown, disable=not shown.is_terminal) as bar:
        task = bar.add_task(title, total=total, text="")

        def advance(completed: int, text: str, total: int | None = total) -> None:
            bar.update(task, completed=completed, total=total, text=text)

        yield advance
