// Computes the entropy of one row of logits, and its gradient, in fp32 arithmetic (fp64 for fp64 rows):
//
//   m = max x,  d = x - m,  s = sum exp(d),  log_sum = log s,  H = log_sum - (sum exp(d) d) / s
//   dH/dx = -p (log p + H),  log p = d - log_sum
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
#include "support/vec.h"

namespace blt {

// Entropies and log_sums of the first `count` rows; the others are not read: they get 0 and kUnread.
std::tuple<Tensor, Tensor> entropies_of_rows(const Tensor& rows, int64_t count);

inline constexpr int64_t kRowsAhead = 4;  // distance of the prefetch: the arithmetic on a row hides a line from memory
inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kUnread = kInf;  // log_sum, in [0, log A] or NaN otherwise, of a row that no document has

// A row divides into Pairs: `full` elements are in whole ones, and `fresh` elements of the tail are in no whole Pair.
// The tail of a row shorter than a Pair is a copy of it.
template <class T>
struct RowShape {
  int64_t width, full;
  VecI fresh_a, fresh_b;  // all-ones masks

  explicit RowShape(int64_t width) : width(width), full(width / kPair * kPair) {
    lane_index<T>(fresh_a, fresh_b);
    const int32_t seen = static_cast<int32_t>(width < kPair ? 0 : kPair - (width - full));
    const int32_t end = static_cast<int32_t>(std::min<int64_t>(width, kPair));
    fresh_a = (fresh_a >= seen) & (fresh_a < end);
    fresh_b = (fresh_b >= seen) & (fresh_b < end);
  }
  bool ragged() const { return full != width; }
};

// The last Pair of a row, which starts within the row unless the row is shorter; then it is padded with -inf.
template <class T>
struct Tail {
  alignas(kVecBytes) T copy[kPair];
  const T* data;
  Tail(const T* row, const RowShape<T>& shape) : data(shape.width < kPair ? copy : row + shape.width - kPair) {
    if (data == copy)
      for (int64_t i = 0; i < kPair; ++i) copy[i] = i < shape.width ? row[i] : T(-kInf);
  }
  Tail(const Tail&) = delete;
};

struct Entropy {
  float entropy, log_sum;
};

// NaN goes unnoticed.
template <class T>
float row_max(const T* row, const T* tail, const RowShape<T>& shape) {
  Pair top = load_pair(tail);
  for (int64_t i = 0; i < shape.full; i += kPair) {
    const Pair x = load_pair(row + i);
    top = {max(x.a, top.a), max(x.b, top.b)};
  }
  return max(max(top.a, top.b));
}

template <class T>
Entropy row_entropy(const T* row, const RowShape<T>& shape) {
  const Tail<T> tail(row, shape);
  const float m = row_max(row, tail.data, shape);
  Pair s = {VecF{}, VecF{}}, t = {VecF{}, VecF{}};
  const auto accumulate = [&](Pair x, auto keep) {
    const VecF da = max(broadcast(kExpMin), x.a - m), db = max(broadcast(kExpMin), x.b - m);
    const Pair e = keep({exp(da), exp(db)});
    s = {s.a + e.a, s.b + e.b};
    t = {t.a + e.a * da, t.b + e.b * db};
  };
  for (int64_t i = 0; i < shape.full; i += kPair) {
    prefetch_pair(row + i + kRowsAhead * shape.width);
    accumulate(load_pair(row + i), [](Pair e) { return e; });
  }
  if (shape.ragged())
    accumulate(load_pair(tail.data),
               [&](Pair e) -> Pair { return {shape.fresh_a ? e.a : VecF{}, shape.fresh_b ? e.b : VecF{}}; });
  const float total = sum(s.a + s.b), log_total = std::log(total);
  return {log_total - sum(t.a + t.b) / total, log_total};
}

// `grad` may be `row`: the last Pair is read before what it overlaps is written.
template <class T>
void row_entropy_grad(T* grad, const T* row, const RowShape<T>& shape, float upstream, Entropy row_value) {
  const Tail<T> tail(row, shape);
  const float m = row_max(row, tail.data, shape);
  const auto slope = [&](VecF x) {
    const VecF log_p = x - m - row_value.log_sum, d = max(broadcast(kExpMin), log_p);
    const VecF p = log_p < kExpMin ? VecF{} : exp(d);
    return -upstream * p * (d + row_value.entropy);
  };
  const auto step = [&](T* out, Pair x) { store_pair(out, {slope(x.a), slope(x.b)}); };
  const Pair last = load_pair(tail.data);
  for (int64_t i = 0; i < shape.full; i += kPair) step(grad + i, load_pair(row + i));
  if (!shape.ragged()) return;
  if (shape.width >= kPair) {
    step(grad + shape.width - kPair, last);
  } else {
    T padded[kPair];
    step(padded, last);
    std::copy(padded, padded + shape.width, grad);
  }
}

// fp64: for checks, not for speed.
struct Entropy64 {
  double entropy, log_sum;
};

template <>
struct RowShape<double> {
  int64_t width;
  explicit RowShape(int64_t width) : width(width) {}
};

inline Entropy64 row_entropy(const double* row, const RowShape<double>& shape) {
  constexpr int kParts = 8;  // partial sums: their rounding errors average out
  const double m = *std::max_element(row, row + shape.width);
  double s[kParts] = {}, t[kParts] = {};
  for (int64_t i = 0; i < shape.width; ++i) {
    const double d = row[i] - m, e = std::exp(d);
    s[i % kParts] += e;
    t[i % kParts] += e == 0 ? e : e * d;
  }
  for (int part = kParts / 2; part > 0; part /= 2)
    for (int i = 0; i < part; ++i) s[i] += s[i + part], t[i] += t[i + part];
  return {std::log(s[0]) - t[0] / s[0], std::log(s[0])};
}

inline void row_entropy_grad(double* grad, const double* row, const RowShape<double>& shape, double upstream,
                             Entropy64 e) {
  const double m = *std::max_element(row, row + shape.width);
  for (int64_t i = 0; i < shape.width; ++i) {
    const double log_p = row[i] - m - e.log_sum, p = std::exp(log_p);
    grad[i] = p == 0 ? 0 : -upstream * p * (log_p + e.entropy);
  }
}

}  // namespace blt
