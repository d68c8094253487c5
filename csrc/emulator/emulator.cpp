// The threads of a block as fibres, their meetings, and a look at every load and store. Compiled without instrumentation.
//
// A fibre runs until it waits at a barrier or for the lanes of a shuffle; then the next one that can run does. A switch
// saves six registers and the stack pointer. All stacks are one mapping, so that an address tells what it belongs to.

#include "emulator.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <list>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>

#include "device.h"

#if !defined(__x86_64__)
#error "the emulator switches fibres on x86-64 only"
#endif

namespace blt::emulator {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 << 10;
constexpr int64_t kSector = 32;

// --- switching --------------------------------------------------------------------------------------------------------

// Saves the registers that a call keeps and the stack pointer in *from, and goes on where `to` was saved.
extern "C" void blt_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl blt_emulator_switch
.hidden blt_emulator_switch
.type blt_emulator_switch, @function
blt_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size blt_emulator_switch, .-blt_emulator_switch
)");

// --- state ------------------------------------------------------------------------------------------------------------

// Lanes that wait for each other: open until all of the mask are there, gone when all have read.
struct Gathering {
  Meeting kind;
  uint32_t mask, arrived = 0, left = 0;
  Brought brought = {};
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
  const char* waits = nullptr;  // for what
  Site site;
  int64_t accesses = 0;  // of tensors and of shared memory
  Range vector;          // being accessed: the compiler may take it to pieces
  size_t vector_left = 0;
  std::vector<Copy> open_copies;              // not committed yet
  std::deque<std::vector<Copy>> copy_groups;  // oldest first
};

// Which sectors a cache of 256 KB holds: the last kWays of each of 1024 sets, newest first. Addresses differ from run to
// run; with so many places for a sector what is missed hardly does.
struct Cache {
  static constexpr int kWays = 8;
  std::vector<uintptr_t> sectors = std::vector<uintptr_t>(1024 * kWays, 0);
  void clear() { std::fill(sectors.begin(), sectors.end(), 0); }
  // Bytes that an access brings in.
  int64_t touch(uintptr_t at, size_t bytes) {
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
};

// Which bytes of shared memory the block has written.
struct Shared {
  uintptr_t begin = 0;
  std::vector<bool> written;
  bool holds(uintptr_t at) const { return begin <= at && at < begin + written.size(); }
};

struct Machine {
  std::vector<Range> tensors;
  std::vector<Fibre> fibres{kMaxThreads};
  std::vector<std::list<Gathering>> warps{kMaxThreads / 32};
  std::deque<int> runnable;
  uintptr_t stacks = 0;
  Shared dynamic_memory, static_memory;
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

  Machine() {
    void* const memory =
        mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the emulator");
    stacks = reinterpret_cast<uintptr_t>(memory);
    shared_bytes = std::make_unique<std::byte[]>(kMaxShared + 128);
    dynamic_memory.begin = (reinterpret_cast<uintptr_t>(shared_bytes.get()) + 127) / 128 * 128;
    dl_iterate_phdr(find_segments, this);
  }

 private:
  std::unique_ptr<std::byte[]> shared_bytes;

  // `__shared__` variables are statics of this module: what it can write. Tables of constants are in the rest.
  static int find_segments(dl_phdr_info* info, size_t, void* data) {
    Machine& machine = *static_cast<Machine*>(data);
    const uintptr_t here = reinterpret_cast<uintptr_t>(&find_segments);
    std::vector<Range> segments;
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type != PT_LOAD) continue;
      const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
      segments.push_back({begin, begin + header.p_memsz, (header.p_flags & PF_W) != 0});
      ours |= segments.back().holds(here, 1);
    }
    if (!ours) return 0;
    machine.constants = {segments.front().begin, segments.back().end, false};
    for (const Range& segment : segments)
      if (segment.writable) {
        machine.static_memory.begin = segment.begin;
        machine.static_memory.written.resize(segment.end - segment.begin);
      }
    return 1;
  }
};

Machine& machine() {
  static Machine* const only = new Machine;
  return *only;
}

