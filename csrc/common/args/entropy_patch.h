// Checks the arguments of the ops that build a PatchLayout, for the CPU and for CUDA.
#pragma once

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "../check.h"
#include "../dispatch.h"

namespace blt {

// Has patch_offsets, cu_patches, patch_ids, decode_ids, decode_offsets, overflowed, and cu_seqlens unless it was given.
using LayoutTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns one value per byte, contiguous.
inline Tensor check_values(const Tensor& values, const char* name) {
  check_dim(values, name, 1);
  return as_contiguous(values);
}

// Returns the capacity of a layout in patches.
inline int64_t check_capacity(std::optional<int64_t> max_patches, int64_t num_bytes) {
  const int64_t capacity = max_patches.value_or(num_bytes);
  STD_TORCH_CHECK(capacity >= 0 && capacity <= std::numeric_limits<int32_t>::max(),
                  "max_patches: expected a value from 0 to ", std::numeric_limits<int32_t>::max(), ", got ", capacity);
  return capacity;
}

inline void check_max_patch_length(std::optional<int64_t> length) {
  STD_TORCH_CHECK(!length || *length >= 1, "max_patch_length: expected at least 1, got ", length.value_or(0));
}

// Returns the dtype that entropies are compared in: fp32, or the model's, which is that of `values`.
inline ScalarType check_compare(const std::string& compare, const Tensor& values) {
  STD_TORCH_CHECK(compare == "fp32" || compare == "model", "compare: expected fp32 or model, got ", compare);
  return compare == "model" ? values.scalar_type() : ScalarType::Float;
}

// Rounds to R through its accumulator, as torch does.
template <class R>
accumulator_t<R> round_to(double x) {
  return static_cast<accumulator_t<R>>(static_cast<R>(static_cast<accumulator_t<R>>(x)));
}

inline void check_static_patch(int64_t num_bytes, int64_t size, int64_t first) {
  STD_TORCH_CHECK(num_bytes >= 0, "num_bytes: expected a value >= 0, got ", num_bytes);
  STD_TORCH_CHECK(size >= 1 && first >= 1, "size, first: expected values >= 1, got ", size, " and ", first);
}

inline void check_patch_size(int64_t patch_size) {
  STD_TORCH_CHECK(patch_size >= 1, "patch_size: expected a value >= 1, got ", patch_size);
}

}  // namespace blt
