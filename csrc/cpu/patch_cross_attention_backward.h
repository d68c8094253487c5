// The backward of patch_cross_attention.cpp, where its formulas are, and the types that forward and backward share.
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

// The r-th query head of every head of k and v.
template <class T>
HeadRows<T> repeat(const HeadRows<T>& rows, int64_t repeats, int64_t r) {
  return {rows.data + r * rows.head_stride, rows.row_stride, rows.head_stride * repeats};
}

// The sums of pieces of long patches: E numbers per slot, row of the patch and head, and m and l of a softmax.
template <class A>
struct Sums {
  A* data;
  A* softmax;
  int64_t rows, heads, padded;

  int64_t at(int64_t slot, int64_t row, int64_t head) const { return (slot * rows + row) * heads + head; }
  HeadRows<A> of(int64_t slot, int64_t row, int64_t head, int64_t step) const {
    return {data + at(slot, row, head) * padded, heads * padded, step * padded};
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
void clear(const HeadRows<T>& x, Rows rows, int64_t heads, int64_t width) {
  for (int64_t i = rows.begin; i < rows.end; ++i) std::fill_n(x.at(i, 0), heads * width, T(0));
}

// --- backward --------------------------------------------------------------------------------------------------------

template <class T>
struct Gradients {
  HeadRows<const T> grad_out, out;
  const accumulator_t<T>* lse;
  HeadRows<T> q, k, v;
  Sums<accumulator_t<T>> q_sums, k_sums, v_sums;  // sums of pieces, for the patch's vectors
};

template <class A>
struct Partials {
  Partial<A> q, k, v;
};

// The gradients that a tile computes.
struct Wanted {
  bool queries, keys;
};

template <class T>
void grad_tile(const Problem<T>& problem, const Gradients<T>& grads, const QueryKeys& tile, int64_t head, int64_t r,
               HeadShape shape, Wanted wanted, Stage query_stage, Stage key_stage,
               Partials<accumulator_t<T>>& partials) {
  using A = accumulator_t<T>;
  alignas(kVecBytes) Table<A> weights;
  alignas(kVecBytes) Table<A> slopes;
  const int64_t m = tile.queries.size(), n = tile.keys.size(), repeats = problem.repeats;
  // If a tile has all keys of its queries, g_i . out_i is a sum over them, and out is not read.
  const bool all_keys = wanted.queries && query_stage.whole();
  const auto q = repeat(problem.q, repeats, r).from(tile.queries.begin, head);
  const auto g = repeat(grads.grad_out, repeats, r).from(tile.queries.begin, head);
  const auto out = repeat(grads.out, repeats, r).from(tile.queries.begin, head);
  const auto k = problem.k.from(tile.keys.begin, head), v = problem.v.from(tile.keys.begin, head);
  dots(weights, q, m, k, n, v, shape, problem.scale);
  dots(slopes, g, m, v, n, {}, shape, A(1));
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
      dots(delta, g.from(i, 0), 1, out.from(i, 0), 1, {}, shape, A(1));
      total = Vec<A>{} + 1, sum = load(delta);
    }
    // lse is rounded, so the weights sum to 1 only after a division by their sum.
    for (int64_t j = 0; j < n * lanes<A>; j += lanes<A>) {
      const Vec<A> weight = load(p + j) / total;
      store(p + j, weight);
      store(ds + j, weight * (load(ds + j) - sum / total) * problem.scale);
    }
  }
  if (wanted.queries)
    weighted_sums<T>(repeat(grads.q, repeats, r).from(tile.queries.begin, head), partials.q, m, k, n, slopes, {1, n},
                     shape, query_stage);
  if (wanted.keys) {
    weighted_sums<T>(grads.k.from(tile.keys.begin, head), partials.k, n, q, m, slopes, {n, 1}, shape, key_stage);
    weighted_sums<T>(grads.v.from(tile.keys.begin, head), partials.v, n, g, m, weights, {n, 1}, shape, key_stage);
  }
}

// With a slot, the sums for the vectors of the patch (queries or keys) are kept, to be added up later.
template <class T>
void grad_block(const Problem<T>& problem, const Gradients<T>& grads, const QueryKeys& block, int64_t slot, bool encode,
                Wanted wanted, Partials<accumulator_t<T>>& partials) {
  using A = accumulator_t<T>;
  const auto [queries, keys] = block;
  const int64_t repeats = problem.repeats;
  if (slot < 0 && (queries.size() == 0 || keys.size() == 0)) {
    if (wanted.queries) clear(grads.q, queries, problem.query_heads(), problem.width);
    if (wanted.keys) clear(grads.k, keys, problem.heads, problem.width);
    if (wanted.keys) clear(grads.v, keys, problem.heads, problem.width);
    return;
  }
  const int64_t query_step = std::clamp<int64_t>(queries.size(), 1, kRows);
  const bool partial_keys = queries.size() > kRows || (wanted.keys && repeats > 1);
  const int64_t key_step = partial_keys ? kRows : kCells / query_step;
  // Partial sums have kRows rows of one repeat. So both sides are summed together only if one of them fits into a
  // single tile, the keys if there are several repeats.
  const bool one_by_one = keys.size() > key_step && (repeats > 1 || (queries.size() > kRows && keys.size() > kRows));
  if (wanted.queries && wanted.keys && one_by_one) {
    grad_block(problem, grads, block, slot, encode, {true, false}, partials);
    grad_block(problem, grads, block, slot, encode, {false, true}, partials);
    return;
  }
  const bool keeps_queries = slot >= 0 && encode, keeps_keys = slot >= 0 && !encode;
  for_each_group<A>(problem.heads, problem.width, [&](int64_t head, HeadShape shape) {
    const auto run = [&](int64_t i, int64_t j, int64_t r) {
      const QueryKeys tile = {{i, std::min(i + query_step, queries.end)}, {j, std::min(j + key_step, keys.end)}};
      const Stage query_stage = {j == keys.begin, !keeps_queries && tile.keys.end == keys.end};
      const Stage key_stage = {i == queries.begin && r == 0,
                               !keeps_keys && tile.queries.end == queries.end && r + 1 == repeats};
      if (slot < 0) return grad_tile(problem, grads, tile, head, r, shape, wanted, query_stage, key_stage, partials);
      const int64_t query = i - queries.begin, key = j - keys.begin;
      Partials<A> kept = {
          Partial<A>(keeps_queries ? grads.q_sums.of(slot, query, head * repeats + r, repeats) : partials.q.rows()),
          Partial<A>(keeps_keys ? grads.k_sums.of(slot, key, head, 1) : partials.k.rows()),
          Partial<A>(keeps_keys ? grads.v_sums.of(slot, key, head, 1) : partials.v.rows())};
      grad_tile(problem, grads, tile, head, r, shape, wanted, query_stage, key_stage, kept);
    };
    if (wanted.keys) {
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
