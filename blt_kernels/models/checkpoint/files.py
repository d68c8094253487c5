"""Reads and writes configurations and weights in a directory, or in a repository on the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from blt_kernels._files import listed, shortened, whole_file
from blt_kernels._pickles import check_torch_file, check_torch_stream
from blt_kernels.models.checkpoint.fields import Values
from blt_kernels.models.weights import open_safetensors, write_safetensors

Names = Callable[[str], list[str]]

CONFIGURATIONS = ("config.json", "params.json")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "consolidated/consolidated.safetensors",
    "consolidated.safetensors",
    "consolidated/consolidated.pth",
    "consolidated.pth",
)


class Folder:
    """Finds files by name in a directory, or in a folder of a repository on the hub.

    A branch may move between two downloads. So the first file that is found decides the commit of all others.
    """

    def __init__(self, path: str, repository: str | None, revision: str | None, commit: str | None = None) -> None:
        self.path, self.repository, self.revision, self.commit = path, repository, revision, commit

    @staticmethod
    def open(path: str | os.PathLike[str], revision: str | None) -> Folder:
        """Return the folder of a directory or of ``owner/name/folder``, FileNotFoundError if the path is neither."""
        path = os.fspath(path)
        if os.path.isdir(path):
            return Folder(path, None, None)
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)/?((?:\w[\w.-]*/?)*)", path)
        if match is None:
            raise FileNotFoundError(f"path: expected a directory or a repository on the hub, got {path}")
        return Folder(match[2], match[1], revision)

    def __str__(self) -> str:
        return self.path if self.repository is None else str(PurePosixPath(self.repository, self.path))

    def patcher(self) -> Folder | None:
        """Return the folder of a BLT's entropy model, in its own folder or beside it; None if there is none."""
        parents = [self.path]
        if self.path or self.repository is None:
            parents.append(os.path.join(self.path, "..") if self.repository is None else os.path.dirname(self.path))
        hub = (self.repository, self.revision, self.commit)
        places = (Folder(os.path.join(p, "entropy_model"), *hub) for p in parents)
        return next((place for place in places if place.find(*CONFIGURATIONS)), None)

    def find(self, *names: str) -> Path | None:
        """Return the first of these files that exists, None if none does."""
        files = (self._local(name) if self.repository is None else self._remote(name) for name in names)
        return next((file for file in files if file is not None), None)

    def get(self, *names: str) -> Path:
        """Return the first of these files that exists, FileNotFoundError if none does."""
        file = self.find(*names)
        if file is None:
            raise FileNotFoundError(f"{self}: expected {' or '.join(names)}, found none")
        return file

    def json(self, *names: str) -> Values:
        """Return the values in the first of these files that exists."""
        return Values.read(self.get(*names))

    def weights(self) -> dict[str, Tensor]:
        """Return all tensors by their names, mapped to memory."""
        file = self.get(*WEIGHTS)
        if file.suffix == ".pth":
            return _pickled(file)
        shards = [file]
        if file.suffix == ".json":
            places = Values.read(file).inner("weight_map")
            if not places or not all(isinstance(name, str) for name in places.values()):
                shown = shortened(dict(places))
                raise ValueError(f"{places}: expected the names of files by those of weights, got {shown}")
            for name in (names := sorted(set(places.values()))):
                if not re.fullmatch(r"[^/]{1,255}", name) or name in (".", "..") or not name.isprintable():
                    raise ValueError(f"{places}: expected names of files in its folder, got {shortened(name)}")
            shards = [self.get(name) for name in names]
        tensors = {}
        for shard in shards:
            with open_safetensors(shard) as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        return tensors

    def _local(self, name: str) -> Path | None:
        file = Path(self.path, name)
        return file if file.is_file() else None

    def _remote(self, name: str) -> Path | None:
        try:
            import huggingface_hub as hub
        except ImportError as error:
            message = f"there is no directory {self}, and the hub needs huggingface_hub: pip install 'blt-kernels[hub]'"
            raise ImportError(message) from error
        assert self.repository is not None
        file, revision = str(PurePosixPath(self.path, name)), self.commit or self.revision
        try:
            found = Path(hub.hf_hub_download(self.repository, file, revision=revision))
            snapshot = found.parents[len(PurePosixPath(file).parts) - 1].name  # .../snapshots/COMMIT/FILE
            self.commit = snapshot if re.fullmatch("[0-9a-f]{40}", snapshot) else self.commit
            return found
        except hub.errors.LocalEntryNotFoundError as error:  # it is not in the cache, and no answer came
            if hub.try_to_load_from_cache(self.repository, file, revision=revision) is hub._CACHED_NO_EXIST:
                return None
            reason = error if error.__cause__ is None else error.__cause__
            raise ConnectionError(f"{self}: the hub does not say whether there is {name}: {reason}") from error
        except hub.errors.EntryNotFoundError:
            return None
        except hub.errors.GatedRepoError as error:
            raise PermissionError(f"{self.repository}: the hub gives no access to it: {error}") from error
        except hub.errors.RepositoryNotFoundError as error:
            where = f"{self.repository}: there is no such directory, and no repository on the hub but private ones"
            raise FileNotFoundError(f"{where}: {error}") from error
        except hub.errors.RevisionNotFoundError as error:
            raise ValueError(f"revision: expected one of {self.repository}, got {self.revision!r}") from error
        except UnicodeError as error:
            raise ValueError(f"{self}: the cache of the hub is damaged: {error}") from error
        except (OSError, ValueError):
            raise
        except Exception as error:  # the HTTP client differs between versions of the hub's package
            raise ConnectionError(f"{self}: {name} could not be downloaded: {error!r}") from error


def _pickled(file: Path) -> dict[str, Tensor]:
    """Return the weights under "model" in a file of `torch.save`, without running code that is in it."""
    try:
        with file.open("rb") as opened:
            size, archived = os.fstat(opened.fileno()).st_size, opened.read(4) == b"PK\3\4"
            (check_torch_file if archived else check_torch_stream)(opened, size)
        state = torch.load(file, map_location="cpu", mmap=archived, weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # zip files, pickles and torch raise different ones
        reason = f"{type(error).__name__}: {shortened(str(error), 500)[1:-1]}"
        raise ValueError(f"{file}: expected weights of torch.save, got {reason}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        keys = [key for key in state if isinstance(key, str)] if isinstance(state, dict) else []
        got = listed(keys) or type(state).__name__
        raise ValueError(f"{file}: expected weights under 'model', got {got}")
    return {k: v for k, v in state["model"].items() if isinstance(k, str) and isinstance(v, Tensor)}


def write(model: nn.Module, path: str | os.PathLike[str], values: Mapping[str, Any], names: Names) -> None:
    """Write ``config.json`` with `values`, and the weights under the first of their `names`."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {names(name)[0]: value for name, value in model.state_dict().items()}
    dtype = str(model.get_parameter("lm_head.weight").dtype).removeprefix("torch.")
    with whole_file(folder / "config.json") as part:  # it appears only once the weights are written
        part.write_text(json.dumps({**values, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
