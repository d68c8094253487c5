// few_row_linear multiplies a few rows by a weight matrix, in fp32: y = norm(x) weight^T + factor residual, where the
// norm and the residual are optional.
//
// The calling thread normalizes the rows, since they are few. Then the threads share the outputs (few_row_product.h).

#include <torch/csrc/stable/library.h>

#include <memory>

#include "../common/box.h"
#include "few_row_product.h"
#include "support/alloc.h"

namespace blt {
namespace {

Tensor few_row_linear_fwd_cpu(const Tensor& x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> norm,
                              double eps, const std::optional<Tensor>& residual, double residual_factor) {
  check_dim(x, "x", 2);
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor inputs = check_fp32_rows(x, "x", width);
  check_weight(weight, scale, "weight", width);
  const int64_t outputs = weight.size(0);
  Tensor y = new_output(x, {rows, outputs});
  Matrix from = {inputs.const_data_ptr<float>(), inputs.stride(0)};
  std::unique_ptr<float[]> normalized;
  if (norm) {
    check_norm(*norm, "norm", width);
    normalized = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(rows * width));
    normalize(normalized.get(), from, rows, width, norm->const_data_ptr<float>(), static_cast<float>(eps));
    from = {normalized.get(), width};
  }
  const Product product = {{weight, scale}, y.mutable_data_ptr<float>()};
  if (residual) {
    const Tensor added = check_fp32_rows(*residual, "residual", outputs);
    check_size(added, "residual", 0, rows);
    multiply_and_add(product, from, rows, width, {added.const_data_ptr<float>(), added.stride(0)},
                     static_cast<float>(residual_factor));
  } else {
    multiply_all({&product, 1}, from, rows, width, [](const Product&, int64_t, int64_t) {});
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("few_row_linear_fwd", BLT_KERNELS_BOX(&few_row_linear_fwd_cpu));
}

}  // namespace blt
