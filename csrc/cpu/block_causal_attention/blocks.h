// Moves rows of heads in and out of blocks, and has the vector functions that the passes of block_causal_attention
// share.
//
// Storage dtypes end here: a block holds accumulators, fp32 or fp64, so the passes are compiled for these two only.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "../support/vec.h"
#include "product.h"
#include "tiles.h"

namespace blt {

// Points to a [T, heads, E] tensor with unit stride in E, or to [documents, length, heads, E] with T = documents *
// length rows, where `jump` elements are added to a row's address for each document before its own.
template <class Void>
struct HeadsOf {
  Void* data;
  torch::headeronly::ScalarType dtype;
  int64_t row_stride, head_stride, length = 1, jump = 0;
  template <class T>
  auto* row(int64_t i, int64_t head) const {
    using Element = std::conditional_t<std::is_const_v<Void>, const T, T>;
    Element* const own = static_cast<Element*>(data) + i * row_stride + head * head_stride;
    return jump == 0 ? own : own + i / length * jump;
  }
  // Returns the end of the rows from i on, up to `end`, that are row_stride apart.
  int64_t even_rows(int64_t i, int64_t end) const { return jump == 0 ? end : std::min(end, (i / length + 1) * length); }
};
using Heads = HeadsOf<const void>;
using OutputHeads = HeadsOf<void>;

struct Problem {
  Heads q, k, v;
  int64_t num_heads, num_kv_heads, head_dim;  // H, G, E
  double scale;
  KeyRanges ranges;
  int64_t heads_per_kv_head() const { return num_heads / num_kv_heads; }
  int64_t kv_head_of(int64_t head) const { return head / heads_per_kv_head(); }
};

// scale = power * factor. `power` multiplies one side of the products q . k: its sign is that of scale, so the largest
// product is the largest score, and it is a power of two of at most 1, so it rounds nothing and no product exceeds its
// score. factor * (s - max) is then exact at any size, which the single multiply-add factor * s - factor * max is not.
template <class A>
struct Scaling {
  A power = 0, factor = 1;  // are those of a scale of 0

