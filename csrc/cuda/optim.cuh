// Takes optimizer steps over sparse gradients: only the rows that have a gradient are read and written.
//
//   sgd_step:              table[r] -= lr g
//   rowwise_adagrad_step:  sums[r] += mean of g^2;  table[r] -= lr g / (sqrt(sums[r]) + eps)
//
// where row r = rows[i] has the gradient g = values[i]. Arithmetic is fp32 (fp64 for fp64 tables), rounded once.
//
// A warp owns a row; its lanes own neighbouring aligned vectors of 16 bytes. Adagrad keeps the first kKept vectors of a
// lane in registers between the sum of squares and their use; later ones are read again from L1 or L2. Rows are
// distinct, so each has one owner. Rows outside the table are skipped.
//
// Bytes: a row of values read, a row of the table read and written, 8 of rows and 8 of sums. Roofline: a memory copy.
// Registers: at most 64 for SGD and 80 for Adagrad, for 4 and 3 blocks of 256 threads an SM. With 8 loads of 16 bytes
// in flight per thread that is at least 98 KB.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr int kStepThreads = 256;
inline constexpr int kStepRows = kStepThreads / kWarp;  // counts the rows of a block

// Row rows[i] of table[size][width] has the gradient values[i], for i < count.
template <class T>
struct SparseStep {
  T* table;
  const i64* rows;
  const T* values;
  i64 count, size, width, table_stride, value_stride;
};

// A warp owns a row of the gradient and of the table; `row` is -1 for none.
struct OwnedRow {
  i64 value, row;
};
template <class T>
__device__ __forceinline__ OwnedRow owned_row(const SparseStep<T>& step) {
  const i64 value = static_cast<i64>(blockIdx.x) * kStepRows + threadIdx.x / kWarp;
  if (value >= step.count) return {value, -1};
  const i64 row = step.rows[value];
  return {value, row >= 0 && row < step.size ? row : -1};
}

// Computes to = weights - rate grad.
template <class T, int kVec>
__device__ __forceinline__ void move_weights(T* to, const Bits<T, kVec>& from, const Bits<T, kVec>& by, acc_t<T> rate) {
  const AlignedVector<T, kVec> weights = unpack<T, kVec>(from), grad = unpack<T, kVec>(by);
  AlignedVector<T, kVec> result;
#pragma unroll
  for (int c = 0; c < kVec; ++c) result[c] = from_float<T>(to_float(weights[c]) - rate * to_float(grad[c]));
  store(to, result);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kStepThreads, 4) sgd_step_kernel(SparseStep<T> step, acc_t<T> rate) {
  constexpr int kPrefetch = 4;
  const auto [value, row] = owned_row(step);
  if (row < 0) return;
  T* const table = step.table + row * step.table_stride;
  const T* const values = step.values + value * step.value_stride;
  for (i64 first = threadIdx.x % kWarp * kVec; first < step.width; first += kPrefetch * kWarp * kVec) {
    Bits<T, kVec> weights[kPrefetch], grads[kPrefetch];
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      const i64 column = first + i * (kWarp * kVec);
      if (column >= step.width) break;
      grads[i] = load_bits<kVec>(values + column);
      weights[i] = load_bits<kVec>(table + column);
    }
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      const i64 column = first + i * (kWarp * kVec);
      if (column >= step.width) break;
      move_weights<T, kVec>(table + column, weights[i], grads[i], rate);
    }
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kStepThreads, 3)
    rowwise_adagrad_step_kernel(SparseStep<T> step, acc_t<T>* sums, i64 sum_stride, acc_t<T> lr, acc_t<T> eps) {
  using A = acc_t<T>;
  constexpr int kKept = 4, kStep = kWarp * kVec;
  const auto [value, row] = owned_row(step);
  if (row < 0) return;
  T* const table = step.table + row * step.table_stride;
  const T* const values = step.values + value * step.value_stride;
  const i64 first = threadIdx.x % kWarp * kVec;
  Bits<T, kVec> kept[kKept], weights[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (first + i * kStep >= step.width) break;
    kept[i] = load_bits<kVec>(values + first + i * kStep);
    weights[i] = load_bits<kVec>(table + first + i * kStep);
  }
  A squares = 0;
  const auto add_squares = [&](const Bits<T, kVec>& bits) {
    const AlignedVector<T, kVec> grads = unpack<T, kVec>(bits);
#pragma unroll
    for (int c = 0; c < kVec; ++c) squares += to_float(grads[c]) * to_float(grads[c]);
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    if (first + i * kStep < step.width) add_squares(kept[i]);
#pragma unroll 4
  for (i64 column = first + kKept * kStep; column < step.width; column += kStep)
    add_squares(load_bits<kVec>(values + column));
  A* const sum = sums + row * sum_stride;
  const A total = *sum + warp_sum(squares) / static_cast<A>(step.width);
  __syncwarp();  // all lanes have read the sum
  if (threadIdx.x % kWarp == 0) *sum = total;
  const A rate = lr / (sqrt(total) + eps);
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    if (first + i * kStep < step.width) move_weights<T, kVec>(table + first + i * kStep, weights[i], kept[i], rate);
#pragma unroll 2
  for (i64 column = first + kKept * kStep; column < step.width; column += kStep)
    move_weights<T, kVec>(table + column, load_bits<kVec>(table + column), load_bits<kVec>(values + column), rate);
}

}  // namespace blt
