// patch_pool: one row for each patch, from the rows of its bytes.
//
//   out[p, r D + d] = reduce_r of x[t, d] over the bytes t of patch p, in [offsets[p], offsets[p+1]); 0 if there are none
//   grad_x[t, d]    = sum over r of what byte t gets of grad_out[p, r D + d]: all of it (sum), a share of 1 / length (mean),
//                     of 1 / ties where x[t, d] is the maximum or minimum, all of it at one byte (first, last)
//
// Patches are spread over the threads by their bytes, long ones in units (segment_units.h); the owner of either streams its
// rows past a row of results in L1, in panels of kPanel columns. Results of units, and backward their numbers of ties, are
// combined by the patch. Bytes moved: forward reads x once and writes out. Backward writes grad_x; for max and min it reads
// x too, twice, the second time from the cache unless the patch is longer than that.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "segment_units.h"
#include "support/alloc.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {
namespace {

constexpr int64_t kPanel = 1024;

enum class Reduce { kMax, kMin, kMean, kSum, kFirst, kLast };

std::vector<Reduce> check_reduce(const std::vector<std::string>& names) {
  constexpr const char* kNames[] = {"max", "min", "mean", "sum", "first", "last"};
  std::vector<Reduce> found;
  for (const std::string& name : names) {
    const auto at = std::find(std::begin(kNames), std::end(kNames), name);
    STD_TORCH_CHECK(at != std::end(kNames), "reduce: expected max, min, mean, sum, first or last, got ", name);
    found.push_back(static_cast<Reduce>(at - std::begin(kNames)));
  }
  STD_TORCH_CHECK(!found.empty(), "reduce: expected at least one reduction");
  return found;
}

// The larger and the smaller of two, NaN if either is.
constexpr auto kLarger = [](auto best, auto x) { return ((x > best) | (x != x)) ? x : best; };
constexpr auto kSmaller = [](auto best, auto x) { return ((x < best) | (x != x)) ? x : best; };

// The rows of one patch, in a panel of columns.
template <class T>
struct PatchRows {
  const T* x;
  int64_t stride, count, width;
  const T* row(int64_t i) const { return x + i * stride; }
};

// result[c] = step(... step(row_0[c], row_1[c]) ..., row_n[c])
template <class A, class T, class Step>
void fold_rows(A* result, const PatchRows<T>& rows, const Step& step) {
  map_row<A>(result, rows.width, kSame, rows.x);
  for (int64_t i = 1; i < rows.count; ++i) map_row<A>(result, rows.width, step, result, rows.row(i));
}

// The fold of a maximum, a minimum or a sum, in the accumulator's type.
template <class A, class T>
void fold(A* result, const PatchRows<T>& rows, Reduce reduce) {
  switch (reduce) {
    case Reduce::kMax: return fold_rows(result, rows, kLarger);
    case Reduce::kMin: return fold_rows(result, rows, kSmaller);
    default: return fold_rows(result, rows, kAdd);
  }
}

bool is_end(Reduce reduce) { return reduce == Reduce::kFirst || reduce == Reduce::kLast; }

// Pools `folded`, which are the rows of x, or the folds of its units, of a patch of `count` bytes.
template <class T, class In>
void pool(T* out, const PatchRows<T>& rows, const PatchRows<In>& folded, Reduce reduce) {
  using A = accumulator_t<T>;
  if (is_end(reduce)) {
    std::copy_n(rows.row(reduce == Reduce::kFirst ? 0 : rows.count - 1), rows.width, out);
    return;
  }
  alignas(kVecBytes) A result[kPanel];
  fold(result, folded, reduce);
  const A length = reduce == Reduce::kMean ? static_cast<A>(rows.count) : 1;
  map_row<A>(out, rows.width, [length](auto x) { return x / length; }, result);
}

Tensor patch_pool_fwd_cpu(const Tensor& x, Tensor patch_offsets, const Tensor& patch_ids,
                          const std::vector<std::string>& reduce) {
  const Tensor rows = unit_rows(x, "x");
  const int32_t* const offsets = check_offsets(patch_offsets, "patch_offsets", rows.size(0));
  check_size(patch_ids, "patch_ids", 0, rows.size(0));
  const std::vector<Reduce> reductions = check_reduce(reduce);
  const int64_t width = rows.size(1), patches = patch_offsets.size(0) - 1;
  const int64_t out_width = width * static_cast<int64_t>(reductions.size());
  Tensor out = new_output(rows, {patches, out_width});
  dispatch_float(rows.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const data = rows.const_data_ptr<T>();
    T* const pooled = out.mutable_data_ptr<T>();
    using A = accumulator_t<T>;
    const int64_t stride = rows.stride(0);
    const SegmentUnits units(offsets, patches);
    std::vector<A> folds(static_cast<size_t>(units.numbered() * out_width));  // of the units of long patches
    const auto rows_of = [&](int64_t begin, int64_t end, int64_t c) {
      return PatchRows<T>{data + begin * stride + c, stride, end - begin, std::min(kPanel, width - c)};
    };
    // f(reduction, a panel of its columns in a row of out, the same panel in a row of x)
    const auto for_each_panel = [&](const auto& f) {
      for (int64_t c = 0; c < width; c += kPanel)
        for (size_t r = 0; r < reductions.size(); ++r) f(reductions[r], static_cast<int64_t>(r) * width + c, c);
    };
    units.for_each(row_grain(width), [&](const Unit& unit) {
      T* const to = pooled + unit.segment * out_width;
      if (unit.begin == unit.end) {
        std::fill_n(to, out_width, T(0));
        return;
      }
      for_each_panel([&](Reduce reduce, int64_t column, int64_t c) {
        const PatchRows<T> own = rows_of(unit.begin, unit.end, c);
        if (unit.number < 0)
          pool(to + column, own, own, reduce);
        else if (!is_end(reduce))
          fold(folds.data() + unit.number * out_width + column, own, reduce);
      });
    });
    parallel_for(static_cast<int64_t>(units.longs().size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const LongSegment& patch = units.longs()[static_cast<size_t>(i)];
        for_each_panel([&](Reduce reduce, int64_t column, int64_t c) {
          const PatchRows<T> all = rows_of(offsets[patch.segment], offsets[patch.segment + 1], c);
          const A* const first_fold = folds.data() + patch.first * out_width + column;
          pool(pooled + patch.segment * out_width + column, all,
               PatchRows<A>{first_fold, out_width, patch.last - patch.first, all.width}, reduce);
        });
      }
    });
  });
  return out;
}

