// Computes block_causal_attention: flash attention within documents packed end to end.
//
//   s_ij = scale q_i . k_j for the keys [first_i, last_i) that query i attends to,  lse_i = log sum_j exp s_ij
//   out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
//   ds_ij = p_ij (g_i . v_j - g_i . out_i)
//   dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i
//
// Tiling. kWidth queries of one head lie across the vector lanes; keys and values are streamed past them as scalars, in
// steps of kStep keys. So the softmax is vertical: maxima and sums are lanes, and no scores are shuffled. Only steps
// with masked keys pay for masks. tiles.h makes the tiles and divides them among the threads. Tiles of few queries, as
// in decoding with a cache, have E across the lanes instead (decode.h), and short documents have documents and heads
// there (short.h). In bf16 the products run in AMX where the processor has it (amx_forward.h, amx_backward.h). The
// backward pass has keys across the lanes, and no atomics (backward.h). Flops: 4 E for each (query, key) pair forward,
// 10 E backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/box.h"
#include "../common/check.h"
#include "../common/dispatch.h"
#include "block_causal_attention.h"
#include "block_causal_attention/amx.h"
#include "block_causal_attention/backward.h"
#include "block_causal_attention/decode.h"
#include "block_causal_attention/forward.h"
#include "block_causal_attention/items.h"
#include "block_causal_attention/short.h"
#include "support/alloc.h"
#include "support/check_values.h"
#include "support/documents.h"
#include "support/heads.h"
#include "support/parallel.h"

namespace blt {
namespace {

constexpr int64_t kRowGrain = 1024;  // so many dot products are worth a thread

template <class Void>
HeadsOf<Void> heads_at(Void* data, const Tensor& x, ScalarType dtype) {
  if (x.dim() == 3) return {data, dtype, x.stride(0), x.stride(1)};
  const int64_t length = std::max<int64_t>(x.size(1), 1);
  const int64_t jump = x.size(0) > 1 ? x.stride(0) - x.size(1) * x.stride(1) : 0;
  return {data, dtype, x.stride(1), x.stride(2), length, jump};
}

Heads heads_of(const Tensor& x, ScalarType dtype) { return heads_at(x.const_data_ptr(), x, dtype); }

OutputHeads output_heads(Tensor& x, ScalarType dtype) { return heads_at(x.mutable_data_ptr(), x, dtype); }

// --- checks ----------------------------------------------------------------------------------------------------------

// Has the offsets of an op, which its KeyRanges points into. Without cu_seqlens_q there are `num_documents` documents
// of the same length, and of the same number of keys.
struct Offsets {
  std::optional<Tensor> q, k, seqused_k;
  int64_t num_documents;
};

KeyRanges check_ranges(const Tensor& like, int64_t queries, int64_t keys, Offsets& offsets,
                       std::optional<int64_t> window, bool causal) {
  if (!offsets.q) {
    STD_TORCH_CHECK(!offsets.k, "cu_seqlens_k: expected none without cu_seqlens_q");
    offsets.q = document_offsets({}, offsets.num_documents, like, queries);
    if (keys != queries) offsets.k = document_offsets({}, offsets.num_documents, like, keys);
  }
  const int32_t* const cu_seqlens_q = check_offsets(*offsets.q, "cu_seqlens_q", queries);
  const int64_t documents = offsets.q->size(0) - 1;
  const int32_t* cu_seqlens_k = cu_seqlens_q;
  if (offsets.k) {
    cu_seqlens_k = check_offsets(*offsets.k, "cu_seqlens_k", keys);
    check_size(*offsets.k, "cu_seqlens_k", 0, documents + 1);
  } else {
    STD_TORCH_CHECK(keys == queries, "k: expected the ", queries, " rows of q, got ", keys);
  }
  const int32_t* seqused_k = nullptr;
  if (offsets.seqused_k) {
    seqused_k = check_int32(*offsets.seqused_k, "seqused_k");
    check_size(*offsets.seqused_k, "seqused_k", 0, documents);
  }
  STD_TORCH_CHECK(!window || *window >= 1, "window: expected a value >= 1, got ", window.value_or(0));
  // Positions are int32, so no window reaches further than this, and its sums with positions do not overflow.
  constexpr int64_t kMaxWindow = std::numeric_limits<int32_t>::max();
  return {cu_seqlens_q, cu_seqlens_k, seqused_k, documents, std::min(window.value_or(kMaxWindow), kMaxWindow), causal};
}

// Returns the dtype of all three, which torch takes 20 ns to find out.
ScalarType check_heads(const Tensor& q, const Tensor& k, const Tensor& v, const Offsets& offsets) {
  const ScalarType dtype = q.scalar_type();
  check_head_dims(q, "q");
  check_dim(k, "k", q.dim());
  const int64_t dims = q.dim(), heads = num_heads(q), kv_heads = num_heads(k);
  check_dtype(k, "k", dtype);
  check_heads_like(v, "v", k);
  check_size(k, "k", static_cast<int>(dims) - 1, head_width(q));
  STD_TORCH_CHECK(kv_heads >= 1 && heads % kv_heads == 0, "k: expected a number of heads that divides ", heads,
                  ", got ", kv_heads);
  if (dims == 4) {
    STD_TORCH_CHECK(!offsets.q, "cu_seqlens_q: expected none, since q has 4 dimensions");
    STD_TORCH_CHECK(offsets.num_documents == q.size(0), "num_documents: expected the ", q.size(0), " of q, got ",
                    offsets.num_documents);
    check_size(k, "k", 0, q.size(0));
  }
  return dtype;
}

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, ScalarType dtype, std::optional<double> scale,
                   const KeyRanges& ranges) {
  const int64_t head_dim = head_width(q);
  return {heads_of(q, dtype),
          heads_of(k, dtype),
          heads_of(v, dtype),
          num_heads(q),
          num_heads(k),
          head_dim,
          scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))),
          ranges};
}

