// Hashes the n-grams that end at each byte.
//
//   hash_n(t) = sum over d < n of token[t - d] * prime^(n - 1 - d) mod vocab, in wrapping int64
//
// where the bytes before the document have id 0.
//
// A thread computes a hash from the newest token to the oldest, with one multiplication per token, and by squaring for
// the ids before the document. Tokens come from L1, since n-grams of neighbours overlap. The remainder takes three
// multiplications and no division if all tables have equal sizes, else a division of some 70 instructions: reciprocals
// of 128 tables do not fit beside the rest into 4 KB of parameters. The kernel below has a thread per byte; those of
// ngram_hash_embed.cuh hash in a first step of their own.
//
// Bytes of the kernel: tokens read and hashes written once. Roofline: a memory copy of 8 N bytes per byte of text.
// Registers: at most 40, for 6 blocks of 256 threads an SM.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr int kMaxFunctions = 11;
inline constexpr int kMaxTables = 128;
inline constexpr int kHashThreads = 256;

// Returns x mod divisor in [0, divisor) for signed x. reciprocal_of in common/args/ngram_hash_embed.h computes the
// constants.
struct Modulus {
  u64 divisor, reciprocal, wrap;
  int bits;

  __device__ __forceinline__ u64 operator()(u64 x) const {
    const u64 high = __umul64hi(reciprocal, x);
    const u64 quotient = bits == 0 ? x : (((x - high) >> 1) + high) >> (bits - 1);
    const u64 remainder = x - quotient * divisor;
    if (static_cast<i64>(x) >= 0) return remainder;
    return remainder >= wrap ? remainder - wrap : remainder + divisor - wrap;  // x stands for x - 2^64
  }
};

// Points to packed documents.
template <class Id>
struct Text {
  const Id* tokens;
  const i32* cu_seqlens;  // [documents + 1], or null where every document has `length` bytes
  i64 bytes, documents;
  i32 length;
};

// Describes the hash of each table. Tables of equal sizes have a Modulus, and no `rows`.
struct Ngrams {
  u64 primes[kMaxFunctions];
  i64 sizes[kMaxTables];
  u32 rows[kMaxTables];
  u8 functions[kMaxTables];
  int tables, equal;
  Modulus vocab;
};

// Returns the first byte of the document of byte t, or -1 if t is in no document. It lies in [0, t] for any offsets.
template <class Id>
__device__ __forceinline__ i64 document_start(const Text<Id>& text, i64 t) {
  if (text.cu_seqlens == nullptr) return t - static_cast<i32>(t) % text.length;
  const i64 document = partition_point<i64>(0, text.documents, [&](i64 b) { return text.cu_seqlens[b + 1] <= t; });
  return document == text.documents ? -1 : min(max<i64>(text.cu_seqlens[document], 0), t);
}

// Returns the hash, for a table, of the n-gram that ends at byte t of a document that begins at `start`.
template <class Id>
__device__ __forceinline__ u64 ngram_hash(const Text<Id>& text, const Ngrams& ngrams, int table, i64 t, i64 start) {
  const u64 prime = ngrams.primes[ngrams.functions[table]];
  const i64 size = ngrams.sizes[table];
  const int known = static_cast<int>(min(size, t - start + 1));
  const Id* const newest = text.tokens + t;
  u64 hash = 0;
#pragma unroll 4
  for (int d = 0; d < known; ++d) hash = hash * prime + static_cast<u64>(static_cast<i64>(newest[-d]));
  u64 base = prime;
  for (i64 left = size - known; left > 0; left >>= 1, base *= base)
    if (left & 1) hash *= base;
  if (ngrams.equal) return ngrams.vocab(hash);
  const i64 rows = ngrams.rows[table], remainder = static_cast<i64>(hash) % rows;
  return remainder < 0 ? remainder + rows : remainder;
}

// Writes hashes[tables][bytes], 0 for bytes of no document.
template <class Id>
__global__ void __launch_bounds__(kHashThreads, 6)
    ngram_hash_fwd_kernel(Text<Id> text, __grid_constant__ const Ngrams ngrams, i64* hashes) {
  const i64 t = static_cast<i64>(blockIdx.x) * kHashThreads + threadIdx.x;
  if (t >= text.bytes) return;
  const i64 start = document_start(text, t);
  for (int n = 0; n < ngrams.tables; ++n)
    hashes[n * text.bytes + t] = start < 0 ? 0 : static_cast<i64>(ngram_hash(text, ngrams, n, t, start));
}

}  // namespace blt
