// The launch configuration of a kernel.
#pragma once

#include <cstdint>

namespace blt {

struct Grid {
  int64_t x, y = 1;  // blocks
};

// A launch whose grid is empty does nothing.
struct LaunchConfig {
  Grid grid;
  int block;               // threads
  int64_t smem_bytes = 0;  // dynamic shared memory of a block
};

}  // namespace blt
