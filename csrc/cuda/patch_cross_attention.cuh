// In patch_cross_attention patches read bytes (encode), or bytes read patches (decode).
//
//   s_ij = scale q_i . k_j for the keys j that query i reads,  lse_i = log sum_j exp s_ij
//   out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
//   ds_ij = scale p_ij (g_i . v_j - sum_j p_ij g_i . v_j)
//   dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i
//
// Query head h reads head h / (H / G) of the G heads of k and v.
//
// A group of 8 to 32 lanes owns a unit (patch_readers.cuh), K vectors by a handful of bytes, in one head of k and v. It
// has as many lanes as a row has vectors of 16 bytes (head_slices.cuh). A warp has the groups of neighbouring heads of
// the same unit, so it never diverges. It goes through kRun units in a row. The group holds kHeld rows of one side in
// registers and streams those of the other past them; more held rows are taken in chunks. Streamed rows go through
// shared memory, and the rows to hold next are loaded to registers meanwhile (row_stream.cuh). As units are neighbours
// in memory, a warp waits for memory when it starts and never between units. Every row of every result has one owner,
// which sums in the order of the rows, without atomics.
//
//   patch_cross_attention_fwd_queries  holds queries, streams keys with a running softmax
//   patch_cross_attention_fwd_keys     decoding, where a unit's keys are held at once: streams queries
//
// Units of a divided patch store the sums of their softmax, m, l and sum_j exp(s_ij - m) v_j. patch_cross_attention_sum
// adds them up in the order of the parts.
//
// Bytes: forward moves q, k, v, out and lse once; backward moves q, k, v, grad_out, lse and the gradients once. Flops
// for a (query, key) pair and head: 4 E forward, 10 to 14 E backward. With K = 2 in bf16 that is about 2 flops a byte,
// so memory is the limit. Before its first row a warp waits for two loads that depend on each other, offsets and rows.
//
// Each warp has up to 8 KB of rows under way, 16 KB where keys pass twice. With 128 registers forward and 168 backward
// a multiprocessor has room for 16 and 12 warps, and 23 KB under way cover the latency of memory. Heads are at most 256
// wide.
#pragma once

#include "head_slices.cuh"
#include "patch_readers.cuh"
#include "row_stream.cuh"

namespace blt {

inline constexpr int kRun = 4;
inline constexpr int kThreads = 128, kWarps = kThreads / kWarp, kPartSumThreads = 256;
inline constexpr int kRingBytes = 8 << 10;  // bounds the rows on their way to a warp
inline constexpr int kMaxWidth = 256;

// A multiprocessor is to have room for this many blocks. Compilers for older GPUs need more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kManyRegisters = true;
#else
inline constexpr bool kManyRegisters = false;
#endif
template <class S>
inline constexpr bool kWide = kManyRegisters || S::kVecs > 1 || sizeof(typename S::A) == 8;
template <class S>
inline constexpr int kForwardBlocks = kWide<S> ? 2 : 4;
template <class S>
inline constexpr int kBackwardBlocks = sizeof(typename S::A) == 8 ? 1
                                       : kWide<S>                 ? 2
                                                                  : 3;

template <class T>
struct CrossAttention {
  HeadTensor<const T> q, k, v;
  int heads, kv_heads, heads_per_kv_head, width;
  acc_t<T> scale;
};

// Holds the sums of units by slot (patch_readers.cuh), vector of a patch and head.
template <class A>
struct PartSums {
  A* softmax;                   // has m and l of a query, or 1 / l and delta
  A* sums;                      // has E numbers
  int patches, vectors, heads;  // counts patches of a slot, vectors of a patch
  __device__ __forceinline__ i64 at(const PatchUnit& unit, u32 vector, int head) const {
    return at(unit.slot, static_cast<int>(vector) - unit.origin * vectors, head);
  }
  __device__ __forceinline__ i64 at(int slot, int row, int head) const {
    return (static_cast<i64>(slot) * (patches * vectors) + row) * heads + head;
  }
};

// A lane has a head of k and v and its warp's first unit. The warp is one of `warps` that have this head.
struct Task {
  int head, unit, warp, warps;
};
template <class S>
__device__ __forceinline__ Task task_of_lane(int kv_heads) {
  const int groups = ceil_div(kv_heads, S::kHeads), block = blockIdx.x / groups;
  const int warp = block * kWarps + threadIdx.x / kWarp;
  const int head = blockIdx.x % groups * S::kHeads + threadIdx.x % kWarp / S::kLanes;
  return {head, warp * kRun, warp, static_cast<int>(gridDim.x) / groups * kWarps};
}

// The block's shared memory has a ring for each warp.
template <class Ring>
using Rings = Ring[kWarps];
template <class Ring>
__device__ __forceinline__ Ring& ring_of_warp() {
  return shared_memory<Rings<Ring>>()[threadIdx.x / kWarp];
}

// --- numbers ---------------------------------------------------------------------------------------------------------

// Returns x * y, never fused with a subtraction that follows: lse consists of rounded products, so a fused scale * s -
// lse would leave their rounding errors, millions for scores of 1e13.
__device__ __forceinline__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double rounded_product(double x, double y) { return __dmul_rn(x, y); }

// --- rows ------------------------------------------------------------------------------------------------------------

// Returns the r-th of the query heads that read a head of k and v.
template <class T>
__device__ __forceinline__ int query_head(const CrossAttention<T>& problem, int kv_head, int r) {
  return kv_head < problem.kv_heads ? kv_head * problem.heads_per_kv_head + r : problem.heads;
}

template <class S>
__device__ __forceinline__ void store_rows(const OutputColumn<S>& rows, u32 row, int count,
                                           const Slice<S> (&slices)[S::kHeld]) {
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i)
    if (i < count) rows.store(row + i, slices[i]);
}

