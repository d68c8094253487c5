// ngram_hash_embed: the embedding of a byte plus one hashed row for each n-gram that ends at it.
//
//   out[t] = byte_table[token[t]] + sum over tables n of table_n[hash_n(t)],  added up in fp32 and rounded once
//   grad_table_n[row] = sum of grad_out[t] over the bytes t with hash_n(t) = row
//
// Forward, one kernel: a block of 128 threads owns kBytes bytes. It hashes them once, a thread for each byte and table, and
// leaves the addresses of all rows in shared memory; then a thread owns 16 bytes of columns of an output row and adds up
// its N + 1 rows, kAhead of them in flight. Bytes: N + 1 rows read and one written for each byte of text.
//
// Backward: each table, and the byte table, has a list of readers (row, byte), sorted by row (radix_sort.cuh). The readers of
// one row are a run, whose owner adds up their bytes in order. A block owns up to kMaxOwned neighbouring runs, a thread 16
// bytes of columns of one at a time. Long runs are split at multiples of kChunk = 64 places in the list, in levels: a sum of
// level 1 is that of 64 neighbouring readers of the same row, one of level l + 1 that of 64 sums of level l. They are ready
// before the owner starts, who adds readers up to the first multiple of 64, sums of level 1 up to the first of 64^2, and so
// on up, and then down to the end: always the same order, no atomics, and at most 126 levels + 127 additions one after the
// other however long the run. Levels: as many as have at least 2 sums, 2 from 8192 bytes on, 4 for 256M.
// A dense gradient is zeroed as one block of memory, and owners write the rows that were read; a sparse one has these rows
// alone.
//
// Bytes: for each byte and list a row read; for each run a row written; a dense gradient written once more, with zeros; sums
// are at most 1/64 of their readers' rows in number, in fp32, written and read. Beside that, for each byte and list, 8 bytes
// written, 26 a pass of the sort, 8 + 8 to find runs and 8 to read at the end, and for each run 4 written and 4 read.
// Launches: a memset a tensor, 3 a pass (5 above 131072 bytes), 3 for runs, one a level, 2 for owners.
//
// Roofline: memory; some 30 instructions for 16 bytes. Forward and sums: at most 72 registers, for 7 blocks of 128 threads an
// SM: with 8 loads of 16 bytes in flight each that is 100 KB, more than twice what hides the latency of the memory. Owners:
// most runs are a reader or two long, and have no more loads in flight, so that there are 10 blocks an SM with 48 registers
// and 4 loads ahead: 20 to 80 KB.
#pragma once

#include "ngram_hash.cuh"
#include "radix_sort.cuh"

