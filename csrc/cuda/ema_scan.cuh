// ema_scan averages rows exponentially along each document.
//
//   y[t]      = p[t] x[t] + (1 - p[t]) y[t-1], with y = 0 before a document; 0 beyond the last document
//   g[t]      = grad_y[t] + (1 - p[t+1]) g[t+1], with g = 0 behind a document
//   grad_x[t] = p[t] g[t]
//   grad_p[t] = sum over d of (x[t,d] - y[t-1,d]) g[t,d]
//
// Tiling: a warp owns a chunk of 32 rows and a panel of 32 vectors of kVec columns, 16 bytes of a row where rows are
// aligned to that. Its lanes are the columns, and for weights and starts of documents the rows. Four steps make the
// time linear in the rows and let one long document occupy the GPU:
//
//   1. The owner of a chunk scans it as if nothing came before. It writes the last sums, `ends`, and a factor, by which
//      the sums before the chunk enter them: the product of 1 - p, or nothing if a document begins in the chunk.
//   2. The chunks of each group of 32 are joined in the same way, to the ends and the factor of the group.
//   3. A thread per group and kVec columns joins the groups before its own, then replaces the ends of each chunk of its
//      group by the sums before that chunk.
//   4. The owner of a chunk scans it again, from these sums, and writes its rows.
//
// A single chunk needs step 4 alone, a single group no step 2. Backward, rows and chunks run from the last to the
// first. The lanes of a row add up its part of grad_p in a fixed order; a last launch adds up the panels. There are no
// atomics.
//
// Bytes: forward reads x twice and writes y; backward reads grad_y twice, x and y, and writes grad_x. The ends, a
// sixteenth of the bytes of 16-bit rows, are written once, read three times and replaced once. They mostly stay in L2,
// as x does if it is small enough. Roofline: a memory copy.
#pragma once

#include "documents.cuh"
#include "segment_fold.cuh"

