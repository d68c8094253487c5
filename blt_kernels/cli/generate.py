"""``blt-kernels generate`` writes bytes behind prompts, with any of the models."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.markup import escape
from typing_extensions import Doc

from blt_kernels.cli.base import ColorOption, Command, JsonOption, app
from blt_kernels.cli.console import Color, console
from blt_kernels.cli.options import build, options_of
from blt_kernels.models import ByteLM, load_model
from blt_kernels.models.base import ByteModel
from blt_kernels.models.generate import Generated, Generation, Stream
from blt_kernels.train import checks

KINDS = ("decoder", "patcher", "prompt")


@dataclass(frozen=True)
class GenerateOptions:
    """Holds what to generate from. The fields after `model` and `prompt` are arguments of `ByteModel.generate`."""

    model: Annotated[
        Path | None, Doc("Model: a safetensors file or a directory; the entropy model in the package if not given.")
    ] = None
    prompt: Annotated[
        Sequence[str], Doc("Text, the name of a file, or - for standard input. Several are written behind as a batch.")
    ] = ()
    max_new_bytes: Annotated[int, Doc("Bytes that are written at most.")] = 256
    temperature: Annotated[float, Doc("0 takes the most probable byte.")] = 0.0
    top_k: Annotated[int | None, Doc("Choose among the K most probable bytes.")] = None
    top_p: Annotated[float | None, Doc("Choose among the most probable bytes of this probability together.")] = None
    min_p: Annotated[float | None, Doc("Leave out bytes below this fraction of the highest probability.")] = None
    seed: Annotated[int, Doc("Seed of the random numbers.")] = 0
    stop: Annotated[Sequence[str], Doc("End behind this text. May be given several times.")] = ()
    draft: Annotated[
        str | None, Doc("Who drafts the next bytes: decoder, patcher, prompt, or the path of a ByteLM.")
    ] = None
    draft_bytes: Annotated[int, Doc("Bytes of a draft at most.")] = 8
    weights: Annotated[str | None, Doc("Store the matrices in bf16 or int8, which are read faster.")] = None
    device: Annotated[str, Doc("cpu or cuda.")] = "cpu"


@app.command(cls=Command)
@options_of(GenerateOptions, model="PATH", prompt="TEXT|FILE|-", draft="KIND|PATH")
def generate(options: dict[str, Any], json: JsonOption = False, color: ColorOption = Color.auto) -> None:
    """Write bytes behind a prompt, as they come. Speed, and what was accepted of drafts, is told on stderr."""
    run(build(GenerateOptions, options), as_json=json, color=color)


def run(options: GenerateOptions, *, as_json: bool, color: Color) -> None:
    """Generate, and print what was written: one row as it comes, several at the end.

    Raises
    ------
    OSError, ValueError
        A model or a prompt cannot be read, or an argument of `ByteModel.generate` is wrong.
    """
    checks.check_device(options.device)
    model = _load("model", options.model, options.device)
    draft: Any = options.draft
    if draft is not None and draft not in KINDS:
        draft = _load("draft", Path(draft), options.device)
    values = asdict(options) | {"draft": draft}
    for name in ("model", "prompt", "device"):
        values.pop(name)
    generation = Generation(model, [_read(prompt) for prompt in options.prompt] or [b""], **values)
    try:
        if as_json or len(generation.prompts) > 1:
            for _ in generation:
                pass
        else:
            _print_as_it_comes(generation)
    except KeyboardInterrupt:
        reasons = generation.result.reasons
        reasons[:] = ["interruption" if generation.goes_on(row) else reason for row, reason in enumerate(reasons)]
        raise
    finally:  # an interruption tells what there is, too
        if as_json:
            console(color).print(json_format.dumps(_as_json(generation.result)), soft_wrap=True, markup=False)
        else:
            if len(generation.prompts) > 1:
                for prompt, text in zip(options.prompt, generation.result.text, strict=True):
                    console(color).print(f"[bold]{escape(prompt)}[/]\n{escape(text)}\n", soft_wrap=True)
            _print_statistics(generation.result, color)


def _load(name: str, path: Path | None, device: str) -> ByteModel:
    if path is None:
        return ByteLM.bundled(device=device).eval()
    with checks.reading(name):
        return load_model(path, dtype=torch.float32, device=device).eval()


def _read(prompt: str) -> bytes:
    if prompt == "-":
        if sys.stdin is None:
            raise ValueError("--prompt -: expected an open standard input")
        return sys.stdin.buffer.read()
    path = Path(prompt)
    try:
        found = path.is_file()
    except (OSError, ValueError):  # no file can have this name
        found = False
    return path.read_bytes() if found else prompt.encode(errors="surrogateescape")


def _print_as_it_comes(generation: Generation) -> None:
    """Write raw bytes, but only whole characters to a terminal."""
    text, out = sys.stdout.isatty(), sys.stdout.buffer
    for part in Stream(generation, text):
        out.write(part.encode() if text else part)
        out.flush()
    if text:
        out.write(b"\n")
        out.flush()


def _print_statistics(result: Generated, color: Color) -> None:
    statistics, out = result.statistics, console(color, stderr=True)
    if not statistics.bytes:
        return
    passes = ", ".join(f"{part} {count:,}" for part, count in sorted(statistics.passes.items()))
    # The first byte of every row comes from the pass over the prompts.
    later = statistics.bytes - sum(map(bool, result.ids))
    speed = f", {later / statistics.seconds:,.0f} bytes/s" if later and statistics.seconds else ""
    prompt = f"{statistics.prompt_bytes:,} of prompt in {statistics.prompt_seconds:.2f} s"
    reasons = ", ".join(sorted(set(result.reasons)))
    out.print(f"{statistics.bytes:,} bytes{speed} after {prompt}; ended by {reasons}", soft_wrap=True)
    out.print(f"passes: {passes or 'none'}")
    if statistics.drafted:
        share = statistics.accepted / statistics.drafted
        out.print(f"drafted {statistics.drafted:,} bytes, accepted {statistics.accepted:,} ({share:.0%})")
    if statistics.weight_error:
        out.print(f"rounding changed the weights by {statistics.weight_error:.2%}")


def _as_json(result: Generated) -> dict[str, Any]:
    rows = [
        {"ids": ids, "text": text, "reason": reason}
        for ids, text, reason in zip(result.ids, result.text, result.reasons, strict=True)
    ]
    statistics = dict(vars(result.statistics))
    statistics["rounds"] = [[*key, count] for key, count in sorted(result.statistics.rounds.items())]
    return {"rows": rows, "statistics": statistics}
