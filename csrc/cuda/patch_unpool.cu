// Launchers of patch_unpool.cuh.

#include "patch_unpool.cuh"

#include "../common/launch.h"
#include "row_launch.h"

namespace blt {
namespace {

Tensor patch_unpool_fwd_cuda(const Tensor& y, Tensor patch_offsets, Tensor ids) {
  const Tensor rows = unit_rows(y, "y");
  check_dim(patch_offsets, "patch_offsets", 1);
  check_size(patch_offsets, "patch_offsets", 0, rows.size(0) + 1);
  check_int32(ids, "ids");
  const int64_t bytes = ids.size(0), width = rows.size(1);
  const Device device(rows);
  Tensor out = device_output(rows, {bytes, width});
  if (out.numel() == 0) return out;
  dispatch_device_float(rows.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = device.read<T>(rows);
    dispatch_pack<T>({address(from), row_bytes(rows), bytes_of<T>(width)}, [&](auto pack) {
      device.launch<patch_unpool_fwd_kernel<T, pack()>>(row_shape(ceil_div<int64_t>(bytes, kUnpoolRows), width, pack),
                                                        from, device.read<i32>(ids), bytes, rows.size(0), width,
                                                        rows.stride(0), device.write<T>(out));
    });
  });
  return out;
}

Tensor patch_unpool_bwd_cuda(const Tensor& grad_out, Tensor patch_offsets, Tensor ids) {
  const Tensor rows = unit_rows(grad_out, "grad_out");
  check_int32(patch_offsets, "patch_offsets");
  check_int32(ids, "ids");
  check_size(ids, "ids", 0, rows.size(0));
  const int64_t patches = count_of(patch_offsets, "patch_offsets"), width = rows.size(1);
  const Device device(rows);
  Tensor grad_y = device_output(rows, {patches, width});
  if (grad_y.numel() == 0) return grad_y;
  dispatch_device_float(rows.scalar_type(), "grad_out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = device.read<T>(rows);
    const PatchRows shape = {device.read<i32>(patch_offsets), rows.size(0), patches, width, rows.stride(0)};
    dispatch_pack<T>({address(from), row_bytes(rows), bytes_of<T>(width)}, [&](auto pack) {
      device.launch<patch_unpool_bwd_kernel<T, pack()>>(row_shape(patches, width, pack), from, device.read<i32>(ids),
                                                        shape, device.write<T>(grad_y));
    });
  });
  return grad_y;
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("patch_unpool_fwd", TORCH_BOX(&patch_unpool_fwd_cuda));
  m.impl("patch_unpool_bwd", TORCH_BOX(&patch_unpool_bwd_cuda));
}

}  // namespace blt