namespace blt {

inline constexpr int kEmaThreads = 256, kEmaWarps = kEmaThreads / kWarp;
inline constexpr int kEmaRows = kWarp;       // rows of a chunk: a lane holds the weight of one
inline constexpr int kEmaChunks = 32;        // chunks of a group
inline constexpr int kEmaPrefetch = 8;       // prefetch depth: rows of one tensor
inline constexpr int kEmaPartPrefetch = 16;  // prefetch depth: chunks or groups
inline constexpr int kEmaGradPrefetch = 3;   // prefetch depth: rows of three tensors

// Says how the sums before some chunks enter those at their end: multiplied by `product`, or not at all if `resets` is
// 1.
template <class A>
struct alignas(2 * sizeof(A)) Factor {
  A product, resets;
};

struct EmaShape {
  Documents documents;  // of rows
  i32 width, panels, chunks;
};

// Lanes beyond the width own column 0 too, so that all lanes of a warp take the same steps. They store nothing.
struct EmaOwner {
  i32 chunk, panel, column;
  bool stores;
};
template <int kVec>
__device__ __forceinline__ EmaOwner ema_owner(const EmaShape& shape) {
  const i64 warp = static_cast<i64>(blockIdx.x) * kEmaWarps + threadIdx.x / kWarp;
  const i32 chunk = static_cast<i32>(warp / shape.panels), panel = static_cast<i32>(warp % shape.panels);
  const i32 column = (panel * kWarp + static_cast<i32>(threadIdx.x % kWarp)) * kVec;
  return {chunk, panel, column < shape.width ? column : 0, column < shape.width};
}

// Has the rows of a chunk that are in a document, and where all of its rows end.
struct ChunkRows {
  i32 begin, count, end;
};
__device__ __forceinline__ ChunkRows chunk_rows(const EmaShape& shape, i32 chunk) {
  const i32 begin = chunk * kEmaRows, end = min(begin + kEmaRows, shape.documents.bytes);
  return {begin, max(min(shape.documents.end(), end) - begin, 0), end};
}

// Returns whether a document begins at this row, or the last one ends before it.
__device__ __forceinline__ bool begins_document(const Documents& documents, i32 row) {
  if (documents.offsets == nullptr) return documents.length == 0 || row % documents.length == 0;
  const i64 first = partition_point<i64>(0, documents.count + 1, [&](i64 b) { return documents.offsets[b] < row; });
  return first <= documents.count && documents.offsets[first] == row;
}

// Has for each row of a chunk whether it takes nothing from the row before it in the order of the scan, and in each
// lane the factor of that row. All lanes of a warp take part.
template <class A>
struct ChunkWeights {
  u32 resets;
  A keep;
};
template <bool kReverse, class A>
__device__ __forceinline__ ChunkWeights<A> chunk_weights(const EmaShape& shape, const ChunkRows& rows, const A* p) {
  const i32 lane = threadIdx.x % kWarp, row = rows.begin + lane + (kReverse ? 1 : 0);
  const bool inside = lane < rows.count, resets = inside && begins_document(shape.documents, row);
  const A keep = inside && !resets && row < shape.documents.bytes ? 1 - p[row] : A(0);
  return {__ballot_sync(kAllLanes, resets), keep};
}

template <class A, int kSize>
__device__ __forceinline__ void load_numbers(A (&numbers)[kSize], const A* from) {
  constexpr int kOne = kAccess<A, kSize>;
#pragma unroll
  for (int c = 0; c < kSize; c += kOne) {
    const AlignedVector<A, kOne> some = load<kOne>(from + c);
#pragma unroll
    for (int i = 0; i < kOne; ++i) numbers[c + i] = some[i];
  }
}

// --- step 1 ----------------------------------------------------------------------------------------------------------

// Entry s of `ends` [chunks][width] and of `factors` [chunks] is that of chunk s in the order of the scan.
template <class A>
struct EmaParts {
  A* ends;
  Factor<A>* factors;
};

// Forward `values` is x, backward it is grad_y, whose weight is 1.
template <class T, int kVec, bool kReverse>
__global__ void __launch_bounds__(kEmaThreads)
    ema_scan_ends_kernel(const T* values, i32 stride, const acc_t<T>* p, EmaShape shape, EmaParts<acc_t<T>> parts) {
  using A = acc_t<T>;
  const EmaOwner own = ema_owner<kVec>(shape);
  if (own.chunk >= shape.chunks) return;
  const ChunkRows rows = chunk_rows(shape, own.chunk);
  const auto [resets, keep] = chunk_weights<kReverse>(shape, rows, p);
  const i32 lane = threadIdx.x % kWarp;
  const A weight = !kReverse && lane < rows.count ? p[rows.begin + lane] : A(1);
  // Only rows since the last document that begins in the chunk enter its ends.
  i32 first = kReverse ? rows.count - 1 : 0;
  if (resets != 0) first = kReverse ? __ffs(static_cast<int>(resets)) - 1 : 31 - __clz(static_cast<int>(resets));
  const i32 count = kReverse ? first + 1 : rows.count - first;

  A sums[kVec] = {}, product = 1;
  stream_rows<T, kVec, kEmaPrefetch>(values + static_cast<i64>(rows.begin + first) * stride + own.column,
                                     kReverse ? -stride : stride, count, [&](i32 i, const Operands<T, kVec>& row) {
                                       const i32 at = kReverse ? first - i : first + i;
                                       const A k = __shfl_sync(kAllLanes, keep, at),
                                               w = __shfl_sync(kAllLanes, weight, at);
                                       A x[kVec];
                                       to_floats<T>(x, row);
                                       product *= k;
#pragma unroll
                                       for (int c = 0; c < kVec; ++c) sums[c] = k * sums[c] + w * x[c];
                                     });
  const i64 slot = kReverse ? shape.chunks - 1 - own.chunk : own.chunk;
  if (own.stores) store_numbers(parts.ends + slot * shape.width + own.column, sums);
  if (own.panel == 0 && lane == 0) parts.factors[slot] = {product, resets != 0 ? A(1) : A(0)};
}

// --- steps 2 and 3 ---------------------------------------------------------------------------------------------------

template <class A, int kVec>
struct JoinedParts {
  A sums[kVec] = {};
  Factor<A> factor = {1, 0};