  explicit Scaling(double scale) {
    if (scale == 0) return;
    const double whole = std::exp2(std::min(std::floor(std::log2(std::abs(scale))), 0.0));
    power = static_cast<A>(std::copysign(whole, scale));
    factor = static_cast<A>(std::abs(scale) / whole);
  }
};

// --- vectors ---------------------------------------------------------------------------------------------------------

// Loads lanes<A> elements as accumulators.
template <class A, class T>
inline Vec<A> load_as(const T* p) {
  if constexpr (std::is_same_v<T, A>) {
    return load(p);
  } else if constexpr (std::is_same_v<T, Half>) {
    return load_half(p);
  } else {
#if defined(__AVX512F__)  // GCC converts in quarters below
    return bit_cast<VecF>((VecU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#else
    VecU16 bits;
    std::memcpy(&bits, p, sizeof(bits));
    return bit_cast<VecF>(__builtin_convertvector(bits, VecU) << 16);
#endif
  }
}

template <class T, class A>
inline void store_as(T* p, Vec<A> x) {
  if constexpr (std::is_same_v<T, A>) {
    store(p, x);
  } else if constexpr (std::is_same_v<T, Half>) {
    store_half(p, x);
  } else {
    const VecU16 bits = __builtin_convertvector(round_bf16(x) >> 16, VecU16);
    std::memcpy(p, &bits, sizeof(bits));
  }
}

// Transposes a square of vectors in log2(lanes) rounds, in which pairs of rows exchange halves.
template <class A, int kHalf = 1>
inline void transpose(Vec<A> (&rows)[lanes<A>]) {
  if constexpr (kHalf < lanes<A>) {
    [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
      // The numbers are lanes of both rows, those of the second after those of the first.
      using Low = std::integer_sequence<int, (kLane & kHalf ? lanes<A> + kLane - kHalf : kLane)...>;
      using High = std::integer_sequence<int, (kLane & kHalf ? lanes<A> + kLane : kLane + kHalf)...>;
#pragma GCC unroll 16
      for (int i = 0; i < lanes<A>; ++i)
        if (!(i & kHalf)) {
          const Vec<A> a = rows[i], b = rows[i + kHalf];
          rows[i] = shuffle(a, b, Low{});
          rows[i + kHalf] = shuffle(a, b, High{});
        }
    }(std::make_integer_sequence<int, lanes<A>>{});
    transpose<A, 2 * kHalf>(rows);
  }
}

// Returns exp(factor x) for factor x of at most 88, and 0 below kExpMin: products with subnormal weights take a hundred
// times as long.
inline VecF bounded_exp(VecF x, float factor = 1) {
  const VecF p = exp2_of_product(x, kLog2e * factor);  // has any bits below kExpMin
  return x < broadcast(kExpMin / factor) ? VecF{} : p;
}
inline Vec<double> bounded_exp(Vec<double> x, double factor = 1) { return exp(factor * x); }

template <class M>
inline bool any(M mask) {
  int64_t words[sizeof(M) / 8], all = 0;
  std::memcpy(words, &mask, sizeof(M));
  for (const int64_t word : words) all |= word;
  return all;
}

// A masked key has this score.
template <class A>
inline constexpr A kMaskedScore = -std::numeric_limits<A>::infinity();

// Returns the position of each lane of vector c in a row of a block.
template <class A>
inline Vec<A> lane_numbers(int c) {
  Vec<A> numbers;
  for (int i = 0; i < lanes<A>; ++i) numbers[i] = static_cast<A>(c * lanes<A> + i);
  return numbers;
}

// --- rows in and out of blocks (blocks.cpp) --------------------------------------------------------------------------

// Sets block[i][e] to x[rows.begin + i][e], with rows of the block `pitch` elements apart. In the tensor, they may be a
// power of two apart, all in one set of the cache.
template <class A>
void gather_rows(A* block, const Heads& x, int64_t head, const Range& rows, int64_t head_dim, int64_t pitch);

// Sets block[i][lane] to x[rows.begin + i][chunk * kWidth + lane], or 0 beyond E, and prefetches that of the next head.
template <class A>
void gather_chunk(A* block, const Heads& x, int64_t head, const Range& rows, int64_t head_dim, int64_t chunk);

// Sets block[e][lane] to factor * x[rows.begin + lane][e] for lanes < width, whole vectors; lanes beyond the rows are
// 0. Returns the block.
template <class A>
A* transpose_in(A* block, const Heads& x, int64_t head, const Range& rows, int64_t head_dim, A factor,
                int64_t width = kWidth<A>);

// Sets x[rows.begin + lane][e] to factor[lane] * block[e][lane].
template <class A>
void transpose_out(const OutputHeads& x, int64_t head, const Range& rows, int64_t head_dim, const A* block,
                   const A* factor);

// Sets x[i][e] to row[e].
template <class A>
void store_row(const OutputHeads& x, int64_t i, int64_t head, int64_t head_dim, const A* row);

// Sets out[i * num_heads + head] to x[i][head] . y[i][head] for pairs (i, head) from number `begin` to `end`.
template <class A>
void dot_rows(A* out, const Heads& x, const Heads& y, int64_t begin, int64_t end, int64_t num_heads, int64_t head_dim);

// --- masks -----------------------------------------------------------------------------------------------------------

// Has the keys that the query in each lane attends to, and those that all of them attend to, relative to key `origin`.
template <class A>
struct LaneRanges {
  alignas(kVecBytes) A first[kWidth<A>], last[kWidth<A>];
  Range common;

  void set(const KeyRanges& ranges, const Tile& tile, int64_t origin) {
    common = {0, tile.streamed.end - origin};
    int64_t b = ranges.document_of(tile.lanes.begin);
    for (int64_t lane = 0; lane < kWidth<A>; ++lane) {
      const int64_t query = tile.lanes.begin + lane;
      Range keys = {0, 0};
      if (query < tile.lanes.end) {
        while (ranges.cu_seqlens_q[b + 1] <= query) ++b;
        keys = ranges.keys(query, b);
        keys = keys.begin == keys.end ? Range{0, 0} : Range{keys.begin - origin, keys.end - origin};
        common = {std::max(common.begin, keys.begin), std::min(common.end, keys.end)};
      }
      first[lane] = static_cast<A>(keys.begin);
      last[lane] = static_cast<A>(keys.end);
    }
  }
  bool all_unmasked(const Range& keys) const { return common.begin <= keys.begin && keys.end <= common.end; }
  Mask<A> unmasked(int64_t key, int c) const {
    const Vec<A> j = Vec<A>{} + static_cast<A>(key);
    return (load(first + c * lanes<A>) <= j) & (j < load(last + c * lanes<A>));
  }
};

}  // namespace blt
