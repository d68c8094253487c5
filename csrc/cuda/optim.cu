// Launchers of optim.cuh. A grid of one warp for each row that has a gradient.

#include "optim.cuh"

#include "../launch/launch.h"

namespace blt {
namespace {

// The tensors of a step; rows and values have the layout that the kernels want.
struct StepTensors {
  Tensor table, rows, values;
};

StepTensors check_step(const Tensor& table, const Tensor& rows, const Tensor& values) {
  check_dim(table, "table", 2);
  STD_TORCH_CHECK(table.stride(1) == 1 || table.size(1) == 1, "table: expected unit stride in a row, got ",
                  table.stride(1));
  check_dim(rows, "rows", 1);
  check_dtype(rows, "rows", ScalarType::Long);
  check_dtype(values, "values", table.scalar_type());
  const StepTensors step = {table, as_contiguous(rows), unit_rows(values, "values")};
  check_size(step.values, "values", 0, rows.size(0));
  check_size(step.values, "values", 1, table.size(1));
  return step;
}

// f(Tag<T>, Constant<pack>, config, step)
template <class F>
void dispatch_step(const Device& device, StepTensors& tensors, F&& f) {
  dispatch_device_float(tensors.table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t count = tensors.rows.size(0), width = tensors.table.size(1);
    const SparseStep<T> step = {device.write<T>(tensors.table), device.read<i64>(tensors.rows),
                                device.read<T>(tensors.values), count,
                                tensors.table.size(0),          width,
                                tensors.table.stride(0),        tensors.values.stride(0)};
    dispatch_pack<T>({address(step.table), address(step.values), row_bytes(tensors.table), row_bytes(tensors.values),
                      bytes_of<T>(width)},
                     [&](auto pack) {
                       const LaunchConfig config = {.grid = {ceil_div<int64_t>(count, kStepRows)},
                                                    .block = kStepThreads};
                       f(tag, pack, config, step);
                     });
  });
}

void sgd_step_cuda(const Tensor& table, const Tensor& rows, const Tensor& values, double lr) {
  StepTensors tensors = check_step(table, rows, values);
  const Device device(table);
  dispatch_step(device, tensors, [&](auto tag, auto pack, const LaunchConfig& config, const auto& step) {
    using T = typename decltype(tag)::type;
    device.launch<sgd_step_kernel<T, pack()>>(config, step, static_cast<acc_t<T>>(lr));
  });
}

void rowwise_adagrad_step_cuda(const Tensor& table, Tensor sums, const Tensor& rows, const Tensor& values, double lr,
                               double eps) {
  StepTensors tensors = check_step(table, rows, values);
  check_dim(sums, "sums", 1);
  check_size(sums, "sums", 0, table.size(0));
  check_dtype(sums, "sums", accumulator(table));
  const Device device(table);
  dispatch_step(device, tensors, [&](auto tag, auto pack, const LaunchConfig& config, const auto& step) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    device.launch<rowwise_adagrad_step_kernel<T, pack()>>(config, step, device.write<A>(sums), sums.stride(0),
                                                          static_cast<A>(lr), static_cast<A>(eps));
  });
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("sgd_step", TORCH_BOX(&sgd_step_cuda));
  m.impl("rowwise_adagrad_step", TORCH_BOX(&rowwise_adagrad_step_cuda));
}

}  // namespace blt
