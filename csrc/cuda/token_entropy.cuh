// Computes the entropy of each row of logits, and its gradient, in fp32 (fp64 for fp64 rows):
//
//   m = max x,  d = x - m,  s = sum exp(d),  log_sum = log s,  H = log_sum - (sum exp(d) d) / s
//   grad_x = -grad_H p (log p + H),  log p = d - log_sum
//
// Entries of -inf add nothing. A row with NaN or +inf, or with nothing but -inf, gives NaN. Rows beyond the last
// document are not read: their entropy is 0, and their log_sum is infinity, for which backward writes zeros.
//
// Tiling: a few neighbouring lanes own a row (8 for 16-bit numbers) and hold a tile of it in registers: the whole row
// up to 320 logits. All loads of a tile are in flight together. The tile's maximum is found first; sums over earlier
// tiles are rescaled to it (the online logsumexp, with the sum of exp(d) d beside it). Elements before a row's first
// 16-byte boundary and behind its last are read one by one, at most 14 of 260 in bf16, so every alphabet and alignment
// takes the same path. The lanes of a row add up in a fixed order.
//
// Bytes: forward reads the logits once and writes 8 a row. Backward reads them once and writes the gradient, plus 12 a
// row; rows longer than a tile are read twice. Roofline: a memory copy. 260 logits in bf16 take 118 warp instructions
// (6.5 a logit, the rest for the row); an H200 issues those of 8 rows in a nanosecond, in which 4 TB/s brings 7.7 rows.
// Registers: at most 64 in forward, so that 4 blocks of 256 threads fit on an SM, with 64 KB of loads in flight; 80 in
// backward, 3 blocks.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr int kEntropyThreads = 256;
// Forward is compiled for this many blocks on a multiprocessor, for numbers of `size` bytes.
__host__ __device__ constexpr int entropy_blocks(int size) { return size == 8 ? 2 : 4; }

// exp(d) = scaled_exp(kPerNat<A> d). In fp32 scaled_exp is a power of 2, which takes one instruction, and exponents are
// in units of log 2; in fp64 it is a power of e.
template <class A>
inline constexpr A kPerNat = 1;
template <>
inline constexpr float kPerNat<float> = 1.4426950408889634f;
template <class A>
inline constexpr A kNats = 1;
template <>
inline constexpr float kNats<float> = 0.6931471805599453f;

