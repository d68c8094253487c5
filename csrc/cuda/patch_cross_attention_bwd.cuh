// The backward of patch_cross_attention.cuh, which says what it computes and who owns what.
//
// Two kernels, one for either side of a unit that is held. With a and b the held rows, q and grad_out or k and v, and x and
// y the streamed ones of the other side, a . x and b . y are all the products there are, either way. Where all rows of the
// patch are held at once, the gradients of the streamed rows are whole too and leave with them: then one kernel does it
// all, and every tensor passes once.
//
//   queries held   dq adds up. Streams keys twice, first for the sums of the softmax, l and delta, the second time from
//                  the L1 cache. Encoding without a window, K <= kHeld and H = G, it does dk and dv as well.
//   keys held      dk and dv add up. Decoding without a window and K <= kHeld, it does dq as well, since a query's softmax
//                  is over the cells of its row. Else it takes l and delta from the other kernel, and all tensors pass
//                  twice: of a window, of larger K, of grouped heads when encoding.
//
// lse is rounded, so the weights exp(s - lse) do not quite sum to 1 until they are divided by their sum. Only queries of
// divided patches, whose sums no unit has, take them as they are, and delta as g . out.
//
// Why these two and no other: the pair alone would do, but moves 1.5 times the bytes of the usual case; one kernel that
// holds queries for both directions would stream keys once for every two queries of a decoding patch, 2.3 times on average.
#pragma once

#include "patch_cross_attention.cuh"

namespace blt {

template <class T>
struct CrossGradients {
  HeadRows<const T> grad_out, out;
  const acc_t<T>* lse;  // [queries, heads]
  acc_t<T>* softmax;  // [queries, heads, 2]: 1 / l and delta, for the kernel that holds keys; null if there is only one
  HeadRows<T> q, k, v;
  PartSums<acc_t<T>> q_parts, k_parts, v_parts;
};

// What p and ds of a query need beside its products.
template <class A>
struct Softmax {
  A lse = 0, inverse = 0, delta = 0;

