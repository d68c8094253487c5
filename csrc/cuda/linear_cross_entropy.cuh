// Computes the loss of each row of logits, and its gradient, in fp32 (fp64 for fp64 rows):
//
//   m = max x,  log_sum = log sum exp(x - m),  loss = log_sum - (x_target - m)
//   grad_x = grad_loss (p - onehot(target)),  p = exp(x - m - log_sum)
//
// A row whose target is `ignore_index` has a loss of 0 and a gradient of 0. Another target that is no column of the
// logits gives NaN, and is not used as an index.
//
// Tiling: that of token_entropy.cuh, where a few neighbouring lanes own a row and hold a tile of it in registers. The
// first of them owns the target: it reads x_target, and writes the gradient there when the others are written.
//
// Bytes: forward reads the logits once, and reads 8 and writes 8 more a row. Backward reads them once and writes the
// gradient in their place, and reads 16 more a row; rows longer than a tile are read twice. The logits are a panel that
// torch's product has just written, so nearly all of that is in L2.
#pragma once

#include "token_entropy.cuh"

namespace blt {

template <class A>
__device__ __forceinline__ A not_a_number() {
  return static_cast<A>(__int_as_float(0x7fffffff));
}

// The target of a row; a row beyond the last one is ignored.
struct Target {
  i64 column;
  bool ignored, known;  // known: it is a column of the logits
  __device__ __forceinline__ Target(const i64* targets, i64 ignore_index, i64 index, i64 rows, i32 alphabet)
      : column(index < rows ? targets[index] : ignore_index),
        ignored(column == ignore_index),
        known(index < rows && column >= 0 && column < alphabet) {}
};

template <class T>
__global__ void __launch_bounds__(kEntropyThreads, entropy_blocks(sizeof(T)))
    linear_cross_entropy_fwd_kernel(LogitRows<T> logits, const i64* targets, i64 ignore_index, acc_t<T>* loss,
                                    acc_t<T>* log_sum) {
  using A = acc_t<T>;
  const i64 index = row_index<T>();
  const Target target(targets, ignore_index, index, logits.rows, logits.alphabet);
  RowLane<T> row(logits, index, index < logits.rows);
  const A x = target.known ? to_float(row.row[target.column]) : 0;
  const EntropySums<A> sums = lane_sums(row, RowLane<T>::tiles(logits));
  const A total = warp_sum<RowLane<T>::kLanes>(sums.s);
  if (row.lane != 0 || index >= logits.rows) return;
  const A log_total = target.known || target.ignored ? log(total) : not_a_number<A>();
  log_sum[index] = log_total;
  loss[index] = target.ignored ? 0 : log_total - (x - sums.max);
}

// The gradient takes the place of the logits.
template <class T>
__global__ void __launch_bounds__(kEntropyThreads, sizeof(T) == 8 ? 2 : 3)
    linear_cross_entropy_bwd_kernel(const acc_t<T>* grad_loss, LogitRows<T> logits, const i64* targets,
                                    i64 ignore_index, const acc_t<T>* log_sum, T* grad_logits) {
  using A = acc_t<T>;
  const i64 index = row_index<T>();
  const bool there = index < logits.rows;
  const Target target(targets, ignore_index, index, logits.rows, logits.alphabet);
  RowLane<T> row(logits, index, there);
  const i32 tiles = RowLane<T>::tiles(logits);
  A upstream = there ? grad_loss[index] : 0, shift = there ? log_sum[index] : 0;
  const A x = target.known ? to_float(row.row[target.column]) : 0;
  A m = row_max(row, tiles);
  if (target.ignored) upstream = shift = m = 0;  // a NaN from above does not pass
  if (!target.known && !target.ignored) upstream = not_a_number<A>();
  const auto p = [=](A y) { return scaled_exp((y - m - shift) * kPerNat<A>); };
  T* const to = grad_logits + (there ? index * logits.stride : 0);
  __syncwarp();  // x is read before it is written
  map_row<T, true>(row, tiles, target.ignored, to, [=](A y) { return upstream * p(y); });
  __syncwarp();
  if (row.lane == 0 && target.known && !target.ignored) to[target.column] = from_float<T>(upstream * (p(x) - 1));
}

}  // namespace blt
