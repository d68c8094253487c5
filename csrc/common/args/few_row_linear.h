// Checks the arguments of few_row_linear and few_row_layer.
#pragma once

#include <optional>

#include "../check.h"

namespace blt {

inline Tensor check_fp32_rows(const Tensor& x, const char* name, int64_t width) {
  check_dtype(x, name, ScalarType::Float);
  Tensor rows = unit_rows(x, name);
  check_size(rows, name, 1, width);
  return rows;
}

// Checks weight [N, K]: fp32, bf16, or int8 with scale [N], an fp32 factor for each row. Both get unit strides.
inline void check_weight(Tensor& weight, std::optional<Tensor>& scale, const char* name, int64_t width) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Char, name,
                  ": expected dtype float32, bfloat16 or int8, got ", torch::headeronly::toString(dtype));
  weight = unit_rows(weight, name);
  check_size(weight, name, 1, width);
  STD_TORCH_CHECK(scale.has_value() == (dtype == ScalarType::Char),
                  "scale: expected one for int8 weights, and no other");
  if (!scale) return;
  check_dtype(*scale, "scale", ScalarType::Float);
  check_shape(*scale, "scale", {weight.size(0)});
  *scale = as_contiguous(*scale);
}

// Checks the fp32 weight [width] of a norm and gives it unit stride.
inline void check_norm(Tensor& norm, const char* name, int64_t width) {
  check_dtype(norm, name, ScalarType::Float);
  check_shape(norm, name, {width});
  norm = as_contiguous(norm);
}

}  // namespace blt
