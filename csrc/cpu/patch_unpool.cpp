// patch_unpool: every byte gets the row of a patch.
//
//   out[t] = y[ids[t]], 0 where the id is -1
//   grad_y[p] = sum of grad_out[t] over the bytes t with ids[t] = p
//
// Forward spreads bytes over the threads, backward patches by their bytes. The bytes that read patch p are the first ones of
// [offsets[p], offsets[p+1]), and any behind them there have an id of -1; the owner of p, or of a unit
// of it if it is long (segment_units.h), adds them up in order.
// Bytes moved: forward reads y once (a row stays in L1 while its bytes are written) and writes out; backward the reverse.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "segment_units.h"
#include "support/alloc.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {
namespace {

Tensor patch_unpool_fwd_cpu(const Tensor& y, Tensor offsets, Tensor ids) {
  const Tensor rows = unit_rows(y, "y");
  check_dim(offsets, "offsets", 1);
  check_size(offsets, "offsets", 0, rows.size(0) + 1);
  const int32_t* const id = check_ids(ids, "ids", rows.size(0));
  const int64_t width = rows.size(1), stride = rows.stride(0);
  Tensor out = new_output(rows, {ids.size(0), width});
  dispatch_float(rows.scalar_type(), "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = rows.const_data_ptr<T>();
    T* const to = out.mutable_data_ptr<T>();
    parallel_for(ids.size(0), row_grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        if (id[t] >= 0)
          std::copy_n(from + id[t] * stride, width, to + t * width);
        else
          std::fill_n(to + t * width, width, T(0));
    });
  });
  return out;
}

Tensor patch_unpool_bwd_cpu(const Tensor& grad_out, Tensor offsets, Tensor ids) {
  const Tensor rows = unit_rows(grad_out, "grad_out");
  const int32_t* const segments = check_segments(offsets, "offsets", rows.size(0));
  const int64_t width = rows.size(1), stride = rows.stride(0), patches = offsets.size(0) - 1;
  check_size(ids, "ids", 0, rows.size(0));
  const int32_t* const id = check_ids(ids, "ids", patches);
  Tensor grad_y = new_output(rows, {patches, width});
  dispatch_float(rows.scalar_type(), "grad_out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = rows.const_data_ptr<T>();
    T* const to = grad_y.mutable_data_ptr<T>();
    using A = accumulator_t<T>;
    const SegmentUnits units(segments, patches);
    std::vector<A> sums(static_cast<size_t>(units.numbered() * width));  // of the units of long segments
    units.for_each(row_grain(width), [&](const Unit& unit) {
      const int32_t *const begin = id + unit.begin, *const limit = id + unit.end;
      const int32_t* const end = std::find_if(begin, limit, [&](int32_t i) { return i != unit.segment; });
      const T* const own = from + unit.begin * stride;
      const auto row = [=](int64_t i) { return own + i * stride; };
      if (unit.number < 0)
        sum_rows(to + unit.segment * width, width, end - begin, row);
      else
        sum_rows(sums.data() + unit.number * width, width, end - begin, row);
    });
    parallel_for(static_cast<int64_t>(units.longs().size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const LongSegment& patch = units.longs()[static_cast<size_t>(i)];
        const A* const own = sums.data() + patch.first * width;
        sum_rows(to + patch.segment * width, width, patch.last - patch.first,
                 [=](int64_t u) { return own + u * width; });
      }
    });
  });
  return grad_y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_unpool_fwd", TORCH_BOX(&patch_unpool_fwd_cpu));
  m.impl("patch_unpool_bwd", TORCH_BOX(&patch_unpool_bwd_cpu));
}

}  // namespace blt
