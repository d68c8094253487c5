// The backward of patch_cross_attention.cuh, which says what it computes and who owns what.
//
// Of the two sides of a block one is held and one is streamed. With a and b the held rows, q and grad_out or k and v,
// and x and y the streamed ones of the other side, a . x and b . y are all the products there are, either way. What
// adds up in the registers of the held rows, or leaves with each streamed row, are sums of ds x, p y, ds a and p b.
#pragma once

#include "patch_cross_attention.cuh"

namespace blt {

enum class Pass : int {
  kEncode,   // holds all queries of a patch: dq, and dk and dv of the keys that pass
  kDecode,   // holds all keys of a patch: dk and dv, and dq of the queries that pass
  kQueries,  // holds queries: dq, and the softmax for kKeys
  kKeys,     // holds keys: dk and dv
};

// What p and ds of a query need beside its scores. lse is rounded, so the weights do not quite sum to 1 until they are
// divided by their sum.
template <class A>
struct Softmax {
  A lse = 0, inverse = 0, delta = 0;
};

template <class T>
struct CrossGradients {
  HeadRows<const T> grad_out;
  const acc_t<T>* lse;  // [queries, heads]
  acc_t<T>* softmax;    // [queries, heads, 2]: inverse and delta, where there are two kernels
  HeadRows<T> q, k, v;
};

// a_i . x and b_i . y for the held rows, in all lanes of the group.
template <class S, int kHeld>
__device__ __forceinline__ void dots(typename S::A (&scores)[kHeld], typename S::A (&slopes)[kHeld],
                                     const Slice<S> (&a)[kHeld], const Slice<S> (&b)[kHeld], const Slice<S>& x,
                                     const Slice<S>& y) {
  typename S::A both[2 * kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) both[i] = dot(a[i], x), both[kHeld + i] = dot(b[i], y);
  sum_lanes<S::kLanes>(both);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) scores[i] = both[i], slopes[i] = both[kHeld + i];
}

// From the sum of the weights exp(s - lse) and of their products with g . v.
template <class A>
__device__ __forceinline__ void divide(Softmax<A>& softmax, A total, A sum) {
  softmax.inverse = total == 0 ? A(0) : 1 / total;
  softmax.delta = sum * softmax.inverse;
}

