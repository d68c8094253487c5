// Launches the kernels of entropy_patch.cuh, with every rule that divides a text into patches.

#include "entropy_patch.cuh"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "../common/box.h"
#include "patch_layout.h"
#include "token_entropy.h"

namespace blt {
namespace {

Rounding rounding_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return Rounding::kBf16;
    case ScalarType::Half: return Rounding::kFp16;
    case ScalarType::Double: return Rounding::kFp64;
    default: return Rounding::kFp32;
  }
}

// Calls f with the EntropyRule of entropies, which are compared in `dtype`.
template <class F>
LayoutTensors dispatch_rule(const Device& device, const Tensor& entropy, ScalarType dtype, double threshold,
                            std::optional<double> threshold_add, bool monotonic, F&& f) {
  const EntropyMode mode = monotonic       ? EntropyMode::kMonotonic
                           : threshold_add ? EntropyMode::kBoth
                                           : EntropyMode::kGlobal;
  return dispatch_device_float(entropy.scalar_type(), "entropy", [&]<class T>(Tag<T>) {
    const auto rounded = [&](double x) {
      return static_cast<acc_t<T>>(
          dispatch_float(dtype, "compare", [&]<class R>(Tag<R>) -> double { return round_to<R>(x); }));
    };
    return f(EntropyRule<T>{device.read<T>(entropy), rounded(threshold), rounded(threshold_add.value_or(0)), mode,
                            rounding_of(dtype)});
  });
}

LayoutTensors patch_starts_fwd_cuda(const Tensor& entropy, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                    double threshold, std::optional<double> threshold_add, bool monotonic,
                                    std::optional<int64_t> max_patch_length, std::string compare,
                                    std::optional<int64_t> max_patches) {
  const Tensor values = check_values(entropy, "entropy");
  const Device device(values);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, values.size(0));
  const ScalarType dtype = check_compare(compare, entropy);
  return dispatch_rule(device, values, dtype, threshold, threshold_add, monotonic, [&](const auto& rule) {
    return build_layout(device, rule, documents, values, max_patch_length, max_patches);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> entropy_patch_fwd_cuda(
    const Tensor& logits, std::optional<Tensor> cu_seqlens, int64_t num_documents, double threshold,
    std::optional<double> threshold_add, bool monotonic, std::optional<int64_t> max_patch_length, std::string compare,
    std::optional<int64_t> max_patches) {
  const ScalarType dtype = check_compare(compare, logits);
  const Tensor rows = check_logits(logits);
  const Device device(rows);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, rows.size(0));
  const Plan plan = plan_layout(device, documents, rows, max_patches);
  EntropyTensors outputs = entropy_outputs(rows);
  Tensor &entropy = std::get<0>(outputs), &log_sum = std::get<1>(outputs);
  dispatch_device_float(rows.scalar_type(), "logits", [&]<class T>(Tag<T>) {
    LaunchConfig config = entropy_config<T>(rows.size(0));
    config.grid.x = std::max<int64_t>(config.grid.x, 1);
    device.launch<entropy_patch_fwd_kernel<T>>(config, logit_rows<T>(device, rows), documents, plan.scratch,
                                               device.write<acc_t<T>>(entropy), device.write<acc_t<T>>(log_sum));
  });
  LayoutTensors layout =
      dispatch_rule(device, entropy, dtype, threshold, threshold_add, monotonic,
                    [&](const auto& rule) { return launch_layout(device, rule, plan, max_patch_length); });
  return std::tuple_cat(std::move(outputs), std::move(layout));
}

// Builds a layout by the rule that rule_of(ids) returns.
template <class F>
LayoutTensors layout_of_tokens(const Tensor& tokens, std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                               std::optional<int64_t> max_patches, F&& rule_of) {
  const Tensor ids = check_values(tokens, "tokens");
  const Device device(ids);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, ids.size(0));
  return dispatch_tokens(ids, [&]<class T>(Tag<T>) {
    return build_layout(device, rule_of(device.read<T>(ids)), documents, ids, std::nullopt, max_patches);
  });
}

LayoutTensors space_patch_fwd_cuda(const Tensor& tokens, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                   std::optional<int64_t> max_patches) {
  return layout_of_tokens(tokens, cu_seqlens, num_documents, max_patches,
                          []<class T>(const T* ids) { return SpaceRule<T>{ids}; });
}

LayoutTensors static_patch_fwd_cuda(Tensor cu_seqlens, int64_t num_bytes, int64_t size, int64_t first,
                                    std::optional<int64_t> max_patches) {
  check_static_patch(num_bytes, size, first);
  const Device device(cu_seqlens);
  std::optional<Tensor> given = cu_seqlens;
  const Documents documents = check_documents(device, given, 0, num_bytes);
  const auto clamped = [](int64_t x) { return static_cast<i32>(std::min<int64_t>(x, kNoLimit)); };
  return build_layout(device, StaticRule{clamped(size), clamped(first)}, documents, cu_seqlens, std::nullopt,
                      max_patches);
}

LayoutTensors delimiter_patch_fwd_cuda(const Tensor& tokens, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                       int64_t id, std::optional<int64_t> max_patches) {
  return layout_of_tokens(tokens, cu_seqlens, num_documents, max_patches,
                          [=]<class T>(const T* ids) { return DelimiterRule<T>{ids, id}; });
}

LayoutTensors topk_patch_fwd_cuda(const Tensor& entropy, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                  int64_t patch_size, std::optional<int64_t> max_patches) {
  check_patch_size(patch_size);
  const Tensor values = check_values(entropy, "entropy");
  const Device device(values);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, values.size(0));
  Tensor boundaries = device_output(values, {values.size(0)}, ScalarType::Byte);
  u8* const chosen = device.write<u8>(boundaries);
  dispatch_device_float(values.scalar_type(), "entropy", [&]<class T>(Tag<T>) {
    device.launch<topk_patch_fwd_kernel<T>>({.grid = {documents.count}, .block = kTopkThreads}, device.read<T>(values),
                                            documents, static_cast<i32>(std::min<int64_t>(patch_size, kNoLimit)),
                                            chosen);
  });
  return build_layout(device, GivenRule{chosen}, documents, values, std::nullopt, max_patches);
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("entropy_patch_fwd", BLT_KERNELS_BOX(&entropy_patch_fwd_cuda));
  m.impl("patch_starts_fwd", BLT_KERNELS_BOX(&patch_starts_fwd_cuda));
  m.impl("space_patch_fwd", BLT_KERNELS_BOX(&space_patch_fwd_cuda));
  m.impl("static_patch_fwd", BLT_KERNELS_BOX(&static_patch_fwd_cuda));
  m.impl("delimiter_patch_fwd", BLT_KERNELS_BOX(&delimiter_patch_fwd_cuda));
  m.impl("topk_patch_fwd", BLT_KERNELS_BOX(&topk_patch_fwd_cuda));
}

}  // namespace blt
