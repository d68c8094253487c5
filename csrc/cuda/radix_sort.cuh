// Sorts lists of readers by row, several lists of the same length at once, and finds the run of each row.
//
// The sort is least significant digit first, stable, 8 bits a pass: tiles count their digits (radix_count_kernel,
// or the kernel that writes the readers), counts become places, and every tile moves its readers to their places
// (radix_scatter_kernel). The grid has a row per list. Ranks within a tile follow the order of its warps: a warp
// matches 32 neighbouring readers at a time, so equal digits keep their order without atomics. Counts use atomic
// additions of integers, whose order does not matter.
//
// Counts become places in two levels: a block sums the counts of kScanTiles tiles (radix_sum_kernel), a block per list
// scans these sums (radix_scan_kernel), and a block turns the counts of kScanTiles tiles into places from there
// (radix_spread_kernel). A list of at most kScanTiles tiles needs only the scan. No block waits for another of its
// launch. The serial part is one sum per kScanTiles * kSortTile = 131072 readers: 2048 rows of 1 KB for 256M readers.
// Runs: tiles count where rows change (run_count_kernel), a block per list scans the counts, 2048 a step
// (run_scan_kernel), and tiles write the starts of their runs (run_starts_kernel).
//
// Bytes per pass and reader: 8 read to count, 8 read and 8 written to move. The counts, 1 KB per tile of 2048 readers,
// are written, read and written to make places, and read, and read once more above kScanTiles tiles: 2 to 2.5 per
// reader. Runs take 8 read to count, 8 read to write, and 4 written per run. Launches: 3 per pass, 5 above kScanTiles
// tiles, and 3 for runs. A pass moves about 1/20 of the bytes of the rows, and stays in L2. Registers: at most 48, for
// 5 blocks an SM.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr int kSortBits = 8, kDigits = 1 << kSortBits;
inline constexpr int kSortThreads = kDigits;  // a thread owns a digit
inline constexpr int kSortItems = 8;          // counts the readers of a thread
inline constexpr int kSortTile = kSortThreads * kSortItems;
inline constexpr int kScanTiles = 64;  // counts the tiles of a block that makes places

// A byte reads a table row.
struct alignas(8) Reader {
  u32 row, byte;
};

// Counts how often each digit occurs in a tile, in the shared memory of its block.
struct DigitCounts {
  u32 counts[kDigits];

  __device__ __forceinline__ void clear() {
    counts[threadIdx.x] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(u32 row, int shift) { atomicAdd(&counts[row >> shift & (kDigits - 1)], 1u); }
  // Stores the counts to [lists][tiles][digits].
  __device__ __forceinline__ void store(u32* to) const {
    __syncthreads();
    const i64 tile = static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x;
    to[(tile << kSortBits) + threadIdx.x] = counts[threadIdx.x];
  }
};

static __global__ void __launch_bounds__(kSortThreads, 6)
    radix_count_kernel(const Reader* readers, i64 count, int shift, u32* counts) {
  __shared__ DigitCounts digits;
  const Reader* const list = readers + blockIdx.y * count;
  const i64 first = static_cast<i64>(blockIdx.x) * kSortTile + threadIdx.x;
  digits.clear();
#pragma unroll
  for (int r = 0; r < kSortItems; ++r) {
    const i64 i = first + r * kSortThreads;
    if (i < count) digits.add(list[i].row, shift);
  }
  digits.store(counts);
}

// A thread owns a digit in rows of counts. sum_counts sums them; place_counts replaces them by places from `place` on.
__device__ __forceinline__ u32 sum_counts(const u32* own, i64 rows) {
  u32 sum = 0;
#pragma unroll 8
  for (i64 row = 0; row < rows; ++row) sum += own[row << kSortBits];
  return sum;
}
__device__ __forceinline__ void place_counts(u32* own, i64 rows, u32 place) {
  constexpr int kPrefetch = 8;
  for (i64 row = 0; row < rows; row += kPrefetch) {
    u32 ahead[kPrefetch] = {};
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i)
      if (row + i < rows) ahead[i] = own[(row + i) << kSortBits];
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      if (row + i >= rows) break;
      own[(row + i) << kSortBits] = place;
      place += ahead[i];
    }
  }
}

// Computes sums[list][segment][digit] of counts[list][tile][digit]. A segment of kScanTiles tiles has one block.
static __global__ void __launch_bounds__(kSortThreads, 6) radix_sum_kernel(const u32* counts, i64 tiles, u32* sums) {
  const i64 first = static_cast<i64>(blockIdx.x) * kScanTiles, segment = blockIdx.y * gridDim.x + blockIdx.x;
  const u32* const own = counts + ((blockIdx.y * tiles + first) << kSortBits) + threadIdx.x;
  sums[(segment << kSortBits) + threadIdx.x] = sum_counts(own, min<i64>(kScanTiles, tiles - first));
}

// Replaces counts[list][row][digit] by the place of the first reader with that digit of a tile, or of a segment. A list
// has one block.
static __global__ void __launch_bounds__(kSortThreads, 6) radix_scan_kernel(u32* counts, i64 rows) {
  u32* const own = counts + (blockIdx.x * rows << kSortBits) + threadIdx.x;
  place_counts(own, rows, block_sums<kSortThreads>(sum_counts(own, rows)).before);
}

