// Computes the backward of patch_cross_attention.cuh, which has the formulas and the owners.
//
// There are two passes, one for either side of a unit that is held. With a and b the held rows, q and grad_out or k and
// v, and x and y the streamed rows of the other side, both passes compute the products a . x and b . y and no others.
// The gradients of the streamed rows are complete after their tile where all rows of the patch are held at once. So one
// pass does all, and every tensor is read once.
//
//   queries held   adds up dq. It streams keys twice: first for the sums of the softmax, l and delta, then from the
//                  ring. Encoding without a window, K <= kHeld and H = G, it computes dk and dv as well.
//   keys held      adds up dk and dv. Decoding without a window and K <= kHeld, it computes dq as well, since a
//                  query's softmax is over the cells of its row. Else it reads l and delta from the other pass.
//
// A block makes both passes over its units, so that the second one finds its rows in the caches. With a window it also
// computes l and delta of its halo, the patches behind its own whose queries read its keys. If the halo is larger than
// a block, each pass has a launch, and the tensors are read twice.
//
// lse is rounded, so the weights exp(s - lse) do not quite sum to 1 until they are divided by their sum. Queries of
// divided patches, whose sums no unit has, use them undivided, and g . out as delta.
//
// The two passes alone would serve every case, but compute twice what the usual one needs. A pass that holds queries
// for both directions would stream keys once for every two queries of a decoding patch, 2.3 times on average.
#pragma once

#include "patch_cross_attention.cuh"

namespace blt {

template <class T>
struct CrossGradients {
  HeadTensor<const T> grad_out, out;
  const acc_t<T>* lse;  // [queries, heads]
  acc_t<T>* softmax;    // has 1 / l and delta, between two passes
  HeadTensor<T> q, k, v;
  PartSums<acc_t<T>> q_parts, k_parts, v_parts;
};

// Has the softmax of a query: p = exp(scale * score - lse) * inverse, ds = p * (slope - delta) * scale, slope = g . v.
template <class A>
struct Softmax {
  A lse = 0, inverse = 0, delta = 0;

  __device__ __forceinline__ A weight(A score, A scale) const { return exp(rounded_product(score, scale) - lse); }
  __device__ __forceinline__ A grad_score(A p, A slope, A scale) const { return p * (slope - delta) * scale; }
};

// Returns 1 / x without the branch for numbers beyond 2^126, which no sum of weights is.
__device__ __forceinline__ float reciprocal(float x) {
  const float first = __fdividef(1.0f, x), nearer = fmaf(fmaf(-x, first, 1.0f), first, first);
  return nearer == nearer ? nearer : first;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// Slopes cancel against their average, delta, which therefore has to be precise: its sum is compensated (Kahan), unless
// it is not finite, and its quotient is corrected by the remainder.
template <class A>
__device__ __forceinline__ A corrected_quotient(A sum, A total, A inverse) {
  const A rounded = sum * inverse, nearer = fma(fma(-rounded, total, sum), inverse, rounded);
  return nearer == nearer ? nearer : rounded;
}
template <class A>
struct CompensatedSum {
  A sum = 0, error = 0;

  __device__ __forceinline__ void add(A x) {
    const A term = x - error, next = sum + term;
    error = next - next == 0 ? (next - sum) - term : A(0);
    sum = next;
  }
  template <class S>
  __device__ __forceinline__ A fold() const {
    return fold_tile<S>(sum, Sum{}) - fold_tile<S>(error, Sum{});
  }
};

// sum_of_held adds up held_i times the factor of cell (i, tile) over i; add_tile does so over the rows of the tile.
template <class S>
__device__ __forceinline__ Slice<S> sum_of_held(typename S::A factor, const Slice<S> (&held)[S::kHeld], int tile) {
  Slice<S> sum;
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i) add(sum, of_cell<S>(factor, i, tile), held[i]);
  return sum;
}
template <class S>
__device__ __forceinline__ void add_tile(Slice<S> (&sums)[S::kHeld], typename S::A factor,
                                         const Slice<S> (&x)[S::kTile]) {
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i)
#pragma unroll
    for (int a = 0; a < S::kTile; ++a) add(sums[i], of_cell<S>(factor, i, a), x[a]);
}

