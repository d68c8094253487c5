// Hashes the n-grams that end at each byte.
//
//   hash_n(t) = sum over d < n of token[t - d] * prime^(n - 1 - d) mod vocab, in wrapping int64
//
// where the bytes before the document have id 0.
//
// The hash of an n-gram is the hash of the next shorter one times the prime, plus the oldest byte. So a byte takes as
// many steps per hash function as its longest n-gram has bytes in the document, for any number of sizes, and no window
// is stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
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

struct HashedTable {
  int64_t index, size;  // is table `index`, of n-grams of `size` bytes
  uint64_t prime;
  Modulus vocab;
};

// Describes the hash of each table, those of a function side by side, and the documents that bound the n-grams.
struct Ngrams {
  std::vector<HashedTable> tables;
  bool equal;  // says whether all tables have as many rows
  const int32_t* cu_seqlens;
  int64_t documents;
  Tensor offsets;  // owns cu_seqlens

  int64_t end_of_documents() const { return cu_seqlens[documents]; }
  Ngrams only(int64_t index) const {
    HashedTable table = *std::ranges::find(tables, index, &HashedTable::index);
    table.index = 0;
    return {{table}, true, cu_seqlens, documents, offsets};
  }
};

inline Ngrams ngrams_of(const HashArguments& arguments) {
  Tensor offsets = document_offsets(arguments.cu_seqlens, arguments.documents, arguments.tokens, arguments.bytes());
  const int32_t* const values = check_offsets(offsets, "cu_seqlens", arguments.bytes());
  std::vector<HashedTable> tables;
  tables.reserve(arguments.tables());
  bool equal = true;
  for (size_t function = 0; function < kPrimes.size(); ++function) {
    for (int64_t n = 0; n < arguments.tables(); ++n) {
      if (arguments.functions[n] != static_cast<int64_t>(function)) continue;
      const int64_t vocab = arguments.vocab[n];
      const bool same = !tables.empty() && tables.back().vocab.divisor == static_cast<uint64_t>(vocab);
      const Modulus modulus = same ? tables.back().vocab : Modulus{reciprocal_of(vocab)};
      equal = equal && (same || tables.empty());
      tables.push_back({n, arguments.sizes[n], kPrimes[function], modulus});
    }
  }
  return {std::move(tables), equal, values, arguments.documents, offsets};
}

// Returns base^exponent in wrapping arithmetic.
inline uint64_t power(uint64_t base, int64_t exponent) {
  uint64_t result = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2 == 1) result *= base;
  return result;
}

// Calls f(t, one hash per table) for the bytes of [begin, end) that are in a document. modulus_of(table) has its vocab.
template <class Id, class ModulusOf, class F>
void for_each_hash(const Ngrams& ngrams, const ModulusOf& modulus_of, const Id* tokens, int64_t begin, int64_t end,
                   const F& f) {
  const int64_t longest = std::ranges::max(ngrams.tables, {}, &HashedTable::size).size;
  end = std::min(end, ngrams.end_of_documents());
  std::vector<uint64_t> by_size(std::min(longest, ngrams.end_of_documents()) + 1), hashes(ngrams.tables.size());
  const int32_t* const first = ngrams.cu_seqlens + 1;
  int64_t document = std::upper_bound(first, first + ngrams.documents, begin) - first;
  for (int64_t t = begin; t < end; ++t) {
    while (ngrams.cu_seqlens[document + 1] <= t) ++document;
    const int64_t known = std::min<int64_t>(longest, t + 1 - ngrams.cu_seqlens[document]);
    uint64_t prime = 0, hash = 0;
    for (const HashedTable& table : ngrams.tables) {
      if (table.prime != prime) {
        prime = table.prime, hash = 0;
        for (int64_t n = 0; n < known; ++n)
          by_size[n + 1] = hash = hash * prime + static_cast<uint64_t>(int64_t{tokens[t - n]});
      }
      const uint64_t own = table.size <= known ? by_size[table.size] : hash * power(prime, table.size - known);
      hashes[table.index] = modulus_of(table)(own);
    }
    f(t, static_cast<const uint64_t*>(hashes.data()));
  }
}

// Equal tables have one Modulus, whose constants stay in registers.
template <class Id, class F>
void for_each_hash(const Ngrams& ngrams, const Id* tokens, int64_t begin, int64_t end, const F& f) {
  if (!ngrams.equal) return for_each_hash(ngrams, [](const HashedTable& t) { return t.vocab; }, tokens, begin, end, f);
  for_each_hash(ngrams, [vocab = ngrams.tables[0].vocab](const auto&) { return vocab; }, tokens, begin, end, f);
}

}  // namespace blt
