// Launchers of token_entropy.cuh.

#include "token_entropy.h"

#include <tuple>

namespace blt {
namespace {

std::tuple<Tensor, Tensor> token_entropy_fwd_cuda(const Tensor& logits) {
  const Tensor rows = check_logits(logits);
  const Device device(rows);
  Tensor entropy = device_output(rows, {rows.size(0)}, accumulator(rows));
  Tensor log_sum = device_output(rows, {rows.size(0)}, accumulator(rows));
  dispatch_device_float(rows.scalar_type(), "logits", [&](auto tag) {
    using T = typename decltype(tag)::type;
    device.launch<token_entropy_fwd_kernel<T>>(entropy_config<T>(rows.size(0)), logit_rows<T>(device, rows),
                                               device.write<acc_t<T>>(entropy), device.write<acc_t<T>>(log_sum));
  });
  return {entropy, log_sum};
}

Tensor token_entropy_bwd_cuda(const Tensor& grad_entropy, const Tensor& logits, const Tensor& entropy,
                              const Tensor& log_sum) {
  const Tensor rows = check_logits(logits);
  const Tensor upstream = check_row_values(grad_entropy, "grad_entropy", rows);
  const Tensor entropies = check_row_values(entropy, "entropy", rows),
               log_sums = check_row_values(log_sum, "log_sum", rows);
  const Device device(rows);
  Tensor grad = device_output(rows, {rows.size(0), rows.size(1)});
  dispatch_device_float(rows.scalar_type(), "logits", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const LogitRows<T> in = logit_rows<T>(device, rows);
    T* const out = device.write<T>(grad);
    const int64_t apart = (address(out) - address(in.data)) | (row_bytes(grad) - row_bytes(rows));
    const auto launch = [&](auto aligned) {
      device.launch<token_entropy_bwd_kernel<T, aligned()>>(entropy_config<T>(rows.size(0)), device.read<A>(upstream),
                                                            in, device.read<A>(entropies), device.read<A>(log_sums),
                                                            out);
    };
    apart % 16 == 0 ? launch(std::true_type{}) : launch(std::false_type{});
  });
  return grad;
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("token_entropy_fwd", TORCH_BOX(&token_entropy_fwd_cuda));
  m.impl("token_entropy_bwd", TORCH_BOX(&token_entropy_bwd_cuda));
}

}  // namespace blt
