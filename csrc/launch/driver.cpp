// Looks up the driver's functions at their first use, and defines the functions that blt_kernels/_nvrtc.py calls.

#include "driver.h"

#include <dlfcn.h>

#include <deque>
#include <mutex>
#include <stdexcept>

namespace blt::driver {
namespace {

using Compile = void* (*)(const char* name, int32_t device);  // returns a CUfunction, or null if Python raised

Compile compile = nullptr;
std::mutex mutex;

std::deque<Kernel>& kernels() {
  static std::deque<Kernel> all;
  return all;
}

// A symbol has the address of a function, and converts to a pointer of any type.
struct Symbol {
  void* address;
  template <class Function>
  operator Function*() const {
    return reinterpret_cast<Function*>(address);
  }
};

// Looks a function up in one library. dlsym(RTLD_DEFAULT) does not find those of libraries loaded RTLD_LOCAL.
Symbol function_in(void* library, const char* name) {
  void* const found = dlsym(library, name);
  if (found == nullptr) throw std::runtime_error(std::string("blt_kernels: there is no ") + name + " to call");
  return {found};
}

Symbol find(const char* name) {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw std::runtime_error("blt_kernels: libcuda.so.1 does not load; is there a driver?");
  return function_in(library, name);
}

// Holds the functions of the driver that are used here, declared as in cuda.h.
struct Driver {
  using Result = int;
  static constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  static constexpr int kStaticSharedBytes = 1;      // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
  static constexpr int kSharedBytesOptin = 97;      // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN

  Result (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** arguments,
                   void** extra) = find("cuLaunchKernel");
  Result (*memset)(uintptr_t data, unsigned char value, size_t bytes, void* stream) = find("cuMemsetD8Async");
  Result (*is_capturing)(void* stream, int* status) = find("cuStreamIsCapturing");
  Result (*function_attribute)(int* value, int attribute, void* function) = find("cuFuncGetAttribute");
  Result (*set_function_attribute)(void* function, int attribute, int value) = find("cuFuncSetAttribute");
  Result (*device_attribute)(int* value, int attribute, int device) = find("cuDeviceGetAttribute");
  Result (*device)(int* device, int ordinal) = find("cuDeviceGet");
  Result (*current_context)(void** context) = find("cuCtxGetCurrent");
  Result (*primary_context)(void** context, int device) = find("cuDevicePrimaryCtxRetain");
  Result (*use_context)(void* context) = find("cuCtxSetCurrent");
  Result (*error_text)(Result error, const char** text) = find("cuGetErrorString");

  void check(Result error, const std::string& what) const {
    if (error == 0) return;
    const char* text = "unknown error";
    error_text(error, &text);
    throw std::runtime_error(what + ": " + text);
  }

  // Makes the primary context of a device current if the thread has none, as the CUDA runtime does at its first call. A
  // thread of autograd may call the driver before the runtime.
  void ensure_context(int32_t index) const {
    void* context = nullptr;
    check(current_context(&context), "no current CUDA context");
    if (context != nullptr) return;
    int handle = 0;
    check(device(&handle, index), "no such CUDA device");
    check(primary_context(&context, handle), "no CUDA context");
    check(use_context(context), "no CUDA context");
  }

  // Raises a kernel's limit of dynamic shared memory to the device's.
  void allow_shared_memory(void* function, int32_t index, const std::string& name) const {
    int handle = 0, limit = 0, used = 0;
    check(device(&handle, index), name);
    check(device_attribute(&limit, kSharedBytesOptin, handle), name);
    check(function_attribute(&used, kStaticSharedBytes, function), name);
    check(set_function_attribute(function, kMaxDynamicSharedBytes, limit - used), name);
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

void* function_of(Kernel& kernel, int32_t device, void* stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto index = static_cast<size_t>(device);
  if (kernel.functions.size() <= index) kernel.functions.resize(index + 1, nullptr);
  void*& function = kernel.functions[index];
  if (function != nullptr) return function;
  int capturing = 0;
  driver().check(driver().is_capturing(stream, &capturing), "no capture status");
  if (capturing != 0)
    throw std::runtime_error(kernel.name +
                             " was launched for the first time while a CUDA graph was captured, so it would have to be "
                             "compiled and loaded: call the op once on inputs of the same dtypes and shapes before the "
                             "capture, as a warm-up");
  void* const compiled = compile == nullptr ? nullptr : compile(kernel.name.c_str(), device);
  if (compiled == nullptr) throw std::runtime_error(kernel.name + " was not compiled; what NVRTC said is above");
  driver().allow_shared_memory(compiled, device, kernel.name);
  return function = compiled;
}

}  // namespace

Kernel* add_kernel(std::string_view name) {
  // Several launchers may launch the same kernel.
  for (Kernel& kernel : kernels()) {
    if (kernel.name == name) return &kernel;
  }
  return &kernels().emplace_back(Kernel{std::string(name), {}});
}

void* current_stream(int32_t device) {
  using Current = int(int32_t device, void** stream);
  static Current* const current = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) throw std::runtime_error("blt_kernels: torch has not loaded libtorch_cuda.so");
    return function_in(library, "aoti_torch_get_current_cuda_stream");
  }();
  void* stream = nullptr;
  if (current(device, &stream) != 0) throw std::runtime_error("blt_kernels: no current CUDA stream");
  return stream;
}

void zero(int32_t device, void* data, int64_t bytes, void* stream) {
  driver().ensure_context(device);
  driver().check(driver().memset(reinterpret_cast<uintptr_t>(data), 0, static_cast<size_t>(bytes), stream),
                 "a tensor was not zeroed");
}

void launch(Kernel* kernel, int32_t device, const LaunchConfig& config, void** parameters, void* stream) {
  driver().ensure_context(device);
  void* const function = function_of(*kernel, device, stream);
  driver().check(driver().launch(function, static_cast<unsigned>(config.grid.x), static_cast<unsigned>(config.grid.y),
                                 1, static_cast<unsigned>(config.block), 1, 1, static_cast<unsigned>(config.smem_bytes),
                                 stream, parameters, nullptr),
                 kernel->name + " was not launched");
}

// --- called from Python ----------------------------------------------------------------------------------------------

extern "C" {
__attribute__((visibility("default"))) void blt_kernels_jit_use(Compile function) { compile = function; }
__attribute__((visibility("default"))) int64_t blt_kernels_jit_count() {
  return static_cast<int64_t>(kernels().size());
}
__attribute__((visibility("default"))) const char* blt_kernels_jit_name(int64_t i) {
  return kernels().at(static_cast<size_t>(i)).name.c_str();
}
}

}  // namespace blt::driver
