// Checks the arguments of patch_unpool, for the CPU and for CUDA.
#pragma once

#include "../check.h"

namespace blt {

// rows is y [patches, width] forward and grad_out [bytes, width] backward; offsets is [patches + 1], ids [bytes].
struct UnpoolArguments {
  Tensor rows, offsets, ids;
  int64_t bytes, patches, width;
};

inline UnpoolArguments check_unpool(const Tensor& y, Tensor offsets, Tensor ids) {
  const Tensor rows = unit_rows(y, "y");
  check_int32(offsets, "offsets");
  check_size(offsets, "offsets", 0, rows.size(0) + 1);
  check_int32(ids, "ids");
  return {rows, offsets, ids, ids.size(0), rows.size(0), rows.size(1)};
}

inline UnpoolArguments check_unpool_grad(const Tensor& grad_out, Tensor offsets, Tensor ids) {
  const Tensor rows = unit_rows(grad_out, "grad_out");
  const int64_t patches = check_num_segments(offsets, "offsets");
  check_int32(ids, "ids");
  check_size(ids, "ids", 0, rows.size(0));
  return {rows, offsets, ids, rows.size(0), patches, rows.size(1)};
}

}  // namespace blt
