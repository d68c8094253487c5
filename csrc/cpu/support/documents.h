// Finds the documents of packed data on the CPU: as given, or all of the same length.
#pragma once

#include <optional>

#include "../../common/check.h"
#include "alloc.h"

namespace blt {

// Returns `given`, or the offsets of `num_documents` documents of the same length that fill `total` positions.
inline Tensor document_offsets(const std::optional<Tensor>& given, int64_t num_documents, const Tensor& like,
                               int64_t total) {
  if (given) return *given;
  const int32_t length = check_even_documents(num_documents, total);
  Tensor offsets = new_output(like, {num_documents + 1}, ScalarType::Int);
  int32_t* const values = offsets.mutable_data_ptr<int32_t>();
  for (int64_t b = 0; b <= num_documents; ++b) values[b] = static_cast<int32_t>(b * length);
  return offsets;
}

}  // namespace blt
