"""Mutations of pickles and of the archives of ``torch.save``, and pickles that run code or take all memory."""

from __future__ import annotations

import io
import pickle
import random
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

from fuzz.byte_mutations import flips, noise

CANARY = "canary"  # code that a file smuggles in makes this file beside the folder


def pickle_file(file: Path, random: random.Random) -> None:
    """Change a pickle, or put one that calls something in its place."""
    file.write_bytes(mutated_pickle(file.read_bytes(), random, file))


def mutated_pickle(content: bytes, random: random.Random, file: Path) -> bytes:
    """Return another pickle."""
    draw = random.random()
    if draw < 0.4:
        return random.choice(hostile_pickles(file))
    changed = bytearray(content)
    if draw < 0.7 and changed:  # opcodes that take numbers are frequent
        for _ in range(random.choice((1, 2, 4))):
            byte = random.choice((0, 1, 0x7F, 0x80, 0xFF, *b"cRi(.}]\x81\x93\x8a\x8bMJKhjqr0t"))
            changed[random.randrange(len(changed))] = byte
        return bytes(changed)
    names = b"_rebuild_tensor_v2 OrderedDict FloatStorage Metadata TensorStorageMetadata _StorageInfo Size float32"
    others = b"system _rebuild_parameter UntypedStorage bytearray Counter DoubleStorage MetadataIndex x"
    name = random.choice([name for name in names.split() if name in content] or [b"torch"])
    return content.replace(name, random.choice(others.split()), random.choice((1, -1)))


def hostile_pickles(file: Path) -> list[bytes]:
    """Return pickles that run code, that take gigabytes or hours, or that are no object of the format."""
    canary = str(_beside(file) / CANARY)
    code = f"open({canary!r}, 'w')"
    calls: list[tuple[str, str, tuple[Any, ...]]] = [
        ("builtins", "exec", (code,)),
        ("builtins", "eval", (code,)),
        ("builtins", "open", (canary, "w")),
        ("os", "system", (f"touch {canary}",)),
        ("posix", "system", (f"touch {canary}",)),
        ("os", "mkdir", (canary,)),
        ("pathlib", "Path.touch", (canary,)),
        ("subprocess", "Popen", (["touch", canary],)),
        ("torch.hub", "load", (canary, "x", "local")),
        ("torch.serialization", "load", (canary,)),
        ("torch", "save", (0, canary)),
        ("numpy", "save", (canary, 0)),
        ("builtins", "getattr", ((), "__class__")),
        ("builtins", "bytearray", (1 << 36,)),
        ("builtins", "set", ([1, 2],)),
        ("collections", "Counter", ("abc",)),
        ("torch.storage", "UntypedStorage", (1 << 40,)),
        ("torch.storage", "TypedStorage", (1 << 40,)),
        ("torch", "FloatTensor", (1 << 40,)),
        ("torch", "Tensor", (1 << 40,)),
        ("torch.nn.parameter", "Parameter", (0,)),
        ("torch._utils", "_rebuild_meta_tensor_no_storage", (0, (1 << 62, 4), (1, 1), False)),
        ("torch._utils", "_rebuild_tensor_v2", (0, 0, (1 << 40,), (0,), False, None)),
        ("torch.distributed.checkpoint.metadata", "Metadata", ({},)),
        ("torch.distributed.checkpoint.metadata", "Metadata", (0, 0, 0)),
    ]
    made = [b"\x80\x02c" + f"{m}\n{n}\n".encode() + pickle.dumps(args, 2)[2:-1] + b"R." for m, n, args in calls]
    made.append(nested_call("builtins", "bytearray", 1 << 36))
    made.append(nested_call("torch.storage", "UntypedStorage", 1 << 40))
    values = (0, None, [], {}, {"model": {}}, {"model": None}, {"model": {0: 1}}, {"x" * 100_000: 0}, {("a",): 0})
    made += [pickle.dumps(value, 2) for value in values]
    # A tuple that holds the tuple before it twice: printing and hashing the last one take 2^60 steps.
    nested = b"))\x86q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    made.append(b"\x80\x02}" + nested + b"K\x00s.")
    made.append(b"\x80\x02}X\x05\x00\x00\x00model" + nested + b"s.")
    made.append(b"\x80\x02" + b"(" * 20_000 + b".")
    made.append(b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".")
    made.append(b"\x80\x02X\xff\xff\xff\x7fx.")
    made.append(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.")
    made.append(b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"x.")
    made.append(b"\x80\x02Nr\xff\xff\xff\x7f.")  # a memo of two billion entries
    return made


def nested_call(module: str, name: str, argument: int) -> bytes:
    """Return a pickle with a function of torch that calls a global among its arguments."""
    function = f"c{module}\n{name}\n".encode()
    arguments = b"(" + function + b"ctorch\nTensor\n" + pickle.dumps((argument,), 2)[2:-1] + b"}t"
    return b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n" + arguments + b"R."


def _beside(file: Path) -> Path:
    """Return the folder above that of a case, in which `CANARY` would be."""
    return next((parent.parent for parent in file.parents if parent.name == "case"), file.parent)


def torch_file(file: Path, random: random.Random) -> None:
    """Change a file of ``torch.save``: its zip archive, or its pickle."""
    content = file.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError, struct.error):
        if content[:1] == b"\x80" and random.random() < 0.5:  # pickles without an archive
            file.write_bytes(mutated_pickle(content, random, file))
            return
        return flips(file, random)
    if not members:
        return noise(file, random)
    if random.random() < 0.2:  # what the archive says about its members, at its end
        return _central_directory(file, content, random)
    if random.random() < 0.55:
        members = [(n, mutated_pickle(c, random, file) if n.endswith("data.pkl") else c) for n, c in members]
    else:
        i = random.randrange(len(members))
        name, stored = members[i]
        members[i] = random.choice(
            (
                (name, stored[: len(stored) // 2]),
                (name, b""),
                (name, stored + b"\0" * 64),
                ("../../" + name, stored),
                ("/" + name, stored),
                (name.rpartition("/")[0] + "/byteorder", b"big"),
                (name.rpartition("/")[0] + "/byteorder", b"\xff"),
                (name.rpartition("/")[0] + "/.storage_alignment", b"0"),
                (name.rpartition("/")[0] + "/.storage_alignment", b"9" * 5000),
                (name, b"\0" * (1 << 22)),  # 4 MiB, which deflate to 4 KiB
            )
        )
        if random.random() < 0.2:
            members.append(members[i])
    method = random.choice((zipfile.ZIP_STORED,) * 3 + (zipfile.ZIP_DEFLATED,))
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # a name may be there twice
        for name, stored in members:
            archive.writestr(name, stored)
    file.write_bytes(out.getvalue())


def _central_directory(file: Path, content: bytes, random: random.Random) -> None:
    changed = bytearray(content)
    entries = [i for i in range(len(changed) - 46) if changed[i : i + 4] == b"PK\1\2"]
    if not entries:
        return flips(file, random)
    entry = random.choice(entries)
    # compression method, CRC, compressed size, uncompressed size, offset of the member
    at, size = random.choice(((10, 2), (16, 4), (20, 4), (24, 4), (24, 4), (42, 4)))
    value = random.choice((0, 1, 8, 99, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 30)) % (1 << 8 * size)
    changed[entry + at : entry + at + size] = value.to_bytes(size, "little")
    file.write_bytes(changed)
