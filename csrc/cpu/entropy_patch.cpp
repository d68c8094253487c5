// Computes entropies of next-byte logits, boundary decisions, and the ragged layout that they give.
//
// token_entropy.cpp computes the entropies; one pass over them, which are 1/260 of the data, then cuts the text into
// patches. Bytes moved for [T, 260] fp32 logits: 1040 read, 8 written a row for entropy and log_sum, 8 for the layout
// and 8 a patch; nothing else is allocated.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "../common/args/token_entropy.h"
#include "../common/dispatch.h"
#include "patch_layout.h"
#include "token_entropy.h"

namespace blt {
namespace {

// --- patching rules -------------------------------------------------------------------------------------------------

// Returns entropies in fp32, in which all rules compare them. A copy costs less than a variant of each rule for each
// dtype.
Tensor fp32_entropies(const Tensor& entropy) {
  const Tensor values = check_values(entropy, "entropy");
  if (values.scalar_type() == ScalarType::Float) return values;
  Tensor fp32 = new_output(values, {values.size(0)}, ScalarType::Float);
  dispatch_float(values.scalar_type(), "entropy", [&]<class T>(Tag<T>) {
    const T* const from = values.const_data_ptr<T>();
    std::transform(from, from + values.size(0), fp32.mutable_data_ptr<float>(),
                   [](T h) { return static_cast<float>(h); });
  });
  return fp32;
}

LayoutTensors patch_starts_fwd_cpu(const Tensor& entropy, const std::optional<Tensor>& cu_seqlens,
                                   int64_t num_documents, double threshold, std::optional<double> threshold_add,
                                   bool monotonic, std::optional<int64_t> max_patch_length,
                                   std::optional<int64_t> max_patches) {
  check_max_patch_length(max_patch_length);
  const Tensor values = fp32_entropies(entropy);
  const TextDocuments text(cu_seqlens, num_documents, values, values.size(0));
  const float* const h = values.const_data_ptr<float>();
  const float above = static_cast<float>(threshold), add = static_cast<float>(threshold_add.value_or(0));
  const auto build = [&](auto boundary) {
    if (!max_patch_length) return build_layout(text, values.size(0), max_patches, boundary);
    // A boundary at the length limit restarts the count, as one of the rule does.
    return build_layout(text, values.size(0), max_patches,
                        [=, limit = *max_patch_length, length = int64_t{0}](int64_t t, int64_t i) mutable {
                          length = i == 0 ? 1 : length + 1;
                          const bool starts = boundary(t, i) | (length == limit);
                          length = starts ? 0 : length;
                          return starts;
                        });
  };
  if (monotonic) return build([=](int64_t t, int64_t i) { return (i < 2) | (h[t] - h[t - (i > 0)] > above); });
  if (threshold_add)
    return build(
        [=](int64_t t, int64_t i) { return (i < 2) | ((i > 2) & (h[t] - h[t - (i > 0)] > add) & (h[t] > above)); });
  return build([=](int64_t t, int64_t i) { return (i == 0) | (h[t] > above); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> entropy_patch_fwd_cpu(
    const Tensor& logits, const std::optional<Tensor>& cu_seqlens, int64_t num_documents, double threshold,
    std::optional<double> threshold_add, bool monotonic, std::optional<int64_t> max_patch_length,
    std::optional<int64_t> max_patches) {
  const Tensor rows = check_logits(logits);
  int64_t count = rows.size(0);
  if (cu_seqlens) {
    Tensor offsets = *cu_seqlens;
    count = check_offsets(offsets, "cu_seqlens", rows.size(0))[offsets.size(0) - 1];
  }
  auto scores = entropies_of_rows(rows, count);
  auto layout = patch_starts_fwd_cpu(std::get<0>(scores), cu_seqlens, num_documents, threshold, threshold_add,
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
  const Tensor values = fp32_entropies(entropy);
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
  m.impl("entropy_patch_fwd", TORCH_BOX(&entropy_patch_fwd_cpu));
  m.impl("patch_starts_fwd", TORCH_BOX(&patch_starts_fwd_cpu));
  m.impl("space_patch_fwd", TORCH_BOX(&space_patch_fwd_cpu));
  m.impl("static_patch_fwd", TORCH_BOX(&static_patch_fwd_cpu));
  m.impl("delimiter_patch_fwd", TORCH_BOX(&delimiter_patch_fwd_cpu));
  m.impl("topk_patch_fwd", TORCH_BOX(&topk_patch_fwd_cpu));
}

}  // namespace blt
