// patch_cross_attention: patches read bytes (encode), or bytes read patches (decode).
//
//   s_ij = scale q_i . k_j for the keys j that query i reads,  lse_i = log sum_j exp s_ij
//   out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
//   ds_ij = scale p_ij (g_i . v_j - g_i . out_i)
//   dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i
//
// Queries that read the same keys make a block with them, mostly K by a handful (patch_readers.h), and a block is
// nothing but small dense attention, for as many heads at once as a vector has lanes (head_tiles.h). A thread owns a
// run of patches with all heads of their rows, so every tensor is read and written once, from front to back. Blocks
// with more pairs of rows than a table has cells are cut into tiles. The backward does the queries and the keys of a
// patch in one pass where they read each other only; with a window the keys of a patch are in a block of their own
// with all queries that read them. Every gradient has one owner: no atomics.
//
// Bytes moved: forward q, k, v, out, lse once; backward q, k, v, grad_out and the gradients once, and out where a
// query has more keys than a tile. Flops a (query, key) pair and head: 4 E forward, 10 E backward. With K = 2 in fp32
// that is about one flop a byte, so memory is the limit. With a window of w the pairs grow w-fold, and keys are read w
// times from the cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../common/alloc.h"
#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/rows.h"
#include "head_tiles.h"
#include "patch_readers.h"

namespace blt {
namespace {

template <class T>
struct Problem {
  HeadRows<const T> q, k, v;
  int64_t heads, width;
  accumulator_t<T> scale;
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

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
struct Output {
  HeadRows<T> out;
  accumulator_t<T>* lse;
};

// Queries that read no key.
template <class T>
void skip(const Problem<T>& problem, const Output<T>& output, Rows queries) {
  using A = accumulator_t<T>;
  clear(output.out, queries, problem.heads, problem.width);
  std::fill_n(output.lse + queries.begin * problem.heads, queries.size() * problem.heads,
              -std::numeric_limits<A>::infinity());
}

// The softmax over the keys of one query, in all lanes: running over tables, its maximum and sum of exponentials.
template <class A>
struct Softmax {
  Vec<A> top = Vec<A>{} - std::numeric_limits<A>::infinity(), total = {};

