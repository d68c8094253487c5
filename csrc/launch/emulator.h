// Runs kernels on the CPU, in the emulator for tests.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../emulator/emulator.h"
#include "config.h"

#define BLT_KERNELS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(blt_emulated, CPU, m)

namespace blt {

class Runtime {
 public:
  explicit Runtime(const torch::stable::Tensor&) {}

  // Lets kernels read a tensor, and write it if `writable`.
  void allow(const torch::stable::Tensor& x, const void* data, bool writable) const {
    int64_t last = 0;
    for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
    scope_.add(data, x.numel() == 0 ? 0 : (last + 1) * static_cast<int64_t>(x.element_size()), writable);
  }
  static void poison(void* data, int64_t bytes) { emulator::poison(data, bytes); }

  void zero(void* data, int64_t bytes) const { emulator::zero(data, bytes); }

  // The emulator forbids kernels to read the launcher's stack, so parameters are copied without instrumentation.
  template <auto kKernel, class... P>
  void launch(const LaunchConfig& config, const P&... parameters) const {
    const auto run = [&]() __attribute__((no_sanitize("thread"))) { kKernel(parameters...); };
    const auto call = [](const void* f)
                          __attribute__((no_sanitize("thread"))) { (*static_cast<const decltype(run)*>(f))(); };
    emulator::launch(emulator::kernel_of<kKernel>, config, call, &run);
  }

 private:
  mutable emulator::Scope scope_;
};

}  // namespace blt