// Stores the gradients of held rows of a tensor, or to its slot what a unit adds to them if `divided`.
template <class S>
__device__ __forceinline__ void store_gradients(const OutputColumn<S>& rows, bool divided,
                                                const PartSums<typename S::A>& parts, int width, const PatchUnit& unit,
                                                u32 row, int head, int count, const Slice<S> (&slices)[S::kHeld]) {
  if (!divided) return store_rows<S>(rows, row, count, slices);
  const i64 at = parts.at(unit, row, head);
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i)
    if (i < count) store_sums<S>(parts.sums + (at + i * parts.heads) * width, rows.room, slices[i]);
}

// Returns held_i . row i for the held row i of the lane's cell.
template <class S>
__device__ __forceinline__ typename S::A products_of_rows(const Slice<S> (&held)[S::kHeld], const InputColumn<S>& rows,
                                                          u32 row, int count) {
  typename S::A own = 0;
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i) {
    const auto sum = warp_sum<S::kLanes>(i < count ? dot(held[i], to_float(rows.load(row + i))) : typename S::A(0));
    if (cell_of_lane<S>().held == i) own = sum;
  }
  return own;
}

// Keys are streamed twice, so the ring has room for most patches.
template <class S>
using BackwardKeyRing = RowRing<S, 2, false, 2 * kRingBytes>;
template <class S>
using BackwardQueryRing = RowRing<S, 2, true, kRingBytes>;

// Has 1 / l and delta of queries: the pass that holds queries saves them for the one that holds keys. Encoding, every
// part saves those of its queries in its own slot. A block saves those of its halo behind those of all owners. So
// nothing has two writers.
template <class T>
struct SavedSoftmax {
  acc_t<T>* softmax;  // [queries, heads, 2], or twice this where there are halos
  PartSums<acc_t<T>> parts;
  i64 queries;
  int heads, num_parts;
  bool encode;
  u32 halo_begin = ~0u;  // is the first query of the halo

  __device__ __forceinline__ acc_t<T>* at(const PatchUnit& unit, u32 query, int head) const {
    if (encode && unit.slot >= 0 && unit.slot < num_parts) return parts.softmax + 2 * parts.at(unit, query, head);
    return softmax + 2 * ((query + (query < halo_begin ? 0 : queries)) * heads + head);
  }
};

