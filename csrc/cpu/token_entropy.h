// Computes the entropy or the cross entropy of one row of logits, and its gradient, in fp32 arithmetic (fp64 for fp64
// rows):
//
//   m = max x,  d = x - m,  s = sum exp(d),  log_sum = log s,  H = log_sum - (sum exp(d) d) / s
//   dH/dx = -p (log p + H),  log p = d - log_sum
//   loss = log_sum - d_target,  dloss/dx = p - onehot(target)
//
// A row of 260 logits stays in the first-level cache, so it is read from memory once, although the maximum takes a pass
// of its own. Two vectors go through the loop together. Rows whose width is no multiple of a Pair end in a Pair that
// overlaps the one before, with the elements already counted masked out.
// Work: about 16 vector instructions for kLanes logits; at 2 a cycle that is less time than memory needs for the row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "support/alloc.h"
#include "support/vec.h"

namespace blt {

// Computes entropies and log_sums of the first `count` rows; the others are not read: they get 0 and kUnread.
std::tuple<Tensor, Tensor> entropies_of_rows(const Tensor& rows, int64_t count);

// Allocates a panel of logits of an output head: 1 MB for a byte model in fp32, and at most 32 MB unless that is less
// than 256 rows. With fewer rows the products would wait for `weight`, which each panel reads from memory.
inline Tensor panel_of(const Tensor& hidden, const Tensor& weight) {
  constexpr int64_t kPanelBytes = 32 << 20, kMinRows = 256, kMaxRows = 1024;
  const int64_t row_bytes = weight.size(0) * static_cast<int64_t>(weight.element_size());
  const int64_t rows = std::clamp(kPanelBytes / row_bytes, kMinRows, kMaxRows);
  return new_output(hidden, {std::min(hidden.size(0), rows), weight.size(0)});
}

inline constexpr int64_t kRowGrain = 64;  // the fewest rows of logits that are worth a thread

inline constexpr int64_t kRowsAhead = 4;  // distance of the prefetch: the arithmetic on a row hides a line from memory
inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kUnread = kInf;  // log_sum, in [0, log A] or NaN otherwise, of a row that no document has

// A row divides into Pairs: `full` elements are in whole ones, and `fresh` elements of the tail are in no whole Pair.
// The tail of a row shorter than a Pair is a copy of it.
template <class T>
struct RowShape {
  using A = accumulator_t<T>;
  static constexpr int64_t kPair = pair_lanes<A>;
  int64_t width, full;
  Mask<A> fresh_a, fresh_b;  // are all ones or 0 in a lane

