// Checks the arguments of ema_scan, for the CPU and for CUDA.
#pragma once

#include <limits>
#include <optional>

#include "../check.h"

namespace blt {

// x is [rows, width] with unit stride in a row, p [rows] is contiguous and of the dtype of the accumulator.
struct EmaArguments {
  Tensor x, p;
  int64_t rows, width;
};

inline EmaArguments check_ema(const Tensor& x, const Tensor& p) {
  const Tensor rows = unit_rows(x, "x");
  STD_TORCH_CHECK(rows.size(0) <= std::numeric_limits<int32_t>::max(), "x: ", rows.size(0),
                  " rows do not fit into int32");
  check_shape(p, "p", {rows.size(0)});
  check_dtype(p, "p", accumulator(rows));
  return {rows, as_contiguous(p), rows.size(0), rows.size(1)};
}

// Returns a tensor of the shape and dtype of x, with unit stride in a row.
inline Tensor check_like_x(const Tensor& rows, const char* name, const Tensor& x) {
  check_shape(rows, name, {x.size(0), x.size(1)});
  check_dtype(rows, name, x.scalar_type());
  return unit_rows(rows, name);
}

}  // namespace blt
