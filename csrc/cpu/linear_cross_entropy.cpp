// linear_cross_entropy computes the loss of each row of an output head, and the gradients of the head and its inputs.
//
//   loss = log sum_a exp(x_a) - x_target,  x = hidden weight^T + bias
//   dloss/dx = softmax(x) - onehot(target)
//
// output_head.h computes the logits a panel of rows at a time, and the gradients from those of the logits, which take
// their place. Rows of a panel are spread over the threads; token_entropy.h has the arithmetic of one row. The panel is
// read twice from the cache forward, and read twice and written once backward, beside 2 D and 6 D flops for a logit.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../common/args/linear_cross_entropy.h"
#include "../common/box.h"
#include "../common/dispatch.h"
#include "../common/output_head.h"
#include "support/alloc.h"
#include "support/parallel.h"
#include "token_entropy.h"

namespace blt {
namespace {

template <class A>
inline constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

std::tuple<Tensor, Tensor> linear_cross_entropy_fwd_cpu(const Tensor& hidden, const Tensor& weight,
                                                        const Tensor& targets, const std::optional<Tensor>& bias,
                                                        int64_t ignore_index) {
  const Tensor columns = check_targets(hidden, weight, targets, bias);
  Tensor loss = new_output(hidden, {hidden.size(0)}, accumulator(hidden));
  Tensor log_sum = new_output(hidden, {hidden.size(0)}, accumulator(hidden));
  dispatch_float(hidden.scalar_type(), "hidden", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    A *const losses = loss.mutable_data_ptr<A>(), *const log_sums = log_sum.mutable_data_ptr<A>();
    const int64_t* const target = columns.const_data_ptr<int64_t>();
    const RowShape<T> shape(weight.size(0));
    for_each_panel(hidden, weight, bias, panel_of(hidden, weight),
                   [&](int64_t first, const Tensor&, const Tensor& logits) {
                     const T* const rows = logits.const_data_ptr<T>();
                     parallel_for(logits.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) {
                         const int64_t t = target[first + i];
                         const bool ignored = t == ignore_index, inside = t >= 0 && t < shape.width;
                         Loss<A> row = {kNaN<A>, kNaN<A>};
                         if (ignored || inside) row = row_loss(rows + i * shape.width, shape, inside ? t : 0);
                         losses[first + i] = ignored ? A(0) : row.loss;
                         log_sums[first + i] = row.log_sum;
                       }
                     });
                   });
  });
  return {loss, log_sum};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd_cpu(const Tensor& grad_loss, const Tensor& hidden,
                                                                const Tensor& weight, const Tensor& targets,
                                                                const std::optional<Tensor>& bias, int64_t ignore_index,
                                                                const Tensor& log_sum) {
  const Tensor columns = check_targets(hidden, weight, targets, bias);
  const Tensor upstream = check_row_values(grad_loss, "grad_loss", hidden);
  const Tensor log_sums = check_row_values(log_sum, "log_sum", hidden);
  const Tensor grad_hidden = new_output(hidden, {hidden.size(0), hidden.size(1)});
  return dispatch_float(hidden.scalar_type(), "hidden", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    const A *const up = upstream.const_data_ptr<A>(), *const log_s = log_sums.const_data_ptr<A>();
    const int64_t* const target = columns.const_data_ptr<int64_t>();
    const RowShape<T> shape(weight.size(0));
    return linear_gradients(hidden, weight, bias, panel_of(hidden, weight), grad_hidden,
                            [&](int64_t first, Tensor& logits) {
                              T* const rows = logits.mutable_data_ptr<T>();
                              parallel_for(logits.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  T* const row = rows + i * shape.width;
                                  const int64_t r = first + i, t = target[r];
                                  if (t == ignore_index)
                                    std::fill(row, row + shape.width, T(0.0f));
                                  else if (t < 0 || t >= shape.width)
                                    std::fill(row, row + shape.width, T(std::numeric_limits<float>::quiet_NaN()));
                                  else
                                    row_loss_grad(row, row, shape, up[r], log_s[r], t);
                                }
                              });
                            });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("linear_cross_entropy_fwd", BLT_KERNELS_BOX(&linear_cross_entropy_fwd_cpu));
  m.impl("linear_cross_entropy_bwd", BLT_KERNELS_BOX(&linear_cross_entropy_bwd_cpu));
}

}  // namespace blt
