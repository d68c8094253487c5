// The driver's functions, looked up when they are first called, and the way to blt_kernels/_jit.py.

#include "jit.h"

#include <dlfcn.h>

#include <deque>
#include <mutex>
#include <stdexcept>

namespace blt::jit {
namespace {

using Compile = void* (*)(const char* name, int32_t device);  // CUfunction, or null where Python raised

Compile compile = nullptr;
std::mutex mutex;

std::deque<Entry>& entries() {
  static std::deque<Entry> all;
  return all;
}

void* symbol(void* library, const char* name) {
  void* const found = dlsym(library, name);
  if (found == nullptr) throw std::runtime_error(std::string("blt_kernels: there is no ") + name + " to call");
  return found;
}

struct Driver {
  using Launch = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** arguments,
                         void** extra);
  using SetAttribute = int (*)(void* function, int attribute, int value);
  using ErrorText = int (*)(int error, const char** text);
  Launch launch;
  SetAttribute set_attribute;
  ErrorText error_text;

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) throw std::runtime_error("blt_kernels: libcuda.so.1 does not load; is there a driver?");
    launch = reinterpret_cast<Launch>(symbol(library, "cuLaunchKernel"));
    set_attribute = reinterpret_cast<SetAttribute>(symbol(library, "cuFuncSetAttribute"));
    error_text = reinterpret_cast<ErrorText>(symbol(library, "cuGetErrorString"));
  }

  void check(int error, const Entry& entry) const {
    if (error == 0) return;
    const char* text = "unknown error";
    error_text(error, &text);
    throw std::runtime_error(entry.name + " was not launched: " + text);
  }
};

void* function_of(Entry& entry, int32_t device) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto index = static_cast<size_t>(device);
  if (entry.functions.size() <= index) entry.functions.resize(index + 1, nullptr);
  void*& function = entry.functions[index];
  if (function == nullptr && compile != nullptr) function = compile(entry.name.c_str(), device);
  if (function == nullptr) throw std::runtime_error(entry.name + " was not compiled; what NVRTC said is above");
  return function;
}

}  // namespace

Entry* add_entry(std::string_view name) { return &entries().emplace_back(Entry{std::string(name), {}}); }

void* current_stream(int32_t device) {
  using Current = int (*)(int32_t device, void** stream);
  static const auto current = reinterpret_cast<Current>(symbol(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  if (current(device, &stream) != 0) throw std::runtime_error("blt_kernels: no current CUDA stream");
  return stream;
}

void launch(Entry* entry, int32_t device, int64_t blocks, int64_t rows, int threads, int64_t shared, void** arguments,
            void* stream) {
  static const Driver driver;
  constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  constexpr int64_t kWithoutAsking = 48 << 10;
  void* const function = function_of(*entry, device);
  if (shared > kWithoutAsking)
    driver.check(driver.set_attribute(function, kMaxDynamicSharedBytes, static_cast<int>(shared)), *entry);
  driver.check(
      driver.launch(function, static_cast<unsigned>(blocks), static_cast<unsigned>(rows), 1,
                    static_cast<unsigned>(threads), 1, 1, static_cast<unsigned>(shared), stream, arguments, nullptr),
      *entry);
}

// --- called from Python -----------------------------------------------------------------------------------------------

extern "C" {
__attribute__((visibility("default"))) void blt_kernels_jit_use(Compile function) { compile = function; }
__attribute__((visibility("default"))) int64_t blt_kernels_jit_count() {
  return static_cast<int64_t>(entries().size());
}
__attribute__((visibility("default"))) const char* blt_kernels_jit_name(int64_t i) {
  return entries().at(static_cast<size_t>(i)).name.c_str();
}
}

}  // namespace blt::jit
