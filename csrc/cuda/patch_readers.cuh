// Who reads whom in patch_cross_attention: patches, of K vectors each, meet rows of bytes.
//
// Encoding, the K queries of patch p read the bytes of patches (p - window, p]. Decoding, the bytes with decode id d
// read the K vectors of patches (d - window, d]. `offsets` tells which bytes meet a patch: its own encoding, decoding its
// readers, in front, and behind those of the last patch of a document bytes that read nothing (id -1). Whatever offsets
// and ids hold, rows are rows of the tensors, and what no patch owns may be left unwritten.
//
// A warp works on units. A patch is one, with all its bytes. But of a long one each whole part (patch_parts.cuh) is a unit,
// and that of the patch has only the bytes before and behind its parts. So no unit has 2 kPart bytes, but for those of a
// window, which are not divided.
#pragma once

#include "patch_parts.cuh"

namespace blt {

struct Rows {
  u32 begin, end;
  __device__ __forceinline__ u32 size() const { return begin < end ? end - begin : 0; }
};
struct Range {
  int begin, end;
};

struct PatchUnit {
  int patch;          // -1: nothing to do
  Range patches;      // of the vectors
  Range front, back;  // bytes
  int stop;           // bytes from here on read nothing
  int slot;           // of the unit's sums, where its patch has several units; else -1
};
inline constexpr int kNoUnit = -1;
inline constexpr int kPatchUnitWords = sizeof(PatchUnit) / sizeof(int);

// Bytes before the first unit and beyond the last have no owner.
struct Unowned {
  Rows before, beyond;
};

// Of some bytes of a unit those that read or are read, and those that read nothing.
__device__ __forceinline__ Rows reading(const Range& bytes, int stop) {
  return {static_cast<u32>(bytes.begin), static_cast<u32>(least(bytes.end, stop))};
}
__device__ __forceinline__ Rows waiting(const Range& bytes, int stop) {
  return {static_cast<u32>(most(bytes.begin, stop)), static_cast<u32>(bytes.end)};
}

struct PatchReaders {
  const i32* offsets;     // of the bytes of patches, or of their readers, [capacity + 1]
  const i32* cu_patches;  // of documents, [documents + 1]
  const i32* ids;         // decode ids of bytes, or their patches
  int capacity, documents, num_bytes, queries_per_patch, window, parts;
  bool encode;

  __device__ __forceinline__ int offset(int p) const { return least(most(offsets[p], 0), num_bytes); }
  __device__ __forceinline__ i64 num_queries() const {
    return encode ? static_cast<i64>(capacity) * queries_per_patch : num_bytes;
  }
  __device__ __forceinline__ Rows vectors(const PatchUnit& unit) const {
    return {static_cast<u32>(unit.patches.begin) * queries_per_patch,
            static_cast<u32>(unit.patches.end) * queries_per_patch};
  }

  // The first and the last patch of the document, which ends before `end`. A patch beyond the documents has its own.
  __device__ __forceinline__ void document_of(int p, int& first, int& end) const {
    int low = 0, high = documents;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (cu_patches[middle + 1] <= p)
        low = middle + 1;
      else
        high = middle;
    }
    first = low < documents ? least(most(cu_patches[low], 0), p) : p;
    end = low < documents ? least(most(cu_patches[low + 1], p + 1), capacity) : p + 1;
  }