__device__ __forceinline__ double scaled_exp(double x) { return exp(x); }
__device__ __forceinline__ float scaled_exp(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// This replaces log 0 in 0 log 0: it is finite, and its scaled_exp is 0.
template <class A>
inline constexpr A kLogOfZero = -2000;

// Returns log_sum for a row that no document has. log_sum of any other row is in [0, log A], or NaN.
template <class A>
__device__ __forceinline__ A unread_log_sum() {
  return -minus_infinity<A>();
}

// Returns the maximum to subtract from a row: 0 for a row of -inf, so that x - m is -inf and not NaN.
template <class A>
__device__ __forceinline__ A finite_max(A m) {
  return m == minus_infinity<A>() ? A(0) : m;
}

// Adds up s = sum exp(d) and t = kPerNat sum exp(d) d, where d = x - m and all lanes of the row share m.
//
// d is rounded before it is scaled. One fused multiply-add, k x - fl(k m), would save an instruction of 7, but then the
// exponent of the largest number is k m - fl(k m) and not 0, and the entropy of a row of one number is 1e-8.
template <class A>
struct EntropySums {
  A max = minus_infinity<A>(), s = 0, t = 0;

  // Rescales the sums to the maximum m, which is no smaller than max.
  __device__ __forceinline__ void rescale(A m) {
    const A y = (max - finite_max(m)) * kPerNat<A>, e = scaled_exp(y);
    t = (t + s * blt::max(y, kLogOfZero<A>)) * e;
    s *= e;
    max = m;
  }
  __device__ __forceinline__ void add(A x) {
    const A y = (x - finite_max(max)) * kPerNat<A>, e = scaled_exp(y);
    s += e;
    t += e * blt::max(y, kLogOfZero<A>);
  }
  __device__ __forceinline__ A log_sum() const { return log(s); }
  __device__ __forceinline__ A entropy() const { return log(s) - t * kNats<A> / s; }
};

// Numbers are held as words of 16 bytes, since the compiler would give each 16-bit number a register.
using Words = AlignedVector<u32, 4>;

template <class T>
__device__ __forceinline__ AlignedVector<T, 16 / sizeof(T)> numbers_of(const Words& words) {
  return bits_as<AlignedVector<T, 16 / sizeof(T)>>(words);
}

// Returns number c of the words. A bf16 is the upper half of an fp32.
template <class T>
__device__ __forceinline__ acc_t<T> number_at(const Words& words, int c) {
  return to_float(numbers_of<T>(words)[c]);
}
template <>
__device__ __forceinline__ float number_at<bf16>(const Words& words, int c) {
  return __uint_as_float(c % 2 == 0 ? words[c / 2] << 16 : words[c / 2] & 0xffff0000u);
}

// Finds the maximum of numbers and ignores NaN. 16-bit numbers are compared two at a time.
template <class T>
struct Maximum {
  T best = minus_infinity<T>();
  __device__ __forceinline__ void add(T x) { best = best < x ? x : best; }
  __device__ __forceinline__ void add(const Words& words) {
    const auto numbers = numbers_of<T>(words);
#pragma unroll
    for (int c = 0; c < static_cast<int>(16 / sizeof(T)); ++c) add(numbers[c]);
  }
  __device__ __forceinline__ T value() const { return best; }
};

template <class T>
struct PairMaximum {
  using Pair = decltype(both(T(), T()));
  u32 best = bits_as<u32>(both(from_float<T>(minus_infinity<float>()), from_float<T>(minus_infinity<float>())));
  __device__ __forceinline__ void add_pair(u32 pair) {
    best = bits_as<u32>(__hmax2(bits_as<Pair>(best), bits_as<Pair>(pair)));
  }
  __device__ __forceinline__ void add(T x) { add_pair(bits_as<u32>(both(x, x))); }
  __device__ __forceinline__ void add(const Words& words) {
#pragma unroll
    for (int w = 0; w < 4; ++w) add_pair(words[w]);
  }
  __device__ __forceinline__ float value() const {
    const Pair pair = bits_as<Pair>(best);
    return max(to_float(pair.x), to_float(pair.y));
  }
};
template <>
struct Maximum<bf16> : PairMaximum<bf16> {};
template <>
struct Maximum<fp16> : PairMaximum<fp16> {};

// Points to logits[rows][alphabet] with a row stride of `stride` elements.
template <class T>
struct LogitRows {
  const T* data;
  i64 rows, stride;
  i32 alphabet;
};

// Returns the number of lanes that own a row of numbers of `size` bytes.
__host__ __device__ constexpr int row_lanes(int size) { return size == 2 ? 8 : size == 4 ? 16 : 32; }

// Holds one lane's share of a row: every kLanes-th vec of the aligned part, and every kLanes-th of the edge elements
// around it.
template <class T>
struct RowLane {
  static constexpr int kVec = 16 / sizeof(T), kLanes = row_lanes(sizeof(T)), kVecs = 5;
  static constexpr int kEdges = ceil_div(2 * (kVec - 1), kLanes);
  static constexpr i32 kTile = kLanes * kVecs;  // counts vecs
  const T* row;
  int lane;
  i32 head, vecs, edges;  // count elements before the first vec, vecs, and elements in no vec
  Words held[kVecs];
  T held_edges[kEdges];

  // The row has no elements unless `reads` is set.
  __device__ __forceinline__ RowLane(const LogitRows<T>& logits, i64 index, bool reads) {
    const i32 size = reads ? logits.alphabet : 0;
    row = logits.data + min(index, logits.rows - 1) * logits.stride;
    lane = threadIdx.x % kLanes;
    const i32 past = static_cast<i32>(reinterpret_cast<u64>(row) / sizeof(T) % kVec);
    head = min(size, (kVec - past) % kVec);
    vecs = (size - head) / kVec;
    edges = size - vecs * kVec;
  }
  // Returns the same number for all lanes of a warp, whose rows may be aligned differently.
  static __device__ __forceinline__ i32 tiles(const LogitRows<T>& logits) {
    return max(1, ceil_div<i32>(logits.alphabet / kVec, kTile));
  }
  __device__ __forceinline__ i32 vec_index(i32 tile, int p) const { return tile * kTile + p * kLanes + lane; }
  __device__ __forceinline__ i32 vec_column(i32 tile, int p) const { return head + vec_index(tile, p) * kVec; }
  __device__ __forceinline__ i32 edge_column(int e) const {
    const i32 edge = e * kLanes + lane;
    return edge < head ? edge : edge + vecs * kVec;
  }
  __device__ __forceinline__ bool has_vec(i32 tile, int p) const { return vec_index(tile, p) < vecs; }
  // Edges belong to tile 0.
  __device__ __forceinline__ bool has_edge(i32 tile, int e) const { return tile == 0 && e * kLanes + lane < edges; }

  // Edges are read before the vecs: their loads would otherwise be issued when those of the vecs have arrived.
  __device__ __forceinline__ void read_edges() {
#pragma unroll
    for (int e = 0; e < kEdges; ++e)
      if (has_edge(0, e)) held_edges[e] = row[edge_column(e)];
  }
  __device__ __forceinline__ void read(i32 tile) {
#pragma unroll
    for (int p = 0; p < kVecs; ++p)
      if (has_vec(tile, p)) held[p] = load_once<4>(reinterpret_cast<const u32*>(row + vec_column(tile, p)));
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int p = 0; p < kVecs; ++p) held[p] = {};
#pragma unroll
    for (int e = 0; e < kEdges; ++e) held_edges[e] = from_float<T>(0);
  }
  template <class F>
  __device__ __forceinline__ void each(i32 tile, F f) const {
#pragma unroll
    for (int p = 0; p < kVecs; ++p)
      if (has_vec(tile, p)) {
#pragma unroll
        for (int c = 0; c < kVec; ++c) f(number_at<T>(held[p], c));
      }
#pragma unroll
    for (int e = 0; e < kEdges; ++e)
      if (has_edge(tile, e)) f(to_float(held_edges[e]));
  }
  // Returns the maximum of the tile over the lanes of the row, without regard to NaN.
  __device__ __forceinline__ acc_t<T> tile_max(i32 tile) const {
    Maximum<T> m;
#pragma unroll
    for (int p = 0; p < kVecs; ++p)
      if (has_vec(tile, p)) m.add(held[p]);
#pragma unroll
    for (int e = 0; e < kEdges; ++e)
      if (has_edge(tile, e)) m.add(held_edges[e]);
    return warp_fold<kLanes>(static_cast<acc_t<T>>(to_float(m.value())), Max{});
  }
};