std::deque<Kernel>& registered() {
  static auto* const all = new std::deque<Kernel>;
  return *all;
}

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(const Site& site) {
  const std::string_view file = site.file_name();
  return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(site.line());
}

std::string place(const Fibre& fibre) {
  const Machine& m = machine();
  return m.record->kernel + ", block " + text(m.block) + ", thread " + text(fibre.index);
}

// Ends the launch: back to the scheduler, which does not come back here.
[[noreturn]] void fault(const std::string& what) {
  Machine& m = machine();
  m.fault = place(m.fibres[m.current]) + ": " + what;
  void* abandoned = nullptr;
  blt_emulator_switch(&abandoned, m.scheduler);
  __builtin_unreachable();
}

void wait(const char* what, const Site& site) {
  Machine& m = machine();
  Fibre& fibre = m.fibres[m.current];
  fibre.waits = what;
  fibre.site = site;
  blt_emulator_switch(&fibre.stack_pointer, m.scheduler);
}

void wake(int thread) {
  Machine& m = machine();
  m.fibres[thread].waits = nullptr;
  m.runnable.push_back(thread);
}

extern "C" void blt_emulator_enter() {
  Machine& m = machine();
  m.kernel(m.parameters);
  m.fibres[m.current].done = true;
  --m.alive;
  void* abandoned = nullptr;
  blt_emulator_switch(&abandoned, m.scheduler);
}

int take_runnable() {
  Machine& m = machine();
  size_t at = 0;
  if (m.order == Order::kBackward) at = m.runnable.size() - 1;
  if (m.order == Order::kRandom) at = m.random() % m.runnable.size();
  const int thread = m.runnable[at];
  m.runnable.erase(m.runnable.begin() + static_cast<std::ptrdiff_t>(at));
  return thread;
}

// Why no fibre can run though some are not done: the barrier, or the masks, that some of them miss.
std::string deadlock() {
  const Machine& m = machine();
  for (int thread = 0; thread < m.threads; ++thread) {
    const Fibre& fibre = m.fibres[thread];
    if (fibre.done || std::string_view(fibre.waits) == "barrier") continue;
    return place(fibre) + ": " + text(fibre.site) + ": waits for lanes of its mask that do not come";
  }
  for (int thread = 0; thread < m.threads; ++thread)
    if (!m.fibres[thread].done)
      return place(m.fibres[thread]) + ": " + text(m.fibres[thread].site) + ": a barrier that " +
             std::to_string(m.threads - m.at_barrier) + " of " + std::to_string(m.threads) + " threads do not reach";
  return "";
}

void run_block() {
  Machine& m = machine();
  std::fill(m.dynamic_memory.written.begin(), m.dynamic_memory.written.end(), false);
  std::fill(m.static_memory.written.begin(), m.static_memory.written.end(), false);
  m.read.clear();
  m.written.clear();
  for (auto& warp : m.warps) warp.clear();
  m.alive = m.threads;
  m.at_barrier = 0;
  m.runnable.clear();
  for (int thread = 0; thread < m.threads; ++thread) {
    Fibre& fibre = m.fibres[thread];
    fibre = {};
    fibre.index = {static_cast<unsigned>(thread), 0, 0};
    // The stack as the switch leaves it: six registers, where to return to, and alignment as after a call.
    auto* top = reinterpret_cast<void**>(m.stacks + (static_cast<size_t>(thread) + 1) * kStack) - 8;
    std::memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(&blt_emulator_enter);
    fibre.stack_pointer = top;
    m.runnable.push_back(thread);
  }
  while (!m.runnable.empty()) {
    m.current = take_runnable();
    blt_emulator_switch(&m.scheduler, m.fibres[m.current].stack_pointer);
    m.current = -1;
    if (!m.fault.empty()) return;
  }
  if (m.alive > 0) m.fault = deadlock();
}

// --- loads and stores -------------------------------------------------------------------------------------------------

std::string bytes_at(uintptr_t at, size_t bytes) {
  char number[32];
  std::snprintf(number, sizeof(number), "%#zx", at);
  return std::to_string(bytes) + " bytes at " + number;
}

