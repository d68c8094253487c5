// From a launcher to a kernel, in the three ways that a launcher is compiled:
//
//   nvcc                 _C_cuda, the kernels beside the launchers, through the CUDA runtime
//   BLT_KERNELS_EMULATE  the emulator for tests: kernels run on the CPU (csrc/emulator/)
//   otherwise            _C_jit, launchers alone: NVRTC compiles a kernel at its first launch (blt_kernels/_nvrtc.py)
//
//   const Device device(x);
//   device.launch<patch_pool_fwd_kernel<T, 4>>({.blocks = n, .threads = 256}, device.read<T>(x), device.write<T>(out));
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "../common/check.h"
#include "../common/dispatch.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <atomic>
#elif defined(BLT_KERNELS_EMULATE)
#include "../emulator/emulator.h"
#else
#include "nvrtc.h"
#endif
#include "../cuda/device.cuh"

#if defined(BLT_KERNELS_EMULATE)
#define BLT_KERNELS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(blt_emulated, CPU, m)
#else
#define BLT_KERNELS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CUDA, m)
#endif

#if defined(__CUDACC__)
// Declared for builds of torch with CUDA only; the headers may be those of another build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace blt {

// A grid of `blocks` x `rows` blocks. A launch without blocks does nothing.
struct Shape {
  int64_t blocks;
  int threads;
  int64_t shared = 0;  // bytes of dynamic shared memory
  int64_t rows = 1;
};

// The device of a tensor while an op runs there: current, with its current stream.
class Device {
 public:
  explicit Device(const Tensor& x)
#if defined(BLT_KERNELS_EMULATE)
  {
    (void)x;
  }
#else
      : index_(x.get_device_index()), guard_(index_) {
#if defined(__CUDACC__)
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_) == 0, "no current CUDA stream");
#else
    stream_ = jit::current_stream(index_);
#endif
  }
#endif

  // The elements of a tensor, for a kernel to read or to write. Null for a tensor that is not there.
  template <class T>
  const T* read(const Tensor& x) const {
    const void* const data = x.const_data_ptr();
#if defined(BLT_KERNELS_EMULATE)
    scope_.add(data, extent(x), false);
#endif
    return static_cast<const T*>(data);
  }
  template <class T>
  const T* read(const std::optional<Tensor>& x) const {
    return x ? read<T>(*x) : nullptr;
  }
  template <class T>
  T* write(Tensor& x) const {
    void* const data = x.mutable_data_ptr();
#if defined(BLT_KERNELS_EMULATE)
    scope_.add(data, extent(x), true);
#endif
    return static_cast<T*>(data);
  }

  // Zeroes a contiguous tensor: a memset on the stream, which needs no kernel.
  void zero(Tensor& x) const {
    STD_TORCH_CHECK(x.is_contiguous(), "a tensor to zero has to be contiguous");
    const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
    if (bytes == 0) return;
#if defined(__CUDACC__)
    check(cudaMemsetAsync(x.mutable_data_ptr(), 0, static_cast<size_t>(bytes), stream()), "a tensor was not zeroed");
#elif defined(BLT_KERNELS_EMULATE)
    emulator::zero(x.mutable_data_ptr(), bytes);
#else
    jit::zero(index_, x.mutable_data_ptr(), bytes, stream_);
#endif
  }

  template <auto kKernel, class... Arguments>
  void launch(const Shape& shape, const Arguments&... arguments) const {
    launch_as<kKernel>(kKernel, shape, arguments...);
  }

 private:
  template <auto kKernel, class... P>
  void launch_as(void (*)(P...), const Shape& shape, const std::type_identity_t<P>&... arguments) const {
    if (shape.blocks <= 0 || shape.rows <= 0) return;
    STD_TORCH_CHECK(shape.blocks <= INT32_MAX && shape.rows <= 65535, "the grid [", shape.rows, ", ", shape.blocks,
                    "] of a kernel is too large");
#if defined(__CUDACC__)
    void* packed[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    const void* const kernel = reinterpret_cast<const void*>(kKernel);
    static std::atomic<uint64_t> loaded{0};  // a bit for each device
    const uint64_t bit = uint64_t{1} << (index_ % 64);
    if ((loaded.load(std::memory_order_relaxed) & bit) == 0) {
      load(kernel);
      loaded.fetch_or(bit, std::memory_order_relaxed);
    }
    check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.rows)),
                           dim3(shape.threads), packed, static_cast<size_t>(shape.shared), stream()),
          "a kernel was not launched");
