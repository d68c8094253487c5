// The products of the decode path: a few rows of accumulators with rows of keys and values as they are stored.
//
// The elements of a row of accumulators have the order of Pairs, which for bf16 is even ones first, and it is padded
// with zeros to `pitch` elements, whole Pairs.
#pragma once

#include "blocks.h"

namespace blt {

template <class A>
inline constexpr int kRowTile = std::min(4, lanes<A>);  // rows that share loaded keys and values

// Rows of one head in a tensor, whole Pairs wide.
template <class T>
struct KeyRows {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

// scores[r][key] = queries[r] . keys[key] for kRows rows and lanes<A> / kRows keys from `first` on. Keys from `count`
// on are not read: theirs are any scores.
template <int kRows, bool kWhole, class T, class A>
inline void dot_group(A* scores, int64_t width, const A* queries, int64_t pitch, KeyRows<T> keys, int64_t first,
                      int64_t count) {
  constexpr int kKeys = lanes<A> / kRows;
  Vec<A> sums[lanes<A>] = {};
  for (int64_t e = 0; e < pitch; e += pair_lanes<A>) {
    PairOf<A> query[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      query[r] = {load(queries + r * pitch + e), load(queries + r * pitch + e + lanes<A>)};
    const T* row = keys.row(first) + e;
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
      if constexpr (!kWhole) row = keys.row(std::min(first + key, count - 1)) + e;
      const PairOf<A> x = load_pair(row);
      if constexpr (kWhole) row += keys.stride;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        sums[r * kKeys + key] += query[r].a * x.a;
        sums[r * kKeys + key] += query[r].b * x.b;
      }
    }
  }
  alignas(kVecBytes) A cells[lanes<A>];
  store(cells, lane_sums<A>(sums));
  for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * width + first, cells + r * kKeys, kKeys * sizeof(A));
}

// The same for `count` keys from 0 on; scores up to the next whole vector are written.
template <int kRows, class T, class A>
inline void dot_keys(A* scores, int64_t width, const A* queries, int64_t pitch, KeyRows<T> keys, int64_t count) {
  constexpr int kKeys = lanes<A> / kRows;
  int64_t first = 0;
  for (; first + kKeys <= count; first += kKeys)
    dot_group<kRows, true>(scores, width, queries, pitch, keys, first, count);
  if (first < count) dot_group<kRows, false>(scores, width, queries, pitch, keys, first, count);
}

// acc[r] += sum over keys < count of weights[r][key] * values[key], for kRows rows and the columns of kPairs Pairs.
// Few rows have several sums each, so that they do not wait for one another.
template <int kRows, int kPairs, class T, class A>
inline void add_columns(A* acc, int64_t pitch, const A* weights, int64_t width, KeyRows<T> values, int64_t count) {
  constexpr int kSums = kRowTile<A> / kRows;
  PairOf<A> sums[kSums][kRows][kPairs] = {};
  const auto add = [&](auto& sum, int64_t key) __attribute__((always_inline)) {
    const T* const row = values.row(key);
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; ++p) {
      const PairOf<A> x = load_pair(row + p * pair_lanes<A>);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const A weight = weights[r * width + key];
        sum[r][p].a += weight * x.a;
        sum[r][p].b += weight * x.b;
      }
    }
  };
  int64_t key = 0;
  for (; key + kSums <= count; key += kSums)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) add(sums[s], key + s);
  for (; key < count; ++key) add(sums[0], key);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; ++p) {
      A* const cells = acc + r * pitch + p * pair_lanes<A>;
      PairOf<A> sum = sums[0][r][p];
#pragma GCC unroll 4
      for (int s = 1; s < kSums; ++s) sum = {sum.a + sums[s][r][p].a, sum.b + sums[s][r][p].b};
      store(cells, load(cells) + sum.a);
      store(cells + lanes<A>, load(cells + lanes<A>) + sum.b);
    }
}

// The same for all columns.
template <int kRows, class T, class A>
inline void add_values(A* acc, int64_t pitch, const A* weights, int64_t width, KeyRows<T> values, int64_t count) {
  constexpr int kPairs = kColumns / 2;  // as many as there are registers for
  int64_t e = 0;
  for (; e + kPairs * pair_lanes<A> <= pitch; e += kPairs * pair_lanes<A>)
    add_columns<kRows, kPairs>(acc + e, pitch, weights, width, KeyRows<T>{values.data + e, values.stride}, count);
  for (; e < pitch; e += pair_lanes<A>)
    add_columns<kRows, 1>(acc + e, pitch, weights, width, KeyRows<T>{values.data + e, values.stride}, count);
}

}  // namespace blt
