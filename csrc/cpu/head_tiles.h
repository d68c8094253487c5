// Multiplies a few rows with a few rows, in as many heads at once as a vector has lanes.
//
// A Table holds one number a head for each pair of rows (i, j): cell (i, j) is a vector across heads. So a softmax
// over i or j is vertical, and there is nothing to shuffle in it. Rows are [heads, E]: all heads of a row lie side by
// side and are read in that order (HeadView). The heads may also be those of several documents, each with rows of its
// own (LaneView).
//   dots:           table_ij = factor * x_i . y_j. Products are summed in vectors along E, then the vectors of lanes<A>
//                   heads are transposed while they are folded, at about two shuffles a dot product.
//   weighted_sums:  out_j = sum_i table_ij x_i, in registers along E.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "support/alloc.h"
#include "support/vec.h"

namespace blt {

// A table has up to so many rows on either side, or more where the other has fewer.
inline constexpr int64_t kTileSide = 16;
inline constexpr int64_t kCells = kTileSide * kTileSide;

template <class A>
using Table = A[kCells * lanes<A>];

// Points to a [rows, heads, E] tensor with unit stride in E.
template <class T>
struct HeadView {
  T* data;
  int64_t row_stride, head_stride;
  HeadView from(int64_t row, int64_t head) const {
    return {data + row * row_stride + head * head_stride, row_stride, head_stride};
  }
  T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// Points to a HeadView's tensor, or to a [B, length, heads, E] tensor of B * length rows, where `jump` elements are
// added to a row's address for each of the B before its own.
template <class T>
struct HeadRows {
  HeadView<T> rows;
  int64_t length = 1, jump = 0;
  // Returns a view of the rows from `row` on, up to the end of its `length` rows.
  HeadView<T> from(int64_t row, int64_t head) const {
    HeadView<T> view = rows.from(row, head);
    if (jump != 0) view.data += row / length * jump;
    return view;
  }
  T* at(int64_t row, int64_t head) const { return from(row, head).data; }
};

// Points to rows of E numbers in each lane. Those of a lane begin at data[lane].
template <class T>
struct LaneView {
  T* const* data;
  int64_t row_stride, first_row = 0;
  LaneView from(int64_t row, int64_t lane) const { return {data + lane, row_stride, first_row + row}; }
  T* at(int64_t row, int64_t lane) const { return data[lane] + (first_row + row) * row_stride; }
};

// Reads the rows of a LaneView times `factor`.
template <class T>
struct ScaledView {
  LaneView<const T> rows;
  accumulator_t<T> factor;
  ScaledView from(int64_t row, int64_t lane) const { return {rows.from(row, lane), factor}; }
};

struct HeadShape {
  int64_t heads, width;
};

// A table has these strides in vectors: the number of rows i and j is at i * steps.i + j * steps.j.
struct Steps {
  int64_t i, j;
};

// --- parts of vectors ------------------------------------------------------------------------------------------------

// Returns the first `count` elements of a pair; the others are 0.
template <class T>
auto load_part(const T* p, int64_t count) {
  T padded[pair_lanes<accumulator_t<T>>] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load_pair(padded);
}

template <class T>
void store_part(T* p, PairOf<accumulator_t<T>> x, int64_t count) {
  T padded[pair_lanes<accumulator_t<T>>];
  store_pair(padded, x);
  std::memcpy(p, padded, count * sizeof(T));
}

// Loads a pair of a row, or the first `count` elements of one.
template <class View>
auto load_pair(const View& x, int64_t row, int64_t head, int64_t e) {
  return load_pair(x.at(row, head) + e);
}
template <class View>
auto load_part(const View& x, int64_t row, int64_t head, int64_t e, int64_t count) {
  return load_part(x.at(row, head) + e, count);
}
template <class T, class A = accumulator_t<T>>
PairOf<A> load_pair(const ScaledView<T>& x, int64_t row, int64_t head, int64_t e) {
  const PairOf<A> pair = load_pair(x.rows.at(row, head) + e);
  return {x.factor * pair.a, x.factor * pair.b};
}
template <class T, class A = accumulator_t<T>>
PairOf<A> load_part(const ScaledView<T>& x, int64_t row, int64_t head, int64_t e, int64_t count) {
  const PairOf<A> pair = load_part(x.rows.at(row, head) + e, count);
  return {x.factor * pair.a, x.factor * pair.b};
}

// --- products --------------------------------------------------------------------------------------------------------

template <int kI, int kJ, class X, class Y, class A>
void dots_block(A* table, int64_t pitch, X x, Y y, Y next, HeadShape shape, A factor) {
  Vec<A> sums[kI][kJ][lanes<A>];
  for (int64_t head = 0; head < lanes<A>; ++head) {
    Vec<A> sum[kI][kJ];
    for (int i = 0; i < kI; ++i)
      for (int j = 0; j < kJ; ++j) sum[i][j] = Vec<A>{};
    if (head < shape.heads) {
      int64_t e = 0;
      for (; e + pair_lanes<A> <= shape.width; e += pair_lanes<A>) {
        if (next.data)
          for (int j = 0; j < kJ; ++j) prefetch_pair(next.at(j, head) + e);
        PairOf<A> right[kJ];
        for (int j = 0; j < kJ; ++j) right[j] = load_pair(y, j, head, e);
        for (int i = 0; i < kI; ++i) {
          const PairOf<A> left = load_pair(x, i, head, e);
          for (int j = 0; j < kJ; ++j) sum[i][j] += left.a * right[j].a, sum[i][j] += left.b * right[j].b;
        }
      }
      if (e < shape.width)
        for (int i = 0; i < kI; ++i)
          for (int j = 0; j < kJ; ++j) {
            const PairOf<A> left = load_part(x, i, head, e, shape.width - e);
            const PairOf<A> right = load_part(y, j, head, e, shape.width - e);
            sum[i][j] += left.a * right.a + left.b * right.b;
          }
    }
    for (int i = 0; i < kI; ++i)
      for (int j = 0; j < kJ; ++j) sums[i][j][head] = sum[i][j];
  }
  for (int i = 0; i < kI; ++i)
    for (int j = 0; j < kJ; ++j) store(table + (i * pitch + j) * lanes<A>, factor * lane_sums<A>(sums[i][j]));
}

// Computes table_ij = factor * x_i . y_j for rows i < m and j < n; j runs fastest, and rows i are `pitch` cells apart.
// Lanes beyond the heads are 0. Meanwhile it prefetches n rows of `next`: row strides are too long for the hardware
// prefetcher.
template <class X, class Y, class A>
void dots(A* table, int64_t pitch, X x, int64_t m, Y y, int64_t n, Y next, HeadShape shape, A factor) {
  for (int64_t i = 0; i < m; i += 2)
    for (int64_t j = 0; j < n; j += 2) {
      const auto run = [&]<int kI, int kJ>(std::integer_sequence<int, kI, kJ>) {
        dots_block<kI, kJ>(table + (i * pitch + j) * lanes<A>, pitch, x.from(i, 0), y.from(j, 0),
                           i == 0 && next.data ? next.from(j, 0) : Y{}, shape, factor);
      };
      if (i + 1 < m && j + 1 < n)
        run(std::integer_sequence<int, 2, 2>{});
      else if (i + 1 < m)
        run(std::integer_sequence<int, 2, 1>{});
      else if (j + 1 < n)
        run(std::integer_sequence<int, 1, 2>{});
      else
        run(std::integer_sequence<int, 1, 1>{});
    }
}

// Has room for the sums of heads: rows of padded width, so that whole pairs are stored.
template <class A>
int64_t padded_width(int64_t width) {
  return (width + pair_lanes<A> - 1) / pair_lanes<A> * pair_lanes<A>;
}

// Holds sums that several tables add to, kTileSide rows of lanes<A> heads. They are allocated at first use, or given.
template <class A>
class Partial {
 public:
  Partial(const Tensor& like, int64_t width) : like_(&like), padded_(padded_width<A>(width)) {}
  explicit Partial(HeadView<A> given) : given_(given) {}
  HeadView<A> view() {
    if (!given_.data) {
      memory_ = new_output(*like_, {kTileSide * lanes<A> * padded_}, accumulator(*like_));
      given_ = {memory_->template mutable_data_ptr<A>(), lanes<A> * padded_, padded_};
    }
    return given_;
  }

