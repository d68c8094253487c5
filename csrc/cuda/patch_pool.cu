// Launchers of patch_pool.cuh. A thread for each patch and kPack columns; for at least one patch in the backward, whose
// threads zero what no patch covers.

#include "patch_pool.cuh"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../common/launch.h"
#include "row_launch.h"

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
    found.list |= static_cast<u64>(at - std::begin(kNames)) << 4 * found.count++;
  }
  return found;
}

// f(Constant<kinds>) for the fewest kinds of reductions that hold those of the tuple.
template <class F>
void dispatch_kinds(const Reductions& reductions, F&& f) {
  const bool ends = reductions.has(Reduce::kFirst) || reductions.has(Reduce::kLast);
  if (reductions.has(Reduce::kMin) || (reductions.has(Reduce::kMax) && ends)) return f(KindsConstant<Kinds::kAll>{});
  if (reductions.has(Reduce::kMax)) return f(KindsConstant<Kinds::kMax>{});
  f(KindsConstant<Kinds::kSums>{});
}

Tensor patch_pool_fwd_cuda(const Tensor& x, Tensor patch_offsets, const Tensor& patch_ids,
                           const std::vector<std::string>& reduce) {
  const Tensor rows = unit_rows(x, "x");
  check_int32(patch_offsets, "patch_offsets");
  check_size(patch_ids, "patch_ids", 0, rows.size(0));
  const Reductions reductions = check_reduce(reduce);
  const int64_t width = rows.size(1), patches = count_of(patch_offsets, "patch_offsets");
  const Device device(rows);
  Tensor out = device_output(rows, {patches, width * reductions.count});
  if (out.numel() == 0) return out;
  dispatch_device_float(rows.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = device.read<T>(rows);
    const PatchRows shape = {device.read<i32>(patch_offsets), rows.size(0), patches, width, rows.stride(0)};
    dispatch_pack<T>({address(from), row_bytes(rows), bytes_of<T>(width)}, [&](auto pack) {
      dispatch_kinds(reductions, [&](auto kinds) {
        device.launch<patch_pool_fwd_kernel<T, pack(), kinds()>>(row_shape(patches, width, pack), from, shape,
                                                                 reductions, device.write<T>(out));
      });
    });
  });
  return out;
}

Tensor patch_pool_bwd_cuda(const Tensor& grad_out, const std::optional<Tensor>& x, const std::optional<Tensor>& out,
                           Tensor patch_offsets, const Tensor& patch_ids, const std::vector<std::string>& reduce) {
  const Tensor grads = unit_rows(grad_out, "grad_out");
  check_dim(patch_ids, "patch_ids", 1);
  check_int32(patch_offsets, "patch_offsets");
  const Reductions reductions = check_reduce(reduce);
  const int64_t bytes = patch_ids.size(0), patches = count_of(patch_offsets, "patch_offsets");
  const int64_t width = grads.size(1) / reductions.count;
  check_size(grads, "grad_out", 0, patches);
  check_size(grads, "grad_out", 1, width * reductions.count);
  std::optional<Tensor> inputs, results;
  if (reductions.has(Reduce::kMax) || reductions.has(Reduce::kMin)) {
    STD_TORCH_CHECK(x && out, "x, out: expected tensors, since reduce has max or min");
    inputs = unit_rows(*x, "x"), results = unit_rows(*out, "out");
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
  dispatch_device_float(grads.scalar_type(), "grad_out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *const grad = device.read<T>(grads), *const from = device.read<T>(inputs);
    const T* const pooled = device.read<T>(results);
    const int64_t stride = inputs ? inputs->stride(0) : 0, out_stride = results ? results->stride(0) : 0;
    const PatchRows shape = {device.read<i32>(patch_offsets), bytes, patches, width, stride};
    dispatch_pack<T>({address(grad), address(from), address(pooled), row_bytes(grads), bytes_of<T>(stride),
                      bytes_of<T>(out_stride), bytes_of<T>(width)},
                     [&](auto pack) {
                       dispatch_kinds(reductions, [&](auto kinds) {
                         device.launch<patch_pool_bwd_kernel<T, pack(), kinds()>>(
                             row_shape(std::max<int64_t>(patches, 1), width, pack), grad, from, pooled, shape,
                             grads.stride(0), out_stride, reductions, device.write<T>(grad_x));
                       });
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
