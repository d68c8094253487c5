// Launches a kernel from a launcher. A launcher is compiled in three ways, with one class Runtime for each:
//
//   cuda.h      launchers and kernels compiled by nvcc, in _C_cuda
//   emulator.h  launchers and kernels compiled for the CPU, for tests
//   nvrtc.h     launchers alone, in _C_jit; NVRTC compiles a kernel when it is first launched (blt_kernels/_nvrtc.py)
//
//   const Device device(x);
//   device.launch<patch_pool_fwd_kernel<T, 4>>({.grid = {n}, .block = 256}, device.read<T>(x), device.write<T>(out));
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/empty.h"
#include "../cuda/device.cuh"
#include "config.h"

#if defined(__CUDACC__)
#include "cuda.h"
#elif defined(BLT_KERNELS_EMULATE)
#include "emulator.h"
#else
#include "nvrtc.h"
#endif

namespace blt {

// Makes the device of a tensor current while this lives.
class Device {
 public:
  explicit Device(const Tensor& x) : runtime_(x) {}

  // Returns the elements of a tensor that a kernel reads, or null without a tensor.
  template <class T>
  const T* read(const Tensor& x) const {
    const void* const data = x.const_data_ptr();
    runtime_.allow(x, data, false);
    return static_cast<const T*>(data);
  }
  template <class T>
  const T* read(const std::optional<Tensor>& x) const {
    return x ? read<T>(*x) : nullptr;
  }
  // Returns the elements of a tensor that a kernel writes.
  template <class T>
  T* write(Tensor& x) const {
    void* const data = x.mutable_data_ptr();
    runtime_.allow(x, data, true);
    return static_cast<T*>(data);
  }

  // Zeroes a contiguous tensor by a memset.
  void zero(Tensor& x) const {
    STD_TORCH_CHECK(x.is_contiguous(), "a tensor to zero has to be contiguous");
    const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
    if (bytes > 0) runtime_.zero(x.mutable_data_ptr(), bytes);
  }

  template <auto kKernel, class... Arguments>
  void launch(const LaunchConfig& config, const Arguments&... arguments) const {
    launch_as<kKernel>(kKernel, config, arguments...);
  }

 private:
  // Converts the arguments to the types of the kernel's parameters.
  template <auto kKernel, class... P>
  void launch_as(void (*)(P...), const LaunchConfig& config, const std::type_identity_t<P>&... parameters) const {
    const auto [x, y] = config.grid;
    if (x <= 0 || y <= 0) return;
    STD_TORCH_CHECK(x <= INT32_MAX && y <= 65535, "the grid [", x, ", ", y, "] of a kernel is too large");
    runtime_.launch<kKernel>(config, parameters...);
  }

  Runtime runtime_;
};

// Returns an uninitialised contiguous tensor on the device of `like`, of its dtype unless another is given.
inline Tensor device_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            std::optional<ScalarType> dtype = std::nullopt) {
  Tensor out = empty(like, sizes, dtype);
  Runtime::poison(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

// Dispatches like dispatch_float, but with CUDA's types for bf16 and fp16.
template <class F>
decltype(auto) dispatch_device_float(ScalarType dtype, const char* name, F&& f) {
  return dispatch_float<bf16, fp16>(dtype, name, f);
}

// Calls f(Tag<i32>) or f(Tag<i64>), for tokens of type int32 or int64.
template <class F>
decltype(auto) dispatch_tokens(const Tensor& tokens, F&& f) {
  return dispatch_int<i64>(tokens.scalar_type(), "tokens", f);
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Returns the row stride in bytes.
inline int64_t row_bytes(const Tensor& x) { return x.stride(0) * static_cast<int64_t>(x.element_size()); }

// Returns x, or a contiguous copy if its rows are more than `max_bytes` apart. Such rows are few.
inline Tensor limit_row_stride(const Tensor& x, int64_t max_bytes) {
  return x.size(0) <= 1 || row_bytes(x) <= max_bytes ? x : as_contiguous(x);
}

template <class T>
int64_t bytes_of(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T));
}

inline int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

// Calls f(Constant<n>) with n elements of T per access: 16 bytes if 16 divides all of `places`, which are addresses and
// strides in bytes, else 1 element.
template <class T, class F>
decltype(auto) dispatch_vec(std::initializer_list<int64_t> places, F&& f) {
  int64_t bits = 0;
  for (const int64_t place : places) bits |= place;
  if (bits % 16 == 0) return f(Constant<static_cast<int>(16 / sizeof(T))>{});
  return f(Constant<1>{});
}

}  // namespace blt