// Replaces counts[list][tile][digit] by places, starting from those of the segments. A segment has one block.
static __global__ void __launch_bounds__(kSortThreads, 6)
    radix_spread_kernel(u32* counts, i64 tiles, const u32* segments) {
  const i64 first = static_cast<i64>(blockIdx.x) * kScanTiles, segment = blockIdx.y * gridDim.x + blockIdx.x;
  u32* const own = counts + ((blockIdx.y * tiles + first) << kSortBits) + threadIdx.x;
  place_counts(own, min<i64>(kScanTiles, tiles - first), segments[(segment << kSortBits) + threadIdx.x]);
}

static __global__ void __launch_bounds__(kSortThreads, 5)
    radix_scatter_kernel(const Reader* from, i64 count, int shift, const u32* places, Reader* to) {
  constexpr int kWarps = kSortThreads / kWarp;
  __shared__ u32 next[kWarps][kDigits + 1];  // its last entry is for missing readers
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const i64 first = static_cast<i64>(blockIdx.x) * kSortTile + warp * (kWarp * kSortItems) + lane;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) next[w][threadIdx.x] = 0;
  if (threadIdx.x < kWarps) next[threadIdx.x][kDigits] = 0;
  Reader readers[kSortItems];
#pragma unroll
  for (int r = 0; r < kSortItems; ++r)
    if (first + r * kWarp < count) readers[r] = from[blockIdx.y * count + first + r * kWarp];
  __syncthreads();
  u32 ranks[kSortItems];  // are among the readers of the warp with the same digit
#pragma unroll
  for (int r = 0; r < kSortItems; ++r) {
    const u32 digit = first + r * kWarp < count ? readers[r].row >> shift & (kDigits - 1) : kDigits;
    const u32 equal = __match_any_sync(kAllLanes, digit), before = equal & ((1u << lane) - 1);
    ranks[r] = next[warp][digit] + __popc(before);
    __syncwarp();
    if (before == 0) next[warp][digit] += __popc(equal);
    __syncwarp();
  }
  __syncthreads();
  const i64 tile = static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x;
  u32 place = places[(tile << kSortBits) + threadIdx.x];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const u32 here = next[w][threadIdx.x];
    next[w][threadIdx.x] = place;
    place += here;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kSortItems; ++r)
    if (first + r * kWarp < count)
      to[blockIdx.y * count + next[warp][readers[r].row >> shift & (kDigits - 1)] + ranks[r]] = readers[r];
}

// --- runs ------------------------------------------------------------------------------------------------------------

// Bit r is set if a run begins at the r-th of a thread's kSortItems neighbouring readers.
__device__ __forceinline__ u32 run_begins(const Reader* list, i64 count, i64 first) {
  u32 begins = 0, before = first > 0 && first < count ? list[first - 1].row : 0;
#pragma unroll
  for (int r = 0; r < kSortItems; ++r) {
    if (first + r >= count) break;
    const u32 row = list[first + r].row;
    if (first + r == 0 || row != before) begins |= 1u << r;
    before = row;
  }
  return begins;
}

static __global__ void __launch_bounds__(kSortThreads, 6)
    run_count_kernel(const Reader* readers, i64 count, u32* counts) {
  const i64 first = (static_cast<i64>(blockIdx.x) * kSortThreads + threadIdx.x) * kSortItems;
  const u32 total = block_sums<kSortThreads, u32>(__popc(run_begins(readers + blockIdx.y * count, count, first))).total;
  if (threadIdx.x == 0) counts[static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x] = total;
}

// Replaces counts[list][tile] by the number of runs that begin before the tile. A list has one block.
static __global__ void __launch_bounds__(kSortThreads, 6) run_scan_kernel(u32* counts, i64 tiles) {
  u32* const own = counts + blockIdx.x * tiles;
  u32 before = 0;
  for (i64 step = 0; step < tiles; step += kSortThreads * kSortItems) {
    const i64 first = step + static_cast<i64>(threadIdx.x) * kSortItems;
    u32 here[kSortItems] = {}, sum = 0;
#pragma unroll
    for (int r = 0; r < kSortItems; ++r) {
      if (first + r < tiles) here[r] = own[first + r];
      sum += here[r];
    }
    const BlockSums<u32> placed = block_sums<kSortThreads>(sum);
    u32 runs = before + placed.before;
#pragma unroll
    for (int r = 0; r < kSortItems; ++r) {
      if (first + r < tiles) own[first + r] = runs;
      runs += here[r];
    }
    before += placed.total;
  }
}

// Sets starts[list][count + 1] to the start of each run, then the end of the last, and totals[list] to the number of
// runs whose row is not `none`, which sorts last. befores[list][tile] is the number of runs that begin before the tile.
static __global__ void __launch_bounds__(kSortThreads, 6)
    run_starts_kernel(const Reader* readers, i64 count, u32 none, const u32* befores, u32* starts, i32* totals) {
  const Reader* const list = readers + blockIdx.y * count;
  const i64 first = (static_cast<i64>(blockIdx.x) * kSortThreads + threadIdx.x) * kSortItems;
  const u32 before = befores[static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x];
  const u32 begins = run_begins(list, count, first);
  const BlockSums<u32> placed = block_sums<kSortThreads, u32>(__popc(begins));
  u32* const to = starts + blockIdx.y * (count + 1);
  u32 run = before + placed.before;
#pragma unroll
  for (int r = 0; r < kSortItems; ++r)
    if (begins >> r & 1) to[run++] = static_cast<u32>(first + r);
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) {
    const u32 all = before + placed.total;
    to[all] = static_cast<u32>(count);
    totals[blockIdx.y] = static_cast<i32>(all - (list[count - 1].row == none ? 1 : 0));
  }
}

}  // namespace blt