// Adds up a lane's share of a row, in EntropySums around the maximum of the whole row.
template <class T>
__device__ __forceinline__ EntropySums<acc_t<T>> lane_sums(RowLane<T>& row, i32 tiles) {
  EntropySums<acc_t<T>> sums;
  row.read_edges();
  for (i32 tile = 0; tile < tiles; ++tile) {
    row.read(tile);
    sums.rescale(max(sums.max, row.tile_max(tile)));
    row.each(tile, [&](acc_t<T> x) { sums.add(x); });
  }
  return sums;
}

// Returns the maximum of a row, without regard to NaN. It reads the edges and leaves the last tile in the registers.
template <class T>
__device__ __forceinline__ acc_t<T> row_max(RowLane<T>& row, i32 tiles) {
  acc_t<T> m = minus_infinity<acc_t<T>>();
  row.read_edges();
  for (i32 tile = 0; tile < tiles; ++tile) {
    row.read(tile);
    m = max(m, row.tile_max(tile));
  }
  return m;
}

// Writes f(x) to `to` for each number x of a row, or f(0) if `clear` is set. row_max has read the row. `to` may be the
// row itself: a lane writes only what it alone reads. With kAligned it has the alignment of the row, so vecs are stored
// whole.
template <class T, bool kAligned, class F>
__device__ __forceinline__ void map_row(RowLane<T>& row, i32 tiles, bool clear, T* to, F f) {
  constexpr int kVec = RowLane<T>::kVec;
  for (i32 tile = 0; tile < tiles; ++tile) {
    if (tiles > 1) row.read(tile);
    if (clear) row.clear();
#pragma unroll
    for (int p = 0; p < RowLane<T>::kVecs; ++p) {
      if (!row.has_vec(tile, p)) continue;
      AlignedVector<T, kVec> out;
#pragma unroll
      for (int c = 0; c < kVec; ++c) out[c] = from_float<T>(f(number_at<T>(row.held[p], c)));
      T* const at = to + row.vec_column(tile, p);
      if constexpr (kAligned) {
        store(at, out);
      } else {
#pragma unroll
        for (int c = 0; c < kVec; ++c) at[c] = out[c];
      }
    }
#pragma unroll
    for (int e = 0; e < RowLane<T>::kEdges; ++e)
      if (row.has_edge(tile, e)) to[row.edge_column(e)] = from_float<T>(f(to_float(row.held_edges[e])));
  }
}

