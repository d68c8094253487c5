// Runs CUDA kernels on the CPU, for tests: the threads of a block are fibres, and blocks run one after the other.
//
// Errors that a GPU would hide are reported with kernel, block and thread: a barrier or a warp collective that not all
// of its threads reach, a value taken from a lane outside the mask, shared memory read before it was written, an access
// outside the tensors of the op, a write to a tensor that the op only reads, a misaligned vector access. Kernels and
// launchers are compiled with -fsanitize=thread, which calls __tsan_read4(address) and the like before every load and
// store; memory.cpp defines these functions instead of the sanitizer's runtime.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../launch/config.h"
#include "../launch/kernel_name.h"

namespace blt::emulator {

// --- kernels and launches --------------------------------------------------------------------------------------------

// Notes a kernel that some launcher can launch, and returns its name.
std::string_view add_kernel(std::string_view name);

template <auto kKernel>
inline const std::string_view kernel_of = add_kernel(names::kernel_name<kKernel>());

// Records a launch. `read` and `written` are bytes that would cross from L2: whole sectors of 32 bytes, each
// counted once per block unless it left a cache of 256 KB meanwhile. `loaded` and `stored` are the bytes that threads
// access. `longest` is the critical path: the most loads and stores, of tensors and of shared memory, of a single
// thread.
struct Launch {
  std::string kernel;
  LaunchConfig config;
  int64_t read = 0, written = 0, loaded = 0, stored = 0;
  int64_t longest = 0;
};

// Runs run(parameters) in every thread. Throws a std::runtime_error with the first fault.
void launch(std::string_view kernel, const LaunchConfig& config, void (*run)(const void*), const void* parameters);

// Lists the tensors that kernels may access while this lives.
class Scope {
 public:
  Scope();
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  void add(const void* data, int64_t bytes, bool writable);
};

// Zeroes memory, and records it as a launch of "memset".
void zero(void* data, int64_t bytes);

// Fills new memory with bytes that are NaN as floating-point numbers and out of range as ids.
void poison(void* data, int64_t bytes);

// --- for the tests ---------------------------------------------------------------------------------------------------

// Chooses the order of blocks and threads, where the kernel does not fix it.
enum class Order { kForward, kBackward, kRandom };
void set_order(Order order, uint64_t seed);

std::vector<std::string> kernels();
std::vector<Launch>& launches();

}  // namespace blt::emulator
