"""Computes the patches of files, on several processes, and stores them for training."""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blt_kernels._files import check_regular, locked, naming, shortened, sync_folder
from blt_kernels.models import BLT
from blt_kernels.train import data
from blt_kernels.train.data import Pieces, Row, Source
from blt_kernels.train.row_patches import cut_pieces
from blt_kernels.train.stored_patches import BITS, DONE, FORMAT, byte_offsets, provenance, read_index, write_index

_BLOCK_IDS = 1 << 16  # a block of full pieces takes a CPU a few seconds


def save(
    folder: Path,
    sources: Sequence[Source],
    model: BLT,
    context: int,
    *,
    bf16: bool = False,
    processes: int = 1,
    report: Callable[[int], None] | None = None,
) -> None:
    """Store the patches of files, or resume a call that was killed.

    Parameters
    ----------
    folder : Path
    sources : sequence of Source
    model : BLT
        Its patcher and configuration decide about the patches; its other weights are not used.
    context, bf16
        As the training has them.
    processes : int
        On the CPU there may be several, which share the threads of this process. The folder does not depend on their
        number.
    report : callable, optional
        Called with the number of ids that have become done, those of earlier calls included.

    Raises
    ------
    ValueError
        The folder holds patches of other files or made with something else, or another process is writing to it; the
        message names it. Or a file is no longer what its source says: patches are of the very bytes with that digest.

    Notes
    -----
    The files are read twice before anything is computed. What is stored is computed anew if it is damaged.
    """
    files = [{"name": str(s.path), "size": s.size, "sha256": s.digest} for s in sources]
    index = {"format": FORMAT, "made_with": provenance(model, context, bf16), "files": files, "sha256": None}
    report, blocks = report or (lambda _: None), _Blocks(sources, model, context, bf16)
    path, offsets = folder / BITS, byte_offsets(blocks.pieces)
    with locked(folder, "save"):
        stored = read_index(folder)
        for file in (path, folder / DONE):
            check_regular(file)
        if stored is not None:
            _check_same(folder, stored, index)
            index["files"] = stored["files"]  # the files had these names then
        if stored is not None and stored["sha256"] is not None:
            whole = path.exists() and path.stat().st_size == offsets[-1]
            whole = whole and data.file_digest(path)[0] == stored["sha256"]
            (folder / DONE).unlink(missing_ok=True)
            if whole:
                report(sum(map(blocks.num_ids, range(blocks.count))))
                return
        digests = [blocks.digest(block) for block in range(blocks.count)]
        for source in blocks.sources:
            if data.file_digest(source.path) != (source.digest, source.size):
                raise _changed(source)
        write_index(folder, index)
        path.touch()
        (folder / DONE).touch()
        sync_folder(folder)
        with path.open("r+b", buffering=0) as bits, (folder / DONE).open("r+b", buffering=0) as done:
            if path.stat().st_size != offsets[-1]:  # no mark can be true then
                done.truncate(0)
                with naming(path):
                    bits.truncate(offsets[-1])
            marks = done.read(blocks.count).ljust(blocks.count, b"\0")
            todo = [block for block in range(blocks.count) if not marks[block]]
            report(sum(blocks.num_ids(block) for block in range(blocks.count) if marks[block]))
            for block, (content, read) in _compute(blocks, todo, processes):
                if read != digests[block]:
                    inside = [row.source for row in blocks.rows(block)]
                    raise _changed(next((s for s in inside if data.file_digest(s.path)[0] != s.digest), inside[0]))
                _write(bits, content, int(offsets[blocks.numbers(block).start]))
                with naming(path):
                    os.fsync(bits)  # before its mark is written
                _write(done, b"\1", block)
                report(blocks.num_ids(block))
        index["sha256"] = data.file_digest(path)[0]
        write_index(folder, index)
        (folder / DONE).unlink(missing_ok=True)


class _Blocks(Dataset):
    """Divides pieces into blocks of equal numbers of pieces, and computes their bits."""

    def __init__(self, sources: Sequence[Source], model: BLT, context: int, bf16: bool) -> None:
        self.model, self.bf16 = model, bf16
        self.sources, self.pieces = sources, Pieces([source.size for source in sources], context)
        self.size, self.total = max(1, _BLOCK_IDS // context), len(self.pieces.length)
        self.count = -(-self.total // self.size)

    def numbers(self, block: int) -> range:
        return range(block * self.size, min((block + 1) * self.size, self.total))

    def rows(self, block: int) -> list[Row]:
        return [self.pieces.row(self.sources, number) for number in self.numbers(block)]

    def num_ids(self, block: int) -> int:
        return sum(row.length for row in self.rows(block))

    def __getitem__(self, block: int) -> tuple[int, Any]:
        """Return a block and its `bits`. An exception is an item too: `DataLoader` would give it another message."""
        try:
            return block, self.bits(block)
        except Exception as error:
            return block, error

    def bits(self, block: int) -> tuple[bytes, str]:
        """Return the bytes of a block in ``patches.bits``, and the `digest` of the ids that were read for it."""
        digest = hashlib.sha256()

        def read(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
            tokens, offsets = data.read_rows(rows)
            digest.update(tokens.numpy().tobytes())
            return tokens, offsets

        boundaries = cut_pieces(self.model, self.rows(block), self.bf16, read)
        return b"".join(np.packbits(each).tobytes() for each in boundaries), digest.hexdigest()

    def digest(self, block: int) -> str:
        """Return SHA-256 of the ids of a block."""
        return hashlib.sha256(data.read_rows(self.rows(block))[0].numpy().tobytes()).hexdigest()


def _changed(source: Source) -> ValueError:
    return ValueError(f"{source.path}: the file has changed while patches were stored: bring it back or start anew")


def _compute(blocks: _Blocks, todo: Sequence[int], processes: int) -> Iterator[tuple[int, tuple[bytes, str]]]:
    """Yield blocks and their `_Blocks.bits`, in the order in which they are done."""
    workers = min(processes, len(todo))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # `processes` is the user's choice
        loader: Any = DataLoader(
            blocks,
            batch_size=None,
            sampler=todo,
            num_workers=workers if workers > 1 else 0,
            multiprocessing_context="spawn" if workers > 1 else None,  # threads of torch do not survive a fork
            worker_init_fn=partial(_start, os.getpid(), max(1, torch.get_num_threads() // max(workers, 1))),
            in_order=False,
        )
        try:
            for block, answer in loader:
                if isinstance(answer, Exception):
                    raise answer
                yield block, answer
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise ValueError("processes: one of them was killed: is there memory for as many?") from None
            raise


def _start(parent: int, threads: int, _worker: int) -> None:
    if os.getppid() != parent:  # it was killed before this worker began to watch it
        raise SystemExit
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends its workers
    torch.set_num_threads(threads)


def _check_same(folder: Path, stored: dict[str, Any], index: dict[str, Any]) -> None:
    old, new = stored["made_with"], index["made_with"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    shown = [f"{name}={shortened(old.get(name))}" for name in names]
    if [(f["sha256"], f["size"]) for f in stored["files"]] != [(f["sha256"], f["size"]) for f in index["files"]]:
        shown.append("files")
    if shown:
        raise ValueError(f"save: {folder} holds patches of something else ({', '.join(shown)}): choose another folder")


def _write(file: FileIO, content: bytes, offset: int) -> None:
    with naming(Path(file.name)):
        file.seek(offset)
        while content:  # a full disk takes a part, and then raises
            content = content[file.write(content) :]
