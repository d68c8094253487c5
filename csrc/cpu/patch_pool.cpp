// patch_pool reduces the rows of the bytes of a patch to one row.
//
//   out[p, r D + d] = reduce_r of x[t, d] over the bytes t of patch p, in [offsets[p], offsets[p+1]); 0 if it is empty
//   grad_x[t, d]    = sum over r of the share of byte t in grad_out[p, r D + d]: all of it (sum), 1 / length (mean),
//                     1 / ties where x[t, d] is the maximum or minimum, all of it at one byte (first, last)
//
// Tiling: threads share the patches by their bytes, and long patches in parts (segment_parts.h). The owner of a patch
// or part streams its rows past a row of results in L1, in panels of kPanel columns. The owner of a long patch combines
// the results of its parts and, backward, their counts of ties.
//
// Bytes: forward reads x once and writes out. Backward writes grad_x; for max and min it also reads x twice, the second
// time from the cache unless the patch does not fit there.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../common/args/patch_pool.h"
#include "../common/box.h"
#include "../common/dispatch.h"
#include "segment_parts.h"
#include "support/alloc.h"
#include "support/check_values.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {
namespace {

constexpr int64_t kPanel = 1024;

// These are maximum and minimum, NaN if either operand is.
constexpr auto kMax = [](auto best, auto x) { return ((x > best) | (x != x)) ? x : best; };
constexpr auto kMin = [](auto best, auto x) { return ((x < best) | (x != x)) ? x : best; };

// Points to rows of one patch, in a panel of columns.
template <class T>
struct PatchPanel {
  const T* x;
  int64_t stride, count, width;
  const T* row(int64_t i) const { return x + i * stride; }
};

// Computes result[c] = step(... step(row_0[c], row_1[c]) ..., row_n[c]).
template <class A, class T, class Step>
void fold_rows(A* result, const PatchPanel<T>& rows, const Step& step) {
  map_row<A>(result, rows.width, kSame, rows.x);
  for (int64_t i = 1; i < rows.count; ++i) map_row<A>(result, rows.width, step, result, rows.row(i));
}

template <class A, class T>
void fold(A* result, const PatchPanel<T>& rows, FoldKind kind) {
  switch (kind) {
    case FoldKind::kMax: return fold_rows(result, rows, kMax);
    case FoldKind::kMin: return fold_rows(result, rows, kMin);
    default: return fold_rows(result, rows, kAdd);
  }
}

// Writes the reduction of a patch to out. `folded` is its rows, or the folds of its parts.
template <class T, class In>
void pool(T* out, const PatchPanel<T>& rows, const PatchPanel<In>& folded, const Reduction& reduction) {
  using A = accumulator_t<T>;
  if (reduction.is_end()) {
    std::copy_n(rows.row(reduction.fold == FoldKind::kFirst ? 0 : rows.count - 1), rows.width, out);
    return;
  }
  alignas(kVecBytes) A result[kPanel];
  fold(result, folded, reduction.fold);
  const A divisor = reduction.divisor<A>(rows.count);
  map_row<A>(out, rows.width, [divisor](auto x) { return x / divisor; }, result);
}

Tensor patch_pool_fwd_cpu(const Tensor& x, Tensor patch_offsets, const Tensor& patch_ids,
                          const std::vector<std::string>& reduce) {
  const PoolArguments arguments = check_pool(x, patch_offsets, patch_ids, reduce);
  const Tensor& rows = arguments.x;
  const int32_t* const offsets = check_offsets(patch_offsets, "patch_offsets", arguments.bytes);
  const int64_t width = arguments.width, patches = arguments.patches, out_width = arguments.out_width();
  const Reductions& reductions = arguments.reductions;
  Tensor out = new_output(rows, {patches, out_width});
  dispatch_float(rows.scalar_type(), "x", [&]<class T>(Tag<T>) {
    const T* const data = rows.const_data_ptr<T>();
    T* const pooled = out.mutable_data_ptr<T>();
    using A = accumulator_t<T>;
    const int64_t stride = rows.stride(0);
    const SegmentParts parts(offsets, patches);
    std::vector<A> part_folds(static_cast<size_t>(parts.num_slots() * out_width));
    const auto rows_of = [&](int64_t begin, int64_t end, int64_t c) {
      return PatchPanel<T>{data + begin * stride + c, stride, end - begin, std::min(kPanel, width - c)};
    };
    // Calls f(reduction, first column of a panel in a row of out, first column in a row of x).
    const auto for_each_panel = [&](const auto& f) {
      for (int64_t c = 0; c < width; c += kPanel)
        for (size_t r = 0; r < reductions.size(); ++r) f(reductions[r], static_cast<int64_t>(r) * width + c, c);
    };
    parts.for_each(row_grain(width), [&](const Part& part) {
      T* const to = pooled + part.segment * out_width;
      if (part.begin == part.end) {
        std::fill_n(to, out_width, T(0));
        return;
      }
      for_each_panel([&](const Reduction& reduction, int64_t column, int64_t c) {
        const PatchPanel<T> own = rows_of(part.begin, part.end, c);
        if (part.slot < 0)
          pool(to + column, own, own, reduction);
        else if (!reduction.is_end())
          fold(part_folds.data() + part.slot * out_width + column, own, reduction.fold);
      });
    });
    parts.for_each_divided([&](const DividedSegment& patch) {
      for_each_panel([&](const Reduction& reduction, int64_t column, int64_t c) {
        const PatchPanel<T> all = rows_of(offsets[patch.segment], offsets[patch.segment + 1], c);
        const A* const first_fold = part_folds.data() + patch.slot * out_width + column;
        pool(pooled + patch.segment * out_width + column, all,
             PatchPanel<A>{first_fold, out_width, patch.count, all.width}, reduction);
      });
    });
  });
  return out;
}

// --- backward --------------------------------------------------------------------------------------------------------

// Holds the gradients of the bytes of a patch in a panel of columns. Reductions with the same fold are added up.
template <class A>
struct Shares {
  alignas(kVecBytes) A values[5][kPanel];
  A* of(FoldKind fold) { return values[static_cast<int>(fold)]; }
};

// Returns the share of a byte with value x in a patch with this extreme. Where the patch has a NaN, it is NaN.
constexpr auto kTieShare = [](auto x, auto extreme, auto share) {
  return x == extreme ? share : (extreme == extreme ? decltype(extreme){} : extreme);
};

// Counts in ties[c] the rows that equal extreme[c].
template <class A, class T>
void count_ties(A* ties, const T* extreme, const PatchPanel<T>& rows) {
  const auto count = [](auto n, auto x, auto b) { return x == b ? n + A(1) : n; };
  std::fill_n(ties, rows.width, A(0));
  for (int64_t i = 0; i < rows.count; ++i) map_row<A>(ties, rows.width, count, ties, rows.row(i), extreme);
}

// Points to the counts of ties of one extreme in a patch and in one of its parts, in a panel of columns. Both are null
// where the rows are the whole patch, whose ties are counted when they are needed.
template <class A>
struct TieCounts {
  const A *patch = nullptr, *part = nullptr;

