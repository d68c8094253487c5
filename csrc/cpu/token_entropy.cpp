// token_entropy: the entropy of each row of logits, and its gradient; linear_entropy: the same of an output head's logits.
//
// Rows are spread over the threads; token_entropy.h has the arithmetic of one row. Bytes moved for [T, 260] fp32 logits:
// 1040 read and 8 written a row forward, 1052 read and 1040 written backward.
// linear_entropy computes the logits tile by tile and reduces each tile while it is in the cache.

#include "token_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "../common/args/token_entropy.h"
#include "../common/dispatch.h"
#include "support/alloc.h"
#include "support/parallel.h"

namespace blt {
namespace {

constexpr int64_t kRowGrain = 64;     // the fewest rows of logits worth a thread
constexpr int64_t kHeadRows = 1024;   // rows in a tile of the output head: 1 MB of fp32 logits
constexpr int64_t kSumGrain = 16384;  // elements of a running sum

// entropy[i], log_sum[i] of logits[i] for the first `count` rows; the outputs are contiguous, the logits have unit stride in
// a row. The other rows are not read: their entropy is 0, their log_sum kUnread.
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

template <class T>
void entropy_grad_rows(const Tensor& grad, const Tensor& logits, const accumulator_t<T>* upstream,
                       const accumulator_t<T>* entropy, const accumulator_t<T>* log_sum) {
  const T* const data = logits.const_data_ptr<T>();
  T* const out = grad.mutable_data_ptr<T>();
  const int64_t stride = logits.stride(0), width = logits.size(1);
  const RowShape<T> shape(width);
  parallel_for(logits.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* const row = out + i * width;
      if (log_sum[i] == kUnread)
        std::fill(row, row + width, T(0.0f));
      else
        row_entropy_grad(row, data + i * stride, shape, upstream[i], {entropy[i], log_sum[i]});
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> entropies_of_rows(const Tensor& rows, int64_t count) {
  Tensor entropy = torch::stable::new_empty(rows, {rows.size(0)}, accumulator(rows));
  Tensor log_sum = torch::stable::new_empty(rows, {rows.size(0)}, accumulator(rows));
  dispatch_float(rows.scalar_type(), "logits", [&](auto tag) {
    using T = typename decltype(tag)::type;
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
  dispatch_float(rows.scalar_type(), "logits", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    entropy_grad_rows<T>(grad, rows, upstream.const_data_ptr<A>(), entropies.const_data_ptr<A>(),
                         log_sums.const_data_ptr<A>());
  });
  return grad;
}

// --- linear_entropy ---------------------------------------------------------------------------------------------------

// out = op(args...) through torch's dispatcher, for ops whose last argument is `out`.
template <class... Args>
void call_out(const char* op, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the result holds
}

Tensor rows_of(const Tensor& x, int64_t begin, int64_t count) {
  Tensor source = x;
  return torch::stable::narrow(source, 0, begin, count);
}

// Calls f(begin, count, hidden rows, logits) for each tile of rows; the logits live in one buffer that is used again.
template <class F>
void for_each_tile(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, F f) {
  const int64_t rows = hidden.size(0);
  Tensor buffer = torch::stable::new_empty(hidden, {std::min(rows, kHeadRows), weight.size(0)});
  for (int64_t begin = 0; begin < rows; begin += kHeadRows) {
    const int64_t count = std::min(kHeadRows, rows - begin);
    const Tensor tile = rows_of(hidden, begin, count), logits = rows_of(buffer, 0, count);
    call_out("aten::linear", tile, weight, bias, logits);
    f(begin, count, tile, logits);
  }
}

std::tuple<Tensor, Tensor> linear_entropy_fwd_cpu(const Tensor& hidden, const Tensor& weight,
                                                  const std::optional<Tensor>& bias) {
  check_head(hidden, weight, bias);
  Tensor entropy = torch::stable::new_empty(hidden, {hidden.size(0)}, accumulator(hidden));
  Tensor log_sum = torch::stable::new_empty(hidden, {hidden.size(0)}, accumulator(hidden));
  dispatch_float(hidden.scalar_type(), "hidden", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    A* const entropies = entropy.mutable_data_ptr<A>();
    A* const log_sums = log_sum.mutable_data_ptr<A>();
    for_each_tile(hidden, weight, bias, [&](int64_t begin, int64_t, const Tensor&, const Tensor& logits) {
      entropy_rows<T>(logits, logits.size(0), entropies + begin, log_sums + begin);
    });
  });
  return {entropy, log_sum};
}

// sums += x, element by element.
template <class T, class A>
void add_to(A* sums, const T* x, int64_t size) {
  parallel_for(size, kSumGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] += static_cast<A>(x[i]);
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_entropy_bwd_cpu(const Tensor& grad_entropy, const Tensor& hidden,
                                                          const Tensor& weight, const std::optional<Tensor>& bias,
                                                          const Tensor& entropy, const Tensor& log_sum) {
  check_head(hidden, weight, bias);
  const Tensor upstream = check_row_values(grad_entropy, "grad_entropy", hidden);
  const Tensor entropies = check_row_values(entropy, "entropy", hidden);
  const Tensor log_sums = check_row_values(log_sum, "log_sum", hidden);
  const int64_t rows = hidden.size(0), alphabet = weight.size(0), width = weight.size(1);
  Tensor grad_hidden = new_output(hidden, {rows, width});
  Tensor weight_sum = torch::stable::new_zeros(weight, {alphabet, width}, accumulator(weight));
  Tensor bias_sum = torch::stable::new_zeros(weight, {alphabet}, accumulator(weight));
  dispatch_float(hidden.scalar_type(), "hidden", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const A *const grads = upstream.const_data_ptr<A>(), *const h = entropies.const_data_ptr<A>();
    const A* const log_s = log_sums.const_data_ptr<A>();
    A* const bias_sums = bias_sum.mutable_data_ptr<A>();
    Tensor buffer = torch::stable::new_empty(hidden, {std::min(rows, kHeadRows), alphabet});
    Tensor product = torch::stable::new_empty(weight, {alphabet, width});
    for_each_tile(hidden, weight, bias, [&](int64_t begin, int64_t count, const Tensor& tile, const Tensor& logits) {
      Tensor grad = rows_of(buffer, 0, count);
      entropy_grad_rows<T>(grad, logits, grads + begin, h + begin, log_s + begin);
      call_out("aten::mm", grad, weight, rows_of(grad_hidden, begin, count));
      call_out("aten::mm", torch::stable::transpose(grad, 0, 1), tile, product);
      add_to(weight_sum.mutable_data_ptr<A>(), product.const_data_ptr<T>(), alphabet * width);
      const T* const g = grad.const_data_ptr<T>();
      for (int64_t i = 0; i < count; ++i)
        for (int64_t a = 0; a < alphabet; ++a) bias_sums[a] += static_cast<A>(g[i * alphabet + a]);
    });
  });
  const auto rounded = [&](const Tensor& sum) { return torch::stable::to(sum, weight.scalar_type()); };
  return {grad_hidden, rounded(weight_sum), rounded(bias_sum)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("token_entropy_fwd", TORCH_BOX(&token_entropy_fwd_cpu));
  m.impl("token_entropy_bwd", TORCH_BOX(&token_entropy_bwd_cpu));
  m.impl("linear_entropy_fwd", TORCH_BOX(&linear_entropy_fwd_cpu));
  m.impl("linear_entropy_bwd", TORCH_BOX(&linear_entropy_bwd_cpu));
}

}  // namespace blt
