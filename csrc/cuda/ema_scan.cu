// Launches the kernels of ema_scan.cuh.

#include "ema_scan.cuh"

#include <optional>
#include <tuple>

#include "../common/args/ema_scan.h"
#include "../common/box.h"
#include "../launch/launch.h"
#include "documents.h"
#include "row_launch.h"

namespace blt {
namespace {

EmaShape shape_of(const Documents& documents, int64_t width, int vec) {
  const int64_t panels = ceil_div<int64_t>(width, kWarp * vec);
  return {documents, static_cast<i32>(width), static_cast<i32>(panels), ceil_div(documents.bytes, kEmaRows)};
}

LaunchConfig config_of(const EmaShape& shape) {
  const int64_t warps = static_cast<int64_t>(shape.chunks) * shape.panels;
  return {.grid = {ceil_div<int64_t>(warps, kEmaWarps)}, .block = kEmaThreads};
}

// Has the ends and factors of `count` chunks or groups.
template <class A>
class Parts {
 public:
  Parts(const Device& device, const Tensor& like, int64_t count)
      : ends_(device_output(like, {count, like.size(1)}, accumulator(like))),
        factors_(device_output(like, {count, 2}, accumulator(like))),
        pointers_{device.write<A>(ends_), static_cast<Factor<A>*>(static_cast<void*>(device.write<A>(factors_)))} {}
  const EmaParts<A>& pointers() const { return pointers_; }

 private:
  Tensor ends_, factors_;
  EmaParts<A> pointers_;
};

// Computes the sums before each chunk, which are needed where there are several (steps 1 to 3).
template <class T, int kVec, bool kReverse>
class Carries {
 public:
  Carries(const Device& device, const Tensor& rows, const acc_t<T>* p, const EmaShape& shape) {
    if (shape.chunks <= 1) return;
    const i32 groups = ceil_div(shape.chunks, kEmaChunks);
    chunks_.emplace(device, rows, shape.chunks);
    device.launch<ema_scan_ends_kernel<T, kVec, kReverse>>(config_of(shape), device.read<T>(rows), row_stride(rows), p,
                                                           shape, chunks_->pointers());
    if (groups > 1) groups_.emplace(device, rows, groups - 1);
    const EmaParts<A> of_groups = groups_ ? groups_->pointers() : EmaParts<A>{};
    dispatch_vec<A>({bytes_of<A>(shape.width)}, [&](auto vec) {
      const RowLaunch joined = row_launch(groups - 1, shape.width, vec), owned = row_launch(groups, shape.width, vec);
      device.launch<ema_scan_groups_kernel<A, vec()>>(joined.config, chunks_->pointers(), shape.chunks, shape.width,
                                                      joined.tile, of_groups, groups - 1);
      device.launch<ema_scan_carries_kernel<A, vec()>>(owned.config, chunks_->pointers(), shape.chunks, shape.width,
                                                       owned.tile, of_groups);
    });
  }
  const acc_t<T>* data() const { return chunks_ ? chunks_->pointers().ends : nullptr; }

 private:
  using A = acc_t<T>;
  std::optional<Parts<A>> chunks_, groups_;
};

Tensor ema_scan_fwd_cuda(const Tensor& x, const Tensor& p, std::optional<Tensor> cu_seqlens, int64_t num_documents) {
  const EmaArguments arguments = check_ema(x, p);
  const Tensor rows = streamed_rows(arguments.x, "x");
  const int64_t width = arguments.width;
  const Device device(rows);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, arguments.rows);
  Tensor y = device_output(rows, {arguments.rows, width});
  if (y.numel() == 0) return y;
  dispatch_device_float(rows.scalar_type(), "x", [&]<class T>(Tag<T>) {
    const T* const from = device.read<T>(rows);
    const acc_t<T>* const weights = device.read<acc_t<T>>(arguments.p);
    const i32 stride = row_stride(rows);
    dispatch_vec<T>({address(from), bytes_of<T>(stride), bytes_of<T>(width)}, [&](auto vec) {
      const EmaShape shape = shape_of(documents, width, vec);
      const Carries<T, vec(), false> carries(device, rows, weights, shape);
      device.launch<ema_scan_fwd_kernel<T, vec()>>(config_of(shape), from, stride, weights, shape, carries.data(),
                                                   device.write<T>(y));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> ema_scan_bwd_cuda(const Tensor& grad_out, const Tensor& x, const Tensor& p, const Tensor& y,
                                             std::optional<Tensor> cu_seqlens, int64_t num_documents) {
  const EmaArguments arguments = check_ema(x, p);
  const Tensor rows = streamed_rows(arguments.x, "x");
  const Tensor grads = streamed_rows(check_like_x(grad_out, "grad_out", x), "grad_out");
  const Tensor averages = streamed_rows(check_like_x(y, "y", x), "y");
  const int64_t width = arguments.width;
  const Device device(rows);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, arguments.rows);
  Tensor grad_x = device_output(rows, {arguments.rows, width}), grad_p = device_output(arguments.p, {arguments.rows});
  if (grad_x.numel() == 0) {
    device.zero(grad_p);
    return {grad_x, grad_p};
  }
  dispatch_device_float(rows.scalar_type(), "x", [&]<class T>(Tag<T>) {
    using A = acc_t<T>;
    const T *const grad = device.read<T>(grads), *const from = device.read<T>(rows);
    const T* const averaged = device.read<T>(averages);
    const A* const weights = device.read<A>(arguments.p);
    A* const of_rows = device.write<A>(grad_p);
    const i32 grad_stride = row_stride(grads), stride = row_stride(rows), y_stride = row_stride(averages);
    dispatch_vec<T>({address(grad), address(from), address(averaged), bytes_of<T>(grad_stride), bytes_of<T>(stride),
                     bytes_of<T>(y_stride), bytes_of<T>(width)},
                    [&](auto vec) {
                      const EmaShape shape = shape_of(documents, width, vec);
                      const Carries<T, vec(), true> carries(device, grads, weights, shape);
                      std::optional<Tensor> of_panels;
                      if (shape.panels > 1) of_panels = device_output(arguments.p, {shape.panels, arguments.rows});
                      const EmaGrad<T> tensors = {grad,
                                                  from,
                                                  averaged,
                                                  grad_stride,
                                                  stride,
                                                  y_stride,
                                                  device.write<T>(grad_x),
                                                  of_panels ? device.write<A>(*of_panels) : of_rows};
                      device.launch<ema_scan_bwd_kernel<T, vec()>>(config_of(shape), tensors, weights, shape,
                                                                   carries.data());
                      if (of_panels)
                        device.launch<ema_scan_sum_kernel<A>>(
                            {.grid = {ceil_div<int64_t>(arguments.rows, kEmaThreads)}, .block = kEmaThreads},
                            tensors.grad_p, documents.bytes, shape.panels, of_rows);
                    });
  });
  return {grad_x, grad_p};
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("ema_scan_fwd", BLT_KERNELS_BOX(&ema_scan_fwd_cuda));
  m.impl("ema_scan_bwd", BLT_KERNELS_BOX(&ema_scan_bwd_cuda));
}

}  // namespace blt
