// block_causal_attention: flash attention within documents packed end to end.
//
//   s_ij = scale q_i . k_j for the keys [first_i, last_i) that query i sees,  lse_i = log sum_j exp s_ij
//   out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
//   ds_ij = p_ij (g_i . v_j - g_i . out_i)
//   dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i
//
// Tiling. kWidth queries of one head lie across the vector lanes; keys and values are streamed past them as scalars, in
// steps of kStep keys. So the softmax is vertical: maxima and sums are lanes, and no scores are shuffled. Only steps that
// some query of the tile sees in part are masked. visible_tiles.h has the tiles and shares them among the threads.
// The backward has two passes without atomics: dq with queries across the lanes, dk and dv with keys across them.
// Flops: 4 E a (query, key) pair forward; 14 E backward, of which 4 E recompute scores a second time for the second pass.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "tile.h"
#include "visible_tiles.h"

namespace blt {
namespace {

constexpr int64_t kStep = 64;        // streamed rows in a step
constexpr int64_t kRowGrain = 1024;  // rows of dot products a thread must have to be worth waking

// A [T, heads, E] tensor with unit stride in E.
template <class T>
struct Heads {
  T* data;
  int64_t row_stride, head_stride;
  T* row(int64_t i, int64_t head) const { return data + i * row_stride + head * head_stride; }
};

template <class T>
Heads<const T> heads_of(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1)};
}

Tensor unit_stride(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x); }

// Rows [begin, begin + count) of a head, as accumulators and side by side: in the tensor they may be apart by a power of
// two, all in one set of the cache.
template <class T, class A>
const A* gather_rows(A* rows, const Heads<const T>& x, int64_t head, int64_t begin, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    const T* const row = x.row(begin + i, head);
    for (int64_t e = 0; e < width; ++e) rows[i * width + e] = static_cast<A>(row[e]);
  }
  return rows;
}

// block[e][lane] = factor * x[begin + lane][e]; lanes from `count` on are 0.
template <class T, class A>
void transpose_in(A* block, const Heads<const T>& x, int64_t head, int64_t begin, int64_t count, int64_t width,
                  A factor) {
  for (int64_t lane = 0; lane < kWidth<A>; ++lane)
    for (int64_t e = 0; e < width; ++e)
      block[e * kWidth<A> + lane] = lane < count ? factor * static_cast<A>(x.row(begin + lane, head)[e]) : A(0);
}

// x[begin + lane][e] = factor[lane] * block[e][lane] for lanes below `count`.
template <class T, class A>
void transpose_out(const Heads<T>& x, int64_t head, int64_t begin, int64_t count, int64_t width, const A* block,
                   const A* factor) {
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t e = 0; e < width; ++e)
      x.row(begin + lane, head)[e] = static_cast<T>(factor[lane] * block[e * kWidth<A> + lane]);
}

template <class T>
struct Problem {
  Heads<const T> q, k, v;
  int64_t heads, groups, width;  // H, G, E
  double scale;
  Visibility visible;
  int64_t group_of(int64_t head) const { return head / (heads / groups); }
};

// What the queries in the lanes see, relative to the first streamed key; what all of them see.
template <class A>
struct LaneKeys {
  alignas(kVecBytes) A first[kWidth<A>], last[kWidth<A>];
  Range common;

  LaneKeys(const Visibility& visible, const Tile& tile) : common{0, tile.work()} {
    int64_t b = visible.document_of(tile.lanes.begin);
    for (int64_t lane = 0; lane < kWidth<A>; ++lane) {
      const int64_t row = tile.lanes.begin + lane;
      Range seen = {0, 0};
      if (row < tile.lanes.end) {
        while (visible.cu_q[b + 1] <= row) ++b;
        seen = visible.keys(row, b);
        seen = seen.begin == seen.end ? Range{0, 0}
                                      : Range{seen.begin - tile.streamed.begin, seen.end - tile.streamed.begin};
        common = {std::max(common.begin, seen.begin), std::min(common.end, seen.end)};
      }
      first[lane] = static_cast<A>(seen.begin);
      last[lane] = static_cast<A>(seen.end);
    }
  }
  bool all_see(int64_t begin, int64_t end) const { return common.begin <= begin && end <= common.end; }
  Mask<A> sees(int64_t key, int c) const {
    const Vec<A> j = Vec<A>{} + static_cast<A>(key);
    return (load(first + c * lanes<A>) <= j) & (j < load(last + c * lanes<A>));
  }
};

