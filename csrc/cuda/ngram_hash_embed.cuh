// ngram_hash_embed: the embedding of a byte plus one hashed row for each n-gram that ends at it.
//
//   out[t] = byte_table[token[t]] + sum over tables n of table_n[hash_n(t)],  added up in fp32 and rounded once
//   grad_table_n[row] = sum of grad_out[t] over the bytes t with hash_n(t) = row
//
// Forward, one kernel: a block of 128 threads owns kBytes bytes. It hashes them once, a thread for each byte and table, and
// leaves the addresses of all rows in shared memory; then a thread owns 16 bytes of columns of an output row and adds up
// its N + 1 rows, kAhead of them in flight. Bytes: N + 1 rows read and one written for each byte of text.
//
// Backward: each table, and the byte table, has a list of readers (row, byte), sorted by row (radix_sort.cuh), so that a row
// has one owner, which adds up its bytes in their order. Long runs are split: the sums of kChunk neighbouring readers of
// the same row, wherever kChunk divides their place in the list, are ready before the owner starts. It adds what is before
// the first of them, them, and what is behind: always the same order, and no atomics.
// A dense gradient has an owner for each row of the table, who finds its run by bisection; it writes zeros if there is none.
// A sparse gradient has one for each run. Bytes: a row read for each byte and list, each row of the gradient written once;
// beside that, for each byte and list, 8 bytes written and 24 a pass of the sort, and 8 to look at readers at the end.
//
// Roofline: memory; some 30 instructions for 16 bytes. Registers: at most 72, for 7 blocks of 128 threads an SM: with
// 7 loads of 16 bytes in flight each that is 100 KB, more than twice what hides the latency of the memory.
#pragma once

#include "ngram_hash.cuh"
#include "radix_sort.cuh"

