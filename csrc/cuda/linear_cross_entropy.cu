// Launches the kernels of linear_cross_entropy.cuh on panels of logits (output_head.h).

#include <optional>
#include <tuple>

#include "../common/args/linear_cross_entropy.h"
#include "../common/box.h"
#include "../common/output_head.h"
#include "linear_cross_entropy.cuh"
#include "token_entropy.h"

namespace blt {
namespace {

EntropyTensors linear_cross_entropy_fwd_cuda(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                             const std::optional<Tensor>& bias, int64_t ignore_index) {
  const Tensor columns = check_targets(hidden, weight, targets, bias);
  const Device device(hidden);
  const auto [losses, log_sums] = entropy_outputs(hidden);
  for_each_panel(hidden, weight, bias, panel_of(hidden, weight),
                 [&, &losses = losses, &log_sums = log_sums](int64_t begin, const Tensor&, const Tensor& logits) {
                   const auto own = [&](const Tensor& x) { return rows_of(x, begin, logits.size(0)); };
                   Tensor loss = own(losses), log_sum = own(log_sums);
                   dispatch_device_float(logits.scalar_type(), "hidden", [&]<class T>(Tag<T>) {
                     device.launch<linear_cross_entropy_fwd_kernel<T>>(
                         entropy_config<T>(logits.size(0)), logit_rows<T>(device, logits),
                         device.read<i64>(own(columns)), ignore_index, device.write<acc_t<T>>(loss),
                         device.write<acc_t<T>>(log_sum));
                   });
                 });
  return {losses, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd_cuda(const Tensor& grad_loss, const Tensor& hidden,
                                                                 const Tensor& weight, const Tensor& targets,
                                                                 const std::optional<Tensor>& bias,
                                                                 int64_t ignore_index, const Tensor& log_sum) {
  const Tensor columns = check_targets(hidden, weight, targets, bias);
  const Tensor upstream = check_row_values(grad_loss, "grad_loss", hidden);
  const Tensor log_sums = check_row_values(log_sum, "log_sum", hidden);
  const Device device(hidden);
  const Tensor grad_hidden = device_output(hidden, {hidden.size(0), hidden.size(1)});
  return linear_gradients(
      hidden, weight, bias, panel_of(hidden, weight), grad_hidden, [&](int64_t begin, Tensor& logits) {
        const auto own = [&](const Tensor& x) { return rows_of(x, begin, logits.size(0)); };
        dispatch_device_float(logits.scalar_type(), "hidden", [&]<class T>(Tag<T>) {
          using A = acc_t<T>;
          device.launch<linear_cross_entropy_bwd_kernel<T>>(
              entropy_config<T>(logits.size(0)), device.read<A>(own(upstream)), logit_rows<T>(device, logits),
              device.read<i64>(own(columns)), ignore_index, device.read<A>(own(log_sums)), device.write<T>(logits));
        });
      });
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("linear_cross_entropy_fwd", BLT_KERNELS_BOX(&linear_cross_entropy_fwd_cuda));
  m.impl("linear_cross_entropy_bwd", BLT_KERNELS_BOX(&linear_cross_entropy_bwd_cuda));
}

}  // namespace blt
