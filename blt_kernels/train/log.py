"""Writes what people read of a run: JSON lines, TensorBoard events, and the curve of its losses."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blt_kernels._files import LIST_BYTES, naming, parse_json, read_bytes, whole_file, write_text


class Log:
    """Writes ``log.jsonl``, and the same numbers as TensorBoard events in ``tensorboard``.

    Parameters
    ----------
    out : Path
        Directory of the run.
    step : int
        Lines of later steps are dropped, and so is a line that a kill cut short.
    tensorboard : bool, optional
        None writes events if TensorBoard is installed.

    Raises
    ------
    ImportError
        TensorBoard is asked for and not installed.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool | None) -> None:
        self.path, self.writer = out / "log.jsonl", None
        installed = find_spec("tensorboard") is not None
        if tensorboard and not installed:
            raise ImportError("tensorboard: it is not installed: pip install 'blt-kernels[train]'")
        kept = [line for line in read_log(self.path) if line["step"] <= step and "final" not in line]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if installed and tensorboard is not False:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line: a step and what was measured at it."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.writer is not None:
            prefix = "final/" if "final" in line else ""
            with naming(Path(self.writer.get_logdir())):
                for name, value in line.items():
                    if name not in ("step", "final"):
                        self.writer.add_scalar(prefix + name, value, line["step"])
                self.writer.flush()

    def sync(self) -> None:
        """Put the lines on the disk."""
        with naming(self.path), self.path.open("a") as file:
            os.fsync(file)

    def close(self) -> None:
        """Finish the TensorBoard events."""
        if self.writer is not None:
            with naming(Path(self.writer.get_logdir())):
                self.writer.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a log, none if there is no file; ValueError if a line is damaged."""
    text = read_bytes(path, LIST_BYTES).decode(errors="replace") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    return [_entry(path, number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _entry(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise ValueError(f"{path}: expected a JSON object with a step in line {number}, got {line.strip()[:80]!r}")
    if not all(map(_is_value, entry.values())):
        raise ValueError(f"{path}: expected numbers in line {number}, got {line.strip()[:80]!r}")
    return entry


def _is_value(value: object) -> bool:
    """Return whether a value can be drawn: a truth value, or a number that is one of 64 bits."""
    return isinstance(value, float) or (isinstance(value, int) and -(1 << 63) <= value < 1 << 63)


def draw_curve(log: Path, path: Path) -> None:
    """Draw the losses in a log as a PNG: those of training, also smoothed, and those on held-out files."""
    from matplotlib.figure import Figure

    lines = read_log(log)

    def points(name: str, final: bool = False) -> tuple[list[int], list[float]]:
        found = [line for line in lines if name in line and ("final" in line) == final]
        return [line["step"] for line in found], [line[name] for line in found]

    steps, losses = points("bits_per_byte")
    held, final = points("heldout_bits_per_byte"), points("heldout_bits_per_byte", final=True)
    smooth: list[float] = []
    for loss in losses:
        share = max(0.1, 2 / (len(smooth) + 2))  # the average gets wider with the steps
        smooth.append(loss if not smooth else smooth[-1] + share * (loss - smooth[-1]))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, smooth, color="C0", label="training")
    if held[0]:
        axes.plot(*held, "o-", color="C1", markersize=4, label="held out, a sample")
    for step, bits in zip(*final, strict=True):
        axes.plot(step, bits, "*", color="C3", markersize=10, label=f"held out, all: {bits:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, min(8.5, max([1.0, *losses]))))
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as part:
        figure.savefig(part, dpi=150, format="png")
