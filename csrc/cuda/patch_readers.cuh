// Finds the pairs of patch_cross_attention: patches, of K vectors each, meet rows of bytes.
//
// Encoding, the K queries of patch p read the bytes of patches (p - window, p]. Decoding, the bytes with decode id d
// read the K vectors of patches (d - window, d]. `offsets` says which bytes meet a patch: encoding its own, decoding
// first its readers, then, for the last patch of a document, bytes that read nothing (id -1). Whatever offsets and ids
// hold, rows are rows of the tensors, and what no patch owns may be left unwritten.
//
// A warp works on units. A patch is a unit, with all bytes that it meets. In a long patch each whole part
// (patch_parts.cuh) is a unit of its own, with all vectors that meet it, and units of patches have the bytes before,
// between and behind parts, so that no unit grows with the length of a patch. Sums over the bytes of a vector then come
// from several units. Each stores its own in a slot: that of the part, or for a patch that of the first part of the
// nearest divided patch. Slots have room for all vectors that meet a part. Parts grow with the window, so that the
// memory of slots does not: they have 64 bytes, or 4 to 8 times the window.
#pragma once

#include "patch_parts.cuh"

namespace blt {

using Rows = RangeOf<u32>;
using Range = RangeOf<int>;

struct PatchUnit {
  int patch;      // is -1 if there is nothing to do
  Range patches;  // have the vectors
  Range bytes;
  int hole;    // is where the first part among the bytes begins, or their end
  int stop;    // bytes from here on read nothing
  int slot;    // holds the unit's sums, or is -1 where no other unit has sums of the same vectors
  int origin;  // is the patch whose vectors come first in the slot
};
inline constexpr int kNoUnit = -1;
inline constexpr int kPatchUnitWords = sizeof(PatchUnit) / sizeof(int);

// Bytes before the first unit and beyond the last one have no owner.
struct Unowned {
  Rows before, beyond;
};

// These two functions split bytes of a unit into those that read or are read, and those that read nothing.
__device__ __forceinline__ Rows reading(const Range& bytes, int stop) {
  return {static_cast<u32>(bytes.begin), static_cast<u32>(min(bytes.end, stop))};
}
__device__ __forceinline__ Rows waiting(const Range& bytes, int stop) {
  return {static_cast<u32>(max(bytes.begin, stop)), static_cast<u32>(bytes.end)};
}

struct PatchReaders {
  const i32* offsets;     // [capacity + 1], of the bytes of patches, or of their readers
  const i32* cu_patches;  // [documents + 1]
  const i32* ids;         // [num_bytes], the patches of bytes, or their decode ids
  int capacity, documents, num_bytes, queries_per_patch, window, parts, log_part;
  bool encode;

  __device__ __forceinline__ int offset(int p) const { return min(max(offsets[p], 0), num_bytes); }
  __device__ __forceinline__ i64 num_queries() const {
    return encode ? static_cast<i64>(capacity) * queries_per_patch : num_bytes;
  }
  __device__ __forceinline__ Rows vectors(const PatchUnit& unit) const {
    return {static_cast<u32>(unit.patches.begin) * queries_per_patch,
            static_cast<u32>(unit.patches.end) * queries_per_patch};
  }

  // Sets the range of patches [first, end) of p's document. A patch beyond the documents has one of its own.
  __device__ __forceinline__ void document_of(int p, int& first, int& end) const {
    const int b = partition_point(0, documents, [&](int i) { return cu_patches[i + 1] <= p; });
    first = b < documents ? min(max(cu_patches[b], 0), p) : p;
    end = b < documents ? min(max(cu_patches[b + 1], p + 1), capacity) : p + 1;
  }

  // Returns the end of the bytes in [begin, end) that read something.
  __device__ __forceinline__ int stop_of(int begin, int end) const {
    if (encode || begin >= end || ids[end - 1] >= 0) return end;
    return partition_point(begin, end - 1, [&](int i) { return ids[i] >= 0; });
  }

