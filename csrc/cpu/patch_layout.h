// Builds the tensors of a PatchLayout from boundary decisions, in one pass over the bytes. PatchLayout.from_cuts
// in blt_kernels/layout.py specifies it.
//
//   boundary(t, i) -> bool: does the byte after byte t, which is byte i of its document, start a patch?
//
// It is called once for every byte of a document, in order, so a rule may keep state between calls.
// Bytes: 8 written per byte (patch_ids, decode_ids) and 8 per patch, beside what the rule reads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../common/args/entropy_patch.h"
#include "support/alloc.h"
#include "support/check_values.h"
#include "support/documents.h"

namespace blt {

// Holds the documents of a text: as given, or `num_documents` of the same length.
struct TextDocuments {
  Tensor cu_seqlens, made;  // `made` is empty if cu_seqlens was given

  TextDocuments(const Tensor& given) : cu_seqlens(given), made(new_output(given, {0})) {}
  TextDocuments(const std::optional<Tensor>& given, int64_t num_documents, const Tensor& like, int64_t num_bytes)
      : cu_seqlens(document_offsets(given, num_documents, like, num_bytes)),
        made(given ? new_output(like, {0}, ScalarType::Int) : cu_seqlens) {}
};

// Returns decisions about all bytes, bool [num_bytes]. decide(b, begin, end, decisions) makes those of document b,
// which is bytes [begin, end).
template <class Decide>
Tensor decisions_of(const TextDocuments& text, int64_t num_bytes, const Decide& decide) {
  Tensor cu_seqlens = text.cu_seqlens;
  const int32_t* const documents = check_offsets(cu_seqlens, "cu_seqlens", num_bytes);
  Tensor decisions = new_output(cu_seqlens, {num_bytes}, ScalarType::Bool);
  bool* const starts_after = decisions.mutable_data_ptr<bool>();
  for (int64_t b = 0; b + 1 < cu_seqlens.size(0); ++b) decide(b, documents[b], documents[b + 1], starts_after);
  return decisions;
}

template <class Boundary>
LayoutTensors build_layout(const TextDocuments& text, int64_t num_bytes, std::optional<int64_t> max_patches,
                           Boundary boundary) {
  Tensor cu_seqlens = text.cu_seqlens;
  const int32_t* const documents = check_offsets(cu_seqlens, "cu_seqlens", num_bytes);
  const int64_t num_documents = cu_seqlens.size(0) - 1;
  const int64_t capacity = check_capacity(max_patches, num_bytes);
  int64_t occupied = 0;  // documents from the current one on that are not empty: each needs a patch
  for (int64_t b = 0; b < num_documents; ++b) occupied += documents[b] < documents[b + 1];
  STD_TORCH_CHECK(capacity >= occupied, "max_patches: expected at least one patch a document (", occupied, "), got ",
                  capacity);

  Tensor patch_offsets = new_output(cu_seqlens, {capacity + 1});
  Tensor cu_patches = new_output(cu_seqlens, {num_documents + 1});
  Tensor patch_ids = new_output(cu_seqlens, {num_bytes});
  Tensor decode_ids = new_output(cu_seqlens, {num_bytes});
  Tensor decode_offsets = new_output(cu_seqlens, {capacity + 1});
  Tensor overflowed = new_output(cu_seqlens, {1}, ScalarType::Bool);
  int32_t* const offsets = patch_offsets.mutable_data_ptr<int32_t>();
  int32_t* const patches = cu_patches.mutable_data_ptr<int32_t>();
  int32_t* const ids = patch_ids.mutable_data_ptr<int32_t>();
  int32_t* const decodes = decode_ids.mutable_data_ptr<int32_t>();
  int32_t* const readers = decode_offsets.mutable_data_ptr<int32_t>();

  bool any_dropped = false;
  int32_t next = 0;  // is the next patch
  patches[0] = 0;
  for (int64_t b = 0; b < num_documents; ++b) {
    const int64_t begin = documents[b], end = documents[b + 1];
    if (begin < end) {
      --occupied;
      const int32_t first = next, limit = static_cast<int32_t>(capacity - occupied);
      // `patch` counts every start of the rule; the minima drop those from `limit` on. Nothing branches on a decision,
      // which no branch predictor could predict.
      int32_t patch = first;
      offsets[first] = static_cast<int32_t>(begin);
      for (int64_t t = begin; t < end - 1; ++t) {
        const bool wanted = boundary(t, t - begin);
        ids[t] = std::min(patch, limit - 1);
        offsets[std::min(patch + 1, limit)] = static_cast<int32_t>(t + 1);  // is overwritten if no patch starts there
        patch += wanted;
      }
      const bool dropped = patch >= limit;
      patch = std::min(patch, limit - 1);
      ids[end - 1] = patch;
      // It is the patch before the next byte's, or -1 if that is not in the document.
      const auto decode_id = [first](int32_t next_patch) { return next_patch > first ? next_patch - 1 : -1; };
      std::transform(ids + begin + 1, ids + end, decodes + begin, decode_id);
      const bool opens = boundary(end - 1, end - 1 - begin) & !dropped;
      decodes[end - 1] = decode_id(patch + opens);
      // The last byte of a patch is the first that reads it, unless no patch starts after the document's last byte.
      std::transform(offsets + first + 1, offsets + patch + 1, readers + first,
                     [](int32_t start) { return start - 1; });
      readers[patch] = static_cast<int32_t>(end) - opens;
      any_dropped |= dropped;
      next = patch + 1;
    }
    patches[b + 1] = next;
  }
  const int32_t end = documents[num_documents];
  std::fill(offsets + next, offsets + capacity + 1, end);
  std::fill(readers + next, readers + capacity + 1, end);
  std::fill(ids + end, ids + num_bytes, -1);
  std::fill(decodes + end, decodes + num_bytes, -1);
  *overflowed.mutable_data_ptr<bool>() = any_dropped;
  return {patch_offsets, cu_patches, patch_ids, decode_ids, decode_offsets, overflowed, text.made};
}

}  // namespace blt
