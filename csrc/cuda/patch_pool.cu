// Launchers of patch_pool.cuh.

#include "patch_pool.cuh"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../launch/launch.h"
#include "segment_parts.h"

namespace blt {
namespace {

template <Kinds kKinds>
using KindsConstant = std::integral_constant<Kinds, kKinds>;

Reductions check_reduce(const std::vector<std::string>& names) {
  constexpr const char* kNames[] = {"max", "min", "mean", "sum", "first", "last"};
  STD_TORCH_CHECK(!names.empty() && names.size() <= kMaxReductions, "reduce: expected 1 to ", kMaxReductions,
                  " reductions, got ", names.size());
  Reductions found = {};
  for (const std::string& name : names) {
    const auto at = std::find(std::begin(kNames), std::end(kNames), name);
    STD_TORCH_CHECK(at != std::end(kNames), "reduce: expected max, min, mean, sum, first or last, got ", name);
    const auto reduction = static_cast<Reduce>(at - std::begin(kNames));
    found.list |= static_cast<u64>(reduction) << 4 * found.count++;
    found.folds |= reduction != Reduce::kFirst && reduction != Reduce::kLast;
  }
  return found;
}

// f(Constant<n>, KindsConstant<kinds>), n elements of T to an access, with kinds of the tuple alone where rows are aligned
// to 16 bytes; else all kinds, to keep the number of kernels down.
template <class T, bool kTellsMin, class F>
void dispatch_pool(std::initializer_list<int64_t> places, Kinds kinds, F&& f) {
  dispatch_pack<T>(places, [&](auto pack) {
    if constexpr (pack() > 1 && sizeof(T) < sizeof(double)) {
      if (kinds == Kinds::kMax) return f(pack, KindsConstant<Kinds::kMax>{});
      if (kinds == Kinds::kSum) return f(pack, KindsConstant<Kinds::kSum>{});
      if constexpr (kTellsMin)
        if (kinds == Kinds::kMin) return f(pack, KindsConstant<Kinds::kMin>{});
    }
    f(pack, KindsConstant<Kinds::kAll>{});
  });
}

Kinds kinds_of(const Reductions& reductions) {
  const bool max = reductions.has(Reduce::kMax), min = reductions.has(Reduce::kMin);
  const bool sum = reductions.has(Reduce::kMean) || reductions.has(Reduce::kSum);
  if (max + min + sum > 1) return Kinds::kAll;
  return max ? Kinds::kMax : min ? Kinds::kMin : Kinds::kSum;
}

Tensor patch_pool_fwd_cuda(const Tensor& x, Tensor patch_offsets, Tensor patch_ids,
                           const std::vector<std::string>& reduce) {
  const Tensor rows = near_rows(x, "x");
  check_int32(patch_offsets, "patch_offsets");
  check_int32(patch_ids, "patch_ids");
  check_size(patch_ids, "patch_ids", 0, rows.size(0));
  const Reductions reductions = check_reduce(reduce);
  const int64_t width = rows.size(1), patches = count_of(patch_offsets, "patch_offsets");
  const i32 stride = row_stride(rows), bytes = int32_size(rows, "x");
  const Device device(rows);
  Tensor out = device_output(rows, {patches, width * reductions.count});
  if (out.numel() == 0) return out;
  dispatch_device_float(rows.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = device.read<T>(rows);
    const PatchRows shape = {device.read<i32>(patch_offsets), patches, bytes, static_cast<i32>(width), stride};
    dispatch_pool<T, true>(
        {address(from), bytes_of<T>(stride), bytes_of<T>(width)}, kinds_of(reductions), [&](auto pack, auto kinds) {
          const SegmentParts<T> parts(device, rows,
                                      {.max = reductions.has(Reduce::kMax),
                                       .min = reductions.has(Reduce::kMin),
                                       .sum = reductions.has(Reduce::kMean) || reductions.has(Reduce::kSum)});
          parts.template fold<pack()>(device, from, device.read<i32>(patch_ids), stride);
          const RowLaunch launch = row_launch(patches, width, pack);
          device.launch<patch_pool_fwd_kernel<T, pack(), kinds()>>(launch.config, from, shape, launch.tile, reductions,
                                                                   parts.levels(), device.write<T>(out));
        });
  });
  return out;
}

// The ties of one extreme in long patches: scratch, and the launches that count them by parts.
template <class T>
class CountedTies {
 public:
  CountedTies(const Device& device, const Tensor& x, bool asked) : parts_(device, x, {.sum = asked}), asked_(asked) {}