  Vec<A> shift() const { return top == -std::numeric_limits<A>::infinity() ? Vec<A>{} : top; }
  void add(const A* scores, int64_t count) {
    const Vec<A> before = top;
    for (int64_t j = 0; j < count; ++j) {
      const Vec<A> s = load(scores + j * lanes<A>);
      top = s > top ? s : top;
    }
    Vec<A> sum = {};
    for (int64_t j = 0; j < count; ++j) sum += clamped_exp<A>(load(scores + j * lanes<A>) - shift());
    total = total * clamped_exp<A>(before - shift()) + sum;
  }
  void weigh(A* scores, int64_t count) const {
    const Vec<A> divisor = total == 0 ? Vec<A>{} + 1 : total;
    for (int64_t j = 0; j < count; ++j) {
      A* const cell = scores + j * lanes<A>;
      store(cell, clamped_exp<A>(load(cell) - shift()) / divisor);
    }
  }
};

// At most kRows queries in one group of heads. Two passes over the keys: the softmax, then the values.
template <class T>
void attend(const Problem<T>& problem, const Output<T>& output, Rows queries, Rows keys, int64_t head, HeadShape shape,
            Partial<accumulator_t<T>>& partial) {
  using A = accumulator_t<T>;
  alignas(kVecBytes) Table<A> table;
  Softmax<A> softmax[kRows];
  const int64_t m = queries.size(), step = kCells / m;
  const auto score = [&](int64_t key, int64_t n) {
    dots(table, problem.q.from(queries.begin, head), m, problem.k.from(key, head), n, problem.v.from(key, head), shape,
         problem.scale);
  };
  for (int64_t key = keys.begin; key < keys.end; key += step) {
    const int64_t n = std::min(step, keys.end - key);
    score(key, n);
    for (int64_t i = 0; i < m; ++i) softmax[i].add(table + i * n * lanes<A>, n);
  }
  for (int64_t i = 0; i < m; ++i) {
    A* const lse = output.lse + (queries.begin + i) * problem.heads + head;
    const Vec<A> shift = softmax[i].shift();
    for (int64_t lane = 0; lane < shape.heads; ++lane) lse[lane] = shift[lane] + std::log(softmax[i].total[lane]);
  }
  for (int64_t key = keys.begin; key < keys.end; key += step) {
    const int64_t n = std::min(step, keys.end - key);
    if (keys.size() > step) score(key, n);  // else the scores are still there
    for (int64_t i = 0; i < m; ++i) softmax[i].weigh(table + i * n * lanes<A>, n);
    weighted_sums<T>(output.out.from(queries.begin, head), partial, m, problem.v.from(key, head), n, table, {1, n},
                     shape, {key == keys.begin, key + n == keys.end});
  }
}

template <class T>
void attend_block(const Problem<T>& problem, const Output<T>& output, const Block& block,
                  Partial<accumulator_t<T>>& partial) {
  if (block.keys.size() == 0) return skip(problem, output, block.queries);
  for_each_group<accumulator_t<T>>(problem.heads, problem.width, [&](int64_t head, HeadShape shape) {
    for (int64_t i = block.queries.begin; i < block.queries.end; i += kRows)
      attend(problem, output, {i, std::min(i + kRows, block.queries.end)}, block.keys, head, shape, partial);
  });
}

// --- backward --------------------------------------------------------------------------------------------------------

template <class T>
struct Gradients {
  HeadRows<const T> grad_out, out;
  const accumulator_t<T>* lse;
  HeadRows<T> q, k, v;
};

template <class A>
struct Partials {
  Partial<A> q, k, v;
};

// Which gradients a block is asked for.
struct Wanted {
  bool queries, keys;
};

template <class T>
void grad_tile(const Problem<T>& problem, const Gradients<T>& grads, const Block& tile, int64_t head, HeadShape shape,
               Wanted wanted, Stage query_stage, Stage key_stage, Partials<accumulator_t<T>>& partials) {
  using A = accumulator_t<T>;
  alignas(kVecBytes) Table<A> weights;
  alignas(kVecBytes) Table<A> slopes;
  const int64_t m = tile.queries.size(), n = tile.keys.size();
  // Where a tile has all the keys of its queries, g_i . out_i is a sum over them, and out need not be read.
  const bool all_keys = wanted.queries && query_stage.whole();
  const auto q = problem.q.from(tile.queries.begin, head), g = grads.grad_out.from(tile.queries.begin, head);
  const auto k = problem.k.from(tile.keys.begin, head), v = problem.v.from(tile.keys.begin, head);
  dots(weights, q, m, k, n, v, shape, problem.scale);
  dots(slopes, g, m, v, n, {}, shape, A(1));
  for (int64_t i = 0; i < m; ++i) {
    A* const p = weights + i * n * lanes<A>;
    A* const ds = slopes + i * n * lanes<A>;
    alignas(kVecBytes) A lse[lanes<A>] = {}, delta[lanes<A>];
    std::copy_n(grads.lse + (tile.queries.begin + i) * problem.heads + head, shape.heads, lse);
    Vec<A> total = {}, sum = {};
    for (int64_t j = 0; j < n * lanes<A>; j += lanes<A>) {
      const Vec<A> weight = clamped_exp<A>(load(p + j) - load(lse));
      store(p + j, weight);
      total += weight;
      sum += weight * load(ds + j);
    }
    if (!all_keys) {
      dots(delta, g.from(i, 0), 1, grads.out.from(tile.queries.begin + i, head), 1, {}, shape, A(1));
      total = Vec<A>{} + 1, sum = load(delta);
    }
    // lse is rounded, so the weights do not quite sum to 1 until they are divided by their sum.
    for (int64_t j = 0; j < n * lanes<A>; j += lanes<A>) {
      const Vec<A> weight = load(p + j) / total;
      store(p + j, weight);
      store(ds + j, weight * (load(ds + j) - sum / total) * problem.scale);
    }
  }
  if (wanted.queries)
    weighted_sums<T>(grads.q.from(tile.queries.begin, head), partials.q, m, k, n, slopes, {1, n}, shape, query_stage);
  if (wanted.keys) {
    weighted_sums<T>(grads.k.from(tile.keys.begin, head), partials.k, n, q, m, slopes, {n, 1}, shape, key_stage);
    weighted_sums<T>(grads.v.from(tile.keys.begin, head), partials.v, n, g, m, weights, {n, 1}, shape, key_stage);
  }
}

template <class T>
void grad_block(const Problem<T>& problem, const Gradients<T>& grads, const Block& block, Wanted wanted,
                Partials<accumulator_t<T>>& partials) {
  const auto [queries, keys] = block;
  if (queries.size() == 0 || keys.size() == 0) {
    if (wanted.queries) clear(grads.q, queries, problem.heads, problem.width);
    if (wanted.keys) clear(grads.k, keys, problem.heads, problem.width);
    if (wanted.keys) clear(grads.v, keys, problem.heads, problem.width);
    return;
  }
  // Partial sums have kRows rows, so one side at least must fit in a single tile for both to be summed at once.
  if (wanted.queries && wanted.keys && queries.size() > kRows && keys.size() > kRows) {
    grad_block(problem, grads, block, {true, false}, partials);
    grad_block(problem, grads, block, {false, true}, partials);
    return;
  }
  const int64_t query_step = std::min(kRows, queries.size());
  const int64_t key_step = queries.size() > kRows ? kRows : kCells / query_step;
  for_each_group<accumulator_t<T>>(problem.heads, problem.width, [&](int64_t head, HeadShape shape) {
    const auto run = [&](int64_t i, int64_t j) {
      const Block tile = {{i, std::min(i + query_step, queries.end)}, {j, std::min(j + key_step, keys.end)}};
      grad_tile(problem, grads, tile, head, shape, wanted, {j == keys.begin, tile.keys.end == keys.end},
                {i == queries.begin, tile.queries.end == queries.end}, partials);
    };
    if (wanted.keys) {
      for (int64_t j = keys.begin; j < keys.end; j += key_step)
        for (int64_t i = queries.begin; i < queries.end; i += query_step) run(i, j);
    } else {
      for (int64_t i = queries.begin; i < queries.end; i += query_step)
        for (int64_t j = keys.begin; j < keys.end; j += key_step) run(i, j);
    }
  });
}

// --- entries ---------------------------------------------------------------------------------------------------------

Tensor unit_stride(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x); }

template <class T>
HeadRows<const T> rows_of(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1)};
}

