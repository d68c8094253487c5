// linear_entropy: the entropy of softmax(hidden weight^T + bias), row by row, without the logits in memory.
//
//   x[t, a] = sum_d hidden[t, d] weight[a, d] + bias[a];  entropy and log_sum of x[t] as in token_entropy.cuh
//   g[t, a] = -grad_H[t] p (log p + H);  grad_hidden = g weight;  grad_weight = g^T hidden;  grad_bias = sum_t g
//
// Forward: a block owns 64 rows and passes over the alphabet 88 columns at a time; the four lanes that share a row of the
// product keep its maximum and sums, rescaled from tile to tile. Bytes: hidden once from memory and three times from L2 for
// an alphabet of 260, weight (400 KB in bf16 at D = 768) from L2, 8 written a row. 2 A D flops a row, 400 KFLOP at D = 768,
// against 1.5 KB read: bound by the tensor cores in bf16 and fp16 and by shared memory in fp32.
// Backward recomputes the logits of a panel of rows into a buffer, each thread its own, which then become g in the
// number type of the inputs; three products follow. Sums over rows are split into parts of kSplitRows, which are
// added in their order.
#pragma once

#include "tile_product.cuh"
#include "token_entropy.cuh"

namespace blt {

inline constexpr int kSumThreads = 256;
inline constexpr i64 kPanelRows = 16384, kSplitRows = 512;

// x = sums + bias for the lane's two rows, and -inf beyond the alphabet.
template <class T>
__device__ __forceinline__ void add_bias(TileSums<T>& sums, const T* bias, i64 column0, i64 alphabet) {
  for_each_sum<T>(sums, [&](int, int column, acc_t<T>& x) {
    const bool inside = column0 + column < alphabet;
    if (inside && bias != nullptr) x += widen(bias[column0 + column]);
    if (!inside) x = minus_infinity<acc_t<T>>();
  });
}

// The maximum over the tile for both rows, common to the four lanes that share them.
template <class T>
__device__ __forceinline__ void tile_maxima(TileSums<T>& sums, acc_t<T> (&best)[2]) {
  using A = acc_t<T>;
  Maximum<A> own[2];
  for_each_sum<T>(sums, [&](int half, int, A& x) { own[half].add(x); });
#pragma unroll
  for (int half = 0; half < 2; ++half)
    best[half] = warp_fold<4>(own[half].value(), [](A a, A b) { return most(a, b); });
}

template <class T, int kPack>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 2 ? 4 : 2)
    linear_entropy_fwd_kernel(Matrix<T> hidden, Matrix<T> weight, const T* bias, acc_t<T>* entropy, acc_t<T>* log_sum) {
  using A = acc_t<T>;
  __shared__ SharedTiles<T> tiles;
  const i64 row0 = static_cast<i64>(blockIdx.x) * kTileRows;
  EntropySums<A> rows[2];
  for (i64 column0 = 0; column0 < weight.rows; column0 += kTileColumns) {
    TileSums<T> x;
    tile_product<T, kPack, kPack>(x, tiles, hidden, weight, row0, column0, 0, hidden.depth);
    add_bias<T>(x, bias, column0, weight.rows);
    A best[2];
    tile_maxima<T>(x, best);
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[half].rescale(most(rows[half].max, best[half]));
    for_each_sum<T>(x, [&](int half, int column, A& value) {
      if (column0 + column < weight.rows) rows[half].add(value);
    });
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows[half].s = warp_sum<4>(rows[half].s);
    rows[half].t = warp_sum<4>(rows[half].t);
    const i64 row = row0 + tile_row(half);
    if (threadIdx.x % 4 == 0 && row < hidden.rows) {
      entropy[row] = rows[half].entropy();
      log_sum[row] = rows[half].log_sum();
    }
  }
}