// --- backward ---------------------------------------------------------------------------------------------------------

// What the bytes of a patch get, in a panel of columns: the gradients of all reductions of one kind, added up.
template <class A>
struct Shares {
  alignas(kVecBytes) A all[kPanel], max[kPanel], min[kPanel], first[kPanel], last[kPanel];

  A* of(Reduce reduce) {
    switch (reduce) {
      case Reduce::kMax: return max;
      case Reduce::kMin: return min;
      case Reduce::kFirst: return first;
      case Reduce::kLast: return last;
      default: return all;
    }
  }
};

// Of a byte with value x in a patch whose maximum is `best`. Where the patch has a NaN, every byte gets one.
constexpr auto kTieShare = [](auto x, auto best, auto share) {
  return x == best ? share : (best == best ? decltype(best){} : best);
};

// ties[c] = number of rows that attain best[c]
template <class A, class T>
void count_ties(A* ties, const T* best, const PatchRows<T>& rows) {
  const auto count = [](auto n, auto x, auto b) { return x == b ? n + A(1) : n; };
  std::fill_n(ties, rows.width, A(0));
  for (int64_t i = 0; i < rows.count; ++i) map_row<A>(ties, rows.width, count, ties, rows.row(i), best);
}

// What is known of the ties of one extreme, in a panel: nothing, or their numbers in the patch and in some of its rows.
template <class A>
struct KnownTies {
  const A *total = nullptr, *own = nullptr;

  // False where the rows get nothing of the extreme, and so need not be read again: they have no tie, and there is no NaN
  // in the patch, which leaves it without ties.
  bool reach_rows(int64_t width) const {
    bool reach = total == nullptr;
    for (int64_t c = 0; total && c < width; ++c) reach |= (own[c] > 0) | (total[c] == 0);
    return reach;
  }
};

