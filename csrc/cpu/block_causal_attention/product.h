// Multiplies small matrices whose last dimension lies across the vector lanes.
//
// A block is a row-major matrix with kWidth<A> columns: as many as kColumns vectors hold. `product` keeps kRegisterRows
// rows of the result in registers, and adds them to memory only at the end: long sums are then sums of short ones,
// which keeps rounding errors low. It streams the left factor one scalar at a time, so that factor may have any strides
// and is never packed: each step of the sum takes kColumns loads and kRegisterRows broadcasts for kRegisterRows *
// kColumns multiply-adds.
#pragma once

#include "../support/vec.h"

namespace blt {

// kRegisterRows * kColumns accumulators, kColumns loads and a broadcast fit into the registers: 32 with AVX-512, else
// 16.
#if defined(__AVX512F__)
inline constexpr int kColumns = 4;
#else
inline constexpr int kColumns = 2;
#endif
inline constexpr int kRegisterRows = 6;

template <class A>
inline constexpr int64_t kWidth = kColumns * lanes<A>;

// Rounds a number of columns up to whole vectors.
template <class A>
int64_t whole_vectors(int64_t columns) {
  return (columns + lanes<A> - 1) / lanes<A> * lanes<A>;
}

// Sets or adds to out[i] the sum over d < depth of left[i * row_stride + d * step] * right[d] for i < rows. `out` and
// `right` are blocks.
template <class A>
void product(A* out, int64_t rows, const A* left, int64_t row_stride, int64_t step, const A* right, int64_t depth,
             bool add);

// Does so for rows of `width` columns, which are whole vectors.
template <class A>
void wide_product(A* out, int64_t rows, const A* left, int64_t row_stride, int64_t step, const A* right, int64_t depth,
                  bool add, int64_t width);

}  // namespace blt
