// Launches the kernels of patch_pool.cuh.

#include "patch_pool.cuh"

#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "../common/args/patch_pool.h"
#include "../common/box.h"
#include "../launch/launch.h"
#include "segment_parts.h"

namespace blt {
namespace {

template <Kinds kKinds>
using KindsConstant = std::integral_constant<Kinds, kKinds>;

static_assert(static_cast<size_t>(Reduce::kLast) + 1 == std::size(kReductions), "Reduce has the order of kReductions");

PackedReductions pack_reductions(const Reductions& reductions) {
  STD_TORCH_CHECK(reductions.size() <= kMaxReductions, "reduce: expected 1 to ", kMaxReductions, " reductions, got ",
                  reductions.size());
  PackedReductions packed = {};
  for (const Reduction& reduction : reductions) {
    packed.list |= static_cast<u64>(index_of(reduction)) << 4 * packed.count++;
    packed.folds |= !reduction.is_end();
  }
  return packed;
}

// Calls f(Constant<n>, KindsConstant<kinds>) with n elements of T per access. Rows aligned to 16 bytes get kernels for
// the kinds of the tuple alone; all other rows share those for all kinds, which keeps the number of kernels low.
template <class T, bool kTellsMin, class F>
void dispatch_pool(std::initializer_list<int64_t> places, Kinds kinds, F&& f) {
  dispatch_vec<T>(places, [&](auto vec) {
    if constexpr (vec() > 1 && sizeof(T) < sizeof(double)) {
      if (kinds == Kinds::kMax) return f(vec, KindsConstant<Kinds::kMax>{});
      if (kinds == Kinds::kSum) return f(vec, KindsConstant<Kinds::kSum>{});
      if constexpr (kTellsMin)
        if (kinds == Kinds::kMin) return f(vec, KindsConstant<Kinds::kMin>{});
    }
    f(vec, KindsConstant<Kinds::kAll>{});
  });
}

Kinds kinds_of(const Asked& folds) {
  if (folds.max + folds.min + folds.sum > 1) return Kinds::kAll;
  return folds.max ? Kinds::kMax : folds.min ? Kinds::kMin : Kinds::kSum;
}

Tensor patch_pool_fwd_cuda(const Tensor& x, Tensor patch_offsets, Tensor patch_ids,
                           const std::vector<std::string>& reduce) {
  const PoolArguments arguments = check_pool(x, patch_offsets, patch_ids, reduce);
  const Tensor rows = streamed_rows(arguments.x, "x");
  const Reductions& reductions = arguments.reductions;
  const PackedReductions packed = pack_reductions(reductions);
  const Asked folds = {.max = has_fold(reductions, FoldKind::kMax),
                       .min = has_fold(reductions, FoldKind::kMin),
                       .sum = has_fold(reductions, FoldKind::kSum)};
  const int64_t width = arguments.width, patches = arguments.patches;
  const i32 stride = row_stride(rows), bytes = int32_size(rows, "x");
  const Device device(rows);
  Tensor out = device_output(rows, {patches, arguments.out_width()});
  if (out.numel() == 0) return out;
  dispatch_device_float(rows.scalar_type(), "x", [&]<class T>(Tag<T>) {
    const T* const from = device.read<T>(rows);
    const PatchRows shape = {device.read<i32>(arguments.patch_offsets), patches, bytes, static_cast<i32>(width),
                             stride};
    dispatch_pool<T, true>({address(from), bytes_of<T>(stride), bytes_of<T>(width)}, kinds_of(folds),
                           [&](auto vec, auto kinds) {
                             const SegmentParts<T> parts(device, rows, folds);
                             parts.template fold<vec()>(device, from, device.read<i32>(arguments.patch_ids), stride);
                             const RowLaunch launch = row_launch(patches, width, vec);
                             device.launch<patch_pool_fwd_kernel<T, vec(), kinds()>>(
                                 launch.config, from, shape, launch.tile, packed, parts.levels(), device.write<T>(out));
                           });
  });
  return out;
}

// Has the memory for the ties of one extreme in long patches, and launches the kernels that count them by parts.
template <class T>
class CountedTies {
 public:
  CountedTies(const Device& device, const Tensor& x, bool asked) : parts_(device, x, {.sum = asked}), asked_(asked) {}