#elif defined(BLT_KERNELS_EMULATE)
    // Parameters are copied out of sight of the emulator, which allows kernels nothing of the launcher's stack.
    const auto run = [&]() __attribute__((no_sanitize("thread"))) { kKernel(arguments...); };
    const auto call = [](const void* f)
                          __attribute__((no_sanitize("thread"))) { (*static_cast<const decltype(run)*>(f))(); };
    emulator::launch(emulator::Known<kKernel>::entry, shape.blocks, shape.rows, shape.threads, shape.shared, call,
                     &run);
#else
    void* packed[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    jit::launch(jit::Known<kKernel>::entry, index_, shape.blocks, shape.rows, shape.threads, shape.shared, packed,
                stream_);
#endif
  }

#if defined(__CUDACC__)
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

  static void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
  }

  // Loads a kernel, which the driver otherwise puts off until its first launch, and lets it have all the shared memory that
  // a block may have. While a graph is captured, loading may synchronise, which would spoil the capture.
  void load(const void* kernel) const {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream(), &capture), "no capture status");
    STD_TORCH_CHECK(
        capture == cudaStreamCaptureStatusNone,
        "a kernel was launched for the first time while a CUDA graph was captured: call the op once on inputs "
        "of the same dtypes and shapes before the capture, as a warm-up");
    cudaFuncAttributes attributes{};
    int most = 0;
    check(cudaFuncGetAttributes(&attributes, kernel), "a kernel does not load");
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_), "no limit of shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes)),
          "a kernel does not get its shared memory");
  }
#endif

#if defined(BLT_KERNELS_EMULATE)
  static int64_t extent(const Tensor& x) {
    if (x.numel() == 0) return 0;
    int64_t last = 0;
    for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
    return (last + 1) * x.element_size();
  }
  mutable emulator::Scope scope_;
#else
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

// An uninitialised contiguous tensor on the device of `like`, of its dtype unless another is given.
inline Tensor device_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            std::optional<ScalarType> dtype = std::nullopt) {
  Tensor out = torch::stable::new_empty(like, sizes, dtype);
#if defined(BLT_KERNELS_EMULATE)
  emulator::poison(out.mutable_data_ptr(), out.numel() * out.element_size());
#endif
  return out;
}

// As dispatch_float, with CUDA's types for bf16 and fp16.
template <class F>
decltype(auto) dispatch_device_float(ScalarType dtype, const char* name, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Tag<float>{});
    case ScalarType::BFloat16: return f(Tag<bf16>{});
    case ScalarType::Half: return f(Tag<fp16>{});
    case ScalarType::Double: return f(Tag<double>{});
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float32, bfloat16, float16 or float64, got ",
                      torch::headeronly::toString(dtype));
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Offsets have one entry more than there are patches or documents.
inline int64_t count_of(const Tensor& offsets, const char* name) {
  STD_TORCH_CHECK(offsets.size(0) >= 1, name, ": expected at least one entry");
  return offsets.size(0) - 1;
}

// From row to row.
inline int64_t row_bytes(const Tensor& x) { return x.stride(0) * static_cast<int64_t>(x.element_size()); }

template <class T>
int64_t bytes_of(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T));
}

inline int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

// f(Constant<n>), n elements of T to an access: 16 bytes of them if that divides all of `places`, which are addresses and
// strides in bytes; else 1.
template <class T, class F>
decltype(auto) dispatch_pack(std::initializer_list<int64_t> places, F&& f) {
  int64_t bits = 0;
  for (const int64_t place : places) bits |= place;
  if (bits % 16 == 0) return f(Constant<static_cast<int>(16 / sizeof(T))>{});
  return f(Constant<1>{});
}

}  // namespace blt
