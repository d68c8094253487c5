// Makes the argument and the launch configuration of the kernels that read rows of logits (token_entropy.cuh).
#pragma once

#include <tuple>

#include "../common/args/token_entropy.h"
#include "../launch/launch.h"
#include "token_entropy.cuh"

namespace blt {

using EntropyTensors = std::tuple<Tensor, Tensor>;  // has entropy and log_sum

inline EntropyTensors entropy_outputs(const Tensor& rows) {
  return {device_output(rows, {rows.size(0)}, accumulator(rows)),
          device_output(rows, {rows.size(0)}, accumulator(rows))};
}

template <class T>
LogitRows<T> logit_rows(const Device& device, const Tensor& rows) {
  return {device.read<T>(rows), rows.size(0), rows.stride(0), static_cast<i32>(rows.size(1))};
}

template <class T>
LaunchConfig entropy_config(int64_t rows) {
  return {.grid = {ceil_div<int64_t>(rows * row_lanes(sizeof(T)), kEntropyThreads)}, .block = kEntropyThreads};
}

}  // namespace blt
