// Computes the backward of patch_cross_attention.cpp, which has the formulas, and defines the types that both share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "head_tiles.h"
#include "patch_readers.h"
#include "support/rows.h"

namespace blt {
namespace {

// Each of `heads` heads of k and v has `repeats` query heads: kv head h is read by query heads h * repeats and
// following.
template <class T>
struct Problem {
  HeadRows<const T> q, k, v;
  int64_t heads, repeats, width;
  accumulator_t<T> scale;

  int64_t query_heads() const { return heads * repeats; }
};

// Returns the rows from `row` on of the r-th query head of every head of k and v, from `head` on.
template <class T>
HeadView<T> repeat(const HeadRows<T>& rows, int64_t repeats, int64_t r, int64_t row, int64_t head) {
  const HeadView<T> view = rows.from(row, head * repeats + r);
  return {view.data, view.row_stride, view.head_stride * repeats};
}

// Holds sums of parts by slot, vector of the patch and head: E numbers, and m and l of a softmax.
template <class A>
struct PartSums {
  A* data;
  A* softmax;
  int64_t vectors, heads, padded;

  int64_t at(int64_t slot, int64_t vector, int64_t head) const { return (slot * vectors + vector) * heads + head; }
  HeadView<A> of(int64_t slot, int64_t vector, int64_t head, int64_t step) const {
    return {data + at(slot, vector, head) * padded, heads * padded, step * padded};
  }
};

template <class A>
Vec<A> clamped_exp(Vec<A> x) {
  const Vec<A> low = Vec<A>{} + static_cast<A>(kExpMin);
  return x < low ? Vec<A>{} : exp(x < low ? low : x);
}

// Calls f(first head, shape) for groups of as many heads as a vector has lanes.
template <class A, class F>
void for_each_group(int64_t heads, int64_t width, const F& f) {
  for (int64_t head = 0; head < heads; head += lanes<A>)
    f(head, HeadShape{std::min<int64_t>(lanes<A>, heads - head), width});
}

template <class T>
void clear(const HeadRows<T>& x, Range rows, int64_t heads, int64_t width) {
  const bool whole = x.rows.head_stride == width;
  for (int64_t i = rows.begin; i < rows.end; ++i)
    for (int64_t head = 0; head < (whole ? 1 : heads); ++head)
      std::fill_n(x.at(i, head), whole ? heads * width : width, T(0));
}

// --- backward --------------------------------------------------------------------------------------------------------

template <class T>
struct Gradients {
  HeadRows<const T> grad_out, out;
  const accumulator_t<T>* lse;
  HeadRows<T> q, k, v;
  PartSums<accumulator_t<T>> sums[2];  // is for q, or for k and v
};

template <class A>
struct Partials {
  Partial<A> q, k, v;
};

template <class T>
void grad_tile(const Problem<T>& problem, const Gradients<T>& grads, const Task& tile, int64_t head, int64_t r,
               HeadShape shape, Stage query_stage, Stage key_stage, Partials<accumulator_t<T>>& partials) {
  using A = accumulator_t<T>;
  alignas(kVecBytes) Table<A> weights;
  alignas(kVecBytes) Table<A> slopes;
  const int64_t m = tile.queries.size(), n = tile.keys.size(), repeats = problem.repeats;
  // If a tile has all keys of its queries, g_i . out_i is a sum over them, and out is not read.
  const bool all_keys = tile.for_queries && query_stage.whole();
  const auto q = repeat(problem.q, repeats, r, tile.queries.begin, head);
  const auto g = repeat(grads.grad_out, repeats, r, tile.queries.begin, head);
  const auto out = repeat(grads.out, repeats, r, tile.queries.begin, head);
  const auto k = problem.k.from(tile.keys.begin, head), v = problem.v.from(tile.keys.begin, head);
  dots(weights, n, q, m, k, n, v, shape, problem.scale);
  dots(slopes, n, g, m, v, n, {}, shape, A(1));
  for (int64_t i = 0; i < m; ++i) {
    A* const p = weights + i * n * lanes<A>;
    A* const ds = slopes + i * n * lanes<A>;
    alignas(kVecBytes) A lse[lanes<A>] = {}, delta[lanes<A>];
    for (int64_t lane = 0; lane < shape.heads; ++lane)
      lse[lane] = grads.lse[(tile.queries.begin + i) * problem.query_heads() + (head + lane) * repeats + r];
    Vec<A> total = {}, sum = {};
    for (int64_t j = 0; j < n * lanes<A>; j += lanes<A>) {
      const Vec<A> weight = clamped_exp<A>(load(p + j) - load(lse));
      store(p + j, weight);
      total += weight;
      sum += weight * load(ds + j);
    }
    if (!all_keys) {
      dots(delta, 1, g.from(i, 0), 1, out.from(i, 0), 1, {}, shape, A(1));
      total = Vec<A>{} + 1, sum = load(delta);
    }
    // lse is rounded, so the weights sum to 1 only after a division by their sum.
    for (int64_t j = 0; j < n * lanes<A>; j += lanes<A>) {
      const Vec<A> weight = load(p + j) / total;
      store(p + j, weight);
      store(ds + j, weight * (load(ds + j) - sum / total) * problem.scale);
    }
  }
  if (tile.for_queries)
    weighted_sums<T>(repeat(grads.q, repeats, r, tile.queries.begin, head), partials.q, m, k, n, slopes, {1, n}, shape,
                     query_stage);
  if (tile.for_keys) {
    weighted_sums<T>(grads.k.from(tile.keys.begin, head), partials.k, n, q, m, slopes, {n, 1}, shape, key_stage);
    weighted_sums<T>(grads.v.from(tile.keys.begin, head), partials.v, n, g, m, weights, {n, 1}, shape, key_stage);
  }
}

// With a slot, the sums for the vectors of the patch (queries to encode, else keys) are kept, to be added up later.
template <class T>
void grad_task(const Problem<T>& problem, const Gradients<T>& grads, const Task& task, bool encode,
               Partials<accumulator_t<T>>& partials) {
  using A = accumulator_t<T>;
  const auto [queries, keys, for_queries, for_keys, slot] = task;
  const int64_t repeats = problem.repeats;
  if (queries.size() == 0 || keys.size() == 0) {
    if (for_queries) clear(grads.q, queries, problem.query_heads(), problem.width);
    if (for_keys) clear(grads.k, keys, problem.heads, problem.width);
    if (for_keys) clear(grads.v, keys, problem.heads, problem.width);
    return;
  }
  const int64_t query_step = std::min(queries.size(), kTileSide);
  const bool partial_keys = queries.size() > kTileSide || (for_keys && repeats > 1);
  const int64_t key_step = partial_keys ? kTileSide : kCells / query_step;
  // Partial sums have kTileSide rows of one repeat. So both sides are summed together only if one of them fits into a
  // single tile, the keys if there are several repeats.
  const bool one_by_one =
      keys.size() > key_step && (repeats > 1 || (queries.size() > kTileSide && keys.size() > kTileSide));
  if (for_queries && for_keys && one_by_one) {
    grad_task(problem, grads, {queries, keys, true, false, encode ? slot : -1}, encode, partials);
    grad_task(problem, grads, {queries, keys, false, true, encode ? -1 : slot}, encode, partials);
    return;
  }
  const bool keeps_queries = slot >= 0 && encode, keeps_keys = slot >= 0 && !encode;
  for_each_group<A>(problem.heads, problem.width, [&](int64_t head, HeadShape shape) {
    const auto run = [&](int64_t i, int64_t j, int64_t r) {
      const Task tile = {{i, std::min(i + query_step, queries.end)},
                         {j, std::min(j + key_step, keys.end)},
                         for_queries,
                         for_keys,
                         slot};
      const Stage query_stage = {j == keys.begin, !keeps_queries && tile.keys.end == keys.end};
      const Stage key_stage = {i == queries.begin && r == 0,
                               !keeps_keys && tile.queries.end == queries.end && r + 1 == repeats};
      if (slot < 0) return grad_tile(problem, grads, tile, head, r, shape, query_stage, key_stage, partials);
      const auto kept = [&](int n) {
        return Partial<A>(keeps_queries ? grads.sums[n].of(slot, i - queries.begin, head * repeats + r, repeats)
                                        : grads.sums[n].of(slot, j - keys.begin, head, 1));
      };
      Partials<A> own = {keeps_queries ? kept(0) : Partial<A>(partials.q.view()),
                         keeps_keys ? kept(0) : Partial<A>(partials.k.view()),
                         keeps_keys ? kept(1) : Partial<A>(partials.v.view())};
      grad_tile(problem, grads, tile, head, r, shape, query_stage, key_stage, own);
    };
    if (for_keys) {
      for (int64_t j = keys.begin; j < keys.end; j += key_step)
        for (int64_t r = 0; r < repeats; ++r)
          for (int64_t i = queries.begin; i < queries.end; i += query_step) run(i, j, r);
    } else {
      for (int64_t r = 0; r < repeats; ++r)
        for (int64_t i = queries.begin; i < queries.end; i += query_step)
          for (int64_t j = keys.begin; j < keys.end; j += key_step) run(i, j, r);
    }
  });
}

}  // namespace
}  // namespace blt