  // Returns the only patch that may have all bytes of the part with this first byte.
  __device__ __forceinline__ int patch_of(int byte) const {
    if (ids[byte] >= 0) return min(ids[byte], capacity - 1);
    // This is the last patch that begins here or before.
    const int patch = partition_point(0, capacity, [&](int p) { return offsets[p + 1] <= byte; });
    return min(patch, capacity - 1);
  }

  __device__ __forceinline__ Unowned unowned() const {
    const int begin = offset(0), end = max(begin, offset(capacity));
    return {{0, static_cast<u32>(begin)}, {static_cast<u32>(end), static_cast<u32>(num_bytes)}};
  }

  // Divides the bytes of patch p. It has no parts if they are not units of their own.
  __device__ __forceinline__ Parted parted_patch(int p) const {
    const int begin = offset(p), end = max(offset(p + 1), begin);
    return parts > 0 ? parted(RangeOf<i64>{begin, end}, log_part) : Parted{{begin, end}, {0, 0}, {end, end}};
  }
  __device__ __forceinline__ bool is_divided(int p) const {
    const Parted own = parted_patch(p);
    return own.parts.begin < own.parts.end;
  }
  // Returns the beginning of the first part among the bytes of patches [p, end), or the end of these bytes.
  __device__ __forceinline__ int first_hole(int p, int end, int bytes_end) const {
    for (; parts > 0 && p < end && offset(p) < bytes_end; ++p) {
      const Parted own = parted_patch(p);
      if (own.parts.begin < own.parts.end) return min(static_cast<int>(own.before.end), bytes_end);
    }
    return bytes_end;
  }
  // Returns the next bytes of a unit behind the part at `hole`. Every lane has the same ones; the shuffles tell the
  // compiler so, which saves registers.
  __device__ __forceinline__ Range behind_hole(const PatchUnit& unit, int hole) const {
    const int p = patch_of(hole), end = static_cast<int>(parted_patch(p).behind.begin);
    const int begin = min(max(end, hole + (1 << log_part)), unit.bytes.end);
    const int next_hole = max(begin, first_hole(p + 1, capacity, unit.bytes.end));
    return {__shfl_sync(kAllLanes, begin, 0), __shfl_sync(kAllLanes, next_hole, 0)};
  }

  // Calls f(range) for the bytes of a unit before, between and behind parts.
  template <class F>
  __device__ __forceinline__ void for_each_range(const PatchUnit& unit, F&& f) const {
#pragma unroll 1
    for (Range range = {unit.bytes.begin, unit.hole};; range = behind_hole(unit, range.end)) {
      f(range);
      if (range.end >= unit.bytes.end) return;
    }
  }
  // Calls f(rows) for the vectors of a unit, or for those of its bytes that read or are read.
  template <class F>
  __device__ __forceinline__ void for_each_rows(const PatchUnit& unit, bool of_vectors, F&& f) const {
#pragma unroll 1
    for (Range range = {unit.bytes.begin, unit.hole};; range = behind_hole(unit, range.end)) {
      f(of_vectors ? vectors(unit) : reading(range, unit.stop));
      if (of_vectors || range.end >= unit.bytes.end) return;
    }
  }

  // Returns the divided patch nearest to p among those that its vectors meet, or -1 if there is none.
  __device__ __forceinline__ int nearest_divided(int p, int first, int end) const {
    for (int n = 0; parts > 0 && n < end - first; ++n) {
      const int other = encode ? p - n : p + n;
      if (is_divided(other)) return other;
    }
    return -1;
  }
  // Returns the patch whose vectors come first in the slots of parts of patch p.
  __device__ __forceinline__ int origin_of(int p) const { return encode ? p : p - window + 1; }