  __device__ __forceinline__ A weight(A score, A scale) const {
    return power_of_e(rounded_product(score, scale) - lse);
  }
  __device__ __forceinline__ A grad_score(A p, A slope, A scale) const { return p * (slope - delta) * scale; }
};

// 1 / x without the branch for numbers beyond 2^126, which no sum of weights is.
__device__ __forceinline__ float reciprocal(float x) {
  const float first = __fdividef(1.0f, x), nearer = fmaf(fmaf(-x, first, 1.0f), first, first);
  return nearer == nearer ? nearer : first;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// Slopes cancel against delta, their average. So that is a quotient corrected by its remainder, of a sum that makes up for
// the rounding errors it has left behind (Kahan). A sum that is not finite leaves none.
template <class A>
__device__ __forceinline__ A quotient(A sum, A total, A inverse) {
  const A rounded = sum * inverse, nearer = fma(fma(-rounded, total, sum), inverse, rounded);
  return nearer == nearer ? nearer : rounded;
}
template <class A>
struct CarefulSum {
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

// sum over i of factor of the cell (i, tile) times held_i, and the same over the rows of the tile.
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

// Gradients of held rows of a tensor, or their part of them.
template <class S>
__device__ __forceinline__ void store_gradients(const OutputColumn<S>& rows, const PartSums<typename S::A>& parts,
                                                int width, int slot, u32 row, u32 first, int head, int count,
                                                const Slice<S> (&slices)[S::kHeld]) {
  if (slot < 0) return store_rows<S>(rows, row, count, slices);
  const i64 at = parts.at(slot, row - first, head);
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i)
    if (i < count) store_sums<S>(parts.sums + (at + i * parts.heads) * width, rows.room, slices[i]);
}

// Rows of the gradient of bytes that no unit has, and that a unit has but that read nothing.
template <class S>
__device__ __forceinline__ void clear_unowned(const OutputColumn<S>& rows, const PatchReaders& readers,
                                              const Task& task) {
  const Rows before = readers.before(), beyond = readers.beyond();
  clear_rows<S>(rows, before.begin + task.warp, before.end, task.warps);
  clear_rows<S>(rows, beyond.begin + task.warp, beyond.end, task.warps);
}
template <class S>
__device__ __forceinline__ void clear_waiting(const OutputColumn<S>& rows, const PatchUnit& unit) {
  const Rows front = waiting(unit.front, unit.stop), back = waiting(unit.back, unit.stop);
  clear_rows<S>(rows, front.begin, front.end);
  clear_rows<S>(rows, back.begin, back.end);
}

// held_i . row i of the lane's cell.
template <class S>
__device__ __forceinline__ typename S::A products_of_rows(const Slice<S> (&held)[S::kHeld], const InputColumn<S>& rows,
                                                          u32 row, int count) {
  typename S::A own = 0;
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i) {
    Slice<S> other[S::kHeld];
    hold_rows<S>(other, rows, row + i, i < count ? 1 : 0);
    const auto sum = warp_sum<S::kLanes>(dot(held[i], other[0]));
    if (cell_of_lane<S>().held == i) own = sum;
  }
  return own;
}

template <class S>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<S>)
    patch_cross_attention_bwd_queries_kernel(CrossAttention<typename S::T> problem, PatchReaders readers,
                                             CrossGradients<typename S::T> grads) {
  using A = typename S::A;
  const Task task = task_of_lane<S, kBackwardThreads>(problem.kv_heads);
  const Cell cell = cell_of_lane<S>();
  const bool whole = !grads.softmax;
  const InputColumn<S> keys[2] = {column_of<S>(problem.k, task.head, problem.kv_heads, problem.width),
                                  column_of<S>(problem.v, task.head, problem.kv_heads, problem.width)};
  const OutputColumn<S> grad_k = column_of<S>(grads.k, task.head, problem.kv_heads, problem.width);
  const OutputColumn<S> grad_v = column_of<S>(grads.v, task.head, problem.kv_heads, problem.width);
  if (whole) clear_unowned<S>(grad_k, readers, task), clear_unowned<S>(grad_v, readers, task);
  for (int r = 0; !readers.encode && r < problem.heads_per_kv_head; ++r)
    clear_unowned<S>(column_of<S>(grads.q, query_head(problem, task.head, r), problem.heads, problem.width), readers,
                     task);
  for_each_unit<true, kRun, kBackwardThreads / kWarp>(readers, task.unit, [&](const PatchUnit& unit) {
#pragma unroll 1
    for (int r = 0; r < problem.heads_per_kv_head; ++r) {
      const int head = query_head(problem, task.head, r);
      const InputColumn<S> queries = column_of<S>(problem.q, head, problem.heads, problem.width);
      const InputColumn<S> grad_out = column_of<S>(grads.grad_out, head, problem.heads, problem.width);
      const OutputColumn<S> grad_q = column_of<S>(grads.q, head, problem.heads, problem.width);
      if (!readers.encode) clear_waiting<S>(grad_q, unit);
      const int slot = readers.encode ? unit.slot : -1;
      for_each_piece(readers.encode, readers.vectors(unit), unit, [&](Rows held, Rows front, Rows back) {
#pragma unroll 1
        for (u32 row = held.begin; row < held.end; row += S::kHeld) {
          const int count = static_cast<int>(least<u32>(held.end - row, S::kHeld));
          const bool here = head < problem.heads && cell.held < count;
          const i64 own = static_cast<i64>(row + cell.held) * problem.heads + head;
          Slice<S> q[S::kHeld], g[S::kHeld], sums[S::kHeld];
          hold_rows<S>(q, queries, row, count), hold_rows<S>(g, grad_out, row, count);
          Softmax<A> softmax;
          if (here) softmax.lse = grads.lse[own];
          if (slot < 0) {
            A total = 0;
            CarefulSum<A> sum;
            stream<S>(keys, front, NoMore{}, [&](u32 key, const Slice<S>(&x)[2][S::kTile], int) {
              const A score = dots(q, x[0]), slope = dots(g, x[1]);
              if (key + cell.tile >= front.end) return;
              const A weight = softmax.weight(score, problem.scale);
              total += weight, sum.add(weight * slope);
            });
            total = fold_tile<S>(total, Sum{});
            softmax.inverse = total == 0 ? A(0) : reciprocal(total);
            softmax.delta = quotient(sum.template fold<S>(), total, softmax.inverse);
          } else {
            softmax.inverse = 1;
            softmax.delta =
                products_of_rows<S>(g, column_of<S>(grads.out, head, problem.heads, problem.width), row, count);
          }
#pragma unroll 1
          for (int piece = 0; piece < (slot < 0 ? 1 : 2); ++piece) {
            const Rows rows = piece == 0 ? front : back;
            stream<S>(keys, rows, NoMore{}, [&](u32 key, const Slice<S>(&x)[2][S::kTile], int) {
              const A score = dots(q, x[0]), slope = dots(g, x[1]);
              const bool there = cell.held < count && key + cell.tile < rows.end;
              const A p = there ? softmax.weight(score, problem.scale) * softmax.inverse : A(0);
              const A ds = there ? softmax.grad_score(p, slope, problem.scale) : A(0);
              add_tile<S>(sums, ds, x[0]);
              if (!whole) return;
#pragma unroll
              for (int a = 0; a < S::kTile; ++a) {
                const Slice<S> dk = sum_of_held<S>(ds, q, a), dv = sum_of_held<S>(p, g, a);
                if (key + a < rows.end) grad_k.store(key + a, dk), grad_v.store(key + a, dv);
              }
            });
          }
          store_gradients<S>(grad_q, grads.q_parts, problem.width, slot, row, held.begin, head, count, sums);
          if (!whole && here && (slot < 0 || slot >= readers.parts) && cell.tile == 0 && first_of_cell<S>())
            store(grads.softmax + 2 * own, Pack<A, 2>{{softmax.inverse, softmax.delta}});
        }
      });
    }
  });
}

