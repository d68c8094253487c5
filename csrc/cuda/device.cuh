// Defines what all kernels share: number types, aligned vectors, reductions over warps and blocks, shared memory.
//
// Kernels include no header of torch or of the host, so nvcc, NVRTC and (for the emulator) the host's compiler all
// compile them. Without __CUDACC__ the emulator's headers replace CUDA's built-in functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef __CUDACC__
#include "../emulator/device.h"
#endif

namespace blt {

#ifdef __CUDACC__
__device__ __forceinline__ void check_aligned(const void*, int) {}
#else
inline void check_aligned(const void* pointer, size_t bytes) { emulator::fault_if_misaligned(pointer, bytes); }
#endif

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;
using bf16 = __nv_bfloat16;
using fp16 = __half;

inline constexpr int kWarp = 32;
inline constexpr u32 kAllLanes = 0xffffffffu;

// --- numbers ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
// Arithmetic on numbers of type T is in acc_t<T>: fp64 for fp64, else fp32.
template <class T>
using acc_t = decltype(to_float(T()));

__device__ __forceinline__ __nv_bfloat162 both(bf16 a, bf16 b) { return __halves2bfloat162(a, b); }
__device__ __forceinline__ __half2 both(fp16 a, fp16 b) { return __halves2half2(a, b); }

// Converts acc_t<T> to T, rounding to nearest even.
template <class T>
__device__ __forceinline__ T from_float(acc_t<T> x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

template <class T>
__device__ __forceinline__ T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__device__ __forceinline__ T max(T a, T b) {
  return a < b ? b : a;
}
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return blt::max(a, b);
  }
};
struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

__device__ __forceinline__ float exp(float x) { return expf(x); }
__device__ __forceinline__ double exp(double x) { return ::exp(x); }
__device__ __forceinline__ float log(float x) { return logf(x); }
__device__ __forceinline__ double log(double x) { return ::log(x); }
template <class A>
__device__ __forceinline__ A minus_infinity() {
  return static_cast<A>(-__int_as_float(0x7f800000));
}
template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Returns the first i in [low, high) for which holds(i) is false, or `high`. holds is true before it and false after.
template <class I, class Holds>
__device__ __forceinline__ I partition_point(I low, I high, const Holds& holds) {
  while (low < high) {
    const I middle = low + (high - low) / 2;
    if (holds(middle))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// --- aligned vectors -------------------------------------------------------------------------------------------------

// Holds kSize numbers that one access moves, of 1 to 16 bytes.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) AlignedVector {
  T values[kSize];
  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <int kBytes>
__device__ constexpr auto zero_word() {
  if constexpr (kBytes == 1) return u8{};
  if constexpr (kBytes == 2) return u16{};
  if constexpr (kBytes == 4) return u32{};
  if constexpr (kBytes == 8) return uint2{};
  if constexpr (kBytes == 16) return uint4{};
}

// Holds an aligned vector as bits: the compiler gives each 2-byte number a register, but two of them as bits share one.
template <class T, int kSize>
using Bits = decltype(zero_word<sizeof(T) * kSize>());

// Returns the same bits as another type.
template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  union {
    From from;
    To to;
  } both = {from};
  return both.to;
}

template <class T, int kSize>
__device__ __forceinline__ AlignedVector<T, kSize> unpack(const Bits<T, kSize>& bits) {
  return bits_as<AlignedVector<T, kSize>>(bits);
}

// Loads the vector at `from`, which has its alignment.
template <int kSize, class T>
__device__ __forceinline__ Bits<T, kSize> load_bits(const T* from) {
  check_aligned(from, sizeof(T) * kSize);
  return *reinterpret_cast<const Bits<T, kSize>*>(from);
}
// Loads a vector from memory that the kernel does not write.
template <int kSize, class T>
__device__ __forceinline__ Bits<T, kSize> load_constant(const T* from) {
  check_aligned(from, sizeof(T) * kSize);
  return __ldg(reinterpret_cast<const Bits<T, kSize>*>(from));
}

template <int kSize, class T>
__device__ __forceinline__ AlignedVector<T, kSize> load(const T* from) {
  return unpack<T, kSize>(load_bits<kSize>(from));
}
// Loads a vector that is read once: it is the first to leave the caches.
template <int kSize, class T>
__device__ __forceinline__ AlignedVector<T, kSize> load_once(const T* from) {
  check_aligned(from, sizeof(T) * kSize);
  return unpack<T, kSize>(__ldcs(reinterpret_cast<const Bits<T, kSize>*>(from)));
}

template <int kSize, class T>
__device__ __forceinline__ void store(T* to, const AlignedVector<T, kSize>& vector) {
  check_aligned(to, sizeof(T) * kSize);
  *reinterpret_cast<Bits<T, kSize>*>(to) = bits_as<Bits<T, kSize>>(vector);
}

// Convert the bits of kSize numbers to accumulators, and back.
template <class T, int kSize, class From>
__device__ __forceinline__ void to_floats(acc_t<T> (&to)[kSize], const From& from) {
  const auto numbers = bits_as<AlignedVector<T, kSize>>(from);
#pragma unroll
  for (int c = 0; c < kSize; ++c) to[c] = to_float(numbers[c]);
}
template <class T, int kSize>
__device__ __forceinline__ AlignedVector<T, kSize> from_floats(const acc_t<T> (&from)[kSize]) {
  AlignedVector<T, kSize> to;
#pragma unroll
  for (int c = 0; c < kSize; ++c) to[c] = from_float<T>(from[c]);
  return to;
}

// An access of at most 16 bytes moves this many of kSize numbers of type A.
template <class A, int kSize>
inline constexpr int kAccess = kSize * sizeof(A) <= 16 ? kSize : 16 / sizeof(A);

// Stores kSize numbers in accesses of up to 16 bytes.
template <class A, int kSize>
__device__ __forceinline__ void store_numbers(A* to, const A (&numbers)[kSize]) {
  constexpr int kOne = kAccess<A, kSize>;
#pragma unroll
  for (int c = 0; c < kSize; c += kOne) {
    AlignedVector<A, kOne> some;
#pragma unroll
    for (int i = 0; i < kOne; ++i) some[i] = numbers[c + i];
    store(to + c, some);
  }
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

// Copies the kSize numbers at `from` to shared memory in the background. Copies since the last commit_copies() form a
// group; the lane may read them once it has waited for their group. Fewer than 4 bytes are copied at once.
template <int kSize, class T>
__device__ __forceinline__ void copy_async(void* to, const T* from) {
  constexpr int kBytes = kSize * sizeof(T);
  check_aligned(from, kBytes);
  if constexpr (kBytes < 4) {
    *static_cast<Bits<T, kSize>*>(to) = *reinterpret_cast<const Bits<T, kSize>*>(from);
  } else {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(to))),
                 "l"(from), "n"(kBytes)
                 : "memory");
#else
    emulator::copy_async(to, from, kBytes);
#endif
  }
}
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::commit_copies();
#endif
}
// Waits until at most kGroups groups of this lane are under way.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  emulator::wait_for_copies(kGroups);
#endif
}

