// patch_cross_attention: patches read bytes (encode), or bytes read patches (decode).
//
//   s_ij = scale q_i . k_j for the keys j that query i reads,  lse_i = log sum_j exp s_ij
//   out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
//   ds_ij = scale p_ij (g_i . v_j - g_i . out_i)
//   dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i
//
// Tiling: queries that read the same keys make a tile with them, mostly K by a handful (patch_readers.h). A tile is
// small dense attention, for as many heads at once as a vector has lanes (head_tiles.h). A thread owns a run of patches
// with all heads of their rows, so every tensor is read and written once, from front to back. Tiles with more pairs
// than a table has cells are divided. Backward takes the queries and the keys of a patch in one pass if they only read
// each other; with a window the keys of a patch have a tile of their own with all queries that read them. Every
// gradient has one owner, without atomics.
//
// Query heads that share a head of k and v are processed one after the other, each as a problem with as many heads as k
// and v. Threads share long patches in pieces, whose sums are added up in order.
//
// Bytes: forward q, k, v, out and lse once; backward q, k, v, grad_out and the gradients once, and out where a query
// has more keys than a tile. Flops per (query, key) pair and head: 4 E forward, 10 E backward. With K = 2 in fp32 that
// is about one flop per byte, so memory is the limit. A window of w takes w times as many pairs, and reads keys w times
// from the cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/args/patch_cross_attention.h"
#include "../common/dispatch.h"
#include "patch_cross_attention_backward.h"
#include "support/alloc.h"
#include "support/rows.h"

namespace blt {
namespace {

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
struct Output {
  HeadRows<T> out;
  accumulator_t<T>* lse;
  Sums<accumulator_t<T>> sums;
};

// Writes the results of queries that read no key.
template <class T>
void skip(const Problem<T>& problem, const Output<T>& output, Rows queries) {
  using A = accumulator_t<T>;
  clear(output.out, queries, problem.query_heads(), problem.width);
  std::fill_n(output.lse + queries.begin * problem.query_heads(), queries.size() * problem.query_heads(),
              -std::numeric_limits<A>::infinity());
}

// The running maximum and sum of exponentials of one query in each lane.
template <class A>
struct RunningSoftmax {
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

// Attention of at most kRows queries in one group of heads, the r-th ones, in two passes over the keys: the softmax,
// then the values. With a slot the sums are kept undivided.
template <class T>
void attend(const Problem<T>& problem, const Output<T>& output, Rows queries, Rows keys, int64_t head, int64_t r,
            HeadShape shape, int64_t slot, int64_t first_query, Partial<accumulator_t<T>>& partial) {
  using A = accumulator_t<T>;
  alignas(kVecBytes) Table<A> table;
  RunningSoftmax<A> softmax[kRows];
  const int64_t m = queries.size(), step = kCells / m, repeats = problem.repeats;
  const auto q = repeat(problem.q, repeats, r).from(queries.begin, head);
  const auto out = repeat(output.out, repeats, r).from(queries.begin, head);
  const auto score = [&](int64_t key, int64_t n) {
    dots(table, q, m, problem.k.from(key, head), n, problem.v.from(key, head), shape, problem.scale);
  };
  for (int64_t key = keys.begin; key < keys.end; key += step) {
    const int64_t n = std::min(step, keys.end - key);
    score(key, n);
    for (int64_t i = 0; i < m; ++i) softmax[i].add(table + i * n * lanes<A>, n);
  }
  for (int64_t i = 0; i < m; ++i) {
    const Vec<A> shift = softmax[i].shift();
    for (int64_t lane = 0; lane < shape.heads; ++lane) {
      const int64_t query = queries.begin + i, query_head = (head + lane) * repeats + r;
      if (slot < 0) {
        output.lse[query * problem.query_heads() + query_head] = shift[lane] + std::log(softmax[i].total[lane]);
      } else {
        A* const own = output.sums.softmax + 2 * output.sums.at(slot, query - first_query, query_head);
        own[0] = softmax[i].top[lane], own[1] = softmax[i].total[lane];
      }
    }
    if (slot >= 0) softmax[i].total = Vec<A>{};
  }
  Partial<A> of_slot(
      output.sums.of(std::max<int64_t>(slot, 0), queries.begin - first_query, head * repeats + r, repeats));
  for (int64_t key = keys.begin; key < keys.end; key += step) {
    const int64_t n = std::min(step, keys.end - key);
    if (keys.size() > step) score(key, n);  // else the table still has the scores
    for (int64_t i = 0; i < m; ++i) softmax[i].weigh(table + i * n * lanes<A>, n);
    weighted_sums<T>(out, slot < 0 ? partial : of_slot, m, problem.v.from(key, head), n, table, {1, n}, shape,
                     {key == keys.begin, slot < 0 && key + n == keys.end});
  }
}

template <class T>
void attend_block(const Problem<T>& problem, const Output<T>& output, const QueryKeys& block, int64_t slot,
                  Partial<accumulator_t<T>>& partial) {
  const auto [queries, keys] = block;
  if (keys.size() == 0) return skip(problem, output, queries);
  for (int64_t r = 0; r < problem.repeats; ++r)
    for_each_group<accumulator_t<T>>(problem.heads, problem.width, [&](int64_t head, HeadShape shape) {
      for (int64_t i = queries.begin; i < queries.end; i += kRows)
        attend(problem, output, {i, std::min(i + kRows, queries.end)}, keys, head, r, shape, slot, queries.begin,
               partial);
    });
}

// --- pieces ----------------------------------------------------------------------------------------------------------

// Zeroed memory for the sums of the pieces. Pieces that read nothing leave zeros.
template <class A>
class SumMemory {
 public:
  SumMemory(const PatchReaders& readers, bool needed, int64_t heads, int64_t width, bool softmax)
      : data_(needed ? readers.num_slots() * readers.queries_per_patch * heads * padded_width<A>(width) : 0),
        softmax_(needed && softmax ? 2 * readers.num_slots() * readers.queries_per_patch * heads : 0),
        sums_{data_.data(), softmax_.data(), readers.queries_per_patch, heads, padded_width<A>(width)} {}
  const Sums<A>& sums() const { return sums_; }