// Holds the queries of units and computes dq. If kWhole it also computes dk and dv, else it saves 1 / l and delta for
// pass_of_keys. It goes through the units of a block up to own_end, and through its halo up to `end`, where it only
// saves.
template <class S, bool kWhole>
__device__ __forceinline__ void pass_of_queries(const CrossAttention<typename S::T>& problem,
                                                const PatchReaders& readers, const CrossGradients<typename S::T>& grads,
                                                const Task& task, int own_end, int end,
                                                const SavedSoftmax<typename S::T>& saved) {
  using A = typename S::A;
  using Ring = BackwardKeyRing<S>;
  const Cell cell = cell_of_lane<S>();
  RowStream<Ring> keys(ring_of_warp<Ring>());
  keys.set({kv_column<S>(problem, problem.k, task.head), kv_column<S>(problem, problem.v, task.head)});
  const OutputColumn<S> grad_k = kv_column<S>(problem, grads.k, task.head);
  const OutputColumn<S> grad_v = kv_column<S>(problem, grads.v, task.head);
  const Unowned unowned = readers.unowned();
  HeldRows<S, 2> next;
  const auto start = [&](u32 vector, u32 byte, const Run& run) {
    keys.start(readers.encode ? byte : vector, readers.encode ? run.bytes_end : run.vectors_end);
  };
#pragma unroll 1
  for (int first = task.unit; first < end; first += kRun * kWarps) {
    const bool halo = !kWhole && first >= own_end;
    for_each_unit<true, kRun>(readers, first, end, start, [&](const PatchUnit& unit, const Run& run) {
      const u32 keys_end = readers.encode ? run.bytes_end : run.vectors_end;
      const u32 queries_end = problem.heads_per_kv_head > 1 ? 0 : readers.encode ? run.vectors_end : run.bytes_end;
#pragma unroll 1
      for (int r = 0; r < problem.heads_per_kv_head; ++r) {
        const int head = query_head(problem, task.head, r);
        const InputColumn<S> queries[2] = {query_column<S>(problem, problem.q, head),
                                           query_column<S>(problem, grads.grad_out, head)};
        const auto lse_of = [&](u32 first, u32 end) {
          const u32 own = first + cell.held;
          return head < problem.heads && own < end ? grads.lse[static_cast<i64>(own) * problem.heads + head] : A(0);
        };
        const OutputColumn<S> grad_q = query_column<S>(problem, grads.q, head);
        if (!readers.encode && !halo) UnreadRows<S>{grad_q}.write_waiting(readers, unit);
        const bool divided = readers.encode && unit.slot >= 0;
        readers.for_each_rows(unit, readers.encode, [&](const Rows& held) {
#pragma unroll 1
          for (u32 row = held.begin; row < held.end; row += S::kHeld) {
            const int count = static_cast<int>(min<u32>(held.end - row, S::kHeld));
            const bool again = r + 1 < problem.heads_per_kv_head || row + count < held.end;
            Slice<S> x[2][S::kHeld], sums[S::kHeld];
            Softmax<A> softmax;
            softmax.lse = next.take(x, queries, row, count, max(held.end, queries_end), lse_of);
            const auto& [q, g] = x;
            if (!divided) {
              const Rows rows = readers.encode ? reading(unit.bytes, unit.stop) : readers.vectors(unit);
              const bool fits = rows.size() <= Ring::kRows;
              const u32 limit = again || !fits ? rows.end : max(rows.end, keys_end);
              A total = 0;
              CompensatedSum<A> sum;
              for_each_tile(keys, rows.begin, rows.end, limit, fits, [&](u32 key, const Slice<S>(&x)[2][S::kTile]) {
                const A score = dots(q, x[0]), slope = dots(g, x[1]);
                if (key + cell.tile >= rows.end) return;
                const A weight = softmax.weight(score, problem.scale);
                total += weight, sum.add(weight * slope);
              });
              total = fold_tile<S>(total, Sum{});
              softmax.inverse = total == 0 ? A(0) : reciprocal(total);
              softmax.delta = corrected_quotient(sum.template fold<S>(), total, softmax.inverse);
            } else {
              softmax.inverse = 1;
              softmax.delta = products_of_rows<S>(g, query_column<S>(problem, grads.out, head), row, count);
            }
            if (!halo)
              readers.for_each_rows(unit, !readers.encode, [&](const Rows& rows) {
                const u32 end = again ? rows.end : max(rows.end, keys_end);
                for_each_tile(keys, rows.begin, rows.end, end, again && rows.size() <= Ring::kRows,
                              [&](u32 key, const Slice<S>(&x)[2][S::kTile]) {
                                const A score = dots(q, x[0]), slope = dots(g, x[1]);
                                const bool there = cell.held < count && key + cell.tile < rows.end;
                                const A p = there ? softmax.weight(score, problem.scale) * softmax.inverse : A(0);
                                const A ds = there ? softmax.grad_score(p, slope, problem.scale) : A(0);
                                add_tile<S>(sums, ds, x[0]);
                                if constexpr (kWhole) {
#pragma unroll
                                  for (int a = 0; a < S::kTile; ++a) {
                                    const Slice<S> dk = sum_of_held<S>(ds, q, a), dv = sum_of_held<S>(p, g, a);
                                    if (key + a < rows.end) grad_k.store(key + a, dk), grad_v.store(key + a, dv);
                                  }
                                }
                              });
              });
            if (!halo) store_gradients<S>(grad_q, divided, grads.q_parts, problem.width, unit, row, head, count, sums);
            if (!kWhole && head < problem.heads && cell.held < count && cell.tile == 0 && first_of_cell<S>())
              store(saved.at(unit, row + cell.held, head), AlignedVector<A, 2>{{softmax.inverse, softmax.delta}});
          }
        });
      }
    });
  }
  if (kWhole) UnreadRows<S>{grad_k}.write_unowned(unowned, task), UnreadRows<S>{grad_v}.write_unowned(unowned, task);
  for (int r = 0; !readers.encode && r < problem.heads_per_kv_head; ++r)
    UnreadRows<S>{query_column<S>(problem, grads.q, query_head(problem, task.head, r))}.write_unowned(unowned, task);
}

