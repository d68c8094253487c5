// Checks the arguments of patch_cross_attention, for the CPU and for CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "../check.h"

namespace blt {

inline void check_like(const Tensor& x, const char* name, const Tensor& like) {
  check_shape(x, name, {like.size(0), like.size(1), like.size(2)});
  check_dtype(x, name, like.scalar_type());
}

// q [queries, heads, E], k and v [keys, kv_heads, E] have unit stride in E. offsets [capacity + 1], cu_patches
// [documents + 1] and ids [num_bytes] are contiguous.
struct CrossArguments {
  Tensor q, k, v, offsets, cu_patches, ids;
  bool encode;
  int64_t queries_per_patch, window, capacity, documents, num_bytes;
  double scale;

  int64_t heads() const { return q.size(1); }
  int64_t kv_heads() const { return k.size(1); }
  int64_t width() const { return q.size(2); }
};

inline CrossArguments check_cross_attention(const Tensor& q, const Tensor& k, const Tensor& v, Tensor offsets,
                                            Tensor cu_patches, Tensor ids, const std::string& direction,
                                            int64_t queries_per_patch, std::optional<int64_t> window,
                                            std::optional<double> scale) {
  const bool encode = direction == "encode";
  STD_TORCH_CHECK(encode || direction == "decode", "direction: expected encode or decode, got ", direction);
  STD_TORCH_CHECK(queries_per_patch >= 1, "queries_per_patch: expected a value >= 1, got ", queries_per_patch);
  STD_TORCH_CHECK(!window || *window >= 1, "window: expected a value >= 1, got ", window.value_or(0));
  check_dim(q, "q", 3);
  check_dim(k, "k", 3);
  check_dtype(k, "k", q.scalar_type());
  check_like(v, "v", k);
  check_size(k, "k", 2, q.size(2));
  STD_TORCH_CHECK(k.size(1) >= 1 && q.size(1) % k.size(1) == 0, "k: expected a number of heads that divides the ",
                  q.size(1), " of q, got ", k.size(1));
  const int64_t capacity = check_num_segments(offsets, "offsets");
  const int64_t documents = check_num_segments(cu_patches, "cu_patches");
  const int64_t num_bytes = (encode ? k : q).size(0), vectors = (encode ? q : k).size(0);
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
          scale.value_or(1 / std::sqrt(static_cast<double>(q.size(2))))};
}

// grad_out and out get unit stride in E; lse [queries, heads] becomes contiguous.
inline void check_cross_grads(const CrossArguments& arguments, Tensor& grad_out, Tensor& out, Tensor& lse) {
  check_like(grad_out, "grad_out", arguments.q);
  check_like(out, "out", arguments.q);
  check_shape(lse, "lse", {arguments.q.size(0), arguments.q.size(1)});
  check_dtype(lse, "lse", accumulator(arguments.q));
  grad_out = with_unit_stride(grad_out), out = with_unit_stride(out), lse = as_contiguous(lse);
}

}  // namespace blt
