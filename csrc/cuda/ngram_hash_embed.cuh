// ngram_hash_embed adds to the embedding of a byte one hashed row for each n-gram that ends at it.
//
//   out[t] = byte_table[token[t]] + sum over tables n of table_n[hash_n(t)],  added up in fp32 and rounded once
//   grad_table_n[row] = sum of grad_out[t] over the bytes t with hash_n(t) = row
//
// Forward, one kernel: a block of 128 threads owns kEmbedBytes bytes. First a thread hashes one byte for one table at a
// time and leaves the addresses of all rows in shared memory. Then a thread owns 16 bytes of columns of an output row
// and adds up its N + 1 rows, with a prefetch depth of kPrefetch. Bytes: N + 1 rows read and one written per byte of
// text.
//
// Backward: each hashed table, and the byte table, has a list of readers (row, byte), sorted by row (radix_sort.cuh).
// The readers of one row are a run. The owner of a run adds up the gradients of its bytes in order. A block owns up to
// kMaxOwned neighbouring runs; a thread owns 16 bytes of columns of one run at a time. Long runs are split at multiples
// of kChunk = 64 places in the list, in levels: a sum of level 1 covers 64 neighbouring readers of the same row, one of
// level l + 1 covers 64 sums of level l. All sums are ready before the owner starts. It adds readers up to the first
// multiple of 64, sums of level 1 up to the first multiple of 64^2, and so on up, then down to the end. The order is
// fixed, without atomics, and a run of any length takes at most 126 levels + 127 additions in sequence. There are as
// many levels as have at least 2 sums: 2 from 8192 bytes on, 4 for 256M.
// A dense gradient is zeroed by a memset, then owners write the rows that were read. A sparse one holds only these
// rows.
//
// Bytes: a row read per byte and list, and a row written per run; a dense gradient is written once more, with zeros;
// sums, in fp32, are at most 1/64 of the rows, written and read. The lists take, per byte and list, 8 bytes written, 26
// per pass of the sort, 8 + 8 to find runs and 8 to read at the end, and 4 written and 4 read per run.
// Launches: a memset per tensor, 3 per pass (5 above 131072 bytes), 3 for runs, one per level, 2 for owners.
//
// Roofline: memory; some 30 instructions per 16 bytes. Forward and sums: at most 72 registers, for 7 blocks of 128
// threads an SM. With 8 loads of 16 bytes in flight per thread that is 100 KB, twice what hides the latency of memory.
// Owners: most runs have a reader or two and no more loads in flight, so 48 registers and a prefetch depth of 4 allow
// 10 blocks an SM: 20 to 80 KB.
#pragma once

#include "ngram_hash.cuh"
#include "radix_sort.cuh"

