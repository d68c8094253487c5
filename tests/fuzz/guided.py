"""Fuzzes the readers that pure Python decides about with atheris, which is guided by coverage.

``python -m fuzz.guided SECONDS SEED REPORT``, in a process of its own: atheris instruments modules as they are
imported, and never returns. A find does not end the run. Counts and finds are written to REPORT as JSON as it goes on.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import atheris
import torch

with atheris.instrument_imports(include=["blt_kernels.models", "blt_kernels.train", "blt_kernels.nn", "blt_kernels._"]):
    from blt_kernels import _pickles
    from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig
    from blt_kernels.models.checkpoint import bytelatent, transformers
    from blt_kernels.models.checkpoint.fields import Values
    from blt_kernels.models.stored_config import config_from_dict
    from blt_kernels.models.weights import empty_model
    from blt_kernels.train import log, state, stored_patches

from fuzz import valid_files as valid
from fuzz.file_mutations import mutated_json
from fuzz.pickle_mutations import CANARY, mutated_pickle
from fuzz.valid_files import ARGS, ENTROPY, RULES

WORK = Path(tempfile.mkdtemp(prefix="fuzz-guided-"))
FILE = WORK / "case" / "file"
TENSORS = 20


def _values(text: bytes) -> Values:
    FILE.write_bytes(text)
    return Values.read(FILE)


def _built(cls: Any, config: Any) -> None:
    empty_model(str(FILE), cls, config, "fused", TENSORS)


def _config(cls: Any, text: bytes) -> None:
    values = _values(text)
    try:
        config = config_from_dict(cls.config_class, values)
    except TypeError:  # `stored_config` makes ValueErrors of them
        return
    _built(cls, config)


def _blt(text: bytes) -> None:
    _built(BLT, transformers.read_blt(_values(text)))


def _patcher(text: bytes) -> None:
    _built(ByteLM, transformers.read_byte_lm(_values(text)))


def _llama(text: bytes) -> None:
    transformers.read_llama(_values(text))


def _bytelatent(text: bytes) -> None:
    values = _values(text)
    _built(BLT, bytelatent.read_blt(values, values))


def _bytelatent_patcher(text: bytes) -> None:
    _built(ByteLM, bytelatent.read_byte_lm(_values(text)))


def _index(text: bytes) -> None:
    (FILE.parent / "index.json").write_bytes(text)
    index = stored_patches.read_index(FILE.parent)
    if index is not None and index["sha256"] is not None:
        stored_patches.StoredPatches(FILE.parent)


def _run(text: bytes) -> None:
    (FILE.parent / "values.json").write_bytes(text)
    state.read_values(FILE.parent)


def _log(text: bytes) -> None:
    FILE.write_bytes(text + b"\n")
    log.read_log(FILE)


def _metadata(content: bytes) -> None:
    (FILE.parent / ".metadata").write_bytes(content)
    with state._reading(FILE.parent):
        state._Reader(FILE.parent).read_metadata()


def _pickle(content: bytes) -> None:
    _pickles.check_pickle(io.BytesIO(content), len(content))


def _archive(content: bytes) -> None:
    _pickles.check_torch_file(io.BytesIO(content), len(content))


def _documents() -> list[tuple[Callable[[bytes], None], bytes, bool]]:
    """Return every reader, a valid file for it, and whether that is JSON."""
    made: dict[str, Path] = {}
    for name in ("transformers", "transformers_patcher", "llama", "checkpoint", "patches", "bytelatent", "log"):
        made[name] = WORK / name
        made[name].mkdir()
        getattr(valid, f"save_{name}")(made[name])
    archive = io.BytesIO()
    torch.save({"model": {"a": torch.ones(3), "b": torch.ones(2, 2)}}, archive)
    params = {"model": ARGS, "entropy_model": None, "data": {"patcher_args": RULES}}
    megabyte = MegaByteConfig(2, valid.WIDE, valid.LOCAL, cross_patch=1, conv_sizes=(3,))
    return [
        (_blt, (made["transformers"] / "config.json").read_bytes(), True),
        (_patcher, (made["transformers_patcher"] / "config.json").read_bytes(), True),
        (_llama, (made["llama"] / "config.json").read_bytes(), True),
        (_bytelatent, json.dumps(params).encode(), True),
        (_bytelatent_patcher, json.dumps({"entropy_model": ENTROPY}).encode(), True),
        (lambda text: _config(ByteLM, text), _as_json(valid.LM), True),
        (lambda text: _config(BLT, text), _as_json(valid.BLT_CONFIG), True),
        (lambda text: _config(MegaByte, text), _as_json(megabyte), True),
        (_index, (made["patches"] / "stored" / "index.json").read_bytes(), True),
        (_run, (made["checkpoint"] / "checkpoint" / "2" / "values.json").read_bytes(), True),
        (_log, (made["log"] / "log.jsonl").read_bytes().splitlines()[0], True),
        (_metadata, (made["checkpoint"] / "checkpoint" / "2" / ".metadata").read_bytes(), False),
        (_pickle, _pickle_of(made["bytelatent"] / "consolidated.pth"), False),
        (_archive, archive.getvalue(), False),
    ]


def _as_json(config: ByteLMConfig | BLTConfig | MegaByteConfig) -> bytes:
    return json.dumps(asdict(config)).encode()


def _pickle_of(file: Path) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def main(seconds: int, seed: int, report: Path) -> None:
    FILE.parent.mkdir()
    documents = _documents()
    corpus = WORK / "corpus"
    corpus.mkdir()
    shutil.copy(WORK / "checkpoint" / "checkpoint" / "2" / "__0_0.distcp", FILE.parent)  # .metadata leads to it
    for i, (_, content, _) in enumerate(documents):
        (corpus / str(i)).write_bytes(bytes([i]) + content)
    counts = {"calls": 0, "accepted": 0, "refused": 0}
    finds: dict[str, str] = {}

    def one(data: bytes) -> None:
        reader, _, _ = documents[data[0] % len(documents)] if data else documents[0]
        counts["calls"] += 1
        try:
            reader(data[1:])
            counts["accepted"] += 1
        except (ValueError, OSError):
            counts["refused"] += 1
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{type(error).__name__} in {Path(frames[-1].filename).name}:{frames[-1].lineno}"
            finds.setdefault(place, f"{reader.__name__} {data[:3000]!r} {str(error)[:300]}")
        if (WORK / CANARY).exists():
            finds.setdefault("code", repr(data[:3000]))
        if counts["calls"] % 500 == 0:
            report.write_text(json.dumps({"counts": counts, "finds": finds}))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if not data or draw.random() < 0.3:
            return atheris.Mutate(data, max_size)
        head, content = data[:1], data[1:]
        try:
            if documents[head[0] % len(documents)][2]:
                content = mutated_json(content.decode(), draw).encode(errors="replace")
            else:
                content = mutated_pickle(content, draw, FILE)
        except (ValueError, RecursionError, TypeError, AttributeError):
            return atheris.Mutate(data, max_size)
        return (head + content)[:max_size]

    options = [f"-max_total_time={seconds}", f"-seed={seed + 1}", "-rss_limit_mb=4000", "-timeout=30", "-max_len=40000"]
    atheris.Setup(["fuzz", *options, "-verbosity=0", str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