void visit_shared(Shared& memory, uintptr_t at, size_t bytes, bool write) {
  const size_t first = at - memory.begin;
  const char* what = nullptr;
  if (first + bytes > memory.written.size()) what = "an access beyond shared memory, ";
  for (size_t i = first; i < first + bytes && !what; ++i) {
    if (!write && !memory.written[i]) what = "shared memory read before it was written, ";
    memory.written[i] = true;
  }
  if (what) fault(std::string(what) + bytes_at(at, bytes));
}

// A vector counts once, as its first piece.
void count_access(uintptr_t at, size_t bytes) {
  Machine& m = machine();
  Fibre& fibre = m.fibres[m.current];
  const bool piece = fibre.vector_left > 0 && fibre.vector.holds(at, bytes);
  if (!piece || fibre.vector_left == fibre.vector.end - fibre.vector.begin) ++fibre.accesses;
  fibre.vector_left = piece ? fibre.vector_left - std::min(fibre.vector_left, bytes) : 0;
  m.record->longest = std::max(m.record->longest, fibre.accesses);
}

// Before each load and store of kernels and launchers.
void visit(const void* pointer, size_t bytes, bool write) {
  Machine& m = machine();
  if (m.current < 0) return;
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  if (at - m.stacks < kMaxThreads * kStack) return;
  if (!write && m.constants.holds(at, bytes) && !m.static_memory.holds(at)) return;
  count_access(at, bytes);
  for (size_t i = 0; i < m.tensors.size(); ++i) {
    if (!m.tensors[i].holds(at, bytes)) continue;
    if (write && !m.tensors[i].writable) continue;  // the same memory may be there as an output too
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

}  // namespace

// --- kernels and launches ---------------------------------------------------------------------------------------------

const Kernel* add_kernel(std::string_view name) { return &registered().emplace_back(name); }

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const Kernel& kernel : registered()) names.emplace_back(kernel.name);
  return names;
}

std::vector<Launch>& launches() { return machine().launches; }

void set_order(Order order, uint64_t seed) {
  machine().order = order;
  machine().random.seed(seed);
}

void launch(const Kernel* kernel, const LaunchConfig& config, void (*run)(const void*), const void* parameters) {
  Machine& m = machine();
  const std::string name(kernel->name);
  const auto [blocks, rows] = config.grid;
  const int threads = config.block;
  const int64_t shared = config.smem_bytes;
  if (threads < 1 || threads > kMaxThreads)
    throw std::runtime_error(name + ": " + std::to_string(threads) + " threads");
  if (shared < 0 || shared > static_cast<int64_t>(kMaxShared))
    throw std::runtime_error(name + ": " + std::to_string(shared) + " bytes of shared memory");
  Launch& record = m.launches.emplace_back(Launch{name, config});
  m.record = &record;
  m.kernel = run;
  m.parameters = parameters;
  m.threads = threads;
  m.grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(rows), 1};
  m.dynamic_memory.written.resize(static_cast<size_t>(shared));
  std::vector<int64_t> order(static_cast<size_t>(blocks * rows));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  if (m.order == Order::kBackward) std::reverse(order.begin(), order.end());
  if (m.order == Order::kRandom) std::shuffle(order.begin(), order.end(), m.random);
  for (const int64_t block : order) {
    m.block = {static_cast<unsigned>(block % blocks), static_cast<unsigned>(block / blocks), 0};
    run_block();
    if (m.fault.empty()) continue;
    const std::string fault = std::exchange(m.fault, "");
    throw std::runtime_error(fault);
  }
}

Scope::Scope() { machine().tensors.clear(); }
Scope::~Scope() { machine().tensors.clear(); }

void Scope::add(const void* data, int64_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  machine().tensors.push_back({begin, begin + static_cast<uintptr_t>(bytes), writable});
}

void zero(void* data, int64_t bytes) {
  std::memset(data, 0, static_cast<size_t>(bytes));
  Launch& record = machine().launches.emplace_back(Launch{"memset", {.grid = {1}, .block = 1}});
  record.written = (bytes + 31) / 32 * 32;
  record.stored = bytes;
}

void poison(void* data, int64_t bytes) { std::memset(data, 0xff, static_cast<size_t>(bytes)); }

