// Launches kernels that NVRTC compiles when they are first launched, through the CUDA driver. It is part of _C_jit.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "config.h"
#include "driver.h"

#define BLT_KERNELS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CUDA, m)

namespace blt {

// Makes the device of a tensor current while this lives, and knows its current stream.
class Runtime {
 public:
  explicit Runtime(const torch::stable::Tensor& x)
      : index_(x.get_device_index()), guard_(index_), stream_(driver::current_stream(index_)) {}

  void allow(const torch::stable::Tensor&, const void*, bool) const {}
  static void poison(void*, int64_t) {}

  void zero(void* data, int64_t bytes) const { driver::zero(index_, data, bytes, stream_); }

  template <auto kKernel, class... P>
  void launch(const LaunchConfig& config, const P&... parameters) const {
    void* packed[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    driver::launch(driver::kernel_of<kKernel>, index_, config, packed, stream_);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

}  // namespace blt