  // `extremes` points to the columns of this extreme in `out`.
  template <int kVec>
  void count(const Device& device, const T* x, const T* extremes, const PatchRows& rows, const i32* ids,
             int64_t out_stride) const {
    if (!asked_) return;
    const RowLaunch launch = row_launch(parts_.count(), rows.width, kVec);
    device.launch<patch_pool_ties_kernel<T, kVec>>(launch.config, x, extremes, rows, ids, parts_.count(), launch.tile,
                                                   out_stride, parts_.levels().first.sum);
    parts_.template fold_second<kVec>(device, ids);
  }
  Ties<T> ties() const { return {parts_.levels(), asked_}; }

 private:
  SegmentParts<T> parts_;
  bool asked_;
};

Tensor patch_pool_bwd_cuda(const Tensor& grad_out, const std::optional<Tensor>& x, const std::optional<Tensor>& out,
                           Tensor patch_offsets, Tensor patch_ids, const std::vector<std::string>& reduce) {
  const PoolGradArguments arguments = check_pool_grad(grad_out, x, out, patch_offsets, patch_ids, reduce);
  const Tensor& grads = arguments.grad_out;
  const Reductions& reductions = arguments.reductions;
  const PackedReductions packed = pack_reductions(reductions);
  const int64_t patches = arguments.patches, width = arguments.width;
  const i32 bytes = int32_size(arguments.patch_ids, "patch_ids");
  const int64_t max_column = column_of(reductions, FoldKind::kMax, width);
  const int64_t min_column = column_of(reductions, FoldKind::kMin, width);
  const bool has_max = max_column >= 0, has_min = min_column >= 0;
  const std::optional<Tensor>& results = arguments.out;
  std::optional<Tensor> inputs;
  if (arguments.x) inputs = streamed_rows(*arguments.x, "x");
  const Device device(grads);
  Tensor grad_x = device_output(grads, {bytes, width});
  if (grad_x.numel() == 0) return grad_x;
  dispatch_device_float(grads.scalar_type(), "grad_out", [&]<class T>(Tag<T>) {
    const T *const grad = device.read<T>(grads), *const from = device.read<T>(inputs);
    const T* const pooled = device.read<T>(results);
    const i32* const ids = device.read<i32>(arguments.patch_ids);
    T* const to = device.write<T>(grad_x);
    const i32 stride = inputs ? row_stride(*inputs) : 0;
    const int64_t out_stride = results ? results->stride(0) : 0;
    const PatchRows rows = {device.read<i32>(arguments.patch_offsets), patches, bytes, static_cast<i32>(width), stride};
    // Backward, the kernel for a maximum alone also serves a minimum alone.
    const Kinds kinds_asked = !has_max && !has_min ? Kinds::kSum : reductions.size() == 1 ? Kinds::kMax : Kinds::kAll;
    dispatch_pool<T, false>({address(grad), address(from), address(pooled), row_bytes(grads), bytes_of<T>(stride),
                             bytes_of<T>(out_stride), bytes_of<T>(width)},
                            kinds_asked, [&](auto vec, auto kinds) {
                              const CountedTies<T> max_ties(device, grad_x, has_max), min_ties(device, grad_x, has_min);
                              max_ties.template count<vec()>(device, from, pooled + max_column, rows, ids, out_stride);
                              min_ties.template count<vec()>(device, from, pooled + min_column, rows, ids, out_stride);
                              const PoolGrad<T> tensors = {grad, from, pooled, to, stride, rows.width};
                              const RowLaunch patch_launch = row_launch(patches, width, vec);
                              device.launch<patch_pool_bwd_kernel<T, vec(), kinds()>>(
                                  patch_launch.config, tensors, rows, patch_launch.tile, grads.stride(0), out_stride,
                                  packed, max_ties.ties(), min_ties.ties());
                              const RowLaunch part_launch = row_launch(ceil_div<int64_t>(bytes, kPart), width, vec);
                              device.launch<patch_pool_parts_bwd_kernel<T, vec()>>(
                                  part_launch.config, tensors, rows, ids, part_launch.tile, grads.stride(0), out_stride,
                                  packed, max_ties.ties(), min_ties.ties());
                            });
  });
  return grad_x;
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("patch_pool_fwd", BLT_KERNELS_BOX(&patch_pool_fwd_cuda));
  m.impl("patch_pool_bwd", BLT_KERNELS_BOX(&patch_pool_bwd_cuda));
}

}  // namespace blt
