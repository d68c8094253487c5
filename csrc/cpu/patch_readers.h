// The queries and keys that meet in patch_cross_attention: consecutive queries that all read the same consecutive keys.
//
// Encoding, the K queries of patch p read the bytes of patches (p - window, p]. Decoding, the bytes with decode id d
// read the K vectors of patches (d - window, d]; these bytes are neighbours. In both directions the queries of a patch
// and the keys that they read make a tile, and the keys of a patch and the queries that read them make another; without
// a window the two are the same. Long patches are divided into pieces of kPartRows bytes, each with tiles of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../common/args/patch_cross_attention.h"
#include "support/check_values.h"
#include "support/parallel.h"

namespace blt {

struct Rows {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Queries that all read these keys.
struct QueryKeys {
  Rows queries, keys;
};

// The patches of one document: [first, last).
struct Document {
  int64_t first, last;
};

// The bytes of a patch, or some of the bytes of a long patch with a slot for their sums.
struct Piece {
  int64_t patch;
  Document document;
  Rows bytes;
  int64_t slot;  // -1 for a whole patch
};

// A patch in `count` pieces, with slots from `slot` on.
struct Divided {
  int64_t patch, slot, count;
};

inline constexpr int64_t kPartRows = 128;  // bytes per piece of a patch with more than twice as many

struct PatchReaders {
  const int32_t* offsets;     // of the bytes of patches, or of their readers and the bytes after them that read nothing
  const int32_t* cu_patches;  // of documents
  const int32_t* ids;
  int64_t capacity, documents, num_bytes, queries_per_patch, window;
  bool encode;
  std::vector<Divided> divided = {};
  std::vector<int32_t> piece_offsets = {}, owners = {};  // of pieces, if a patch is divided
  std::vector<int64_t> slots = {};

  Rows vectors(int64_t begin, int64_t end) const { return {begin * queries_per_patch, end * queries_per_patch}; }

  // The bytes that read a patch or are read; the others follow them.
  Rows reading(Rows bytes) const {
    if (encode || bytes.size() == 0 || ids[bytes.end - 1] >= 0) return bytes;
    const auto reads = [](int32_t id) { return id >= 0; };
    return {bytes.begin, std::partition_point(ids + bytes.begin, ids + bytes.end, reads) - ids};
  }
  Rows bytes(int64_t begin, int64_t end) const { return reading({offsets[begin], offsets[end]}); }

  // The queries of a piece and all the keys that they read.
  QueryKeys of_queries(const Piece& piece) const {
    const int64_t p = piece.patch, begin = std::max(piece.document.first, p - window + 1);
    if (!encode) return {reading(piece.bytes), vectors(begin, p + 1)};
    return {vectors(p, p + 1), window == 1 ? piece.bytes : bytes(begin, p + 1)};
  }

  // The keys of a piece and all the queries that read them.
  QueryKeys of_keys(const Piece& piece) const {
    const int64_t p = piece.patch, end = std::min(piece.document.last, p + window);
    if (encode) return {vectors(p, end), piece.bytes};
    return {bytes(p, end), vectors(p, p + 1)};
  }

  // Bytes of a piece that read nothing, and bytes before and after all patches.
  Rows waiting(const Piece& piece) const { return {reading(piece.bytes).end, piece.bytes.end}; }
  Rows before() const { return {0, offsets[0]}; }
  Rows beyond() const { return {offsets[capacity], num_bytes}; }

  // Divides long patches among threads, at places that depend on the patch alone.
  void divide() {
    if (window > 1) return;
    const auto is_long = [&](int64_t p) { return offsets[p + 1] - offsets[p] > 2 * kPartRows; };
    bool any = false;
    for (int64_t p = 0; p < capacity; ++p) any |= is_long(p);
    if (!any) return;
    int64_t used = 0;
    for (int64_t p = 0; p < capacity; ++p) {
      const int64_t step = is_long(p) ? kPartRows : std::max(offsets[p + 1] - offsets[p], 1);
      if (is_long(p)) divided.push_back({p, used, (offsets[p + 1] - offsets[p] + step - 1) / step});
      for (int64_t byte = offsets[p]; byte == offsets[p] || byte < offsets[p + 1]; byte += step) {
        piece_offsets.push_back(static_cast<int32_t>(byte));
        owners.push_back(static_cast<int32_t>(p));
        slots.push_back(is_long(p) ? used++ : -1);
      }
    }
    piece_offsets.push_back(offsets[capacity]);
  }
  int64_t num_slots() const { return divided.empty() ? 0 : divided.back().slot + divided.back().count; }

  // Calls f(first, last) for runs of pieces, with equal numbers of bytes per thread.
  template <class F>
  void for_each_run(int64_t grain, const F& f) const {
    const bool whole = divided.empty();
    parallel_segments(whole ? offsets : piece_offsets.data(), whole ? capacity : static_cast<int64_t>(owners.size()),
                      grain, f);
  }

  // Calls f(piece) for pieces [first, last). A patch beyond the documents has a document of its own.
  template <class F>
  void for_each_piece(int64_t first, int64_t last, const F& f) const {
    const bool whole = divided.empty();
    int64_t b =
        std::upper_bound(cu_patches + 1, cu_patches + documents + 1, whole ? first : owners[first]) - cu_patches - 1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t p = whole ? i : owners[i];
      while (b < documents && cu_patches[b + 1] <= p) ++b;
      const Document document = b < documents ? Document{cu_patches[b], cu_patches[b + 1]} : Document{p, p + 1};
      f(whole ? Piece{p, document, {offsets[p], offsets[p + 1]}, -1}
              : Piece{p, document, {piece_offsets[i], piece_offsets[i + 1]}, slots[i]});
    }
  }
};

// The ids must agree with the offsets, since pieces are found by either. Encoding, bytes of patch p have id p.
// Decoding, the readers of patch p have id p, and the bytes after those of the last patch of a document have -1. All
// other bytes have -1.
inline void check_ids(const PatchReaders& r) {
  bool valid = r.offsets[r.capacity] == r.offsets[r.cu_patches[r.documents]];
  r.for_each_piece(0, r.capacity, [&](const Piece& piece) {
    const int32_t own = static_cast<int32_t>(piece.patch);
    const bool may_wait = !r.encode && piece.patch + 1 == piece.document.last;
    bool waits = false;
    for (int64_t t = piece.bytes.begin; t < piece.bytes.end; ++t) {
      waits |= may_wait & (r.ids[t] == -1);
      valid &= r.ids[t] == (waits ? -1 : own);
    }
  });
  for (const Rows rows : {r.before(), r.beyond()})
    for (int64_t t = rows.begin; t < rows.end; ++t) valid &= r.ids[t] == -1;
  STD_TORCH_CHECK(valid, "ids: expected the ", r.encode ? "patch" : "decode",
                  " ids that belong to offsets and cu_patches");
}

inline PatchReaders check_readers(const CrossArguments& arguments) {
  Tensor offsets = arguments.offsets, cu_patches = arguments.cu_patches;
  PatchReaders readers = {check_segments(offsets, "offsets", arguments.num_bytes, arguments.encode),
                          check_offsets(cu_patches, "cu_patches", arguments.capacity),
                          arguments.ids.const_data_ptr<int32_t>(),
                          arguments.capacity,
                          arguments.documents,
                          arguments.num_bytes,
                          arguments.queries_per_patch,
                          arguments.window,
                          arguments.encode};
  check_ids(readers);
  readers.divide();
  return readers;
}

}  // namespace blt