template <class T>
HeadRows<T> output_rows(Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1)};
}

void check_like(const Tensor& x, const char* name, const Tensor& like) {
  check_dim(x, name, 3);
  check_dtype(x, name, like.scalar_type());
  for (int dim = 0; dim < 3; ++dim) check_size(x, name, dim, like.size(dim));
}

Readers check_arguments(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& patch_offsets, Tensor& cu_patches,
                        Tensor& ids, const std::string& direction, int64_t queries_per_patch,
                        std::optional<int64_t> window) {
  check_dim(q, "q", 3);
  check_dim(k, "k", 3);
  check_dtype(k, "k", q.scalar_type());
  check_like(v, "v", k);
  check_size(k, "k", 1, q.size(1));
  check_size(k, "k", 2, q.size(2));
  const bool encode = direction == "encode";
  const Tensor& on_bytes = encode ? k : q;
  const Tensor& on_patches = encode ? q : k;
  const Readers readers =
      check_readers(patch_offsets, cu_patches, ids, direction, on_bytes.size(0), queries_per_patch, window);
  const int64_t rows = on_patches.size(0), capacity = readers.capacity;
  STD_TORCH_CHECK(capacity == 0 ? rows == 0 : rows % capacity == 0 && rows / capacity == queries_per_patch,
                  encode ? "q" : "k", ": expected ", capacity, " * ", queries_per_patch, " rows, got ", rows);
  return readers;
}

