"""Times the steps of generation behind a prompt: BLT and MegaByte beside transformers, MEGABYTE-pytorch and ByteLM.

A call appends bytes to rows that hold a prompt, one at a time, and chooses the most probable byte after each. The bytes
appended are those of the text whatever the weights, which are random, choose: so patches are as long as those of text.
Models of this package keep a state, which every call takes back to the prompt; the others run anew on all bytes.

The work is what the steps must read: every matrix once a step, those of the global transformer once a step in which a
patch closes, the rows of tables, and the keys and values that attention reads. It is that of our model in all rows.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch
from common import normal
from peers import models as peers
from timing import OURS, Comparison, Make
from torch import Tensor

from blt_kernels._files import whole_file
from blt_kernels.ids import to_ids
from blt_kernels.models import ByteLM, ByteLMConfig, ByteModel, MegaByte, MegaByteConfig
from blt_kernels.models.state import ByteState
from blt_kernels.nn import TransformerConfig

BLT_OP, MEGABYTE_OP = "BLT generation", "MegaByte generation"
PATCH_SIZE = 4.5
LIMIT_SHAPE = 4096, 8192  # it takes 128 MB in fp32
LONGEST = 4096  # a byte transformer takes too long for longer prompts of all rows together
# These parts of a model run only in a step in which a patch closes.
CLOSING = (
    *("global_transformer.", "local_encoder.cross_attn_layers.", "local_encoder.patch_embedding_projection."),
    *("local_decoder.patch_embedding_projection.", "global_embed", "global_layers.", "global_norm."),
    "global_to_local.",
)
CLOSING_PROJECTIONS = ("k_norm.weight", "k_proj.weight", "v_proj.weight")  # the decoder's cross attention has them
TABLES = ("embed_tokens.weight", "tok_embedding.weight")  # each byte reads one row of these


@dataclass(frozen=True)
class Case:
    """A case writes `new` bytes behind `length` in each of `rows` rows. Models without a cache run if `uncached`."""

    rows: int
    length: int
    new: int = 16
    uncached: bool = False

    @property
    def shape(self) -> str:
        return f"{self.new} bytes behind {self.length}, batch {self.rows}"


# transformers takes seconds for each byte behind 4096.
BLT_CASES = (
    *(Case(1, 64, uncached=True), Case(1, 512, uncached=True), Case(1, 4096)),
    *(Case(8, 64), Case(8, 512), Case(8, 4096), Case(64, 512)),
)
# This has weights of int8. It is left out of the comparison above, where it would be the best peer.
INT8_CASES = (Case(1, 64, uncached=True), Case(1, 512, uncached=True), Case(1, 4096), Case(8, 512))
MEGABYTE_CASES = (Case(1, 64, uncached=True), Case(1, 512, uncached=True), Case(1, 4096), Case(8, 512))
SMALL = (Case(2, 40, 5, uncached=True),)


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield BLT, then MegaByte."""
    for case in SMALL if small else BLT_CASES:
        yield partial(blt, case, device, small)
    for case in SMALL if small else INT8_CASES:
        yield partial(blt, case, device, small, "int8")
    for case in SMALL if small else MEGABYTE_CASES:
        yield partial(megabyte, case, device, small)


def blt(case: Case, device: str, small: bool, weights: str | None = None) -> Comparison:
    """Compare with transformers, with the same weights, and with a byte transformer of as many parameters.

    Ours is quantized, if `weights` says how, and then chooses other bytes.
    """
    tokens = text(case.rows, case.length + case.new).to(device)
    theirs = peers.transformers_blt(tokens, PATCH_SIZE, peers.SMALLEST if small else peers.SMALL)
    if theirs is None:
        raise ImportError("the bench of generation compares with transformers: pip install transformers")
    ours = peers.with_weights_of(theirs, device)
    parameters = millions(ours)
    if weights is not None:
        ours = ours.quantized(weights)
    calls: dict[str, Callable[[], Tensor]] = {OURS: Steps(ours, tokens, case)}
    if case.uncached:
        calls["transformers"] = partial(
            without_cache, lambda ids: theirs(ids, use_cache=False).logits[:, -1], tokens, case
        )
    same = ByteLMConfig(dim=32, num_layers=1, num_heads=2) if small else byte_transformer(768, 9, 12)
    if case.rows * case.length <= LONGEST:
        calls.update(byte_transformers(tokens, case, device, same))
    if weights is not None:
        return comparison(BLT_OP, case, calls, parameters, None, {}, device, f"{weights} weights")
    return comparison(BLT_OP, case, calls, parameters, "transformers", {}, device)


