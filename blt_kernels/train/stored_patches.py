"""Patches of the pieces that training cuts files into: computed when a batch needs them, or once, ahead of training.

The unit is the piece (see `blt_kernels.train.data`). The entropy model gets a whole piece, and on the CPU that piece
alone: the same byte elsewhere in a batch, or in a batch of another length, may be rounded differently, and a boundary
depends on which side of a threshold its entropy is rounded to. A row that the end of a batch cuts from a piece has the
patches of the piece; its second byte always starts one, as in every row. So patches do not depend on batches, their
order, micro-batches or ranks, and stored ones give bitwise the training that computed ones give. On a GPU the pieces of
a batch are computed together, so that boundaries within rounding of the threshold may differ.

A folder of stored patches holds

- ``index.json``: the format, what the patches were made with (`provenance`), the files (name, size, SHA-256) and, when
  all of them are done, the SHA-256 of the patches.
- ``patches.bits``: the pieces in order, one bit for each id, from the highest bit of a byte down: 1 if the id after it
  starts a patch. Every piece begins at a byte. The file is mapped to memory, not read.
- ``done``: while the folder is being made, a byte for each block of pieces, 1 once the block is on the disk.
- ``lock``: keeps other processes from the folder while one stores patches in it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import NoneType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from blt_kernels._files import locked, whole_file
from blt_kernels.ids import BYTE_OFFSET
from blt_kernels.layout import PatchLayout
from blt_kernels.models import BLT, ByteLM
from blt_kernels.train import data
from blt_kernels.train.data import Row, Source

_FORMAT = 1
_BLOCK_IDS = 1 << 16  # ids of full pieces in a block: a few seconds of work on a CPU
_CALL_IDS = 1 << 16  # ids that a GPU gets at once
_INDEX, _BITS, _DONE = "index.json", "patches.bits", "done"


class RowPatches:
    """The patches of rows, as the model cuts their pieces.

    Parameters
    ----------
    model : BLT
    context : int
        Of the pieces.
    bf16 : bool
        Whether the entropy model runs under autocast.
    stored : StoredPatches, optional
        Where the patches are looked up instead of being computed.
    """

    def __init__(self, model: BLT, context: int, bf16: bool = False, stored: StoredPatches | None = None) -> None:
        self.model, self.context, self.bf16, self.stored = model, context, bf16, stored
        # Pieces that a batch cuts go on in the next one.
        self._cut: dict[tuple[str, int], np.ndarray] = {}

    def layout(self, rows: Sequence[Row]) -> PatchLayout:
        """The patches of rows end to end, on the device of the model.

        Raises
        ------
        ValueError
            The patches of a file are not stored.
        """
        pieces = [data.piece_of(row, self.context) for row in rows]
        cuts = [np.empty(0, dtype=bool)]
        for row, piece, of_piece in zip(rows, pieces, self._of_pieces(pieces), strict=True):
            first = row.start - piece.start
            own = of_piece[first : first + row.length].copy()
            if first:
                own[0] = True  # as everywhere, the second byte of a row starts a patch
            cuts.append(own)
            if row.length < piece.length:
                self._cut[piece.source.digest, piece.start] = of_piece
        while len(self._cut) > 2:  # one that ends and one that begins
            self._cut.pop(next(iter(self._cut)))
        offsets = np.cumsum([0, *(row.length for row in rows)], dtype=np.int32)
        layout = PatchLayout.from_cuts(torch.from_numpy(np.concatenate(cuts)), torch.from_numpy(offsets)).compact()
        return layout.to(next(self.model.parameters()).device)

    def _of_pieces(self, pieces: Sequence[Row]) -> list[np.ndarray]:
        if self.stored is not None:
            return [self.stored.cuts(piece) for piece in pieces]
        found = [self._cut.get((piece.source.digest, piece.start)) for piece in pieces]
        missing = [piece for piece, cuts in zip(pieces, found, strict=True) if cuts is None]
        computed = iter(cut_pieces(self.model, missing, self.bf16))
        return [next(computed) if cuts is None else cuts for cuts in found]


def cut_pieces(
    model: BLT,
    pieces: Sequence[Row],
    bf16: bool,
    read: Callable[[Sequence[Row]], tuple[Tensor, Tensor]] = data.read_rows,
) -> list[np.ndarray]:
    """For each id of each piece, whether the one after it starts a patch: bool ``[length]``."""
    device = next(model.parameters()).device
    cuts = []
    for group in _calls(pieces, 1 if device.type == "cpu" else _CALL_IDS):
        tokens, offsets = read(group)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            layout = model.patch(tokens.to(device), offsets.to(device))
        starts_after = (layout.decode_ids == layout.patch_ids).cpu().numpy()
        cuts += np.split(starts_after, offsets[1:-1].numpy())
    return cuts


def _calls(pieces: Sequence[Row], limit: int) -> Iterator[list[Row]]:
    """Pieces in turn, as many together as have `limit` ids, and at least one."""
    group: list[Row] = []
    size = 0
    for piece in pieces:
        if group and size + piece.length > limit:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.length
    if group:
        yield group


# --- stored -----------------------------------------------------------------------------------------------------------


def provenance(model: BLT, context: int, bf16: bool) -> dict[str, Any]:
    """Return, as JSON, what the patches of a piece depend on beside its bytes."""
    patcher = model.patcher if model.config.patching == "entropy" else None
    values = {
        "entropy model": patcher and model_digest(patcher),
        **model.config.patch_rule,
        "context": context,
        "bf16": bf16,
    }
    return json.loads(json.dumps(values))


def model_digest(model: ByteLM) -> str:
    """SHA-256 of the weights and of the configuration, but for its threshold, which is a rule's."""
    config = {name: value for name, value in asdict(model.config).items() if name != "threshold"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class _Places:
    """Locates the bits of each piece of files of `sizes` bytes."""

    def __init__(self, sizes: Sequence[int], context: int) -> None:
        self.context, self.stride = context, -(-context // 8)  # bytes of a full piece
        array = np.array(sizes, dtype=np.int64)
        counts = data.num_pieces(array, context)
        last = array + 2 - (counts - 1) * (context - 1)
        self.first = np.concatenate([[0], counts.cumsum()])  # piece of each file
        self.begin = np.concatenate([[0], ((counts - 1) * self.stride - (-last // 8)).cumsum()])  # byte of each file

    @property
    def num_bytes(self) -> int:
        return int(self.begin[-1])

    def file_of(self, piece: int) -> tuple[int, int]:
        """A piece's file, and its number in the file."""
        file = int(np.searchsorted(self.first, piece, side="right")) - 1
        return file, piece - int(self.first[file])

    def byte_of(self, piece: int) -> int:
        """The first byte of a piece."""
        if piece == int(self.first[-1]):
            return self.num_bytes
        file, number = self.file_of(piece)
        return int(self.begin[file]) + number * self.stride


class StoredPatches:
    """A complete folder of stored patches.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no such folder, it is not complete, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = _read_index(folder)
        if index is None:
            raise FileNotFoundError(f"patches: no {_INDEX} in {folder}: blt-kernels patch --save {folder} makes it")
        if index["sha256"] is None:
            raise ValueError(f"patches: {folder} is not complete: start blt-kernels patch --save {folder} again")
        self.folder, self.index, files = folder, index, index["files"]
        self.places = _Places([file["size"] for file in files], self.index["made_with"]["context"])
        self.number = {file["sha256"]: i for i, file in enumerate(files)}
        path = folder / _BITS
        if not path.exists() or data.file_digest(path)[0] != self.index["sha256"]:
            raise ValueError(f"patches: {path} is damaged: it is not what {_INDEX} describes")
        expected, got = self.places.num_bytes, path.stat().st_size
        if expected != got:
            message = f"files of these sizes have {expected:,} bytes of patches, and {_BITS} has {got:,}"
            raise ValueError(f"patches: {folder / _INDEX} is damaged: {message}")
        self.bits = np.memmap(path, dtype=np.uint8, mode="r")

    def check(self, made_with: dict[str, Any], sources: Iterable[Source]) -> None:
        """Raise ValueError, naming what differs, unless the patches were made with the same and for these files.

        The index has their sizes, too, which say where the patches of each file are.
        """
        stored = self.index["made_with"]
        names = [name for name in {**stored, **made_with} if stored.get(name) != made_with.get(name)]
        if names:
            shown = "; ".join(f"{name}: expected {made_with.get(name)}, got {stored.get(name)}" for name in names)
            raise ValueError(f"patches: {self.folder} was made with something else ({shown})")
        sources = list(sources)
        missing = [source for source in sources if source.digest not in self.number]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"patches: {self.folder} has none of {missing[0].path}{more}, as the file is now")
        for source in sources:
            size = self.index["files"][self.number[source.digest]]["size"]
            if size != source.size:
                message = f"the size of {source.path}: expected {source.size}, got {size}"
                raise ValueError(f"patches: {self.folder / _INDEX} is damaged: {message}")

    def cuts(self, piece: Row) -> np.ndarray:
        """For each id of a piece, whether the one after it starts a patch: bool ``[length]``."""
        file = self.number[piece.source.digest]
        begin = int(self.places.begin[file]) + piece.start // (self.places.context - 1) * self.places.stride
        bits = self.bits[begin : begin - (-piece.length // 8)]
        return np.unpackbits(bits, count=piece.length).view(bool)


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
    """Store the patches of files, or go on where another call was killed.

    Parameters
    ----------
    folder : Path
    sources : sequence of Source
    model : BLT
        Its patcher and configuration decide about the patches; its other weights are not used.
    context : int
        Of the training.
    bf16 : bool
        Of the training.
    processes : int
        They share the threads of this one. The folder does not depend on their number.
    report : callable, optional
        Told how many ids have become done, those of earlier calls included.

    Raises
    ------
    ValueError
        The folder holds patches of other files or made with something else, or another process is writing to it; the
        message names it. Or a file is no longer what its source says: patches are of the very bytes with that digest.
        Or there are several processes and the model is not on the CPU.

    Notes
    -----
    The files are read once before anything is computed. What is stored is computed anew if it is damaged.
    """
    device = next(model.parameters()).device.type
    if processes != 1 and (processes < 1 or device != "cpu"):
        raise ValueError(
            f"processes: expected {'at least 1' if device == 'cpu' else '1 on ' + device}, got {processes}"
        )
    files = [{"name": str(s.path), "size": s.size, "sha256": s.digest} for s in sources]
    index = {"format": _FORMAT, "made_with": provenance(model, context, bf16), "files": files, "sha256": None}
    with locked(folder, "save"):
        _save(folder, index, _Blocks(sources, context), model, processes, report or (lambda _: None))


def _save(
    folder: Path, index: dict[str, Any], blocks: _Blocks, model: BLT, processes: int, report: Callable[[int], None]
) -> None:
    """`save`, while no other process does."""
    places, path = blocks.places, folder / _BITS
    stored = _read_index(folder)
    if stored is not None:
        _check_same(folder, stored, index)
        index["files"] = stored["files"]  # their names then
    if stored is not None and stored["sha256"] is not None:
        whole = path.exists() and path.stat().st_size == places.num_bytes
        whole = whole and data.file_digest(path)[0] == stored["sha256"]
        (folder / _DONE).unlink(missing_ok=True)
        if whole:
            report(data.num_ids(blocks.sources, places.context))
            return
    digests = blocks.digests()
    _write_index(folder, index)
    bits = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    done = os.open(folder / _DONE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(bits).st_size != places.num_bytes:  # then no mark can be true
            os.ftruncate(done, 0)
            os.ftruncate(bits, places.num_bytes)
        marks = os.pread(done, blocks.count, 0).ljust(blocks.count, b"\0")
        todo = [block for block in range(blocks.count) if not marks[block]]
        report(sum(blocks.num_ids(block) for block in range(blocks.count) if marks[block]))
        for block, (content, read) in _compute(model, blocks, index["made_with"]["bf16"], todo, processes):
            blocks.check_read(block, read, digests[block])
            _write_all(bits, content, places.byte_of(blocks.pieces(block).start))
            os.fsync(bits)  # before the mark says so
            os.pwrite(done, b"\1", block)
            report(blocks.num_ids(block))
        os.fsync(bits)
    finally:
        os.close(bits)
        os.close(done)
    index["sha256"] = data.file_digest(path)[0]
    _write_index(folder, index)
    (folder / _DONE).unlink(missing_ok=True)


class _Blocks:
    """Pieces, cut into blocks of as many."""

    def __init__(self, sources: Sequence[Source], context: int) -> None:
        self.sources, self.places = sources, _Places([source.size for source in sources], context)
        self.size = max(1, _BLOCK_IDS // context)
        self.total = int(self.places.first[-1])
        self.count = -(-self.total // self.size)

    def pieces(self, block: int) -> range:
        return range(block * self.size, min((block + 1) * self.size, self.total))

    def rows(self, block: int) -> Iterator[Row]:
        for piece in self.pieces(block):
            file, number = self.places.file_of(piece)
            yield data.find_piece(self.sources[file], number, self.places.context)

    def num_ids(self, block: int) -> int:
        return sum(row.length for row in self.rows(block))

    def bits(self, model: BLT, block: int, bf16: bool) -> tuple[bytes, list[bytes]]:
        """Return what `patches.bits` holds of a block, and the digests of what was read for it, as in `digests`."""
        reader = _Reader()
        cuts = cut_pieces(model, list(self.rows(block)), bf16, reader)
        return b"".join(np.packbits(each).tobytes() for each in cuts), reader.digests

    def digests(self) -> list[list[bytes]]:
        """For each block, a digest of what it has of each of its files.

        Raises
        ------
        ValueError
            A file is no longer what it was when it was found.
        """
        digests, whole = [], hashlib.sha256()
        for block in range(self.count):
            reader = _Reader()
            for row in self.rows(block):
                ids = reader([row])[0].numpy()
                ends = row.start + row.length == row.source.size + 2
                whole.update(
                    (ids[1 : -1 if ends else None] - BYTE_OFFSET).astype(np.uint8).tobytes()
                )  # the first one is known
                if ends and whole.hexdigest() != row.source.digest:
                    raise _changed(row.source)
                whole = hashlib.sha256() if ends else whole
            digests.append(reader.digests)
        return digests

    def check_read(self, block: int, read: list[bytes], expected: list[bytes]) -> None:
        """Raise ValueError, naming a file, unless what was read for a block has the digests expected."""
        sources = dict.fromkeys(row.source for row in self.rows(block))
        for source, one, other in zip(sources, read, expected, strict=True):
            if one != other:
                raise _changed(source)


def _changed(source: Source) -> ValueError:
    return ValueError(f"{source.path}: the file has changed while patches were stored: bring it back or start anew")


class _Reader:
    """Reads rows, and computes a digest of what it has read of each file."""

    def __init__(self) -> None:
        self.files: dict[Source, Any] = {}

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """As `data.read_rows`."""
        parts = [data.read_ids(*row) for row in rows]
        for row, ids in zip(rows, parts, strict=True):
            # Modulo 256, which takes no two bytes to one, nor BOS or EOS to what could be in their place.
            self.files.setdefault(row.source, hashlib.sha256()).update(ids.astype(np.uint8).tobytes())
        return data.pack_rows(parts)

    @property
    def digests(self) -> list[bytes]:
        return [digest.digest() for digest in self.files.values()]


# --- processes --------------------------------------------------------------------------------------------------------


def _compute(
    model: BLT, blocks: _Blocks, bf16: bool, todo: Sequence[int], processes: int
) -> Iterator[tuple[int, tuple[bytes, list[bytes]]]]:
    """Yield blocks and their `_Blocks.bits`, in the order in which they are done."""
    processes = min(processes, len(todo))
    if processes <= 1:
        yield from ((block, blocks.bits(model, block, bf16)) for block in todo)
        return
    left = iter(todo)
    with _workers(model, blocks, bf16, processes) as connections:
        busy = {connection: next(left) for connection in connections}
        for connection, block in busy.items():
            connection.send(block)
        while busy:
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                block = busy.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise ValueError("processes: one of them was killed: is there memory for as many?") from None
                if isinstance(answer, Exception):
                    raise answer
                following = next(left, None)
                if following is not None:
                    busy[connection] = following
                    connection.send(following)
                yield block, answer


@contextmanager
def _workers(model: BLT, blocks: _Blocks, bf16: bool, count: int) -> Iterator[list[Connection]]:
    """Processes that answer the number of a block with its bits; they end when their connection does."""
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    threads = max(1, torch.get_num_threads() // count)
    connections, started = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, model, blocks, bf16, threads), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            started.append(process)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in started:
            process.terminate()
            process.join()


def _work(connection: Connection, model: BLT, blocks: _Blocks, bf16: bool, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it the connection
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError):
        while True:
            block = connection.recv()
            try:
                answer: tuple[bytes, list[bytes]] | Exception = blocks.bits(model, block, bf16)
            except Exception as error:
                answer = error
            connection.send(answer)


# --- files ------------------------------------------------------------------------------------------------------------


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index in a folder; None if there is none."""
    path = folder / _INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = index["format"] == _FORMAT and isinstance(index["sha256"], (str, NoneType))
        known &= isinstance(index["made_with"]["context"], int) and 2 <= index["made_with"]["context"] < 1 << 48
        for file in index["files"]:
            known &= isinstance(file["size"], int) and 0 < file["size"] < 1 << 48
            known &= isinstance(file["sha256"], str)
        known &= len({file["sha256"] for file in index["files"]}) == len(index["files"]) > 0
    except (ValueError, LookupError, TypeError):
        known = False
    if not known:
        raise ValueError(f"patches: {path} is no index of stored patches of format {_FORMAT}")
    return index


def _check_same(folder: Path, stored: dict[str, Any], index: dict[str, Any]) -> None:
    old, new = stored["made_with"], index["made_with"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    shown = [f"{name}={old.get(name)!r}" for name in names]
    if [(f["sha256"], f["size"]) for f in stored["files"]] != [(f["sha256"], f["size"]) for f in index["files"]]:
        shown.append("files")
    if shown:
        raise ValueError(f"save: {folder} holds patches of something else ({', '.join(shown)}): choose another folder")


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    with whole_file(folder / _INDEX) as part, part.open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