// --- forward ---------------------------------------------------------------------------------------------------------

// Zeroes the rows from `begin` on, which are those beyond the last document. With 4 dimensions there are none.
void zero_rows(Tensor& x, int64_t begin) {
  const int64_t rows = num_rows(x), row = rows ? x.numel() / rows * static_cast<int64_t>(x.element_size()) : 0;
  if (begin < rows) std::memset(static_cast<char*>(x.mutable_data_ptr()) + begin * row, 0, (rows - begin) * row);
}

#if BLT_AMX
bool use_amx(const Problem& problem) {
  return problem.q.dtype == ScalarType::BFloat16 && problem.head_dim % kTileDepth == 0 && has_amx();
}
#endif

// Calls `attend` for the runs of tiles that `wanted` accepts.
template <class A, class Results, class Wanted>
void attend_tiles(const Tensor& like, const Problem& problem, const Results& results, const std::vector<Tile>& tiles,
                  Wanted wanted) {
  int64_t size = tile_scratch<A>(Results::kBlocks, problem.head_dim);
  auto run = attend<Results, A>;
#if BLT_AMX
  if constexpr (std::is_same_v<A, float>)
    if (use_amx(problem))
      run = attend_amx<Results>, size = amx_scratch(Results::kBlocks, kForwardGathered, problem.head_dim);
#endif
  const std::vector<Run> runs = runs_of(tiles, tiles_of_item<A>(Results::kBlocks, problem.head_dim));
  for_each_item<A>(like, problem.num_heads, runs, kWidth<A>, size, [&](int64_t head, Run tiles, Scratch<A> scratch) {
    if (wanted(head, tiles)) run(problem, results, head, tiles, scratch);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> block_causal_attention_fwd_cpu(
    Tensor q, Tensor k, Tensor v, const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    std::optional<int64_t> window, bool causal, std::optional<double> scale, const std::optional<Tensor>& seqused_k,
    [[maybe_unused]] const std::optional<Tensor>& ranges, int64_t num_documents) {
  Offsets offsets = {cu_seqlens_q, cu_seqlens_k, seqused_k, num_documents};
  const ScalarType dtype = check_heads(q, k, v, offsets);
  const KeyRanges key_ranges = check_ranges(q, num_rows(q), num_rows(k), offsets, window, causal);
  q = with_unit_stride(q), k = with_unit_stride(k), v = with_unit_stride(v);
  Tensor out = new_like(q);
  Tensor lse = new_like(q, 1, accumulator(q));
  const Problem problem = problem_of(q, k, v, dtype, scale, key_ranges);
  const int64_t queries = key_ranges.cu_seqlens_q[key_ranges.documents];
  zero_rows(out, queries);
  dispatch_accumulator(dtype, "q", [&]<class A>(Tag<A>) {
    A* const lses = lse.mutable_data_ptr<A>();
    std::fill(lses + queries * problem.num_heads, lses + lse.numel(), kMaskedScore<A>);
    const ShortDocuments documents(key_ranges);
    std::vector<Tile> tiles, few;
    for (const Range& run : documents.others())
      for (const Tile& tile : query_tiles(key_ranges, run, kWidth<A>, kMaxDecodeQueries))
        (tile.few ? few : tiles).push_back(tile);
    const Output<A> results = {output_heads(out, dtype), lses};
    attend_tiles<A>(q, problem, results, tiles, [](int64_t, Run) { return true; });
    decode<A>(q, problem, results.out, results.lse, few);
    attend_short<A>(q, problem, results.out, results.lse, documents);
  });
  return {out, lse};
}

namespace {

// --- backward --------------------------------------------------------------------------------------------------------

// Sums the softmax of the queries with a large lse anew, and returns the memory of max and inverse_sum.
template <class A>
std::optional<Tensor> sum_softmax(const Tensor& like, const Problem& problem, RowSoftmax<A>& saved,
                                  const std::vector<Tile>& tiles, int64_t queries) {
  const int64_t heads = problem.num_heads;
  if (std::none_of(saved.lse, saved.lse + queries * heads, [&](A lse) { return saved.is_large(lse); })) return {};
  Tensor memory = new_output(like, {2, queries, heads}, accumulator(like));
  saved.max = memory.mutable_data_ptr<A>(), saved.inverse_sum = saved.max + queries * heads;
  attend_tiles<A>(like, problem, saved, tiles, [&](int64_t head, Run run) {
    for (int64_t i = run.front().lanes.begin; i < run.back().lanes.end; ++i)
      if (saved.is_large(saved.lse[i * heads + head])) return true;
    return false;
  });
  return memory;
}

// Computes the gradients of runs of documents that are not short.
template <class A>
void propagate_tiles(const Tensor& like, const Problem& problem, RowSoftmax<A> saved, const Heads& out,
                     const Gradients& grads, const std::vector<Range>& runs) {
  if (runs.empty()) return;
  const KeyRanges& ranges = problem.ranges;
  const int64_t heads = problem.num_heads, kv_heads = problem.num_kv_heads, head_dim = problem.head_dim;
  const int64_t num_queries = ranges.cu_seqlens_q[ranges.documents];
  int64_t blocks = kBackwardBlocks, size = tile_scratch<A>(blocks, head_dim), padding = 0;
  auto run = propagate<A>;
#if BLT_AMX
  if constexpr (std::is_same_v<A, float>)
    if (use_amx(problem)) {
      run = propagate_amx, blocks = kAmxBackwardBlocks, padding = kAmxBackwardPadding;
      size = amx_scratch(blocks, kAmxBackwardGathered, head_dim);
    }
#endif
  std::vector<Tile> all_queries, tiles;
  for (const Range& documents : runs) {
    const Range own = {ranges.cu_seqlens_q[documents.begin], ranges.cu_seqlens_q[documents.end]};
    parallel_for(own.size() * heads, kRowGrain, [&](int64_t begin, int64_t end) {
      dot_rows<A>(saved.delta, grads.out, out, own.begin * heads + begin, own.begin * heads + end, heads, head_dim);
    });
    const std::vector<Tile> queries = query_tiles(ranges, documents, kWidth<A>, 0);
    const Range keys = {ranges.cu_seqlens_k[documents.begin], ranges.cu_seqlens_k[documents.end]};
    const std::vector<Tile> of_keys = key_tiles(queries, keys, kWidth<A>);
    all_queries.insert(all_queries.end(), queries.begin(), queries.end());
    tiles.insert(tiles.end(), of_keys.begin(), of_keys.end());
  }
  const std::optional<Tensor> softmax = sum_softmax(like, problem, saved, all_queries, num_queries);
  const std::vector<Segment> segments =
      segments_of(tiles, kv_heads, tiles_of_item<A>(blocks, head_dim), num_queries, padding);
  const int64_t pitch = whole_vectors<A>(head_dim), shared = problem.heads_per_kv_head();
  const int64_t rows = segments.empty() ? 0 : segments.back().before + segments.back().queries.size() + padding;
  Tensor memory = new_output(like, {rows * heads * pitch}, accumulator(like));
  std::vector<QuerySums<A>> sums;
  for (const Segment& segment : segments)
    sums.push_back({memory.mutable_data_ptr<A>() + segment.before * heads * pitch, segment.queries.begin,
                    segment.queries.size() + padding, pitch});
  for_each_item<A>(like, kv_heads, segments, kWidth<A>, size,
                   [&](int64_t kv_head, const Segment& segment, Scratch<A> scratch) {
                     const QuerySums<A>& own = sums[&segment - segments.data()];
                     std::fill_n(own.row(own.first, kv_head * shared), shared * own.rows * pitch, A(0));
                     for (const Run& tiles : segment.runs)
                       run(problem, saved, grads.k, grads.v, own, kv_head, tiles, scratch);
                   });
  for (const Range& documents : runs) {
    const Range own = {ranges.cu_seqlens_q[documents.begin], ranges.cu_seqlens_q[documents.end]};
    parallel_for(own.size(), kRowGrain / heads + 1, [&](int64_t begin, int64_t end) {
      add_sums<A>(grads.q, segments, sums, {own.begin + begin, own.begin + end}, heads, head_dim,
                  static_cast<A>(problem.scale));
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> block_causal_attention_bwd_cpu(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, std::optional<int64_t> window, bool causal, std::optional<double> scale,
    const std::optional<Tensor>& seqused_k, [[maybe_unused]] const std::optional<Tensor>& ranges,
    int64_t num_documents) {
  Offsets offsets = {cu_seqlens_q, cu_seqlens_k, seqused_k, num_documents};
  const ScalarType dtype = check_heads(q, k, v, offsets);
  const KeyRanges key_ranges = check_ranges(q, num_rows(q), num_rows(k), offsets, window, causal);
  check_heads_like(grad_out, "grad_out", q);
  check_heads_like(out, "out", q);
  check_dim(lse, "lse", q.dim() - 1);
  check_dtype(lse, "lse", accumulator(q));
  for (int dim = 0; dim < lse.dim(); ++dim) check_size(lse, "lse", dim, q.size(dim));
  q = with_unit_stride(q), k = with_unit_stride(k), v = with_unit_stride(v);
  grad_out = with_unit_stride(grad_out), out = with_unit_stride(out), lse = as_contiguous(lse);
  Tensor grad_q = new_gradient(q), grad_k = new_gradient(k), grad_v = new_gradient(v);
  Tensor delta = new_output(q, {num_rows(q) * num_heads(q)}, accumulator(q));
  const Problem problem = problem_of(q, k, v, dtype, scale, key_ranges);
  zero_rows(grad_q, key_ranges.cu_seqlens_q[key_ranges.documents]);
  zero_rows(grad_k, key_ranges.cu_seqlens_k[key_ranges.documents]);
  zero_rows(grad_v, key_ranges.cu_seqlens_k[key_ranges.documents]);
  dispatch_accumulator(dtype, "q", [&]<class A>(Tag<A>) {
    const Gradients grads = {heads_of(grad_out, dtype), output_heads(grad_q, dtype), output_heads(grad_k, dtype),
                             output_heads(grad_v, dtype)};
    const RowSoftmax<A> saved = {grads.out, lse.const_data_ptr<A>(), delta.mutable_data_ptr<A>(), nullptr,
                                 nullptr,   large_lse<A>(dtype)};
    const ShortDocuments documents(key_ranges);
    propagate_tiles<A>(q, problem, saved, heads_of(out, dtype), grads, documents.others());
    propagate_short<A>(q, problem, grads, documents);
  });
  return {grad_q, grad_k, grad_v};
}

// --- ranges ----------------------------------------------------------------------------------------------------------

// Writes the first and last row of the other side that each row attends to, at `data`: an empty range until set.
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
  const KeyRanges key_ranges = check_ranges(cu_seqlens_q, num_queries, num_keys, offsets, window, causal);
  const int64_t queries = (num_queries + 3) / 4 * 4, keys = (num_keys + 3) / 4 * 4;
  Tensor out = new_output(cu_seqlens_q, {2 * (queries + keys)}, ScalarType::Int);
  int32_t* const data = out.mutable_data_ptr<int32_t>();
  const Intervals of_queries(data, queries, num_keys), of_keys(data + 2 * queries, keys, num_queries);
  for (int64_t b = 0; b < key_ranges.documents; ++b) {
    const int64_t begin = key_ranges.cu_seqlens_q[b], end = key_ranges.cu_seqlens_q[b + 1];
    for (int64_t row = begin; row < end; ++row) {
      const Range attended = key_ranges.keys(row, b);
      of_queries.set(row, attended.begin, attended.end);
    }
    const int64_t keys_end = key_ranges.keys_end(b);
    for (int64_t row = key_ranges.cu_seqlens_k[b]; row < key_ranges.cu_seqlens_k[b + 1]; ++row) {
      const int64_t aligned = row - keys_end + end;  // is the query at the key's own position
      const int64_t first = row < keys_end ? std::max(begin, causal ? aligned : aligned - key_ranges.window + 1) : end;
      of_keys.set(row, first, std::min(end, aligned + key_ranges.window));
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("block_causal_attention_fwd", BLT_KERNELS_BOX(&block_causal_attention_fwd_cpu));
  m.impl("block_causal_attention_bwd", BLT_KERNELS_BOX(&block_causal_attention_bwd_cpu));
  m.impl("block_causal_attention_ranges_fwd", BLT_KERNELS_BOX(&block_causal_attention_ranges_fwd_cpu));
}

}  // namespace blt
