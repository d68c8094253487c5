"""Launchers reach torch's streams, the driver and CUDA graphs: small libraries stand in for torch's and CUDA's.

A torch for CUDA loads libtorch_cuda.so for itself alone (RTLD_LOCAL), as `ctypes.CDLL` does here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow
TORCH_CUDA = """
#include <cstdint>
extern "C" int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<intptr_t>(7000 + device));
  return 0;
}
"""

# The driver has what was called, and what the test sets.
CUDA = """
#include <cstdint>
#include <cstring>
extern "C" {
int capturing = 0, launches = 0, attributes = 0, shared_limit = 0, contexts = 0, launch_error = 0;
static thread_local void* context = nullptr;
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
  ++launches;
  return context == nullptr ? 201 : launch_error;
}
int cuMemsetD8Async(uintptr_t data, unsigned char value, size_t bytes, void*) {
  std::memset(reinterpret_cast<void*>(data), value, bytes);
  return 0;
}
int cuStreamIsCapturing(void* stream, int* status) {
  *status = stream == reinterpret_cast<void*>(7000) ? capturing : 0;
  return 0;
}
int cuFuncGetAttribute(int* value, int, void*) { *value = 1000; return 0; }
int cuFuncSetAttribute(void*, int attribute, int value) {
  attributes += attribute == 8;
  shared_limit = value;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 97 ? 232448 : 0; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuCtxGetCurrent(void** current) { *current = context; return 0; }
int cuDevicePrimaryCtxRetain(void** primary, int device) {
  *primary = reinterpret_cast<void*>(1L + device);
  ++contexts;
  return 0;
}
int cuCtxSetCurrent(void* current) { context = current; return 0; }
int cuGetErrorString(int error, const char** text) { *text = error == 201 ? "invalid context" : "refused"; return 0; }
}
"""

# Python calls this to do what a launcher does. It returns what was thrown.
LAUNCHER = """
#include "launch/driver.h"
#include <exception>
static blt::driver::Kernel* kernel() {
  static blt::driver::Kernel* const only = blt::driver::add_kernel("blt::some_kernel<float>");
  return only;
}
static std::string message;
template <class F>
static const char* caught(F f) {
  message.clear();
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int64_t stream_of(int device) {
  int64_t stream = -1;
  caught([&] { stream = reinterpret_cast<int64_t>(blt::driver::current_stream(device)); });
  return stream;
}
EXPORT const char* last_message() { return message.c_str(); }
EXPORT const char* launch(int device, long shared) {
  void* const stream = blt::driver::current_stream(device);
  const blt::LaunchConfig config{.grid = {1}, .block = 32, .smem_bytes = shared};
  return caught([&] { blt::driver::launch(kernel(), device, config, nullptr, stream); });
}
EXPORT const char* zero(void* data, long bytes) {
  return caught([&] { blt::driver::zero(0, data, bytes, blt::driver::current_stream(0)); });
}
"""

START = """
import ctypes, sys, threading

folder = sys.argv[1]
torch_cuda = ctypes.CDLL(folder + "/libtorch_cuda.so") if "torch" in sys.argv else None
cuda = ctypes.CDLL(folder + "/libcuda.so.1")
launcher = ctypes.CDLL(folder + "/launcher.so")
for name in ("launch", "zero", "last_message"):
    getattr(launcher, name).restype = ctypes.c_char_p
launcher.stream_of.restype = ctypes.c_int64
launch = lambda device=0, shared=0: launcher.launch(device, ctypes.c_long(shared)).decode()
said = lambda name: ctypes.c_int.in_dll(cuda, name)
compiled = []
def compile_kernel(name, device):
    compiled.append((name.decode(), device))
    return 4096
kept = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32)(compile_kernel)
launcher.blt_kernels_jit_use(kept)
"""


def build(source: str, path: Path, *options: str) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    text = path.with_suffix(".cpp")
    text.write_text(source)
    command = [
        "c++",
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        f"-I{ROOT / 'csrc'}",
        str(text),
        "-o",
        str(path),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libraries")
    build(TORCH_CUDA, folder / "libtorch_cuda.so", "-Wl,-soname,libtorch_cuda.so")
    build(CUDA, folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    build(LAUNCHER, folder / "launcher.so", str(ROOT / "csrc/launch/driver.cpp"), "-fvisibility=hidden")
    return folder


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_stream_is_that_of_a_torch_loaded_for_itself_alone(libraries: Path) -> None:
    assert run(START + "print(launcher.stream_of(3))", str(libraries), "torch") == "7003"
    missing = run(START + "print(launcher.stream_of(0), launcher.last_message().decode())", str(libraries))
    assert missing == "-1 blt_kernels: torch has not loaded libtorch_cuda.so"


def test_a_kernel_is_prepared_once_a_device(libraries: Path) -> None:
    script = """
assert launch() == launch(0, 100_000) == launch(1) == launch(1) == ""
print(compiled, said("launches").value, said("attributes").value, said("shared_limit").value)
"""
    twice = [("blt::some_kernel<float>", 0), ("blt::some_kernel<float>", 1)]
    assert run(START + script, str(libraries), "torch") == f"{twice} 4 2 231448"


def test_the_first_launch_in_a_capture_asks_for_a_warm_up(libraries: Path) -> None:
    script = """
said("capturing").value = 1
print(launch(), compiled)
said("capturing").value = 0
assert launch() == ""
said("capturing").value = 1
print([launch()], said("launches").value)
"""
    first, second = run(START + script, str(libraries), "torch").splitlines()
    assert first.startswith("blt::some_kernel<float> was launched for the first time while a CUDA graph was captured")
    assert first.endswith("as a warm-up []")
    assert second == "[''] 2"


def test_threads_without_a_context_get_one(libraries: Path) -> None:
    """Autograd calls backward operators in threads of its own, where no call of the runtime may have come before."""
    script = """
assert launch() == ""
thread = threading.Thread(target=lambda: print([launch()]))
thread.start(); thread.join()
print(said("contexts").value)
"""
    assert run(START + script, str(libraries), "torch") == "['']\n2"


def test_zeroing_and_errors(libraries: Path) -> None:
    script = """
data = ctypes.create_string_buffer(b"x" * 8, 8)
assert launcher.zero(data, ctypes.c_long(6)) == b""
print(data.raw)
said("launch_error").value = 1
print(launch())
"""
    assert run(START + script, str(libraries), "torch").splitlines() == [
        str(b"\0" * 6 + b"xx"),
        "blt::some_kernel<float> was not launched: refused",
    ]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has its own libtorch_cuda.so")
def test_a_module_built_beside_a_cpu_torch_loads_in_one_with_cuda(libraries: Path, tmp_path: Path) -> None:
    """Linked against the stub that CMake makes, it binds to torch's library, which only has the same name."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", str(tmp_path), "--target", "torch_cuda_stub"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    source = """
#include <cstdint>
extern "C" int aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
extern "C" int64_t stream_of(int device) {
  void* stream = nullptr;
  return aoti_torch_get_current_cuda_stream(device, &stream) == 0 ? reinterpret_cast<int64_t>(stream) : -1;
}
"""
    build(source, tmp_path / "module.so", str(tmp_path / "stub" / "libtorch_cuda.so"))
    script = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[2]) if len(sys.argv) > 2 else None
try:
    print(ctypes.CDLL(sys.argv[1]).stream_of(5))
except OSError as error:
    print(error)
"""
    assert run(script, str(tmp_path / "module.so"), str(libraries / "libtorch_cuda.so")) == "7005"
    assert "libtorch_cuda.so: cannot open shared object file" in run(script, str(tmp_path / "module.so"))
