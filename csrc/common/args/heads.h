// Describes tensors of heads, which are packed, [T, heads, E], or padded, [B, S, heads, E], with any strides.
#pragma once

#include "../check.h"

namespace blt {

inline int64_t num_rows(const Tensor& x) { return x.dim() == 3 ? x.size(0) : x.size(0) * x.size(1); }
inline int64_t num_heads(const Tensor& x) { return x.size(x.dim() - 2); }
inline int64_t head_width(const Tensor& x) { return x.size(x.dim() - 1); }

// Returns whether a padded tensor has its heads outside of the sequence in memory, as [B, H, S, E] has. Its gradient
// then is contiguous in this order, and else in the order of its dimensions.
inline bool heads_outside(const Tensor& x) { return x.dim() == 4 && x.stride(2) > x.stride(1); }

inline void check_head_dims(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 || x.dim() == 4, name, ": expected 3 or 4 dimensions, got ", x.dim());
}

// Checks that x has the shape and the dtype of `like`.
inline void check_heads_like(const Tensor& x, const char* name, const Tensor& like) {
  check_dim(x, name, like.dim());
  check_dtype(x, name, like.scalar_type());
  for (int dim = 0; dim < like.dim(); ++dim) check_size(x, name, dim, like.size(dim));
}

}  // namespace blt