template <class S, bool kWhole>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<S>)
    patch_cross_attention_bwd_keys_kernel(CrossAttention<typename S::T> problem, PatchReaders readers,
                                          CrossGradients<typename S::T> grads) {
  using A = typename S::A;
  const Task task = task_of_lane<S, kBackwardThreads>(problem.kv_heads);
  const Cell cell = cell_of_lane<S>();
  const bool encode = !kWhole && readers.encode;
  const InputColumn<S> keys = column_of<S>(problem.k, task.head, problem.kv_heads, problem.width);
  const InputColumn<S> values = column_of<S>(problem.v, task.head, problem.kv_heads, problem.width);
  const OutputColumn<S> grad_k = column_of<S>(grads.k, task.head, problem.kv_heads, problem.width);
  const OutputColumn<S> grad_v = column_of<S>(grads.v, task.head, problem.kv_heads, problem.width);
  if (encode) clear_unowned<S>(grad_k, readers, task), clear_unowned<S>(grad_v, readers, task);
  for (int r = 0; kWhole && r < problem.heads_per_kv_head; ++r)
    clear_unowned<S>(column_of<S>(grads.q, query_head(problem, task.head, r), problem.heads, problem.width), readers,
                     task);
  for_each_unit<false, kRun, kBackwardThreads / kWarp>(readers, task.unit, [&](const PatchUnit& unit) {
    const int slot = encode ? -1 : unit.slot;
    for_each_piece(!encode, readers.vectors(unit), unit, [&](Rows held, Rows front, Rows back) {
#pragma unroll 1
      for (u32 row = held.begin; row < held.end; row += S::kHeld) {
        const int count = static_cast<int>(least<u32>(held.end - row, S::kHeld));
        Slice<S> k[S::kHeld], v[S::kHeld], k_sums[S::kHeld], v_sums[S::kHeld];
        hold_rows<S>(k, keys, row, count), hold_rows<S>(v, values, row, count);
#pragma unroll 1
        for (int r = 0; r < problem.heads_per_kv_head; ++r) {
          const int head = query_head(problem, task.head, r);
          const InputColumn<S> queries[2] = {column_of<S>(problem.q, head, problem.heads, problem.width),
                                             column_of<S>(grads.grad_out, head, problem.heads, problem.width)};
          const OutputColumn<S> grad_q = column_of<S>(grads.q, head, problem.heads, problem.width);
          if (kWhole) clear_waiting<S>(grad_q, unit);
#pragma unroll 1
          for (int piece = 0; piece < 2; ++piece) {
            const Rows rows = piece == 0 ? front : back;
            // Of the lane's query: its place in lse.
            const auto place = [&](u32 query) {
              return static_cast<i64>(least(query + cell.tile, rows.end - 1)) * problem.heads + head;
            };
            const auto lse_of = [&](u32 query) { return head < problem.heads ? grads.lse[place(query)] : A(0); };
            stream<S>(queries, rows, lse_of, [&](u32 query, const Slice<S>(&x)[2][S::kTile], A lse) {
              Softmax<A> softmax;
              softmax.lse = lse;
              if (!kWhole && head < problem.heads) {
                const auto saved = load<2>(grads.softmax + 2 * place(query));
                softmax.inverse = saved[0], softmax.delta = saved[1];
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
          }
        }
        store_gradients<S>(grad_k, grads.k_parts, problem.width, slot, row, held.begin, task.head, count, k_sums);
        store_gradients<S>(grad_v, grads.v_parts, problem.width, slot, row, held.begin, task.head, count, v_sums);
        if (kWhole) break;  // all of them were held
      }
    });
  });
}

}  // namespace blt