template <class A>
Vec<A> clamped_exp(Vec<A> x) {
  const Vec<A> low = Vec<A>{} + static_cast<A>(kExpMin);
  return x < low ? Vec<A>{} : exp(x < low ? low : x);
}

// --- forward ----------------------------------------------------------------------------------------------------------

template <class T, class A>
void attend(const Problem<T>& problem, const Heads<T>& out, A* lse, int64_t head, const Tile& tile,
            Scratch<A> scratch) {
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const int64_t width = problem.width, group = problem.group_of(head), count = tile.lanes.end - tile.lanes.begin;
  A* const queries = scratch.take(width * kWidth<A>);
  A* const sums = scratch.take(width * kWidth<A>);
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const gathered = scratch.take(kStep * width);
  const LaneKeys<A> keys(problem.visible, tile);
  transpose_in<T, A>(queries, problem.q, head, tile.lanes.begin, count, width, static_cast<A>(problem.scale));
  std::fill(sums, sums + width * kWidth<A>, A(0));
  Vec<A> top[kColumns], total[kColumns];
  for (int c = 0; c < kColumns; ++c) top[c] = Vec<A>{} + kNone, total[c] = Vec<A>{};

  for (int64_t begin = 0; begin < tile.work(); begin += kStep) {
    const int64_t end = std::min(begin + kStep, tile.work());
    {
      const A* const rows =
          gather_rows<T, A>(gathered, problem.k, group, tile.streamed.begin + begin, end - begin, width);
      product(scores, end - begin, rows, width, 1, queries, width, false);
    }
    const bool masked = !keys.all_see(begin, end);
    for (int c = 0; c < kColumns; ++c) {
      A* const column = scores + c * lanes<A>;
      Vec<A> peak = top[c];
      for (int64_t j = begin; j < end; ++j) {
        A* const cell = column + (j - begin) * kWidth<A>;
        Vec<A> s = load(cell);
        if (masked) {
          s = keys.sees(j, c) ? s : Vec<A>{} + kNone;
          store(cell, s);
        }
        peak = s > peak ? s : peak;
      }
      const Vec<A> shift = peak == kNone ? Vec<A>{} : peak;
      const Vec<A> decay = clamped_exp<A>(top[c] - shift);
      top[c] = peak;
      total[c] *= decay;
      for (int64_t j = 0; j < end - begin; ++j) {
        A* const cell = column + j * kWidth<A>;
        const Vec<A> p = clamped_exp<A>(load(cell) - shift);
        store(cell, p);
        total[c] += p;
      }
      for (int64_t e = 0; e < width; ++e) {
        A* const cell = sums + e * kWidth<A> + c * lanes<A>;
        store(cell, load(cell) * decay);
      }
    }
    const A* const rows =
        gather_rows<T, A>(gathered, problem.v, group, tile.streamed.begin + begin, end - begin, width);
    product(sums, width, rows, 1, width, scores, end - begin, true);
  }

  A factor[kWidth<A>];
  for (int64_t lane = 0; lane < kWidth<A>; ++lane) {
    const A weight = total[lane / lanes<A>][lane % lanes<A>], peak = top[lane / lanes<A>][lane % lanes<A>];
    factor[lane] = peak == kNone ? 0 : 1 / weight;
    if (lane < count) lse[(tile.lanes.begin + lane) * problem.heads + head] = peak + std::log(weight);
  }
  transpose_out(out, head, tile.lanes.begin, count, width, sums, factor);
}

// --- backward ---------------------------------------------------------------------------------------------------------