namespace blt {

inline constexpr int kEmbedThreads = 128;
inline constexpr int kEmbedBytes = 16;  // of text, for a block
inline constexpr int kAhead = 8;        // rows in flight
inline constexpr int kAheadOfRuns = 4;  // the same for owners of runs
inline constexpr int kChunkBits = 6;
inline constexpr int kChunk = 1 << kChunkBits;  // readers that are added up ahead of their owner
inline constexpr int kMaxOwned = 120;           // runs, for a block

// What of the tables is here to be read: rows [low, low + rows) of each hashed one, and the byte table if it has rows.
struct Shard {
  u64 low, rows;
  i64 alphabet;
};

// A tensor of rows for each hashed table, then one for the byte table.
template <class T>
struct TableRows {
  T* first[kMaxTables + 1];
  i64 strides[kMaxTables + 1];
};

// The row of a list that byte t reads, less the shard's first; -1 if there is none. The last list is the byte table's.
template <class Id>
__device__ __forceinline__ i64 row_read(const Text<Id>& text, const Ngrams& ngrams, const Shard& shard, int list, i64 t,
                                        i64 start) {
  if (start < 0) return -1;
  if (list == ngrams.tables) {
    const i64 token = text.tokens[t];
    return token >= 0 && token < shard.alphabet ? token : -1;
  }
  const u64 row = ngram_hash(text, ngrams, list, t, start) - shard.low;
  return row < shard.rows ? static_cast<i64>(row) : -1;
}

// The threads of a block over rows of `packs` packs, neighbours at neighbouring packs: for (RowWalk at(n); at.row < rows; ++at)
struct RowWalk {
  int row, pack, packs;
  __device__ __forceinline__ explicit RowWalk(int packs)
      : row(static_cast<int>(threadIdx.x) / packs), pack(static_cast<int>(threadIdx.x) % packs), packs(packs) {}
  __device__ __forceinline__ RowWalk& operator++() {
    row += kEmbedThreads / packs;
    pack += kEmbedThreads % packs;
    if (pack >= packs) pack -= packs, ++row;
    return *this;
  }
};

// sum += the kPack numbers at row_of(i) for i in [begin, end), one after the other; nothing where that is null.
template <class T, int kAhead, int kPack, class RowOf>
__device__ __forceinline__ void add_rows(acc_t<T> (&sum)[kPack], u32 begin, u32 end, const RowOf& row_of) {
#pragma unroll 1
  for (u32 i = begin; i < end; i += kAhead) {
    const T* rows[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) rows[j] = row_of(least(i + j, end - 1));  // all at once, without a branch
    Bits<T, kPack> ahead[kAhead] = {};
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j < end && rows[j] != nullptr) ahead[j] = load_constant<kPack>(rows[j]);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (i + j >= end) break;
      const Pack<T, kPack> numbers = unpack<T, kPack>(ahead[j]);
#pragma unroll
      for (int c = 0; c < kPack; ++c) sum[c] += widen(numbers[c]);
    }
  }
}

// How many of kPack sums one access moves.
template <class A, int kPack>
inline constexpr int kParts = kPack * sizeof(A) <= 16 ? kPack : 16 / sizeof(A);

template <class T, int kPack>
__device__ __forceinline__ void store_sum(T* to, const acc_t<T> (&sum)[kPack]) {
  Pack<T, kPack> result;
#pragma unroll
  for (int c = 0; c < kPack; ++c) result[c] = narrow<T>(sum[c]);
  store(to, result);
}

// --- forward ----------------------------------------------------------------------------------------------------------

template <class T, class Id, int kPack>
__global__ void __launch_bounds__(kEmbedThreads, 7)
    ngram_hash_embed_fwd_kernel(Text<Id> text, __grid_constant__ const Ngrams ngrams, Shard shard,
                                __grid_constant__ const TableRows<const T> tables, i64 width, T* out) {
  __shared__ i64 starts[kEmbedBytes];
  const T** const rows = &shared_memory<const T*>();  // [kEmbedBytes][lists]
  const int lists = ngrams.tables + (shard.alphabet > 0 ? 1 : 0);
  const i64 first = static_cast<i64>(blockIdx.x) * kEmbedBytes;
  const int bytes = static_cast<int>(least<i64>(kEmbedBytes, text.bytes - first));
  if (static_cast<int>(threadIdx.x) < bytes) starts[threadIdx.x] = document_start(text, first + threadIdx.x);
  __syncthreads();
  for (int i = threadIdx.x; i < bytes * lists; i += kEmbedThreads) {
    const int byte = i / lists, list = (i + ngrams.tables) % lists;  // the byte table first
    const i64 row = row_read(text, ngrams, shard, list, first + byte, starts[byte]);
    rows[i] = row < 0 ? nullptr : tables.first[list] + row * tables.strides[list];
  }
  __syncthreads();
  for (RowWalk at(static_cast<int>(width / kPack)); at.row < bytes; ++at) {
    const T* const* const own = rows + at.row * lists;
    const int column = at.pack * kPack;
    acc_t<T> sum[kPack] = {};
    add_rows<T, kAhead>(sum, 0, lists, [=](u32 i) { return own[i] == nullptr ? nullptr : own[i] + column; });
    store_sum<T>(out + (first + at.row) * width + column, sum);
  }
}

// --- backward ---------------------------------------------------------------------------------------------------------