// Holds the keys of units and computes dk and dv. If kWhole it also computes 1 / l, delta and dq, else it reads what
// pass_of_queries has saved.
template <class S, bool kWhole>
__device__ __forceinline__ void pass_of_keys(const CrossAttention<typename S::T>& problem, const PatchReaders& readers,
                                             const CrossGradients<typename S::T>& grads, const Task& task,
                                             const SavedSoftmax<typename S::T>& saved) {
  using A = typename S::A;
  using Ring = BackwardQueryRing<S>;
  const Cell cell = cell_of_lane<S>();
  const bool encode = !kWhole && readers.encode, one_head = problem.heads_per_kv_head == 1;
  const InputColumn<S> keys[2] = {kv_column<S>(problem, problem.k, task.head),
                                  kv_column<S>(problem, problem.v, task.head)};
  const OutputColumn<S> grad_k = kv_column<S>(problem, grads.k, task.head);
  const OutputColumn<S> grad_v = kv_column<S>(problem, grads.v, task.head);
  RowStream<Ring> queries(ring_of_warp<Ring>());
  const auto set_head = [&](int head) {
    queries.set({query_column<S>(problem, problem.q, head), query_column<S>(problem, grads.grad_out, head)},
                head < problem.heads ? grads.lse + head : nullptr, problem.heads);
  };
  set_head(query_head(problem, task.head, 0));
  HeldRows<S, 2> next;
  const auto start = [&](u32 vector, u32 byte, const Run& run) {
    next.request(keys, encode ? byte : vector, encode ? run.bytes_end : run.vectors_end, NoNumber<A>{});
    if (one_head) queries.start(encode ? vector : byte, encode ? run.vectors_end : run.bytes_end);
  };
  for_each_unit<false, kRun>(readers, task.unit, task.unit + kRun, start, [&](const PatchUnit& unit, const Run& run) {
    const bool divided = !encode && unit.slot >= 0;
    const u32 queries_end = one_head ? encode ? run.vectors_end : run.bytes_end : 0;
    const u32 keys_end = encode ? run.bytes_end : run.vectors_end;
    readers.for_each_rows(unit, !encode, [&](const Rows& held) {
#pragma unroll 1
      for (u32 row = held.begin; row < held.end; row += S::kHeld) {
        const int count = static_cast<int>(min<u32>(held.end - row, S::kHeld));
        const bool again = !kWhole && one_head && row + count < held.end;
        Slice<S> x[2][S::kHeld], k_sums[S::kHeld], v_sums[S::kHeld];
        next.take(x, keys, row, count, max(held.end, keys_end), NoNumber<A>{});
        const auto& [k, v] = x;
#pragma unroll 1
        for (int r = 0; r < problem.heads_per_kv_head; ++r) {
          const int head = query_head(problem, task.head, r);
          if (!one_head) set_head(head);
          const OutputColumn<S> grad_q = query_column<S>(problem, grads.q, head);
          readers.for_each_rows(unit, encode, [&](const Rows& rows) {
            const u32 end = again ? rows.end : max(rows.end, queries_end);
            const bool kept = again && rows.size() <= Ring::kRows;
            for_each_tile(queries, rows.begin, rows.end, end, kept, [&](u32 query, const Slice<S>(&x)[2][S::kTile]) {
              const u32 own = min(query + cell.tile, rows.end - 1);
              Softmax<A> softmax;
              if (head < problem.heads) softmax.lse = queries.number(own);
              if (!kWhole && head < problem.heads) {
                const auto known = load<2>(saved.at(unit, own, head));
                softmax.inverse = known[0], softmax.delta = known[1];
              }
              const A score = dots(k, x[0]), slope = dots(v, x[1]);
              const bool there = cell.held < count && query + cell.tile < rows.end;
              const A weight = there ? softmax.weight(score, problem.scale) : A(0);
              if (kWhole) {
                const A sum = there ? weight * slope : A(0);
                const A total = fold_held<S>(weight, Sum{});
                softmax.inverse = total == 0 ? A(0) : reciprocal(total);
                softmax.delta = fold_held<S>(sum, Sum{}) * softmax.inverse;
              }
              const A p = weight * softmax.inverse, ds = there ? softmax.grad_score(p, slope, problem.scale) : A(0);
              add_tile<S>(k_sums, ds, x[0]), add_tile<S>(v_sums, p, x[1]);
              if constexpr (kWhole) {
#pragma unroll
                for (int a = 0; a < S::kTile; ++a) {
                  const Slice<S> dq = sum_of_held<S>(ds, k, a);
                  if (query + a < rows.end) grad_q.store(query + a, dq);
                }
              }
            });
          });
          if (kWhole) UnreadRows<S>{grad_q}.write_waiting(readers, unit);
        }
        store_gradients<S>(grad_k, divided, grads.k_parts, problem.width, unit, row, task.head, count, k_sums);
        store_gradients<S>(grad_v, divided, grads.v_parts, problem.width, unit, row, task.head, count, v_sums);
        if (kWhole) break;  // all rows were held
      }
    });
  });
  const Unowned unowned = readers.unowned();
  if (encode) UnreadRows<S>{grad_k}.write_unowned(unowned, task), UnreadRows<S>{grad_v}.write_unowned(unowned, task);
  for (int r = 0; kWhole && r < problem.heads_per_kv_head; ++r)
    UnreadRows<S>{query_column<S>(problem, grads.q, query_head(problem, task.head, r))}.write_unowned(unowned, task);
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<S>)
    patch_cross_attention_bwd_queries_kernel(CrossAttention<typename S::T> problem, PatchReaders readers,
                                             CrossGradients<typename S::T> grads) {
  const Task task = task_of_lane<S>(problem.kv_heads);
  const int end = task.unit + kRun;
  pass_of_queries<S, true>(problem, readers, grads, task, end, end, {});
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<S>)
    patch_cross_attention_bwd_keys_kernel(CrossAttention<typename S::T> problem, PatchReaders readers,
                                          CrossGradients<typename S::T> grads) {
  pass_of_keys<S, true>(problem, readers, grads, task_of_lane<S>(problem.kv_heads), {});
}

