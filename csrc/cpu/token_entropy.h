// Entropy of one row of logits, and its gradient. In fp32 arithmetic (fp64 for fp64 rows):
//
//   m = max x,  d = x - m,  s = sum exp(d),  log_sum = log s,  H = log_sum - (sum exp(d) d) / s
//   dH/dx = -p (log p + H),  log p = d - log_sum
//
// A row of 260 logits stays in the first-level cache, so it is read from memory once, although the maximum takes a pass of
// its own. Two vectors go through the loop together; rows whose width is no multiple of a Pair end in a Pair that overlaps
// the one before, with the elements already counted masked out.
// Work: about 16 vector instructions for kLanes logits; at 2 a cycle that is less time than memory needs for the row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/dispatch.h"
#include "../common/vec.h"

namespace blt {

inline constexpr int64_t kRowsAhead = 4;  // distance of the prefetch: the arithmetic on a row hides a line from memory
inline constexpr float kInf = std::numeric_limits<float>::infinity();

// How a row divides into Pairs.
template <class T>
struct RowShape {
  int64_t width, full;    // elements; those in whole Pairs
  VecI fresh_a, fresh_b;  // in the overlapping Pair: which elements are new, as all-ones masks

  explicit RowShape(int64_t width) : width(width), full(width / kPair * kPair) {
    VecI a, b;
    lane_index<T>(a, b);
    const VecI seen = VecI{} + static_cast<int32_t>(kPair - (width - full));
    fresh_a = a >= seen;
    fresh_b = b >= seen;
  }
  bool ragged() const { return full != width; }
};

struct Entropy {
  float entropy, log_sum;
};

inline VecF select(VecI mask, VecF a, VecF b) { return mask ? a : b; }

// A row shorter than a Pair, padded with -inf.
template <class T>
struct ShortRow {
  alignas(kVecBytes) T values[kPair];
  ShortRow(const T* row, int64_t width) {
    for (int64_t i = 0; i < kPair; ++i) values[i] = i < width ? row[i] : T(-kInf);
  }
};

// The maximum of a row of at least a Pair; NaN goes unnoticed.
template <class T>
float row_max(const T* row, const RowShape<T>& shape) {
  Pair top = load_pair(row);
  const auto raise = [&](Pair x) { top = {max(x.a, top.a), max(x.b, top.b)}; };
  for (int64_t i = kPair; i < shape.full; i += kPair) raise(load_pair(row + i));
  if (shape.ragged()) raise(load_pair(row + shape.width - kPair));
  return max(max(top.a, top.b));
}

template <class T>
Entropy row_entropy(const T* row, const RowShape<T>& shape) {
  if (shape.width < kPair) {
    const ShortRow<T> padded(row, shape.width);
    return row_entropy(padded.values, RowShape<T>(kPair));
  }
  const float m = row_max(row, shape);

  Pair s = {VecF{}, VecF{}}, t = {VecF{}, VecF{}};
  const auto accumulate = [&](Pair x) {
    const VecF da = max(broadcast(kExpMin), x.a - m), db = max(broadcast(kExpMin), x.b - m);
    const VecF ea = exp(da), eb = exp(db);
    s = {s.a + ea, s.b + eb};
    t = {t.a + ea * da, t.b + eb * db};
  };
  for (int64_t i = 0; i < shape.full; i += kPair) {
    prefetch_pair(row + i + kRowsAhead * shape.width);
    accumulate(load_pair(row + i));
  }
  if (shape.ragged()) {
    const Pair x = load_pair(row + shape.width - kPair);
    accumulate({select(shape.fresh_a, x.a, broadcast(-kInf)), select(shape.fresh_b, x.b, broadcast(-kInf))});
  }
  const float total = sum(s.a + s.b), log_total = std::log(total);
  return {log_total - sum(t.a + t.b) / total, log_total};
}

template <class T>
void row_entropy_grad(T* grad, const T* row, const RowShape<T>& shape, float upstream, Entropy e) {
  if (shape.width < kPair) {
    const ShortRow<T> padded(row, shape.width);
    T padded_grad[kPair];
    row_entropy_grad(padded_grad, padded.values, RowShape<T>(kPair), upstream, e);
    for (int64_t i = 0; i < shape.width; ++i) grad[i] = padded_grad[i];
    return;
  }
  const float m = row_max(row, shape);
  const auto slope = [&](VecF x) {
    const VecF log_p = x - m - e.log_sum, d = max(broadcast(kExpMin), log_p);
    const VecF p = log_p < kExpMin ? VecF{} : exp(d);
    return -upstream * p * (d + e.entropy);
  };
  const auto step = [&](int64_t i) {
    const Pair x = load_pair(row + i);
    store_pair(grad + i, {slope(x.a), slope(x.b)});
  };
  for (int64_t i = 0; i < shape.full; i += kPair) step(i);
  if (shape.ragged()) step(shape.width - kPair);
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
  const double m = *std::max_element(row, row + shape.width);
  double s = 0, t = 0;
  for (int64_t i = 0; i < shape.width; ++i) {
    const double d = row[i] - m, e = std::exp(d);
    s += e;
    t += e == 0 ? e : e * d;
  }
  return {std::log(s) - t / s, std::log(s)};
}

inline void row_entropy_grad(double* grad, const double* row, const RowShape<double>& shape, double upstream, Entropy64 e) {
  const double m = *std::max_element(row, row + shape.width);
  for (int64_t i = 0; i < shape.width; ++i) {
    const double log_p = row[i] - m - e.log_sum, p = std::exp(log_p);
    grad[i] = p == 0 ? 0 : -upstream * p * (log_p + e.entropy);
  }
}

}  // namespace blt
