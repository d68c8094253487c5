// few_row_layer runs transformer layers over a few new entries of rows whose earlier keys and values are cached. Each
// layer computes
//
//   q, k, v = rotate(W_q n), rotate(W_k n), W_v n        with n = norm(x); k and v are written to the cache
//   h = x + W_o attention(q, keys, values)
//   y = h + W_down (silu(W_gate n') * W_up n')           with n' = norm(h)
//
// The first layers may have a cross attention in front, in which an entry reads the vectors of its patch:
//
//   x <- 2 x + W_o attention(W_q norm(x), patch_keys, patch_values)
//
// With a head, W norm(y) of the last layer is returned in the place of y.
//
// A step of decoding has one row in each of these products, so calls and passes over small tensors would cost more than
// the arithmetic. The calling thread computes what is small, cross attention too. Threads share the outputs of the
// products, those of equal input together (few_row_product.h), and self-attention (block_causal_attention/decode.h).
//
// Bytes: those of the weights, and of the keys and values that are attended to. Flops: 2 a weight and row.

#include <torch/csrc/stable/library.h>

#include <limits>
#include <memory>

#include "../common/args/few_row_layer.h"
#include "../common/box.h"
#include "block_causal_attention.h"
#include "few_row_product.h"
#include "support/alloc.h"

namespace blt {
namespace {

// Rotates the pairs of every head by the rotations of its row: [rows, heads, head_dim / 2] complex numbers.
void rotate(float* x, const float* table, int64_t rows, int64_t heads, int64_t head_dim) {
  for (int64_t m = 0; m < rows; ++m, table += head_dim)
    for (int64_t head = 0; head < heads; ++head, x += head_dim)
      for (int64_t e = 0; e < head_dim; e += 2) {
        const float real = x[e], imaginary = x[e + 1];
        x[e] = real * table[e] - imaginary * table[e + 1];
        x[e + 1] = real * table[e + 1] + imaginary * table[e];
      }
}

float silu(float x) { return x / (1 + std::exp(-x)); }

VecF silu(VecF x) {
  constexpr float kMinExponent = -88;  // exp of a greater argument than 88 is infinite
  const VecF power = max(broadcast(kExpMin), -max(broadcast(kMinExponent), x));
  return x / (1 + (x < kMinExponent ? broadcast(std::numeric_limits<float>::infinity()) : exp(power)));
}

// Computes y = silu(x weight^T) * (x up^T), for the y and the weight of `gate`; `up` has the same sizes.
void multiply_gated(const Product& gate, const Product& up, Matrix x, int64_t rows, int64_t width) {
  const int64_t outputs = gate.weights.outputs;
  parallel_for(outputs, row_grain(2 * width), [&](int64_t begin, int64_t end) {
    multiply(gate, x, rows, width, begin, end);
    multiply(up, x, rows, width, begin, end);
    for (int64_t m = 0; m < rows; ++m) {
      float* const y = gate.y + m * outputs + begin;
      const auto combine = [](auto g, auto u) { return silu(g) * u; };
      map_row<float>(y, end - begin, combine, y, up.y + m * outputs + begin);
    }
  });
}

void write_cache(Tensor& cache, const float* rows, const int64_t* index, int64_t count) {
  float* const data = cache.mutable_data_ptr<float>();
  const int64_t stride = cache.stride(0), width = cache.size(1) * cache.size(2);
  for (int64_t m = 0; m < count; ++m)
    std::memcpy(data + index[m] * stride, rows + m * width, static_cast<size_t>(width) * sizeof(float));
}

constexpr auto kNothing = [](const Product&, int64_t, int64_t) {};

float dot(const float* x, const float* y, int64_t width) {
  Pair sums = {};
  int64_t c = 0;
  for (; c + pair_lanes<float> <= width; c += pair_lanes<float>) {
    const Pair a = load_pair(x + c), b = load_pair(y + c);
    sums.a += a.a * b.a;
    sums.b += a.b * b.b;
  }
  float sum = lane_sum<float>(sums.a + sums.b);
  for (; c < width; ++c) sum += x[c] * y[c];
  return sum;
}

// Computes the attention of each row to the vectors of its patch: [rows, heads, head_dim], 0 for patch -1. `scores` has
// room for the vectors of a patch.
void read_patches(float* out, const float* queries, const CrossSizes& sizes, const Tensor& patch_keys,
                  const Tensor& patch_values, const int32_t* patch, float* scores) {
  const int64_t vectors = sizes.vectors, head_dim = sizes.head_dim, pitch = sizes.kv_heads * head_dim;
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  const int64_t shared = sizes.heads / sizes.kv_heads;
  std::fill_n(out, sizes.rows * sizes.heads * head_dim, 0.0f);
  for (int64_t i = 0; i < sizes.rows * sizes.heads; ++i, queries += head_dim, out += head_dim) {
    const int64_t row = i / sizes.heads, kv_head = i % sizes.heads / shared;
    if (patch[row] < 0) continue;
    const float* const keys =
        patch_keys.const_data_ptr<float>() + patch[row] * patch_keys.stride(0) + kv_head * head_dim;
    const float* const values =
        patch_values.const_data_ptr<float>() + patch[row] * patch_values.stride(0) + kv_head * head_dim;
    float highest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t j = 0; j < vectors; ++j) {
      scores[j] = scale * dot(queries, keys + j * pitch, head_dim);
      highest = std::max(highest, scores[j]);
    }
    for (int64_t j = 0; j < vectors; ++j) sum += scores[j] = std::exp(scores[j] - highest);
    for (int64_t j = 0; j < vectors; ++j) {
      const float weight = scores[j] / sum;
      map_row<float>(out, head_dim, [weight](auto y, auto v) { return y + weight * v; }, out, values + j * pitch);
    }
  }
}

// Has the arguments that all layers share, and memory for what lies between products.
struct Step {
  LayerLists& lists;
  const Tensor &like, &table, &index, &cu_seqlens_q, &cu_seqlens_k;
  std::optional<int64_t> window;
  float epsilon;
  std::unique_ptr<float[]> memory;
  int64_t room = 0;

