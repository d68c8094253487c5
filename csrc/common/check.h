// Argument checks of the compiled ops. The public functions in blt_kernels/ops/ explain bad arguments to users; these
// guard memory, for callers of the raw torch.ops too.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace blt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dim(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(tensor.size(dim) == size, name, ": expected size ", size, " in dimension ", dim, ", got ",
                  tensor.size(dim));
}

// `x` itself where it is contiguous: torch's function takes 0.2 us to find that out.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Rows with unit stride in the last dimension; a copy only where there is none.
inline Tensor unit_rows(const Tensor& x, const char* name) {
  check_dim(x, name, 2);
  return x.stride(1) == 1 || x.size(1) == 1 ? x : as_contiguous(x);
}

// A vector of int32; `values` becomes contiguous.
inline const int32_t* check_int32(Tensor& values, const char* name) {
  check_dim(values, name, 1);
  check_dtype(values, name, ScalarType::Int);
  values = as_contiguous(values);
  return values.const_data_ptr<int32_t>();
}

// Offsets of segments: int32 [n+1], at least 0, never fall, end at most at `total`; from 0 on where `from_zero`.
inline const int32_t* check_segments(Tensor& offsets, const char* name, int64_t total, bool from_zero = false) {
  const int32_t* const values = check_int32(offsets, name);
  STD_TORCH_CHECK(offsets.size(0) >= 1, name, ": expected at least one entry");
  STD_TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(), name, ": ", total, " positions do not fit into int32");
  bool ordered = from_zero ? values[0] == 0 : values[0] >= 0;
  for (int64_t i = 1; i < offsets.size(0); ++i) ordered &= values[i - 1] <= values[i];
  STD_TORCH_CHECK(ordered && values[offsets.size(0) - 1] <= total, name, ": expected offsets that start at 0",
                  from_zero ? "" : " or later", ", never fall and end at most at ", total);
  return values;
}

// Offsets of documents or patches, whose first segment starts at 0.
inline const int32_t* check_offsets(Tensor& offsets, const char* name, int64_t total) {
  return check_segments(offsets, name, total, true);
}

// The length of each of `num_documents` documents of the same length that fill `total` positions.
inline int32_t check_even_documents(int64_t num_documents, int64_t total) {
  STD_TORCH_CHECK(
      num_documents >= 0 && total % std::max<int64_t>(num_documents, 1) == 0 && (num_documents > 0 || total == 0),
      "num_documents: expected a divisor of ", total, " positions, got ", num_documents);
  STD_TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(), "cu_seqlens: ", total,
                  " positions do not fit into int32");
  return static_cast<int32_t>(total / std::max<int64_t>(num_documents, 1));
}

// Ids of patches: int32 [n], each from -1, which is none, to `count` - 1.
inline const int32_t* check_ids(Tensor& ids, const char* name, int64_t count) {
  const int32_t* const values = check_int32(ids, name);
  int32_t low = -1, high = -1;
  for (int64_t i = 0; i < ids.size(0); ++i) low = std::min(low, values[i]), high = std::max(high, values[i]);
  STD_TORCH_CHECK(low >= -1 && high < count, name, ": expected ids from -1 to ", count - 1, ", got ",
                  low < -1 ? low : high);
  return values;
}

// The dtype to accumulate in, and to return statistics in: fp64 for fp64, else fp32.
inline ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace blt
