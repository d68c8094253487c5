// Launches kernels that nvcc compiled, through the CUDA runtime: in _C_cuda.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>

#include "config.h"

#define BLT_KERNELS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CUDA, m)

// torch declares it only in builds with CUDA, and the headers may be those of another build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace blt {

// Makes the device of a tensor current while this lives, and knows its current stream.
class Runtime {
 public:
  explicit Runtime(const torch::stable::Tensor& x) : index_(x.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == 0, "no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void allow(const torch::stable::Tensor&, const void*, bool) const {}
  static void poison(void*, int64_t) {}

  void zero(void* data, int64_t bytes) const {
    check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream_), "a tensor was not zeroed");
  }

  template <auto kKernel, class... P>
  void launch(const LaunchConfig& config, const P&... parameters) const {
    void* packed[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    const void* const kernel = reinterpret_cast<const void*>(kKernel);
    static std::atomic<uint64_t> loaded{0};  // has one bit per device
    const uint64_t bit = uint64_t{1} << (index_ % 64);
    if ((loaded.load(std::memory_order_relaxed) & bit) == 0) {
      load(kernel);
      loaded.fetch_or(bit, std::memory_order_relaxed);
    }
    const dim3 grid(static_cast<unsigned>(config.grid.x), static_cast<unsigned>(config.grid.y));
    check(cudaLaunchKernel(kernel, grid, dim3(config.block), packed, static_cast<size_t>(config.smem_bytes), stream_),
          "a kernel was not launched");
  }

 private:
  static void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
  }

  // Loads a kernel, which the driver otherwise puts off until the first launch, and raises its limit of dynamic shared
  // memory to the device's. Loading may synchronise, which would invalidate the capture of a graph.
  void load(const void* kernel) const {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &capture), "no capture status");
    STD_TORCH_CHECK(
        capture == cudaStreamCaptureStatusNone,
        "a kernel was launched for the first time while a CUDA graph was captured: call the op once on inputs "
        "of the same dtypes and shapes before the capture, as a warm-up");
    cudaFuncAttributes attributes{};
    int limit = 0;
    check(cudaFuncGetAttributes(&attributes, kernel), "a kernel does not load");
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_), "no limit of shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               limit - static_cast<int>(attributes.sharedSizeBytes)),
          "a kernel does not get its shared memory");
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace blt