// grads[t, a] = g[t, a] for the rows of a panel. `logits` is a buffer of as many numbers.
template <class T, int kPack>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 2 ? 4 : 2)
    linear_entropy_logits_kernel(Matrix<T> hidden, Matrix<T> weight, const T* bias, const acc_t<T>* grad_entropy,
                                 const acc_t<T>* entropy, const acc_t<T>* log_sum, acc_t<T>* logits, T* grads) {
  using A = acc_t<T>;
  __shared__ SharedTiles<T> tiles;
  const i64 row0 = static_cast<i64>(blockIdx.x) * kTileRows, alphabet = weight.rows;
  A max[2] = {minus_infinity<A>(), minus_infinity<A>()};
  for (i64 column0 = 0; column0 < alphabet; column0 += kTileColumns) {
    TileSums<T> x;
    tile_product<T, kPack, kPack>(x, tiles, hidden, weight, row0, column0, 0, hidden.depth);
    add_bias<T>(x, bias, column0, alphabet);
    A best[2];
    tile_maxima<T>(x, best);
#pragma unroll
    for (int half = 0; half < 2; ++half) max[half] = most(max[half], best[half]);
    for_each_sum<T>(x, [&](int half, int column, A& value) {
      const i64 row = row0 + tile_row(half);
      if (column0 + column < alphabet && row < hidden.rows) logits[row * alphabet + column0 + column] = value;
    });
  }
  for (int half = 0; half < 2; ++half) {
    const i64 row = row0 + tile_row(half);
    if (row >= hidden.rows) continue;
    const EntropySlope<A> slope(max[half], grad_entropy[row], entropy[row], log_sum[row]);
    for (i64 pair = 2 * (threadIdx.x % 4); pair < alphabet; pair += 8)  // what this lane wrote
      for (i64 at = pair; at < least(pair + 2, alphabet); ++at)
        grads[row * alphabet + at] = narrow<T>(slope(logits[row * alphabet + at]));
  }
}

// out[split][m, n] = sum over the k of the split of a(m, k) b(n, k), `split_size` elements from split to split. Row y of the
// grid is a split; blocks along it go through the tiles of columns first.
template <class T, class Out>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 2 ? 3 : 2)
    product_kernel(Matrix<T> a, Matrix<T> b, i64 split_depth, i64 split_size, Out* out) {
  __shared__ SharedTiles<T> tiles;
  const i64 across = ceil_div<i64>(b.rows, kTileColumns), k0 = static_cast<i64>(blockIdx.y) * split_depth;
  const i64 row0 = blockIdx.x / across * kTileRows, column0 = blockIdx.x % across * kTileColumns;
  TileSums<T> sums;
  tile_product<T, 1, 1>(sums, tiles, a, b, row0, column0, k0, k0 + split_depth);
  Out* const to = out + blockIdx.y * split_size;
  for_each_sum<T>(sums, [&](int half, int column, acc_t<T>& value) {
    const i64 row = row0 + tile_row(half);
    if (row < a.rows && column0 + column < b.rows) to[row * b.rows + column0 + column] = narrow<Out>(value);
  });
}

// out[split][c] = sum of x[row, c] over the rows of the split.
template <class T>
__global__ void __launch_bounds__(kSumThreads) column_sums_kernel(const T* x, i64 rows, i64 columns, acc_t<T>* out) {
  const i64 column = static_cast<i64>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (column >= columns) return;
  const i64 begin = blockIdx.y * kSplitRows;
  acc_t<T> sum = 0;
#pragma unroll 4
  for (i64 row = begin; row < least(begin + kSplitRows, rows); ++row) sum += widen(x[row * columns + column]);
  out[blockIdx.y * columns + column] = sum;
}

// total[i] (+)= the sum over splits of parts[split][i]; the last panel's call also rounds it to `out`.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    add_splits_kernel(const acc_t<T>* parts, i64 splits, i64 size, bool first, bool last, acc_t<T>* total, T* out) {
  const i64 i = static_cast<i64>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= size) return;
  acc_t<T> sum = first ? 0 : total[i];
  for (i64 split = 0; split < splits; ++split) sum += parts[split * size + i];
  total[i] = sum;
  if (last) out[i] = narrow<T>(sum);
}

}  // namespace blt