// dq of the queries in the lanes. delta_i = g_i . out_i.
template <class T, class A>
void query_grad(const Problem<T>& problem, const Heads<const T>& grad, const A* lse, const A* delta,
                const Heads<T>& grad_q, int64_t head, const Tile& tile, Scratch<A> scratch) {
  const int64_t width = problem.width, group = problem.group_of(head), count = tile.lanes.end - tile.lanes.begin;
  A* const queries = scratch.take(width * kWidth<A>);
  A* const grads = scratch.take(width * kWidth<A>);
  A* const sums = scratch.take(width * kWidth<A>);
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const slopes = scratch.take(kStep * kWidth<A>);
  A* const gathered = scratch.take(kStep * width);
  const LaneKeys<A> keys(problem.visible, tile);
  transpose_in<T, A>(queries, problem.q, head, tile.lanes.begin, count, width, static_cast<A>(problem.scale));
  transpose_in<T, A>(grads, grad, head, tile.lanes.begin, count, width, A(1));
  std::fill(sums, sums + width * kWidth<A>, A(0));
  alignas(kVecBytes) A lane_lse[kWidth<A>] = {}, lane_delta[kWidth<A>] = {}, factor[kWidth<A>];
  for (int64_t lane = 0; lane < count; ++lane) {
    lane_lse[lane] = lse[(tile.lanes.begin + lane) * problem.heads + head];
    lane_delta[lane] = delta[(tile.lanes.begin + lane) * problem.heads + head];
  }

  for (int64_t begin = 0; begin < tile.work(); begin += kStep) {
    const int64_t end = std::min(begin + kStep, tile.work());
    {
      const A* const rows =
          gather_rows<T, A>(gathered, problem.v, group, tile.streamed.begin + begin, end - begin, width);
      product(slopes, end - begin, rows, width, 1, grads, width, false);
    }
    const A* const rows =
        gather_rows<T, A>(gathered, problem.k, group, tile.streamed.begin + begin, end - begin, width);
    product(scores, end - begin, rows, width, 1, queries, width, false);
    const bool masked = !keys.all_see(begin, end);
    for (int64_t j = begin; j < end; ++j)
      for (int c = 0; c < kColumns; ++c) {
        const int64_t cell = (j - begin) * kWidth<A> + c * lanes<A>;
        const Vec<A> p = clamped_exp<A>(load(scores + cell) - load(lane_lse + c * lanes<A>));
        Vec<A> slope = p * (load(slopes + cell) - load(lane_delta + c * lanes<A>));
        if (masked) slope = keys.sees(j, c) ? slope : Vec<A>{};
        store(slopes + cell, slope);
      }
    product(sums, width, rows, 1, width, slopes, end - begin, true);
  }
  std::fill(factor, factor + kWidth<A>, static_cast<A>(problem.scale));
  transpose_out(grad_q, head, tile.lanes.begin, count, width, sums, factor);
}

// dk and dv of the keys in the lanes, summed over the query heads of their group.
template <class T, class A>
void key_grad(const Problem<T>& problem, const Heads<const T>& grad, const A* lse, const A* delta,
              const Heads<T>& grad_k, const Heads<T>& grad_v, int64_t group, const Tile& tile, Scratch<A> scratch) {
  const int64_t width = problem.width, count = tile.lanes.end - tile.lanes.begin;
  A* const keys = scratch.take(width * kWidth<A>);
  A* const values = scratch.take(width * kWidth<A>);
  A* const key_sums = scratch.take(width * kWidth<A>);
  A* const value_sums = scratch.take(width * kWidth<A>);
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const slopes = scratch.take(kStep * kWidth<A>);
  A* const gathered_q = scratch.take(kStep * width);
  A* const gathered_g = scratch.take(kStep * width);
  transpose_in<T, A>(keys, problem.k, group, tile.lanes.begin, count, width, static_cast<A>(problem.scale));
  transpose_in<T, A>(values, problem.v, group, tile.lanes.begin, count, width, A(1));
  std::fill(key_sums, key_sums + width * kWidth<A>, A(0));
  std::fill(value_sums, value_sums + width * kWidth<A>, A(0));
  Vec<A> number[kColumns];
  for (int c = 0; c < kColumns; ++c)
    for (int i = 0; i < lanes<A>; ++i) number[c][i] = static_cast<A>(c * lanes<A> + i);

  const int64_t shared = problem.heads / problem.groups;
  for (int64_t head = group * shared; head < (group + 1) * shared; ++head)
    for (int64_t begin = tile.streamed.begin, b = problem.visible.document_of(begin); begin < tile.streamed.end;
         begin += kStep) {
      const int64_t end = std::min(begin + kStep, tile.streamed.end);
      const A* const queries = gather_rows<T, A>(gathered_q, problem.q, head, begin, end - begin, width);
      const A* const grads = gather_rows<T, A>(gathered_g, grad, head, begin, end - begin, width);
      product(scores, end - begin, queries, width, 1, keys, width, false);
      product(slopes, end - begin, grads, width, 1, values, width, false);
      for (int64_t row = begin; row < end; ++row) {
        while (problem.visible.cu_q[b + 1] <= row) ++b;
        const Range seen = problem.visible.keys(row, b);
        const A first = static_cast<A>(seen.begin - tile.lanes.begin),
                last = static_cast<A>(seen.end - tile.lanes.begin);
        const A row_lse = lse[row * problem.heads + head], row_delta = delta[row * problem.heads + head];
        for (int c = 0; c < kColumns; ++c) {
          const int64_t cell = (row - begin) * kWidth<A> + c * lanes<A>;
          const Mask<A> sees = (first <= number[c]) & (number[c] < last);
          const Vec<A> p = sees ? clamped_exp<A>(load(scores + cell) - row_lse) : Vec<A>{};
          const Vec<A> slope = sees ? p * (load(slopes + cell) - row_delta) : Vec<A>{};
          store(scores + cell, p);
          store(slopes + cell, slope);
        }
      }
      product(key_sums, width, queries, 1, width, slopes, end - begin, true);
      product(value_sums, width, grads, 1, width, scores, end - begin, true);
    }
  A factor[kWidth<A>];
  std::fill(factor, factor + kWidth<A>, static_cast<A>(problem.scale));
  transpose_out(grad_k, group, tile.lanes.begin, count, width, key_sums, factor);
  std::fill(factor, factor + kWidth<A>, A(1));
  transpose_out(grad_v, group, tile.lanes.begin, count, width, value_sums, factor);
}

