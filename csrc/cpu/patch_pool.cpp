// patch_pool: one row for each patch, from the rows of its bytes.
//
//   out[p, r D + d] = reduce_r of x[t, d] over the bytes t of patch p, in [offsets[p], offsets[p+1]); 0 if there are none
//   grad_x[t, d]    = sum over r of what byte t gets of grad_out[p, r D + d]: all of it (sum), a share of 1 / length (mean),
//                     of 1 / ties where x[t, d] is the maximum or minimum, all of it at one byte (first, last)
//
// Patches are spread over the threads by their bytes; the owner of a patch streams its rows past a row of results in L1,
// in panels of kPanel columns. Bytes moved: forward reads x once and writes out. Backward writes grad_x; for max and min it
// reads x too, twice, the second time from the cache unless the patch is longer than that.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../common/alloc.h"
#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/rows.h"

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
constexpr auto kLarger = [](auto best, auto x) { return (x > best) | (x != x) ? x : best; };
constexpr auto kSmaller = [](auto best, auto x) { return (x < best) | (x != x) ? x : best; };

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

template <class T>
void pool(T* out, const PatchRows<T>& rows, Reduce reduce) {
  using A = accumulator_t<T>;
  alignas(kVecBytes) A result[kPanel];
  switch (reduce) {
    case Reduce::kFirst: std::copy_n(rows.x, rows.width, out); return;
    case Reduce::kLast: std::copy_n(rows.row(rows.count - 1), rows.width, out); return;
    case Reduce::kMax: fold_rows(result, rows, kLarger); break;
    case Reduce::kMin: fold_rows(result, rows, kSmaller); break;
    case Reduce::kMean:
    case Reduce::kSum: fold_rows(result, rows, kAdd); break;
  }
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
    const int64_t stride = rows.stride(0);
    parallel_segments(offsets, patches, row_grain(width), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        const int64_t begin = offsets[p], count = offsets[p + 1] - begin;
        T* const to = pooled + p * out_width;
        if (count == 0) {
          std::fill_n(to, out_width, T(0));
          continue;
        }
        for (int64_t c = 0; c < width; c += kPanel)
          for (size_t r = 0; r < reductions.size(); ++r)
            pool(to + static_cast<int64_t>(r) * width + c,
                 PatchRows<T>{data + begin * stride + c, stride, count, std::min(kPanel, width - c)}, reductions[r]);
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

// share[c] /= number of rows that attain best[c]
template <class A, class T>
void share_among_ties(A* share, const T* best, const PatchRows<T>& rows) {
  alignas(kVecBytes) A ties[kPanel] = {};
  const auto count = [](auto n, auto x, auto b) { return x == b ? n + A(1) : n; };
  for (int64_t i = 0; i < rows.count; ++i) map_row<A>(ties, rows.width, count, ties, rows.row(i), best);
  map_row<A>(share, rows.width, [](auto g, auto n) { return g / n; }, share, ties);
}

// The gradient of one patch, in a panel of columns. `grad` and `out` point to it in the patch's row of the first
// reduction, those of the others follow at `step`; rows.x is null unless there is a maximum or a minimum.
template <class T>
void pool_grad(T* grad_x, int64_t grad_stride, const T* grad, const T* out, int64_t step, const PatchRows<T>& rows,
               const std::vector<Reduce>& reductions) {
  using A = accumulator_t<T>;
  const int64_t width = rows.width;
  const auto has = [&](Reduce r) { return std::find(reductions.begin(), reductions.end(), r) != reductions.end(); };
  const bool first = has(Reduce::kFirst), last = has(Reduce::kLast);
  const T *max = nullptr, *min = nullptr;
  Shares<A> shares;
  for (const Reduce kind : {Reduce::kSum, Reduce::kMax, Reduce::kMin, Reduce::kFirst, Reduce::kLast})
    if (kind == Reduce::kSum || has(kind)) std::fill_n(shares.of(kind), width, A(0));
  for (size_t r = 0; r < reductions.size(); ++r) {
    const int64_t column = static_cast<int64_t>(r) * step;
    const A length = reductions[r] == Reduce::kMean ? static_cast<A>(rows.count) : 1;
    A* const share = shares.of(reductions[r]);
    map_row<A>(share, width, [length](auto sum, auto g) { return sum + g / length; }, share, grad + column);
    if (reductions[r] == Reduce::kMax) max = out + column;
    if (reductions[r] == Reduce::kMin) min = out + column;
  }
  if (max) share_among_ties(shares.max, max, rows);
  if (min) share_among_ties(shares.min, min, rows);

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
  std::optional<Tensor> inputs, results;
  if (std::any_of(reductions.begin(), reductions.end(),
                  [](Reduce r) { return r == Reduce::kMax || r == Reduce::kMin; })) {
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
    parallel_segments(offsets, patches, row_grain(width), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p)
        for (int64_t c = 0, begin = offsets[p]; c < width; c += kPanel) {
          const PatchRows<T> rows = {data ? data + begin * stride + c : nullptr, stride, offsets[p + 1] - begin,
                                     std::min(kPanel, width - c)};
          pool_grad(to + begin * width + c, width, from + p * grads.stride(0) + c,
                    pooled ? pooled + p * pooled_stride + c : nullptr, width, rows, reductions);
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
