// Checks the arguments of boundary_patch, for the CPU and for CUDA.
#pragma once

#include <string>

#include "entropy_patch.h"

namespace blt {

struct BoundaryArguments {
  Tensor marks;  // [bytes], contiguous: bool, or scores of any floating dtype
  std::optional<Tensor> thresholds;
  bool at_start;
  int64_t first;  // is 0 if the marks decide about the first patch, too
};

inline BoundaryArguments check_boundary_patch(const Tensor& marks, int64_t num_documents,
                                              std::optional<double> threshold, const std::optional<Tensor>& thresholds,
                                              const std::string& at, std::optional<int64_t> first) {
  STD_TORCH_CHECK(at == "end" || at == "start", "at: expected end or start, got ", at);
  STD_TORCH_CHECK(!first || *first >= 1, "first: expected a value >= 1, got ", first.value_or(0));
  const int given = threshold.has_value() + thresholds.has_value(), expected = marks.scalar_type() != ScalarType::Bool;
  STD_TORCH_CHECK(given == expected, "threshold: expected ", expected,
                  " of threshold and thresholds for these marks, got ", given);
  BoundaryArguments arguments = {check_values(marks, "marks"), thresholds, at == "start", first.value_or(0)};
  if (thresholds) {
    check_shape(*thresholds, "thresholds", {num_documents});
    check_dtype(*thresholds, "thresholds", ScalarType::Float);
    arguments.thresholds = as_contiguous(*thresholds);
  }
  return arguments;
}

}  // namespace blt
