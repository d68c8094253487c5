// Takes optimizer steps over sparse gradients: only the rows that have a gradient are read and written.
//
//   sgd_step:              table[r] -= lr g
//   rowwise_adagrad_step:  sums[r] += mean of g^2;  table[r] -= lr g / (sqrt(sums[r]) + eps)
//
// for row r = rows[i] with gradient g = values[i], in fp32 (fp64 for fp64 tables), rounded once.
//
// Tiling: threads share the rows. Bytes: a row of values read, a row of the table read and written.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../common/args/optim.h"
#include "../common/box.h"
#include "../common/dispatch.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {
namespace {

struct SparseStep : StepArguments {
  explicit SparseStep(const StepArguments& arguments) : StepArguments(arguments) {
    const int64_t* const row = rows.const_data_ptr<int64_t>();
    int64_t previous = -1;
    bool rising = true;
    for (int64_t i = 0; i < rows.size(0); ++i) rising &= previous < row[i], previous = row[i];
    STD_TORCH_CHECK(rising && previous < table.size(0), "rows: expected rising rows below ", table.size(0));
  }

  // Calls f(row number, row of the table, its gradient).
  template <class T, class F>
  void for_each(const F& f) {
    const int64_t* const row = rows.const_data_ptr<int64_t>();
    const T* const value = values.const_data_ptr<T>();
    T* const data = table.mutable_data_ptr<T>();
    const int64_t table_stride = table.stride(0), value_stride = values.stride(0);
    parallel_for(rows.size(0), row_grain(table.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(row[i], data + row[i] * table_stride, value + i * value_stride);
    });
  }
};

void sgd_step_cpu(const Tensor& table, const Tensor& rows, const Tensor& values, double lr) {
  SparseStep step(check_step(table, rows, values));
  dispatch_float(table.scalar_type(), "table", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    const A rate = static_cast<A>(lr);
    step.for_each<T>([&](int64_t, T* weights, const T* grad) {
      map_row<A>(weights, table.size(1), [rate](auto w, auto g) { return w - rate * g; }, weights, grad);
    });
  });
}

void rowwise_adagrad_step_cpu(const Tensor& table, Tensor sums, const Tensor& rows, const Tensor& values, double lr,
                              double eps) {
  SparseStep step(check_step(table, rows, values));
  check_sums(sums, table);
  dispatch_float(table.scalar_type(), "table", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    A* const sum = sums.mutable_data_ptr<A>();
    const int64_t width = table.size(1), sum_stride = sums.stride(0);
    step.for_each<T>([&](int64_t row, T* weights, const T* grad) {
      A& total = sum[row * sum_stride];
      total += sum_of_squares<A>(grad, width) / static_cast<A>(width);
      const A rate = static_cast<A>(lr) / (std::sqrt(total) + static_cast<A>(eps));
      map_row<A>(weights, width, [rate](auto w, auto g) { return w - rate * g; }, weights, grad);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("sgd_step", BLT_KERNELS_BOX(&sgd_step_cpu));
  m.impl("rowwise_adagrad_step", BLT_KERNELS_BOX(&rowwise_adagrad_step_cpu));
}

}  // namespace blt
