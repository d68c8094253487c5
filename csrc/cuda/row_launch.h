// Configures launches of the kernels that stream rows (patch_rows.cuh), and checks their tensors of rows.
#pragma once

#include <limits>

#include "../launch/launch.h"
#include "patch_rows.cuh"

namespace blt {

struct RowLaunch {
  LaunchConfig config;
  RowTile tile;
};

// Returns a launch with one thread per group of rows and `vec` columns.
inline RowLaunch row_launch(int64_t groups, int64_t width, int vec) {
  const int64_t vecs = ceil_div<int64_t>(width, vec), panels = ceil_div<int64_t>(vecs, kRowThreads);
  const int own = static_cast<int>(ceil_div(vecs, panels)), rows = kRowThreads / own;
  return {{.grid = {ceil_div<int64_t>(groups, rows), panels}, .block = rows * own},
          {rows, own, (65535u / static_cast<u32>(own)) + 1}};
}

// Returns the row stride in elements, or 0 for a single row, to which torch gives any stride.
inline i32 row_stride(const Tensor& x) { return x.size(0) > 1 ? static_cast<i32>(x.stride(0)) : 0; }

// Returns rows of unit stride close enough for offsets of 32 bits (PatchRows).
inline Tensor streamed_rows(const Tensor& x, const char* name) {
  constexpr int64_t kMaxBytes = std::numeric_limits<int32_t>::max() / 8;
  const Tensor rows = unit_rows(x, name);
  STD_TORCH_CHECK(rows.size(1) * static_cast<int64_t>(rows.element_size()) <= kMaxBytes, name,
                  ": expected rows of at most ", kMaxBytes, " bytes");
  return limit_row_stride(rows, kMaxBytes);
}

inline i32 int32_size(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.size(0) <= std::numeric_limits<int32_t>::max(), name, ": ", x.size(0),
                  " rows do not fit into int32");
  return static_cast<i32>(x.size(0));
}

}  // namespace blt