// Says which passes a launch makes. If it makes both, the queries of `halo` patches behind a block read its keys.
struct Passes {
  bool queries, keys;
  int halo;
};

// Both passes in one kernel need more registers than one.
template <class S>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<S> > 2 ? 2 : kBackwardBlocks<S>)
    patch_cross_attention_bwd_both_kernel(CrossAttention<typename S::T> problem, PatchReaders readers,
                                          CrossGradients<typename S::T> grads, Passes passes) {
  const Task task = task_of_lane<S>(problem.kv_heads);
  const int own_end = (task.warp / kWarps + 1) * kRun * kWarps, behind = min(own_end, readers.capacity);
  SavedSoftmax<typename S::T> saved = {grads.softmax, grads.q_parts, readers.num_queries(),
                                       problem.heads, readers.parts, readers.encode};
  if (passes.halo > 0)
    saved.halo_begin = readers.encode ? static_cast<u32>(behind) * readers.queries_per_patch : readers.offset(behind);
  const int end = max(own_end, min(own_end + passes.halo, readers.capacity));
  if (passes.queries) pass_of_queries<S, false>(problem, readers, grads, task, own_end, end, saved);
  wait_for_copies<0>();
  __syncthreads();
  if (passes.keys) pass_of_keys<S, false>(problem, readers, grads, task, saved);
}

}  // namespace blt