  float* scratch(int64_t size) {
    if (size > room) memory = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(size)), room = size;
    return memory.get();
  }
  Weights weight(size_t i) const {
    return {lists.weights[i], lists.scales.empty() ? std::nullopt : std::optional(lists.scales[i])};
  }
  const float* norm(size_t i) const { return lists.norms[i].const_data_ptr<float>(); }
};

// Computes y = 2 x + W_o attention(W_q norm(x)).
void cross(Step& step, float* y, Matrix x, const CrossSizes& sizes, size_t layer, size_t weight, size_t norm,
           const int32_t* patch) {
  const auto [rows, dim, heads, patches, vectors, kv_heads, head_dim] = sizes;
  const int64_t width = heads * head_dim;
  float* const normalized = step.scratch(rows * (dim + 2 * width) + vectors);
  float* const queries = normalized + rows * dim;
  float* const attended = queries + rows * width;
  normalize(normalized, x, rows, dim, step.norm(norm), step.epsilon);
  const Product query = {step.weight(weight + kCrossQuery), queries};
  multiply_all({&query, 1}, {normalized, dim}, rows, dim, kNothing);
  read_patches(attended, queries, sizes, step.lists.patch_keys[layer], step.lists.patch_values[layer], patch,
               attended + rows * width);
  multiply_and_add({step.weight(weight + kCrossOutput), y}, {attended, width}, rows, width, x, 2);
}

// Computes h = x + W_o attention(norm(x)).
void attend(Step& step, float* h, Matrix x, const LayerSizes& sizes, size_t layer, size_t weight, size_t norm) {
  const int64_t rows = sizes.rows, dim = sizes.dim, width = sizes.width(), kv_width = sizes.kv_width();
  Tensor q = new_output(step.like, {rows, sizes.heads, sizes.head_dim});
  float* const queries = q.mutable_data_ptr<float>();
  float* const normalized = step.scratch(rows * (dim + 2 * kv_width));
  float* const k = normalized + rows * dim;
  float* const v = k + rows * kv_width;
  normalize(normalized, x, rows, dim, step.norm(norm + kInputNorm), step.epsilon);
  const Product products[] = {
      {step.weight(weight + kQuery), queries}, {step.weight(weight + kKey), k}, {step.weight(weight + kValue), v}};
  multiply_all(products, {normalized, dim}, rows, dim, kNothing);
  const float* const rotations = static_cast<const float*>(step.table.const_data_ptr());
  rotate(queries, rotations, rows, sizes.heads, sizes.head_dim);
  rotate(k, rotations, rows, sizes.kv_heads, sizes.head_dim);
  const int64_t* const slot = step.index.const_data_ptr<int64_t>();
  Tensor &keys = step.lists.keys[layer], &values = step.lists.values[layer];
  write_cache(keys, k, slot, rows);
  write_cache(values, v, slot, rows);
  const Tensor attended = std::get<0>(block_causal_attention_fwd_cpu(
      q, keys, values, step.cu_seqlens_q, step.cu_seqlens_k, step.window, true, {}, {}, {}, 0));
  multiply_and_add({step.weight(weight + kOutput), h}, {attended.const_data_ptr<float>(), width}, rows, width, x, 1);
}

