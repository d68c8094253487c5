// Makes the arguments and the launch configuration of the kernels that read rows of logits (token_entropy.cuh).
#pragma once

#include <algorithm>
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

// Allocates a panel of logits of an output head. It has whole tiles of rows and is small beside an L2 of 40 MB and
// more, through which `hidden` streams too. But it has at least 1024 rows: with fewer, products would wait for a large
// `weight`. Rows start at multiples of 16 bytes, which fast products on tensor cores need.
inline Tensor panel_of(const Tensor& hidden, const Tensor& weight) {
  constexpr int64_t kPanelBytes = 8 << 20, kMinRows = 1024, kTile = 128;
  const int64_t alphabet = weight.size(0), element = static_cast<int64_t>(hidden.element_size());
  const int64_t stride = ceil_div<int64_t>(alphabet * element, 16) * 16;
  const int64_t rows = std::max(kPanelBytes / stride / kTile * kTile, kMinRows);
  Tensor buffer = device_output(hidden, {std::min(rows, hidden.size(0)), stride / element});
  return torch::stable::narrow(buffer, 1, 0, alphabet);
}

}  // namespace blt
