// few_row_layer runs a transformer layer over a few new entries of rows whose earlier keys and values are cached:
//
//   q, k, v = rotate(W_q n), rotate(W_k n), W_v n        with n = norm(x); k and v are written to the cache
//   h = x + W_o attention(q, keys, values)
//   y = h + W_down (silu(W_gate n') * W_up n')           with n' = norm(h)
//
// A step of decoding has one row in each of these products, so calls and passes over small tensors would cost more than
// the arithmetic. The calling thread computes what is small. Threads share the outputs of the products, those of equal
// input together (few_row_product.h), and the attention (block_causal_attention/decode.h).
//
// Bytes: those of the weights, and of the keys and values that are attended to. Flops: 2 a weight and row.

#include <torch/csrc/stable/library.h>

#include <limits>
#include <memory>

#include "../common/args/few_row_layer.h"
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

Tensor few_row_layer_step_cpu(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& scales,
                              const Tensor& input_norm, const Tensor& post_norm, double eps, const Tensor& table,
                              Tensor keys, Tensor values, const Tensor& index, const Tensor& cu_seqlens_q,
                              const Tensor& cu_seqlens_k, std::optional<int64_t> window) {
  const LayerArguments layer =
      check_few_row_layer(x, weights, scales, input_norm, post_norm, table, keys, values, index);
  const auto [rows, dim, heads, kv_heads, head_dim, hidden, slots] = layer.sizes;
  const int64_t width = heads * head_dim, kv_width = kv_heads * head_dim;
  const Matrix inputs = {layer.x.const_data_ptr<float>(), layer.x.stride(0)};
  const auto weight = [&](LayerWeight kind) { return Weights(layer.weights[kind], layer.scales[kind]); };
  const float epsilon = static_cast<float>(eps);

  const auto size = static_cast<size_t>(rows * (dim + 2 * std::max(kv_width, hidden)));
  const std::unique_ptr<float[]> scratch = std::make_unique_for_overwrite<float[]>(size);
  float* const normalized = scratch.get();
  float* const first = normalized + rows * dim;
  Tensor q = new_output(x, {rows, heads, head_dim});
  float* const queries = q.mutable_data_ptr<float>();
  {
    float* const k = first;
    float* const v = k + rows * kv_width;
    normalize(normalized, inputs, rows, dim, layer.input_norm.const_data_ptr<float>(), epsilon);
    const Product products[] = {{weight(kQuery), queries}, {weight(kKey), k}, {weight(kValue), v}};
    multiply_all(products, {normalized, dim}, rows, dim, kNothing);
    const float* const rotations = static_cast<const float*>(layer.table.const_data_ptr());
    rotate(queries, rotations, rows, heads, head_dim);
    rotate(k, rotations, rows, kv_heads, head_dim);
    const int64_t* const slot = layer.index.const_data_ptr<int64_t>();
    write_cache(keys, k, slot, rows);
    write_cache(values, v, slot, rows);
  }
  const Tensor attended = std::get<0>(
      block_causal_attention_fwd_cpu(q, keys, values, cu_seqlens_q, cu_seqlens_k, window, true, {}, {}, {}, 0));
  Tensor updated = new_output(x, {rows, dim}), y = new_output(x, {rows, dim});
  float* const residual = updated.mutable_data_ptr<float>();
  multiply_and_add({weight(kOutput), residual}, {attended.const_data_ptr<float>(), width}, rows, width, inputs, 1);

  normalize(normalized, {residual, dim}, rows, dim, layer.post_norm.const_data_ptr<float>(), epsilon);
  float* const gate = first;
  float* const up = gate + rows * hidden;
  multiply_gated({weight(kGate), gate}, {weight(kUp), up}, {normalized, dim}, rows, dim);
  multiply_and_add({weight(kDown), y.mutable_data_ptr<float>()}, {gate, hidden}, rows, hidden, {residual, dim}, 1);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) { m.impl("few_row_layer_step", TORCH_BOX(&few_row_layer_step_cpu)); }

}  // namespace blt
