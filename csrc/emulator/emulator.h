// Runs CUDA kernels on the CPU, for tests: the threads of a block are fibres, blocks run one after the other.
//
// What a GPU would hide is an error here, with kernel, block and thread: a barrier or a shuffle that not all of its threads
// reach, a value taken from a lane outside the mask, shared memory read before it was written, an access outside the
// tensors of the op, a write to one that it only reads, a vector access out of alignment. Kernels and launchers are compiled
// with -fsanitize=thread, which calls __tsan_read4(address) and the like before every load and store; emulator.cpp has
// these functions in place of the sanitizer's runtime.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../launch/config.h"
#include "../launch/kernel_name.h"

namespace blt::emulator {

// --- kernels and launches ---------------------------------------------------------------------------------------------

// A kernel that some launcher can launch.
struct Kernel {
  std::string_view name;
};
const Kernel* add_kernel(std::string_view name);

template <auto kKernel>
struct Registered {
  static inline const Kernel* const kernel = add_kernel(names::kernel_name<kKernel>());
};

// What a launch did. Bytes are what would cross from L2: whole sectors of 32 bytes, each counted once a block unless it
// left a cache of 256 KB meanwhile; and as the threads asked for them. `longest` is the critical path: the most loads and
// stores, of tensors and of shared memory, that a single thread makes.
struct Launch {
  std::string kernel;
  LaunchConfig config;
  int64_t read = 0, written = 0, loaded = 0, stored = 0;
  int64_t longest = 0;
};

// Runs run(parameters) in every thread. Throws what the first fault says.
void launch(const Kernel* kernel, const LaunchConfig& config, void (*run)(const void*), const void* parameters);

// The tensors that kernels may access, until it goes.
class Scope {
 public:
  Scope();
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  void add(const void* data, int64_t bytes, bool writable);
};

// What Device::zero does; recorded as a launch of "memset".
void zero(void* data, int64_t bytes);

// Fills new memory with bytes that are NaN as a floating point number, and far out of range as an id.
void poison(void* data, int64_t bytes);

// --- for the tests ----------------------------------------------------------------------------------------------------

// In what order blocks and threads run, where the kernel leaves that open.
enum class Order { kForward, kBackward, kRandom };
void set_order(Order order, uint64_t seed);

std::vector<std::string> kernels();
std::vector<Launch>& launches();  // since it was last cleared

}  // namespace blt::emulator