 private:
  std::vector<A> data_, softmax_;
  Sums<A> sums_;
};

// out = the sums of the pieces of every divided patch, added up, with weights exp(m_n - m) / l for a softmax.
template <class T>
void add_up(const PatchReaders& readers, const Sums<accumulator_t<T>>& sums, const HeadRows<T>& out,
            accumulator_t<T>* lse, int64_t width) {
  using A = accumulator_t<T>;
  const int64_t rows = sums.rows * sums.heads;
  if (sums.data == nullptr) return;
  parallel_for(static_cast<int64_t>(readers.divided.size()) * rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> whole(static_cast<size_t>(sums.padded));
    for (int64_t i = begin; i < end; ++i) {
      const Divided& divided = readers.divided[i / rows];
      const int64_t row = i % rows / sums.heads, head = i % sums.heads, to = divided.patch * sums.rows + row;
      const auto softmax = [&](int64_t n) { return sums.softmax + 2 * sums.at(divided.slot + n, row, head); };
      A top = -std::numeric_limits<A>::infinity(), total = 0;
      for (int64_t n = 0; lse && n < divided.count; ++n) top = std::max(top, softmax(n)[0]);
      const A shift = std::isinf(top) ? A(0) : top;
      std::fill(whole.begin(), whole.end(), A(0));
      for (int64_t n = 0; n < divided.count; ++n) {
        const A weight = lse ? std::exp(softmax(n)[0] - shift) : A(1);
        if (lse) total += weight * softmax(n)[1];
        const A* const own = sums.of(divided.slot + n, row, head, 1).data;
        for (int64_t e = 0; e < sums.padded; ++e) whole[e] += weight * own[e];
      }
      if (lse) lse[to * sums.heads + head] = shift + std::log(total);
      const A divisor = !lse || total == 0 ? A(1) : total;
      for (A& x : whole) x /= divisor;
      T* const row_out = out.at(to, head);  // sums have the order of pairs
      int64_t e = 0;
      for (; e + pair_lanes<A> <= width; e += pair_lanes<A>) store_pair(row_out + e, load_pair(whole.data() + e));
      if (e < width) store_part(row_out + e, load_pair(whole.data() + e), width - e);
    }
  });
}

// --- entries ---------------------------------------------------------------------------------------------------------

template <class T>
HeadRows<const T> rows_of(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1)};
}

template <class T>
HeadRows<T> output_rows(Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1)};
}