// --- entries ----------------------------------------------------------------------------------------------------------

// The offsets of an op, which its Visibility points into.
struct Offsets {
  Tensor q;
  std::optional<Tensor> k, used;
};

Visibility check_visibility(const Tensor& q, const Tensor& k, Offsets& offsets, std::optional<int64_t> window,
                            bool causal) {
  const int32_t* const cu_q = check_offsets(offsets.q, "cu_seqlens_q", q.size(0));
  const int64_t documents = offsets.q.size(0) - 1;
  const int32_t* cu_k = cu_q;
  if (offsets.k) {
    cu_k = check_offsets(*offsets.k, "cu_seqlens_k", k.size(0));
    check_size(*offsets.k, "cu_seqlens_k", 0, documents + 1);
  } else {
    check_size(k, "k", 0, q.size(0));
  }
  const int32_t* used = nullptr;
  if (offsets.used) {
    used = check_int32(*offsets.used, "seqused_k");
    check_size(*offsets.used, "seqused_k", 0, documents);
  }
  STD_TORCH_CHECK(!window || *window >= 1, "window: expected a value >= 1, got ", window.value_or(0));
  return {cu_q, cu_k, used, documents, window.value_or(0), causal};
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_dim(q, "q", 3);
  check_dim(k, "k", 3);
  check_dim(v, "v", 3);
  check_dtype(k, "k", q.scalar_type());
  check_dtype(v, "v", q.scalar_type());
  for (int dim = 0; dim < 3; ++dim) check_size(v, "v", dim, k.size(dim));
  check_size(k, "k", 2, q.size(2));
  STD_TORCH_CHECK(k.size(1) >= 1 && q.size(1) % k.size(1) == 0, "k: expected a number of heads that divides ",
                  q.size(1), ", got ", k.size(1));
}

template <class T>
Problem<T> problem_of(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                      Visibility visible) {
  return {heads_of<T>(q),
          heads_of<T>(k),
          heads_of<T>(v),
          q.size(1),
          k.size(1),
          q.size(2),
          scale.value_or(1 / std::sqrt(static_cast<double>(q.size(2)))),
          visible};
}

template <class T>
Heads<T> output_heads(Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1)};
}

// Rows beyond the last document, and everything where no tile writes.
template <class A>
void fill_rows(Tensor& x, int64_t begin, A value) {
  A* const data = x.mutable_data_ptr<A>();
  const int64_t row = x.size(0) ? x.numel() / x.size(0) : 0;
  std::fill(data + begin * row, data + x.numel(), value);
}

