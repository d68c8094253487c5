// Makes the documents (documents.cuh) of a launch from the arguments of an operator.
#pragma once

#include <optional>

#include "../launch/launch.h"
#include "documents.cuh"

namespace blt {

// Without cu_seqlens it makes `num_documents` documents of the same length.
inline Documents check_documents(const Device& device, std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                 int64_t bytes) {
  STD_TORCH_CHECK(bytes <= kMaxPositions, "cu_seqlens: ", bytes, " positions do not fit into int32");
  if (cu_seqlens) {
    const int64_t count = check_num_segments(*cu_seqlens, "cu_seqlens");
    return {device.read<i32>(*cu_seqlens), count, static_cast<i32>(bytes), 0};
  }
  const i32 length = check_even_documents(num_documents, bytes);
  return {nullptr, num_documents, static_cast<i32>(bytes), length};
}

}  // namespace blt
