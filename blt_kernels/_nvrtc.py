"""CUDA kernels compiled by NVRTC when they are first launched, for machines with a driver and without ``_C_cuda``.

``_C_jit`` holds the launchers, which ask for a kernel by its name, such as ``blt::patch_unpool_fwd_kernel<float, 4>``.
The sources are the headers that ``_C_cuda`` is built from. Compiled kernels stay in ``BLT_KERNELS_CACHE``, by default
``~/.cache/blt_kernels``, under a hash of all that they depend on.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from blt_kernels._files import whole_file

HEADERS = Path(__file__).parent / "include"
_OPTIONS = ("-std=c++20", "-default-device")


def missing() -> str | None:
    """Say what is missing to compile kernels, and how to get it; None if nothing is."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'blt-kernels[jit]'"
    if not any(HEADERS.glob("*.cuh")):
        return f"{HEADERS} has no kernels: `pip install .` in a checkout puts them there"
    return None


def architecture(capability: tuple[int, int]) -> str:
    """Return NVRTC's name for a GPU of compute capability (major, minor)."""
    major, minor = capability
    return f"sm_{major}{minor}a" if major == 9 else f"sm_{major}{minor}"


def compile_kernels(names: Sequence[str], arch: str) -> tuple[dict[str, str], bytes]:
    """Compile kernels for `arch` into one module, without a GPU.

    Returns
    -------
    symbols : name in C++ -> symbol in the module
    cubin : bytes of the module

    Raises
    ------
    RuntimeError
        CuPy or CUDA's headers are missing, or NVRTC refuses the sources; the message has its log.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"blt_kernels: no kernel can be compiled: {reason}")
    from cupy.cuda import nvrtc

    sources = {path.name: path.read_text() for path in sorted(HEADERS.glob("*.cuh"))}
    options = (*_OPTIONS, f"-arch={arch}", f"-I{cuda_headers()}")
    key = hashlib.sha256(repr((nvrtc.getVersion(), options, sorted(names), sorted(sources.items()))).encode())
    cached = _cache_folder() / f"{key.hexdigest()}.cubin"
    if content := _read(cached):
        *lines, code = content.split(b"\n", len(names))
        return dict(zip(names, (line.decode() for line in lines), strict=True)), code

    # GCC leaves namespaces out of some of the names that it spells.
    main = "".join(f'#include "{name}"\n' for name in sources) + "using namespace blt;\n"
    texts = tuple(text.encode() for text in sources.values())
    program = nvrtc.createProgram(main, "blt_kernels.cu", texts, tuple(name.encode() for name in sources))
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"blt_kernels: NVRTC does not compile {', '.join(names)}: {error}\n{log}") from error
        symbols = {name: _text(nvrtc.getLoweredName(program, name)) for name in names}
        cubin = nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)
    _write(cached, b"".join(f"{symbols[name]}\n".encode() for name in names) + cubin)
    return symbols, cubin


@cache
def cuda_headers() -> Path:
    """Return the folder of ``cuda_bf16.h``: of a toolkit, or of the packages that torch and CuPy bring.

    Raises
    ------
    RuntimeError
        It is nowhere.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home, "include") for home in (*homes, "/usr/local/cuda") if home]
    for entry in sys.path:
        folders += sorted(Path(entry or ".").glob("nvidia/*/include"), reverse=True)
    for folder in folders:
        if (folder / "cuda_bf16.h").exists():
            return folder
    raise RuntimeError("blt_kernels: cuda_bf16.h was not found: pip install nvidia-cuda-runtime, or set CUDA_HOME")


class Launchers:
    """The launchers of a loaded ``_C_jit``, which get their kernels from here."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.blt_kernels_jit_count.restype = ctypes.c_int64
        self._library.blt_kernels_jit_name.restype = ctypes.c_char_p
        self._library.blt_kernels_jit_name.argtypes = [ctypes.c_int64]
        self._modules: list[Any] = []
        # The launchers keep a pointer to it, so it must not go.
        self._compile = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32)(self._function)
        self._library.blt_kernels_jit_use(self._compile)

    def kernels(self) -> list[str]:
        """The names of all kernels that some launcher may launch."""
        return [self._library.blt_kernels_jit_name(i).decode() for i in range(self._library.blt_kernels_jit_count())]

    def _function(self, name: bytes, device: int) -> int | None:
        """A CUfunction for the current context, which is that of `device`; None if that fails, with a traceback."""
        try:
            import torch
            from cupy.cuda import function

            kernel = name.decode()
            symbols, cubin = compile_kernels([kernel], architecture(torch.cuda.get_device_capability(device)))
            module = function.Module()
            module.load(cubin)
            self._modules.append(module)
            return module.get_function(symbols[kernel]).ptr
        except Exception:
            traceback.print_exc()  # an exception cannot cross the launcher, which raises its own
            return None


def _cache_folder() -> Path:
    """Return the folder of compiled kernels; one that cannot be made for a user without a home, as containers have."""
    try:
        return Path(os.environ.get("BLT_KERNELS_CACHE") or Path.home() / ".cache" / "blt_kernels")
    except RuntimeError:
        return Path(os.devnull, "blt_kernels")


def _read(path: Path) -> bytes | None:
    """Return the content of a file; None if there is none, or this user cannot read it."""
    with suppress(OSError):
        return path.read_bytes()
    return None


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; without a cache the next process compiles again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_bytes(content)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
