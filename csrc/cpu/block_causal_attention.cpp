// block_causal_attention: flash attention within documents packed end to end.
//
//   s_ij = scale q_i . k_j for the keys [first_i, last_i) that query i sees,  lse_i = log sum_j exp s_ij
//   out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
//   ds_ij = p_ij (g_i . v_j - g_i . out_i)
//   dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i
//
// Tiling. kWidth queries of one head lie across the vector lanes; keys and values are streamed past them as scalars, in
// steps of kStep keys. So the softmax is vertical: maxima and sums are lanes, and no scores are shuffled. Only steps that
// some query of the tile sees in part are masked. tiles.h has the tiles and shares them among the threads. Tiles
// of few queries, as in decoding with a cache, have the width across the lanes instead (decode.h), and in bf16
// the products run in AMX where the processor has it (amx_forward.h, amx_backward.h).
// The backward has keys across the lanes, and no atomics (backward.h).
// Flops: 4 E a (query, key) pair forward, 10 E backward.

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
#include "block_causal_attention/amx_backward.h"
#include "block_causal_attention/backward.h"
#include "block_causal_attention/decode.h"
#include "support/alloc.h"
#include "support/documents.h"
#include "support/parallel.h"

namespace blt {
namespace {

constexpr int64_t kRowGrain = 1024;  // rows of dot products a thread must have to be worth waking

template <class T>
Heads<const T> heads_of(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1)};
}

Tensor unit_stride(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x); }

// --- entries ----------------------------------------------------------------------------------------------------------

// The offsets of an op, which its Visibility points into. Without those of the queries there are `num_documents` of one
// length, of queries as of keys.
struct Offsets {
  std::optional<Tensor> q, k, used;
  int64_t num_documents;
};

