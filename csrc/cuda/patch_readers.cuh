// The pairs of patch_cross_attention: patches, of K vectors each, meet rows of bytes.
//
// Encoding, the K queries of patch p read the bytes of patches (p - window, p]. Decoding, the bytes with decode id d
// read the K vectors of patches (d - window, d]. `offsets` tells which bytes meet a patch: its own encoding, decoding
// its readers, in front, and behind those of the last patch of a document bytes that read nothing (id -1). Whatever
// offsets and ids hold, rows are rows of the tensors, and what no patch owns may be left unwritten.
//
// A warp works on units. A patch is one, with all bytes that it meets. But of a long patch each whole part
// (patch_parts.cuh) is a unit, with all vectors that meet it, and what lies before, between and behind parts is left to
// the units of patches: so none has two parts of bytes of one patch. Sums over the bytes of a vector then come from
// several units: each keeps its own in a slot, that of the part, or for a patch that of the first part of the nearest
// divided one. Slots have room for all vectors that meet a part. So that their memory does not grow with the window,
// parts do: they have 64 bytes, or 4 to 8 times the window.
#pragma once

#include "patch_parts.cuh"

namespace blt {

using Rows = RangeOf<u32>;
using Range = RangeOf<int>;

struct PatchUnit {
  int patch;      // -1: nothing to do
  Range patches;  // of the vectors
  Range bytes;
  int hole;    // the first part among the bytes begins here; their end if there is none
  int stop;    // bytes from here on read nothing
  int slot;    // of the unit's sums, where others have sums of the same vectors; else -1
  int origin;  // the patch whose vectors come first in the slot
};
inline constexpr int kNoUnit = -1;
inline constexpr int kPatchUnitWords = sizeof(PatchUnit) / sizeof(int);

// Bytes before the first unit and beyond the last have no owner.
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
  const i32* offsets;     // of the bytes of patches, or of their readers, [capacity + 1]
  const i32* cu_patches;  // of documents, [documents + 1]
  const i32* ids;         // decode ids of bytes, or their patches
  int capacity, documents, num_bytes, queries_per_patch, window, parts, log_part;  // of bytes
  bool encode;

  __device__ __forceinline__ int offset(int p) const { return min(max(offsets[p], 0), num_bytes); }
  __device__ __forceinline__ i64 num_queries() const {
    return encode ? static_cast<i64>(capacity) * queries_per_patch : num_bytes;
  }
  __device__ __forceinline__ Rows vectors(const PatchUnit& unit) const {
    return {static_cast<u32>(unit.patches.begin) * queries_per_patch,
            static_cast<u32>(unit.patches.end) * queries_per_patch};
  }

  // The first and the last patch of the document, which ends before `end`. A patch beyond the documents has its own.
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

  // The patch that may have the bytes of a part.
  __device__ __forceinline__ int patch_of(int byte) const {
    if (ids[byte] >= 0) return min(ids[byte], capacity - 1);
    // The last patch that begins here or before.
    const int patch = partition_point(0, capacity, [&](int p) { return offsets[p + 1] <= byte; });
    return min(patch, capacity - 1);
  }

  // Bytes from begin to end, and the whole parts among them if such are units of their own.
  __device__ __forceinline__ Parted parts_of(int begin, int end) const {
    return parts > 0 ? parted(RangeOf<i64>{begin, end}, log_part) : Parted{{begin, end}, {0, 0}, {end, end}};
  }

  __device__ __forceinline__ Unowned unowned() const {
    const int begin = offset(0), end = max(begin, offset(capacity));
    return {{0, static_cast<u32>(begin)}, {static_cast<u32>(end), static_cast<u32>(num_bytes)}};
  }

  // The whole parts of patch p that are units of their own.
  __device__ __forceinline__ Parted parted_patch(int p) const {
    const int begin = offset(p);
    return parts_of(begin, max(offset(p + 1), begin));
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
  // The next bytes of a unit behind the part at `hole`. Every lane has the same ones; that the compiler sees it by the
  // shuffles saves registers.
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

  // The divided patch nearest to p among those that its vectors meet; -1 if there is none.
  __device__ __forceinline__ int nearest_divided(int p, int first, int end) const {
    for (int n = 0; parts > 0 && n < end - first; ++n) {
      const int other = encode ? p - n : p + n;
      if (is_divided(other)) return other;
    }
    return -1;
  }
  // The patch whose vectors come first in the slots of parts of patch p.
  __device__ __forceinline__ int origin_of(int p) const { return encode ? p : p - window + 1; }

  // PatchUnit u but for its `stop`: patch u with all keys of its queries, or with all queries of its keys; or a part.
  template <bool kHoldsQueries>
  __device__ __forceinline__ PatchUnit unit_of(int u) const {
    PatchUnit unit = {-1, {0, 0}, {0, 0}, 0, 0, -1, 0};
    if (u == kNoUnit || u >= capacity + parts) return unit;
    const int part = u - capacity, p = part < 0 ? u : patch_of(part << log_part);
    Range own = {p, p + 1}, met = own;  // vectors by bytes: of all patches that p meets, if it meets several, one side
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

// The units of a warp that follow on each other in memory meet vectors and bytes up to these ends; else both are 0.
struct Run {
  u32 vectors_end, bytes_end;
};

// Calls f(unit, run) for the kRun units of this warp from `first` on, before `end`. Its lanes look up one each. Where
// the units follow on each other it first calls start(v, b, run) with their first vector and byte, before it waits for
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
