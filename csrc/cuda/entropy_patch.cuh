// Defines the rules that divide a text into patches; patch_layout.cuh evaluates them.
//
//   rule(t, i, last) -> bool: does the byte after byte t, which is byte i of its document, start a patch?
//
// A layout from logits takes two launches: entropy_patch_fwd_kernel, then patch_layout_kernel with an EntropyRule.
// Bytes: the logits, their entropies (8 written and 4 read per row) and the layout. If the first kernel stored its
// decisions as bits, that would save 4 of the 560 bytes of a row and cost a barrier.
// The other schemes also take two launches, prepare_layout_kernel and patch_layout_kernel. topk_patch, for analysis
// only, decides in a launch of its own: one block per document passes over it 34 times.
#pragma once

#include "patch_layout.cuh"
#include "token_entropy.cuh"

namespace blt {

enum class EntropyMode : int { kGlobal, kMonotonic, kBoth };

// Entropies, their differences and thresholds are rounded to this dtype before they are compared.
enum class Rounding : int { kFp32, kBf16, kFp16, kFp64 };

// No decision depends on entropy[0] of a document.
template <class T>
struct EntropyRule {
  const T* entropy;
  acc_t<T> threshold, threshold_add;
  EntropyMode mode;
  Rounding rounding;

  __device__ __forceinline__ acc_t<T> rounded(acc_t<T> x) const {
    if (rounding == Rounding::kFp64) return x;
    const float y = static_cast<float>(x);
    if (rounding == Rounding::kBf16) return to_float(from_float<bf16>(y));
    if (rounding == Rounding::kFp16) return to_float(from_float<fp16>(y));
    return y;
  }
  __device__ __forceinline__ acc_t<T> at(i32 t) const { return rounded(to_float(entropy[t])); }
  __device__ __forceinline__ bool operator()(i32 t, i32 i, bool) const {
    if (i <= 0) return true;
    const acc_t<T> h = at(t);
    if (mode == EntropyMode::kGlobal) return h > threshold;
    if (i == 1) return true;
    const acc_t<T> rise = rounded(h - at(t - 1));
    if (mode == EntropyMode::kMonotonic) return rise > threshold;
    return i > 2 && rise > threshold_add && h > threshold;
  }
};

// Computes the entropies of the rows of all documents, and prepares the layout kernel.
template <class T>
__global__ void __launch_bounds__(kEntropyThreads, entropy_blocks(sizeof(T)))
    entropy_patch_fwd_kernel(LogitRows<T> logits, Documents documents, LayoutScratch scratch, acc_t<T>* entropy,
                             acc_t<T>* log_sum) {
  entropy_of_rows<T>(logits, documents.end(), entropy, log_sum);
  prepare_layout<kEntropyThreads>(documents, scratch);
}

// ASCII letters, digits and UTF-8 continuation bytes continue a patch; all other bytes are space-like. Ids are byte +
// 4; ids below 4 are special.
template <class T>
struct SpaceRule {
  const T* tokens;

  __device__ __forceinline__ static bool space_like(T token) {
    const T byte = token - 4;
    const bool digit = byte >= '0' && byte <= '9', upper = byte >= 'A' && byte <= 'Z',
               lower = byte >= 'a' && byte <= 'z';
    return !(digit || upper || lower || (byte >= 0x80 && byte < 0xc0));
  }
  __device__ __forceinline__ bool operator()(i32 t, i32 i, bool) const {
    return i <= 0 || tokens[t] < 4 || (space_like(tokens[t]) && !space_like(tokens[t - 1]));
  }
};

struct StaticRule {
  i32 size, first;
  __device__ __forceinline__ bool operator()(i32, i32 i, bool) const {
    const i32 after = i + 1;
    return after >= first && static_cast<u32>(after - first) % static_cast<u32>(size) == 0;
  }
};

template <class T>
struct DelimiterRule {
  const T* tokens;
  i64 id;
  __device__ __forceinline__ bool operator()(i32 t, i32 i, bool) const { return i <= 0 || tokens[t] == id; }
};

// Repeats the decisions of an earlier kernel.
struct GivenRule {
  const u8* boundaries;
  __device__ __forceinline__ bool operator()(i32 t, i32 i, bool) const { return i <= 0 || boundaries[t] != 0; }
};

// --- topk_patch ------------------------------------------------------------------------------------------------------

inline constexpr int kTopkThreads = 256;

// Maps numbers to integers of the same order, with NaN above all numbers and 0 equal to -0.
__device__ __forceinline__ u32 rank_of(float x) {
  if (x != x) return 0xffffffffu;
  const u32 bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Sets boundaries[t] to 1 for the `size / patch_size - 2` bytes of highest entropy of each document, without its first
// byte, and else to 0. The earlier of equal entropies wins. The lowest rank that wins is found bit by bit.
template <class T>
__global__ void __launch_bounds__(kTopkThreads)
    topk_patch_fwd_kernel(const T* entropy, Documents documents, i32 patch_size, u8* boundaries) {
  const i32 end = max(0, min(documents.at(blockIdx.x + i64{1}), documents.bytes));
  const i32 begin = max(0, min(documents.at(blockIdx.x), end));
  const i32 wanted = (end - begin) / patch_size - 2;
  const auto rank = [=](i32 t) { return rank_of(static_cast<float>(to_float(entropy[t]))); };
  const auto count_from = [&](u32 bound) {
    i32 own = 0;
    for (i32 t = begin + 1 + static_cast<i32>(threadIdx.x); t < end; t += kTopkThreads) own += rank(t) >= bound;
    return block_sums<kTopkThreads>(own).total;
  };
  u32 last = 0;
  if (wanted > 0)
    for (int bit = 31; bit >= 0; --bit)
      if (count_from(last | 1u << bit) >= wanted) last |= 1u << bit;
  i32 equals = wanted <= 0           ? 0
               : last == 0xffffffffu ? wanted
                                     : wanted - count_from(last + 1);  // counts winners of rank `last`
  for (i32 from = begin; from < end; from += kTopkThreads) {
    const i32 t = from + static_cast<i32>(threadIdx.x);
    const u32 own = t > begin && t < end ? rank(t) : 0;
    const bool counts = t > begin && t < end && wanted > 0;
    const auto [before, total] = block_sums<kTopkThreads>(static_cast<i32>(counts && own == last));
    if (t < end) boundaries[t] = counts && (own > last || (own == last && before < equals));
    equals -= total;
  }
}

}  // namespace blt
