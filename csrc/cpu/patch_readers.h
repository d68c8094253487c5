// Who reads whom in patch_cross_attention: blocks of consecutive queries that all read the same consecutive keys.
//
// Encoding, the K queries of patch p read the bytes of patches (p - window, p]. Decoding, the bytes with decode id d
// read the K vectors of patches (d - window, d]; these bytes lie next to each other. Either way the queries of a patch
// make one block with the keys they read, and the keys of a patch another one with the queries that read them; without
// a window the two are the same.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>

#include "../common/check.h"
#include "../common/parallel.h"

namespace blt {

struct Rows {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct Block {
  Rows queries, keys;
};

// The patches of one document: [first, last).
struct Document {
  int64_t first, last;
};

struct Readers {
  const int32_t* offsets;     // of patches
  const int32_t* cu_patches;  // of documents
  const int32_t* ids;
  int64_t capacity, documents, num_bytes, queries_per_patch, window;
  bool encode;

  Rows vectors(int64_t begin, int64_t end) const { return {begin * queries_per_patch, end * queries_per_patch}; }

  // The first byte of a document that may read patch p or a later one: one of the patch's own bytes, if any.
  int64_t first_reader(int64_t p, const Document& document) const {
    return p == document.last ? offsets[p] : std::lower_bound(ids + offsets[p], ids + offsets[p + 1], p) - ids;
  }
  Rows readers(int64_t begin, int64_t end, const Document& document) const {
    return {first_reader(begin, document), first_reader(end, document)};
  }

  // The queries of patch p and all the keys that they read.
  Block of_queries(int64_t p, const Document& document) const {
    const int64_t begin = std::max(document.first, p - window + 1);
    if (encode) return {vectors(p, p + 1), {offsets[begin], offsets[p + 1]}};
    return {readers(p, p + 1, document), vectors(begin, p + 1)};
  }

  // The keys of patch p and all the queries that read them.
  Block of_keys(int64_t p, const Document& document) const {
    const int64_t end = std::min(document.last, p + window);
    if (encode) return {vectors(p, end), {offsets[p], offsets[p + 1]}};
    return {readers(p, end, document), vectors(p, p + 1)};
  }

  // Bytes before the first patch of a document is complete: decoding, they read nothing.
  Rows waiting(const Document& document) const {
    return {offsets[document.first], encode ? offsets[document.first] : first_reader(document.first, document)};
  }

  // Calls f(first, last) for runs of patches with equal numbers of rows for the threads.
  template <class F>
  void for_each_run(int64_t grain, const F& f) const {
    parallel_segments(offsets, capacity, grain, f);
  }

  // Calls f(patch, document) for patches first to last; one beyond the documents has a document of its own.
  template <class F>
  void for_each_patch(int64_t first, int64_t last, const F& f) const {
    int64_t b = std::upper_bound(cu_patches + 1, cu_patches + documents + 1, first) - cu_patches - 1;
    for (int64_t p = first; p < last; ++p) {
      while (b < documents && cu_patches[b + 1] <= p) ++b;
      f(p, b < documents ? Document{cu_patches[b], cu_patches[b + 1]} : Document{p, p + 1});
    }
  }
};

// The ids must be those of the offsets, since blocks are found by either: encoding, byte t of patch p has id p;
// decoding, p or that of the patch before, -1 if there is none in the document, and they never fall within a document.
inline void check_ids(const Readers& r) {
  bool valid = r.offsets[r.capacity] == r.offsets[r.cu_patches[r.documents]];
  r.for_each_patch(0, r.cu_patches[r.documents], [&](int64_t p, const Document& document) {
    const int32_t own = static_cast<int32_t>(p), before = p == document.first ? -1 : own - 1;
    bool risen = r.encode;
    for (int64_t t = r.offsets[p]; t < r.offsets[p + 1]; ++t) {
      valid &= (r.ids[t] == own) | (!risen & (r.ids[t] == before));
      risen |= r.ids[t] == own;
    }
  });
  for (int64_t t = r.offsets[r.capacity]; t < r.num_bytes; ++t) valid &= r.ids[t] == -1;
  STD_TORCH_CHECK(valid, "ids: expected the ", r.encode ? "patch" : "decode",
                  " ids that belong to patch_offsets and cu_patches");
}

inline Readers check_readers(Tensor& patch_offsets, Tensor& cu_patches, Tensor& ids, const std::string& direction,
                             int64_t num_bytes, int64_t queries_per_patch, std::optional<int64_t> window) {
  STD_TORCH_CHECK(direction == "encode" || direction == "decode", "direction: expected encode or decode, got ",
                  direction);
  STD_TORCH_CHECK(queries_per_patch >= 1, "queries_per_patch: expected a value >= 1, got ", queries_per_patch);
  STD_TORCH_CHECK(!window || *window >= 1, "window: expected a value >= 1, got ", window.value_or(0));
  const int32_t* const offsets = check_offsets(patch_offsets, "patch_offsets", num_bytes);
  const int64_t capacity = patch_offsets.size(0) - 1;
  const int32_t* const patches = check_offsets(cu_patches, "cu_patches", capacity);
  const int32_t* const values = check_int32(ids, "ids");
  check_size(ids, "ids", 0, num_bytes);
  const Readers readers = {offsets,
                           patches,
                           values,
                           capacity,
                           cu_patches.size(0) - 1,
                           num_bytes,
                           queries_per_patch,
                           std::clamp<int64_t>(window.value_or(1), 1, std::max<int64_t>(1, capacity)),
                           direction == "encode"};
  check_ids(readers);
  return readers;
}

}  // namespace blt
