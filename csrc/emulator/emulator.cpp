// Launches kernels, and implements the functions that CUDA has built in. It is compiled without instrumentation.

#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "device.h"
#include "machine.h"

namespace blt::emulator {
namespace {

std::vector<std::string>& registered() {
  static auto* const all = new std::vector<std::string>;
  return *all;
}

}  // namespace

// --- kernels and launches --------------------------------------------------------------------------------------------

std::string_view add_kernel(std::string_view name) {
  // Several launchers may launch the same kernel.
  if (std::find(registered().begin(), registered().end(), name) == registered().end()) registered().emplace_back(name);
  return name;
}

std::vector<std::string> kernels() { return registered(); }

std::vector<Launch>& launches() { return machine().launches; }

void set_order(Order order, uint64_t seed) {
  machine().order = order;
  machine().random.seed(seed);
}

void launch(std::string_view kernel, const LaunchConfig& config, void (*run)(const void*), const void* parameters) {
  Machine& m = machine();
  const std::string name(kernel);
  const auto [x, y] = config.grid;
  if (config.block < 1 || config.block > kMaxThreads)
    throw std::runtime_error(name + ": " + std::to_string(config.block) + " threads");
  if (config.smem_bytes < 0 || config.smem_bytes > static_cast<int64_t>(kMaxSharedBytes))
    throw std::runtime_error(name + ": " + std::to_string(config.smem_bytes) + " bytes of shared memory");
  Launch& record = m.launches.emplace_back(Launch{name, config});
  m.record = &record;
  m.kernel = run;
  m.parameters = parameters;
  m.threads = config.block;
  m.grid = {static_cast<unsigned>(x), static_cast<unsigned>(y), 1};
  m.dynamic_memory.written.resize(static_cast<size_t>(config.smem_bytes));
  std::vector<int64_t> order(static_cast<size_t>(x * y));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  if (m.order == Order::kBackward) std::reverse(order.begin(), order.end());
  if (m.order == Order::kRandom) std::shuffle(order.begin(), order.end(), m.random);
  for (const int64_t block : order) {
    m.block = {static_cast<unsigned>(block % x), static_cast<unsigned>(block / x), 0};
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

// --- called by kernels -----------------------------------------------------------------------------------------------

uint3 thread_index() { return machine().fibre().index; }
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

LaneValues collective(Collective kind, uint32_t mask, uint64_t value, const Site& site) {
  Machine& m = machine();
  const int lane = m.current % 32, first = m.current - lane;
  if ((mask >> lane & 1) == 0) fault(text(site) + ": its own lane is not in the mask");
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && (first + i >= m.threads || m.fibres[first + i].done))
      fault(text(site) + ": lane " + std::to_string(i) + " of the mask " +
            (first + i >= m.threads ? "is not there" : "has ended"));
  auto& warp = m.warps[m.current / 32];
  auto at = std::find_if(warp.begin(), warp.end(),
                         [&](const OpenCollective& open) { return open.mask == mask && open.arrived != mask; });
  if (at == warp.end()) at = warp.insert(warp.end(), OpenCollective{kind, mask});
  if (at->kind != kind) fault(text(site) + ": other lanes of the mask do something else");
  at->arrived |= 1u << lane;
  at->lanes.values[lane] = value;
  if (at->arrived == mask) {
    for (int i = 0; i < 32; ++i)
      if ((mask >> i & 1) && i != lane) wake(first + i);
  } else {
    wait("lanes", site);
  }
  const LaneValues lanes = at->lanes;
  at->left |= 1u << lane;
  if (at->left == mask) warp.erase(at);
  return lanes;
}

void fault_of_lane(int source, uint32_t mask, const Site& site) {
  char number[16];
  std::snprintf(number, sizeof(number), "%#x", mask);
  fault(text(site) + ": a value from lane " + std::to_string(source) + ", which is not in the mask " + number);
}

void fault_of_wait() { fault("waits for a block that has not run"); }

}  // namespace blt::emulator
