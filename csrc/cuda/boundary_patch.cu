// Launches the kernels of patch_layout.cuh with the rule of boundary_patch.cuh.

#include "boundary_patch.cuh"

#include <algorithm>
#include <optional>
#include <string>

#include "../common/args/boundary_patch.h"
#include "../common/box.h"
#include "patch_layout.h"

namespace blt {
namespace {

LayoutTensors boundary_patch_fwd_cuda(const Tensor& marks, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                      std::optional<double> threshold, std::optional<Tensor> thresholds, std::string at,
                                      std::optional<int64_t> first, std::optional<int64_t> max_patches) {
  const int64_t count = cu_seqlens ? check_num_segments(*cu_seqlens, "cu_seqlens") : num_documents;
  const BoundaryArguments arguments = check_boundary_patch(marks, count, threshold, thresholds, at, first);
  const Tensor& values = arguments.marks;
  const Device device(values);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, values.size(0));
  const auto build = [&]<class T>(Tag<T>) {
    const BoundaryRule<T> rule = {device.read<T>(values),
                                  device.read<float>(arguments.thresholds),
                                  documents,
                                  static_cast<float>(threshold.value_or(0)),
                                  static_cast<i32>(std::min<int64_t>(arguments.first, kNoLimit)),
                                  arguments.at_start};
    return build_layout(device, rule, documents, values, std::nullopt, max_patches);
  };
  if (values.scalar_type() == ScalarType::Bool) return build(Tag<u8>{});
  return dispatch_device_float(values.scalar_type(), "marks", build);
}

}  // namespace

BLT_KERNELS_IMPL(m) { m.impl("boundary_patch_fwd", BLT_KERNELS_BOX(&boundary_patch_fwd_cuda)); }

}  // namespace blt