namespace blt {

inline constexpr int kEmbedThreads = 128;
inline constexpr int kEmbedBytes = 16;  // a block owns so many bytes of text
inline constexpr int kPrefetch = 8;     // counts rows in flight
inline constexpr int kRunPrefetch = 4;  // counts rows in flight of an owner of runs
inline constexpr int kChunkBits = 6;
inline constexpr int kChunk = 1 << kChunkBits;  // counts readers of a sum of level 1
inline constexpr int kMaxOwned = 120;           // bounds the runs of a block

// This rank holds rows [low, low + rows) of each hashed table, and `alphabet` rows of the byte table.
struct ShardRows {
  u64 low, rows;
  i64 alphabet;
};

// Points to the rows of each hashed table, then to those of the byte table.
template <class T>
struct TableRows {
  T* first[kMaxTables + 1];
  i64 strides[kMaxTables + 1];
};

// Returns the row of a list that byte t reads, relative to the shard's first, or -1. The byte table has the last list.
template <class Id>
__device__ __forceinline__ i64 row_read(const Text<Id>& text, const Ngrams& ngrams, const ShardRows& shard, int list,
                                        i64 t, i64 start) {
  if (start < 0) return -1;
  if (list == ngrams.tables) {
    const i64 token = text.tokens[t];
    return token >= 0 && token < shard.alphabet ? token : -1;
  }
  const u64 row = ngram_hash(text, ngrams, list, t, start) - shard.low;
  return row < shard.rows ? static_cast<i64>(row) : -1;
}

// Distributes rows of `vecs` aligned vectors over the threads of a block, neighbouring vectors to neighbouring
// threads, in a loop: for (RowWalk at(vecs); at.row < rows; ++at)
struct RowWalk {
  int row, vec, vecs;
  __device__ __forceinline__ explicit RowWalk(int vecs)
      : row(static_cast<int>(threadIdx.x) / vecs), vec(static_cast<int>(threadIdx.x) % vecs), vecs(vecs) {}
  __device__ __forceinline__ RowWalk& operator++() {
    row += kEmbedThreads / vecs;
    vec += kEmbedThreads % vecs;
    if (vec >= vecs) vec -= vecs, ++row;
    return *this;
  }
};

// Adds to `sum` the kVec numbers at row_of(i) for i in [begin, end), in order. Null rows add nothing.
template <class T, int kPrefetch, int kVec, class RowOf>
__device__ __forceinline__ void add_rows(acc_t<T> (&sum)[kVec], u32 begin, u32 end, const RowOf& row_of) {
#pragma unroll 1
  for (u32 i = begin; i < end; i += kPrefetch) {
    const T* rows[kPrefetch];
#pragma unroll
    for (int j = 0; j < kPrefetch; ++j) rows[j] = row_of(min(i + j, end - 1));  // a branch would part the loads
    Bits<T, kVec> ahead[kPrefetch] = {};
#pragma unroll
    for (int j = 0; j < kPrefetch; ++j)
      if (i + j < end && rows[j] != nullptr) ahead[j] = load_constant<kVec>(rows[j]);
#pragma unroll
    for (int j = 0; j < kPrefetch; ++j) {
      if (i + j >= end) break;
      const AlignedVector<T, kVec> numbers = unpack<T, kVec>(ahead[j]);
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[c] += to_float(numbers[c]);
    }
  }
}

static_assert(sizeof(Text<i64>) + sizeof(Ngrams) + sizeof(ShardRows) + sizeof(TableRows<float>) + 2 * sizeof(i64) <=
                  4096,
              "the parameters of a kernel take at most 4 KB before CUDA 12.1");

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T, class Id, int kVec>
__global__ void __launch_bounds__(kEmbedThreads, 7)
    ngram_hash_embed_fwd_kernel(Text<Id> text, __grid_constant__ const Ngrams ngrams, ShardRows shard,
                                __grid_constant__ const TableRows<const T> tables, i64 width, T* out) {
  __shared__ i64 starts[kEmbedBytes];
  const T** const rows = &shared_memory<const T*>();  // [kEmbedBytes][lists]
  const int lists = ngrams.tables + (shard.alphabet > 0 ? 1 : 0);
  const i64 first = static_cast<i64>(blockIdx.x) * kEmbedBytes;
  const int bytes = static_cast<int>(min<i64>(kEmbedBytes, text.bytes - first));
  if (static_cast<int>(threadIdx.x) < bytes) starts[threadIdx.x] = document_start(text, first + threadIdx.x);
  __syncthreads();
  for (int i = threadIdx.x; i < bytes * lists; i += kEmbedThreads) {
    const int byte = i / lists, list = (i + ngrams.tables) % lists;  // the byte table is the first
    const i64 row = row_read(text, ngrams, shard, list, first + byte, starts[byte]);
    rows[i] = row < 0 ? nullptr : tables.first[list] + row * tables.strides[list];
  }
  __syncthreads();
  for (RowWalk at(static_cast<int>(width / kVec)); at.row < bytes; ++at) {
    const T* const* const own = rows + at.row * lists;
    const int column = at.vec * kVec;
    acc_t<T> sum[kVec] = {};
    add_rows<T, kPrefetch>(sum, 0, lists, [=](u32 i) { return own[i] == nullptr ? nullptr : own[i] + column; });
    store(out + (first + at.row) * width + column, from_floats<T>(sum));
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// Writes the readers of every list, with row `none` for a byte that reads no row, and the counts of their first digit.
// The grid is that of radix_sort.cuh's tiles.
template <class Id>
__global__ void __launch_bounds__(kSortThreads, 6)
    ngram_readers_kernel(Text<Id> text, __grid_constant__ const Ngrams ngrams, ShardRows shard, u32 none,
                         Reader* readers, u32* counts) {
  __shared__ DigitCounts digits;
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

// Has sorted readers[lists][bytes] of the rows of `grad`. Each level from 1 on has sums [lists][sums of a list][width].
template <class T>
struct SortedReaders {
  const Reader* readers;
  i64 bytes;
  const T* grad;
  i64 stride, width;
  acc_t<T>* sums;
  int lists, levels;

  __host__ __device__ static i64 sums_of(i64 bytes, int level) { return bytes >> (kChunkBits * level); }
  // Returns the sums of a level for a list.
  __device__ __forceinline__ acc_t<T>* sums_at(int level, int list) const {
    i64 row = list * sums_of(bytes, level);
    for (int below = 1; below < level; ++below) row += lists * sums_of(bytes, below);
    return sums + row * width;
  }
};

// Adds to `sum` entries [begin, end) of a level, in kVec columns: rows of readers for level 0, else sums of the level.
template <int kPrefetch, class T, int kVec>
__device__ __forceinline__ void add_level(acc_t<T> (&sum)[kVec], const SortedReaders<T>& from, int level, int list,
                                          u32 begin, u32 end, int column) {
  using A = acc_t<T>;
  if (level == 0) {
    const Reader* const readers = from.readers + list * from.bytes;
    const T* const grad = from.grad + column;
    return add_rows<T, kPrefetch>(sum, begin, end, [=](u32 i) { return grad + readers[i].byte * from.stride; });
  }
  const A* const sums = from.sums_at(level, list) + column;
  constexpr int kPart = kAccess<A, kVec>;
#pragma unroll
  for (int c = 0; c < kVec; c += kPart) {
    A part[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) part[i] = sum[c + i];
    add_rows<A, kPrefetch>(part, begin, end, [=](u32 i) { return sums + i * from.width + c; });
#pragma unroll
    for (int i = 0; i < kPart; ++i) sum[c + i] = part[i];
  }
}

// Adds to `sum` the run [begin, end) of readers: up the levels as far as whole sums lie in it, then down again.
template <class T, int kVec>
__device__ __forceinline__ void add_run(acc_t<T> (&sum)[kVec], const SortedReaders<T>& from, int list, u32 begin,
                                        u32 end, int column) {
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
    add_level<kRunPrefetch>(sum, from, level, list, low, high, column);
  }
}

// Computes those sums of a level whose readers all read the same row, one per block.
template <class T, int kVec>
__global__ void __launch_bounds__(kEmbedThreads, 7)
    ngram_chunk_sums_kernel(SortedReaders<T> from, int level, u32 none) {
  using A = acc_t<T>;
  const int list = blockIdx.y, shift = kChunkBits * level;
  const Reader* const chunk = from.readers + list * from.bytes + (static_cast<i64>(blockIdx.x) << shift);
  if (chunk[0].row == none || chunk[0].row != chunk[(1 << shift) - 1].row) return;
  A* const to = from.sums_at(level, list) + blockIdx.x * from.width;
  for (RowWalk at(static_cast<int>(from.width / kVec)); at.row < 1; ++at) {
    const int column = at.vec * kVec;
    A sum[kVec] = {};
    add_level<kPrefetch>(sum, from, level - 1, list, blockIdx.x * kChunk, (blockIdx.x + 1) * kChunk, column);
    store_numbers(to + column, sum);
  }
}

// starts[lists][bytes + 1] has the start of each run, totals[lists] the number of runs. A block owns `owned`
// neighbouring runs; a grid may have more blocks than there are runs.
struct Runs {
  const u32* starts;
  const i32* totals;
  int owned;
};

// Writes the sums of the block's runs to row_of(run, row, once); `once` is true for one thread of a run.
template <int kVec, class T, class RowOf>
__device__ __forceinline__ void write_runs(const SortedReaders<T>& from, const Runs& runs, int list,
                                           const RowOf& row_of) {
  __shared__ u32 begins[kMaxOwned + 1], rows[kMaxOwned + 1];
  static_assert(kMaxOwned < kEmbedThreads, "a thread for each run and the one after");
  const i64 first = static_cast<i64>(blockIdx.x) * runs.owned;
  const int here = static_cast<int>(min<i64>(runs.owned, runs.totals[list] - first)), run = threadIdx.x;
  if (here <= 0) return;
  if (run <= here) {
    begins[run] = runs.starts[list * (from.bytes + 1) + first + run];
    if (run < here) rows[run] = from.readers[list * from.bytes + begins[run]].row;
  }
  __syncthreads();
  for (RowWalk at(static_cast<int>(from.width / kVec)); at.row < here; ++at) {
    const int column = at.vec * kVec;
    acc_t<T> sum[kVec] = {};
    add_run(sum, from, list, begins[at.row], begins[at.row + 1], column);
    store(row_of(first + at.row, rows[at.row], at.vec == 0) + column, from_floats<T>(sum));
  }
}

// Writes dense gradients of the lists from `first_list` on, which are zeroed already.
template <class T, int kVec>
__global__ void __launch_bounds__(kEmbedThreads, 10)
    ngram_hash_embed_bwd_kernel(SortedReaders<T> from, Runs runs, int first_list,
                                __grid_constant__ const TableRows<T> grads) {
  const int list = first_list + blockIdx.y;
  T* const to = grads.first[list];
  write_runs<kVec>(from, runs, list, [=](i64, u32 row, bool) { return to + row * from.width; });
}

// Points to the outputs of each list, whose rows are numbered from first_rows on: through all hashed tables if they are
// fused.
template <class T>
struct SparseGrads {
  i64* rows[kMaxTables + 1];
  T* values[kMaxTables + 1];
  i64 first_rows[kMaxTables + 1];
};

// Writes sparse gradients of the lists from `first_list` on.
template <class T, int kVec>
__global__ void __launch_bounds__(kEmbedThreads, 10)
    ngram_hash_embed_sparse_bwd_kernel(SortedReaders<T> from, Runs runs, int first_list,
                                       __grid_constant__ const SparseGrads<T> grads) {
  const int list = first_list + blockIdx.y;
  i64* const rows = grads.rows[list];
  T* const values = grads.values[list];
  const i64 number = grads.first_rows[list];
  write_runs<kVec>(from, runs, list, [=](i64 run, u32 row, bool once) {
    if (once) rows[run] = number + row;
    return values + run * from.width;
  });
}

}  // namespace blt
