// The grid of the kernels that stream rows (patch_rows.cuh).
#pragma once

#include <algorithm>

#include "../common/launch.h"
#include "patch_rows.cuh"

namespace blt {

// A thread for each group of rows and `pack` columns.
inline Shape row_shape(int64_t groups, int64_t width, int pack) {
  return {.blocks = ceil_div<int64_t>(groups * ceil_div<int64_t>(width, pack), kRowThreads), .threads = kRowThreads};
}

}  // namespace blt
