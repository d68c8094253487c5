// Hashes the n-grams that end at each byte.
//
//   hash_n(t) = sum over d < n of token[t - d] * prime^(n - 1 - d) mod vocab, in wrapping int64
//
// where the bytes before the document have id 0.
//
// The hash of an n-gram is the hash of the next shorter one times the prime, plus the oldest byte. So a byte takes as
// many steps as its longest n-gram has bytes in the document, for any number of sizes, and no window is stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/args/ngram_hash_embed.h"
#include "support/check_values.h"
#include "support/documents.h"

namespace blt {

// Returns x mod divisor in [0, divisor) for signed x: the quotient is the high half of the product with the reciprocal.
struct Modulus : Reciprocal {
  uint64_t operator()(uint64_t x) const {
    const uint64_t high = static_cast<uint64_t>((static_cast<unsigned __int128>(reciprocal) * x) >> 64);
    const uint64_t quotient = bits == 0 ? x : (((x - high) >> 1) + high) >> (bits - 1);
    const uint64_t remainder = x - quotient * divisor;
    if (static_cast<int64_t>(x) >= 0) return remainder;
    return remainder >= wrap ? remainder - wrap : remainder + divisor - wrap;  // x stands for x - 2^64
  }
};

// Describes the hash of each table, functions outermost, and the documents that bound the n-grams.
struct Ngrams {
  std::vector<uint64_t> primes;
  std::vector<int64_t> sizes;
  Modulus vocab;
  const int32_t* cu_seqlens;
  int64_t documents;
  Tensor offsets;  // owns cu_seqlens

  int64_t tables() const { return static_cast<int64_t>(primes.size() * sizes.size()); }
  int64_t end_of_documents() const { return cu_seqlens[documents]; }
  Ngrams only(int64_t table) const {
    const int64_t count = static_cast<int64_t>(sizes.size());
    return {{primes[table / count]}, {sizes[table % count]}, vocab, cu_seqlens, documents, offsets};
  }
};

inline Ngrams ngrams_of(const HashArguments& arguments) {
  Tensor offsets = document_offsets(arguments.cu_seqlens, arguments.documents, arguments.tokens, arguments.bytes());
  const int32_t* const values = check_offsets(offsets, "cu_seqlens", arguments.bytes());
  return {{kPrimes.begin(), kPrimes.begin() + arguments.num_functions},
          arguments.sizes,
          {reciprocal_of(arguments.vocab)},
          values,
          arguments.documents,
          offsets};
}

// Returns base^exponent in wrapping arithmetic.
inline uint64_t power(uint64_t base, int64_t exponent) {
  uint64_t result = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2 == 1) result *= base;
  return result;
}

// Calls f(t, one hash per table) for the bytes of [begin, end) that are in a document.
template <class Id, class F>
void for_each_hash(const Ngrams& ngrams, const Id* tokens, int64_t begin, int64_t end, const F& f) {
  const int64_t longest = *std::max_element(ngrams.sizes.begin(), ngrams.sizes.end());
  end = std::min(end, ngrams.end_of_documents());
  std::vector<uint64_t> by_size(std::min(longest, ngrams.end_of_documents()) + 1), hashes(ngrams.tables());
  const int32_t* const first = ngrams.cu_seqlens + 1;
  int64_t document = std::upper_bound(first, first + ngrams.documents, begin) - first;
  for (int64_t t = begin; t < end; ++t) {
    while (ngrams.cu_seqlens[document + 1] <= t) ++document;
    const int64_t known = std::min<int64_t>(longest, t + 1 - ngrams.cu_seqlens[document]);
    uint64_t* out = hashes.data();
    for (const uint64_t prime : ngrams.primes) {
      uint64_t hash = 0;
      for (int64_t n = 0; n < known; ++n)
        by_size[n + 1] = hash = hash * prime + static_cast<uint64_t>(int64_t{tokens[t - n]});
      for (const int64_t size : ngrams.sizes)
        *out++ = ngrams.vocab(size <= known ? by_size[size] : hash * power(prime, size - known));
    }
    f(t, static_cast<const uint64_t*>(hashes.data()));
  }
}

}  // namespace blt