namespace blt {

inline constexpr int kEmbedThreads = 128;
inline constexpr int kEmbedBytes = 16;  // of text, for a block
inline constexpr int kAhead = 8;        // rows in flight
inline constexpr int kChunk = 64;       // readers that are added up ahead of their owner
inline constexpr int kMaxOwned = 32;    // rows of a dense gradient, for a block

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
template <class T, int kPack, class RowOf>
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
    add_rows<T>(sum, 0, lists, [=](u32 i) { return own[i] == nullptr ? nullptr : own[i] + column; });
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

// Sorted readers[lists][bytes] of the rows of `grad`, and the sums[lists][bytes / kChunk][width] of their chunks.
template <class T>
struct Readers {
  const Reader* readers;
  i64 bytes;
  const T* grad;
  i64 stride, width;
  acc_t<T>* sums;
};

// sum += the rows that readers [begin, end) of a list send to kPack columns.
template <class T, int kPack>
__device__ __forceinline__ void add_readers(acc_t<T> (&sum)[kPack], const Readers<T>& from, int list, u32 begin,
                                            u32 end, int column) {
  const Reader* const readers = from.readers + list * from.bytes;
  const T* const grad = from.grad + column;
  add_rows<T>(sum, begin, end, [=](u32 i) { return grad + readers[i].byte * from.stride; });
}

// The same for a whole run, whose chunks are ready.
template <class T, int kPack>
__device__ __forceinline__ void add_run(acc_t<T> (&sum)[kPack], const Readers<T>& from, int list, u32 begin, u32 end,
                                        int column) {
  using A = acc_t<T>;
  const u32 chunk = ceil_div<u32>(begin, kChunk), last_chunk = end / kChunk;
  if (chunk >= last_chunk) return add_readers(sum, from, list, begin, end, column);
  add_readers(sum, from, list, begin, chunk * kChunk, column);
  const A* const sums = from.sums + list * (from.bytes / kChunk) * from.width + column;
  constexpr int kPart = kParts<A, kPack>;
#pragma unroll
  for (int c = 0; c < kPack; c += kPart) {
    A part[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) part[i] = sum[c + i];
    add_rows<A>(part, chunk, last_chunk, [=](u32 i) { return sums + i * from.width + c; });
#pragma unroll
    for (int i = 0; i < kPart; ++i) sum[c + i] = part[i];
  }
  add_readers(sum, from, list, last_chunk * kChunk, end, column);
}

// A block for each chunk, which only does something if all of its readers read the same row.
template <class T, int kPack>
__global__ void __launch_bounds__(kEmbedThreads, 7) ngram_chunk_sums_kernel(Readers<T> from, u32 none) {
  using A = acc_t<T>;
  const u32 begin = blockIdx.x * kChunk;
  const Reader* const chunk = from.readers + blockIdx.y * from.bytes + begin;
  if (chunk[0].row == none || chunk[0].row != chunk[kChunk - 1].row) return;
  A* const to = from.sums + (blockIdx.y * (from.bytes / kChunk) + blockIdx.x) * from.width;
  for (RowWalk at(static_cast<int>(from.width / kPack)); at.row < 1; ++at) {
    const int column = at.pack * kPack;
    A sum[kPack] = {};
    add_readers(sum, from, blockIdx.y, begin, begin + kChunk, column);
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

// The place of the first reader of this row or a later one.
__device__ __forceinline__ u32 first_reader(const Reader* readers, u32 count, u32 row) {
  u32 low = 0, high = count;
  while (low < high) {
    const u32 middle = (low + high) / 2;
    if (readers[middle].row >= row)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Dense gradients of `rows` rows each, of the lists from `first_list`. A block owns `owned` neighbouring rows.
template <class T, int kPack>
__global__ void __launch_bounds__(kEmbedThreads, 7)
    ngram_hash_embed_bwd_kernel(Readers<T> from, int first_list, i64 rows, int owned,
                                __grid_constant__ const TableRows<T> grads) {
  __shared__ u32 begins[kMaxOwned + 1];
  const int list = first_list + blockIdx.y;
  const i64 first = static_cast<i64>(blockIdx.x) * owned;
  const int here = static_cast<int>(least<i64>(owned, rows - first));
  static_assert(kMaxOwned < kEmbedThreads, "a thread looks for each row and the one behind");
  if (static_cast<int>(threadIdx.x) <= here)
    begins[threadIdx.x] = first_reader(from.readers + list * from.bytes, static_cast<u32>(from.bytes),
                                       static_cast<u32>(first) + threadIdx.x);
  __syncthreads();
  T* const to = grads.first[list] + first * from.width;
  for (RowWalk at(static_cast<int>(from.width / kPack)); at.row < here; ++at) {
    const int column = at.pack * kPack;
    acc_t<T> sum[kPack] = {};
    add_run(sum, from, list, begins[at.row], begins[at.row + 1], column);
    store_sum<T>(to + at.row * from.width + column, sum);
  }
}

// Where the runs of each list go, `counts` of them. Rows of a fused tensor are numbered through all hashed tables.
template <class T>
struct SparseGrads {
  i64* rows[kMaxTables + 1];
  T* values[kMaxTables + 1];
  i32 counts[kMaxTables + 1];
  int tables;
  i64 numbers;  // that a table takes: 0 where each has its own tensor
};

// Sparse gradients of all lists, from starts[lists][bytes + 1]. A block owns `owned` neighbouring runs.
template <class T, int kPack>
__global__ void __launch_bounds__(kEmbedThreads, 7)
    ngram_hash_embed_sparse_bwd_kernel(Readers<T> from, const u32* starts, int owned,
                                       __grid_constant__ const SparseGrads<T> grads) {
  const int list = blockIdx.y;
  const i64 first = static_cast<i64>(blockIdx.x) * owned;
  const int here = static_cast<int>(least<i64>(owned, grads.counts[list] - first));
  const u32* const begins = starts + list * (from.bytes + 1) + first;
  const i64 number = list < grads.tables ? list * grads.numbers : 0;
  for (RowWalk at(static_cast<int>(from.width / kPack)); at.row < here; ++at) {
    const int column = at.pack * kPack;
    const u32 begin = begins[at.row];
    if (at.pack == 0) grads.rows[list][first + at.row] = number + from.readers[list * from.bytes + begin].row;
    acc_t<T> sum[kPack] = {};
    add_run(sum, from, list, begin, begins[at.row + 1], column);
    store_sum<T>(grads.values[list] + (first + at.row) * from.width + column, sum);
  }
}

}  // namespace blt
