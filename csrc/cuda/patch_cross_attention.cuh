// patch_cross_attention: patches read bytes (encode), or bytes read patches (decode).
//
//   s_ij = scale q_i . k_j for the keys j that query i reads,  lse_i = log sum_j exp s_ij
//   out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
//   ds_ij = scale p_ij (g_i . v_j - sum_j p_ij g_i . v_j)
//   dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i
//
// Queries that read the same keys make a block with them, mostly K by a handful (patch_readers.cuh). A group of 4 to 32
// lanes owns a block in one head: as many lanes as a row has vectors of 16 bytes (head_slices.cuh), and a warp has the
// groups of neighbouring heads of the same patch, so all its lanes do the same and it never diverges. The group holds a
// few rows of one side in registers and streams those of the other past them, several under way at once; a dot product
// is a sum over its lanes. More rows than registers hold are taken in chunks. No shared memory, no barriers, no
// atomics: every row of every result has one owner, which sums in the order of the rows.
//
//   forward           holds queries, streams keys with a running softmax
//   backward, encode  holds the K queries of a patch, streams its bytes twice: first the sums of the softmax, then dk
//                     and dv of each byte as it passes, while dq adds up; the second time from the L1 cache
//   backward, decode  holds the K vectors of a patch, streams its readers: a byte's dq as it passes, dk and dv add up
//   backward of a window, or of a K that registers do not hold: one kernel holds queries for dq and leaves the sums of
//                     their softmax, 2 numbers, to a second one that holds keys for dk and dv
//
// Bytes: forward q, k, v, out, lse once; backward q, k, v, grad_out, lse and the gradients once, never `out`. With a
// window of w keys pass w times through the L2 cache, and the two kernels of the backward read everything twice. Flops
// for a (query, key) pair and head: 4 E forward, 10 to 14 E backward. With K = 2 in bf16 that is about 2 flops a byte,
// so memory is the limit. A block of thousands of rows is still a single group's work: it is right, but not fast.
//
// Registers: for the shapes of BLT (E = 64 or 128, K <= 2) at most 128 forward and 168 backward, so 16 and 12 warps on
// each multiprocessor, every lane with two rows of both k and v under way: 32 KB and 24 KB a multiprocessor, more than
// the 15 KB that cover the latency of memory. Heads are at most 256 wide.
#pragma once

#include "head_slices.cuh"
#include "patch_readers.cuh"

namespace blt {

inline constexpr int kAttentionThreads = 128;

// Blocks that a multiprocessor must have room for: fewer, with more registers each, the more slices there are in
// registers for every held row and for a streamed one.
template <class S, int kHeld>
constexpr int attention_blocks(int held, int streamed) {
  constexpr int kWords = S::kSize * (sizeof(typename S::A) == sizeof(double) ? 3 : 1);
  const int words = (held * kHeld + streamed) * kWords;
  return words <= 24 ? 5 : words <= 48 ? 4 : words <= 96 ? 3 : 2;
}

template <class T>
struct CrossAttention {
  HeadRows<const T> q, k, v;
  i64 heads, width;
  acc_t<T> scale;
};

// What a lane's group owns: a patch in one head. Groups beyond the heads own rows of no width, and go along idly.
struct Task {
  i64 patch, head, width;
  bool writes;  // what is one number for the whole group
};
template <class S>
__device__ __forceinline__ Task task_of_lane(i64 heads, i64 width) {
  const i64 warp = static_cast<i64>(blockIdx.x) * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  const i64 warps = ceil_div<i64>(heads, S::kHeads);  // for a patch
  const i64 head = warp % warps * S::kHeads + threadIdx.x % kWarp / S::kLanes;
  return {warp / warps, least(head, heads - 1), head < heads ? width : 0, head < heads && threadIdx.x % S::kLanes == 0};
}

// kCount rows from `row` on, all under way at once; rows from `end` on are 0.
template <class S, int kCount>
__device__ __forceinline__ void load_slices(Raw<S> (&raw)[kCount], const HeadRows<const typename S::T>& rows, i64 row,
                                            i64 end, const Task& task) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) raw[i] = load_slice<S>(rows.at(row + i, task.head), row + i < end ? task.width : 0);
}
template <class S, int kCount>
__device__ __forceinline__ void hold_slices(Slice<S> (&held)[kCount], const HeadRows<const typename S::T>& rows,
                                            const RowRange& range, const Task& task) {
  Raw<S> raw[kCount];
  load_slices(raw, rows, range.begin, range.end, task);
#pragma unroll
  for (int i = 0; i < kCount; ++i) held[i] = widen(raw[i]);
}
template <class S, int kCount>
__device__ __forceinline__ void store_slices(const HeadRows<typename S::T>& rows, const RowRange& range,
                                             const Task& task, const Slice<S> (&slices)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (range.begin + i < range.end) store_slice<S>(rows.at(range.begin + i, task.head), task.width, slices[i]);
}
template <class S>
__device__ __forceinline__ void clear_slices(const HeadRows<typename S::T>& rows, i64 begin, i64 end, i64 step,
                                             const Task& task) {
  for (i64 row = begin; row < end; row += step) store_slice<S>(rows.at(row, task.head), task.width, Slice<S>{});
}

