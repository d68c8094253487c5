// Declares the state of the emulator: threads of a block as fibres, warp collectives, and the memory they may access.
//
// A fibre runs until it waits at a barrier or for the lanes of a collective; then the next one that can run does. All
// stacks are one mapping, so an address tells whether it is on a stack.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "emulator.h"

namespace blt::emulator {

inline constexpr size_t kStackBytes = 64 << 10;
inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kMaxSharedBytes = 227 << 10;

// A collective of the lanes of a mask is open until all have arrived, and erased when all have left.
struct OpenCollective {
  Collective kind;
  uint32_t mask, arrived = 0, left = 0;
  LaneValues lanes = {};
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool writable = false;
  bool holds(uintptr_t at, size_t bytes) const { return begin <= at && at + bytes <= end; }
};

// An asynchronous copy to shared memory is under way until its thread waits for it.
struct Copy {
  void* to;
  size_t size;
  std::byte bytes[16];
};

struct Fibre {
  void* stack_pointer = nullptr;
  uint3 index = {};
  bool done = false;
  const char* waits_for = nullptr;
  Site site;
  int64_t accesses = 0;                       // counts those of tensors and of shared memory
  Range vector;                               // is the vector access under way, which the compiler may split
  size_t vector_left = 0;                     // bytes of it are still to come
  std::vector<Copy> open_copies;              // are not committed yet
  std::deque<std::vector<Copy>> copy_groups;  // begins with the oldest
};

// Models a cache of 256 KB: the last kWays sectors of each of 1024 sets, newest first. Addresses differ from run to
// run, but with so many sets the number of misses hardly does.
struct Cache {
  static constexpr int kWays = 8;
  std::vector<uintptr_t> sectors = std::vector<uintptr_t>(1024 * kWays, 0);
  void clear();
  // Returns the bytes that an access loads into the cache.
  int64_t touch(uintptr_t at, size_t bytes);
};

// Holds shared memory, and which of its bytes the block has written.
struct SharedMemory {
  uintptr_t begin = 0;
  std::vector<bool> written;
  bool holds(uintptr_t at) const { return begin <= at && at < begin + written.size(); }
};

struct Machine {
  std::vector<Range> tensors;
  std::vector<Fibre> fibres{kMaxThreads};
  std::vector<std::list<OpenCollective>> warps{kMaxThreads / 32};
  std::deque<int> runnable;
  uintptr_t stacks = 0;
  SharedMemory dynamic_memory, static_memory;
  Range constants;
  void* scheduler = nullptr;
  int current = -1, threads = 0, alive = 0, at_barrier = 0;
  uint3 block = {}, grid = {};
  std::string fault;
  Order order = Order::kForward;
  std::mt19937_64 random;
  void (*kernel)(const void*) = nullptr;
  const void* parameters = nullptr;
  Launch* record = nullptr;
  Cache read, written;
  std::vector<Launch> launches;

  Machine();
  Fibre& fibre() { return fibres[current]; }

 private:
  std::unique_ptr<std::byte[]> shared_bytes_;
};

Machine& machine();

std::string text(const Site& site);
std::string bytes_at(uintptr_t at, size_t bytes);

// Ends the launch with an error at the current thread.
[[noreturn]] void fault(const std::string& what);
// Suspends the current fibre until wake() is called for it.
void wait(const char* what, const Site& site);
void wake(int thread);

void run_block();

// Checks and counts a load or store of the current thread.
void visit(const void* pointer, size_t bytes, bool write);

}  // namespace blt::emulator