 private:
  const Tensor* like_ = nullptr;
  int64_t padded_ = 0;
  std::optional<Tensor> memory_;
  HeadView<A> given_ = {};
};

// Multiplies the heads of a row of partial sums by `factors`.
template <class A>
void multiply_heads(HeadView<A> row, Vec<A> factors, HeadShape shape) {
  for (int64_t head = 0; head < shape.heads; ++head)
    for (int64_t e = 0; e < padded_width<A>(shape.width); ++e) row.at(0, head)[e] *= factors[head];
}

// Says whether a sum starts with these rows, and whether they finish it.
struct Stage {
  bool first, last;
  bool whole() const { return first && last; }
};

// Arguments are values: stores may alias what a reference leads to, and then nothing stays in registers.
template <int kJ, class T, class Out, class X, class A = accumulator_t<T>>
void weighted_sums_block(Out out, HeadView<A> partial, X x, int64_t count, const A* table, Steps steps, HeadShape shape,
                         Stage stage) {
  for (int64_t head = 0; head < shape.heads; ++head) {
    const auto sum = [&](int64_t e, const auto& load, const auto& save) {
      PairOf<A> sums[kJ];
      for (int j = 0; j < kJ; ++j) sums[j] = {Vec<A>{}, Vec<A>{}};
      const T* row = x.at(0, head) + e;
      const A* weight = table + head;
      for (int64_t i = 0; i < count; ++i, row += x.row_stride, weight += steps.i * lanes<A>) {
        const PairOf<A> term = load(row);
        for (int j = 0; j < kJ; ++j) {
          sums[j].a += weight[j * steps.j * lanes<A>] * term.a;
          sums[j].b += weight[j * steps.j * lanes<A>] * term.b;
        }
      }
      for (int j = 0; j < kJ; ++j) {
        if (!stage.first) {  // rounding errors of a sum of sums stay small
          const PairOf<A> before = load_pair(partial.at(j, head) + e);
          sums[j] = {sums[j].a + before.a, sums[j].b + before.b};
        }
        if (stage.last)
          save(out.at(j, head) + e, sums[j]);
        else
          store_pair(partial.at(j, head) + e, sums[j]);
      }
    };
    int64_t e = 0;
    for (; e + pair_lanes<A> <= shape.width; e += pair_lanes<A>)
      sum(e, [](const T* p) { return load_pair(p); }, [](T* p, PairOf<A> pair) { store_pair(p, pair); });
    if (const int64_t rest = shape.width - e)
      sum(e, [=](const T* p) { return load_part(p, rest); }, [=](T* p, PairOf<A> pair) { store_part(p, pair, rest); });
  }
}

// Computes out_j = sum over i of table_ij x_i, for i < count and j < rows. Sums that go on from or into other tables
// are partial.
template <class T, class Out, class X, class A = accumulator_t<T>>
void weighted_sums(Out out, Partial<A>& partial, int64_t rows, X x, int64_t count, const A* table, Steps steps,
                   HeadShape shape, Stage stage) {
  for (int64_t j = 0; j < rows; j += 4)
    for (int64_t i = 0; i < count; i += kTileSide) {
      const int64_t size = std::min(kTileSide, count - i);
      const Stage here = {stage.first && i == 0, stage.last && i + size == count};
      const HeadView<A> running = here.whole() ? HeadView<A>{} : partial.view().from(j, 0);
      const A* const cell = table + (i * steps.i + j * steps.j) * lanes<A>;
      const auto run = [&]<int kJ>(std::integral_constant<int, kJ>) {
        weighted_sums_block<kJ, T>(out.from(j, 0), running, x.from(i, 0), size, cell, steps, shape, here);
      };
      switch (std::min<int64_t>(4, rows - j)) {
        case 1: run(std::integral_constant<int, 1>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        case 3: run(std::integral_constant<int, 3>{}); break;
        case 4: run(std::integral_constant<int, 4>{}); break;
      }
    }
}

}  // namespace blt
