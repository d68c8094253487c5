// Computes entropies of next-byte logits, boundary decisions, and the ragged layout that they give.
//
// token_entropy.cpp computes the entropies, which are 1/260 of the data. One pass over them, whose loops the compiler
// vectorises, decides after which bytes a patch starts; a second one builds the layout.
// Bytes moved for [T, 260] fp32 logits: 1040 read, 8 written a row for entropy and log_sum, 1 for decisions, 8 for the
// layout and 8 a patch; nothing else is allocated.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "../common/args/token_entropy.h"
#include "../common/box.h"
#include "../common/dispatch.h"
#include "patch_layout.h"
#include "token_entropy.h"

namespace blt {
namespace {

template <class A>
inline constexpr ScalarType scalar_type_of = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// --- patching rules -------------------------------------------------------------------------------------------------

// Returns entropies rounded to R, as numbers of its accumulator.
template <class R>
Tensor rounded_entropies(const Tensor& entropy) {
  using A = accumulator_t<R>;
  const Tensor values = check_values(entropy, "entropy");
  if (std::is_same_v<R, A> && values.scalar_type() == scalar_type_of<A>) return values;
  Tensor rounded = new_output(values, {values.size(0)}, scalar_type_of<A>);
  dispatch_float(values.scalar_type(), "entropy", [&]<class T>(Tag<T>) {
    const T* const from = values.const_data_ptr<T>();
    std::transform(from, from + values.size(0), rounded.mutable_data_ptr<A>(), [](T h) { return round_to<R>(h); });
  });
  return rounded;
}

// Compares entropies in `dtype`: they, their differences and the thresholds are rounded to it.
LayoutTensors layout_of_entropies(const Tensor& entropy, ScalarType dtype, const std::optional<Tensor>& cu_seqlens,
                                  int64_t num_documents, double threshold, std::optional<double> threshold_add,
                                  bool monotonic, std::optional<int64_t> max_patch_length,
                                  std::optional<int64_t> max_patches) {
  check_max_patch_length(max_patch_length);
  return dispatch_float(dtype, "entropy", [&]<class R>(Tag<R>) {
    using A = accumulator_t<R>;
    const Tensor values = rounded_entropies<R>(entropy);
    const TextDocuments text(cu_seqlens, num_documents, values, values.size(0));
    const A* const h = values.const_data_ptr<A>();
    const A above = round_to<R>(threshold), add = round_to<R>(threshold_add.value_or(0));
    const auto rise = [=](int64_t t) { return round_to<R>(h[t] - h[t - 1]); };
    const Tensor decisions =
        decisions_of(text, values.size(0), [&](int64_t, int64_t begin, int64_t end, bool* starts_after) {
          const int64_t forced = monotonic || threshold_add ? 2 : 1;
          int64_t t = begin;
          for (; t < std::min(begin + forced, end); ++t) starts_after[t] = true;
          if (monotonic) {
            for (; t < end; ++t) starts_after[t] = rise(t) > above;
          } else if (threshold_add) {
            for (; t < std::min(begin + 3, end); ++t) starts_after[t] = false;
            for (; t < end; ++t) starts_after[t] = (rise(t) > add) & (h[t] > above);
          } else {
            for (; t < end; ++t) starts_after[t] = h[t] > above;
          }
        });
    const bool* const starts_after = decisions.const_data_ptr<bool>();
    if (!max_patch_length)
      return build_layout(text, values.size(0), max_patches, [=](int64_t t, int64_t) { return starts_after[t]; });
    // A boundary at the length limit restarts the count, as one of the rule does.
    return build_layout(text, values.size(0), max_patches,
                        [=, limit = *max_patch_length, length = int64_t{0}](int64_t t, int64_t i) mutable {
                          length = i == 0 ? 1 : length + 1;
                          const bool starts = starts_after[t] | (length == limit);
                          length = starts ? 0 : length;
                          return starts;
                        });
  });
}

LayoutTensors patch_starts_fwd_cpu(const Tensor& entropy, const std::optional<Tensor>& cu_seqlens,
                                   int64_t num_documents, double threshold, std::optional<double> threshold_add,
                                   bool monotonic, std::optional<int64_t> max_patch_length, std::string compare,
                                   std::optional<int64_t> max_patches) {
  return layout_of_entropies(entropy, check_compare(compare, entropy), cu_seqlens, num_documents, threshold,
                             threshold_add, monotonic, max_patch_length, max_patches);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> entropy_patch_fwd_cpu(
    const Tensor& logits, const std::optional<Tensor>& cu_seqlens, int64_t num_documents, double threshold,
    std::optional<double> threshold_add, bool monotonic, std::optional<int64_t> max_patch_length, std::string compare,
    std::optional<int64_t> max_patches) {
  const ScalarType dtype = check_compare(compare, logits);
  const Tensor rows = check_logits(logits);
  int64_t count = rows.size(0);
  if (cu_seqlens) {
    Tensor offsets = *cu_seqlens;
    count = check_offsets(offsets, "cu_seqlens", rows.size(0))[offsets.size(0) - 1];
  }
  auto scores = entropies_of_rows(rows, count);
  auto layout = layout_of_entropies(std::get<0>(scores), dtype, cu_seqlens, num_documents, threshold, threshold_add,
                                    monotonic, max_patch_length, max_patches);
  return std::tuple_cat(std::move(scores), std::move(layout));
}

// ASCII letters, digits and UTF-8 continuation bytes continue a patch; all other bytes are space-like.
constexpr std::array<bool, 256> kSpaceLike = [] {
  std::array<bool, 256> table{};
  for (int byte = 0; byte < 256; ++byte) {
    const bool digit = '0' <= byte && byte <= '9';
    const bool letter = ('A' <= byte && byte <= 'Z') || ('a' <= byte && byte <= 'z');
    const bool continuation = 0x80 <= byte && byte < 0xC0;
    table[byte] = !digit && !letter && !continuation;
  }
  return table;
}();

// boundary(id, t, i) decides about byte t, which is byte i of its document, from the ids of all bytes.
template <class Boundary>
LayoutTensors layout_of_tokens(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                               std::optional<int64_t> max_patches, Boundary boundary) {
  const Tensor ids = check_values(tokens, "tokens");
  const TextDocuments text(cu_seqlens, num_documents, ids, ids.size(0));
  return dispatch_int(ids.scalar_type(), "tokens", [&]<class T>(Tag<T>) {
    const T* const id = ids.const_data_ptr<T>();
    return build_layout(text, ids.size(0), max_patches, [=](int64_t t, int64_t i) { return boundary(id, t, i); });
  });
}

LayoutTensors space_patch_fwd_cpu(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                  std::optional<int64_t> max_patches) {
  const auto space_like = [](int64_t id) { return id < 4 || id >= 260 || kSpaceLike[id - 4]; };
  return layout_of_tokens(tokens, cu_seqlens, num_documents, max_patches, [=](const auto* id, int64_t t, int64_t i) {
    return i == 0 || id[t] < 4 || (space_like(id[t]) && !space_like(id[t - 1]));
  });
}

LayoutTensors delimiter_patch_fwd_cpu(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens,
                                      int64_t num_documents, int64_t id, std::optional<int64_t> max_patches) {
  return layout_of_tokens(tokens, cu_seqlens, num_documents, max_patches,
                          [=](const auto* ids, int64_t t, int64_t i) { return i == 0 || ids[t] == id; });
}

LayoutTensors static_patch_fwd_cpu(const Tensor& cu_seqlens, int64_t num_bytes, int64_t size, int64_t first,
                                   std::optional<int64_t> max_patches) {
  check_static_patch(num_bytes, size, first);
  return build_layout(cu_seqlens, num_bytes, max_patches, [=, left = first](int64_t, int64_t i) mutable {
    left = i == 0 ? first - 1 : left - 1;
    if (left > 0) return false;
    left = size;
    return true;
  });
}

// Boundaries follow the S // patch_size - 2 highest entropies of a document after the first; the earlier of equal ones
// wins, and NaN ranks above all numbers.
LayoutTensors topk_patch_fwd_cpu(const Tensor& entropy, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                 int64_t patch_size, std::optional<int64_t> max_patches) {
  check_patch_size(patch_size);
  const Tensor values = rounded_entropies<float>(entropy);
  const TextDocuments text(cu_seqlens, num_documents, values, values.size(0));
  Tensor offsets = text.cu_seqlens;
  const int32_t* const documents = check_offsets(offsets, "cu_seqlens", values.size(0));
  std::vector<bool> chosen(values.size(0), false);
  const float* const h = values.const_data_ptr<float>();
  const auto key = [=](int32_t t) { return std::isnan(h[t]) ? std::pair(1, 0.0f) : std::pair(0, h[t]); };
  const auto before = [=](int32_t t, int32_t u) { return key(t) != key(u) ? key(t) > key(u) : t < u; };
  std::vector<int32_t> order;
  for (int64_t b = 0; b + 1 < offsets.size(0); ++b) {
    const int32_t size = documents[b + 1] - documents[b];
    const int64_t count = std::min<int64_t>(size / patch_size - 2, size - 1);
    if (count <= 0) continue;
    order.resize(size - 1);
    std::iota(order.begin(), order.end(), documents[b] + 1);
    if (count < size - 1) std::nth_element(order.begin(), order.begin() + count, order.end(), before);
    for (int64_t k = 0; k < count; ++k) chosen[order[k]] = true;
  }
  return build_layout(text, values.size(0), max_patches, [&](int64_t t, int64_t i) { return i == 0 || chosen[t]; });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("entropy_patch_fwd", BLT_KERNELS_BOX(&entropy_patch_fwd_cpu));
  m.impl("patch_starts_fwd", BLT_KERNELS_BOX(&patch_starts_fwd_cpu));
  m.impl("space_patch_fwd", BLT_KERNELS_BOX(&space_patch_fwd_cpu));
  m.impl("static_patch_fwd", BLT_KERNELS_BOX(&static_patch_fwd_cpu));
  m.impl("delimiter_patch_fwd", BLT_KERNELS_BOX(&delimiter_patch_fwd_cpu));
  m.impl("topk_patch_fwd", BLT_KERNELS_BOX(&topk_patch_fwd_cpu));
}

}  // namespace blt
