// Hashes of the n-grams that end at each byte.
//
//   hash_n(t) = sum over d < n of token[t - d] * prime^(n - 1 - d) mod vocab, in wrapping int64, ids before the document 0
//
// A thread takes a hash from the newest token to the oldest, one multiplication for each, and squares for those before the
// document; tokens come from L1, since the n-grams of neighbours overlap. The remainder takes three multiplications and no division. The kernel below has a thread
// for each byte; those of ngram_hash_embed.cuh hash as a first step of their own.
//
// Bytes of the kernel: tokens read and hashes written once. Roofline: a memory copy, of 8 N bytes for each byte of text.
// Registers: at most 40, for 6 blocks of 256 threads an SM.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr int kMaxFunctions = 11;
inline constexpr int kMaxTables = 128;
inline constexpr int kHashThreads = 256;

// x mod divisor in [0, divisor) for signed x and a positive divisor, by multiplication with a reciprocal of 65 bits whose
// top bit is implied (Granlund and Montgomery, 1994).
struct Modulus {
  u64 divisor, reciprocal, wrap;  // wrap is 2^64 mod divisor, or divisor itself
  int bits;                       // ceil(log2(divisor))

  __device__ __forceinline__ u64 operator()(u64 x) const {
    const u64 high = __umul64hi(reciprocal, x);
    const u64 quotient = bits == 0 ? x : (((x - high) >> 1) + high) >> (bits - 1);
    const u64 remainder = x - quotient * divisor;
    if (static_cast<i64>(x) >= 0) return remainder;
    return remainder >= wrap ? remainder - wrap : remainder + divisor - wrap;  // x means x - 2^64
  }
};

// Packed documents.
template <class Id>
struct Text {
  const Id* tokens;
  const i32* cu_seqlens;  // [documents + 1], or null where every document has `length` bytes
  i64 bytes, documents;
  i32 length;
};

// The hash of each table: functions outer, sizes inner.
struct Ngrams {
  u64 primes[kMaxFunctions];
  i64 sizes[kMaxTables];
  int num_sizes, tables;
  Modulus vocab;
};

// The first byte of the document that byte t is in, from 0 to t whatever the offsets are; -1 if it is in none.
template <class Id>
__device__ __forceinline__ i64 document_start(const Text<Id>& text, i64 t) {
  if (text.cu_seqlens == nullptr) return t - static_cast<i32>(t) % text.length;
  i64 low = 0, high = text.documents;  // the first document that ends behind t is in [low, high]
  while (low < high) {
    const i64 middle = (low + high) / 2;
    if (text.cu_seqlens[middle + 1] > t)
      high = middle;
    else
      low = middle + 1;
  }
  return low == text.documents ? -1 : least(most<i64>(text.cu_seqlens[low], 0), t);
}

// The hash, for a table, of the n-gram that ends at byte t of a document that begins at `start`.
template <class Id>
__device__ __forceinline__ u64 ngram_hash(const Text<Id>& text, const Ngrams& ngrams, int table, i64 t, i64 start) {
  const u64 prime = ngrams.primes[table / ngrams.num_sizes];
  const i64 size = ngrams.sizes[table % ngrams.num_sizes];
  const int known = static_cast<int>(least(size, t - start + 1));
  const Id* const newest = text.tokens + t;
  u64 hash = 0;
#pragma unroll 4
  for (int d = 0; d < known; ++d) hash = hash * prime + static_cast<u64>(static_cast<i64>(newest[-d]));
  u64 base = prime;
  for (i64 left = size - known; left > 0; left >>= 1, base *= base)
    if (left & 1) hash *= base;
  return ngrams.vocab(hash);
}

// hashes[tables][bytes], 0 for bytes of no document.
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
