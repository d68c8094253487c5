// What the passes of block_causal_attention share: rows of heads in and out of blocks, masks, the exponential.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "product.h"
#include "tiles.h"

namespace blt {

// A [T, heads, E] tensor with unit stride in E.
template <class T>
struct Heads {
  T* data;
  int64_t row_stride, head_stride;
  T* row(int64_t i, int64_t head) const { return data + i * row_stride + head * head_stride; }
};

template <class T>
struct Problem {
  Heads<const T> q, k, v;
  int64_t heads, groups, width;  // H, G, E
  double scale;
  Visibility visible;
  int64_t group_of(int64_t head) const { return head / (heads / groups); }
};

// scale = power * factor. Products are those of one side times `power`: its sign is that of the scale, so that the largest
// product is the largest score, and it is a power of two of at most 1, so that it rounds nothing and no product is larger
// than its score. Differences of products times `factor` are those of the scores, exact at any size: factor * product -
// factor * (largest product), in one multiply-add, is not, and may be millions.
template <class A>
struct Scaling {
  A power = 0, factor = 1;  // of a scale of 0

  explicit Scaling(double scale) {
    if (scale == 0) return;
    const double whole = std::exp2(std::min(std::floor(std::log2(std::abs(scale))), 0.0));
    power = static_cast<A>(std::copysign(whole, scale));
    factor = static_cast<A>(std::abs(scale) / whole);
  }
};

// --- vectors ----------------------------------------------------------------------------------------------------------

// lanes<A> elements as accumulators, and back.
template <class A, class T>
inline Vec<A> load_as(const T* p) {
  if constexpr (std::is_same_v<T, A>) {
    return load(p);
  } else if constexpr (std::is_same_v<T, Half>) {
    return load_half(p);
  } else {
#if defined(__AVX512F__)  // what the compiler makes of the conversion below takes it in quarters
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

// Of a square of vectors: log2(lanes) rounds, in which pairs of rows exchange halves.
template <class A, int kHalf = 1>
inline void transpose(Vec<A> (&rows)[lanes<A>]) {
  if constexpr (kHalf < lanes<A>) {
    // Lanes of two rows, numbered one behind the other.
    const auto low = []<int... kLane>(std::integer_sequence<int, kLane...>) {
      return Mask<A>{(kLane & kHalf ? lanes<A> + kLane - kHalf : kLane)...};
    }(std::make_integer_sequence<int, lanes<A>>{});
    const Mask<A> high = low + kHalf;
#pragma GCC unroll 16
    for (int i = 0; i < lanes<A>; ++i)
      if (!(i & kHalf)) {
        const Vec<A> a = rows[i], b = rows[i + kHalf];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + kHalf] = __builtin_shuffle(a, b, high);
      }
    transpose<A, 2 * kHalf>(rows);
  }
}

// exp(factor x) for factor x of at most 88, and 0 below kExpMin: products with subnormal weights would take a hundred
// times as long.
inline VecF bounded_exp(VecF x, float factor = 1) {
  const VecF p = exp2_of_product(x, kLog2e * factor);  // any bits below kExpMin
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

template <class A>
inline constexpr A kNone = -std::numeric_limits<A>::infinity();

// The number in a Block's row of each lane of vector c.
template <class A>
inline Vec<A> lane_numbers(int c) {
  Vec<A> numbers;
  for (int i = 0; i < lanes<A>; ++i) numbers[i] = static_cast<A>(c * lanes<A> + i);
  return numbers;
}

// Folds the lanes in halves.
template <class A, class F>
inline A fold_lanes(Vec<A> x, F f) {
  A cells[lanes<A>];
  std::memcpy(cells, &x, sizeof(x));
  for (int half = lanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) cells[i] = f(cells[i], cells[i + half]);
  return cells[0];
}

// --- rows in and out of blocks ----------------------------------------------------------------------------------------

// Rows of a head, as accumulators and side by side: in the tensor they may be apart by a power of
// two, all in one set of the cache.
template <class T, class A>
void gather_rows(A* block, const Heads<const T>& x, int64_t head, const Range& rows, int64_t width) {
  const int64_t whole = width / lanes<A> * lanes<A>;
  for (int64_t i = 0; i < rows.size(); ++i) {
    const T* const row = x.row(rows.begin + i, head);
    for (int64_t e = 0; e < whole; e += lanes<A>) store(block + i * width + e, load_as<A>(row + e));
    for (int64_t e = whole; e < width; ++e) block[i * width + e] = static_cast<A>(row[e]);
  }
}

// Block `chunk` of the columns of rows: block[i][lane] = x[rows.begin + i][chunk * kWidth + lane]; 0 beyond E.
// The same of the next head is likely to be next.
template <class T, class A>
void gather_chunk(A* block, const Heads<const T>& x, int64_t head, const Range& rows, int64_t width, int64_t chunk) {
  const int64_t begin = chunk * kWidth<A>;
  for (int64_t i = 0; i < rows.size(); ++i) {
    const T* const row = x.row(rows.begin + i, head) + begin;
    for (int64_t e = 0; e < kWidth<A>; e += 64 / sizeof(T)) __builtin_prefetch(row + x.head_stride + e);
    for (int64_t lane = 0; lane < kWidth<A>; lane += lanes<A>) {
      A* const cells = block + i * kWidth<A> + lane;
      if (begin + lane + lanes<A> <= width)
        store(cells, load_as<A>(row + lane));
      else
        for (int64_t l = 0; l < lanes<A>; ++l)
          cells[l] = begin + lane + l < width ? static_cast<A>(row[lane + l]) : A(0);
    }
  }
}

// block[e][lane] = factor * x[rows.begin + lane][e]; lanes behind the rows are 0.
template <class T, class A>
A* transpose_in(A* block, const Heads<const T>& x, int64_t head, const Range& rows, int64_t width, A factor) {
  const int64_t begin = rows.begin, count = rows.size();
  const int64_t whole = width / lanes<A> * lanes<A>;
  for (int64_t lane = 0; lane < kWidth<A>; lane += lanes<A>) {
    for (int64_t e = 0; e < whole; e += lanes<A>) {
      Vec<A> square[lanes<A>];
#pragma GCC unroll 16
      for (int i = 0; i < lanes<A>; ++i)
        square[i] = lane + i < count ? factor * load_as<A>(x.row(begin + lane + i, head) + e) : Vec<A>{};
      transpose<A>(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes<A>; ++i) store(block + (e + i) * kWidth<A> + lane, square[i]);
    }
    for (int64_t i = lane; i < lane + lanes<A>; ++i)
      for (int64_t e = whole; e < width; ++e)
        block[e * kWidth<A> + i] = i < count ? factor * static_cast<A>(x.row(begin + i, head)[e]) : A(0);
  }
  return block;
}

// x[rows.begin + lane][e] = factor[lane] * block[e][lane].
template <class T, class A>
void transpose_out(const Heads<T>& x, int64_t head, const Range& rows, int64_t width, const A* block, const A* factor) {
  const int64_t begin = rows.begin, count = rows.size();
  const int64_t whole = width / lanes<A> * lanes<A>;
  for (int64_t lane = 0; lane < count; lane += lanes<A>) {
    const int64_t end = std::min<int64_t>(count, lane + lanes<A>);
    for (int64_t e = 0; e < whole; e += lanes<A>) {
      Vec<A> square[lanes<A>];
#pragma GCC unroll 16
      for (int i = 0; i < lanes<A>; ++i) square[i] = load(block + (e + i) * kWidth<A> + lane);
      transpose<A>(square);
      for (int64_t i = lane; i < end; ++i) store_as<T, A>(x.row(begin + i, head) + e, factor[i] * square[i - lane]);
    }
    for (int64_t i = lane; i < end; ++i)
      for (int64_t e = whole; e < width; ++e)
        x.row(begin + i, head)[e] = static_cast<T>(factor[i] * block[e * kWidth<A> + i]);
  }
}

// --- masks ------------------------------------------------------------------------------------------------------------

// What the queries in the lanes see, relative to key `origin`; what all of them see.
template <class A>
struct LaneKeys {
  alignas(kVecBytes) A first[kWidth<A>], last[kWidth<A>];
  Range common;

  void set(const Visibility& visible, const Tile& tile, int64_t origin) {
    common = {0, tile.streamed.end - origin};
    int64_t b = visible.document_of(tile.lanes.begin);
    for (int64_t lane = 0; lane < kWidth<A>; ++lane) {
      const int64_t row = tile.lanes.begin + lane;
      Range seen = {0, 0};
      if (row < tile.lanes.end) {
        while (visible.cu_q[b + 1] <= row) ++b;
        seen = visible.keys(row, b);
        seen = seen.begin == seen.end ? Range{0, 0} : Range{seen.begin - origin, seen.end - origin};
        common = {std::max(common.begin, seen.begin), std::min(common.end, seen.end)};
      }
      first[lane] = static_cast<A>(seen.begin);
      last[lane] = static_cast<A>(seen.end);
    }
  }
  bool all_see(const Range& keys) const { return common.begin <= keys.begin && keys.end <= common.end; }
  Mask<A> sees(int64_t key, int c) const {
    const Vec<A> j = Vec<A>{} + static_cast<A>(key);
    return (load(first + c * lanes<A>) <= j) & (j < load(last + c * lanes<A>));
  }
};

}  // namespace blt
