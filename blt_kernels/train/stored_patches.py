"""Reads patches that were computed ahead of training from the folder that holds them.

A folder of stored patches holds

- ``index.json``: the format, what the patches were made with (`provenance`), the files (name, size, SHA-256) and, when
  all of them are done, the SHA-256 of the patches.
- ``patches.bits``: the pieces in order, one bit for each id, from the highest bit of a byte down: 1 if the id after it
  starts a patch. Every piece begins at a byte. The file is mapped to memory, not read.
- ``done``: while the folder is being made, a byte for each block of pieces, 1 once the block is on the disk.
- ``lock``: keeps other processes from the folder while one stores patches in it.

`blt_kernels.train.save_patches` writes the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch

from blt_kernels._files import LIST_BYTES, read_json, whole_file
from blt_kernels.models import BLT, ByteLM
from blt_kernels.train import data
from blt_kernels.train.data import Pieces, Row, Source

FORMAT = 1
INDEX, BITS, DONE = "index.json", "patches.bits", "done"


def provenance(model: BLT, context: int, bf16: bool) -> dict[str, Any]:
    """Return, as JSON, all that the patches of a piece depend on besides its bytes."""
    patcher = model.patcher if model.config.patching == "entropy" else None
    values = {
        "entropy model": patcher and model_digest(patcher),
        **model.config.patch_rule,
        "context": context,
        "bf16": bf16,
    }
    return json.loads(json.dumps(values))


def model_digest(model: ByteLM) -> str:
    """Return SHA-256 of the weights and of the configuration without its threshold, which belongs to the rule."""
    config = {name: value for name, value in asdict(model.config).items() if name != "threshold"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def byte_offsets(pieces: Pieces) -> np.ndarray:
    """Return at which byte of ``patches.bits`` each piece begins, and where the last one ends."""
    return np.concatenate([[0], (-(-pieces.length // 8)).cumsum()])


class StoredPatches:
    """Reads a complete folder of stored patches.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no such folder, it is not complete, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        if index is None:
            raise FileNotFoundError(f"patches: no {INDEX} in {folder}: blt-kernels patch --save {folder} makes it")
        if index["sha256"] is None:
            raise ValueError(f"patches: {folder} is not complete: start blt-kernels patch --save {folder} again")
        self.folder, self.index, files = folder, index, index["files"]
        path = folder / BITS
        sizes, got = [file["size"] for file in files], path.stat().st_size if path.is_file() else -1
        most = sum(size + 1 + data.num_pieces(size, index["made_with"]["context"]) for size in sizes)  # a byte an id
        if not 0 <= got <= most or data.file_digest(path)[0] != self.index["sha256"]:
            raise ValueError(f"patches: {path} is damaged: it is not what {INDEX} describes")
        damaged = (
            f"patches: {folder / INDEX} is damaged: files of these sizes have %s bytes of patches, {BITS} has {got:,}"
        )
        if sum(sizes) > 8 * got:  # the table of their pieces might not fit into memory
            raise ValueError(damaged % f"{sum(sizes) // 8:,} or more")
        self.pieces = Pieces(sizes, index["made_with"]["context"])
        self.offsets = byte_offsets(self.pieces)
        self.number = {file["sha256"]: i for i, file in enumerate(files)}
        if self.offsets[-1] != got:
            raise ValueError(damaged % f"{self.offsets[-1]:,}")
        self.bits = np.memmap(path, dtype=np.uint8, mode="r")

    def check(self, made_with: dict[str, Any], sources: Iterable[Source]) -> None:
        """Raise ValueError, naming what differs, unless the patches were made with the same and for these files.

        The index has their sizes too, from which the places of their patches follow.
        """
        stored = self.index["made_with"]
        names = [name for name in {**stored, **made_with} if stored.get(name) != made_with.get(name)]
        if names:
            shown = "; ".join(
                f"{name}: expected {made_with.get(name)}, got {stored.get(name)!s:.200}" for name in names
            )
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
                raise ValueError(f"patches: {self.folder / INDEX} is damaged: {message}")

    def boundaries(self, piece: Row) -> np.ndarray:
        """Return, for each id of a piece, whether the next id starts a patch: bool ``[length]``."""
        first = self.pieces.first[self.number[piece.source.digest]]
        number = first + piece.start // (self.index["made_with"]["context"] - 1)
        bits = self.bits[self.offsets[number] : self.offsets[number + 1]]
        return np.unpackbits(bits, count=piece.length).view(bool)


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return the index in a folder; None if there is none."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index = read_json(path, LIST_BYTES)
        known = index["format"] == FORMAT and isinstance(index["sha256"], (str, NoneType))
        known &= isinstance(index["made_with"]["context"], int) and 2 <= index["made_with"]["context"] < 1 << 48
        for file in index["files"]:
            known &= isinstance(file["size"], int) and 0 < file["size"] < 1 << 48
            known &= isinstance(file["sha256"], str)
        known &= len({file["sha256"] for file in index["files"]}) == len(index["files"]) > 0
    except (ValueError, LookupError, TypeError):
        known = False
    if not known:
        raise ValueError(f"patches: {path} is no index of stored patches of format {FORMAT}")
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index to the disk, whole or not at all."""
    with whole_file(folder / INDEX) as part, part.open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
