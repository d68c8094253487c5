// patch_unpool copies to every byte the row of a patch.
//
//   out[t] = y[ids[t]], 0 where the id is -1
//   grad_y[p] = sum of grad_out[t] over the bytes t with ids[t] = p
//
// Tiling: forward, threads share the bytes; backward, they share the patches by their bytes. The bytes that read patch
// p are the first ones of [offsets[p], offsets[p+1]); the others there have id -1. The owner of p, or of a part of it
// if it is long (segment_parts.h), adds the rows up in order.
//
// Bytes: forward reads y once (a row stays in L1 while its bytes are written) and writes out; backward the reverse.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../common/args/patch_unpool.h"
#include "../common/box.h"
#include "../common/dispatch.h"
#include "segment_parts.h"
#include "support/alloc.h"
#include "support/check_values.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {
namespace {

Tensor patch_unpool_fwd_cpu(const Tensor& y, Tensor offsets, Tensor ids) {
  const UnpoolArguments arguments = check_unpool(y, offsets, ids);
  const Tensor& rows = arguments.rows;
  const int32_t* const id = check_ids(ids, "ids", arguments.patches);
  const int64_t width = arguments.width, stride = rows.stride(0);
  Tensor out = new_output(rows, {ids.size(0), width});
  dispatch_float(rows.scalar_type(), "y", [&]<class T>(Tag<T>) {
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
  const UnpoolArguments arguments = check_unpool_grad(grad_out, offsets, ids);
  const Tensor& rows = arguments.rows;
  const int64_t width = arguments.width, stride = rows.stride(0), patches = arguments.patches;
  const int32_t* const segments = check_segments(offsets, "offsets", arguments.bytes);
  const int32_t* const id = check_ids(ids, "ids", patches);
  Tensor grad_y = new_output(rows, {patches, width});
  dispatch_float(rows.scalar_type(), "grad_out", [&]<class T>(Tag<T>) {
    const T* const from = rows.const_data_ptr<T>();
    T* const to = grad_y.mutable_data_ptr<T>();
    using A = accumulator_t<T>;
    const SegmentParts parts(segments, patches);
    std::vector<A> sums(static_cast<size_t>(parts.num_slots() * width));  // are those of parts
    parts.for_each(row_grain(width), [&](const Part& part) {
      const int32_t *const begin = id + part.begin, *const limit = id + part.end;
      const int32_t* const end = std::find_if(begin, limit, [&](int32_t i) { return i != part.segment; });
      const T* const own = from + part.begin * stride;
      const auto row = [=](int64_t i) { return own + i * stride; };
      if (part.slot < 0)
        sum_rows(to + part.segment * width, width, end - begin, row);
      else
        sum_rows(sums.data() + part.slot * width, width, end - begin, row);
    });
    parts.for_each_divided([&](const DividedSegment& patch) {
      const A* const own = sums.data() + patch.slot * width;
      sum_rows(to + patch.segment * width, width, patch.count, [=](int64_t i) { return own + i * width; });
    });
  });
  return grad_y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_unpool_fwd", BLT_KERNELS_BOX(&patch_unpool_fwd_cpu));
  m.impl("patch_unpool_bwd", BLT_KERNELS_BOX(&patch_unpool_bwd_cpu));
}

}  // namespace blt