// Returns the row that a thread takes part in.
template <class T>
__device__ __forceinline__ i64 row_index() {
  constexpr int kLanes = RowLane<T>::kLanes;
  return static_cast<i64>(blockIdx.x) * (kEntropyThreads / kLanes) + threadIdx.x / kLanes;
}

// Computes the entropies of all rows, and reads those before `end`. All blocks of a launch call it.
template <class T>
__device__ __forceinline__ void entropy_of_rows(const LogitRows<T>& logits, i64 end, acc_t<T>* entropy,
                                                acc_t<T>* log_sum) {
  using A = acc_t<T>;
  constexpr int kLanes = RowLane<T>::kLanes;
  const i64 index = row_index<T>();
  const bool reads = index < min(logits.rows, end);
  RowLane<T> row(logits, index, reads);
  EntropySums<A> sums = lane_sums(row, RowLane<T>::tiles(logits));
  sums.s = warp_sum<kLanes>(sums.s);
  sums.t = warp_sum<kLanes>(sums.t);
  if (row.lane == 0 && index < logits.rows) {
    entropy[index] = reads ? sums.entropy() : 0;
    log_sum[index] = reads ? sums.log_sum() : unread_log_sum<A>();
  }
}

template <class T>
__global__ void __launch_bounds__(kEntropyThreads, entropy_blocks(sizeof(T)))
    token_entropy_fwd_kernel(LogitRows<T> logits, acc_t<T>* entropy, acc_t<T>* log_sum) {
  entropy_of_rows<T>(logits, logits.rows, entropy, log_sum);
}

// grad_logits has a row stride of `grad_stride` elements. It may be the logits themselves.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kEntropyThreads, sizeof(T) == 8 ? 2 : 3)
    token_entropy_bwd_kernel(const acc_t<T>* grad_entropy, LogitRows<T> logits, const acc_t<T>* entropy,
                             const acc_t<T>* log_sum, T* grad_logits, i64 grad_stride) {
  using A = acc_t<T>;
  const i64 index = row_index<T>();
  const bool there = index < logits.rows;
  RowLane<T> row(logits, index, there);
  const i32 tiles = RowLane<T>::tiles(logits);
  A upstream = there ? grad_entropy[index] : 0, h = there ? entropy[index] : 0, shift = there ? log_sum[index] : 0;
  A m = row_max(row, tiles);
  // A row that forward has not read may hold anything. It was read here, since waiting for its log_sum would cost more.
  const bool unread = shift == unread_log_sum<A>();
  if (unread) upstream = h = shift = m = 0;
  upstream = -upstream * kNats<A>, h *= kPerNat<A>, shift *= kPerNat<A>;
  map_row<T, kAligned>(row, tiles, unread, grad_logits + (there ? index * grad_stride : 0), [=](A x) {
    const A log_p = (x - m) * kPerNat<A> - shift;
    return upstream * scaled_exp(log_p) * (max(log_p, kLogOfZero<A>) + h);
  });
}

}  // namespace blt
