"""Mutations of files: of JSON, of safetensors, and of what is in the place of a file.

`mutate` changes a folder in place. Everything is drawn from one `random.Random`, so a seed gives the same files again.
"""

from __future__ import annotations

import json
import math
import os
import random
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from fuzz.byte_mutations import BYTES, flips, noise
from fuzz.pickle_mutations import pickle_file, torch_file

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 5, 7, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30),
    *(-(2**31), -(2**63), 0.5, -0.0, 1e-45, 5e-324, 1e9, 1e18, 1e308, -1e308, math.nan, math.inf, -math.inf),
)
STRINGS = ("", "x", "0", "16", "nan", "\0", "\ud800", "é" * 50, "../" * 8 + "etc/passwd", "/dev/zero", "x" * 100_000)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": 0}, [0] * 50, [1, 2, 3, 4], {"dim": 8})
DEPTHS = (10, 999, 5_000, 200_000)


def mutate(folder: Path, random: random.Random, without: Collection[str] = ()) -> str:
    """Change one thing in a folder by none of the mutations `without`, and return a description of it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink() and _is_small(file))
    if not files:
        return "nothing is left to change"
    file = random.choice(files)
    if random.random() < 0.08:
        how = random.choice(_PLACES)
    elif random.random() < 0.25:
        how = random.choice(BYTES)
    else:
        how = _structured(file)
    if how.__name__ in without or (how is sparse and file.name == "text"):  # all of a text is read, however long
        how = flips
    try:
        how(file, random)
    except (
        ValueError,
        LookupError,
        RecursionError,
        AttributeError,
        TypeError,
    ):  # an earlier mutation has left another format
        flips(file, random)
    return f"{how.__name__.strip('_')} {file.relative_to(folder)}"


def _is_small(file: Path) -> bool:
    return file.stat().st_size < 1 << 24


def _structured(file: Path) -> Callable[[Path, random.Random], None]:
    """Return the mutation that knows the format of a file."""
    if file.suffix == ".json":
        return json_file
    if file.suffix == ".jsonl":
        return json_lines
    if file.suffix == ".safetensors":
        return safetensors_file
    if file.suffix in (".pth", ".distcp"):
        return torch_file
    if file.name == ".metadata":
        return pickle_file
    return noise


# Places


def pipe(file: Path, random: random.Random) -> None:
    """Put a named pipe, which no process writes to, in the place of a file."""
    file.unlink()
    os.mkfifo(file)


def unix_socket(file: Path, random: random.Random) -> None:
    """Put a socket in the place of a file."""
    file.unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(file.parent)  # the names of sockets are short
        try:
            bound.bind(file.name)
        finally:
            os.chdir(here)


def folder(file: Path, random: random.Random) -> None:
    """Put a directory in the place of a file."""
    file.unlink()
    file.mkdir()


def link(file: Path, random: random.Random) -> None:
    """Put a link in the place of a file: one to itself, to nothing, to a device without end, or to its directory."""
    file.unlink()
    file.symlink_to(random.choice((file.name, "nowhere", "/dev/zero", "/dev/null", "/proc/self/mem", ".")))


def removal(file: Path, random: random.Random) -> None:
    """Remove a file."""
    file.unlink()


def sparse(file: Path, random: random.Random) -> None:
    """Give a file a size of up to a terabyte, of which nothing is on the disk."""
    os.truncate(file, random.choice((1 << 31, 1 << 36, 1 << 40)))


_PLACES = (pipe, unix_socket, folder, link, removal, sparse)


# JSON


def json_file(file: Path, random: random.Random) -> None:
    """Change the JSON in a file."""
    text = mutated_json(file.read_text(encoding="utf-8"), random)
    encoding = random.choice(("utf-8",) * 12 + ("utf-16", "utf-8-sig", "utf-32-be"))
    file.write_bytes(text.encode(encoding, "surrogatepass"))


def json_lines(file: Path, random: random.Random) -> None:
    """Change one of the lines of JSON in a file."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if not lines:
        return noise(file, random)
    i = random.randrange(len(lines))
    lines[i] = mutated_json(lines[i], random) + "\n"
    file.write_text("".join(lines), encoding="utf-8", errors="surrogatepass")


