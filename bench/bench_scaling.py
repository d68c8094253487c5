"""Measure how time and memory of every op grow with the bytes, the length of patches and the number of documents.

There are no peers, so that large inputs are affordable; the share is that of copying the text itself. Attention has a
window here, since without one it grows with the square of a document by nature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from common import layout_of, name_of_pass, normal, ragged_entropies, steps
from timing import OURS, Comparison, Make
from torch import Tensor
from torch.utils import _pytree as pytree

import blt_kernels as bk
from blt_kernels._files import whole_file
from blt_kernels.models.config import RELEASED_THRESHOLD
from blt_kernels.testing import offsets_of, real_text

ALPHABET, HEADS, HEAD_WIDTH, VECTORS, WINDOW = 260, 4, 64, 2, 512
WIDTH = HEADS * HEAD_WIDTH
DOCUMENT = 1000  # a document has so many bytes unless the number of documents changes
BYTES = "bytes"


@dataclass(frozen=True)
class Text:
    """Describes bytes in documents as equal as can be, patches of `mean` bytes on average, `vocab` rows for n-grams."""

    size: int
    documents: int
    mean: float
    vocab: int
    device: str

    @property
    def lengths(self) -> list[int]:
        short, more = divmod(self.size, self.documents)
        return [short + 1] * more + [short] * (self.documents - more)

    def cu_seqlens(self) -> Tensor:
        return offsets_of(self.lengths, device=self.device)

    def layout(self) -> bk.PatchLayout:
        return layout_of(self.lengths, mean=self.mean, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return normal(*shape, device=self.device)


class Run(NamedTuple):
    """Describes a function, its arguments, and those of them that get gradients."""

    function: Callable[..., Any]
    inputs: tuple[Tensor, ...] = ()


# --- the ops ----------------------------------------------------------------------------------------------------------


def patch_starts(text: Text) -> Run:
    entropy, cu_seqlens = ragged_entropies(text.size, device=text.device), text.cu_seqlens()
    return Run(lambda: bk.patch_starts(entropy, cu_seqlens, threshold=RELEASED_THRESHOLD))


def boundary_patch(text: Text) -> Run:
    scores, cu_seqlens = ragged_entropies(text.size, device=text.device), text.cu_seqlens()
    thresholds = torch.full((text.documents,), RELEASED_THRESHOLD, device=text.device)
    return Run(lambda: bk.boundary_patch(scores, cu_seqlens, at="start", threshold=thresholds))


def entropy_patch(text: Text) -> Run:
    logits, cu_seqlens = text.normal(text.size, ALPHABET), text.cu_seqlens()
    return Run(lambda: bk.entropy_patch(logits, cu_seqlens, threshold=RELEASED_THRESHOLD))


def token_entropy(text: Text) -> Run:
    return Run(bk.token_entropy, (text.normal(text.size, ALPHABET),))


def linear_entropy(text: Text) -> Run:
    hidden, weight = text.normal(text.size, WIDTH), text.normal(ALPHABET, WIDTH) / 4
    return Run(lambda: bk.linear_entropy(hidden, weight))


def linear_cross_entropy(text: Text) -> Run:
    hidden, weight = text.normal(text.size, WIDTH), text.normal(ALPHABET, WIDTH) / 4
    targets = bk.to_ids(real_text(text.size), device=text.device)
    return Run(lambda hidden, weight: bk.linear_cross_entropy(hidden, weight, targets), (hidden, weight))


def patch_pool(text: Text) -> Run:
    layout = text.layout()
    return Run(lambda x: bk.patch_pool(x, layout), (text.normal(text.size, WIDTH),))


def patch_unpool(text: Text) -> Run:
    layout = text.layout()
    return Run(lambda y: bk.patch_unpool(y, layout), (text.normal(layout.capacity, WIDTH),))


def ema_scan(text: Text) -> Run:
    cu_seqlens, weights = text.cu_seqlens(), torch.full((text.size,), 0.75, device=text.device)
    return Run(lambda x, p: bk.ema_scan(x, p, cu_seqlens), (text.normal(text.size, WIDTH), weights))


def ngram_hash(text: Text) -> Run:
    tokens, cu_seqlens = bk.to_ids(real_text(text.size), device=text.device), text.cu_seqlens()
    return Run(lambda: bk.ngram_hash(tokens, cu_seqlens, vocab=text.vocab))


def ngram_hash_embed(text: Text) -> Run:
    tokens, cu_seqlens = bk.to_ids(real_text(text.size), device=text.device), text.cu_seqlens()
    tables = torch.zeros(6 * text.vocab, WIDTH, device=text.device)
    return Run(lambda tables: bk.ngram_hash_embed(tokens, tables, None, cu_seqlens, grad="sparse"), (tables,))


def cross_attention(text: Text, direction: str) -> Run:
    layout = text.layout()
    on_bytes = text.normal(text.size, HEADS, HEAD_WIDTH)
    on_patches = text.normal(layout.capacity * VECTORS, HEADS, HEAD_WIDTH)
    q, k = (on_patches, on_bytes) if direction == "encode" else (on_bytes, on_patches)
    return Run(
        lambda q, k, v: bk.patch_cross_attention(q, k, v, layout, direction=direction, queries_per_patch=VECTORS),
        (q, k, k.clone()),
    )


def encode(text: Text) -> Run:
    return cross_attention(text, "encode")


def decode(text: Text) -> Run:
    return cross_attention(text, "decode")


def block_causal_attention(text: Text) -> Run:
    cu_seqlens = text.cu_seqlens()
    q = text.normal(text.size, HEADS, HEAD_WIDTH)
    return Run(lambda q, k, v: bk.block_causal_attention(q, k, v, cu_seqlens, window=WINDOW), (q, q.clone(), q.clone()))


ON_PATCHES = {
    "patch_pool max": patch_pool,
    "patch_unpool": patch_unpool,
    "patch_cross_attention encode": encode,
    "patch_cross_attention decode": decode,
}
ON_DOCUMENTS = {
    "patch_starts": patch_starts,
    "boundary_patch": boundary_patch,
    "entropy_patch": entropy_patch,
    "ema_scan": ema_scan,
    "ngram_hash": ngram_hash,
    "ngram_hash_embed sparse": ngram_hash_embed,
    "block_causal_attention window 512": block_causal_attention,
    **ON_PATCHES,
}
FORWARD_ONLY = (patch_starts, boundary_patch, entropy_patch, linear_entropy, ngram_hash)
ON_ROWS = {
    "token_entropy": token_entropy,
    "linear_entropy": linear_entropy,
    "linear_cross_entropy": linear_cross_entropy,
}
ALL = {**ON_ROWS, **ON_DOCUMENTS}

# --- what changes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Varies one quantity. `text` gives the size, documents and patch length of a text for one of its values."""

    quantity: str
    values: tuple[int, ...]
    text: Callable[[int], tuple[int, int, float]]
    ops: dict[str, Callable[[Text], Run]]


