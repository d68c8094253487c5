// Checks the arguments of few_row_layer.
#pragma once

#include <vector>

#include "few_row_linear.h"

namespace blt {

// The operator takes the weights of a transformer layer in this order.
enum LayerWeight { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLayerWeights };

// x is [rows, dim], keys and values are [slots, kv_heads, head_dim], and SwiGLU has `hidden` columns.
struct LayerSizes {
  int64_t rows, dim, heads, kv_heads, head_dim, hidden, slots;
};

struct LayerArguments {
  LayerSizes sizes;
  Tensor x;
  std::vector<Tensor> weights;
  std::vector<std::optional<Tensor>> scales;
  Tensor input_norm, post_norm, table, index;
};

// Gives everything but keys and values unit strides. Rows of keys and values may have any stride.
inline LayerArguments check_few_row_layer(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> scales,
                                          Tensor input_norm, Tensor post_norm, Tensor table, const Tensor& keys,
                                          const Tensor& values, Tensor index) {
  check_dim(x, "x", 2);
  const int64_t rows = x.size(0), dim = x.size(1);
  STD_TORCH_CHECK(weights.size() == kLayerWeights, "weights: expected ", int{kLayerWeights}, ", got ", weights.size());
  STD_TORCH_CHECK(scales.empty() || scales.size() == kLayerWeights, "scales: expected none or ", int{kLayerWeights},
                  ", got ", scales.size());
  for (const auto& [cache, name] : {std::pair(&keys, "keys"), std::pair(&values, "values")}) {
    check_dim(*cache, name, 3);
    check_dtype(*cache, name, ScalarType::Float);
    for (int d = 0; d < 3; ++d) check_size(*cache, name, d, keys.size(d));
    STD_TORCH_CHECK(cache->stride(2) == 1 && cache->stride(1) == cache->size(2), name,
                    ": expected contiguous entries, got strides ", cache->stride(1), " and ", cache->stride(2));
  }
  const int64_t kv_heads = keys.size(1), head_dim = keys.size(2);
  STD_TORCH_CHECK(kv_heads > 0 && head_dim > 0 && head_dim % 2 == 0, "keys: expected heads of even width, got ",
                  kv_heads, " of ", head_dim);
  for (const LayerWeight kind : {kQuery, kGate}) check_dim(weights[kind], "weights", 2);
  const int64_t heads = weights[kQuery].size(0) / head_dim, hidden = weights[kGate].size(0);
  const int64_t outputs[] = {heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, dim, hidden, hidden, dim};
  const int64_t inputs[] = {dim, dim, dim, heads * head_dim, dim, dim, hidden};
  std::vector<std::optional<Tensor>> optional_scales(kLayerWeights);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!scales.empty()) optional_scales[i] = scales[i];
    check_weight(weights[i], optional_scales[i], "weights", inputs[i]);
    check_size(weights[i], "weights", 0, outputs[i]);
  }
  check_norm(input_norm, "input_norm", dim);
  check_norm(post_norm, "post_norm", dim);
  check_dtype(table, "table", ScalarType::ComplexFloat);
  check_shape(table, "table", {rows, 1, head_dim / 2});
  check_dtype(index, "index", ScalarType::Long);
  check_shape(index, "index", {rows});
  index = as_contiguous(index);
  const int64_t* const slot = index.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < rows; ++m)
    STD_TORCH_CHECK(slot[m] >= 0 && slot[m] < keys.size(0), "index: expected values from 0 to ", keys.size(0) - 1,
                    ", got ", slot[m]);
  return {{rows, dim, heads, kv_heads, head_dim, hidden, keys.size(0)},
          check_fp32_rows(x, "x", dim),
          std::move(weights),
          std::move(optional_scales),
          input_norm,
          post_norm,
          as_contiguous(table),
          index};
}

}  // namespace blt
