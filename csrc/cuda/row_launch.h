// The grid of the kernels that stream rows (patch_rows.cuh), and what they need to know of tensors of rows.
#pragma once

#include <limits>

#include "../launch/launch.h"
#include "patch_rows.cuh"

namespace blt {

struct RowLaunch {
  LaunchConfig config;
  RowTile tile;
};

// A thread for each group of rows and `pack` columns.
inline RowLaunch row_launch(int64_t groups, int64_t width, int pack) {
  const int64_t packs = ceil_div<int64_t>(width, pack), panels = ceil_div<int64_t>(packs, kRowThreads);
  const int own = static_cast<int>(ceil_div(packs, panels)), rows = kRowThreads / own;
  return {{.grid = {ceil_div<int64_t>(groups, rows), panels}, .block = rows * own},
          {rows, own, (65535u / static_cast<u32>(own)) + 1}};
}

// Elements from row to row. A single row has any stride in torch.
inline i32 row_stride(const Tensor& x) { return x.size(0) > 1 ? static_cast<i32>(x.stride(0)) : 0; }

// Rows near enough to each other for offsets of 32 bits; a copy of others, which can be few only.
inline Tensor near_rows(const Tensor& x, const char* name) {
  constexpr int64_t kFar = std::numeric_limits<int32_t>::max() / 8;
  const Tensor rows = unit_rows(x, name);
  STD_TORCH_CHECK(rows.size(1) * static_cast<int64_t>(rows.element_size()) <= kFar, name, ": expected rows of at most ",
                  kFar, " bytes");
  return rows.size(0) > 1 && row_bytes(rows) > kFar ? as_contiguous(rows) : rows;
}

inline i32 int32_size(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.size(0) <= std::numeric_limits<int32_t>::max(), name, ": ", x.size(0),
                  " rows do not fit into int32");
  return static_cast<i32>(x.size(0));
}

}  // namespace blt