// What is known of the patch of some rows: its length, whether they begin and end it, and its ties.
template <class A>
struct PatchOfRows {
  int64_t length;
  bool begins, ends;
  KnownTies<A> max, min;
};

// share[c] /= number of rows of the patch that attain best[c]
template <class A, class T>
void share_among_ties(A* share, const T* best, const PatchRows<T>& rows, const A* ties) {
  alignas(kVecBytes) A own[kPanel];
  if (!ties) count_ties(own, best, rows);
  map_row<A>(share, rows.width, [](auto g, auto n) { return g / n; }, share, ties ? ties : own);
}

// The gradient of rows of one patch, in a panel of columns. `grad` and `out` point to it in the patch's row of the first
// reduction, those of the others follow at `step`; rows.x is null unless there is a maximum or a minimum.
template <class T>
void pool_grad(T* grad_x, int64_t grad_stride, const T* grad, const T* out, int64_t step, const PatchRows<T>& rows,
               const PatchOfRows<accumulator_t<T>>& patch, const std::vector<Reduce>& reductions) {
  using A = accumulator_t<T>;
  const int64_t width = rows.width;
  const auto has = [&](Reduce r) { return std::find(reductions.begin(), reductions.end(), r) != reductions.end(); };
  const bool first = patch.begins && has(Reduce::kFirst), last = patch.ends && has(Reduce::kLast);
  const T *max = nullptr, *min = nullptr;
  Shares<A> shares;
  for (const Reduce kind : {Reduce::kSum, Reduce::kMax, Reduce::kMin, Reduce::kFirst, Reduce::kLast})
    if (kind == Reduce::kSum || has(kind)) std::fill_n(shares.of(kind), width, A(0));
  for (size_t r = 0; r < reductions.size(); ++r) {
    const int64_t column = static_cast<int64_t>(r) * step;
    const A length = reductions[r] == Reduce::kMean ? static_cast<A>(patch.length) : 1;
    A* const share = shares.of(reductions[r]);
    map_row<A>(share, width, [length](auto sum, auto g) { return sum + g / length; }, share, grad + column);
    if (reductions[r] == Reduce::kMax) max = out + column;
    if (reductions[r] == Reduce::kMin) min = out + column;
  }
  if (!patch.max.reach_rows(width)) max = nullptr;
  if (!patch.min.reach_rows(width)) min = nullptr;
  if (max) share_among_ties(shares.max, max, rows, patch.max.total);
  if (min) share_among_ties(shares.min, min, rows, patch.min.total);

  alignas(kVecBytes) A end[kPanel];
  for (int64_t i = 0; i < rows.count; ++i) {
    const A* base = shares.all;
    if (first && i == 0) {
      map_row<A>(end, width, kAdd, base, shares.first);
      base = end;
    }
    if (last && i == rows.count - 1) {
      map_row<A>(end, width, kAdd, base, shares.last);
      base = end;
    }
    T* const to = grad_x + i * grad_stride;
    const auto with_one = [](auto sum, auto x, auto best, auto share) { return sum + kTieShare(x, best, share); };
    const auto with_both = [](auto sum, auto x, auto high, auto high_share, auto low, auto low_share) {
      return sum + kTieShare(x, high, high_share) + kTieShare(x, low, low_share);
    };
    if (max && min)
      map_row<A>(to, width, with_both, base, rows.row(i), max, shares.max, min, shares.min);
    else if (max)
      map_row<A>(to, width, with_one, base, rows.row(i), max, shares.max);
    else if (min)
      map_row<A>(to, width, with_one, base, rows.row(i), min, shares.min);
    else
      map_row<A>(to, width, kSame, base);
  }
}

