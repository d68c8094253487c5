// few_row_linear multiplies a few rows by a weight matrix: y = x weight^T, in fp32.
//
//   y[m][n] = sum over k < K of x[m][k] weight[n][k]
//
// Tiling: threads share the rows of weight, kWeights of which are a tile. A tile is multiplied by up to kMaxRows
// rows of x at a time: weights come from memory for the first of these groups, and from L1 for the others. x is in
// L1 or L2. The next tile is prefetched meanwhile: the hardware would begin with each row anew. An element of y has
// one vector of sums over rising k, whose lanes are added in a fixed order. So its bits depend neither on the number
// of rows nor on the threads.
//
// Bytes: 4 N K of weights, and 4 M (K + N) of x and y. Flops: 2 M N K.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/args/few_row_linear.h"
#include "support/alloc.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {
namespace {

constexpr int kWeights = kLanes == 16 ? 4 : 2;  // AVX-512 has 32 registers, AVX2 16: sums and weights fit into them
constexpr int kMaxRows = 6;

struct Matrix {
  const float* data;
  int64_t stride;
  const float* row(int64_t i) const { return data + i * stride; }
};

// Loads the last K % kLanes elements of a row of K; the other lanes are 0, so that they add nothing.
struct Tail {
  explicit Tail(int64_t width) : whole(width / kLanes * kLanes), count(width - whole) {
    for (int i = 0; i < kLanes; ++i) mask[i] = i >= kLanes - count ? -1 : 0;
  }
  VecF operator()(const float* row) const {
    if (whole > 0) return bit_cast<VecF>(bit_cast<VecI>(load(row + whole + count - kLanes)) & mask);
    VecF v = {};
    std::memcpy(&v, row, static_cast<size_t>(count) * sizeof(float));
    return v;
  }
  int64_t whole, count;
  VecI mask;
};

// Computes y[m * y_stride + n] for m < kRows and n < kCount.
template <int kRows, int kCount>
inline void multiply_tile(float* y, int64_t y_stride, Matrix x, Matrix weight, const Tail& tail) {
  constexpr int kSums = (kRows * kCount + kLanes - 1) / kLanes * kLanes;
  VecF sums[kSums] = {};
  const auto add = [&](auto load_columns) {
    VecF w[kCount];
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) w[n] = load_columns(weight.row(n));
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const VecF a = load_columns(x.row(m));
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) sums[m * kCount + n] += a * w[n];
    }
  };
  for (int64_t k = 0; k < tail.whole; k += kLanes) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) __builtin_prefetch(weight.row(kCount + n) + k);  // of the next tile
    add([k](const float* row) { return load(row + k); });
  }
  if (tail.count > 0) add(tail);

  float cells[kSums];
#pragma GCC unroll 6
  for (int i = 0; i < kSums; i += kLanes) store(cells + i, lane_sums<float>(sums + i));
  for (int m = 0; m < kRows; ++m) std::memcpy(y + m * y_stride, cells + m * kCount, kCount * sizeof(float));
}

template <int kCount, int kRows = kMaxRows>
inline void multiply_rows(int64_t rows, float* y, int64_t y_stride, Matrix x, Matrix weight, const Tail& tail) {
  if (rows == kRows) return multiply_tile<kRows, kCount>(y, y_stride, x, weight, tail);
  if constexpr (kRows > 1) multiply_rows<kCount, kRows - 1>(rows, y, y_stride, x, weight, tail);
}

Tensor few_row_linear_fwd_cpu(const Tensor& x, const Tensor& weight) {
  const LinearArguments arguments = check_few_row_linear(x, weight);
  const int64_t rows = x.size(0), width = x.size(1), outputs = weight.size(0);
  Tensor y = new_output(x, {rows, outputs});
  float* const out = y.mutable_data_ptr<float>();
  const Matrix inputs = {arguments.x.const_data_ptr<float>(), arguments.x.stride(0)};
  const Matrix weights = {arguments.weight.const_data_ptr<float>(), arguments.weight.stride(0)};
  const Tail tail(width);
  const int64_t groups = (rows + kMaxRows - 1) / kMaxRows;

  parallel_for(outputs, row_grain(width), [&](int64_t begin, int64_t end) {
    const auto multiply = [&](auto count, int64_t n) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = rows * group / groups, last = rows * (group + 1) / groups;
        multiply_rows<count>(last - first, out + first * outputs + n, outputs, {inputs.row(first), inputs.stride},
                             {weights.row(n), weights.stride}, tail);
      }
    };
    int64_t n = begin;
    for (; n + kWeights <= end; n += kWeights) multiply(std::integral_constant<int, kWeights>{}, n);
    for (; n < end; ++n) multiply(std::integral_constant<int, 1>{}, n);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) { m.impl("few_row_linear_fwd", TORCH_BOX(&few_row_linear_fwd_cpu)); }

}  // namespace blt