  // Returns unit u without its `stop`: patch u with all keys of its queries or all queries of its keys, or a part.
  template <bool kHoldsQueries>
  __device__ __forceinline__ PatchUnit unit_of(int u) const {
    PatchUnit unit = {-1, {0, 0}, {0, 0}, 0, 0, -1, 0};
    if (u == kNoUnit || u >= capacity + parts) return unit;
    const int part = u - capacity, p = part < 0 ? u : patch_of(part << log_part);
    // One side of the unit is of patch p alone; the other may be of several patches that p meets.
    Range own = {p, p + 1}, met = own;
    if (window > 1) {
      document_of(p, met.begin, met.end);
      if (encode != (part < 0 && kHoldsQueries == encode))
        met = {p, static_cast<int>(min<i64>(met.end, static_cast<i64>(p) + window))};
      else
        met = {max(met.begin, p - window + 1), p + 1};
    }
    if (part >= 0) {
      const Parted bytes = parted_patch(p);
      if (part < bytes.parts.begin || bytes.parts.end <= part) return unit;
      unit.patch = p, unit.patches = met, unit.slot = part, unit.origin = origin_of(p);
      unit.bytes = {part << log_part, (part + 1) << log_part}, unit.hole = unit.bytes.end;
      return unit;
    }
    const bool meets_bytes = kHoldsQueries == encode;
    unit.patch = p, unit.patches = meets_bytes ? own : met;
    const Range patches = meets_bytes ? met : own;
    unit.bytes.begin = offset(patches.begin), unit.bytes.end = max(offset(patches.end), unit.bytes.begin);
    unit.hole = first_hole(patches.begin, patches.end, unit.bytes.end);
    if (unit.hole < unit.bytes.end) {
      const int nearest = max(nearest_divided(p, patches.begin, patches.end), 0);
      unit.slot = parts + min(static_cast<int>(parted_patch(nearest).parts.begin), parts - 1);
      unit.origin = origin_of(nearest);
    }
    return unit;
  }
};

// If the units of a warp are neighbours in memory, they meet vectors and bytes up to these ends; else both are 0.
struct Run {
  u32 vectors_end, bytes_end;
};

// Calls f(unit, run) for the kRun units of this warp from `first` on, before `end`. Its lanes look up one each. If the
// units are neighbours in memory it first calls start(v, b, run) with their first vector and byte, before it waits for
// the ids of bytes.
template <bool kHoldsQueries, int kRun, class Start, class F>
__device__ __forceinline__ void for_each_unit(const PatchReaders& readers, int first, int end, Start&& start, F&& f) {
  const int place = static_cast<int>(threadIdx.x) % kRun;
  union Words {
    PatchUnit unit;
    int words[kPatchUnitWords];
  };
  Words mine = {readers.unit_of<kHoldsQueries>(first + place < end ? first + place : kNoUnit)};
  PatchUnit& unit = mine.unit;
  const auto follows = [&](const Range& own) {
    const int begin = __shfl_up_sync(kAllLanes, own.begin, 1), end = __shfl_up_sync(kAllLanes, own.end, 1);
    return place == 0 || (begin <= own.begin && own.begin <= end && end <= own.end);
  };
  const bool whole = unit.patch >= 0 && unit.hole == unit.bytes.end;
  const bool regular = __all_sync(kAllLanes, whole & follows(unit.bytes) & follows(unit.patches));
  const Rows vectors = readers.vectors(unit);
  Run run = {0, 0};
  if (regular) {
    run = {__shfl_sync(kAllLanes, vectors.end, kRun - 1),
           __shfl_sync(kAllLanes, static_cast<u32>(unit.bytes.end), kRun - 1)};
    start(__shfl_sync(kAllLanes, vectors.begin, 0), __shfl_sync(kAllLanes, static_cast<u32>(unit.bytes.begin), 0), run);
  }
  unit.stop = readers.stop_of(unit.bytes.begin, unit.bytes.end);
#pragma unroll 1
  for (int i = 0; i < kRun; ++i) {
    Words next;
#pragma unroll
    for (int w = 0; w < kPatchUnitWords; ++w) next.words[w] = __shfl_sync(kAllLanes, mine.words[w], i);
    if (next.unit.patch >= 0) f(next.unit, run);
  }
}

}  // namespace blt
