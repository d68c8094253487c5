// Products of small matrices whose last dimension lies across the vector lanes.
//
// A Block is a row-major matrix with kWidth<A> columns: as many as kColumns vectors hold. `product` keeps kRegisterRows rows of
// the result in registers, adding them to what is there only at the end (long sums are sums of short ones, which keeps
// their rounding errors low), and streams the other factor one scalar at a time, so it may have any strides and is never
// packed: for each step of the sum there are kColumns loads and kRegisterRows broadcasts for kRegisterRows * kColumns multiply-adds.
#pragma once

#include "../support/vec.h"

namespace blt {

// 32 vector registers with AVX-512, 16 without: kRegisterRows * kColumns accumulators, kColumns loads and a broadcast must fit.
#if defined(__AVX512F__)
inline constexpr int kColumns = 4;
#else
inline constexpr int kColumns = 2;
#endif
inline constexpr int kRegisterRows = 6;

template <class A>
inline constexpr int64_t kWidth = kColumns * lanes<A>;

// A number of columns in whole vectors.
template <class A>
int64_t whole_vectors(int64_t width) {
  return (width + lanes<A> - 1) / lanes<A> * lanes<A>;
}

// The loops over registers are unrolled by hand of the compiler: it keeps an array in registers only if every index is
// a constant.
template <int kCount, int kVectors, class A>
inline void product_rows(A* out, const A* left, int64_t row_stride, int64_t step, const A* right, int64_t depth,
                         bool add, int64_t pitch) {
  Vec<A> sums[kCount][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sums[i][c] = Vec<A>{};
  for (int64_t d = 0; d < depth; ++d) {
    Vec<A> row[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) row[c] = load(right + d * pitch + c * lanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const A scalar = left[i * row_stride + d * step];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) sums[i][c] += scalar * row[c];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      A* const cell = out + i * pitch + c * lanes<A>;
      store(cell, add ? load(cell) + sums[i][c] : sums[i][c]);
    }
}

// out[i] (+)= sum over d of left[i * row_stride + d * step] * right[d], for i < rows, in kVectors vectors of the rows of
// out and right, which begin `pitch` elements apart. Both are Blocks if nothing else is said.
template <int kVectors = kColumns, class A>
inline void product(A* out, int64_t rows, const A* left, int64_t row_stride, int64_t step, const A* right,
                    int64_t depth, bool add, int64_t pitch = kWidth<A>) {
  static_assert(kRegisterRows == 6, "the switch has a case for every remainder");
  const auto run = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t i) {
    product_rows<kCount, kVectors>(out + i * pitch, left + i * row_stride, row_stride, step, right, depth, add, pitch);
  };
  int64_t i = 0;
  for (; i + kRegisterRows <= rows; i += kRegisterRows) run(std::integral_constant<int, kRegisterRows>{}, i);
  switch (rows - i) {
    case 5: run(std::integral_constant<int, 5>{}, i); break;
    case 4: run(std::integral_constant<int, 4>{}, i); break;
    case 3: run(std::integral_constant<int, 3>{}, i); break;
    case 2: run(std::integral_constant<int, 2>{}, i); break;
    case 1: run(std::integral_constant<int, 1>{}, i); break;
  }
}

// The same for rows of any number of vectors, with nothing between them.
template <class A>
inline void wide_product(A* out, int64_t rows, const A* left, int64_t row_stride, int64_t step, const A* right,
                         int64_t depth, bool add, int64_t width) {
  int64_t e = 0;
  const auto run = [&]<int kVectors>(std::integral_constant<int, kVectors>) {
    for (; e + kVectors * lanes<A> <= width; e += kVectors * lanes<A>)
      product<kVectors>(out + e, rows, left, row_stride, step, right + e, depth, add, width);
  };
  run(std::integral_constant<int, kColumns>{});
  if constexpr (kColumns > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

}  // namespace blt
