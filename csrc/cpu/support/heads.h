// Allocates results for tensors of heads on the CPU.
#pragma once

#include <utility>
#include <vector>

#include "../../common/args/heads.h"
#include "alloc.h"

namespace blt {

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t dim = 0; dim < x.dim(); ++dim) sizes[dim] = x.size(dim);
  return sizes;
}

// Allocates a contiguous tensor of the sizes of x, without the last `without` ones.
inline Tensor new_like(const Tensor& x, size_t without = 0, std::optional<ScalarType> dtype = std::nullopt) {
  const std::vector<int64_t> sizes = sizes_of(x);
  return new_output(x, {sizes.data(), sizes.size() - without}, dtype);
}

// Allocates the gradient of x.
inline Tensor new_gradient(const Tensor& x) {
  if (!heads_outside(x)) return new_like(x);
  std::vector<int64_t> sizes = sizes_of(x);
  std::swap(sizes[1], sizes[2]);
  return torch::stable::transpose(new_output(x, {sizes.data(), sizes.size()}), 1, 2);
}

}  // namespace blt