  // `extremes` is the first column of one such reduction in `out`.
  template <int kPack>
  void count(const Device& device, const T* x, const T* extremes, const PatchRows& rows, const i32* ids,
             int64_t out_stride) const {
    if (!asked_) return;
    const RowLaunch launch = row_launch(parts_.count(), rows.width, kPack);
    device.launch<patch_pool_ties_kernel<T, kPack>>(launch.config, x, extremes, rows, ids, parts_.count(), launch.tile,
                                                    out_stride, parts_.levels().first.sum);
    parts_.template fold_second<kPack>(device, ids);
  }
  Ties<T> ties() const { return {parts_.levels(), asked_}; }

 private:
  SegmentParts<T> parts_;
  bool asked_;
};

Tensor patch_pool_bwd_cuda(const Tensor& grad_out, const std::optional<Tensor>& x, const std::optional<Tensor>& out,
                           Tensor patch_offsets, Tensor patch_ids, const std::vector<std::string>& reduce) {
  const Tensor grads = unit_rows(grad_out, "grad_out");
  check_int32(patch_ids, "patch_ids");
  check_int32(patch_offsets, "patch_offsets");
  const Reductions reductions = check_reduce(reduce);
  const int64_t patches = count_of(patch_offsets, "patch_offsets"), width = grads.size(1) / reductions.count;
  const i32 bytes = int32_size(patch_ids, "patch_ids");
  check_size(grads, "grad_out", 0, patches);
  check_size(grads, "grad_out", 1, width * reductions.count);
  const bool has_max = reductions.has(Reduce::kMax), has_min = reductions.has(Reduce::kMin);
  std::optional<Tensor> inputs, results;
  if (has_max || has_min) {
    STD_TORCH_CHECK(x && out, "x, out: expected tensors, since reduce has max or min");
    inputs = near_rows(*x, "x"), results = unit_rows(*out, "out");
    check_dtype(*inputs, "x", grads.scalar_type());
    check_dtype(*results, "out", grads.scalar_type());
    check_size(*inputs, "x", 0, bytes);
    check_size(*inputs, "x", 1, width);
    check_size(*results, "out", 0, patches);
    check_size(*results, "out", 1, width * reductions.count);
  }
  const Device device(grads);
  Tensor grad_x = device_output(grads, {bytes, width});
  if (grad_x.numel() == 0) return grad_x;
  const auto column_of = [&](Reduce wanted) {
    int r = 0;
    while (r < reductions.count && reductions[r] != wanted) ++r;
    return r * width;
  };
  dispatch_device_float(grads.scalar_type(), "grad_out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *const grad = device.read<T>(grads), *const from = device.read<T>(inputs);
    const T* const pooled = device.read<T>(results);
    const i32* const ids = device.read<i32>(patch_ids);
    T* const to = device.write<T>(grad_x);
    const i32 stride = inputs ? row_stride(*inputs) : 0;
    const int64_t out_stride = results ? results->stride(0) : 0;
    const PatchRows rows = {device.read<i32>(patch_offsets), patches, bytes, static_cast<i32>(width), stride};
    // One extreme alone is like the other, backward.
    const Kinds kinds_asked = !has_max && !has_min ? Kinds::kSum : reductions.count == 1 ? Kinds::kMax : Kinds::kAll;
    dispatch_pool<T, false>(
        {address(grad), address(from), address(pooled), row_bytes(grads), bytes_of<T>(stride), bytes_of<T>(out_stride),
         bytes_of<T>(width)},
        kinds_asked, [&](auto pack, auto kinds) {
          const CountedTies<T> max_ties(device, grad_x, has_max), min_ties(device, grad_x, has_min);
          max_ties.template count<pack()>(device, from, pooled + column_of(Reduce::kMax), rows, ids, out_stride);
          min_ties.template count<pack()>(device, from, pooled + column_of(Reduce::kMin), rows, ids, out_stride);
          const PoolGrad<T> tensors = {grad, from, pooled, to, stride, rows.width};
          const RowLaunch patch_launch = row_launch(patches, width, pack);
          device.launch<patch_pool_bwd_kernel<T, pack(), kinds()>>(patch_launch.config, tensors, rows,
                                                                   patch_launch.tile, grads.stride(0), out_stride,
                                                                   reductions, max_ties.ties(), min_ties.ties());
          const RowLaunch part_launch = row_launch(ceil_div<int64_t>(bytes, kPart), width, pack);
          device.launch<patch_pool_parts_bwd_kernel<T, pack()>>(part_launch.config, tensors, rows, ids,
                                                                part_launch.tile, grads.stride(0), out_stride,
                                                                reductions, max_ties.ties(), min_ties.ties());
        });
  });
  return grad_x;
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("patch_pool_fwd", TORCH_BOX(&patch_pool_fwd_cuda));
  m.impl("patch_pool_bwd", TORCH_BOX(&patch_pool_bwd_cuda));
}

}  // namespace blt
