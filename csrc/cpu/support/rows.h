// Maps and sums rows of a matrix, in fp32 (fp64 for fp64 rows).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "../../common/check.h"
#include "../../common/dispatch.h"
#include "vec.h"

namespace blt {

// Returns the grain size: the fewest rows of `width` elements worth a thread.
inline int64_t row_grain(int64_t width) {
  constexpr int64_t kElements = 32 * 1024;
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
}

// Computes out[c] = f(in[c]...) for c < width. f is called on vectors of A, and on A itself for the last columns.
//
// An fp32 row written from bf16 rows has the element order of their Pairs, even elements first. So it may only be
// combined with bf16 rows again.
template <class A, class Out, class F, class... In>
inline void map_row(Out* out, int64_t width, const F& f, const In*... in) {
  const auto on_pairs = [&f](auto... x) { return PairOf<A>{f(x.a...), f(x.b...)}; };
  int64_t c = 0;
  for (; c + pair_lanes<A> <= width; c += pair_lanes<A>) store_pair(out + c, on_pairs(load_pair(in + c)...));
  for (; c < width; ++c) out[c] = static_cast<Out>(f(static_cast<A>(in[c])...));
}

inline constexpr auto kSame = [](auto x) { return x; };
inline constexpr auto kAdd = [](auto x, auto y) { return x + y; };

// Computes out[c] (+)= sum over begin <= n < end of row(n)[c], for the columns of kPairs pairs.
template <int kPairs, class A, class Out, class Row>
inline void sum_columns(Out* out, const Row& row, int64_t begin, int64_t end, int64_t column, bool add) {
  PairOf<A> sums[kPairs] = {};
  for (int64_t n = begin; n < end; ++n)
    for (int k = 0; k < kPairs; ++k) {
      const PairOf<A> x = load_pair(row(n) + column + k * pair_lanes<A>);
      sums[k] = {sums[k].a + x.a, sums[k].b + x.b};
    }
  for (int k = 0; k < kPairs; ++k) {
    Out* const to = out + k * pair_lanes<A>;
    const PairOf<A> before = add ? load_pair(to) : PairOf<A>{};
    store_pair(to, PairOf<A>{before.a + sums[k].a, before.b + sums[k].b});
  }
}

// Does so for `width` columns from `column` on. Several rows are read together, so their cache misses overlap.
template <class A, class Out, class Row>
inline void sum_few_rows(Out* out, const Row& row, int64_t begin, int64_t end, int64_t column, int64_t width,
                         bool add) {
  constexpr int kPairs = 4;
  int64_t c = 0;
  for (; c + kPairs * pair_lanes<A> <= width; c += kPairs * pair_lanes<A>)
    sum_columns<kPairs, A>(out + c, row, begin, end, column + c, add);
  for (; c + pair_lanes<A> <= width; c += pair_lanes<A>) sum_columns<1, A>(out + c, row, begin, end, column + c, add);
  for (; c < width; ++c) {
    A sum = 0;
    for (int64_t n = begin; n < end; ++n) sum += static_cast<A>(row(n)[column + c]);
    out[c] = static_cast<Out>(add ? static_cast<A>(out[c]) + sum : sum);
  }
}

// Sets out[c] to the sum over n < count of row(n)[c] for c < width. Long sums are sums of short ones, which keeps
// errors small.
template <class T, class Row>
inline void sum_rows(T* out, int64_t width, int64_t count, const Row& row) {
  using A = accumulator_t<T>;
  constexpr int64_t kFew = 16, kPanel = 1024;
  if (count <= kFew) return sum_few_rows<A>(out, row, 0, count, 0, width, false);
  alignas(kVecBytes) A sums[kPanel];
  for (int64_t c = 0; c < width; c += kPanel) {
    const int64_t columns = std::min(kPanel, width - c);
    for (int64_t n = 0; n < count; n += kFew)
      sum_few_rows<A>(sums, row, n, std::min(n + kFew, count), c, columns, n > 0);
    map_row<A>(out + c, columns, kSame, sums);
  }
}

// Returns the sum of row[c]^2 for c < width.
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

}  // namespace blt
