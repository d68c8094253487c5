// A warp requests rows of tensors ahead of their use: streamed rows go through a ring in shared memory, rows that it
// holds next go to registers.
//
// The ring of a warp has kRows slots and keeps row r in slot r % kRows. Every lane copies its own slices of a row and
// reads no others, so lanes need not be synchronised. Each row is one group of asynchronous copies: it has arrived when
// only rows that were requested after it are under way. A range that begins where the last one ended, or among the last
// kRows rows, costs no new trip to memory.
#pragma once

#include "head_slices.cuh"

namespace blt {

// A slot holds one row of kTensors tensors and, if kNumbers is set, a number of this row for every lane.
template <class S_, int kTensors_, bool kNumbers_, int kBytes>
struct RowRing {
  using S = S_;
  static constexpr int kTensors = kTensors_;
  static constexpr bool kNumbers = kNumbers_;
  static constexpr int kRows = kBytes / (kTensors * kWarp * S::kSize * static_cast<int>(sizeof(typename S::T)));
  static_assert(kRows >= 2 * S::kTile && (kRows & (kRows - 1)) == 0, "two tiles at least, and slots by a mask");
  Bits<typename S::T, S::kVec> vecs[kRows][kTensors][S::kVecs][kWarp];
  typename S::A numbers[kNumbers ? kRows : 1][kWarp];
};

// Waits until at most `later` groups of copies are under way. kLow <= later <= kHigh.
template <int kLow, int kHigh>
__device__ __forceinline__ void wait_for_all_but(u32 later) {
  if constexpr (kLow == kHigh) {
    wait_for_copies<kLow>();
  } else {
    constexpr int kMiddle = (kLow + kHigh + 1) / 2;
    if (later >= kMiddle)
      wait_for_all_but<kMiddle, kHigh>(later);
    else
      wait_for_all_but<kLow, kMiddle - 1>(later);
  }
}

template <class Ring_>
class RowStream {
 public:
  using Ring = Ring_;
  using S = typename Ring::S;
  using A = typename S::A;
  static constexpr u32 kRows = Ring::kRows;

  __device__ __forceinline__ explicit RowStream(Ring& ring) : ring_(ring), lane_(threadIdx.x % kWarp) {}

  // Sets the columns that rows are read from, and numbers[r * stride] as the number of row r.
  __device__ __forceinline__ void set(const InputColumn<S> (&columns)[Ring::kTensors], const A* numbers = nullptr,
                                      int stride = 0) {
    wait_for_copies<0>();
    begin_ = 1, end_ = 0, numbers_ = numbers, stride_ = stride;
#pragma unroll
    for (int t = 0; t < Ring::kTensors; ++t) {
      columns_[t] = columns[t];
      // Copies write nothing beyond the end of a row: these numbers stay 0.
#pragma unroll
      for (int r = 0; r < S::kVecs; ++r)
        if (!columns[t].has(r))
          for (u32 slot = 0; slot < kRows; ++slot) ring_.vecs[slot][t][r][lane_] = {};
    }
  }

  // Moves to the rows from `row` on, and forgets the requested ones unless `row` is among them.
  __device__ __forceinline__ void seek(u32 row) {
    if (begin_ <= row && row <= end_ && end_ - row <= kRows) return;
    wait_for_copies<0>();
    begin_ = end_ = row;
  }

  // Moves to these rows, and requests as many as there are slots for.
  __device__ __forceinline__ void start(u32 row, u32 limit) {
    seek(row);
    request(row, limit);
  }

