// Checks the arguments of patch_pool, for the CPU and for CUDA.
#pragma once

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../check.h"

namespace blt {

enum class FoldKind { kMax, kMin, kSum, kFirst, kLast };

// Folds the rows of a patch, and divides by their number for a mean.
struct Reduction {
  std::string_view name;
  FoldKind fold;
  bool is_mean = false;

  // Returns what the fold of `length` rows is divided by.
  template <class A>
  A divisor(int64_t length) const {
    return is_mean ? static_cast<A>(length) : A(1);
  }
  bool is_end() const { return fold == FoldKind::kFirst || fold == FoldKind::kLast; }
};

// A new reduction is a line here and an enumerator of Reduce in patch_pool.cuh, in the same order.
inline constexpr Reduction kReductions[] = {
    {"max", FoldKind::kMax}, {"min", FoldKind::kMin},     {"mean", FoldKind::kSum, true},
    {"sum", FoldKind::kSum}, {"first", FoldKind::kFirst}, {"last", FoldKind::kLast},
};

using Reductions = std::vector<Reduction>;

// Returns the index of a reduction in kReductions.
inline int index_of(const Reduction& reduction) {
  const auto same = [&](const Reduction& other) { return other.name == reduction.name; };
  return static_cast<int>(std::find_if(std::begin(kReductions), std::end(kReductions), same) - std::begin(kReductions));
}

inline std::string reduction_names() {
  std::string names;
  for (const Reduction& reduction : kReductions) names.append(names.empty() ? "" : ", ").append(reduction.name);
  return names;
}

inline Reductions check_reduce(const std::vector<std::string>& names) {
  STD_TORCH_CHECK(!names.empty(), "reduce: expected at least one reduction");
  Reductions found;
  for (const std::string& name : names) {
    const auto same = [&](const Reduction& reduction) { return name == reduction.name; };
    const auto at = std::find_if(std::begin(kReductions), std::end(kReductions), same);
    STD_TORCH_CHECK(at != std::end(kReductions), "reduce: expected one of ", reduction_names(), ", got ", name);
    found.push_back(*at);
  }
  return found;
}

inline bool has_fold(const Reductions& reductions, FoldKind fold) {
  return std::any_of(reductions.begin(), reductions.end(), [=](const Reduction& r) { return r.fold == fold; });
}

// Returns the first column of the first reduction with this fold in a row of `out`, or -1.
inline int64_t column_of(const Reductions& reductions, FoldKind fold, int64_t width) {
  for (size_t r = 0; r < reductions.size(); ++r)
    if (reductions[r].fold == fold) return static_cast<int64_t>(r) * width;
  return -1;
}

// The shapes are x [bytes, width], patch_offsets [patches + 1] and patch_ids [bytes].
struct PoolArguments {
  Tensor x, patch_offsets, patch_ids;
  Reductions reductions;
  int64_t bytes, patches, width;

  int64_t out_width() const { return width * static_cast<int64_t>(reductions.size()); }
};

inline PoolArguments check_pool(const Tensor& x, Tensor patch_offsets, Tensor patch_ids,
                                const std::vector<std::string>& reduce) {
  const Tensor rows = unit_rows(x, "x");
  const int64_t patches = check_num_segments(patch_offsets, "patch_offsets");
  check_int32(patch_ids, "patch_ids");
  check_size(patch_ids, "patch_ids", 0, rows.size(0));
  return {rows, patch_offsets, patch_ids, check_reduce(reduce), rows.size(0), patches, rows.size(1)};
}

// grad_out is [patches, reductions * width]. x and its pooled `out` are given if a reduction is a maximum or minimum.
struct PoolGradArguments {
  Tensor grad_out;
  std::optional<Tensor> x, out;
  Tensor patch_offsets, patch_ids;
  Reductions reductions;
  int64_t bytes, patches, width;
};

inline PoolGradArguments check_pool_grad(const Tensor& grad_out, const std::optional<Tensor>& x,
                                         const std::optional<Tensor>& out, Tensor patch_offsets, Tensor patch_ids,
                                         const std::vector<std::string>& reduce) {
  const Tensor grads = unit_rows(grad_out, "grad_out");
  const int64_t patches = check_num_segments(patch_offsets, "patch_offsets");
  check_int32(patch_ids, "patch_ids");
  const Reductions reductions = check_reduce(reduce);
  const int64_t count = static_cast<int64_t>(reductions.size()), width = grads.size(1) / count;
  const int64_t bytes = patch_ids.size(0);
  check_shape(grads, "grad_out", {patches, width * count});
  std::optional<Tensor> inputs, results;
  if (has_fold(reductions, FoldKind::kMax) || has_fold(reductions, FoldKind::kMin)) {
    STD_TORCH_CHECK(x && out, "x, out: expected tensors, since reduce has max or min");
    inputs = unit_rows(*x, "x"), results = unit_rows(*out, "out");
    check_dtype(*inputs, "x", grads.scalar_type());
    check_dtype(*results, "out", grads.scalar_type());
    check_shape(*inputs, "x", {bytes, width});
    check_shape(*results, "out", {patches, width * count});
  }
  return {grads, inputs, results, patch_offsets, patch_ids, reductions, bytes, patches, width};
}

}  // namespace blt
