// Launches the kernels of patch_unpool.cuh.

#include "patch_unpool.cuh"

#include "../common/args/patch_unpool.h"
#include "../common/box.h"
#include "../launch/launch.h"
#include "segment_parts.h"

namespace blt {
namespace {

Tensor patch_unpool_fwd_cuda(const Tensor& y, Tensor offsets, Tensor ids) {
  const UnpoolArguments arguments = check_unpool(y, offsets, ids);
  const Tensor& rows = arguments.rows;
  const int64_t bytes = arguments.bytes, width = arguments.width;
  const Device device(rows);
  Tensor out = device_output(rows, {bytes, width});
  if (out.numel() == 0) return out;
  dispatch_device_float(rows.scalar_type(), "y", [&]<class T>(Tag<T>) {
    const T* const from = device.read<T>(rows);
    dispatch_vec<T>({address(from), row_bytes(rows), bytes_of<T>(width)}, [&](auto vec) {
      const RowLaunch launch = row_launch(ceil_div<int64_t>(bytes, kUnpoolRows), width, vec);
      device.launch<patch_unpool_fwd_kernel<T, vec()>>(launch.config, from, device.read<i32>(arguments.ids), bytes,
                                                       rows.size(0), static_cast<i32>(width), rows.stride(0),
                                                       launch.tile, device.write<T>(out));
    });
  });
  return out;
}

Tensor patch_unpool_bwd_cuda(const Tensor& grad_out, Tensor offsets, Tensor ids) {
  const UnpoolArguments arguments = check_unpool_grad(grad_out, offsets, ids);
  const Tensor rows = streamed_rows(arguments.rows, "grad_out");
  const int64_t patches = arguments.patches, width = arguments.width;
  const i32 stride = row_stride(rows), bytes = int32_size(rows, "grad_out");
  const Device device(rows);
  Tensor grad_y = device_output(rows, {patches, width});
  if (grad_y.numel() == 0) return grad_y;
  dispatch_device_float(rows.scalar_type(), "grad_out", [&]<class T>(Tag<T>) {
    const T* const from = device.read<T>(rows);
    const i32* const readers = device.read<i32>(arguments.ids);
    const PatchRows shape = {device.read<i32>(arguments.offsets), patches, bytes, static_cast<i32>(width), stride};
    dispatch_vec<T>({address(from), bytes_of<T>(stride), bytes_of<T>(width)}, [&](auto vec) {
      const SegmentParts<T> parts(device, rows, {.sum = true});
      parts.template fold<vec()>(device, from, readers, stride);
      const RowLaunch launch = row_launch(patches, width, vec);
      device.launch<patch_unpool_bwd_kernel<T, vec()>>(launch.config, from, readers, shape, launch.tile, parts.levels(),
                                                       device.write<T>(grad_y));
    });
  });
  return grad_y;
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("patch_unpool_fwd", BLT_KERNELS_BOX(&patch_unpool_fwd_cuda));
  m.impl("patch_unpool_bwd", BLT_KERNELS_BOX(&patch_unpool_bwd_cuda));
}

}  // namespace blt
