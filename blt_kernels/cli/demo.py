"""``blt-kernels demo`` cuts a real file into patches and times a BLT forward, fused ops beside their references."""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from blt_kernels.cli.base import ColorOption, Command, app
from blt_kernels.cli.console import Color, console
from blt_kernels.cli.patch import show
from blt_kernels.cli.patch.model import load_entropy_model
from blt_kernels.cli.patch.rules import Rules, Scheme
from blt_kernels.ids import to_ids
from blt_kernels.layout import PatchLayout
from blt_kernels.models.blt import BLT
from blt_kernels.models.byte_lm import ByteLM
from blt_kernels.models.config import BLTConfig
from blt_kernels.nn import load_ops

DRAWN_BYTES = 700
MODEL_BYTES = 4_096
SEED = 0
PROMPT_BYTES, NEW_BYTES = 512, 96


@dataclass(frozen=True)
class Row:
    """One op on inputs of the model: medians in seconds, fused and reference, and how far the results differ."""

    name: str
    fused: float
    reference: float
    error: float


@app.command(cls=Command)
def demo(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="File to cut; one of the standard library if not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds: every op is timed once a round.")] = 5,
    color: ColorOption = Color.auto,
) -> None:
    """Cut a real file into patches, run it through BLT, fused ops against PyTorch, and generate bytes."""
    if rounds < 1:
        raise ValueError(f"--rounds {rounds}: expected at least 1")
    file = file or Path(sysconfig.get_path("stdlib")) / "heapq.py"
    with file.open("rb") as source:
        data = source.read(MODEL_BYTES)
    if not data:
        raise ValueError(f"FILE {file}: expected at least one byte, got an empty file")
    patcher = load_entropy_model()
    show.run([str(file)], Rules(Scheme.entropy), show.Outputs(max_show=DRAWN_BYTES), None, color)

    out = console(color)
    tokens = to_ids(data)
    fused, reference = build_models(patcher)
    with torch.inference_mode():
        layout = fused.patch(tokens)
        size = sum(p.numel() for p in fused.parameters()) / 1e6
        out.print(f"\nBLT, {size:.1f} M random parameters, on {tokens.shape[0]:,} bytes, {escape(repr(layout))}:\n")
        rows = [measure(name, calls, rounds) for name, calls in op_calls(fused, tokens, layout)]
        rows.append(measure("the whole model, forward", (lambda: fused(tokens), lambda: reference(tokens)), rounds))
        bits = [model.loss(tokens).item() for model in (fused, reference)]

    table = Table()
    table.add_column("op")
    for heading in ("ours, ms", "PyTorch, ms", "ratio", "largest error"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        ratio = f"{row.reference / row.fused:.2f}"
        table.add_row(row.name, f"{row.fused * 1e3:.3f}", f"{row.reference * 1e3:.3f}", ratio, f"{row.error:.1e}")
    out.print(table)
    out.print(
        f"loss: {bits[0]:.6f} bits per byte with ours, {bits[1]:.6f} with PyTorch, {abs(bits[0] - bits[1]):.1e} apart"
    )
    worst = max(row.error for row in rows)
    verdict = "the same to rounding" if worst < 1e-3 and abs(bits[0] - bits[1]) < 1e-4 else "NOT the same"
    out.print(f"Fused and reference ops: {verdict}. Ops without a kernel yet run their reference twice: see doctor.")
    generate(patcher, data[:PROMPT_BYTES], out)
    out.print("Next: blt-kernels patch YOURFILE --html patches.html; blt-kernels train blt YOURFILES")


def generate(model: ByteLM, prompt: bytes, out: Console) -> None:
    """Print what the entropy model writes behind a prompt, byte by byte and with drafts from the text itself."""
    plain, drafted = (model.generate(prompt, max_new_bytes=NEW_BYTES, draft=draft) for draft in (None, "prompt"))
    out.print(f"\nThe entropy model writes behind the first {len(prompt)} bytes:\n")
    out.print(f"{escape(plain.text[0])}\n", style="bold")
    times = [1e3 * g.statistics.seconds / max(g.statistics.bytes - 1, 1) for g in (plain, drafted)]
    accepted = f"{drafted.statistics.accepted} of {drafted.statistics.drafted} drafted bytes accepted"
    verdict = "the same bytes" if plain.ids == drafted.ids else "NOT the same bytes"
    out.print(f"{times[0]:.2f} ms a byte; with drafts from the text {times[1]:.2f}, {accepted}: {verdict}.")


def build_models(patcher: ByteLM) -> tuple[BLT, BLT]:
    """Return a small BLT with fused ops and the same with reference ops: random weights, patches by `patcher`."""
    config = replace(BLTConfig.small(), patcher=patcher.config, threshold=patcher.config.threshold)
    torch.manual_seed(SEED)
    fused = BLT(config).eval()
    assert fused.patcher is not None
    fused.patcher.load_state_dict(patcher.state_dict())
    reference = BLT(config, "reference").eval()
    reference.load_state_dict(fused.state_dict())
    return fused, reference


def op_calls(model: BLT, tokens: Tensor, layout: PatchLayout) -> Iterator[tuple[str, tuple[Callable, Callable]]]:
    """Yield each op on inputs of the shapes that it has in `model`: its name, its fused and its reference call."""
    config, ops = model.config, (load_ops("fused"), load_ops("reference"))
    rows, queries = layout.cu_seqlens, config.queries_per_patch
    local, wide = config.encoder, config.global_transformer
    assert model.patcher is not None
    logits = model.patcher(tokens)
    draw = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    def heads(count: int, layer: Any) -> Tensor:
        return random(count, layer.num_heads, layer.head_dim)

    def both(name: str, *args: Any, **options: Any) -> tuple[Callable, Callable]:
        one, other = (getattr(namespace, name) for namespace in ops)
        return (lambda: one(*args, **options)), (lambda: other(*args, **options))

    size, capacity = tokens.shape[0], layout.capacity
    yield "entropy_patch", both("entropy_patch", logits, rows, threshold=config.threshold)
    tables, letters = model.encoder_hash_tok_embedding.weight, model.local_encoder.embed_tokens.weight
    call = both("ngram_hash_embed", tokens, tables, letters, rows, ngram_sizes=config.ngram_sizes)
    yield "ngram_hash_embed", call
    yield "patch_pool", both("patch_pool", random(size, local.dim), layout, "max")
    yield "patch_unpool", both("patch_unpool", random(capacity, local.dim), layout, "decode")
    for direction in ("encode", "decode"):
        vectors, states = heads(capacity * queries, local), heads(size, local)
        q, k = (vectors, states) if direction == "encode" else (states, vectors)
        call = both("patch_cross_attention", q, k, k, layout, direction=direction, queries_per_patch=queries)
        yield f"patch_cross_attention, {direction}", call
    for where, count, layer, offsets in (("bytes", size, local, rows), ("patches", capacity, wide, layout.cu_patches)):
        q, k, v = (heads(count, layer) for _ in range(3))
        yield f"block_causal_attention, {where}", both("block_causal_attention", q, k, v, offsets, window=layer.window)


def measure(name: str, calls: tuple[Callable, Callable], rounds: int) -> Row:
    """Return medians over interleaved rounds, after a first round whose results are compared."""
    error = max((_difference(a, b) for a, b in zip(*(tree_leaves(call()) for call in calls), strict=True)), default=0.0)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return Row(name, statistics.median(times[0]), statistics.median(times[1]), error)


def _difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