def sweeps(small: bool) -> list[Sweep]:
    size = 1024 if small else 1 << 16
    return [
        Sweep(
            BYTES,
            (256, 1024) if small else tuple(1024 * 4**i for i in range(5)),
            lambda value: (value, max(1, value // DOCUMENT), 4.5),
            ALL,
        ),
        Sweep(
            "bytes a patch",
            (1, 8) if small else tuple(2**i for i in range(7)),
            lambda value: (size, max(1, size // DOCUMENT), value),
            ON_PATCHES,
        ),
        Sweep(
            "documents",
            (1, 10) if small else tuple(10**i for i in range(5)),
            lambda value: (size, value, 4.5),
            ON_DOCUMENTS,
        ),
    ]


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield a comparison for every value of every sweep and op.

    The two passes are told apart where the bytes change; elsewhere forward is a part of what is measured.
    """
    for sweep in sweeps(small):
        for op, make in sweep.ops.items():
            passes = (False,) if make in FORWARD_ONLY else (False, True)
            for backward in passes if sweep.quantity == BYTES else passes[-1:]:
                for value in sweep.values:
                    text = Text(*sweep.text(value), 1009 if small else 100002, device)
                    yield partial(comparison, op, make, text, value, sweep.quantity, backward)


def comparison(
    op: str, make: Callable[[Text], Run], text: Text, value: int, quantity: str, backward: bool
) -> Comparison:
    run = make(text)
    grad = torch.ones_like(run.function(*run.inputs)) if backward else None
    for x in run.inputs:
        x.requires_grad_(backward)
    data = torch.zeros(text.size, dtype=torch.uint8, device=text.device)
    return Comparison(
        f"{op} {name_of_pass(backward)}, scaling with {quantity}",
        f"{value} {quantity}",
        "int64" if op == "ngram_hash" else "float32",
        {OURS: steps(lambda: run.function(*run.inputs), run.inputs, grad)},
        text.size,
        timing.copies(data),
        2 * text.size,
        assert_finite,
        device=text.device,
    )


def assert_finite(results: dict[str, Any]) -> None:
    for leaf in pytree.tree_leaves(results[OURS]):
        values = leaf._values() if leaf.is_sparse else leaf
        assert bool(values.isfinite().all())


# --- what comes out ---------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Holds the measurements of one op along one sweep."""

    op: str
    values: list[int]
    milliseconds: list[float]
    megabytes: list[float]


def curves(rows: list[timing.Row], threads: int) -> dict[str, list[Curve]]:
    """Return curves by the name of the sweep."""
    found: dict[str, dict[str, Curve]] = {}
    for row in rows:
        op, _, quantity = row.op.partition(", scaling with ")
        if quantity and row.threads == threads and row.implementation == OURS:
            curve = found.setdefault(quantity, {}).setdefault(op, Curve(op, [], [], []))
            curve.values.append(int(row.shape.split()[0]))
            curve.milliseconds.append(row.median_ms)
            curve.megabytes.append(row.extra_mb or 0.0)
    return {quantity: list(by_op.values()) for quantity, by_op in found.items()}


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return the exponents in the bytes, and how much the other two sweeps matter."""
    found = []
    for threads in sorted({row.threads for row in rows}):
        for quantity, of_quantity in curves(rows, threads).items():
            for curve in of_quantity:
                head = f"{curve.op}, {threads} threads, {curve.values[0]} to {curve.values[-1]} {quantity}: "
                if quantity == BYTES:
                    found.append(
                        f"{head}time T^{growth(curve.values, curve.milliseconds)},"
                        f" memory T^{growth(curve.values, curve.megabytes)}"
                    )
                else:
                    spread = max(curve.milliseconds) / min(curve.milliseconds)
                    found.append(f"{head}the slowest takes {spread:.2f} times as long as the fastest")
    return found


def growth(sizes: list[int], values: list[float]) -> str:
    """Return the exponent over all sizes and over the last two; a start below 1 is fixed cost."""
    if len(sizes) < 2 or min(values) <= 0:
        return "?"
    return f"{timing.exponent(sizes, values):.2f} ({timing.exponent(sizes[-2:], values[-2:]):.2f} at the end)"


def plot(rows: list[timing.Row], path: Path) -> None:
    """Draw every curve, of the largest number of threads, with logarithmic axes: a panel for each sweep, one of memory.

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    threads = max(row.threads for row in rows)
    by_quantity = curves(rows, threads)
    panels = [(quantity, "time (ms)", "milliseconds") for quantity in by_quantity]
    panels.insert(1, (BYTES, "extra memory (MB)", "megabytes"))
    color = dict(zip(ALL, (*colormaps["tab10"].colors, "black"), strict=False))
    figure = Figure(figsize=(13, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).flat
    for axis, (quantity, label, field) in zip(axes, panels, strict=True):
        for curve in by_quantity[quantity]:
            op, backward = curve.op.removesuffix(" fwd+bwd").removesuffix(" fwd"), curve.op.endswith("bwd")
            y = getattr(curve, field)
            if min(y) > 0:
                axis.plot(curve.values, y, "--" if backward else "-", marker=".", color=color[op], label=curve.op)
        axis.set(xscale="log", yscale="log", xlabel=quantity, ylabel=label)
        axis.set_xticks(by_quantity[quantity][0].values, [str(x) for x in by_quantity[quantity][0].values])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if quantity == BYTES:
            ends = axis.get_xlim()
            bottom = axis.get_ylim()[0]
            axis.plot(ends, (bottom, bottom * ends[1] / ends[0]), ":", color="gray", label="linear")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle(f"{threads} threads, width {WIDTH}; 4.5 bytes a patch and {DOCUMENT} a document unless they change")
    with whole_file(path) as part:
        figure.savefig(part, dpi=110, format="png")


def test_scaling(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