template <class T>
Problem<T> problem_of(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  return {rows_of<T>(q), rows_of<T>(k),
          rows_of<T>(v), q.size(1),
          q.size(2),     static_cast<accumulator_t<T>>(scale.value_or(1 / std::sqrt(static_cast<double>(q.size(2)))))};
}

std::tuple<Tensor, Tensor> patch_cross_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor patch_offsets,
                                                         Tensor cu_patches, Tensor ids, std::string direction,
                                                         int64_t queries_per_patch, std::optional<int64_t> window,
                                                         std::optional<double> scale) {
  const Readers readers =
      check_arguments(q, k, v, patch_offsets, cu_patches, ids, direction, queries_per_patch, window);
  q = unit_stride(q), k = unit_stride(k), v = unit_stride(v);
  Tensor out = new_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = new_output(q, {q.size(0), q.size(1)}, accumulator(q));
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(q, k, v, scale);
    const Output<T> output = {output_rows<T>(out), lse.mutable_data_ptr<A>()};
    readers.for_each_run(row_grain(problem.heads * problem.width), [&](int64_t first, int64_t last) {
      Partial<A> partial(q, problem.width);
      readers.for_each_patch(first, last, [&](int64_t patch, const Document& document) {
        if (patch == document.first) skip(problem, output, readers.waiting(document));
        attend_block(problem, output, readers.of_queries(patch, document), partial);
      });
    });
    if (!readers.encode) skip(problem, output, {readers.offsets[readers.capacity], readers.num_bytes});
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> patch_cross_attention_bwd_cpu(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                 Tensor out, Tensor lse, Tensor patch_offsets,
                                                                 Tensor cu_patches, Tensor ids, std::string direction,
                                                                 int64_t queries_per_patch,
                                                                 std::optional<int64_t> window,
                                                                 std::optional<double> scale) {
  const Readers readers =
      check_arguments(q, k, v, patch_offsets, cu_patches, ids, direction, queries_per_patch, window);
  check_like(grad_out, "grad_out", q);
  check_like(out, "out", q);
  check_dim(lse, "lse", 2);
  check_dtype(lse, "lse", accumulator(q));
  for (int dim = 0; dim < 2; ++dim) check_size(lse, "lse", dim, q.size(dim));
  q = unit_stride(q), k = unit_stride(k), v = unit_stride(v);
  grad_out = unit_stride(grad_out), out = unit_stride(out), lse = torch::stable::contiguous(lse);
  Tensor grad_q = new_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = new_output(k, {k.size(0), k.size(1), k.size(2)});
  Tensor grad_v = new_output(v, {v.size(0), v.size(1), v.size(2)});
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(q, k, v, scale);
    const int64_t heads = problem.heads, width = problem.width;
    const Gradients<T> grads = {rows_of<T>(grad_out),   rows_of<T>(out),        lse.const_data_ptr<A>(),
                                output_rows<T>(grad_q), output_rows<T>(grad_k), output_rows<T>(grad_v)};
    readers.for_each_run(row_grain(heads * width), [&](int64_t first, int64_t last) {
      Partials<A> partials = {{q, width}, {q, width}, {q, width}};
      readers.for_each_patch(first, last, [&](int64_t patch, const Document& document) {
        if (patch == document.first) clear(grads.q, readers.waiting(document), heads, width);
        const Block of_queries = readers.of_queries(patch, document);
        grad_block(problem, grads, of_queries, {true, readers.window == 1}, partials);
        if (readers.window > 1) grad_block(problem, grads, readers.of_keys(patch, document), {false, true}, partials);
      });
    });
    const Rows unread = {readers.offsets[readers.capacity], readers.num_bytes};
    if (readers.encode)
      clear(grads.k, unread, heads, width), clear(grads.v, unread, heads, width);
    else
      clear(grads.q, unread, heads, width);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_cross_attention_fwd", TORCH_BOX(&patch_cross_attention_fwd_cpu));
  m.impl("patch_cross_attention_bwd", TORCH_BOX(&patch_cross_attention_bwd_cpu));
}

}  // namespace blt
