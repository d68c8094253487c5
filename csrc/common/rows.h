// Work on rows of a [rows, columns] tensor, element by element, in fp32 (fp64 for fp64 rows).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "check.h"
#include "vec.h"

namespace blt {

// Rows with unit stride in the last dimension; a copy only where there is none.
inline Tensor unit_rows(const Tensor& x, const char* name) {
  check_dim(x, name, 2);
  return x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
}

// Rows that a thread must have to be worth waking, for rows of `width` elements.
inline int64_t row_grain(int64_t width) {
  constexpr int64_t kElements = 32 * 1024;
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
}

// out[c] = f(in[c]...) for c < width, with f called on vectors of A and, for the last columns, on A itself.
//
// An fp32 row that is written from bf16 rows holds each Pair in their order, even elements first. That never shows where
// such a row is only used together with bf16 rows again.
template <class A, class Out, class F, class... In>
inline void map_row(Out* out, int64_t width, const F& f, const In*... in) {
  const auto on_pairs = [&f](auto... x) { return PairOf<A>{f(x.a...), f(x.b...)}; };
  int64_t c = 0;
  for (; c + pair_lanes<A> <= width; c += pair_lanes<A>) store_pair(out + c, on_pairs(load_pair(in + c)...));
  for (; c < width; ++c) out[c] = static_cast<Out>(f(static_cast<A>(in[c])...));
}

// sum of row[c]^2 for c < width
template <class A, class T>
inline A sum_of_squares(const T* row, int64_t width) {
  PairOf<A> sums = {};
  int64_t c = 0;
  for (; c + pair_lanes<A> <= width; c += pair_lanes<A>) {
    const PairOf<A> x = load_pair(row + c);
    sums.a += x.a * x.a;
    sums.b += x.b * x.b;
  }
  const Vec<A> both = sums.a + sums.b;
  A sum = 0;
  for (int i = 0; i < lanes<A>; ++i) sum += both[i];
  for (; c < width; ++c) sum += static_cast<A>(row[c]) * static_cast<A>(row[c]);
  return sum;
}

// Functions to map rows with.
inline constexpr auto kSame = [](auto x) { return x; };
inline constexpr auto kAdd = [](auto x, auto y) { return x + y; };

}  // namespace blt
