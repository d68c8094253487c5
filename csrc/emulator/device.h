// Declares CUDA's built-in functions for kernels that the host's compiler compiles (emulator.h).
#pragma once

#include <vector_types.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __align__
#undef __constant__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
#define __align__(n) alignas(n)
// Blocks run one after the other and share the static variable, whose bytes count as unwritten when a block begins.
#define __shared__ static

namespace blt::emulator {

using Site = std::source_location;

// These return the indices of the current thread.
uint3 thread_index();
uint3 block_index();
uint3 block_size();
uint3 grid_size();

void* dynamic_shared(size_t bytes);
void barrier(const Site& site);
void fault_if_misaligned(const void* pointer, size_t bytes);
// Like cp.async, except that the bytes are read at once and written to shared memory when their group is waited for.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int groups);
// Faults, since blocks run one after the other and the awaited block never runs meanwhile.
[[noreturn]] void fault_of_wait();

// A warp collective gives every lane of a mask the values of all of them, once all have arrived.
enum class Collective { kSync, kVote, kShuffle, kMatch };
struct LaneValues {
  uint64_t values[32];
};
LaneValues collective(Collective kind, uint32_t mask, uint64_t value, const Site& site);
int lane();
[[noreturn]] void fault_of_lane(int source, uint32_t mask, const Site& site);

template <class T>
T shuffle(uint32_t mask, T value, int source, const Site& site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const LaneValues lanes = collective(Collective::kShuffle, mask, bits, site);
  if ((mask >> source & 1) == 0) fault_of_lane(source, mask, site);
  std::memcpy(&value, &lanes.values[source], sizeof(T));
  return value;
}

}  // namespace blt::emulator

#define threadIdx (::blt::emulator::thread_index())
#define blockIdx (::blt::emulator::block_index())
#define blockDim (::blt::emulator::block_size())
#define gridDim (::blt::emulator::grid_size())

// --- barriers, votes, shuffles ---------------------------------------------------------------------------------------

inline void __syncthreads(const blt::emulator::Site site = blt::emulator::Site::current()) {
  blt::emulator::barrier(site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const blt::emulator::Site site = blt::emulator::Site::current()) {
  blt::emulator::collective(blt::emulator::Collective::kSync, mask, 0, site);
}
inline unsigned __ballot_sync(unsigned mask, int vote,
                              const blt::emulator::Site site = blt::emulator::Site::current()) {
  const auto lanes = blt::emulator::collective(blt::emulator::Collective::kVote, mask, vote != 0, site);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (mask >> i & 1 ? static_cast<unsigned>(lanes.values[i]) : 0) << i;
  return votes;
}
inline int __all_sync(unsigned mask, int vote, const blt::emulator::Site site = blt::emulator::Site::current()) {
  return __ballot_sync(mask, vote, site) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const blt::emulator::Site site = blt::emulator::Site::current()) {
  const int first = blt::emulator::lane() & ~(width - 1);
  return blt::emulator::shuffle(mask, value, first + (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  const blt::emulator::Site site = blt::emulator::Site::current()) {
  const int lane = blt::emulator::lane(), source = lane ^ bits;
  // A lane reads its own group and those before it, not those after it.
  return blt::emulator::shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 const blt::emulator::Site site = blt::emulator::Site::current()) {
  const int lane = blt::emulator::lane(), source = lane - static_cast<int>(distance);
  return blt::emulator::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   const blt::emulator::Site site = blt::emulator::Site::current()) {
  const int lane = blt::emulator::lane(), source = lane + static_cast<int>(distance);
  return blt::emulator::shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, site);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, const blt::emulator::Site site = blt::emulator::Site::current()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const auto lanes = blt::emulator::collective(blt::emulator::Collective::kMatch, mask, bits, site);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= static_cast<unsigned>((mask >> i & 1) && lanes.values[i] == bits) << i;
  return same;
}

// --- memory ----------------------------------------------------------------------------------------------------------

template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}

// Atomics are for integers only: the order of floating-point sums would not be fixed.
template <class T>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "sums of floating point numbers by atomics are not deterministic");
  const T old = *to;
  *to = old + value;
  return old;
}
template <class T>
T atomicOr(T* to, std::type_identity_t<T> value) {
  const T old = *to;
  *to = old | value;
  return old;
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
