// Launches of the kernels that read rows of logits (token_entropy.cuh): their argument and their grid.
#pragma once

#include "../common/args/token_entropy.h"
#include "../launch/launch.h"
#include "token_entropy.cuh"

namespace blt {

template <class T>
LogitRows<T> logit_rows(const Device& device, const Tensor& rows) {
  return {device.read<T>(rows), rows.size(0), rows.stride(0), static_cast<i32>(rows.size(1))};
}

template <class T>
LaunchConfig entropy_config(int64_t rows) {
  return {.grid = {ceil_div<int64_t>(rows * row_lanes(sizeof(T)), kEntropyThreads)}, .block = kEntropyThreads};
}

}  // namespace blt