// These two return the columns of a lane in a tensor of query heads, or in one of heads of k and v.
template <class S, class T>
__device__ __forceinline__ Column<S, T> query_column(const CrossAttention<typename S::T>& problem,
                                                     const HeadTensor<T>& x, int head) {
  return column_of<S>(x, head, problem.heads, problem.width);
}
template <class S, class T>
__device__ __forceinline__ Column<S, T> kv_column(const CrossAttention<typename S::T>& problem, const HeadTensor<T>& x,
                                                  int head) {
  return column_of<S>(x, head, problem.kv_heads, problem.width);
}

// Writes rows of 0 to a result for bytes that read nothing, or are not read. If it is `out`, their lse is -infinity.
template <class S>
struct UnreadRows {
  OutputColumn<S> rows;
  typename S::A* lse = nullptr;
  int heads = 0;

  // Writes every `step`-th row from begin to end.
  __device__ __forceinline__ void write(u32 begin, u32 end, u32 step = 1) const {
    for (u32 row = begin; row < end; row += step) rows.store(row, Slice<S>{});
    if (!lse || rows.room <= 0 || lane_column<S>() > 0) return;
    for (u32 row = begin; row < end; row += step) lse[static_cast<i64>(row) * heads] = minus_infinity<typename S::A>();
  }
  // Writes the rows of bytes that no unit has.
  __device__ __forceinline__ void write_unowned(const Unowned& unowned, const Task& task) const {
    write(unowned.before.begin + task.warp, unowned.before.end, task.warps);
    write(unowned.beyond.begin + task.warp, unowned.beyond.end, task.warps);
  }
  // Writes the rows of bytes of a unit that read nothing.
  __device__ __forceinline__ void write_waiting(const PatchReaders& readers, const PatchUnit& unit) const {
    readers.for_each_range(unit, [&](const Range& range) {
      const Rows own = waiting(range, unit.stop);
      write(own.begin, own.end);
    });
  }
};

// HeldRows takes this where rows have no number.
template <class A>
struct NoNumber {
  __device__ __forceinline__ A operator()(u32, u32) const { return 0; }
};