def mutated_json(text: str, random: random.Random) -> str:
    """Return other JSON, or what is almost JSON."""
    draw = random.random()
    if draw < 0.06:  # in place of the document
        others = ('"x"', "[]", "{}", "null", "0", "1e999", "", "NaN", '{"a": 1}{"a": 2}', text + "x", "\ufeff" + text)
        return random.choice(others)
    document = json.loads(text)
    places = list(_places(document))
    if not places:
        return json.dumps(random.choice(OTHERS))
    parent, key = random.choice(places)
    if draw < 0.75:
        _replace(parent, key, random)
        return json.dumps(document)
    marker = "a place that no file has"
    parent[key] = marker
    text = json.dumps(document)
    depth = random.choice(DEPTHS)
    raw = random.choice(
        (
            "[" * depth + "]" * depth,
            '{"a":' * depth + "0" + "}" * depth,
            "[" * depth,
            "9" * random.choice((40, 400, 4_301, 100_000)),
            "-" + "9" * 400 + ".0",
            "1e" + "9" * 20,
            '"' + "\\u0000" * 10 + '"',
            '"x',
            '{"a": 0, "a": 1}',
            "Infinity",
        )
    )
    if isinstance(key, str) and random.random() < 0.2:  # a key twice
        name = json.dumps(key)
        text, raw = text.replace(f"{name}:", f"{name}: null, {name}:", 1), "1"
    return text.replace(json.dumps(marker), raw)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a document: an object or list, and the key or index in it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(inner):
        yield value, key
        yield from _places(child)


def _replace(parent: Any, key: Any, random: random.Random) -> None:
    """Change one value, or the names and the number of values around it."""
    value = parent[key]
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.3:
        parent[key] = value + random.choice((-1, 1, value, -2 * value, 8))
        return
    draw = random.random()
    if draw < 0.45:
        parent[key] = random.choice(NUMBERS)
    elif draw < 0.6:
        parent[key] = random.choice(STRINGS)
    elif draw < 0.75:
        parent[key] = random.choice(OTHERS)
    elif draw < 0.8:
        parent[key] = random.choice((str(value), [value], {"a": value}))
    elif draw < 0.9:
        del parent[key]
    elif isinstance(parent, dict):
        other = random.choice(list(parent))
        if random.random() < 0.5:
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent[random.choice((*STRINGS[:-1], key + "x", "model_type"))] = parent.pop(key)
    else:
        parent.extend([value] * random.choice((1, 1000)))


# safetensors


def safetensors_file(file: Path, random: random.Random) -> None:
    """Change the header of a file of tensors, or the tensors."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
    draw = random.random()
    if draw < 0.1:
        near = (size - 1, size + 1, size + len(data))
        length = random.choice((*near, 0, 1, 1 << 30, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1))
        file.write_bytes(struct.pack("<Q", length % (1 << 64)) + content[8:])
        return
    if draw < 0.2:
        text = mutated_json(json.dumps(header), random)
    elif draw < 0.55 and isinstance(header.get("__metadata__"), dict) and "config" in header["__metadata__"]:
        metadata = header["__metadata__"]
        if random.random() < 0.15:
            metadata["model"] = random.choice(("ByteLM", "BLT", "MegaByte", "ByteModel", "x", "__class__", ""))
        else:
            metadata["config"] = mutated_json(metadata["config"], random)
        text = json.dumps(header)
    elif names:
        data = _mutated_tensors(header, data, names, random)
        text = json.dumps(header)
    else:
        text = "{}"
    raw = text.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def _mutated_tensors(header: dict[str, Any], data: bytes, names: list[str], random: random.Random) -> bytes:
    name = random.choice(names)
    tensor, draw = header[name], random.random()
    if draw < 0.2:
        floats = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4")
        tensor["dtype"] = random.choice((*floats, "I64", "I32", "U8", "BOOL", "C64", "U16", "x", 0))
    elif draw < 0.45:
        shape = tensor.get("shape")
        replaced = [random.choice((*NUMBERS[:20], "x", None, [])) for _ in range(random.choice((0, 1, 2, 2, 3, 100)))]
        transposed = shape[::-1] if isinstance(shape, list) else shape
        tensor["shape"] = random.choice((replaced, transposed, [1, *(shape or [])], [0], [2**32, 2**32]))
    elif draw < 0.65:
        end = len(data)
        tensor["data_offsets"] = random.choice(
            (
                *([0, 0], [0, end], [1, end - 1], [end, 0], [-1, 4], [0, 1 << 40], [1 << 63, 1 << 63]),
                *([0], [], [1, 2, 3], ["0", "4"], None),
            )
        )
    elif draw < 0.72:
        header[random.choice(("extra", "", name + ".x", "../x", "model." + name, "\x1b[31mred"))] = header.pop(name)
    elif draw < 0.8:
        return _without(header, data, name)
    elif draw < 0.88:
        header["extra"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
        return data + bytes(8)
    elif data:  # other values: NaN, infinity, huge and tiny ones
        value = struct.pack("<f", random.choice((math.nan, math.inf, -math.inf, 3e38, 1e-45, 0.0)))
        return value * (len(data) // 4) + data[len(data) // 4 * 4 :] if random.random() < 0.5 else data[4:] + value
    return data


def _without(header: dict[str, Any], data: bytes, name: str) -> bytes:
    """Remove a tensor and its bytes, so that the file stays whole."""
    try:
        start, end = header.pop(name)["data_offsets"]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [offset - (end - start) for offset in other["data_offsets"]]
        return data[:start] + data[end:]
    except (LookupError, TypeError, ValueError):
        return data
