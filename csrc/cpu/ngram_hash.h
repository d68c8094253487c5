// Hashes of the n-grams that end at each byte.
//
//   hash_n(t) = sum over d < n of token[t - d] * prime^(n - 1 - d) mod vocab, in wrapping int64, ids before the document 0
//
// The hash of an n-gram is that of the next shorter one times the prime, plus the oldest byte: so a byte takes as many
// steps as its longest n-gram has bytes in the document, whatever the number of sizes, and no window is ever stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/check.h"
#include "../common/hash_primes.h"
#include "support/documents.h"

namespace blt {

// x mod divisor in [0, divisor) for signed x and a positive divisor, by two multiplications. The quotient comes from the
// high half of the product with a reciprocal of 65 bits whose top bit is implied (Granlund and Montgomery, 1994).
class Modulus {
 public:
  explicit Modulus(int64_t divisor) : divisor_(static_cast<uint64_t>(divisor)) {
    STD_TORCH_CHECK(divisor >= 1, "vocab: expected a value >= 1, got ", divisor);
    while ((uint64_t{1} << bits_) < divisor_) ++bits_;  // ceil(log2(divisor))
    const unsigned __int128 numerator = (static_cast<unsigned __int128>((uint64_t{1} << bits_) - divisor_)) << 64;
    reciprocal_ = static_cast<uint64_t>(numerator / divisor_ + 1);
    wrap_ = unsigned_remainder(~uint64_t{0}) + 1;  // 2^64 mod divisor, or divisor itself
  }

  uint64_t operator()(uint64_t x) const {
    const uint64_t remainder = unsigned_remainder(x);
    if (static_cast<int64_t>(x) >= 0) return remainder;
    return remainder >= wrap_ ? remainder - wrap_ : remainder + divisor_ - wrap_;  // x means x - 2^64
  }

 private:
  uint64_t unsigned_remainder(uint64_t x) const {
    const uint64_t high = static_cast<uint64_t>((static_cast<unsigned __int128>(reciprocal_) * x) >> 64);
    const uint64_t quotient = bits_ == 0 ? x : (((x - high) >> 1) + high) >> (bits_ - 1);
    return x - quotient * divisor_;
  }

  uint64_t divisor_, reciprocal_, wrap_;
  int bits_ = 0;
};

// The tables that n-grams are looked up in, function outer and size inner, and the documents that no n-gram leaves.
struct Ngrams {
  std::vector<uint64_t> primes;
  std::vector<int64_t> sizes;
  Modulus vocab;
  const int32_t* cu_seqlens;
  int64_t documents;
  Tensor offsets;  // owns cu_seqlens

  int64_t tables() const { return static_cast<int64_t>(primes.size() * sizes.size()); }
  int64_t end() const { return cu_seqlens[documents]; }  // of the last document
  Ngrams only(int64_t table) const {
    const int64_t count = static_cast<int64_t>(sizes.size());
    return {{primes[table / count]}, {sizes[table % count]}, vocab, cu_seqlens, documents, offsets};
  }
};

inline Ngrams check_ngrams(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                           const std::vector<int64_t>& sizes, int64_t num_functions, int64_t vocab) {
  check_dim(tokens, "tokens", 1);
  Tensor offsets = document_offsets(cu_seqlens, num_documents, tokens, tokens.size(0));
  const int32_t* const values = check_offsets(offsets, "cu_seqlens", tokens.size(0));
  STD_TORCH_CHECK(!sizes.empty(), "ngram_sizes: expected at least one");
  for (const int64_t size : sizes) STD_TORCH_CHECK(size >= 1, "ngram_sizes: expected values >= 1, got ", size);
  STD_TORCH_CHECK(num_functions >= 1 && num_functions <= static_cast<int64_t>(kPrimes.size()),
                  "num_functions: expected 1 to ", kPrimes.size(), ", got ", num_functions);
  return {
      {kPrimes.begin(), kPrimes.begin() + num_functions}, sizes, Modulus(vocab), values, offsets.size(0) - 1, offsets};
}

// base^exponent in wrapping arithmetic.
inline uint64_t power(uint64_t base, int64_t exponent) {
  uint64_t result = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2 == 1) result *= base;
  return result;
}

// Calls f(t, hashes), with a hash for each table, for the bytes of [begin, end) that are in a document.
template <class Id, class F>
void for_each_hash(const Ngrams& ngrams, const Id* tokens, int64_t begin, int64_t end, const F& f) {
  const int64_t longest = *std::max_element(ngrams.sizes.begin(), ngrams.sizes.end());
  end = std::min(end, ngrams.end());
  std::vector<uint64_t> by_size(std::min(longest, ngrams.end()) + 1), hashes(ngrams.tables());
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
