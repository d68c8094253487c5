// Checks and counts every load and store of kernels, which -fsanitize=thread reports. This file itself is compiled
// without instrumentation.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "machine.h"

namespace blt::emulator {
namespace {

constexpr int64_t kSector = 32;

void visit_shared(SharedMemory& memory, uintptr_t at, size_t bytes, bool write) {
  const size_t first = at - memory.begin;
  const char* what = nullptr;
  if (first + bytes > memory.written.size()) what = "an access beyond shared memory, ";
  for (size_t i = first; i < first + bytes && !what; ++i) {
    if (!write && !memory.written[i]) what = "shared memory read before it was written, ";
    memory.written[i] = true;
  }
  if (what) fault(std::string(what) + bytes_at(at, bytes));
}

// Counts an access of the current thread. The pieces of a vector count as one.
void count_access(uintptr_t at, size_t bytes) {
  Machine& m = machine();
  Fibre& fibre = m.fibre();
  const bool piece = fibre.vector_left > 0 && fibre.vector.holds(at, bytes);
  if (!piece || fibre.vector_left == fibre.vector.end - fibre.vector.begin) ++fibre.accesses;
  fibre.vector_left = piece ? fibre.vector_left - std::min(fibre.vector_left, bytes) : 0;
  m.record->longest = std::max(m.record->longest, fibre.accesses);
}

}  // namespace

void Cache::clear() { std::fill(sectors.begin(), sectors.end(), 0); }

int64_t Cache::touch(uintptr_t at, size_t bytes) {
  int64_t missed = 0;
  for (uintptr_t sector = at / kSector; sector <= (at + bytes - 1) / kSector; ++sector) {
    uintptr_t* const set = &sectors[(sector * 0x9e3779b97f4a7c15u >> 54) * kWays];
    uintptr_t* place = std::find(set, set + kWays, sector);
    if (place == set + kWays) {
      missed += kSector;
      --place;
    }
    std::rotate(set, place, place + 1);
    *set = sector;
  }
  return missed;
}

std::string bytes_at(uintptr_t at, size_t bytes) {
  char number[32];
  std::snprintf(number, sizeof(number), "%#zx", at);
  return std::to_string(bytes) + " bytes at " + number;
}

void visit(const void* pointer, size_t bytes, bool write) {
  Machine& m = machine();
  if (m.current < 0) return;
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  if (at - m.stacks < kMaxThreads * kStackBytes) return;
  if (!write && m.constants.holds(at, bytes) && !m.static_memory.holds(at)) return;
  count_access(at, bytes);
  for (size_t i = 0; i < m.tensors.size(); ++i) {
    if (!m.tensors[i].holds(at, bytes)) continue;
    if (write && !m.tensors[i].writable) continue;  // the same memory may also be an output
    if (i > 0) std::swap(m.tensors[i], m.tensors[i - 1]);
    (write ? m.record->stored : m.record->loaded) += static_cast<int64_t>(bytes);
    (write ? m.record->written : m.record->read) += (write ? m.written : m.read).touch(at, bytes);
    return;
  }
  if (m.dynamic_memory.holds(at)) return visit_shared(m.dynamic_memory, at, bytes, write);
  if (m.static_memory.holds(at)) return visit_shared(m.static_memory, at, bytes, write);
  const bool read_only =
      std::any_of(m.tensors.begin(), m.tensors.end(), [&](const Range& tensor) { return tensor.holds(at, bytes); });
  fault(std::string(write ? "a write" : "a read") +
        (read_only ? " of a tensor that is only read, " : " outside of every tensor, ") + bytes_at(at, bytes));
}

void fault_if_misaligned(const void* pointer, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  if (at % bytes != 0) fault("an access out of alignment, " + bytes_at(at, bytes));
  Fibre& fibre = machine().fibre();
  fibre.vector = {at, at + bytes, false};
  fibre.vector_left = bytes;
}

void copy_async(void* to, const void* from, size_t bytes) {
  visit(from, bytes, false);
  Copy copy = {to, bytes, {}};
  std::memcpy(copy.bytes, from, bytes);
  machine().fibre().open_copies.push_back(copy);
}

void commit_copies() {
  Fibre& fibre = machine().fibre();
  fibre.copy_groups.push_back(std::exchange(fibre.open_copies, {}));
}

void wait_for_copies(int groups) {
  Fibre& fibre = machine().fibre();
  for (; fibre.copy_groups.size() > static_cast<size_t>(groups); fibre.copy_groups.pop_front())
    for (const Copy& copy : fibre.copy_groups.front()) {
      visit(copy.to, copy.size, true);
      std::memcpy(copy.to, copy.bytes, copy.size);
    }
}

}  // namespace blt::emulator

// --- called by instrumented code -------------------------------------------------------------------------------------

extern "C" {
using blt::emulator::visit;
#define BLT_VISIT(bytes)                                                   \
  void __tsan_read##bytes(void* at) { visit(at, bytes, false); }           \
  void __tsan_write##bytes(void* at) { visit(at, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* at) { visit(at, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* at) { visit(at, bytes, true); } \
  void __tsan_volatile_read##bytes(void* at) { visit(at, bytes, false); }  \
  void __tsan_volatile_write##bytes(void* at) { visit(at, bytes, true); }
BLT_VISIT(1)
BLT_VISIT(2)
BLT_VISIT(4)
BLT_VISIT(8)
BLT_VISIT(16)
#undef BLT_VISIT
void __tsan_read_range(void* at, size_t bytes) { visit(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { visit(at, bytes, true); }
// Launchers use these for shared pointers; the atomics of kernels are in device.h.
#define BLT_ATOMIC(bits)                                                                          \
  uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* at, int) {                      \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                               \
  void __tsan_atomic##bits##_store(uint##bits##_t* at, uint##bits##_t value, int) {               \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(uint##bits##_t* at, uint##bits##_t value, int) { \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                       \
  }
BLT_ATOMIC(8)
BLT_ATOMIC(32)
BLT_ATOMIC(64)
#undef BLT_ATOMIC
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