template <class T>
Problem<T> problem_of(const CrossArguments& arguments) {
  return {rows_of<T>(arguments.q),
          rows_of<T>(arguments.k),
          rows_of<T>(arguments.v),
          arguments.kv_heads(),
          arguments.heads() / arguments.kv_heads(),
          arguments.width(),
          static_cast<accumulator_t<T>>(arguments.scale)};
}

std::tuple<Tensor, Tensor> patch_cross_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor offsets,
                                                         Tensor cu_patches, Tensor ids, std::string direction,
                                                         int64_t queries_per_patch, std::optional<int64_t> window,
                                                         std::optional<double> scale) {
  const CrossArguments arguments =
      check_cross_attention(q, k, v, offsets, cu_patches, ids, direction, queries_per_patch, window, scale);
  const PatchReaders readers = check_readers(arguments);
  Tensor out = new_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = new_output(q, {q.size(0), q.size(1)}, accumulator(q));
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(arguments);
    const int64_t heads = problem.query_heads(), width = problem.width;
    const SumMemory<A> sums(readers, readers.encode, heads, width, true);
    const Output<T> output = {output_rows<T>(out), lse.mutable_data_ptr<A>(), sums.sums()};
    readers.for_each_run(row_grain(heads * width), [&](int64_t first, int64_t last) {
      Partial<A> partial(q, width);
      readers.for_each_piece(first, last, [&](const Piece& piece) {
        attend_block(problem, output, readers.of_queries(piece), readers.encode ? piece.slot : -1, partial);
        if (!readers.encode) skip(problem, output, readers.waiting(piece));
      });
    });
    add_up<T>(readers, output.sums, output.out, output.lse, width);
    if (!readers.encode) skip(problem, output, readers.before()), skip(problem, output, readers.beyond());
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> patch_cross_attention_bwd_cpu(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                 Tensor out, Tensor lse, Tensor offsets,
                                                                 Tensor cu_patches, Tensor ids, std::string direction,
                                                                 int64_t queries_per_patch,
                                                                 std::optional<int64_t> window,
                                                                 std::optional<double> scale) {
  const CrossArguments arguments =
      check_cross_attention(q, k, v, offsets, cu_patches, ids, direction, queries_per_patch, window, scale);
  check_cross_grads(arguments, grad_out, out, lse);
  const PatchReaders readers = check_readers(arguments);
  Tensor grad_q = new_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = new_output(k, {k.size(0), k.size(1), k.size(2)});
  Tensor grad_v = new_output(v, {v.size(0), v.size(1), v.size(2)});
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(arguments);
    const int64_t heads = problem.heads, query_heads = problem.query_heads(), width = problem.width;
    const bool encode = readers.encode;
    const SumMemory<A> q_sums(readers, encode, query_heads, width, false);
    const SumMemory<A> k_sums(readers, !encode, heads, width, false), v_sums(readers, !encode, heads, width, false);
    const Gradients<T> grads = {rows_of<T>(grad_out),   rows_of<T>(out),        lse.const_data_ptr<A>(),
                                output_rows<T>(grad_q), output_rows<T>(grad_k), output_rows<T>(grad_v),
                                q_sums.sums(),          k_sums.sums(),          v_sums.sums()};
    readers.for_each_run(row_grain(query_heads * width), [&](int64_t first, int64_t last) {
      Partials<A> partials = {{q, width}, {q, width}, {q, width}};
      readers.for_each_piece(first, last, [&](const Piece& piece) {
        const Wanted wanted = {true, readers.window == 1};
        grad_block(problem, grads, readers.of_queries(piece), piece.slot, encode, wanted, partials);
        if (readers.window > 1)
          grad_block(problem, grads, readers.of_keys(piece), piece.slot, encode, {false, true}, partials);
        if (!encode) clear(grads.q, readers.waiting(piece), query_heads, width);
      });
    });
    add_up<T>(readers, grads.q_sums, grads.q, nullptr, width);
    add_up<T>(readers, grads.k_sums, grads.k, nullptr, width);
    add_up<T>(readers, grads.v_sums, grads.v, nullptr, width);
    for (const Rows unread : {readers.before(), readers.beyond()})
      if (encode)
        clear(grads.k, unread, heads, width), clear(grads.v, unread, heads, width);
      else
        clear(grads.q, unread, query_heads, width);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_cross_attention_fwd", TORCH_BOX(&patch_cross_attention_fwd_cpu));
  m.impl("patch_cross_attention_bwd", TORCH_BOX(&patch_cross_attention_bwd_cpu));
}

}  // namespace blt
