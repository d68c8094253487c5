"""Every CUDA kernel compiles under NVRTC, which needs no GPU; the launchers name them as NVRTC does."""

from __future__ import annotations

import importlib.util
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import emulator

from blt_kernels import _extension, _nvrtc
from blt_kernels.testing import assert_equal

needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy, which brings NVRTC")

ARCH = "sm_90a"
POOL = "blt::patch_pool_fwd_kernel<float, 4, blt::Kinds::kMax>"


@pytest.fixture(scope="module")
def names() -> list[str]:
    return _nvrtc.Launchers(str(_extension.path_of("_C_jit"))).kernels()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLT_KERNELS_CACHE", str(tmp_path))
    return tmp_path


def test_the_launchers_are_those_of_the_emulator(names: list[str]) -> None:
    """One launch code: the same kernels, by the same names."""
    assert POOL in names
    assert len(set(names)) == len(names)
    assert set(names) == {n for n in emulator().kernels() if "anonymous" not in n}


def test_a_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run a user who is a number. What cannot be read is no cache either."""
    for name in ("BLT_KERNELS_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    path = _nvrtc._cache_folder() / "kernel.cubin"
    _nvrtc._write(path, b"code")
    assert _nvrtc._read(path) is None
    assert _nvrtc._read(tmp_path) is None


@pytest.mark.slow
@needs_cupy
def test_every_kernel_compiles(names: list[str], cache: Path) -> None:
    symbols, cubin = _nvrtc.compile_kernels(names, ARCH)
    assert list(symbols) == names
    assert len(set(symbols.values())) == len(names)
    assert cubin[:4] == b"\x7fELF"
    assert all(symbol.encode() in cubin for symbol in symbols.values())


@needs_cupy
def test_a_kernel_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _nvrtc.compile_kernels([POOL], ARCH)
    assert len(list(cache.iterdir())) == 1
    from cupy.cuda import nvrtc

    monkeypatch.setattr(nvrtc, "createProgram", None)
    assert _nvrtc.compile_kernels([POOL], ARCH) == first
    with pytest.raises(TypeError):
        _nvrtc.compile_kernels([POOL], "sm_80")  # another GPU takes another kernel


@needs_cupy
def test_changed_sources_are_compiled_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _nvrtc.compile_kernels([POOL], ARCH)
    changed = tmp_path / "include"
    changed.mkdir()
    for path in _nvrtc.HEADERS.glob("*.cuh"):
        (changed / path.name).write_text(path.read_text() + "\n// changed\n")
    monkeypatch.setattr(_nvrtc, "HEADERS", changed)
    _nvrtc.compile_kernels([POOL], ARCH)
    assert len(list(cache.glob("*.cubin"))) == 2


@needs_cupy
def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLT_KERNELS_CACHE", "/proc/no/such/folder")
    assert _nvrtc.compile_kernels([POOL], ARCH)[1][:4] == b"\x7fELF"


@needs_cupy
def test_errors_show_the_log(cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)NVRTC does not compile blt::no_such_kernel.*no_such_kernel"):
        _nvrtc.compile_kernels(["blt::no_such_kernel<float>"], ARCH)
    assert list(cache.iterdir()) == []


@needs_cupy
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _nvrtc.missing() is None
    monkeypatch.setattr(_nvrtc, "HEADERS", tmp_path)
    assert "has no kernels" in (_nvrtc.missing() or "")
    with pytest.raises(RuntimeError, match=r"no kernel can be compiled: .* has no kernels"):
        _nvrtc.compile_kernels([POOL], ARCH)
    monkeypatch.setattr(_nvrtc.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'blt-kernels[jit]'" in (_nvrtc.missing() or "")


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"), ((12, 0), "sm_120")]
)
def test_architecture(capability: tuple[int, int], name: str) -> None:
    assert _nvrtc.architecture(capability) == name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cuda", "BLT_KERNELS_CUDA: expected one of nvcc, nvrtc, none, got 'cuda'"),
        ("nvcc", "BLT_KERNELS_CUDA=nvcc: torch was built without CUDA"),
        ("nvrtc", "BLT_KERNELS_CUDA=nvrtc: torch was built without CUDA"),
    ],
)
def test_choices_that_cannot_be_had(value: str, message: str) -> None:
    if torch.version.cuda is not None and value != "cuda":
        pytest.skip("torch has CUDA here")
    done = subprocess.run(
        [sys.executable, "-c", "import blt_kernels"],
        env=os.environ | {"BLT_KERNELS_CUDA": value},
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip().splitlines()[-1] == f"ImportError: {message}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nvrtc_gives_what_nvcc_gives(tmp_path: Path) -> None:
    """The same sources, launched by the same code: bitwise the same results."""
    results = []
    for compiler in ("nvcc", "nvrtc"):
        path = tmp_path / f"{compiler}.pt"
        command = [sys.executable, str(Path(__file__).parents[1] / "cuda_cases.py"), str(path)]
        done = subprocess.run(command, env=os.environ | {"BLT_KERNELS_CUDA": compiler}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(path))
    assert_equal(*results)
