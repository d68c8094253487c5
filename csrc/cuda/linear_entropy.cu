// Launchers of linear_entropy.cuh.

#include "linear_entropy.cuh"

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/args/token_entropy.h"
#include "../launch/launch.h"

namespace blt {
namespace {

// hidden, weight and bias after checks, with unit stride in a row.
struct Head {
  Tensor hidden, weight;
  std::optional<Tensor> bias;
  int64_t rows() const { return hidden.size(0); }
  int64_t width() const { return hidden.size(1); }
  int64_t alphabet() const { return weight.size(0); }
};

Head unit_head(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_head(hidden, weight, bias);
  Head head = {unit_rows(hidden, "hidden"), unit_rows(weight, "weight"), std::nullopt};
  if (bias) head.bias = torch::stable::contiguous(*bias);
  return head;
}

template <class T>
Matrix<T> by_rows(const T* data, int64_t rows, int64_t depth, int64_t stride) {
  return {data, rows, depth, stride, 1};
}
// The transpose of rows that are `width` apart.
template <class T>
Matrix<T> by_columns(const T* data, int64_t columns, int64_t depth, int64_t stride) {
  return {data, columns, depth, 1, stride};
}

// f(Constant<n>) for the n numbers that an access to hidden and weight may have.
template <class T, class F>
void dispatch_head(const Matrix<T>& hidden, const Matrix<T>& weight, F&& f) {
  dispatch_pack<T>({address(hidden.data), address(weight.data), bytes_of<T>(hidden.row_stride),
                    bytes_of<T>(weight.row_stride), bytes_of<T>(hidden.depth)},
                   f);
}

std::tuple<Tensor, Tensor> linear_entropy_fwd_cuda(const Tensor& hidden, const Tensor& weight,
                                                   const std::optional<Tensor>& bias) {
  const Head head = unit_head(hidden, weight, bias);
  const Device device(head.hidden);
  Tensor entropy = device_output(head.hidden, {head.rows()}, accumulator(hidden));
  Tensor log_sum = device_output(head.hidden, {head.rows()}, accumulator(hidden));
  dispatch_device_float(hidden.scalar_type(), "hidden", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const auto x = by_rows(device.read<T>(head.hidden), head.rows(), head.width(), head.hidden.stride(0));
    const auto w = by_rows(device.read<T>(head.weight), head.alphabet(), head.width(), head.weight.stride(0));
    dispatch_head(x, w, [&](auto pack) {
      device.launch<linear_entropy_fwd_kernel<T, pack()>>(
          {.grid = {ceil_div<int64_t>(head.rows(), kTileRows)}, .block = kProductThreads}, x, w,
          device.read<T>(head.bias), device.write<A>(entropy), device.write<A>(log_sum));
    });
  });
  return {entropy, log_sum};
}

std::tuple<Tensor, Tensor, Tensor> linear_entropy_bwd_cuda(const Tensor& grad_entropy, const Tensor& hidden,
                                                           const Tensor& weight, const std::optional<Tensor>& bias,
                                                           const Tensor& entropy, const Tensor& log_sum) {
  const Head head = unit_head(hidden, weight, bias);
  const Tensor upstream = check_row_values(grad_entropy, "grad_entropy", hidden);
  const Tensor entropies = check_row_values(entropy, "entropy", hidden),
               log_sums = check_row_values(log_sum, "log_sum", hidden);
  const int64_t rows = head.rows(), width = head.width(), alphabet = head.alphabet();
  const int64_t panel_rows = std::min<int64_t>(rows, kPanelRows),
                most_splits = ceil_div<int64_t>(panel_rows, kSplitRows);
  const ScalarType sums = accumulator(hidden);
  const Device device(head.hidden);
  Tensor grad_hidden = device_output(head.hidden, {rows, width});
  Tensor grad_weight = device_output(head.weight, {alphabet, width});
  Tensor grad_bias = device_output(head.weight, {alphabet});
  Tensor logit_panel = device_output(head.hidden, {panel_rows, alphabet}, sums);
  Tensor grad_panel = device_output(head.hidden, {panel_rows, alphabet});
  Tensor weight_parts = device_output(head.hidden, {most_splits, alphabet, width}, sums);
  Tensor bias_parts = device_output(head.hidden, {most_splits, alphabet}, sums);
  Tensor weight_total = device_output(head.hidden, {alphabet, width}, sums);
  Tensor bias_total = device_output(head.hidden, {alphabet}, sums);
  dispatch_device_float(hidden.scalar_type(), "hidden", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const T *const from = device.read<T>(head.hidden), *const bias_from = device.read<T>(head.bias);
    const T* const weight_from = device.read<T>(head.weight);
    const A *const up = device.read<A>(upstream), *const h = device.read<A>(entropies);
    const A* const log_s = device.read<A>(log_sums);
    T *const to = device.write<T>(grad_hidden), *const g = device.write<T>(grad_panel);
    A* const x = device.write<A>(logit_panel);
    const int64_t stride = head.hidden.stride(0), weight_stride = head.weight.stride(0);
    const auto blocks_of = [](int64_t m, int64_t n) {
      return ceil_div<int64_t>(m, kTileRows) * ceil_div<int64_t>(n, kTileColumns);
    };
    // No rows at all still make one panel, whose sums are zeros.
    for (int64_t begin = 0; begin == 0 || begin < rows; begin += kPanelRows) {
      const int64_t count = std::min<int64_t>(kPanelRows, rows - begin), splits = ceil_div<int64_t>(count, kSplitRows);
      const auto panel = by_rows(from + begin * stride, count, width, stride);
      const auto w = by_rows(weight_from, alphabet, width, weight_stride);
      dispatch_head(panel, w, [&](auto pack) {
        device.launch<linear_entropy_logits_kernel<T, pack()>>(
            {.grid = {ceil_div<int64_t>(count, kTileRows)}, .block = kProductThreads}, panel, w, bias_from, up + begin,
            h + begin, log_s + begin, x, g);
      });
      device.launch<product_kernel<T, T>>(
          {.grid = {blocks_of(count, width)}, .block = kProductThreads}, by_rows<T>(g, count, alphabet, alphabet),
          by_columns(weight_from, width, alphabet, weight_stride), alphabet, 0, to + begin * width);
      device.launch<product_kernel<T, A>>({.grid = {blocks_of(alphabet, width), splits}, .block = kProductThreads},
                                          by_columns<T>(g, alphabet, count, alphabet),
                                          by_columns(from + begin * stride, width, count, stride), kSplitRows,
                                          alphabet * width, device.write<A>(weight_parts));
      device.launch<column_sums_kernel<T>>(
          {.grid = {ceil_div<int64_t>(alphabet, kSumThreads), splits}, .block = kSumThreads}, g, count, alphabet,
          device.write<A>(bias_parts));
      const auto add_splits = [&](Tensor& parts, int64_t size, Tensor& total, Tensor& out) {
        device.launch<add_splits_kernel<T>>({.grid = {ceil_div<int64_t>(size, kSumThreads)}, .block = kSumThreads},
                                            device.read<A>(parts), splits, size, begin == 0, begin + count == rows,
                                            device.write<A>(total), device.write<T>(out));
      };
      add_splits(weight_parts, alphabet * width, weight_total, grad_weight);
      add_splits(bias_parts, alphabet, bias_total, grad_bias);
    }
  });
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("linear_entropy_fwd", TORCH_BOX(&linear_entropy_fwd_cuda));
  m.impl("linear_entropy_bwd", TORCH_BOX(&linear_entropy_bwd_cuda));
}

}  // namespace blt