Visibility check_visibility(const Tensor& like, int64_t queries, int64_t keys, Offsets& offsets,
                            std::optional<int64_t> window, bool causal) {
  if (!offsets.q) {
    STD_TORCH_CHECK(!offsets.k, "cu_seqlens_k: expected none without cu_seqlens_q");
    offsets.q = document_offsets({}, offsets.num_documents, like, queries);
    if (keys != queries) offsets.k = document_offsets({}, offsets.num_documents, like, keys);
  }
  const int32_t* const cu_q = check_offsets(*offsets.q, "cu_seqlens_q", queries);
  const int64_t documents = offsets.q->size(0) - 1;
  const int32_t* cu_k = cu_q;
  if (offsets.k) {
    cu_k = check_offsets(*offsets.k, "cu_seqlens_k", keys);
    check_size(*offsets.k, "cu_seqlens_k", 0, documents + 1);
  } else {
    STD_TORCH_CHECK(keys == queries, "k: expected the ", queries, " rows of q, got ", keys);
  }
  const int32_t* used = nullptr;
  if (offsets.used) {
    used = check_int32(*offsets.used, "seqused_k");
    check_size(*offsets.used, "seqused_k", 0, documents);
  }
  STD_TORCH_CHECK(!window || *window >= 1, "window: expected a value >= 1, got ", window.value_or(0));
  // Rows are int32, so that no window reaches further than this, and sums of it with a row do not overflow.
  constexpr int64_t kLongest = std::numeric_limits<int32_t>::max();
  return {cu_q, cu_k, used, documents, std::min(window.value_or(kLongest), kLongest), causal};
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

// `attend` for the runs of tiles that are wanted.
template <class T, class A, class Results, class Wanted>
void stream_keys(const Tensor& like, const Problem<T>& problem, const Results& results, const std::vector<Tile>& tiles,
                 Wanted wanted) {
  int64_t size = tile_scratch<A>(Results::kBlocks, problem.width);
  auto run = attend<Results, T, A>;
#if BLT_AMX
  if constexpr (std::is_same_v<T, BFloat16>)
    if (has_amx() && problem.width % kTileDepth == 0)
      run = attend_amx<Results>, size = amx_scratch(Results::kBlocks, kForwardGathered, problem.width);
#endif
  for_each_item<A>(like, problem.heads, runs_of(tiles, tiles_of_item<A>(Results::kBlocks, problem.width)), kWidth<A>,
                   size, [&](int64_t head, Run tiles, Scratch<A> scratch) {
                     if (wanted(head, tiles)) run(problem, results, head, tiles, scratch);
                   });
}

std::tuple<Tensor, Tensor> block_causal_attention_fwd_cpu(
    Tensor q, Tensor k, Tensor v, const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    std::optional<int64_t> window, bool causal, std::optional<double> scale, const std::optional<Tensor>& seqused_k,
    [[maybe_unused]] const std::optional<Tensor>& ranges, int64_t num_documents) {
  check_heads(q, k, v);
  Offsets offsets = {cu_seqlens_q, cu_seqlens_k, seqused_k, num_documents};
  const Visibility visible = check_visibility(q, q.size(0), k.size(0), offsets, window, causal);
  q = unit_stride(q), k = unit_stride(k), v = unit_stride(v);
  Tensor out = new_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = new_output(q, {q.size(0), q.size(1)}, accumulator(q));
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(q, k, v, scale, visible);
    const Heads<T> rows = output_heads<T>(out);
    A* const lses = lse.mutable_data_ptr<A>();
    const int64_t width = problem.width;
    fill_rows(out, visible.cu_q[visible.documents], T(0));
    fill_rows(lse, visible.cu_q[visible.documents], -std::numeric_limits<A>::infinity());
    const int64_t shared = problem.heads / problem.groups;
    std::vector<Tile> many = query_tiles(visible, kWidth<A>), few;
    int64_t most = 0;  // queries in a tile of few
    std::erase_if(many, [&](const Tile& tile) {
      const bool is_few = tile.lanes.size() <= kFew<A> && problem.heads * tile.lanes.size() <= kMaxRows;
      if (is_few) few.push_back(tile), most = std::max(most, tile.lanes.size());
      return is_few;
    });
    stream_keys<T, A>(q, problem, Output<T, A>{rows, lses}, many, [](int64_t, Run) { return true; });
    // Groups are split only as far as there are threads for them.
    const int64_t parts = std::min<int64_t>(problem.groups, torch::stable::get_num_threads());
    const int64_t groups = (problem.groups + parts - 1) / parts;  // of a part
    for_each_item<A>(q, parts, runs_of(few, 1), problem.heads / parts * kFewCost,
                     few_scratch<A>(groups, shared * most, width), [&](int64_t part, Run tiles, Scratch<A> scratch) {
                       const Range own = {problem.groups * part / parts, problem.groups * (part + 1) / parts};
                       attend_few<T, A>(problem, rows, lses, own, tiles[0], scratch);
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

std::tuple<Tensor, Tensor, Tensor> block_causal_attention_bwd_cpu(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, std::optional<int64_t> window, bool causal, std::optional<double> scale,
    const std::optional<Tensor>& seqused_k, [[maybe_unused]] const std::optional<Tensor>& ranges,
    int64_t num_documents) {
  check_heads(q, k, v);
  Offsets offsets = {cu_seqlens_q, cu_seqlens_k, seqused_k, num_documents};
  const Visibility visible = check_visibility(q, q.size(0), k.size(0), offsets, window, causal);
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
  Tensor grad_q = new_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = new_output(k, {k.size(0), k.size(1), k.size(2)});
  Tensor grad_v = new_output(k, {k.size(0), k.size(1), k.size(2)});
  Tensor delta = new_output(q, {q.size(0), q.size(1)}, accumulator(q));
  dispatch_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(q, k, v, scale, visible);
    const Heads<const T> grads = heads_of<T>(grad_out);
    const Heads<T> grads_q = output_heads<T>(grad_q), grads_k = output_heads<T>(grad_k),
                   grads_v = output_heads<T>(grad_v);
    A* const deltas = delta.mutable_data_ptr<A>();
    const A* const lses = lse.const_data_ptr<A>();
    const int64_t width = problem.width, heads = problem.heads, rows = visible.cu_q[visible.documents];
    fill_rows(grad_q, rows, T(0));
    dot_rows(grads, heads_of<T>(out), rows, problem.heads, width, deltas);
    const std::vector<Tile> queries = query_tiles(visible, kWidth<A>);
    Saved<T, A> saved = {grads, lses, deltas, nullptr, nullptr};
    Tensor softmax;
    if (std::any_of(lses, lses + rows * heads, is_large<T, A>)) {
      softmax = torch::stable::new_empty(q, {2, rows, heads}, accumulator(q));
      saved.top = softmax.mutable_data_ptr<A>(), saved.share = saved.top + rows * heads;
      stream_keys<T, A>(q, problem, saved, queries, [&](int64_t head, Run run) {
        for (int64_t i = run.front().lanes.begin; i < run.back().lanes.end; ++i)
          if (is_large<T>(lses[i * heads + head])) return true;
        return false;
      });
    }
    int64_t blocks = kBackwardBlocks, size = tile_scratch<A>(blocks, width), pitch = whole_vectors<A>(width);
    int64_t padding = 0;
    auto run = propagate<T, A>;
#if BLT_AMX
    if constexpr (std::is_same_v<T, BFloat16>)
      if (has_amx() && width % kTileDepth == 0) {
        run = propagate_amx, blocks = kAmxBackwardBlocks, padding = kAmxBackwardPadding;
        size = amx_scratch(blocks, kAmxBackwardGathered, width);
      }
#endif
    const std::vector<Tile> tiles = key_tiles(queries, k.size(0), kWidth<A>);
    const std::vector<Segment> segments =
        segments_of(tiles, problem.groups, tiles_of_item<A>(blocks, width), rows, padding);
    const int64_t shared = problem.heads / problem.groups;
    const int64_t all_rows = segments.empty() ? 0 : segments.back().before + segments.back().rows.size() + padding;
    Tensor memory = torch::stable::new_empty(q, {all_rows * problem.heads * pitch}, accumulator(q));
    std::vector<QuerySums<A>> sums;
    for (const Segment& segment : segments)
      sums.push_back({memory.mutable_data_ptr<A>() + segment.before * problem.heads * pitch, segment.rows.begin,
                      segment.rows.size() + padding, pitch});
    for_each_item<A>(q, problem.groups, segments, kWidth<A>, size,
                     [&](int64_t group, const Segment& segment, Scratch<A> scratch) {
                       const QuerySums<A>& own = sums[&segment - segments.data()];
                       std::fill_n(own.row(own.first, group * shared), shared * own.rows * pitch, A(0));
                       for (const Run& tiles : segment.runs)
                         run(problem, saved, grads_k, grads_v, own, group, tiles, scratch);
                     });
    parallel_for(rows, kRowGrain / problem.heads + 1, [&](int64_t begin, int64_t end) {
      add_sums<T, A>(grads_q, segments, sums, {begin, end}, problem.heads, width, static_cast<A>(problem.scale));
    });
  });
  return {grad_q, grad_k, grad_v};
}

// First and last row of the other side that each row sees, at `data`: none, but where documents set something else.
class Intervals {
 public:
  Intervals(int32_t* data, int64_t rows, int64_t others) : first_(data), last_(data + rows), others_(others) {
    std::fill_n(data, 2 * rows, static_cast<int32_t>(others));
  }

  void set(int64_t row, int64_t first, int64_t last) const {
    first = std::clamp<int64_t>(first, 0, others_);
    first_[row] = static_cast<int32_t>(first);
    last_[row] = static_cast<int32_t>(std::clamp(last, first, others_));
  }

 private:
  int32_t *first_, *last_;
  int64_t others_;
};

Tensor block_causal_attention_ranges_fwd_cpu(const Tensor& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                                             int64_t num_queries, int64_t num_keys, std::optional<int64_t> window,
                                             bool causal, const std::optional<Tensor>& seqused_k) {
  Offsets offsets = {cu_seqlens_q, cu_seqlens_k, seqused_k, 0};
  const Visibility visible = check_visibility(cu_seqlens_q, num_queries, num_keys, offsets, window, causal);
  const int64_t queries = (num_queries + 3) / 4 * 4, keys = (num_keys + 3) / 4 * 4;
  Tensor out = new_output(cu_seqlens_q, {2 * (queries + keys)}, ScalarType::Int);
  int32_t* const data = out.mutable_data_ptr<int32_t>();
  const Intervals of_queries(data, queries, num_keys), of_keys(data + 2 * queries, keys, num_queries);
  for (int64_t b = 0; b < visible.documents; ++b) {
    const int64_t begin = visible.cu_q[b], end = visible.cu_q[b + 1];
    for (int64_t row = begin; row < end; ++row) {
      const Range seen = visible.keys(row, b);
      of_queries.set(row, seen.begin, seen.end);
    }
    const int64_t last_key = visible.last_key(b);
    for (int64_t row = visible.cu_k[b]; row < visible.cu_k[b + 1]; ++row) {
      const int64_t aligned = row - last_key + end;  // the query at the key's own position
      const int64_t first = row < last_key ? std::max(begin, causal ? aligned : aligned - visible.window + 1) : end;
      of_keys.set(row, first, std::min(end, aligned + visible.window));
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("block_causal_attention_fwd", TORCH_BOX(&block_causal_attention_fwd_cpu));
  m.impl("block_causal_attention_bwd", TORCH_BOX(&block_causal_attention_bwd_cpu));
  m.impl("block_causal_attention_ranges_fwd", TORCH_BOX(&block_causal_attention_ranges_fwd_cpu));
}

}  // namespace blt