def megabyte(case: Case, device: str, small: bool) -> Comparison:
    """Compare with MEGABYTE-pytorch, and with byte transformers of as many parameters and of a quarter."""
    tokens = text(case.rows, case.length + case.new).to(device)
    wide, narrow, size = (TransformerConfig(512, 8, 8), TransformerConfig(256, 4, 4), 8)
    configs = (byte_transformer(512, 9, 8), byte_transformer(256, 9, 4))
    if small:
        wide, narrow, size = (TransformerConfig(32, 1, 2), TransformerConfig(16, 1, 2), 4)
        configs = (byte_transformer(32, 1, 2), byte_transformer(16, 1, 2))
    ours = MegaByte(MegaByteConfig(size, wide, narrow)).to(device).eval()
    calls: dict[str, Callable[[], Tensor]] = {OURS: Steps(ours, tokens, case)}
    failures = {}
    if case.uncached:
        theirs = peers.megabyte_pytorch(tokens, wide, narrow, size)
        if theirs is None:
            failures["MEGABYTE-pytorch"] = "not installed: pip install MEGABYTE-pytorch"
        else:
            calls["MEGABYTE-pytorch"] = partial(without_cache, lambda ids: theirs(ids)[:, -1], tokens, case)
    if case.rows * case.length <= LONGEST:
        calls.update(byte_transformers(tokens, case, device, *configs))
    return comparison(MEGABYTE_OP, case, calls, millions(ours), None, failures, device)


def comparison(
    op: str,
    case: Case,
    calls: dict[str, Callable[[], Tensor]],
    parameters: str,
    equal: str | None,
    failures: dict[str, str],
    device: str,
    dtype: str = "float32",
) -> Comparison:
    """Return a comparison of `calls`, of which `equal` must choose the same bytes as ours."""

    def agree(results: dict[str, Any]) -> None:
        for name, call in calls.items():
            if isinstance(call, Steps):
                assert torch.equal(results[name], call.expected()), f"{name}: not the bytes that one forward chooses"
        if equal in results:
            assert torch.equal(results[OURS], results[equal]), f"{equal} chooses other bytes"

    ours: Any = calls[OURS]
    matrix, vector = normal(*LIMIT_SHAPE, device=device), normal(LIMIT_SHAPE[1], device=device)
    return Comparison(
        op,
        f"{parameters} parameters, {case.shape}, {ours.state.nbytes / 1e6:.3g} MB of state",
        dtype,
        calls,
        ours.work(),
        {"matrix-vector product": lambda: torch.mv(matrix, vector), **timing.reads(matrix)},
        matrix.nbytes,
        agree,
        device=device,
        failures=failures,
    )


class Steps:
    """Generates by a model with a state that holds the prompt. A call returns the chosen bytes, ``[rows, new]``."""

    def __init__(self, model: ByteModel, tokens: Tensor, case: Case) -> None:
        self.model, self.tokens, self.case = model, tokens, case
        self.state = model.new_state(case.rows, undo=case.new)
        model.extend(tokens[:, : case.length].contiguous(), state=self.state)

    def __call__(self) -> Tensor:
        self.state.truncate([self.case.length] * self.case.rows)
        return torch.cat([self.step(i) for i in range(self.case.new)], 1)

    def step(self, i: int) -> Tensor:
        at = self.case.length + i
        return self.model.extend(self.tokens[:, at : at + 1].contiguous(), state=self.state).argmax(-1)

    @torch.no_grad()
    def expected(self) -> Tensor:
        """Return the bytes that one forward over the text chooses."""
        return self.model(self.tokens)[:, self.case.length :].argmax(-1)

    def work(self) -> int:
        """Return the bytes that the steps must read."""
        self.state.truncate([self.case.length] * self.case.rows)
        total = 0
        for i in range(self.case.new):
            before = self.state.num_patches
            self.step(i)
            total += bytes_of_step(self.model, self.state, before)
        return total


def without_cache(forward: Callable[[Tensor], Tensor], tokens: Tensor, case: Case) -> Tensor:
    """Choose the same bytes as `Steps` by a forward over all bytes for each: ``[rows, new]``."""
    with torch.no_grad():
        chosen = [forward(tokens[:, : case.length + i + 1]).argmax(-1) for i in range(case.new)]
    return torch.stack(chosen, 1)


def byte_transformer(dim: int, num_layers: int, num_heads: int) -> ByteLMConfig:
    """Return the configuration of a byte transformer that attends to all bytes."""
    return ByteLMConfig(dim=dim, num_layers=num_layers, num_heads=num_heads, window=None)


def byte_transformers(tokens: Tensor, case: Case, device: str, *configs: ByteLMConfig) -> dict[str, Steps]:
    """Return the steps of byte transformers with a cache, by names with the number of parameters."""
    models = [ByteLM(config).to(device).eval() for config in configs]
    return {f"ByteLM of {millions(model)}": Steps(model, tokens, case) for model in models}


def millions(model: ByteModel) -> str:
    return f"{sum(x.numel() for x in model.parameters()) / 1e6:.3g}M"


