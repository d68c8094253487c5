// Passes the logits of an output head to a kernel of rows, a panel of rows at a time, for the CPU and for CUDA.
// linear_entropy and linear_cross_entropy are made of it: f and df are their functions of a row of logits.
//
//   x = hidden weight^T + bias
//   forward: f(x);  backward: g = df(x), in the place of x
//   grad_hidden = g weight;  grad_weight = sum over panels of g^T hidden;  grad_bias = sum over rows of g
//
// torch computes the products, and rounds their results to the dtype of the inputs as F.linear does. All panels use one
// buffer in turn, which the caller allocates with the rows of a panel, so that their logits stay in a cache: L2 of a
// core or of a GPU. Sums over panels are in fp32 (fp64 for fp64), in the order of the panels.
//
// A row takes 2 A D flops forward and 6 A D backward. Forward reads D numbers and writes 8 bytes; backward reads
// 2 D numbers (hidden twice) and 12 bytes, and writes D numbers. weight and logits come from the cache.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "check.h"

namespace blt {

// Calls op(args...) through torch's dispatcher, for ops whose last argument is `out`.
template <class... Args>
void call_out(const char* op, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // this takes back the reference that the result holds
}

inline Tensor rows_of(const Tensor& x, int64_t begin, int64_t count) {
  Tensor source = x;
  return torch::stable::narrow(source, 0, begin, count);
}

// Calls f(begin, hidden rows, logits) for each panel; `begin` is its first row.
template <class F>
void for_each_panel(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& buffer,
                    F f) {
  const int64_t rows = hidden.size(0), panel = buffer.size(0);
  for (int64_t begin = 0; begin < rows; begin += panel) {
    const int64_t count = std::min(panel, rows - begin);
    const Tensor inputs = rows_of(hidden, begin, count);
    Tensor logits = rows_of(buffer, 0, count);
    call_out("aten::linear", inputs, weight, bias, logits);
    f(begin, inputs, logits);
  }
}

// Returns grad_hidden, which the caller allocates, grad_weight and grad_bias. gradients(begin, logits) replaces the
// logits of a panel by their gradients.
template <class F>
std::tuple<Tensor, Tensor, Tensor> linear_gradients(const Tensor& hidden, const Tensor& weight,
                                                    const std::optional<Tensor>& bias, const Tensor& buffer,
                                                    const Tensor& grad_hidden, F gradients) {
  const int64_t alphabet = weight.size(0), width = weight.size(1);
  const ScalarType sums = accumulator(weight);
  const bool rounded = sums != weight.scalar_type();  // so are the products, before they are added
  Tensor grad_weight = torch::stable::new_zeros(weight, {alphabet, width}, sums);
  Tensor grad_bias = torch::stable::new_zeros(weight, {alphabet}, sums);
  const Tensor product = rounded ? torch::stable::new_empty(weight, {alphabet, width}) : grad_weight;
  const auto add = [](const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); };
  for_each_panel(hidden, weight, bias, buffer, [&](int64_t begin, const Tensor& inputs, Tensor& grad) {
    gradients(begin, grad);
    call_out("aten::mm", grad, weight, rows_of(grad_hidden, begin, grad.size(0)));
    const Tensor columns = torch::stable::transpose(grad, 0, 1);
    if (rounded) {
      call_out("aten::mm", columns, inputs, product);
      grad_weight = add(grad_weight, product);
    } else {  // with a matrix as its bias, linear adds the product to it
      call_out("aten::linear", columns, torch::stable::transpose(inputs, 0, 1), std::optional(product), product);
    }
    grad_bias = add(grad_bias, torch::stable::sum(grad, int64_t{0}, false, sums));
  });
  return {grad_hidden, torch::stable::to(grad_weight, weight.scalar_type()),
          torch::stable::to(grad_bias, weight.scalar_type())};
}

}  // namespace blt
