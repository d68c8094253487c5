// The products and the softmax of a tile of the decode path: kRows rows, a power of two up to the lanes, against keys
// and values as they are stored.
//
// Rows lie across the lanes: lane r * kSlice + i is for row r and element i of a slice, which is lanes<A> / kRows
// elements of E, or as many keys. A load repeats a slice of a key for all rows, so a product with a key takes kRows * E
// / lanes<A> multiply-adds, and only the kSlice lanes of a row are summed. With kRows == lanes<A> each lane sums along
// E in order, as the backward pass does.
//
//   queries [E / kSlice][kRows][kSlice]   scores, weights [keys / kSlice][kRows][kSlice]   acc [kRows][pitch]
//   max, sum [kRows][kSlice]: the maximum is the same in all lanes of a row
//
// A single row takes 16-bit keys and values as they are: then its elements have the order of Pairs, which for bf16 is
// even ones first.
#pragma once

#include "blocks.h"

namespace blt {

inline constexpr int kKeyGroup = 4 * kColumns;  // the sums that the registers hold: of keys, or of rows and columns
template <class A, int kRows>
inline constexpr int kSlice = lanes<A> / kRows;

// Rows of one head, whole Pairs wide.
template <class T>
struct KeyRows {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

// Returns the slice at p for every row.
template <int kRows, class A>
inline Vec<A> repeat(const A* p) {
  constexpr int kBytes = kVecBytes / kRows;
  if constexpr (kRows == 1) {
    return load(p);
  } else if constexpr (kRows == lanes<A>) {
    return *p - Vec<A>{};  // unlike +, this is exact for -0, so that it takes no instruction
  } else if constexpr (kBytes == 8) {
    int64_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return bit_cast<Vec<A>>(Mask<double>{} + bits);
#if defined(__AVX512F__)
  } else if constexpr (kBytes == 16) {
    return bit_cast<Vec<A>>(_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p))));
  } else {
    static_assert(kBytes == 32, "a slice is a part of a vector");
    return bit_cast<Vec<A>>(_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(p))));
#elif defined(__AVX2__)
  } else {
    static_assert(kBytes == 16, "a slice is a part of a vector");
    return bit_cast<Vec<A>>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)));
#endif
  }
}

// Returns the two slices at p.
template <int kRows, class T>
inline auto repeat_pair(const T* p) {
  if constexpr (kRows == 1)
    return load_pair(p);
  else
    return PairOf<T>{repeat<kRows>(p), repeat<kRows>(p + kSlice<T, kRows>)};
}

// Lane i of the result is lane i ^ kStep of x.
template <int kStep, class A, int... kLane>
inline Vec<A> swap_lanes(Vec<A> x, std::integer_sequence<int, kLane...>) {
  return shuffle(x, x, std::integer_sequence<int, (kLane ^ kStep)...>{});
}

// Folds the lanes of each row; all of them hold the result.
template <class A, int kStep, class F>
inline Vec<A> fold_slices(Vec<A> x, const F& f) {
  if constexpr (kStep == 0) {
    return x;
  } else {
    x = f(x, swap_lanes<kStep, A>(x, std::make_integer_sequence<int, lanes<A>>{}));
    return fold_slices<A, kStep / 2>(x, f);
  }
}

// --- scores ----------------------------------------------------------------------------------------------------------

// The scores of kKeys keys. Keys from `count` on are not read, unless kWhole: theirs are any scores.
template <int kRows, int kKeys, bool kWhole, class T, class A>
inline void dot_group(A* scores, const A* queries, int64_t pitch, KeyRows<T> keys, int64_t count) {
  constexpr int kLength = kSlice<A, kRows>, kPairs = kRows == 1 ? 1 : 2;  // as many as divide E in whole Pairs
  Vec<A> sums[kKeys] = {};
  for (int64_t e = 0; e < pitch; e += 2 * kPairs * kLength) {
    Vec<A> query[2 * kPairs];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kPairs; ++i) query[i] = load(queries + e * kRows + i * lanes<A>);
    const T* row = keys.data + e;
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 2
      for (int i = 0; i < kPairs; ++i) {
        const auto x = repeat_pair<kRows>(row + 2 * i * kLength);
        sums[key] += query[2 * i] * x.a;
        sums[key] += query[2 * i + 1] * x.b;
      }
      if (kWhole || key + 1 < count) row += keys.stride;
      asm("" : "+r"(row));  // else the compiler keeps a pointer for each key, for which there are no registers
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; i += kLength) {
    if constexpr (kLength > 1) sums[i] = lane_sums<A, kLength / 2>(sums + i);
    store(scores + i * kRows, sums[i]);
  }
}

// The scores of up to kKeyGroup keys, and any scores up to the end of the last slice.
template <int kRows, class T, class A>
inline void dot_keys(A* scores, const A* queries, int64_t pitch, KeyRows<T> keys, int64_t count) {
  constexpr int kHalf = std::max(kKeyGroup / 2, kSlice<A, kRows>);
  if (count == kKeyGroup)
    dot_group<kRows, kKeyGroup, true>(scores, queries, pitch, keys, count);
  else if (count > kHalf)
    dot_group<kRows, kKeyGroup, false>(scores, queries, pitch, keys, count);
  else if (kSlice<A, kRows> > 1 || count > 1)
    dot_group<kRows, kHalf, false>(scores, queries, pitch, keys, count);
  else if constexpr (kSlice<A, kRows> == 1)
    dot_group<kRows, 1, true>(scores, queries, pitch, keys, count);
}

