// Who reads whom in patch_cross_attention: blocks of consecutive queries that all read the same consecutive keys.
//
// Encoding, the K queries of patch p read the bytes of patches (p - window, p]. Decoding, the bytes with decode id d
// read the K vectors of patches (d - window, d]; these bytes lie next to each other. Either way the queries of a patch
// make one block with the keys they read, and the keys of a patch another one with the queries that read them; without
// a window the two are the same. Then long patches are divided into pieces of kPartRows bytes, each a block of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../common/check.h"
#include "support/parallel.h"

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

// Bytes of a patch: all, or a part of those of a long one, with a slot for its sums.
struct Piece {
  int64_t patch;
  Document document;
  Rows bytes;
  int64_t slot;  // -1: all
};

// A patch in several pieces: `count` slots from `slot` on.
struct Divided {
  int64_t patch, slot, count;
};

inline constexpr int64_t kPartRows = 128;  // of a piece of a patch that has more than twice as many bytes

struct Readers {
  const int32_t* offsets;     // of the bytes of patches, or of their readers with bytes behind them that read nothing
  const int32_t* cu_patches;  // of documents
  const int32_t* ids;
  int64_t capacity, documents, num_bytes, queries_per_patch, window;
  bool encode;
  std::vector<Divided> divided = {};
  std::vector<int32_t> cuts = {}, owners = {};  // of pieces, if a patch is divided
  std::vector<int64_t> slots = {};

  Rows vectors(int64_t begin, int64_t end) const { return {begin * queries_per_patch, end * queries_per_patch}; }

  // Those of the bytes that read something, or are read. Others are behind them.
  Rows reading(Rows bytes) const {
    if (encode || bytes.size() == 0 || ids[bytes.end - 1] >= 0) return bytes;
    const auto reads = [](int32_t id) { return id >= 0; };
    return {bytes.begin, std::partition_point(ids + bytes.begin, ids + bytes.end, reads) - ids};
  }
  Rows bytes(int64_t begin, int64_t end) const { return reading({offsets[begin], offsets[end]}); }

  // The queries of a piece and all the keys that they read.
  Block of_queries(const Piece& piece) const {
    const int64_t p = piece.patch, begin = std::max(piece.document.first, p - window + 1);
    if (!encode) return {reading(piece.bytes), vectors(begin, p + 1)};
    return {vectors(p, p + 1), window == 1 ? piece.bytes : bytes(begin, p + 1)};
  }

  // The keys of a piece and all the queries that read them.
  Block of_keys(const Piece& piece) const {
    const int64_t p = piece.patch, end = std::min(piece.document.last, p + window);
    if (encode) return {vectors(p, end), piece.bytes};
    return {bytes(p, end), vectors(p, p + 1)};
  }

  // Bytes of a piece that read nothing, and those of no patch.
  Rows waiting(const Piece& piece) const { return {reading(piece.bytes).end, piece.bytes.end}; }
  Rows before() const { return {0, offsets[0]}; }
  Rows beyond() const { return {offsets[capacity], num_bytes}; }

  // Divides long patches, so that threads share them, at places that depend on the patch alone.
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
        cuts.push_back(static_cast<int32_t>(byte));
        owners.push_back(static_cast<int32_t>(p));
        slots.push_back(is_long(p) ? used++ : -1);
      }
    }
    cuts.push_back(offsets[capacity]);
  }
  int64_t num_slots() const { return divided.empty() ? 0 : divided.back().slot + divided.back().count; }

  // Calls f(first, last) for runs of pieces with equal numbers of rows for the threads.
  template <class F>
  void for_each_run(int64_t grain, const F& f) const {
    const bool whole = divided.empty();
    parallel_segments(whole ? offsets : cuts.data(), whole ? capacity : static_cast<int64_t>(owners.size()), grain, f);
  }

  // Calls f(piece) for pieces first to last; a patch beyond the documents has a document of its own.
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
              : Piece{p, document, {cuts[i], cuts[i + 1]}, slots[i]});
    }
  }
};

// The ids must be those of the offsets, since blocks are found by either: encoding, bytes of patch p have id p; decoding,
// the readers of patch p have, and bytes behind those of the last patch of a document have -1, as have all others.
inline void check_ids(const Readers& r) {
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

inline Readers check_readers(Tensor& offsets, Tensor& cu_patches, Tensor& ids, const std::string& direction,
                             int64_t num_bytes, int64_t queries_per_patch, std::optional<int64_t> window) {
  STD_TORCH_CHECK(direction == "encode" || direction == "decode", "direction: expected encode or decode, got ",
                  direction);
  STD_TORCH_CHECK(queries_per_patch >= 1, "queries_per_patch: expected a value >= 1, got ", queries_per_patch);
  STD_TORCH_CHECK(!window || *window >= 1, "window: expected a value >= 1, got ", window.value_or(0));
  const int32_t* const of_bytes = check_segments(offsets, "offsets", num_bytes, direction != "decode");
  const int64_t capacity = offsets.size(0) - 1;
  const int32_t* const patches = check_offsets(cu_patches, "cu_patches", capacity);
  const int32_t* const values = check_int32(ids, "ids");
  check_size(ids, "ids", 0, num_bytes);
  Readers readers = {of_bytes,
                     patches,
                     values,
                     capacity,
                     cu_patches.size(0) - 1,
                     num_bytes,
                     queries_per_patch,
                     std::clamp<int64_t>(window.value_or(1), 1, std::max<int64_t>(1, capacity)),
                     direction == "encode"};
  check_ids(readers);
  readers.divide();
  return readers;
}

}  // namespace blt
