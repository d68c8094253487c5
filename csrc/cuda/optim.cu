// Launches the kernels of optim.cuh, with a warp for each row that has a gradient.

#include "optim.cuh"

#include "../common/args/optim.h"
#include "../common/box.h"
#include "../launch/launch.h"

namespace blt {
namespace {

// Calls f(Tag<T>, Constant<vec>, config, step).
template <class F>
void dispatch_step(const Device& device, StepArguments& tensors, F&& f) {
  dispatch_device_float(tensors.table.scalar_type(), "table", [&]<class T>(Tag<T> tag) {
    const int64_t count = tensors.rows.size(0), width = tensors.table.size(1);
    const SparseStep<T> step = {device.write<T>(tensors.table), device.read<i64>(tensors.rows),
                                device.read<T>(tensors.values), count,
                                tensors.table.size(0),          width,
                                tensors.table.stride(0),        tensors.values.stride(0)};
    dispatch_vec<T>({address(step.table), address(step.values), row_bytes(tensors.table), row_bytes(tensors.values),
                     bytes_of<T>(width)},
                    [&](auto vec) {
                      const LaunchConfig config = {.grid = {ceil_div<int64_t>(count, kStepRows)},
                                                   .block = kStepThreads};
                      f(tag, vec, config, step);
                    });
  });
}

void sgd_step_cuda(const Tensor& table, const Tensor& rows, const Tensor& values, double lr) {
  StepArguments tensors = check_step(table, rows, values);
  const Device device(table);
  dispatch_step(device, tensors, [&]<class T>(Tag<T>, auto vec, const LaunchConfig& config, const auto& step) {
    device.launch<sgd_step_kernel<T, vec()>>(config, step, static_cast<acc_t<T>>(lr));
  });
}

void rowwise_adagrad_step_cuda(const Tensor& table, Tensor sums, const Tensor& rows, const Tensor& values, double lr,
                               double eps) {
  StepArguments tensors = check_step(table, rows, values);
  check_sums(sums, table);
  const Device device(table);
  dispatch_step(device, tensors, [&]<class T>(Tag<T>, auto vec, const LaunchConfig& config, const auto& step) {
    using A = acc_t<T>;
    device.launch<rowwise_adagrad_step_kernel<T, vec()>>(config, step, device.write<A>(sums), sums.stride(0),
                                                         static_cast<A>(lr), static_cast<A>(eps));
  });
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("sgd_step", BLT_KERNELS_BOX(&sgd_step_cuda));
  m.impl("rowwise_adagrad_step", BLT_KERNELS_BOX(&rowwise_adagrad_step_cuda));
}

}  // namespace blt
