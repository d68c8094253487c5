// Defines the launch configuration of a kernel.
#pragma once

#include <cstdint>

namespace blt {

struct Grid {
  int64_t x, y = 1;
};

// A launch whose grid is empty does nothing. `grid` counts blocks, `block` threads, `smem_bytes` the dynamic shared
// memory of a block.
struct LaunchConfig {
  Grid grid;
  int block;
  int64_t smem_bytes = 0;
};

}  // namespace blt
