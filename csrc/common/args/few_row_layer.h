// Checks the arguments of few_row_layer.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "few_row_linear.h"

namespace blt {

// The operator takes the weights of a transformer layer in this order, and before them those of its cross attention.
enum LayerWeight { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLayerWeights };
enum CrossWeight { kCrossQuery, kCrossOutput, kCrossWeights };
enum LayerNorm { kInputNorm, kPostNorm, kLayerNorms };

// Holds the operator's lists of tensors, of all layers end to end. `scales` is empty or as long as `weights`.
struct LayerLists {
  std::vector<Tensor> weights, scales, norms, keys, values, patch_keys, patch_values;
  size_t layers() const { return keys.size(); }
  size_t crosses() const { return patch_keys.size(); }
};

// x is [rows, dim], keys and values are [slots, kv_heads, head_dim], and SwiGLU has `hidden` columns.
struct LayerSizes {
  int64_t rows, dim, heads, kv_heads, head_dim, hidden;
  int64_t width() const { return heads * head_dim; }
  int64_t kv_width() const { return kv_heads * head_dim; }
};

// Keys and values of patches are [patches, vectors, kv_heads, head_dim].
struct CrossSizes {
  int64_t rows, dim, heads, patches, vectors, kv_heads, head_dim;
};

inline void check_lengths(const LayerLists& lists) {
  const size_t layers = lists.layers(), crosses = lists.crosses();
  const auto check = [](const std::vector<Tensor>& list, const char* name, size_t expected) {
    STD_TORCH_CHECK(list.size() == expected, name, ": expected ", expected, ", got ", list.size());
  };
  check(lists.weights, "weights", layers * kLayerWeights + crosses * kCrossWeights);
  if (!lists.scales.empty()) check(lists.scales, "scales", lists.weights.size());
  check(lists.norms, "norms", layers * kLayerNorms + crosses);
  check(lists.values, "values", layers);
  check(lists.patch_values, "patch_values", crosses);
  STD_TORCH_CHECK(crosses <= layers, "patch_keys: expected at most ", layers, ", got ", crosses);
}

// Checks weights [outputs, inputs] from `first` on, and gives them unit strides.
inline void check_weights(LayerLists& lists, size_t first, std::initializer_list<std::pair<int64_t, int64_t>> sizes) {
  for (const auto& [outputs, inputs] : sizes) {
    std::optional<Tensor> scale;
    if (!lists.scales.empty()) scale = lists.scales[first];
    check_weight(lists.weights[first], scale, "weights", inputs);
    check_size(lists.weights[first], "weights", 0, outputs);
    if (scale) lists.scales[first] = *scale;
    ++first;
  }
}

// Checks that keys and values are fp32, of the same sizes, with contiguous entries that may be any stride apart.
inline void check_cache(const Tensor& keys, const Tensor& values, const char* keys_name, const char* values_name,
                        int64_t dims) {
  for (const auto& [cache, name] : {std::pair(&keys, keys_name), std::pair(&values, values_name)}) {
    check_dim(*cache, name, dims);
    check_dtype(*cache, name, ScalarType::Float);
    for (int64_t d = 0; d < dims; ++d) check_size(*cache, name, d, keys.size(d));
    int64_t stride = 1;
    for (int64_t d = dims - 1; d > 0; stride *= cache->size(d--))
      STD_TORCH_CHECK(cache->stride(d) == stride, name, ": expected contiguous entries, got stride ", cache->stride(d));
  }
}

// Checks the rotations [rows, 1, head_dim / 2], gives them unit strides, and returns head_dim: that of all keys.
inline int64_t check_table(Tensor& table, const LayerLists& lists, int64_t rows) {
  STD_TORCH_CHECK(lists.layers() > 0, "keys: expected those of at least one layer, got none");
  check_dim(lists.keys[0], "keys", 3);
  const int64_t head_dim = lists.keys[0].size(2);
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 2 == 0, "keys: expected heads of even width, got ", head_dim);
  check_dtype(table, "table", ScalarType::ComplexFloat);
  check_shape(table, "table", {rows, 1, head_dim / 2});
  table = as_contiguous(table);
  return head_dim;
}

// Checks the norm and the matrix behind the layers, and gives them unit strides.
inline void check_head(std::optional<Tensor>& norm, std::optional<Tensor>& head, int64_t dim) {
  STD_TORCH_CHECK(norm.has_value() == head.has_value(), "head: expected one with head_norm, and none without");
  if (!head) return;
  std::optional<Tensor> scale;
  check_weight(*head, scale, "head", dim);
  check_norm(*norm, "head_norm", dim);
}

// Checks layer number `layer`, whose weights and norms begin at these indices.
inline LayerSizes check_layer(LayerLists& lists, size_t layer, size_t weight, size_t norm, int64_t rows, int64_t dim,
                              int64_t head_dim, const Tensor& index) {
  const Tensor& keys = lists.keys[layer];
  check_cache(keys, lists.values[layer], "keys", "values", 3);
  check_size(keys, "keys", 2, head_dim);
  const int64_t kv_heads = keys.size(1);
  STD_TORCH_CHECK(kv_heads > 0, "keys: expected at least one head, got 0");
  for (const LayerWeight kind : {kQuery, kGate}) check_dim(lists.weights[weight + kind], "weights", 2);
  const int64_t heads = lists.weights[weight + kQuery].size(0) / head_dim;
  const int64_t hidden = lists.weights[weight + kGate].size(0);
  const LayerSizes sizes = {rows, dim, heads, kv_heads, head_dim, hidden};
  const int64_t width = sizes.width(), kv_width = sizes.kv_width();
  check_weights(
      lists, weight,
      {{width, dim}, {kv_width, dim}, {kv_width, dim}, {dim, width}, {hidden, dim}, {hidden, dim}, {dim, hidden}});
  for (const LayerNorm kind : {kInputNorm, kPostNorm}) check_norm(lists.norms[norm + kind], "norms", dim);
  const int64_t* const slot = index.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < rows; ++m)
    STD_TORCH_CHECK(slot[m] >= 0 && slot[m] < keys.size(0), "index: expected values from 0 to ", keys.size(0) - 1,
                    ", got ", slot[m]);
  return sizes;
}

// Checks the cross attention of layer number `layer`, whose weights and norm begin at these indices.
inline CrossSizes check_cross(LayerLists& lists, size_t layer, size_t weight, size_t norm, int64_t rows, int64_t dim,
                              const int32_t* patch) {
  const Tensor& keys = lists.patch_keys[layer];
  check_cache(keys, lists.patch_values[layer], "patch_keys", "patch_values", 4);
  const int64_t patches = keys.size(0), kv_heads = keys.size(2), head_dim = keys.size(3);
  check_dim(lists.weights[weight + kCrossQuery], "weights", 2);
  const int64_t width = lists.weights[weight + kCrossQuery].size(0);
  STD_TORCH_CHECK(kv_heads > 0 && head_dim > 0 && width % (kv_heads * head_dim) == 0,
                  "patch_keys: expected heads that divide ", width, " columns, got ", kv_heads, " of ", head_dim);
  check_weights(lists, weight, {{width, dim}, {dim, width}});
  check_norm(lists.norms[norm], "norms", dim);
  for (int64_t m = 0; m < rows; ++m)
    STD_TORCH_CHECK(patch[m] < patches, "patches: expected values below ", patches, ", got ", patch[m]);
  return {rows, dim, width / head_dim, patches, keys.size(1), kv_heads, head_dim};
}

}  // namespace blt
