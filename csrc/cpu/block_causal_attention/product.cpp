#include "product.h"

#include <utility>

namespace blt {
namespace {

// All loops over registers are fully unrolled: GCC keeps an array in registers only if every index is a constant.
template <int kCount, int kVectors, class A>
void product_rows(A* out, const A* left, int64_t row_stride, int64_t step, const A* right, int64_t depth, bool add,
                  int64_t pitch) {
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

// Multiplies kVectors vectors of each row; rows of `out` and `right` are `pitch` elements apart.
template <int kVectors, class A>
void product_columns(A* out, int64_t rows, const A* left, int64_t row_stride, int64_t step, const A* right,
                     int64_t depth, bool add, int64_t pitch) {
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

}  // namespace

template <class A>
void product(A* out, int64_t rows, const A* left, int64_t row_stride, int64_t step, const A* right, int64_t depth,
             bool add) {
  product_columns<kColumns>(out, rows, left, row_stride, step, right, depth, add, kWidth<A>);
}

template <class A>
void wide_product(A* out, int64_t rows, const A* left, int64_t row_stride, int64_t step, const A* right, int64_t depth,
                  bool add, int64_t width) {
  int64_t e = 0;
  const auto run = [&]<int kVectors>(std::integral_constant<int, kVectors>) {
    for (; e + kVectors * lanes<A> <= width; e += kVectors * lanes<A>)
      product_columns<kVectors>(out + e, rows, left, row_stride, step, right + e, depth, add, width);
  };
  run(std::integral_constant<int, kColumns>{});
  if constexpr (kColumns > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

template void product(float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t, bool);
template void product(double*, int64_t, const double*, int64_t, int64_t, const double*, int64_t, bool);
template void wide_product(float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t, bool, int64_t);
template void wide_product(double*, int64_t, const double*, int64_t, int64_t, const double*, int64_t, bool, int64_t);

}  // namespace blt