  // Where the bytes from begin to end that read something stop.
  __device__ __forceinline__ int stop_of(int begin, int end) const {
    if (encode || begin >= end || ids[end - 1] >= 0) return end;
    int low = begin, high = end - 1;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (ids[middle] >= 0)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // The patch that may have the bytes of a part.
  __device__ __forceinline__ int patch_of(int byte) const {
    if (ids[byte] >= 0) return least(ids[byte], capacity - 1);
    int low = 0, high = capacity;  // the last one that begins here or before
    while (low < high) {
      const int middle = (low + high) / 2;
      if (offsets[middle + 1] <= byte)
        low = middle + 1;
      else
        high = middle;
    }
    return least(low, capacity - 1);
  }

  // Bytes from begin to end, and the whole parts among them if such are units of their own.
  __device__ __forceinline__ Parted parts_of(int begin, int end) const {
    return parts > 0 ? parted(RangeOf<i64>{begin, end}) : Parted{{begin, end}, {0, 0}, {end, end}};
  }

  __device__ __forceinline__ Unowned unowned() const {
    const int begin = offset(0), end = most(begin, offset(capacity));
    return {{0, static_cast<u32>(begin)}, {static_cast<u32>(end), static_cast<u32>(num_bytes)}};
  }

  // PatchUnit u but for its `stop`: patch u with all keys of its queries, or with all queries of its keys; or a part.
  template <bool kHoldsQueries>
  __device__ __forceinline__ PatchUnit unit_of(int u) const {
    PatchUnit unit = {-1, {0, 0}, {0, 0}, {0, 0}, 0, -1};
    if (u == kNoUnit || u >= capacity + parts) return unit;
    const int part = u - capacity, p = part < 0 ? u : patch_of(part * kPart);
    int first = p, end = p + 1, meets = p, meets_end = p + 1;
    if (window > 1) {
      document_of(p, first, end);
      first = kHoldsQueries ? most(first, p - window + 1) : p;
      end = kHoldsQueries ? p + 1 : static_cast<int>(least<i64>(end, static_cast<i64>(p) + window));
    }
    if (kHoldsQueries == encode) meets = first, meets_end = end, first = p, end = p + 1;
    const int begin = offset(meets), behind = most(offset(meets_end), begin);
    const Parted bytes = parts_of(begin, behind);
    const bool divided = bytes.parts.begin < bytes.parts.end;
    unit.patches.begin = first, unit.patches.end = end;
    if (part < 0) {
      unit.patch = p;
      unit.front.begin = begin, unit.front.end = static_cast<int>(bytes.before.end);
      unit.back.begin = static_cast<int>(bytes.behind.begin), unit.back.end = behind;
      if (divided) unit.slot = parts + static_cast<int>(bytes.parts.begin);
    } else if (bytes.parts.begin <= part && part < bytes.parts.end) {
      unit.patch = p, unit.slot = part;
      unit.front.begin = part * kPart, unit.front.end = unit.front.begin + kPart;
    }
    return unit;
  }
};

// The units of a warp that follow on each other in memory meet vectors and bytes up to these ends; else both are 0.
struct Run {
  u32 vectors_end, bytes_end;
};

// Calls f(unit, run) for the kRun units of this warp from `first` on, before `end`. Its lanes look up one each. Where the
// units follow on each other it first calls start(v, b, run) with their first vector and byte, before it waits for the
// ids of bytes.
template <bool kHoldsQueries, int kRun, class Start, class F>
__device__ __forceinline__ void for_each_unit(const PatchReaders& readers, int first, int end, Start&& start, F&& f) {
  const int place = static_cast<int>(threadIdx.x) % kRun;
  union Words {
    PatchUnit unit;
    int words[kPatchUnitWords];
  };
  Words mine = {readers.unit_of<kHoldsQueries>(first + place < end ? first + place : kNoUnit)};
  PatchUnit& unit = mine.unit;
  const Range bytes = {unit.front.begin, unit.back.end};
  const auto follows = [&](const Range& own) {
    const int begin = __shfl_up_sync(kAllLanes, own.begin, 1), end = __shfl_up_sync(kAllLanes, own.end, 1);
    return place == 0 || (begin <= own.begin && own.begin <= end && end <= own.end);
  };
  const bool one_piece = unit.patch >= 0 && unit.front.end == unit.back.begin;
  const bool regular = __all_sync(kAllLanes, one_piece & follows(bytes) & follows(unit.patches));
  const Rows vectors = readers.vectors(unit);
  Run run = {0, 0};
  if (regular) {
    run = {__shfl_sync(kAllLanes, vectors.end, kRun - 1),
           __shfl_sync(kAllLanes, static_cast<u32>(bytes.end), kRun - 1)};
    start(__shfl_sync(kAllLanes, vectors.begin, 0), __shfl_sync(kAllLanes, static_cast<u32>(bytes.begin), 0), run);
  }
  unit.stop = readers.stop_of(unit.front.begin, most(unit.front.end, unit.back.end));
#pragma unroll 1
  for (int i = 0; i < kRun; ++i) {
    Words next;
#pragma unroll
    for (int w = 0; w < kPatchUnitWords; ++w) next.words[w] = __shfl_sync(kAllLanes, mine.words[w], i);
    if (next.unit.patch >= 0) f(next.unit, run);
  }
}

}  // namespace blt