// --- what kernels call ------------------------------------------------------------------------------------------------

uint3 thread_index() { return machine().fibres[machine().current].index; }
uint3 block_index() { return machine().block; }
uint3 block_size() { return {static_cast<unsigned>(machine().threads), 1, 1}; }
uint3 grid_size() { return machine().grid; }
int lane() { return machine().current % 32; }

void* dynamic_shared(size_t bytes) {
  Machine& m = machine();
  if (bytes > m.dynamic_memory.written.size())
    fault("wants " + std::to_string(bytes) + " bytes of shared memory, was launched with " +
          std::to_string(m.dynamic_memory.written.size()));
  return reinterpret_cast<void*>(m.dynamic_memory.begin);
}

void barrier(const Site& site) {
  Machine& m = machine();
  if (++m.at_barrier < m.threads) return wait("barrier", site);
  m.at_barrier = 0;
  for (int thread = 0; thread < m.threads; ++thread)
    if (thread != m.current) {
      if (m.fibres[thread].site.line() != site.line())
        fault(text(site) + ": a barrier while other threads are at that of " + text(m.fibres[thread].site));
      wake(thread);
    }
}

Brought meet(Meeting kind, uint32_t mask, uint64_t value, const Site& site) {
  Machine& m = machine();
  const int lane = m.current % 32, first = m.current - lane;
  if ((mask >> lane & 1) == 0) fault(text(site) + ": its own lane is not in the mask");
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && (first + i >= m.threads || m.fibres[first + i].done))
      fault(text(site) + ": lane " + std::to_string(i) + " of the mask " +
            (first + i >= m.threads ? "is not there" : "has ended"));
  auto& warp = m.warps[m.current / 32];
  auto at =
      std::find_if(warp.begin(), warp.end(), [&](const Gathering& g) { return g.mask == mask && g.arrived != mask; });
  if (at == warp.end()) at = warp.insert(warp.end(), Gathering{kind, mask});
  if (at->kind != kind) fault(text(site) + ": other lanes of the mask do something else");
  at->arrived |= 1u << lane;
  at->brought.values[lane] = value;
  if (at->arrived == mask) {
    for (int i = 0; i < 32; ++i)
      if ((mask >> i & 1) && i != lane) wake(first + i);
  } else {
    wait("lanes", site);
  }
  const Brought brought = at->brought;
  at->left |= 1u << lane;
  if (at->left == mask) warp.erase(at);
  return brought;
}

void fault_of_lane(int source, uint32_t mask, const Site& site) {
  char number[16];
  std::snprintf(number, sizeof(number), "%#x", mask);
  fault(text(site) + ": a value from lane " + std::to_string(source) + ", which is not in the mask " + number);
}

void fault_of_wait() { fault("waits for a block that has not run"); }

void fault_if_misaligned(const void* pointer, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  if (at % bytes != 0) fault("an access out of alignment, " + bytes_at(at, bytes));
  Fibre& fibre = machine().fibres[machine().current];
  fibre.vector = {at, at + bytes, false};
  fibre.vector_left = bytes;
}

void copy_async(void* to, const void* from, size_t bytes) {
  visit(from, bytes, false);
  Copy copy = {to, bytes, {}};
  std::memcpy(copy.bytes, from, bytes);
  machine().fibres[machine().current].open_copies.push_back(copy);
}

void commit_copies() {
  Fibre& fibre = machine().fibres[machine().current];
  fibre.copy_groups.push_back(std::exchange(fibre.open_copies, {}));
}

void wait_for_copies(int groups) {
  Fibre& fibre = machine().fibres[machine().current];
  for (; fibre.copy_groups.size() > static_cast<size_t>(groups); fibre.copy_groups.pop_front())
    for (const Copy& copy : fibre.copy_groups.front()) {
      visit(copy.to, copy.size, true);
      std::memcpy(copy.to, copy.bytes, copy.size);
    }
}

}  // namespace blt::emulator

// --- called by instrumented code --------------------------------------------------------------------------------------

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
// Of shared pointers in launchers; kernels have their atomics in device.h.
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