  // Requests rows up to `limit`, as many as there are slots for if rows from `kept` on keep theirs.
  __device__ __forceinline__ void request(u32 kept, u32 limit) {
    const u32 stop = min(limit, kept + kRows);
#pragma unroll 1
    for (; end_ < stop; ++end_) {
      const u32 slot = end_ % kRows;
#pragma unroll
      for (int t = 0; t < Ring::kTensors; ++t) {
        const auto* const from = columns_[t].at(end_);
#pragma unroll
        for (int r = 0; r < S::kVecs; ++r)
          if (columns_[t].has(r)) copy_async<S::kVec>(&ring_.vecs[slot][t][r][lane_], from + columns_[t].offset(r));
      }
      if constexpr (Ring::kNumbers)
        if (numbers_) copy_async<1>(&ring_.numbers[slot][lane_], numbers_ + static_cast<i64>(end_) * stride_);
      commit_copies();
    }
  }

  // Waits for a row that was requested, and so for all before it.
  __device__ __forceinline__ void wait(u32 row) const { wait_for_all_but<0, Ring::kRows - 1>(end_ - 1 - row); }

  __device__ __forceinline__ Slice<S> row(int tensor, u32 row) const {
    Raw<S> raw;
#pragma unroll
    for (int r = 0; r < S::kVecs; ++r) raw.vecs[r] = ring_.vecs[row % kRows][tensor][r][lane_];
    return to_float(raw);
  }
  __device__ __forceinline__ A number(u32 row) const { return ring_.numbers[row % kRows][lane_]; }

 private:
  Ring& ring_;
  int lane_;
  InputColumn<S> columns_[Ring::kTensors];
  const A* numbers_ = nullptr;
  int stride_ = 0;
  u32 begin_ = 1, end_ = 0;  // rows [begin_, end_) were requested since the last seek
};

// Calls f(row, x) for tiles of the rows from begin to end, where x is [tensor][row of the tile] and a tile that reaches
// beyond the end repeats the last row. It requests rows up to `limit`. With `kept`, which needs end - begin <= kRows,
// all rows keep their slots.
template <class Stream, class F>
__device__ __forceinline__ void for_each_tile(Stream& stream, u32 begin, u32 end, u32 limit, bool kept, F&& f) {
  using S = typename Stream::S;
  if (begin >= end) return;
  stream.seek(begin);
#pragma unroll 1
  for (u32 row = begin; row < end; row += S::kTile) {
    stream.request(kept ? begin : row, limit);
    stream.wait(min(row + S::kTile, end) - 1);
    Slice<S> x[Stream::Ring::kTensors][S::kTile];
#pragma unroll
    for (int t = 0; t < Stream::Ring::kTensors; ++t)
#pragma unroll
      for (int a = 0; a < S::kTile; ++a) x[t][a] = stream.row(t, min(row + a, end - 1));
    f(row, x);
  }
}

// Requests the rows of kTensors tensors that a group holds next, and a number of the lane, while it uses those it has.
template <class S, int kTensors>
struct HeldRows {
  Raw<S> raw[kTensors][S::kHeld];
  typename S::A number = 0;
  u32 row = ~0u;

  template <class Number>
  __device__ __forceinline__ void request(const InputColumn<S> (&columns)[kTensors], u32 first, u32 end,
                                          Number&& number_of) {
    row = first;
#pragma unroll
    for (int t = 0; t < kTensors; ++t)
#pragma unroll
      for (int i = 0; i < S::kHeld; ++i)
        if (first + i < end) raw[t][i] = columns[t].load(first + i);
    number = number_of(first, end);
  }
  // Takes the `count` rows from `first` on, requests the next ones up to `end`, and returns the lane's number.
  template <class Number>
  __device__ __forceinline__ typename S::A take(Slice<S> (&held)[kTensors][S::kHeld],
                                                const InputColumn<S> (&columns)[kTensors], u32 first, int count,
                                                u32 end, Number&& number_of) {
    if (row != first) request(columns, first, first + count, number_of);
#pragma unroll
    for (int t = 0; t < kTensors; ++t)
#pragma unroll
      for (int i = 0; i < S::kHeld; ++i) held[t][i] = i < count ? to_float(raw[t][i]) : Slice<S>{};
    const auto own = number;
    row = ~0u;
    if (first + count < end) request(columns, first + count, end, number_of);
    return own;
  }
};

}  // namespace blt
