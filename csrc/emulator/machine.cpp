// Switches between the fibres of a block. It is compiled without instrumentation.

#include "machine.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#if !defined(__x86_64__)
#error "the emulator switches fibres on x86-64 only"
#endif

namespace blt::emulator {

// Saves the callee-saved registers and the stack pointer in *from, and resumes the fibre that was saved as `to`.
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

namespace {

// Finds the memory of this module. `__shared__` variables are statics in its writable segments; its other segments hold
// constants.
int find_segments(dl_phdr_info* info, size_t, void* data) {
  Machine& machine = *static_cast<Machine*>(data);
  const uintptr_t here = reinterpret_cast<uintptr_t>(&find_segments);
  std::vector<Range> segments;
  bool is_this_module = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    segments.push_back({begin, begin + header.p_memsz, (header.p_flags & PF_W) != 0});
    is_this_module |= segments.back().holds(here, 1);
  }
  if (!is_this_module) return 0;
  machine.constants = {segments.front().begin, segments.back().end, false};
  for (const Range& segment : segments)
    if (segment.writable) {
      machine.static_memory.begin = segment.begin;
      machine.static_memory.written.resize(segment.end - segment.begin);
    }
  return 1;
}

std::string coordinates(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string place(const Fibre& fibre) {
  const Machine& m = machine();
  return m.record->kernel + ", block " + coordinates(m.block) + ", thread " + coordinates(fibre.index);
}

// Returns the fault of a block whose fibres can no longer run though some are not done: lanes of a mask or threads at a
// barrier are missing.
std::string deadlock() {
  const Machine& m = machine();
  for (int thread = 0; thread < m.threads; ++thread) {
    const Fibre& fibre = m.fibres[thread];
    if (fibre.done || std::string_view(fibre.waits_for) == "barrier") continue;
    return place(fibre) + ": " + text(fibre.site) + ": waits for lanes of its mask that do not come";
  }
  for (int thread = 0; thread < m.threads; ++thread)
    if (!m.fibres[thread].done)
      return place(m.fibres[thread]) + ": " + text(m.fibres[thread].site) + ": a barrier that " +
             std::to_string(m.threads - m.at_barrier) + " of " + std::to_string(m.threads) + " threads do not reach";
  return "";
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

}  // namespace

Machine::Machine() {
  void* const memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the emulator");
  stacks = reinterpret_cast<uintptr_t>(memory);
  shared_bytes_ = std::make_unique<std::byte[]>(kMaxSharedBytes + 128);
  dynamic_memory.begin = (reinterpret_cast<uintptr_t>(shared_bytes_.get()) + 127) / 128 * 128;
  dl_iterate_phdr(find_segments, this);
}

Machine& machine() {
  static Machine* const only = new Machine;
  return *only;
}

std::string text(const Site& site) {
  const std::string_view file = site.file_name();
  return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(site.line());
}

void fault(const std::string& what) {
  Machine& m = machine();
  m.fault = place(m.fibre()) + ": " + what;
  void* abandoned = nullptr;  // the scheduler does not resume this fibre
  blt_emulator_switch(&abandoned, m.scheduler);
  __builtin_unreachable();
}

void wait(const char* what, const Site& site) {
  Machine& m = machine();
  Fibre& fibre = m.fibre();
  fibre.waits_for = what;
  fibre.site = site;
  blt_emulator_switch(&fibre.stack_pointer, m.scheduler);
}

void wake(int thread) {
  Machine& m = machine();
  m.fibres[thread].waits_for = nullptr;
  m.runnable.push_back(thread);
}

extern "C" void blt_emulator_enter() {
  Machine& m = machine();
  m.kernel(m.parameters);
  m.fibre().done = true;
  --m.alive;
  void* abandoned = nullptr;
  blt_emulator_switch(&abandoned, m.scheduler);
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
    // Lay the stack out as a switch leaves it: six registers, the return address, and alignment as after a call.
    auto* top = reinterpret_cast<void**>(m.stacks + (static_cast<size_t>(thread) + 1) * kStackBytes) - 8;
    std::memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(&blt_emulator_enter);
    fibre.stack_pointer = top;
    m.runnable.push_back(thread);
  }
  while (!m.runnable.empty()) {
    m.current = take_runnable();
    blt_emulator_switch(&m.scheduler, m.fibre().stack_pointer);
    m.current = -1;
    if (!m.fault.empty()) return;
  }
  if (m.alive > 0) m.fault = deadlock();
}

}  // namespace blt::emulator