// Stores a slice of E sums.
template <class S>
__device__ __forceinline__ void store_sums(typename S::A* to, int room, const Slice<S>& slice) {
#pragma unroll
  for (int r = 0; r < S::kVecs; ++r) {
    typename S::A numbers[S::kVec];
#pragma unroll
    for (int c = 0; c < S::kVec; ++c) numbers[c] = slice[r * S::kVec + c];
    const int offset = OutputColumn<S>::offset(r);
    if (offset < room) store_numbers(to + lane_column<S>() + offset, numbers);
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
struct CrossOutput {
  HeadTensor<T> out;
  acc_t<T>* lse;  // [queries, heads]
  PartSums<acc_t<T>> parts;
};

// Returns the unread rows of `out` in a query head.
template <class S>
__device__ __forceinline__ UnreadRows<S> unread(const CrossAttention<typename S::T>& problem,
                                                const CrossOutput<typename S::T>& output, int head) {
  return {query_column<S>(problem, output.out, head), output.lse + head, problem.heads};
}
template <class S>
__device__ __forceinline__ void write_unowned(const CrossAttention<typename S::T>& problem, const Unowned& unowned,
                                              const CrossOutput<typename S::T>& output, const Task& task) {
#pragma unroll 1
  for (int r = 0; r < problem.heads_per_kv_head; ++r)
    unread<S>(problem, output, query_head(problem, task.head, r)).write_unowned(unowned, task);
}

// Holds the softmax of the lane's query over the keys so far. `total` adds only the lane's own row of each tile.
template <class S>
struct Running {
  typename S::A top = minus_infinity<typename S::A>(), total = 0;
  Slice<S> sums[S::kHeld];

  __device__ __forceinline__ typename S::A shift() const { return top == minus_infinity<typename S::A>() ? 0 : top; }
};

template <class S>
using KeyRing = RowRing<S, 2, false, kRingBytes>;
template <class S>
using QueryRing = RowRing<S, 1, false, kRingBytes>;

template <class S>
__device__ __forceinline__ void attend(Running<S>& running, const Slice<S> (&q)[S::kHeld], RowStream<KeyRing<S>>& keys,
                                       const Rows& rows, u32 limit, bool kept, typename S::A scale) {
  using A = typename S::A;
  const Cell cell = cell_of_lane<S>();
  for_each_tile(keys, rows.begin, rows.end, limit, kept, [&](u32 row, const Slice<S>(&x)[2][S::kTile]) {
    A score = rounded_product(dots(q, x[0]), scale);
    if (row + cell.tile >= rows.end) score = minus_infinity<A>();
    const A before = running.top;
    running.top = max(before, fold_tile<S>(score, Max{}));
    const A fade = exp(before - running.shift()), weight = exp(score - running.shift());
    running.total = running.total * fade + weight;
#pragma unroll
    for (int i = 0; i < S::kHeld; ++i) {
      const A faded = of_cell<S>(fade, i, 0);
#pragma unroll
      for (int c = 0; c < S::kSize; ++c) running.sums[i][c] *= faded;
#pragma unroll
      for (int a = 0; a < S::kTile; ++a) add(running.sums[i], of_cell<S>(weight, i, a), x[1][a]);
    }
  });
}

template <class S>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<S>)
    patch_cross_attention_fwd_queries_kernel(CrossAttention<typename S::T> problem, PatchReaders readers,
                                             CrossOutput<typename S::T> output) {
  using A = typename S::A;
  const Task task = task_of_lane<S>(problem.kv_heads);
  const Cell cell = cell_of_lane<S>();
  const Unowned unowned = readers.unowned();
  RowStream<KeyRing<S>> keys(ring_of_warp<KeyRing<S>>());
  keys.set({kv_column<S>(problem, problem.k, task.head), kv_column<S>(problem, problem.v, task.head)});
  HeldRows<S, 1> next;
  const auto start = [&](u32 vector, u32 byte, const Run& run) {
    keys.start(readers.encode ? byte : vector, readers.encode ? run.bytes_end : run.vectors_end);
  };
  for_each_unit<true, kRun>(readers, task.unit, task.unit + kRun, start, [&](const PatchUnit& unit, const Run& run) {
    const u32 keys_end = readers.encode ? run.bytes_end : run.vectors_end;
    const u32 queries_end = problem.heads_per_kv_head > 1 ? 0 : readers.encode ? run.vectors_end : run.bytes_end;
#pragma unroll 1
    for (int r = 0; r < problem.heads_per_kv_head; ++r) {
      const int head = query_head(problem, task.head, r);
      const InputColumn<S> queries[1] = {query_column<S>(problem, problem.q, head)};
      const OutputColumn<S> out = query_column<S>(problem, output.out, head);
      if (!readers.encode) unread<S>(problem, output, head).write_waiting(readers, unit);
      readers.for_each_rows(unit, readers.encode, [&](const Rows& held) {
#pragma unroll 1
        for (u32 row = held.begin; row < held.end; row += S::kHeld) {
          const int count = static_cast<int>(min<u32>(held.end - row, S::kHeld));
          const bool again = r + 1 < problem.heads_per_kv_head || row + count < held.end;
          Slice<S> q[1][S::kHeld];
          next.take(q, queries, row, count, max(held.end, queries_end), NoNumber<A>{});
          Running<S> running;
          readers.for_each_rows(unit, !readers.encode, [&](const Rows& rows) {
            const u32 limit = again ? rows.end : max(rows.end, keys_end);
            attend<S>(running, q[0], keys, rows, limit, again && rows.size() <= KeyRing<S>::kRows, problem.scale);
          });
          const A total = fold_tile<S>(running.total, Sum{});
          const bool writes = head < problem.heads && cell.held < count && cell.tile == 0 && first_of_cell<S>();
          if (readers.encode && unit.slot >= 0) {
            const i64 at = output.parts.at(unit, row, head);
            if (writes)
              store(output.parts.softmax + 2 * (at + cell.held * problem.heads),
                    AlignedVector<A, 2>{{running.top, total}});
#pragma unroll
            for (int i = 0; i < S::kHeld; ++i)
              if (i < count)
                store_sums<S>(output.parts.sums + (at + i * problem.heads) * problem.width, out.room, running.sums[i]);
            continue;
          }
          if (writes)
            output.lse[static_cast<i64>(row + cell.held) * problem.heads + head] = running.shift() + log(total);
          const A inverse = total == 0 ? A(0) : 1 / total;
#pragma unroll
          for (int i = 0; i < S::kHeld; ++i) {
            const A own = of_cell<S>(inverse, i, 0);
#pragma unroll
            for (int c = 0; c < S::kSize; ++c) running.sums[i][c] *= own;
          }
          store_rows<S>(out, row, count, running.sums);
        }
      });
    }
  });
  if (!readers.encode) write_unowned<S>(problem, unowned, output, task);
}

// Decodes patches of at most kHeld keys: the softmax of a query is over the cells of its row.
template <class S>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<S>)
    patch_cross_attention_fwd_keys_kernel(CrossAttention<typename S::T> problem, PatchReaders readers,
                                          CrossOutput<typename S::T> output) {
  using A = typename S::A;
  const Task task = task_of_lane<S>(problem.kv_heads);
  const Cell cell = cell_of_lane<S>();
  const Unowned unowned = readers.unowned();
  const bool one_head = problem.heads_per_kv_head == 1;
  const InputColumn<S> keys[2] = {kv_column<S>(problem, problem.k, task.head),
                                  kv_column<S>(problem, problem.v, task.head)};
  RowStream<QueryRing<S>> queries(ring_of_warp<QueryRing<S>>());
  const auto set_head = [&](int head) { queries.set({query_column<S>(problem, problem.q, head)}); };
  set_head(query_head(problem, task.head, 0));
  HeldRows<S, 2> next;
  const auto start = [&](u32 vector, u32 byte, const Run& run) {
    next.request(keys, vector, run.vectors_end, NoNumber<A>{});
    if (one_head) queries.start(byte, run.bytes_end);
  };
  for_each_unit<false, kRun>(readers, task.unit, task.unit + kRun, start, [&](const PatchUnit& unit, const Run& run) {
    const Rows held = readers.vectors(unit);
    const int count = static_cast<int>(held.end - held.begin);
    Slice<S> x[2][S::kHeld];
    next.take(x, keys, held.begin, count, max(held.end, run.vectors_end), NoNumber<A>{});
    const auto& [k, v] = x;
#pragma unroll 1
    for (int r = 0; r < problem.heads_per_kv_head; ++r) {
      const int head = query_head(problem, task.head, r);
      if (!one_head) set_head(head);
      const OutputColumn<S> out = query_column<S>(problem, output.out, head);
      unread<S>(problem, output, head).write_waiting(readers, unit);
      readers.for_each_rows(unit, false, [&](const Rows& rows) {
        const u32 end = one_head ? max(rows.end, run.bytes_end) : rows.end;
        for_each_tile(queries, rows.begin, rows.end, end, false, [&](u32 row, const Slice<S>(&q)[1][S::kTile]) {
          A score = rounded_product(dots(k, q[0]), problem.scale);
          if (cell.held >= count) score = minus_infinity<A>();
          const A top = fold_held<S>(score, Max{}), shift = top == minus_infinity<A>() ? A(0) : top;
          const A weight = exp(score - shift), total = fold_held<S>(weight, Sum{});
          const A share = total == 0 ? A(0) : weight * (1 / total);
          if (head < problem.heads && row + cell.tile < rows.end && cell.held == 0 && first_of_cell<S>())
            output.lse[static_cast<i64>(row + cell.tile) * problem.heads + head] = shift + log(total);
#pragma unroll
          for (int a = 0; a < S::kTile; ++a) {
            Slice<S> sum;
#pragma unroll
            for (int i = 0; i < S::kHeld; ++i) add(sum, of_cell<S>(share, i, a), v[i]);
            if (row + a < rows.end) out.store(row + a, sum);
          }
        });
      });
    }
  });
  write_unowned<S>(problem, unowned, output, task);
}

}  // namespace blt