  // Returns false if the rows get nothing from the extreme: they have no tie, and the patch has no NaN, which leaves it
  // without ties.
  bool reach_rows(int64_t width) const {
    bool reach = patch == nullptr;
    for (int64_t c = 0; patch && c < width; ++c) reach |= (part[c] > 0) | (patch[c] == 0);
    return reach;
  }
};

// Describes the patch of some rows: its length, whether the rows begin and end it, and its ties.
template <class A>
struct PatchOfRows {
  int64_t length;
  bool begins, ends;
  TieCounts<A> max_ties, min_ties;
};

// Divides share[c] by the number of rows of the patch that equal extreme[c].
template <class A, class T>
void share_among_ties(A* share, const T* extreme, const PatchPanel<T>& rows, const A* ties) {
  alignas(kVecBytes) A own[kPanel];
  if (!ties) count_ties(own, extreme, rows);
  map_row<A>(share, rows.width, [](auto g, auto n) { return g / n; }, share, ties ? ties : own);
}

// Writes the gradient of rows of one patch, in a panel of columns. `grad` and `out` point to the patch's row in the
// first reduction; the other reductions follow `step` columns apart. rows.x is null without a maximum or minimum.
template <class T>
void pool_grad(T* grad_x, int64_t grad_stride, const T* grad, const T* out, int64_t step, const PatchPanel<T>& rows,
               const PatchOfRows<accumulator_t<T>>& patch, const Reductions& reductions) {
  using A = accumulator_t<T>;
  const int64_t width = rows.width;
  const bool first = patch.begins && has_fold(reductions, FoldKind::kFirst);
  const bool last = patch.ends && has_fold(reductions, FoldKind::kLast);
  Shares<A> shares;
  std::fill_n(shares.of(FoldKind::kSum), width, A(0));
  for (const Reduction& reduction : reductions) std::fill_n(shares.of(reduction.fold), width, A(0));
  for (size_t r = 0; r < reductions.size(); ++r) {
    const A divisor = reductions[r].template divisor<A>(patch.length);
    A* const share = shares.of(reductions[r].fold);
    map_row<A>(
        share, width, [divisor](auto sum, auto g) { return sum + g / divisor; }, share,
        grad + static_cast<int64_t>(r) * step);
  }
  A *const max_share = shares.of(FoldKind::kMax), *const min_share = shares.of(FoldKind::kMin);
  const auto extreme_of = [&](FoldKind fold, const TieCounts<A>& ties) -> const T* {
    const int64_t column = column_of(reductions, fold, step);
    if (column < 0 || !ties.reach_rows(width)) return nullptr;
    share_among_ties(shares.of(fold), out + column, rows, ties.patch);
    return out + column;
  };
  const T* const max = extreme_of(FoldKind::kMax, patch.max_ties);
  const T* const min = extreme_of(FoldKind::kMin, patch.min_ties);

  alignas(kVecBytes) A end[kPanel];
  for (int64_t i = 0; i < rows.count; ++i) {
    const A* base = shares.of(FoldKind::kSum);
    if (first && i == 0) {
      map_row<A>(end, width, kAdd, base, shares.of(FoldKind::kFirst));
      base = end;
    }
    if (last && i == rows.count - 1) {
      map_row<A>(end, width, kAdd, base, shares.of(FoldKind::kLast));
      base = end;
    }
    T* const to = grad_x + i * grad_stride;
    const auto with_one = [](auto sum, auto x, auto extreme, auto share) { return sum + kTieShare(x, extreme, share); };
    const auto with_both = [](auto sum, auto x, auto high, auto high_share, auto low, auto low_share) {
      return sum + kTieShare(x, high, high_share) + kTieShare(x, low, low_share);
    };
    if (max && min)
      map_row<A>(to, width, with_both, base, rows.row(i), max, max_share, min, min_share);
    else if (max)
      map_row<A>(to, width, with_one, base, rows.row(i), max, max_share);
    else if (min)
      map_row<A>(to, width, with_one, base, rows.row(i), min, min_share);
    else
      map_row<A>(to, width, kSame, base);
  }
}

Tensor patch_pool_bwd_cpu(const Tensor& grad_out, const std::optional<Tensor>& x, const std::optional<Tensor>& out,
                          Tensor patch_offsets, const Tensor& patch_ids, const std::vector<std::string>& reduce) {
  const PoolGradArguments arguments = check_pool_grad(grad_out, x, out, patch_offsets, patch_ids, reduce);
  const Tensor& grads = arguments.grad_out;
  const std::optional<Tensor>&inputs = arguments.x, &results = arguments.out;
  const Reductions& reductions = arguments.reductions;
  const int64_t bytes = arguments.bytes, patches = arguments.patches, width = arguments.width;
  const int32_t* const offsets = check_offsets(patch_offsets, "patch_offsets", bytes);
  const int64_t columns[2] = {column_of(reductions, FoldKind::kMax, width),
                              column_of(reductions, FoldKind::kMin, width)};
  Tensor grad_x = new_output(grads, {bytes, width});
  dispatch_float(grads.scalar_type(), "grad_out", [&]<class T>(Tag<T>) {
    const T* const from = grads.const_data_ptr<T>();
    const T* const data = inputs ? inputs->const_data_ptr<T>() : nullptr;
    const T* const pooled = results ? results->const_data_ptr<T>() : nullptr;
    const int64_t stride = inputs ? inputs->stride(0) : 0, pooled_stride = results ? results->stride(0) : 0;
    T* const to = grad_x.mutable_data_ptr<T>();
    using A = accumulator_t<T>;
    const auto rows_of = [&](const Part& part, int64_t c) {
      return PatchPanel<T>{data ? data + part.begin * stride + c : nullptr, stride, part.end - part.begin,
                           std::min(kPanel, width - c)};
    };
    // Count the ties of the maximum and of the minimum, in each part of a long patch and in the whole patch.
    const SegmentParts parts(offsets, patches);
    std::vector<A> ties[2], totals[2];
    for (int k = 0; k < 2; ++k) {
      if (columns[k] < 0 || parts.divided().empty()) continue;
      ties[k].resize(static_cast<size_t>(parts.num_slots() * width));
      totals[k].resize(parts.divided().size() * static_cast<size_t>(width));
      A* const counts = ties[k].data();
      parts.for_each_slot([&](const Part& part) {
        for (int64_t c = 0; c < width; c += kPanel)
          count_ties(counts + part.slot * width + c, pooled + part.segment * pooled_stride + columns[k] + c,
                     rows_of(part, c));
      });
      A* total = totals[k].data();
      for (const DividedSegment& patch : parts.divided()) {
        for (int64_t i = 0; i < patch.count; ++i)
          map_row<A>(total, width, kAdd, total, counts + (patch.slot + i) * width);
        total += width;
      }
    }
    const auto ties_of = [&](int k, const Part& part, int64_t c) -> TieCounts<A> {
      if (ties[k].empty()) return {};
      return {totals[k].data() + part.divided * width + c, ties[k].data() + part.slot * width + c};
    };
    parts.for_each(row_grain(width), [&](const Part& part) {
      const int64_t begin = offsets[part.segment], end = offsets[part.segment + 1];
      for (int64_t c = 0; c < width; c += kPanel) {
        PatchOfRows<A> patch = {end - begin, part.begin == begin, part.end == end, {}, {}};
        if (part.slot >= 0) patch.max_ties = ties_of(0, part, c), patch.min_ties = ties_of(1, part, c);
        pool_grad(to + part.begin * width + c, width, from + part.segment * grads.stride(0) + c,
                  pooled ? pooled + part.segment * pooled_stride + c : nullptr, width, rows_of(part, c), patch,
                  reductions);
      }
    });
    std::fill(to + offsets[patches] * width, to + bytes * width, T(0));
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_pool_fwd", BLT_KERNELS_BOX(&patch_pool_fwd_cpu));
  m.impl("patch_pool_bwd", BLT_KERNELS_BOX(&patch_pool_bwd_cpu));
}

}  // namespace blt