// The readers of every list, with `none` for a row where there is none to be read, and counts of their first digit. A grid
// of the tiles of radix_sort.cuh.
template <class Id>
__global__ void __launch_bounds__(kSortThreads, 6)
    ngram_readers_kernel(Text<Id> text, __grid_constant__ const Ngrams ngrams, Shard shard, u32 none, Reader* readers,
                         u32* counts) {
  __shared__ DigitCounts<kSortBits> digits;
  const i64 first = static_cast<i64>(blockIdx.x) * kSortTile + threadIdx.x;
  digits.clear();
  for (int r = 0; r < kSortItems; ++r) {
    const i64 t = first + r * kSortThreads;
    if (t >= text.bytes) break;
    const i64 row = row_read(text, ngrams, shard, blockIdx.y, t, document_start(text, t));
    const Reader reader = {row < 0 ? none : static_cast<u32>(row), static_cast<u32>(t)};
    readers[blockIdx.y * text.bytes + t] = reader;
    digits.add(reader.row, 0);
  }
  digits.store(counts);
}

// Sorted readers[lists][bytes] of the rows of `grad`. sums: for each level from 1 on [lists][sums of a list][width].
template <class T>
struct Readers {
  const Reader* readers;
  i64 bytes;
  const T* grad;
  i64 stride, width;
  acc_t<T>* sums;
  int lists, levels;

  __host__ __device__ static i64 sums_of(i64 bytes, int level) { return bytes >> (kChunkBits * level); }
  // The sums of a level for a list.
  __device__ __forceinline__ acc_t<T>* sums_at(int level, int list) const {
    i64 row = list * sums_of(bytes, level);
    for (int below = 1; below < level; ++below) row += lists * sums_of(bytes, below);
    return sums + row * width;
  }
};

// sum += [begin, end) of a level, in kPack columns: the rows of readers for level 0, else sums of readers of the same row.
template <int kAhead, class T, int kPack>
__device__ __forceinline__ void add_level(acc_t<T> (&sum)[kPack], const Readers<T>& from, int level, int list,
                                          u32 begin, u32 end, int column) {
  using A = acc_t<T>;
  if (level == 0) {
    const Reader* const readers = from.readers + list * from.bytes;
    const T* const grad = from.grad + column;
    return add_rows<T, kAhead>(sum, begin, end, [=](u32 i) { return grad + readers[i].byte * from.stride; });
  }
  const A* const sums = from.sums_at(level, list) + column;
  constexpr int kPart = kParts<A, kPack>;
#pragma unroll
  for (int c = 0; c < kPack; c += kPart) {
    A part[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) part[i] = sum[c + i];
    add_rows<A, kAhead>(part, begin, end, [=](u32 i) { return sums + i * from.width + c; });
#pragma unroll
    for (int i = 0; i < kPart; ++i) sum[c + i] = part[i];
  }
}

// The same for the run [begin, end) of readers: up the levels as far as whole sums lie in it, and down again.
template <class T, int kPack>
__device__ __forceinline__ void add_run(acc_t<T> (&sum)[kPack], const Readers<T>& from, int list, u32 begin, u32 end,
                                        int column) {
  int top = 0;
  for (u32 low = begin, high = end; top < from.levels; ++top) {
    low = ceil_div<u32>(low, kChunk), high /= kChunk;
    if (low >= high) break;
  }
#pragma unroll 1
  for (int piece = 0; piece <= 2 * top; ++piece) {
    const bool down = piece > top;
    const int level = down ? 2 * top - piece : piece, shift = kChunkBits * level;
    const u32 first = (begin + (1u << shift) - 1) >> shift, last = end >> shift;
    const u32 low = down ? last / kChunk * kChunk : first;
    const u32 high = down || level == top ? last : ceil_div<u32>(first, kChunk) * kChunk;
    add_level<kAheadOfRuns>(sum, from, level, list, low, high, column);
  }
}