// That of a key that is not there, and lse where there is no key at all: minus infinity.
template <class A>
__device__ __forceinline__ A no_score() {
  return static_cast<A>(-__int_as_float(0x7f800000));
}
__device__ __forceinline__ float power_of_e(float x) { return expf(x); }
__device__ __forceinline__ double power_of_e(double x) { return exp(x); }
// x * y, never fused with the subtraction that follows: in scale * s - lse the rounding of lse, millions for scores of
// 1e13, would be left.
__device__ __forceinline__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double rounded_product(double x, double y) { return __dmul_rn(x, y); }
__device__ __forceinline__ float log_to_e(float x) { return logf(x); }
__device__ __forceinline__ double log_to_e(double x) { return log(x); }

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
struct CrossOutput {
  HeadRows<T> out;
  acc_t<T>* lse;  // [queries, heads]
};

// Up to kHeld queries, with all their keys.
template <class S, int kHeld>
__device__ __forceinline__ void attend(const CrossAttention<typename S::T>& problem,
                                       const CrossOutput<typename S::T>& output, const RowRange& queries,
                                       const RowRange& keys, const Task& task) {
  using A = typename S::A;
  constexpr int kAhead = S::kAhead;
  const A none = no_score<A>();
  Slice<S> q[kHeld], sums[kHeld];
  A top[kHeld], shift[kHeld] = {}, total[kHeld] = {};
  hold_slices<S>(q, problem.q, queries, task);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) top[i] = none;
  for (i64 row = keys.begin; row < keys.end; row += kAhead) {
    Raw<S> k[kAhead], v[kAhead];
    load_slices(k, problem.k, row, keys.end, task);
    load_slices(v, problem.v, row, keys.end, task);
    A scores[kAhead][kHeld];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const bool there = row + a < keys.end;
      const Slice<S> key = widen(k[a]);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) scores[a][i] = there ? dot(q[i], key) : 0;
      if (there) sum_lanes<S::kLanes>(scores[a]);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) scores[a][i] = there ? rounded_product(scores[a][i], problem.scale) : none;
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const A before = top[i];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) top[i] = most(top[i], scores[a][i]);
      shift[i] = top[i] == none ? A(0) : top[i];
      const A fade = power_of_e(before - shift[i]);
      total[i] *= fade;
#pragma unroll
      for (int c = 0; c < S::kSize; ++c) sums[i][c] *= fade;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (row + a >= keys.end) break;
      const Slice<S> value = widen(v[a]);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const A weight = power_of_e(scores[a][i] - shift[i]);
        total[i] += weight;
        add(sums[i], weight, value);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const A divisor = total[i] == 0 ? A(1) : total[i];
#pragma unroll
    for (int c = 0; c < S::kSize; ++c) sums[i][c] /= divisor;
    if (queries.begin + i < queries.end && task.writes)
      output.lse[(queries.begin + i) * problem.heads + task.head] = shift[i] + log_to_e(total[i]);
  }
  store_slices<S>(output.out, queries, task, sums);
}

// Queries that read no key: every `step`-th of [begin, end).
template <class S>
__device__ __forceinline__ void skip(const CrossOutput<typename S::T>& output, i64 heads, i64 begin, i64 end, i64 step,
                                     const Task& task) {
  clear_slices<S>(output.out, begin, end, step, task);
  if (!task.writes) return;
  for (i64 row = begin; row < end; row += step) output.lse[row * heads + task.head] = no_score<typename S::A>();
}

template <class S, int kHeld>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<S, kHeld>(2, 2))
    patch_cross_attention_fwd_kernel(CrossAttention<typename S::T> problem, PatchReaders readers,
                                     CrossOutput<typename S::T> output) {
  const Task task = task_of_lane<S>(problem.heads, problem.width);
  const i64 patches = most<i64>(readers.capacity, 1);
  if (task.patch >= patches) return;
  if (!readers.encode) {
    const RowRange beyond = readers.beyond();
    skip<S>(output, problem.heads, beyond.begin + task.patch, beyond.end, patches, task);
  }
  if (readers.capacity == 0) return;
  const Document document = readers.document_of(task.patch);
  const RowRange waiting = readers.waiting(task.patch, document);
  skip<S>(output, problem.heads, waiting.begin, waiting.end, 1, task);
  const auto [queries, keys] = readers.of_queries(task.patch, document);
  for (i64 i = queries.begin; i < queries.end; i += kHeld)
    attend<S, kHeld>(problem, output, {i, least(i + kHeld, queries.end)}, keys, task);
}

}  // namespace blt