// --- softmax ---------------------------------------------------------------------------------------------------------

// The softmax of a tile, whose acc has `rows` rows.
template <class A>
struct TileSoftmax {
  A *max, *sum, *acc;
  int64_t rows, pitch;
};

// Scores of `count` keys become weights exp(factor * (s - max)), and the softmax follows. Keys outside of [first, last)
// of their lane, which count from the first key, are masked; both are null if there are none.
template <int kRows, class A>
inline void exp_scores(A* scores, int64_t count, const A* first, const A* last, A factor,
                       const TileSoftmax<A>& softmax) {
  constexpr int kLength = kSlice<A, kRows>;
  const Vec<A> infinite = Vec<A>{} + kMaskedScore<A>;
  A* const end = scores + (count + kLength - 1) / kLength * lanes<A>;
  Vec<A> peak = infinite;
  if (first) {
    Vec<A> key;
    for (int i = 0; i < lanes<A>; ++i) key[i] = static_cast<A>(i % kLength);
    for (A* cell = scores; cell < end; cell += lanes<A>, key += A(kLength)) {
      Vec<A> s = load(cell);
      s = ((load(first) <= key) & (key < load(last))) ? s : infinite;
      store(cell, s);
      peak = max(s, peak);
    }
  } else {
    for (const A* cell = scores; cell < end; cell += lanes<A>) peak = max(load(cell), peak);
  }
  Vec<A> top = load(softmax.max);
  // The maximum follows only when a score has grown by more than 1, so acc is seldom rescaled.
  if (any(factor * (peak - top) > Vec<A>{} + A(1))) {
    peak = fold_slices<A, kLength / 2>(peak, [](Vec<A> a, Vec<A> b) { return max(a, b); });
    const Mask<A> grows = factor * (peak - top) > Vec<A>{} + A(1);
    const Vec<A> decay = bounded_exp(grows ? top - peak : Vec<A>{}, factor);
    top = grows ? peak : top;
    store(softmax.max, top);
    store(softmax.sum, decay * load(softmax.sum));
    for (int64_t r = 0; r < softmax.rows; ++r)
      for (A* cell = softmax.acc + r * softmax.pitch; cell < softmax.acc + (r + 1) * softmax.pitch; cell += lanes<A>)
        store(cell, decay[r * kLength] * load(cell));
  }
  const Vec<A> shift = top == kMaskedScore<A> ? Vec<A>{} : top;
  Vec<A> sum = load(softmax.sum);
  for (A* cell = scores; cell < end; cell += lanes<A>) {
    const Vec<A> p = bounded_exp(load(cell) - shift, factor);  // 0 for kMaskedScore
    store(cell, p);
    sum += p;
  }
  store(softmax.sum, sum);
}

// --- values ----------------------------------------------------------------------------------------------------------

// acc[r] += sum over keys < count of weights[r][key] * values[key], for kOwn rows of a tile of kRows and kVectors
// vectors of columns. Where there are registers, keys are summed in turn in several sums, so that they do not wait for
// one another.
template <int kRows, int kOwn, int kVectors, class T, class A>
inline void add_columns(A* acc, int64_t pitch, const A* weights, KeyRows<T> values, int64_t count) {
  constexpr int kSums = kKeyGroup / (kOwn * kVectors), kLength = kSlice<A, kRows>;
  Vec<A> sums[kSums][kOwn][kVectors] = {};
  const auto add = [&](auto& sum, int64_t key) __attribute__((always_inline)) {
    const T* const row = values.row(key);
    const A* const weight = weights + key / kLength * lanes<A> + key % kLength;
    Vec<A> x[kVectors];
    if constexpr (kOwn >= 8) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) __builtin_prefetch(row + (i + kVectors) * lanes<A>);
    }
    if constexpr (kVectors == 1) {
      x[0] = load(row);
    } else {
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; i += 2) {
        const auto pair = load_pair(row + i * lanes<A>);
        x[i] = pair.a, x[i + 1] = pair.b;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kOwn; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sum[r][i] += weight[r * kLength] * x[i];
  };
  int64_t key = 0;
  for (; key + kSums <= count; key += kSums)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) add(sums[s], key + s);
  for (; key < count; ++key) add(sums[0], key);
#pragma GCC unroll 16
  for (int r = 0; r < kOwn; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      Vec<A> sum = sums[0][r][i];
#pragma GCC unroll 4
      for (int s = 1; s < kSums; ++s) sum += sums[s][r][i];
      A* const cell = acc + r * pitch + i * lanes<A>;
      store(cell, load(cell) + sum);
    }
}

// The same for all columns.
template <int kRows, int kOwn, class T, class A>
inline void add_values(A* acc, int64_t pitch, const A* weights, KeyRows<T> values, int64_t count) {
  constexpr int kVectors = std::min(kColumns, kKeyGroup / kOwn);
  int64_t e = 0;
  for (; e + kVectors * lanes<A> <= pitch; e += kVectors * lanes<A>)
    add_columns<kRows, kOwn, kVectors>(acc + e, pitch, weights, KeyRows<T>{values.data + e, values.stride}, count);
  if constexpr (kVectors > 2)
    if (e < pitch)
      add_columns<kRows, kOwn, 2>(acc + e, pitch, weights, KeyRows<T>{values.data + e, values.stride}, count);
}

}  // namespace blt
