"""Measure drafts on a trained BLT: ``python bench/generation_drafts.py --model RUN``.

RUN is the directory of a training run, which may still go on: its newest checkpoint is read where it has no model yet.
Prompts are from the middle of files that the run holds out. For every prompt the model writes with drafts of each kind
and without, in turn, one row at a time. The tables say what a byte costs, in passes of each part and in time, and how
many bytes of a draft were accepted by its length. Encoder and decoder also run where the decoder drafts.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from blt_kernels.models import BLT, BLTConfig, load_model
from blt_kernels.models.base import ByteModel
from blt_kernels.models.generate import Statistics
from blt_kernels.models.stored_config import config_from_dict
from blt_kernels.train import state

DRAFTS = (None, "patcher", "decoder", "prompt")
PARTS = ("encoder", "decoder", "global", "patcher")
TEMPERATURES = (0.0, 0.8)


def load(run: Path) -> ByteModel:
    """Return the model of a training run of a BLT: the finished one, or that of the newest checkpoint."""
    if (run / "model.safetensors").exists():
        return load_model(run, dtype=torch.float32).eval()
    checkpoint = state.latest(run / "checkpoint")
    if checkpoint is None:
        raise FileNotFoundError(f"model: expected the directory of a run, got {run}, which has no checkpoint")
    values = state.read_values(checkpoint)
    model = BLT(config_from_dict(BLTConfig, values["config"]))
    state.load_weights(checkpoint, model)
    print(f"checkpoint of step {values['step']}; bits/byte of held-out files, measured last: {values['heldout_bits']}")
    return model.eval()


def held_out(run: Path, count: int, length: int) -> Iterator[bytes]:
    """Yield `length` bytes from the middle of `count` files that the run holds out."""
    paths = map(Path, (run / "heldout.txt").read_text(encoding="utf-8").splitlines())
    texts = (data for data in (path.read_bytes() for path in paths) if len(data) >= 4 * length)
    for data, _ in zip(texts, range(count), strict=False):
        yield data[len(data) // 2 :][:length]


def measure(
    model: ByteModel, prompts: Sequence[bytes], *, temperature: float, max_new_bytes: int, draft_bytes: int
) -> dict[str | None, list[Statistics]]:
    """Write behind every prompt with every kind of draft.

    Returns
    -------
    dict
        Kind -> statistics of each prompt.

    Raises
    ------
    AssertionError
        Greedy output depends on the drafts.
    """
    options = {"temperature": temperature, "max_new_bytes": max_new_bytes, "draft_bytes": draft_bytes}
    found: dict[str | None, list[Statistics]] = {draft: [] for draft in DRAFTS}
    for draft in DRAFTS:  # the first calls are slower
        model.generate(prompts[0], draft=draft, **options)
    for number, prompt in enumerate(prompts):
        written = {}
        turn = number % len(DRAFTS)
        for draft in (*DRAFTS[turn:], *DRAFTS[:turn]):
            result = model.generate(prompt, draft=draft, seed=number, **options)
            found[draft].append(result.statistics)
            written[draft] = result.ids
        assert temperature or all(ids == written[None] for ids in written.values()), f"prompt {number}: other bytes"
    return found


def costs(found: dict[str | None, list[Statistics]]) -> list[str]:
    """Return a table of what a byte costs with each kind of draft. Times are medians over prompts, ratios too."""
    lines = [
        "| draft | ms a byte | times as fast | " + " | ".join(PARTS) + " | drafted | accepted |",
        "|---|---:|---:|" + "---:|" * (len(PARTS) + 2),
    ]
    plain = [own.seconds / own.bytes for own in found[None]]
    for draft, all_own in found.items():
        seconds = [own.seconds / own.bytes for own in all_own]
        ratio = statistics.median(a / b for a, b in zip(plain, seconds, strict=True))
        size = sum(own.bytes for own in all_own)
        passes = [f"{sum(own.passes[part] for own in all_own) / size:.2f}" for part in PARTS]
        drafted, accepted = (sum(getattr(own, name) for own in all_own) for name in ("drafted", "accepted"))
        share = f"{accepted / drafted:.0%}" if drafted else ""
        cells = [draft or "none", f"{statistics.median(seconds) * 1e3:.2f}", f"{ratio:.2f}", *passes]
        lines.append(f"| {' | '.join([*cells, f'{drafted / size:.2f}', share])} |")
    return lines


def acceptance(found: dict[str | None, list[Statistics]]) -> list[str]:
    """Return a table of drafts by their length: how many there were, and the mean number of bytes accepted."""
    rounds = {draft: sum((own.rounds for own in all_own), Counter()) for draft, all_own in found.items() if draft}
    longest = max((drafted for own in rounds.values() for drafted, _ in own), default=0)
    lines = [
        "| bytes of the draft | " + " | ".join(str(n) for n in range(1, longest + 1)) + " |",
        "|---|" + "---:|" * longest,
    ]
    for draft, own in rounds.items():
        cells = []
        for length in range(1, longest + 1):
            times = sum(n for (drafted, _), n in own.items() if drafted == length)
            kept = sum(accepted * n for (drafted, accepted), n in own.items() if drafted == length)
            cells.append(f"{kept / times:.1f} of {times}" if times else "")
        lines.append(f"| {draft} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure drafts on a trained BLT.")
    parser.add_argument("--model", type=Path, required=True, help="directory of a training run of a BLT")
    parser.add_argument("--prompts", type=int, default=8, help="files that are prompts")
    parser.add_argument("--prompt-bytes", type=int, default=512)
    parser.add_argument("--max-new-bytes", type=int, default=128)
    parser.add_argument("--draft-bytes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model)
    prompts = list(held_out(options.model, options.prompts, options.prompt_bytes))
    for temperature in TEMPERATURES:
        found = measure(
            model, prompts, temperature=temperature, max_new_bytes=options.max_new_bytes,
            draft_bytes=options.draft_bytes,
        )  # fmt: skip
        print(f"\ntemperature {temperature}: passes and drafts are per byte written")
        print("\n".join([*costs(found), "", *acceptance(found)]), flush=True)


if __name__ == "__main__":
    main()
