// Computes the products of few_row_linear and few_row_layer: a few rows of fp32 by a weight matrix that is read once.
//
//   y[m][n] = scale[n] sum over k < K of x[m][k] weight[n][k]
//
// Tiling: threads share the rows of weight, four of which (two with AVX2) are a tile. A tile is multiplied by up to six
// rows of x at a time: weights come from memory for the first of these groups, and from L1 for the others. x is in L1
// or L2. The next tile is prefetched meanwhile: the hardware would begin with each row anew. Weights of bf16 and int8
// are converted to fp32 in registers. An element of y has one vector of sums over rising k, whose lanes are added in a
// fixed order. So its bits depend neither on the number of rows nor on the threads.
//
// Bytes: those of the N K weights, and 4 M (K + N) of x and y. Flops: 2 M N K.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <span>

#include "../common/args/few_row_linear.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {

struct Matrix {
  const float* data;
  int64_t stride;
  const float* row(int64_t i) const { return data + i * stride; }
};

// Describes a weight matrix of fp32, bf16 or int8; `scale` is null but for int8.
struct Weights {
  Weights(const Tensor& weight, const std::optional<Tensor>& scale)
      : data(weight.const_data_ptr()),
        dtype(weight.scalar_type()),
        stride(weight.stride(0)),
        outputs(weight.size(0)),
        scale(scale ? scale->const_data_ptr<float>() : nullptr) {}
  const void* data;
  ScalarType dtype;
  int64_t stride, outputs;
  const float* scale;
};

// Multiplies `weights` with an x that other products share, into rows of y that are `weights.outputs` apart.
struct Product {
  Weights weights;
  float* y;
};

// Computes the elements [begin, end) of every row of y, for x [rows, width].
void multiply(const Product& product, Matrix x, int64_t rows, int64_t width, int64_t begin, int64_t end);

// Computes all products, whose outputs the threads share. Calls finish(product, begin, end) in the thread that computed
// these elements.
template <class F>
void multiply_all(std::span<const Product> products, Matrix x, int64_t rows, int64_t width, const F& finish) {
  int64_t total = 0;
  for (const Product& product : products) total += product.weights.outputs;
  parallel_for(total, row_grain(width), [&](int64_t first, int64_t last) {
    int64_t before = 0;
    for (const Product& product : products) {
      const int64_t outputs = product.weights.outputs;
      const int64_t begin = std::clamp<int64_t>(first - before, 0, outputs);
      const int64_t end = std::clamp<int64_t>(last - before, 0, outputs);
      before += outputs;
      if (begin == end) continue;
      multiply(product, x, rows, width, begin, end);
      finish(product, begin, end);
    }
  });
}

// Computes y = factor residual + x weight^T, with rows of y and residual `weights.outputs` and `residual.stride` apart.
inline void multiply_and_add(const Product& product, Matrix x, int64_t rows, int64_t width, Matrix residual,
                             float factor) {
  multiply_all({&product, 1}, x, rows, width, [&](const Product& product, int64_t begin, int64_t end) {
    for (int64_t m = 0; m < rows; ++m) {
      float* const y = product.y + m * product.weights.outputs + begin;
      const auto add = [factor](auto y, auto r) { return y + factor * r; };
      map_row<float>(y, end - begin, add, y, residual.row(m) + begin);
    }
  });
}

// Computes y = x / sqrt(mean(x^2) + eps) * weight for rows of x, packed.
inline void normalize(float* y, Matrix x, int64_t rows, int64_t width, const float* weight, float eps) {
  for (int64_t m = 0; m < rows; ++m) {
    const float mean = sum_of_squares<float>(x.row(m), width) / static_cast<float>(width);
    const float scale = 1 / std::sqrt(mean + eps);
    const auto scaled = [scale](auto x, auto w) { return x * scale * w; };
    map_row<float>(y + m * width, width, scaled, x.row(m), weight);
  }
}

}  // namespace blt
