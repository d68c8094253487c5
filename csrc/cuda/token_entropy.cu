// Launches the kernels of token_entropy.cuh: token_entropy, and linear_entropy by panels of logits (output_head.h).

#include <optional>
#include <tuple>

#include "../common/box.h"
#include "../common/output_head.h"
#include "token_entropy.h"

namespace blt {
namespace {

void launch_fwd(const Device& device, const Tensor& rows, Tensor entropy, Tensor log_sum) {
  dispatch_device_float(rows.scalar_type(), "logits", [&]<class T>(Tag<T>) {
    device.launch<token_entropy_fwd_kernel<T>>(entropy_config<T>(rows.size(0)), logit_rows<T>(device, rows),
                                               device.write<acc_t<T>>(entropy), device.write<acc_t<T>>(log_sum));
  });
}

// `grad` may be `rows`.
void launch_bwd(const Device& device, const Tensor& grad_entropy, const Tensor& rows, const Tensor& entropy,
                const Tensor& log_sum, Tensor& grad) {
  dispatch_device_float(rows.scalar_type(), "logits", [&]<class T>(Tag<T>) {
    using A = acc_t<T>;
    const LogitRows<T> in = logit_rows<T>(device, rows);
    T* const out = device.write<T>(grad);
    const int64_t apart = (address(out) - address(in.data)) | (row_bytes(grad) - row_bytes(rows));
    const auto launch = [&](auto aligned) {
      device.launch<token_entropy_bwd_kernel<T, aligned()>>(entropy_config<T>(rows.size(0)),
                                                            device.read<A>(grad_entropy), in, device.read<A>(entropy),
                                                            device.read<A>(log_sum), out, grad.stride(0));
    };
    apart % 16 == 0 ? launch(std::true_type{}) : launch(std::false_type{});
  });
}

EntropyTensors token_entropy_fwd_cuda(const Tensor& logits) {
  const Tensor rows = check_logits(logits);
  const Device device(rows);
  const auto [entropy, log_sum] = entropy_outputs(rows);
  launch_fwd(device, rows, entropy, log_sum);
  return {entropy, log_sum};
}

Tensor token_entropy_bwd_cuda(const Tensor& grad_entropy, const Tensor& logits, const Tensor& entropy,
                              const Tensor& log_sum) {
  const Tensor rows = check_logits(logits);
  const Tensor upstream = check_row_values(grad_entropy, "grad_entropy", rows);
  const Tensor entropies = check_row_values(entropy, "entropy", rows);
  const Tensor log_sums = check_row_values(log_sum, "log_sum", rows);
  const Device device(rows);
  Tensor grad = device_output(rows, {rows.size(0), rows.size(1)});
  launch_bwd(device, upstream, rows, entropies, log_sums, grad);
  return grad;
}

// --- linear_entropy --------------------------------------------------------------------------------------------------

EntropyTensors linear_entropy_fwd_cuda(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_head(hidden, weight, bias);
  const Device device(hidden);
  const auto [entropy, log_sum] = entropy_outputs(hidden);
  for_each_panel(hidden, weight, bias, panel_of(hidden, weight),
                 [&, &entropy = entropy, &log_sum = log_sum](int64_t begin, const Tensor&, const Tensor& logits) {
                   const int64_t count = logits.size(0);
                   launch_fwd(device, logits, rows_of(entropy, begin, count), rows_of(log_sum, begin, count));
                 });
  return {entropy, log_sum};
}

std::tuple<Tensor, Tensor, Tensor> linear_entropy_bwd_cuda(const Tensor& grad_entropy, const Tensor& hidden,
                                                           const Tensor& weight, const std::optional<Tensor>& bias,
                                                           const Tensor& entropy, const Tensor& log_sum) {
  check_head(hidden, weight, bias);
  const Tensor upstream = check_row_values(grad_entropy, "grad_entropy", hidden);
  const Tensor entropies = check_row_values(entropy, "entropy", hidden);
  const Tensor log_sums = check_row_values(log_sum, "log_sum", hidden);
  const Device device(hidden);
  const Tensor grad_hidden = device_output(hidden, {hidden.size(0), hidden.size(1)});
  return linear_gradients(hidden, weight, bias, panel_of(hidden, weight), grad_hidden,
                          [&](int64_t begin, Tensor& logits) {
                            const auto own = [&](const Tensor& x) { return rows_of(x, begin, logits.size(0)); };
                            launch_bwd(device, own(upstream), logits, own(entropies), own(log_sums), logits);
                          });
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("token_entropy_fwd", BLT_KERNELS_BOX(&token_entropy_fwd_cuda));
  m.impl("token_entropy_bwd", BLT_KERNELS_BOX(&token_entropy_bwd_cuda));
  m.impl("linear_entropy_fwd", BLT_KERNELS_BOX(&linear_entropy_fwd_cuda));
  m.impl("linear_entropy_bwd", BLT_KERNELS_BOX(&linear_entropy_bwd_cuda));
}

}  // namespace blt