Tensor patch_pool_bwd_cpu(const Tensor& grad_out, const std::optional<Tensor>& x, const std::optional<Tensor>& out,
                          Tensor patch_offsets, const Tensor& patch_ids, const std::vector<std::string>& reduce) {
  const Tensor grads = unit_rows(grad_out, "grad_out");
  check_dim(patch_ids, "patch_ids", 1);
  const int64_t bytes = patch_ids.size(0), patches = grads.size(0);
  const int32_t* const offsets = check_offsets(patch_offsets, "patch_offsets", bytes);
  check_size(grads, "grad_out", 0, patch_offsets.size(0) - 1);
  const std::vector<Reduce> reductions = check_reduce(reduce);
  const int64_t kinds = static_cast<int64_t>(reductions.size()), width = grads.size(1) / kinds;
  check_size(grads, "grad_out", 1, width * kinds);
  const auto column_of = [&](Reduce wanted) {  // of the first such reduction, -1 if there is none
    const auto at = std::find(reductions.begin(), reductions.end(), wanted);
    return at == reductions.end() ? -1 : (at - reductions.begin()) * width;
  };
  const int64_t columns[2] = {column_of(Reduce::kMax), column_of(Reduce::kMin)};
  std::optional<Tensor> inputs, results;
  if (columns[0] >= 0 || columns[1] >= 0) {
    STD_TORCH_CHECK(x && out, "x, out: expected tensors, since reduce has max or min");
    inputs = unit_rows(*x, "x"), results = unit_rows(*out, "out");
    check_dtype(*inputs, "x", grads.scalar_type());
    check_dtype(*results, "out", grads.scalar_type());
    check_size(*inputs, "x", 0, bytes);
    check_size(*inputs, "x", 1, width);
    check_size(*results, "out", 0, patches);
    check_size(*results, "out", 1, width * kinds);
  }
  Tensor grad_x = new_output(grads, {bytes, width});
  dispatch_float(grads.scalar_type(), "grad_out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = grads.const_data_ptr<T>();
    const T* const data = inputs ? inputs->const_data_ptr<T>() : nullptr;
    const T* const pooled = results ? results->const_data_ptr<T>() : nullptr;
    const int64_t stride = inputs ? inputs->stride(0) : 0, pooled_stride = results ? results->stride(0) : 0;
    T* const to = grad_x.mutable_data_ptr<T>();
    using A = accumulator_t<T>;
    const auto rows_of = [&](const Unit& unit, int64_t c) {
      return PatchRows<T>{data ? data + unit.begin * stride + c : nullptr, stride, unit.end - unit.begin,
                          std::min(kPanel, width - c)};
    };
    // The ties of a maximum and of a minimum, as far as there is one, in each unit of a long patch and in all of the patch.
    const SegmentUnits units(offsets, patches);
    std::vector<A> ties[2], totals[2];
    for (int k = 0; k < 2; ++k) {
      if (columns[k] < 0 || units.longs().empty()) continue;
      ties[k].resize(static_cast<size_t>(units.numbered() * width));
      totals[k].resize(units.longs().size() * static_cast<size_t>(width));
      A* const counts = ties[k].data();
      units.for_each_long([&](const Unit& unit) {
        for (int64_t c = 0; c < width; c += kPanel)
          count_ties(counts + unit.number * width + c, pooled + unit.segment * pooled_stride + columns[k] + c,
                     rows_of(unit, c));
      });
      A* total = totals[k].data();
      for (const LongSegment& patch : units.longs()) {
        for (int64_t u = patch.first; u < patch.last; ++u) map_row<A>(total, width, kAdd, total, counts + u * width);
        total += width;
      }
    }
    const auto known_ties = [&](int k, const Unit& unit, int64_t c) -> KnownTies<A> {
      if (ties[k].empty()) return {};
      return {totals[k].data() + units.long_index(unit) * width + c, ties[k].data() + unit.number * width + c};
    };
    units.for_each(row_grain(width), [&](const Unit& unit) {
      const int64_t begin = offsets[unit.segment], end = offsets[unit.segment + 1];
      for (int64_t c = 0; c < width; c += kPanel) {
        PatchOfRows<A> patch = {end - begin, unit.begin == begin, unit.end == end, {}, {}};
        if (unit.number >= 0) patch.max = known_ties(0, unit, c), patch.min = known_ties(1, unit, c);
        pool_grad(to + unit.begin * width + c, width, from + unit.segment * grads.stride(0) + c,
                  pooled ? pooled + unit.segment * pooled_stride + c : nullptr, width, rows_of(unit, c), patch,
                  reductions);
      }
    });
    std::fill(to + offsets[patches] * width, to + bytes * width, T(0));
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_pool_fwd", TORCH_BOX(&patch_pool_fwd_cpu));
  m.impl("patch_pool_bwd", TORCH_BOX(&patch_pool_bwd_cpu));
}

}  // namespace blt