// --- warps and blocks ------------------------------------------------------------------------------------------------

// Returns fold(... fold(x_0, x_1) ..., x_n) over the kLanes neighbouring lanes that this one belongs to, in a fixed
// order. All lanes of the warp take part.
template <int kLanes = kWarp, class T, class Fold>
__device__ __forceinline__ T warp_fold(T x, Fold fold) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x = fold(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

template <int kLanes = kWarp, class T>
__device__ __forceinline__ T warp_sum(T x) {
  return warp_fold<kLanes>(x, Sum{});
}

// Returns fold(... fold(x_0, x_1) ..., x) over the lanes up to this one.
template <class T, class Fold>
__device__ __forceinline__ T warp_prefix_fold(T x, Fold fold) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T before = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x = fold(before, x);
  }
  return x;
}

template <class T>
struct BlockSums {
  T before, total;
};
// Returns the sum of x over the threads of the block before this one, and over all. It ends with a barrier.
template <int kThreads, class T>
__device__ __forceinline__ BlockSums<T> block_sums(T x) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ T of_warps[kWarps];
  const int warp = threadIdx.x / kWarp;
  const T sum = warp_prefix_fold(x, Sum{});
  if (threadIdx.x % kWarp == kWarp - 1) of_warps[warp] = sum;
  __syncthreads();
  BlockSums<T> sums = {sum - x, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) sums.before += of_warps[w];
    sums.total += of_warps[w];
  }
  __syncthreads();
  return sums;
}

// Returns the block's dynamic shared memory; the launch has `.smem_bytes = sizeof(S)`.
template <class S>
__device__ __forceinline__ S& shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 bytes[];
  return *reinterpret_cast<S*>(bytes);
#else
  return *static_cast<S*>(emulator::dynamic_shared(sizeof(S)));
#endif
}

}  // namespace blt