// The softmax of the held queries, from all their keys.
template <class S, int kHeld>
__device__ __forceinline__ void sum_softmax(Softmax<typename S::A> (&softmax)[kHeld],
                                            const CrossAttention<typename S::T>& problem, const Slice<S> (&q)[kHeld],
                                            const Slice<S> (&g)[kHeld], const RowRange& keys, const Task& task) {
  using A = typename S::A;
  constexpr int kAhead = S::kAhead;
  A total[kHeld] = {}, sum[kHeld] = {};
  for (i64 row = keys.begin; row < keys.end; row += kAhead) {
    Raw<S> k[kAhead], v[kAhead];
    load_slices(k, problem.k, row, keys.end, task);
    load_slices(v, problem.v, row, keys.end, task);
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (row + ahead >= keys.end) break;
      A scores[kHeld], slopes[kHeld];
      dots<S>(scores, slopes, q, g, widen(k[ahead]), widen(v[ahead]));
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const A weight = power_of_e(rounded_product(scores[i], problem.scale) - softmax[i].lse);
        total[i] += weight;
        sum[i] += weight * slopes[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) divide(softmax[i], total[i], sum[i]);
}

// Up to kHeld rows of one side, with all rows of the other that they meet.
template <class S, int kHeld, Pass kPass>
__device__ __forceinline__ void grad_rows(const CrossAttention<typename S::T>& problem,
                                          const CrossGradients<typename S::T>& grads, const RowRange& held,
                                          const RowRange& streamed, const Task& task) {
  using A = typename S::A;
  constexpr int kAhead = S::kAhead;
  constexpr bool kHoldsQueries = kPass == Pass::kEncode || kPass == Pass::kQueries;
  Slice<S> a[kHeld], b[kHeld], grad_a[kHeld], grad_b[kHeld];
  Softmax<A> softmax[kHeld];
  const int count = static_cast<int>(held.end - held.begin);
  hold_slices<S>(a, kHoldsQueries ? problem.q : problem.k, held, task);
  hold_slices<S>(b, kHoldsQueries ? grads.grad_out : problem.v, held, task);
  if (kHoldsQueries) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i < count) softmax[i].lse = grads.lse[(held.begin + i) * problem.heads + task.head];
    sum_softmax<S>(softmax, problem, a, b, streamed, task);
  }
  for (i64 first = streamed.begin; first < streamed.end; first += kAhead) {
    Raw<S> raw_x[kAhead], raw_y[kAhead];
    load_slices(raw_x, kHoldsQueries ? problem.k : problem.q, first, streamed.end, task);
    load_slices(raw_y, kHoldsQueries ? problem.v : grads.grad_out, first, streamed.end, task);
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const i64 row = first + ahead;
      if (row >= streamed.end) break;
      const Slice<S> x = widen(raw_x[ahead]), y = widen(raw_y[ahead]);
      Softmax<A> own;  // of the query that passes
      if (!kHoldsQueries) own.lse = grads.lse[row * problem.heads + task.head];
      A scores[kHeld], slopes[kHeld], weights[kHeld], total = 0, sum = 0;
      dots<S>(scores, slopes, a, b, x, y);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const A exponent = rounded_product(scores[i], problem.scale) - (kHoldsQueries ? softmax[i].lse : own.lse);
        weights[i] = i < count ? power_of_e(exponent) : 0;
        total += weights[i];
        sum += i < count ? weights[i] * slopes[i] : 0;
      }
      if (kPass == Pass::kDecode) divide(own, total, sum);
      if (kPass == Pass::kKeys) {
        const auto saved = load<2>(grads.softmax + 2 * (row * problem.heads + task.head));
        own.inverse = saved[0], own.delta = saved[1];
      }
      Slice<S> grad_x, grad_y;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const Softmax<A>& query = kHoldsQueries ? softmax[i] : own;
        const A p = weights[i] * query.inverse;
        const A ds = i < count ? p * (slopes[i] - query.delta) * problem.scale : 0;
        add(grad_a[i], ds, x);
        if (!kHoldsQueries) add(grad_b[i], p, y);
        if (kPass == Pass::kEncode || kPass == Pass::kDecode) add(grad_x, ds, a[i]);
        if (kPass == Pass::kEncode) add(grad_y, p, b[i]);
      }
      if (kPass == Pass::kEncode) store_slice<S>(grads.k.at(row, task.head), task.width, grad_x);
      if (kPass == Pass::kEncode) store_slice<S>(grads.v.at(row, task.head), task.width, grad_y);
      if (kPass == Pass::kDecode) store_slice<S>(grads.q.at(row, task.head), task.width, grad_x);
    }
  }
  store_slices<S>(kHoldsQueries ? grads.q : grads.k, held, task, grad_a);
  if (!kHoldsQueries) store_slices<S>(grads.v, held, task, grad_b);
  if (kPass == Pass::kQueries && task.writes) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i < count)
        store(grads.softmax + 2 * ((held.begin + i) * problem.heads + task.head),
              Pack<A, 2>{{softmax[i].inverse, softmax[i].delta}});
  }
}

template <class S, int kHeld, Pass kPass>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<S, kHeld>(kPass == Pass::kKeys ? 5 : 4, 3))
    patch_cross_attention_bwd_kernel(CrossAttention<typename S::T> problem, PatchReaders readers,
                                     CrossGradients<typename S::T> grads) {
  const Task task = task_of_lane<S>(problem.heads, problem.width);
  const i64 patches = most<i64>(readers.capacity, 1);
  if (task.patch >= patches) return;
  const RowRange beyond = readers.beyond();
  const i64 first = beyond.begin + task.patch;
  if (kPass != Pass::kQueries && readers.encode) {
    clear_slices<S>(grads.k, first, beyond.end, patches, task);
    clear_slices<S>(grads.v, first, beyond.end, patches, task);
  }
  if (kPass != Pass::kKeys && !readers.encode) clear_slices<S>(grads.q, first, beyond.end, patches, task);
  if (readers.capacity == 0) return;
  const Document document = readers.document_of(task.patch);
  if (kPass != Pass::kKeys) {
    const RowRange waiting = readers.waiting(task.patch, document);
    clear_slices<S>(grads.q, waiting.begin, waiting.end, 1, task);
  }
  const bool of_keys = kPass == Pass::kDecode || kPass == Pass::kKeys;
  const Block block = of_keys ? readers.of_keys(task.patch, document) : readers.of_queries(task.patch, document);
  const RowRange held = of_keys ? block.keys : block.queries, streamed = of_keys ? block.queries : block.keys;
  for (i64 i = held.begin; i < held.end; i += kHeld)
    grad_rows<S, kHeld, kPass>(problem, grads, {i, least(i + kHeld, held.end)}, streamed, task);
}

}  // namespace blt
