// Checks the arguments of the compiled ops. The public functions in blt_kernels/ops/ explain bad arguments to users;
// these checks keep direct calls of torch.ops from accessing memory out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
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

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  check_dim(tensor, name, static_cast<int64_t>(sizes.size()));
  int64_t dim = 0;
  for (const int64_t size : sizes) check_size(tensor, name, dim++, size);
}

// Returns x itself if it is contiguous: torch's function takes 0.2 us to find that out.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Returns x, or a contiguous copy if its last dimension has another stride than 1.
inline Tensor with_unit_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) == 1 ? x : as_contiguous(x);
}

inline Tensor unit_rows(const Tensor& x, const char* name) {
  check_dim(x, name, 2);
  return with_unit_stride(x);
}

// Checks an int32 vector, makes it contiguous and returns its elements.
inline const int32_t* check_int32(Tensor& values, const char* name) {
  check_dim(values, name, 1);
  check_dtype(values, name, ScalarType::Int);
  values = as_contiguous(values);
  return values.const_data_ptr<int32_t>();
}

// Returns the number of segments between `offsets`, and makes the offsets contiguous.
inline int64_t check_num_segments(Tensor& offsets, const char* name) {
  check_int32(offsets, name);
  STD_TORCH_CHECK(offsets.size(0) >= 1, name, ": expected at least one entry");
  return offsets.size(0) - 1;
}

// Returns the length of each of `num_documents` documents of the same length that fill `total` positions.
inline int32_t check_even_documents(int64_t num_documents, int64_t total) {
  const int64_t divisor = std::max<int64_t>(num_documents, 1);
  STD_TORCH_CHECK(num_documents >= 0 && total % divisor == 0 && (num_documents > 0 || total == 0),
                  "num_documents: expected a divisor of ", total, " positions, got ", num_documents);
  STD_TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(), "cu_seqlens: ", total,
                  " positions do not fit into int32");
  return static_cast<int32_t>(total / divisor);
}

// Returns the dtype of sums and of statistics: fp64 for fp64, else fp32.
inline ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace blt