  __device__ __forceinline__ void add(const AlignedVector<A, kVec>& ends, const Factor<A>& next) {
#pragma unroll
    for (int c = 0; c < kVec; ++c) sums[c] = next.resets != 0 ? ends[c] : ends[c] + next.product * sums[c];
    factor = {factor.product * next.product, max(factor.resets, next.resets)};
  }
};

// Calls visit(i, ends, factor) for parts [begin, end) in order.
template <int kVec, class A, class Visit>
__device__ __forceinline__ void walk_parts(const EmaParts<A>& parts, i32 begin, i32 end, i32 width, i32 column,
                                           const Visit& visit) {
#pragma unroll 1
  for (i32 first = begin; first < end; first += kEmaPartPrefetch) {
    AlignedVector<A, kVec> ends[kEmaPartPrefetch];
    Factor<A> factors[kEmaPartPrefetch];
#pragma unroll
    for (int i = 0; i < kEmaPartPrefetch; ++i)
      if (first + i < end) {
        ends[i] = load<kVec>(parts.ends + static_cast<i64>(first + i) * width + column);
        factors[i] = parts.factors[first + i];
      }
#pragma unroll
    for (int i = 0; i < kEmaPartPrefetch; ++i)
      if (first + i < end) visit(first + i, ends[i], factors[i]);
  }
}

template <class A, int kVec>
__global__ void __launch_bounds__(kRowThreads)
    ema_scan_groups_kernel(EmaParts<A> chunks, i32 count, i32 width, RowTile tile, EmaParts<A> groups, i32 num_groups) {
  const auto [group, column] = owned_by_thread<kVec>(tile);
  if (group >= num_groups || column >= width) return;
  const i32 begin = static_cast<i32>(group) * kEmaChunks, end = min(begin + kEmaChunks, count);
  JoinedParts<A, kVec> joined;
  walk_parts<kVec>(chunks, begin, end, width, column,
                   [&](i32, const auto& ends, const auto& factor) { joined.add(ends, factor); });
  store_numbers(groups.ends + group * width + column, joined.sums);
  if (column == 0) groups.factors[group] = joined.factor;
}

template <class A, int kVec>
__global__ void __launch_bounds__(kRowThreads)
    ema_scan_carries_kernel(EmaParts<A> chunks, i32 count, i32 width, RowTile tile, EmaParts<A> groups) {
  const auto [group, column] = owned_by_thread<kVec>(tile);
  const i32 begin = static_cast<i32>(group) * kEmaChunks, end = min(begin + kEmaChunks, count);
  if (begin >= count || column >= width) return;
  JoinedParts<A, kVec> joined;
  walk_parts<kVec>(groups, 0, static_cast<i32>(group), width, column,
                   [&](i32, const auto& ends, const auto& factor) { joined.add(ends, factor); });
  walk_parts<kVec>(chunks, begin, end, width, column, [&](i32 i, const auto& ends, const auto& factor) {
    store_numbers(chunks.ends + static_cast<i64>(i) * width + column, joined.sums);
    joined.add(ends, factor);
  });
}

// --- step 4 ----------------------------------------------------------------------------------------------------------

// Sets `sums` to those before a chunk. `carries` is null where there is one chunk.
template <class A, int kVec>
__device__ __forceinline__ void load_carries(A (&sums)[kVec], const A* carries, i64 slot, const EmaShape& shape,
                                             i32 column) {
  if (carries != nullptr && slot > 0) load_numbers(sums, carries + slot * shape.width + column);
}

template <class T, int kVec>
__device__ __forceinline__ void store_zeros(T* to, const EmaShape& shape, const ChunkRows& rows, const EmaOwner& own) {
  for (i32 row = rows.begin + rows.count; row < rows.end; ++row)
    if (own.stores) store(to + static_cast<i64>(row) * shape.width + own.column, AlignedVector<T, kVec>{});
}

template <class T, int kVec>
__global__ void __launch_bounds__(kEmaThreads)
    ema_scan_fwd_kernel(const T* x, i32 stride, const acc_t<T>* p, EmaShape shape, const acc_t<T>* carries, T* y) {
  using A = acc_t<T>;
  const EmaOwner own = ema_owner<kVec>(shape);
  if (own.chunk >= shape.chunks) return;
  const ChunkRows rows = chunk_rows(shape, own.chunk);
  const u32 resets = chunk_weights<false>(shape, rows, p).resets;
  const i32 lane = threadIdx.x % kWarp;
  const A of_lane = lane < rows.count ? p[rows.begin + lane] : A(0);
  A sums[kVec] = {};
  load_carries(sums, carries, own.chunk, shape, own.column);
  T* const to = y + static_cast<i64>(rows.begin) * shape.width + own.column;
  stream_rows<T, kVec, kEmaPrefetch>(x + static_cast<i64>(rows.begin) * stride + own.column, stride, rows.count,
                                     [&](i32 i, const Operands<T, kVec>& row) {
                                       const A weight = __shfl_sync(kAllLanes, of_lane, i);
                                       const bool begins = resets >> i & 1;
                                       A values[kVec];
                                       to_floats<T>(values, row);
#pragma unroll
                                       for (int c = 0; c < kVec; ++c)
                                         sums[c] = weight * values[c] + (begins ? A(0) : (1 - weight) * sums[c]);
                                       if (own.stores)
                                         store(to + static_cast<i64>(i) * shape.width, from_floats<T>(sums));
                                     });
  store_zeros<T, kVec>(y, shape, rows, own);
}

// `grad_p` is [panels][rows].
template <class T>
struct EmaGrad {
  const T *grad_y, *x, *y;
  i32 grad_stride, x_stride, y_stride;
  T* grad_x;
  acc_t<T>* grad_p;
};

template <class T, int kVec>
__global__ void __launch_bounds__(kEmaThreads)
    ema_scan_bwd_kernel(EmaGrad<T> tensors, const acc_t<T>* p, EmaShape shape, const acc_t<T>* carries) {
  using A = acc_t<T>;
  const EmaOwner own = ema_owner<kVec>(shape);
  if (own.chunk >= shape.chunks) return;
  const ChunkRows rows = chunk_rows(shape, own.chunk);
  const u32 begins = chunk_weights<false>(shape, rows, p).resets | (own.chunk == 0 ? 1 : 0);
  const auto [resets, keep_of_lane] = chunk_weights<true>(shape, rows, p);
  const i32 lane = threadIdx.x % kWarp;
  const A weight_of_lane = lane < rows.count ? p[rows.begin + lane] : A(0);
  A g[kVec] = {}, dot_of_lane = 0;
  load_carries(g, carries, shape.chunks - 1 - own.chunk, shape, own.column);
  const auto row_of = [&](const T* rows_of, i32 stride, i32 i) {
    return load_operands<T, kVec>(rows_of + static_cast<i64>(rows.begin + i) * stride + own.column);
  };
#pragma unroll 1
  for (i32 last = rows.count - 1; last >= 0; last -= kEmaGradPrefetch) {
    Operands<T, kVec> grad[kEmaGradPrefetch], x[kEmaGradPrefetch], before[kEmaGradPrefetch];
#pragma unroll
    for (int n = 0; n < kEmaGradPrefetch; ++n) {
      const i32 i = last - n;
      before[n] = {};
      if (i < 0) continue;
      grad[n] = row_of(tensors.grad_y, tensors.grad_stride, i);
      x[n] = row_of(tensors.x, tensors.x_stride, i);
      if ((begins >> i & 1) == 0) before[n] = row_of(tensors.y, tensors.y_stride, i - 1);
    }
#pragma unroll
    for (int n = 0; n < kEmaGradPrefetch; ++n) {
      const i32 i = last - n;
      if (i < 0) continue;
      const A weight = __shfl_sync(kAllLanes, weight_of_lane, i), keep = __shfl_sync(kAllLanes, keep_of_lane, i);
      const bool ends = resets >> i & 1;
      A grads[kVec], values[kVec], averages[kVec], sent[kVec], dot = 0;
      to_floats<T>(grads, grad[n]);
      to_floats<T>(values, x[n]);
      to_floats<T>(averages, before[n]);
#pragma unroll
      for (int c = 0; c < kVec; ++c) {
        g[c] = grads[c] + (ends ? A(0) : keep * g[c]);
        sent[c] = weight * g[c];
        dot += (values[c] - averages[c]) * g[c];
      }
      if (own.stores)
        store(tensors.grad_x + static_cast<i64>(rows.begin + i) * shape.width + own.column, from_floats<T>(sent));
      dot = warp_sum(own.stores ? dot : A(0));
      if (lane == i) dot_of_lane = dot;
    }
  }
  store_zeros<T, kVec>(tensors.grad_x, shape, rows, own);
  if (rows.begin + lane < rows.end)
    tensors.grad_p[static_cast<i64>(own.panel) * shape.documents.bytes + rows.begin + lane] = dot_of_lane;
}

// Adds up the panels of grad_p.
template <class A>
__global__ void __launch_bounds__(kEmaThreads)
    ema_scan_sum_kernel(const A* of_panels, i32 rows, i32 panels, A* grad_p) {
  const i64 row = static_cast<i64>(blockIdx.x) * kEmaThreads + threadIdx.x;
  if (row >= rows) return;
  A sum = 0;
  for (i32 panel = 0; panel < panels; ++panel) sum += of_panels[static_cast<i64>(panel) * rows + row];
  grad_p[row] = sum;
}

}  // namespace blt
