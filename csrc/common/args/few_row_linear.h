// Checks the arguments of few_row_linear.
#pragma once

#include "../check.h"

namespace blt {

// x [M, K] and weight [N, K] are fp32, with unit stride in a row.
struct LinearArguments {
  Tensor x, weight;
};

inline LinearArguments check_few_row_linear(const Tensor& x, const Tensor& weight) {
  check_dtype(x, "x", ScalarType::Float);
  check_dtype(weight, "weight", ScalarType::Float);
  const LinearArguments arguments = {unit_rows(x, "x"), unit_rows(weight, "weight")};
  check_size(weight, "weight", 1, x.size(1));
  return arguments;
}

}  // namespace blt
