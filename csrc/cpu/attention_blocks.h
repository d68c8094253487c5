// What the passes of block_causal_attention share: rows of heads in and out of blocks, masks, the exponential.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tile.h"
#include "visible_tiles.h"

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

// --- vectors ----------------------------------------------------------------------------------------------------------

// lanes<A> elements as accumulators, and back.
template <class A, class T>
inline Vec<A> load_as(const T* p) {
  if constexpr (std::is_same_v<T, A>) {
    return load(p);
  } else if constexpr (std::is_same_v<T, Half>) {
    return load_half(p);
  } else {
    VecU16 bits;
    std::memcpy(&bits, p, sizeof(bits));
    return bit_cast<VecF>(__builtin_convertvector(bits, VecU) << 16);
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

// Of a square of vectors: log2(lanes) rounds that exchange halves of pairs of rows.
template <class A>
inline void transpose(Vec<A> (&rows)[lanes<A>]) {
#pragma GCC unroll 4
  for (int half = 1; half < lanes<A>; half *= 2) {
    Mask<A> low, high;  // of the lanes of a pair, numbered one behind the other
#pragma GCC unroll 16
    for (int j = 0; j < lanes<A>; ++j) {
      low[j] = j & half ? lanes<A> + j - half : j;
      high[j] = j & half ? lanes<A> + j : j + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes<A>; ++i)
      if (!(i & half)) {
        const Vec<A> a = rows[i], b = rows[i + half];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + half] = __builtin_shuffle(a, b, high);
      }
  }
}

// exp for x of at most 88; below kExpMin it stays at exp(kExpMin), next to nothing.
inline VecF bounded_exp(VecF x) { return exp(max(broadcast(kExpMin), x)); }
inline Vec<double> bounded_exp(Vec<double> x) { return exp(x); }

template <class M>
inline bool any(M mask) {
  int64_t words[sizeof(M) / 8], all = 0;
  std::memcpy(words, &mask, sizeof(M));
  for (const int64_t word : words) all |= word;
  return all;
}

template <class A>
inline constexpr A kNone = -std::numeric_limits<A>::infinity();

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

// block[e][lane] = factor * x[rows.begin + lane][e]; lanes behind the rows are 0.
template <class T, class A>
A* transpose_in(A* block, const Heads<const T>& x, int64_t head, const Range& rows, int64_t width, A factor) {
  const int64_t begin = rows.begin, count = rows.size();
  const int64_t whole = width / lanes<A> * lanes<A>;
  for (int64_t lane = 0; lane < kWidth<A>; lane += lanes<A>) {
    for (int64_t e = 0; e < whole; e += lanes<A>) {
      Vec<A> square[lanes<A>];
      for (int i = 0; i < lanes<A>; ++i)
        square[i] = lane + i < count ? factor * load_as<A>(x.row(begin + lane + i, head) + e) : Vec<A>{};
      transpose<A>(square);
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
