// token_entropy computes the entropy of each row of logits, and its gradient. linear_entropy does so for the logits of
// an output head.
//
// Rows are spread over the threads; token_entropy.h has the arithmetic of one row. Bytes moved for [T, 260] fp32
// logits: 1040 read and 8 written a row forward, 1052 read and 1040 written backward.
// linear_entropy takes the logits panel by panel (output_head.h).

#include "token_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../common/args/token_entropy.h"
#include "../common/box.h"
#include "../common/dispatch.h"
#include "../common/output_head.h"
#include "support/alloc.h"
#include "support/parallel.h"

namespace blt {
namespace {

// Writes entropy[i] and log_sum[i] of logits[i] for the first `count` rows. The outputs are contiguous, the logits have
// unit stride in a row. The other rows are not read: their entropy is 0, their log_sum kUnread.
template <class T>
void entropy_rows(const Tensor& logits, int64_t count, accumulator_t<T>* entropy, accumulator_t<T>* log_sum) {
  const T* const data = logits.const_data_ptr<T>();
  const int64_t stride = logits.stride(0);
  const RowShape<T> shape(logits.size(1));
  parallel_for(count, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto row = row_entropy(data + i * stride, shape);
      entropy[i] = row.entropy;
      log_sum[i] = row.log_sum;
    }
  });
  std::fill(entropy + count, entropy + logits.size(0), accumulator_t<T>(0));
  std::fill(log_sum + count, log_sum + logits.size(0), accumulator_t<T>(kUnread));
}

// `grad` may be `logits`.
template <class T>
void entropy_grad_rows(Tensor& grad, const Tensor& logits, const accumulator_t<T>* upstream,
                       const accumulator_t<T>* entropy, const accumulator_t<T>* log_sum) {
  const T* const data = logits.const_data_ptr<T>();
  T* const out = grad.mutable_data_ptr<T>();
  const int64_t stride = logits.stride(0), out_stride = grad.stride(0), width = logits.size(1);
  const RowShape<T> shape(width);
  parallel_for(logits.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* const row = out + i * out_stride;
      if (log_sum[i] == kUnread)
        std::fill(row, row + width, T(0.0f));
      else
        row_entropy_grad(row, data + i * stride, shape, upstream[i], {entropy[i], log_sum[i]});
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> entropies_of_rows(const Tensor& rows, int64_t count) {
  Tensor entropy = new_output(rows, {rows.size(0)}, accumulator(rows));
  Tensor log_sum = new_output(rows, {rows.size(0)}, accumulator(rows));
  dispatch_float(rows.scalar_type(), "logits", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    entropy_rows<T>(rows, count, entropy.mutable_data_ptr<A>(), log_sum.mutable_data_ptr<A>());
  });
  return {entropy, log_sum};
}

namespace {

std::tuple<Tensor, Tensor> token_entropy_fwd_cpu(const Tensor& logits) {
  const Tensor rows = check_logits(logits);
  return entropies_of_rows(rows, rows.size(0));
}

Tensor token_entropy_bwd_cpu(const Tensor& grad_entropy, const Tensor& logits, const Tensor& entropy,
                             const Tensor& log_sum) {
  const Tensor rows = check_logits(logits);
  const Tensor upstream = check_row_values(grad_entropy, "grad_entropy", rows);
  const Tensor entropies = check_row_values(entropy, "entropy", rows);
  const Tensor log_sums = check_row_values(log_sum, "log_sum", rows);
  Tensor grad = new_output(rows, {rows.size(0), rows.size(1)});
  dispatch_float(rows.scalar_type(), "logits", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    entropy_grad_rows<T>(grad, rows, upstream.const_data_ptr<A>(), entropies.const_data_ptr<A>(),
                         log_sums.const_data_ptr<A>());
  });
  return grad;
}

// --- linear_entropy --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> linear_entropy_fwd_cpu(const Tensor& hidden, const Tensor& weight,
                                                  const std::optional<Tensor>& bias) {
  check_head(hidden, weight, bias);
  Tensor entropy = new_output(hidden, {hidden.size(0)}, accumulator(hidden));
  Tensor log_sum = new_output(hidden, {hidden.size(0)}, accumulator(hidden));
  dispatch_float(hidden.scalar_type(), "hidden", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    A *const h = entropy.mutable_data_ptr<A>(), *const log_s = log_sum.mutable_data_ptr<A>();
    for_each_panel(hidden, weight, bias, panel_of(hidden, weight),
                   [&](int64_t begin, const Tensor&, const Tensor& logits) {
                     entropy_rows<T>(logits, logits.size(0), h + begin, log_s + begin);
                   });
  });
  return {entropy, log_sum};
}

std::tuple<Tensor, Tensor, Tensor> linear_entropy_bwd_cpu(const Tensor& grad_entropy, const Tensor& hidden,
                                                          const Tensor& weight, const std::optional<Tensor>& bias,
                                                          const Tensor& entropy, const Tensor& log_sum) {
  check_head(hidden, weight, bias);
  const Tensor upstream = check_row_values(grad_entropy, "grad_entropy", hidden);
  const Tensor entropies = check_row_values(entropy, "entropy", hidden);
  const Tensor log_sums = check_row_values(log_sum, "log_sum", hidden);
  const Tensor grad_hidden = new_output(hidden, {hidden.size(0), hidden.size(1)});
  return dispatch_float(hidden.scalar_type(), "hidden", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    const A *const up = upstream.const_data_ptr<A>(), *const h = entropies.const_data_ptr<A>();
    const A* const log_s = log_sums.const_data_ptr<A>();
    return linear_gradients(hidden, weight, bias, panel_of(hidden, weight), grad_hidden,
                            [&](int64_t begin, Tensor& logits) {
                              entropy_grad_rows<T>(logits, logits, up + begin, h + begin, log_s + begin);
                            });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("token_entropy_fwd", BLT_KERNELS_BOX(&token_entropy_fwd_cpu));
  m.impl("token_entropy_bwd", BLT_KERNELS_BOX(&token_entropy_bwd_cpu));
  m.impl("linear_entropy_fwd", BLT_KERNELS_BOX(&linear_entropy_fwd_cpu));
  m.impl("linear_entropy_bwd", BLT_KERNELS_BOX(&linear_entropy_bwd_cpu));
}

}  // namespace blt