  explicit RowShape(int64_t width) : width(width), full(width / kPair * kPair) {
    lane_index<T>(fresh_a, fresh_b);
    using Index = typename VecOf<A>::mask_element;
    const Index counted = static_cast<Index>(width < kPair ? 0 : kPair - (width - full));
    const Index end = static_cast<Index>(std::min(width, kPair));
    fresh_a = (fresh_a >= counted) & (fresh_a < end);
    fresh_b = (fresh_b >= counted) & (fresh_b < end);
  }
  bool ragged() const { return full != width; }
};

// Loads the last Pair of a row, which starts within the row unless the row is shorter; then it is padded with -inf.
template <class T>
struct Tail {
  static constexpr int64_t kPair = RowShape<T>::kPair;
  alignas(kVecBytes) T copy[kPair];
  const T* data;
  Tail(const T* row, const RowShape<T>& shape) : data(shape.width < kPair ? copy : row + shape.width - kPair) {
    if (data == copy)
      for (int64_t i = 0; i < kPair; ++i) copy[i] = i < shape.width ? row[i] : T(-kInf);
  }
  Tail(const Tail&) = delete;
};

// Returns exp(x), and exactly 0 below the range of exp; NaN for NaN.
template <class A>
Vec<A> exp_or_zero(Vec<A> x) {
  return x < A(kExpMin) ? Vec<A>{} : exp(max(broadcast<A>(kExpMin), x));
}

template <class A>
struct Entropy {
  A entropy, log_sum;
};

// It ignores NaN.
template <class T, class A = accumulator_t<T>>
A row_max(const T* row, const T* tail, const RowShape<T>& shape) {
  PairOf<A> top = load_pair(tail);
  for (int64_t i = 0; i < shape.full; i += shape.kPair) {
    const PairOf<A> x = load_pair(row + i);
    top = {max(x.a, top.a), max(x.b, top.b)};
  }
  return fold<A>(max(top.a, top.b), [](A a, A b) { return max(a, b); });
}

// Calls f(x, keep) for each Pair x of a row: keep(e) is 0 in the lanes of elements that are in an earlier Pair, else e.
template <class T, class F, class A = accumulator_t<T>>
void for_each_pair(const T* row, const Tail<T>& tail, const RowShape<T>& shape, F f) {
  for (int64_t i = 0; i < shape.full; i += shape.kPair) {
    prefetch_pair(row + i + kRowsAhead * shape.width);
    f(load_pair(row + i), [](PairOf<A> e) { return e; });
  }
  if (shape.ragged())
    f(load_pair(tail.data),
      [&](PairOf<A> e) -> PairOf<A> { return {shape.fresh_a ? e.a : Vec<A>{}, shape.fresh_b ? e.b : Vec<A>{}}; });
}

// Writes f(x) for each vector x of a row. `out` may be `row`: the last Pair is read before what it overlaps is written.
template <class T, class F>
void map_row(T* out, const T* row, const Tail<T>& tail, const RowShape<T>& shape, F f) {
  using A = accumulator_t<T>;
  const auto step = [&](T* to, PairOf<A> x) { store_pair(to, PairOf<A>{f(x.a), f(x.b)}); };
  const PairOf<A> last = load_pair(tail.data);
  for (int64_t i = 0; i < shape.full; i += shape.kPair) step(out + i, load_pair(row + i));
  if (!shape.ragged()) return;
  if (shape.width >= shape.kPair) {
    step(out + shape.width - shape.kPair, last);
  } else {
    T padded[RowShape<T>::kPair];
    step(padded, last);
    std::copy(padded, padded + shape.width, out);
  }
}

template <class T, class A = accumulator_t<T>>
Entropy<A> row_entropy(const T* row, const RowShape<T>& shape) {
  const Tail<T> tail(row, shape);
  const A m = row_max(row, tail.data, shape);
  PairOf<A> s = {}, t = {};
  for_each_pair(row, tail, shape, [&](PairOf<A> x, auto keep) {
    const Vec<A> da = max(broadcast<A>(kExpMin), x.a - m), db = max(broadcast<A>(kExpMin), x.b - m);
    const PairOf<A> e = keep({exp(da), exp(db)});
    s = {s.a + e.a, s.b + e.b};
    t = {t.a + e.a * da, t.b + e.b * db};
  });
  const A total = lane_sum<A>(s.a + s.b), log_total = std::log(total);
  return {log_total - lane_sum<A>(t.a + t.b) / total, log_total};
}

// `grad` may be `row`.
template <class T, class A = accumulator_t<T>>
void row_entropy_grad(T* grad, const T* row, const RowShape<T>& shape, A upstream, Entropy<A> row_value) {
  const Tail<T> tail(row, shape);
  const A m = row_max(row, tail.data, shape);
  map_row(grad, row, tail, shape, [&](Vec<A> x) {
    const Vec<A> log_p = x - m - row_value.log_sum;
    return -upstream * exp_or_zero<A>(log_p) * (max(broadcast<A>(kExpMin), log_p) + row_value.entropy);
  });
}

template <class A>
struct Loss {
  A loss, log_sum;
};

// `target` is a column of the row.
template <class T, class A = accumulator_t<T>>
Loss<A> row_loss(const T* row, const RowShape<T>& shape, int64_t target) {
  const Tail<T> tail(row, shape);
  const A m = row_max(row, tail.data, shape);
  PairOf<A> s = {};
  for_each_pair(row, tail, shape, [&](PairOf<A> x, auto keep) {
    const PairOf<A> e = keep({exp(max(broadcast<A>(kExpMin), x.a - m)), exp(max(broadcast<A>(kExpMin), x.b - m))});
    s = {s.a + e.a, s.b + e.b};
  });
  const A log_sum = std::log(lane_sum<A>(s.a + s.b));
  return {log_sum - (static_cast<A>(row[target]) - m), log_sum};
}

// `grad` may be `row`.
template <class T, class A = accumulator_t<T>>
void row_loss_grad(T* grad, const T* row, const RowShape<T>& shape, A upstream, A log_sum, int64_t target) {
  const Tail<T> tail(row, shape);
  const A m = row_max(row, tail.data, shape), log_p = static_cast<A>(row[target]) - m - log_sum;
  map_row(grad, row, tail, shape, [&](Vec<A> x) { return upstream * exp_or_zero<A>(x - m - log_sum); });
  grad[target] = static_cast<T>(upstream * std::expm1(log_p));
}

}  // namespace blt
