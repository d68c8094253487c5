// Checks the arguments of patch_cross_attention, for the CPU and for CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "heads.h"

namespace blt {

// q [queries, heads, E], k and v [keys, kv_heads, E] have unit stride in E, and may be padded. offsets [capacity + 1],
// cu_patches [documents + 1] and ids [num_bytes] are contiguous.
struct CrossArguments {
  Tensor q, k, v, offsets, cu_patches, ids;
  bool encode;
  int64_t queries_per_patch, window, capacity, documents, num_bytes;
  double scale;

  int64_t heads() const { return num_heads(q); }
  int64_t kv_heads() const { return num_heads(k); }
  int64_t width() const { return head_width(q); }
};

inline CrossArguments check_cross_attention(const Tensor& q, const Tensor& k, const Tensor& v, Tensor offsets,
                                            Tensor cu_patches, Tensor ids, const std::string& direction,
                                            int64_t queries_per_patch, std::optional<int64_t> window,
                                            std::optional<double> scale) {
  const bool encode = direction == "encode";
  STD_TORCH_CHECK(encode || direction == "decode", "direction: expected encode or decode, got ", direction);
  STD_TORCH_CHECK(queries_per_patch >= 1, "queries_per_patch: expected a value >= 1, got ", queries_per_patch);
  STD_TORCH_CHECK(!window || *window >= 1, "window: expected a value >= 1, got ", window.value_or(0));
  check_head_dims(q, "q");
  check_head_dims(k, "k");
  check_dtype(k, "k", q.scalar_type());
  check_heads_like(v, "v", k);
  check_size(k, "k", static_cast<int>(k.dim()) - 1, head_width(q));
  STD_TORCH_CHECK(num_heads(k) >= 1 && num_heads(q) % num_heads(k) == 0,
                  "k: expected a number of heads that divides the ", num_heads(q), " of q, got ", num_heads(k));
  const int64_t capacity = check_num_segments(offsets, "offsets");
  const int64_t documents = check_num_segments(cu_patches, "cu_patches");
  const int64_t num_bytes = num_rows(encode ? k : q), vectors = num_rows(encode ? q : k);
  check_int32(ids, "ids");
  check_size(ids, "ids", 0, num_bytes);
  STD_TORCH_CHECK(capacity == 0 ? vectors == 0 : vectors % capacity == 0 && vectors / capacity == queries_per_patch,
                  encode ? "q" : "k", ": expected ", capacity, " * ", queries_per_patch, " rows, got ", vectors);
  STD_TORCH_CHECK(std::max(num_bytes, vectors) < std::numeric_limits<int32_t>::max(),
                  "q, k: expected fewer than 2^31 - 1 rows");
  return {with_unit_stride(q),
          with_unit_stride(k),
          with_unit_stride(v),
          offsets,
          cu_patches,
          ids,
          encode,
          queries_per_patch,
          std::clamp<int64_t>(window.value_or(1), 1, std::max<int64_t>(1, capacity)),
          capacity,
          documents,
          num_bytes,
          scale.value_or(1 / std::sqrt(static_cast<double>(head_width(q))))};
}

// grad_out and out get unit stride in E; lse, which has no E, becomes contiguous.
inline void check_cross_grads(const CrossArguments& arguments, Tensor& grad_out, Tensor& out, Tensor& lse) {
  check_heads_like(grad_out, "grad_out", arguments.q);
  check_heads_like(out, "out", arguments.q);
  check_dim(lse, "lse", arguments.q.dim() - 1);
  for (int dim = 0; dim < lse.dim(); ++dim) check_size(lse, "lse", dim, arguments.q.size(dim));
  check_dtype(lse, "lse", accumulator(arguments.q));
  grad_out = with_unit_stride(grad_out), out = with_unit_stride(out), lse = as_contiguous(lse);
}

}  // namespace blt
