// patch_unpool: every byte gets the row of a patch.
//
//   out[t] = y[ids[t]], 0 where the id is -1
//   grad_y[p] = sum of grad_out[t] over the bytes t with ids[t] = p
//
// Forward spreads bytes over the threads, backward patches by their bytes. The bytes that read patch p lie next to each
// other within [patch_offsets[p], patch_offsets[p+2]), by either kind of ids; the owner of p adds them up in order.
// Bytes moved: forward reads y once (a row stays in L1 while its bytes are written) and writes out; backward the reverse.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../common/alloc.h"
#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/rows.h"

namespace blt {
namespace {

Tensor patch_unpool_fwd_cpu(const Tensor& y, Tensor patch_offsets, Tensor ids) {
  const Tensor rows = unit_rows(y, "y");
  check_dim(patch_offsets, "patch_offsets", 1);
  check_size(patch_offsets, "patch_offsets", 0, rows.size(0) + 1);
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

Tensor patch_unpool_bwd_cpu(const Tensor& grad_out, Tensor patch_offsets, Tensor ids) {
  const Tensor rows = unit_rows(grad_out, "grad_out");
  const int32_t* const offsets = check_offsets(patch_offsets, "patch_offsets", rows.size(0));
  const int64_t width = rows.size(1), stride = rows.stride(0), patches = patch_offsets.size(0) - 1;
  check_size(ids, "ids", 0, rows.size(0));
  const int32_t* const id = check_ids(ids, "ids", patches);
  Tensor grad_y = new_output(rows, {patches, width});
  dispatch_float(rows.scalar_type(), "grad_out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = rows.const_data_ptr<T>();
    T* const to = grad_y.mutable_data_ptr<T>();
    parallel_segments(offsets, patches, row_grain(width), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        const int32_t* const limit = id + offsets[std::min(p + 2, patches)];
        const int32_t* const begin = std::find(id + offsets[p], limit, p);
        const int32_t* const end = std::find_if(begin, limit, [p](int32_t i) { return i != p; });
        const T* const rows_of_patch = from + (begin - id) * stride;
        sum_rows(to + p * width, width, end - begin, [=](int64_t i) { return rows_of_patch + i * stride; });
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