// A block for each sum of a level, which only does something if all of its readers read the same row.
template <class T, int kPack>
__global__ void __launch_bounds__(kEmbedThreads, 7) ngram_chunk_sums_kernel(Readers<T> from, int level, u32 none) {
  using A = acc_t<T>;
  const int list = blockIdx.y, shift = kChunkBits * level;
  const Reader* const chunk = from.readers + list * from.bytes + (static_cast<i64>(blockIdx.x) << shift);
  if (chunk[0].row == none || chunk[0].row != chunk[(1 << shift) - 1].row) return;
  A* const to = from.sums_at(level, list) + blockIdx.x * from.width;
  for (RowWalk at(static_cast<int>(from.width / kPack)); at.row < 1; ++at) {
    const int column = at.pack * kPack;
    A sum[kPack] = {};
    add_level<kAhead>(sum, from, level - 1, list, blockIdx.x * kChunk, (blockIdx.x + 1) * kChunk, column);
    constexpr int kPart = kParts<A, kPack>;
#pragma unroll
    for (int c = 0; c < kPack; c += kPart) {
      Pack<A, kPart> part;
#pragma unroll
      for (int i = 0; i < kPart; ++i) part[i] = sum[c + i];
      store(to + column + c, part);
    }
  }
}

// Where the runs of each list begin, starts[lists][bytes + 1], and how many there are, totals[lists]. A block owns `owned`
// neighbouring ones; a grid may have more blocks than there are runs.
struct Runs {
  const u32* starts;
  const i32* totals;
  int owned;
};

// The sums of the runs that the block owns go to row_of(run, row), for run `run` of the list and a row of its table.
template <int kPack, class T, class RowOf>
__device__ __forceinline__ void write_runs(const Readers<T>& from, const Runs& runs, int list, const RowOf& row_of) {
  __shared__ u32 begins[kMaxOwned + 1], rows[kMaxOwned + 1];
  static_assert(kMaxOwned < kEmbedThreads, "a thread for each run and the one behind");
  const i64 first = static_cast<i64>(blockIdx.x) * runs.owned;
  const int here = static_cast<int>(least<i64>(runs.owned, runs.totals[list] - first)), run = threadIdx.x;
  if (here <= 0) return;
  if (run <= here) {
    begins[run] = runs.starts[list * (from.bytes + 1) + first + run];
    if (run < here) rows[run] = from.readers[list * from.bytes + begins[run]].row;
  }
  __syncthreads();
  for (RowWalk at(static_cast<int>(from.width / kPack)); at.row < here; ++at) {
    const int column = at.pack * kPack;
    acc_t<T> sum[kPack] = {};
    add_run(sum, from, list, begins[at.row], begins[at.row + 1], column);
    store_sum<T>(row_of(first + at.row, rows[at.row], at.pack == 0) + column, sum);
  }
}

// Dense gradients of the lists from `first_list`, which are 0 already.
template <class T, int kPack>
__global__ void __launch_bounds__(kEmbedThreads, 10)
    ngram_hash_embed_bwd_kernel(Readers<T> from, Runs runs, int first_list,
                                __grid_constant__ const TableRows<T> grads) {
  const int list = first_list + blockIdx.y;
  T* const to = grads.first[list];
  write_runs<kPack>(from, runs, list, [=](i64, u32 row, bool) { return to + row * from.width; });
}

// Where the runs of each list go. Rows of a fused tensor are numbered through all hashed tables.
template <class T>
struct SparseGrads {
  i64* rows[kMaxTables + 1];
  T* values[kMaxTables + 1];
  int tables;
  i64 numbers;  // that a table takes: 0 where each has its own tensor
};

// Sparse gradients of the lists from `first_list`.
template <class T, int kPack>
__global__ void __launch_bounds__(kEmbedThreads, 10)
    ngram_hash_embed_sparse_bwd_kernel(Readers<T> from, Runs runs, int first_list,
                                       __grid_constant__ const SparseGrads<T> grads) {
  const int list = first_list + blockIdx.y;
  i64* const rows = grads.rows[list];
  T* const values = grads.values[list];
  const i64 number = list < grads.tables ? list * grads.numbers : 0;
  write_runs<kPack>(from, runs, list, [=](i64 run, u32 row, bool once) {
    if (once) rows[run] = number + row;
    return values + run * from.width;
  });
}

}  // namespace blt
