// Loops over torch's own threads. A loop of at most `grain` steps runs in place, without a parallel region.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace blt {

template <class F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  if (size <= 0) return;
  if (size <= grain) {
    f(int64_t{0}, size);
  } else {
    torch::stable::parallel_for(0, size, grain, f);
  }
}

}  // namespace blt