std::tuple<Tensor, Tensor> block_causal_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, const Tensor& cu_seqlens_q,
                                                          const std::optional<Tensor>& cu_seqlens_k,
                                                          std::optional<int64_t> window, bool causal,
                                                          std::optional<double> scale,
                                                          const std::optional<Tensor>& seqused_k) {
  check_heads(q, k, v);
  Offsets offsets = {cu_seqlens_q, cu_seqlens_k, seqused_k};
  const Visibility visible = check_visibility(q, k, offsets, window, causal);
  q = unit_stride(q), k = unit_stride(k), v = unit_stride(v);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, accumulator(q));
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(q, k, v, scale, visible);
    const Heads<T> rows = output_heads<T>(out);
    A* const lses = lse.mutable_data_ptr<A>();
    const int64_t width = problem.width;
    fill_rows(out, visible.cu_q[visible.documents], T(0));
    fill_rows(lse, visible.cu_q[visible.documents], -std::numeric_limits<A>::infinity());
    for_each_item<A>(q, problem.heads, query_tiles(visible, kWidth<A>),
                     2 * width * kWidth<A> + kStep * (kWidth<A> + width),
                     [&](int64_t head, const Tile& tile, Scratch<A> scratch) {
                       attend<T, A>(problem, rows, lses, head, tile, scratch);
                     });
  });
  return {out, lse};
}

// delta[i][head] = grad_i . out_i
template <class T, class A>
void dot_rows(const Heads<const T>& grad, const Heads<const T>& out, int64_t rows, int64_t heads, int64_t width,
              A* delta) {
  parallel_for(rows * heads, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const g = grad.row(i / heads, i % heads);
      const T* const o = out.row(i / heads, i % heads);
      A sum = 0;
      for (int64_t e = 0; e < width; ++e) sum += static_cast<A>(g[e]) * static_cast<A>(o[e]);
      delta[i] = sum;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> block_causal_attention_bwd_cpu(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                  Tensor out, Tensor lse, const Tensor& cu_seqlens_q,
                                                                  const std::optional<Tensor>& cu_seqlens_k,
                                                                  std::optional<int64_t> window, bool causal,
                                                                  std::optional<double> scale,
                                                                  const std::optional<Tensor>& seqused_k) {
  check_heads(q, k, v);
  Offsets offsets = {cu_seqlens_q, cu_seqlens_k, seqused_k};
  const Visibility visible = check_visibility(q, k, offsets, window, causal);
  for (const auto& [x, name] : {std::pair(&grad_out, "grad_out"), std::pair(&out, "out")}) {
    check_dim(*x, name, 3);
    check_dtype(*x, name, q.scalar_type());
    for (int dim = 0; dim < 3; ++dim) check_size(*x, name, dim, q.size(dim));
  }
  check_dim(lse, "lse", 2);
  check_dtype(lse, "lse", accumulator(q));
  for (int dim = 0; dim < 2; ++dim) check_size(lse, "lse", dim, q.size(dim));
  q = unit_stride(q), k = unit_stride(k), v = unit_stride(v);
  grad_out = unit_stride(grad_out), out = unit_stride(out), lse = torch::stable::contiguous(lse);
  Tensor grad_q = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor grad_v = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor delta = torch::stable::new_empty(q, {q.size(0), q.size(1)}, accumulator(q));
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(q, k, v, scale, visible);
    const Heads<const T> grads = heads_of<T>(grad_out);
    const Heads<T> grads_q = output_heads<T>(grad_q), grads_k = output_heads<T>(grad_k),
                   grads_v = output_heads<T>(grad_v);
    const A* const lses = lse.const_data_ptr<A>();
    A* const deltas = delta.mutable_data_ptr<A>();
    const int64_t width = problem.width, rows = visible.cu_q[visible.documents];
    fill_rows(grad_q, rows, T(0));
    dot_rows(grads, heads_of<T>(out), rows, problem.heads, width, deltas);
    const std::vector<Tile> tiles = query_tiles(visible, kWidth<A>);
    for_each_item<A>(q, problem.heads, tiles, 3 * width * kWidth<A> + kStep * (2 * kWidth<A> + width),
                     [&](int64_t head, const Tile& tile, Scratch<A> scratch) {
                       query_grad<T, A>(problem, grads, lses, deltas, grads_q, head, tile, scratch);
                     });
    for_each_item<A>(q, problem.groups, key_tiles(tiles, k.size(0), kWidth<A>),
                     4 * width * kWidth<A> + 2 * kStep * (kWidth<A> + width),
                     [&](int64_t group, const Tile& tile, Scratch<A> scratch) {
                       key_grad<T, A>(problem, grads, lses, deltas, grads_k, grads_v, group, tile, scratch);
                     });
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("block_causal_attention_fwd", TORCH_BOX(&block_causal_attention_fwd_cpu));
  m.impl("block_causal_attention_bwd", TORCH_BOX(&block_causal_attention_bwd_cpu));
}

}  // namespace blt