// Computes y = h + W_down (silu(W_gate norm(h)) * W_up norm(h)).
void feed_forward(Step& step, float* y, Matrix h, const LayerSizes& sizes, size_t weight, size_t norm) {
  const int64_t rows = sizes.rows, dim = sizes.dim, hidden = sizes.hidden;
  float* const normalized = step.scratch(rows * (dim + 2 * hidden));
  float* const gate = normalized + rows * dim;
  float* const up = gate + rows * hidden;
  normalize(normalized, h, rows, dim, step.norm(norm + kPostNorm), step.epsilon);
  multiply_gated({step.weight(weight + kGate), gate}, {step.weight(weight + kUp), up}, {normalized, dim}, rows, dim);
  multiply_and_add({step.weight(weight + kDown), y}, {gate, hidden}, rows, hidden, h, 1);
}

Tensor few_row_layer_step_cpu(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> scales,
                              std::vector<Tensor> norms, double eps, Tensor table, std::vector<Tensor> keys,
                              std::vector<Tensor> values, Tensor index, const Tensor& cu_seqlens_q,
                              const Tensor& cu_seqlens_k, std::optional<int64_t> window, std::vector<Tensor> patch_keys,
                              std::vector<Tensor> patch_values, std::optional<Tensor> patches,
                              std::optional<Tensor> head_norm, std::optional<Tensor> head) {
  LayerLists lists = {std::move(weights), std::move(scales),     std::move(norms),       std::move(keys),
                      std::move(values),  std::move(patch_keys), std::move(patch_values)};
  check_lengths(lists);
  check_dim(x, "x", 2);
  const int64_t rows = x.size(0), dim = x.size(1);
  const Tensor inputs = check_fp32_rows(x, "x", dim);
  const int64_t head_dim = check_table(table, lists, rows);
  check_dtype(index, "index", ScalarType::Long);
  check_shape(index, "index", {rows});
  index = as_contiguous(index);
  const int32_t* patch = nullptr;
  if (lists.crosses() > 0) {
    STD_TORCH_CHECK(patches.has_value(), "patches: expected a tensor with patch_keys, got None");
    patch = check_int32(*patches, "patches");
    check_shape(*patches, "patches", {rows});
  }
  check_head(head_norm, head, dim);
  Step step = {lists, x, table, index, cu_seqlens_q, cu_seqlens_k, window, static_cast<float>(eps), {}};
  Tensor y = new_output(x, {rows, dim});
  float* const output = y.mutable_data_ptr<float>();
  const std::unique_ptr<float[]> between = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(2 * rows * dim));
  float *const h = between.get(), *const crossed = h + rows * dim;
  Matrix from = {inputs.const_data_ptr<float>(), inputs.stride(0)};
  size_t weight = 0, norm = 0;
  for (size_t layer = 0; layer < lists.layers(); ++layer) {
    if (layer < lists.crosses()) {
      const CrossSizes sizes = check_cross(lists, layer, weight, norm, rows, dim, patch);
      cross(step, crossed, from, sizes, layer, weight, norm, patch);
      from = {crossed, dim}, weight += kCrossWeights, norm += 1;
    }
    const LayerSizes sizes = check_layer(lists, layer, weight, norm, rows, dim, head_dim, index);
    attend(step, h, from, sizes, layer, weight, norm);
    feed_forward(step, output, {h, dim}, sizes, weight, norm);
    from = {output, dim}, weight += kLayerWeights, norm += kLayerNorms;
  }
  if (!head) return y;
  Tensor logits = new_output(x, {rows, head->size(0)});
  float* const normalized = step.scratch(rows * dim);
  normalize(normalized, from, rows, dim, head_norm->const_data_ptr<float>(), step.epsilon);
  const Product product = {{*head, std::nullopt}, logits.mutable_data_ptr<float>()};
  multiply_all({&product, 1}, {normalized, dim}, rows, dim, kNothing);
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("few_row_layer_step", BLT_KERNELS_BOX(&few_row_layer_step_cpu));
}

}  // namespace blt