def bytes_of_step(model: Any, state: ByteState, before: Sequence[int]) -> int:
    """Return the bytes of weights, keys and values that a step of one byte a row has read.

    Parameters
    ----------
    state : ByteState
        After the step.
    before : sequence of int
        Patches of each row before it.
    """
    closed = [n for n, old in zip(state.num_patches, before, strict=True) if n > old]
    config, total = model.config, 0
    for name, x in (*model.named_parameters(), *model.named_buffers()):  # quantized matrices are buffers
        if closes(name) and not closed:
            continue
        if name.endswith(TABLES):
            total += state.rows * x[0].nbytes * (len(config.ngram_sizes) if "hash" in name else 1)
        else:
            total += x.nbytes
    local = [model.local_config] if isinstance(model, MegaByte) else [config.encoder, config.decoder, config.patcher]
    total += sum(bytes_of_keys(own, n) for own in local for n in state.lengths)
    return total + sum(bytes_of_keys(config.global_transformer, n) for n in closed)


def closes(name: str) -> bool:
    """Return whether a parameter is read only where a patch closes."""
    of_decoder = name.startswith("local_decoder.cross_attn_layers.") and name.endswith(CLOSING_PROJECTIONS)
    return name.startswith(CLOSING) or of_decoder


def bytes_of_keys(config: TransformerConfig, length: int) -> int:
    """Return the bytes of keys and values, in fp32, that the last of `length` positions attends to."""
    return 2 * config.num_layers * config.kv_heads * config.head_dim * 4 * min(length, config.window or length)


def text(rows: int, length: int) -> Tensor:
    """Return ids ``[rows, length]``: every row is the beginning of another module of the standard library."""
    files = [Path(statistics.__file__), *sorted(Path(statistics.__file__).parent.glob("*.py"))]
    found = (data for data in (path.read_bytes() for path in files) if len(data) >= length)
    return torch.stack([to_ids(data[:length]) for data, _ in zip(found, range(rows), strict=False)])


def remarks(rows: list[timing.Row]) -> list[str]:
    """Say what a byte of every row takes, and how that compares."""
    lines = []
    for ours in rows:
        if ours.op not in (BLT_OP, MEGABYTE_OP) or ours.implementation != OURS:
            continue
        new, _, batch = numbers_in(ours.shape)
        same = [row for row in rows if key_of(row) == key_of(ours)]
        times = ", ".join(
            f"{row.implementation} {row.median_ms / ours.median_ms:.3g} times"
            for row in same
            if row.implementation != OURS and not row.implementation.startswith("limit")
        )
        step, limit = ours.median_ms / new, ours.median_ms * ours.share_of_limit / new
        lines.append(
            f"{ours.op}, {ours.shape}, {ours.dtype}, {ours.threads} threads: {step:.3g} ms a step,"
            f" {batch * 1e3 / step:.4g} bytes/s; limit {limit:.3g} ms{'; ' + times if times else ''}"
        )
    return lines


def key_of(row: timing.Row) -> tuple[str, str, str, int]:
    return row.op, row.shape, row.dtype, row.threads


def plot(rows: list[timing.Row], path: Path) -> None:
    """Draw the time of a step over the length of the prompt, of batch 1 and the largest number of threads.

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    threads = max(row.threads for row in rows)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, op in zip(figure.subplots(1, 2), (BLT_OP, MEGABYTE_OP), strict=True):
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row.op != op or row.threads != threads or row.implementation.startswith("limit: "):
                continue
            new, length, batch = numbers_in(row.shape)
            kind = "" if row.dtype == "float32" else f", {row.dtype}"
            if batch == 1 and (not kind or row.implementation == OURS):
                curves.setdefault(row.implementation + kind, []).append((length, row.median_ms / new))
                if row.implementation == OURS:
                    limit = row.median_ms * row.share_of_limit / new
                    curves.setdefault(f"limit of ours{kind}", []).append((length, limit))
        for name, points in curves.items():
            style = "--" if name.startswith("limit") else "-"
            axis.plot(*zip(*sorted(points), strict=True), style, marker=".", label=name)
        axis.set(xscale="log", yscale="log", xlabel="bytes of the prompt", ylabel="ms a byte", title=op)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if curves:
            axis.legend(fontsize=8)
    figure.suptitle(f"batch 1, {threads} threads")
    with whole_file(path) as part:
        figure.savefig(part, dpi=110, format="png")


def numbers_in(shape: str) -> tuple[int, int, int]:
    """Return the new bytes, those of the prompt and the rows, of the shape of a comparison."""
    found = re.search(r"(\d+) bytes behind (\d+), batch (\d+)", shape)
    assert found is not None, shape
    new, length, batch = map(int, found.groups())
    return new, length, batch


def test_generate(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
