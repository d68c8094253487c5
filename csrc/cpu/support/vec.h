// Vectors are as wide as the instruction set that this file is compiled for: 4, 8 or 16 lanes of fp32, half as many of
// fp64.
//
// Arithmetic uses compiler vectors, so the code is the same for every instruction set; intrinsics appear only where a
// conversion has an instruction of its own. Loads and stores move a Pair: two vectors, 2 * kLanes elements of fp32 and
// below, half as many of fp64. A Pair of bf16 holds the even elements in `a` and the odd ones in `b`, which takes one
// instruction a vector instead of two. The order does not matter to loops that treat all elements alike; the others
// find it with `lane_index`.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace blt {

using std::bit_cast;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif
inline constexpr int kLanes = kVecBytes / 4;

typedef float VecF __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI __attribute__((vector_size(kVecBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVecBytes / 2)));

// A vector of accumulators has lanes<A> lanes: lanes<double> is half of lanes<float>.
template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVecBytes)));
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> mask_element;
  typedef mask_element mask __attribute__((vector_size(kVecBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
using Mask = typename VecOf<A>::mask;
template <class A>
inline constexpr int lanes = kVecBytes / static_cast<int>(sizeof(A));

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <class A = float>
inline Vec<A> broadcast(A x) {
  return Vec<A>{} + x;
}

// Returns the larger of two, and `b` where they do not compare, so that a NaN in `b` stays and one in `a` goes.
template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

// Folds the lanes in halves, with log2(lanes<A>) dependent steps.
template <class A, class F>
inline A fold(Vec<A> v, F f) {
  alignas(kVecBytes) A cells[lanes<A>];
  std::memcpy(cells, &v, sizeof(cells));
  for (int width = lanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) cells[i] = f(cells[i], cells[i + width]);
  return cells[0];
}

template <class A>
inline A lane_sum(Vec<A> v) {
  return fold<A>(v, [](A a, A b) { return a + b; });
}

// Returns the lanes kIndex of x and y; the lanes of y are numbered after those of x.
template <int... kIndex, class V>
inline V shuffle(V x, V y, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, kIndex...);
#else
  return __builtin_shuffle(x, y, Mask<std::decay_t<decltype(x[0])>>{kIndex...});
#endif
}

// Lane i of the result is x_i + x_(i + kStep) where i lacks the bit kStep, else y_i + y_(i - kStep).
template <int kStep, int... kLane, class V>
inline V fold_two(V x, V y, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V low = shuffle(x, y, std::integer_sequence<int, (kLane & kStep ? kCount + kLane - kStep : kLane)...>{});
  const V high = shuffle(x, y, std::integer_sequence<int, (kLane & kStep ? kCount + kLane : kLane + kStep)...>{});
  return low + high;
}

// Lane i of the result is the sum of the lanes of v[i]. v is overwritten.
template <class A, int kStep = lanes<A> / 2>
inline Vec<A> lane_sums(Vec<A>* v) {
  for (int i = 0; i < kStep; ++i)
    v[i] = fold_two<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, lanes<A>>{});
  if constexpr (kStep > 1) return lane_sums<A, kStep / 2>(v);
  return v[0];
}

template <class A>
struct PairOf {
  Vec<A> a, b;
};
using Pair = PairOf<float>;

template <class A>
inline constexpr int pair_lanes = 2 * lanes<A>;

// Sets a and b to the index of the element of a Pair of T that each lane holds.
template <class T, class M>
inline void lane_index(M& a, M& b) {
  constexpr int kCount = sizeof(M) / sizeof(a[0]);
  for (int i = 0; i < kCount; ++i) {
    const bool interleaved = std::is_same_v<T, BFloat16>;
    a[i] = interleaved ? 2 * i : i;
    b[i] = interleaved ? 2 * i + 1 : kCount + i;
  }
}

// --- load -----------------------------------------------------------------------------------------------------------

template <class A>
inline PairOf<A> load_pair(const A* p) {
  return {load(p), load(p + lanes<A>)};
}

inline Pair load_pair(const BFloat16* p) {
  VecU bits;
  std::memcpy(&bits, p, sizeof(VecU));
  return {bit_cast<VecF>(bits << 16), bit_cast<VecF>(bits & 0xffff0000u)};
}

inline VecF load_half(const Half* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecU16 half;
  std::memcpy(&half, p, sizeof(half));
  const VecU bits = __builtin_convertvector(half, VecU);
  // Move the exponent and mantissa into place and rebias by a multiplication, which is exact for subnormals too.
  const VecU scaled = bit_cast<VecU>(bit_cast<VecF>((bits & 0x7fffu) << 13) * 0x1p112f);
  const VecU special = (VecU)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // this keeps inf and NaN
  return bit_cast<VecF>(scaled | special | ((bits & 0x8000u) << 16));
#endif
}

inline Pair load_pair(const Half* p) { return {load_half(p), load_half(p + kLanes)}; }

// Prefetches the lines of a Pair; an address beyond the data does no harm.
template <class T>
inline void prefetch_pair(const T* p) {
  for (int64_t i = 0; i < pair_lanes<float> * static_cast<int64_t>(sizeof(T)); i += 64)
    __builtin_prefetch(p + i / sizeof(T));
}

// --- store ----------------------------------------------------------------------------------------------------------

template <class A>
inline void store_pair(A* p, PairOf<A> x) {
  store(p, x.a);
  store(p + lanes<A>, x.b);
}

// Rounds to nearest even, into the upper half of each lane; NaN stays NaN.
inline VecU round_bf16(VecF x) {
  const VecU bits = bit_cast<VecU>(x);
  const VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return x == x ? rounded : (VecU{} + 0x7fc00000u);
}

inline void store_pair(BFloat16* p, Pair x) {
  const VecU bits = (round_bf16(x.a) >> 16) | (round_bf16(x.b) & 0xffff0000u);
  std::memcpy(p, &bits, sizeof(bits));
}

inline void store_half(Half* p, VecF x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = Half(x[i]);
#endif
}

inline void store_pair(Half* p, Pair x) {
  store_half(p, x.a);
  store_half(p + kLanes, x.b);
}

// --- exp ------------------------------------------------------------------------------------------------------------

inline constexpr float kExpMin = -87.0f;  // exp(kExpMin) is 1e-38, the smallest result that is not subnormal
inline constexpr float kLog2e = 0x1.715476p+0f;

// Returns 2^(factor x) for -126 <= factor x <= 127, with an error below 1.5e-7 where factor x is exact. factor x = n +
// f with n an integer and |f| <= 1/2; 2^f is a minimax polynomial that is exact at 0, and n is added to the exponent
// bits. NaN gives NaN.
inline VecF exp2_of_product(VecF x, float factor) {
  constexpr float kRound = 0x1.8p+23f;  // adding it leaves round(factor x) in the low bits
  constexpr float kExp2[] = {1.0f,           0x1.62e430p-1f,  0x1.ebfbdcp-3f, 0x1.c6aee8p-5f,
                             0x1.3b2d4cp-7f, 0x1.5f3e54p-10f, 0x1.41fbbcp-13f};
  const VecF shifted = x * factor + kRound;
  const VecF n = shifted - kRound;
  const VecF f = x * factor - n;  // it rounds once where there is a fused multiply-add
  VecF p = broadcast(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = p * f + kExp2[i];
  return bit_cast<VecF>(bit_cast<VecU>(p) + (bit_cast<VecU>(shifted) << 23));
}

// Computes exp(x) for kExpMin <= x <= 88 with a relative error below 1.5e-7.
inline VecF exp(VecF x) { return exp2_of_product(x, kLog2e); }

// fp64 serves checks and is not tuned.
__attribute__((noinline)) inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace blt
