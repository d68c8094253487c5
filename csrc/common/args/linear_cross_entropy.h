// Checks the arguments of linear_cross_entropy, for the CPU and for CUDA.
#pragma once

#include <optional>

#include "token_entropy.h"

namespace blt {

// Returns the targets of the rows of an output head as contiguous int64. Their values are not read.
inline Tensor check_targets(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                            const std::optional<Tensor>& bias) {
  check_head(hidden, weight, bias);
  check_shape(targets, "targets", {hidden.size(0)});
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Int || targets.scalar_type() == ScalarType::Long,
                  "targets: expected dtype int32 or int64, got ", torch::headeronly::toString(targets.scalar_type()));
  return as_contiguous(targets.scalar_type() == ScalarType::Long ? targets
                                                                 : torch::stable::to(targets, ScalarType::Long));
}

}  // namespace blt
