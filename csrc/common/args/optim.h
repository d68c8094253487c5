// Checks the arguments of the sparse optimizer steps, for the CPU and for CUDA.
#pragma once

#include "../check.h"

namespace blt {

// Row rows[i] of table [size, width] has the gradient values[i]. rows is int64 [n], values [n, width] with unit stride.
struct StepArguments {
  Tensor table, rows, values;
};

inline StepArguments check_step(const Tensor& table, const Tensor& rows, const Tensor& values) {
  check_dim(table, "table", 2);
  STD_TORCH_CHECK(table.stride(1) == 1 || table.size(1) == 1, "table: expected unit stride in a row, got ",
                  table.stride(1));
  check_dim(rows, "rows", 1);
  check_dtype(rows, "rows", ScalarType::Long);
  check_dtype(values, "values", table.scalar_type());
  const StepArguments step = {table, as_contiguous(rows), unit_rows(values, "values")};
  check_shape(step.values, "values", {rows.size(0), table.size(1)});
  return step;
}

// sums is [size]: Adagrad's sum of squares of each row of the table.
inline void check_sums(const Tensor& sums, const Tensor& table) {
  check_shape(sums, "sums", {table.size(0)});
  check_dtype(sums, "sums", accumulator(table));
}

}  // namespace blt
