// Makes running counts over the chunks of a text in one launch: a block learns the counts before its chunk from other
// blocks.
//
// Blocks take chunks in the order in which they start. A block publishes the counts of its chunk before it waits. The
// block of the last chunk of a group of 32 publishes the counts of the group, that of the last chunk of a section of 32
// groups the counts of all text up to there, and that of the last chunk the totals. So a block reads at most 31 chunks
// of its group, 31 groups of its section and the end of the section before: 2 KB for a text of any length.
//
// There is no deadlock: a block waits only for blocks with earlier chunks, which run already, and the earliest of them
// waits for none. The emulator runs blocks one after the other, in any order; there every wait is a fault. The order of
// the sums is fixed, so results do not depend on timing.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr int kChunkBytes = 2048;
inline constexpr int kGroupBytes = kWarp * kChunkBytes, kSectionBytes = kWarp * kGroupBytes;
inline constexpr i32 kNoLimit = 0x7fffffff;

// Counts of neighbouring chunks are combined. A boundary is a byte after which the rule starts a patch. An interior
// start is the start of a patch that is not the first of its document, counted by the byte before it. The number of
// interior starts in the head depends on the last boundary before the chunks: one follows every `limit` bytes.
struct Counts {
  i32 last_boundary;   // is -1 if there is none
  i32 head;            // counts bytes before the first boundary that an interior start can follow
  i32 interior;        // counts interior starts after the head
  i32 since_document;  // counts interior starts since the last document that begins in the chunks
  i32 documents;       // counts documents that begin in the chunks and are not empty
};
__device__ __forceinline__ Counts counts_of_nothing() { return {-1, 0, 0, 0, 0}; }

// Joins the counts of chunks a and of the chunks b after them, which begin at byte `begin_of_b`.
__device__ __forceinline__ Counts joined(const Counts& a, const Counts& b, u32 begin_of_b, i32 limit) {
  i32 interior = b.interior;
  if (limit < kNoLimit && a.last_boundary >= 0) {
    const u32 gap = begin_of_b - 1 - static_cast<u32>(a.last_boundary), step = static_cast<u32>(limit);
    interior += static_cast<i32>((gap + static_cast<u32>(b.head)) / step - gap / step);
  }
  return {max(a.last_boundary, b.last_boundary), a.last_boundary >= 0 ? a.head : a.head + b.head, a.interior + interior,
          b.documents > 0 ? b.since_document : a.since_document + interior, a.documents + b.documents};
}

// Joins the counts of all lanes, in lane 0. The chunks of lane 0 begin at byte `begin`, those of each next lane `bytes`
// later.
__device__ __forceinline__ Counts joined_lanes(Counts counts, u32 begin, u32 bytes, i32 limit) {
  begin += threadIdx.x % kWarp * bytes;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const auto later = [=](i32 x) { return __shfl_down_sync(kAllLanes, x, distance); };
    const Counts others = {later(counts.last_boundary), later(counts.head), later(counts.interior),
                           later(counts.since_document), later(counts.documents)};
    counts = joined(counts, others, begin + distance * bytes, limit);
  }
  return counts;
}

// --- exchange between blocks -----------------------------------------------------------------------------------------

struct alignas(32) Published {
  Counts counts;
  u32 ready;  // is 0 until counts are published
};

#ifdef __CUDACC__
__device__ __forceinline__ u32 load_acquire(const u32* from) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(u32* to, u32 value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void wait_for_block() { __nanosleep(32); }
#else
inline u32 load_acquire(const u32* from) { return *from; }
inline void store_release(u32* to, u32 value) { *to = value; }
inline void wait_for_block() { emulator::fault_of_wait(); }
#endif

// One thread calls this.
__device__ __forceinline__ void publish(Published& to, const Counts& counts) {
  to.counts = counts;
  store_release(&to.ready, 1);
}
__device__ __forceinline__ Counts await(const Published& from) {
  while (load_acquire(&from.ready) == 0) wait_for_block();
  return from.counts;
}

struct ChunkCounts {
  Published* published;  // [slots(chunks)], is not ready when the launch starts
  i32* next_ticket;      // [1], is 0 when the launch starts
  i32 chunks;

  static __host__ __device__ constexpr i64 slots(i64 chunks) {
    return chunks + chunks / kWarp + chunks / (kWarp * kWarp) + 1;
  }
  __device__ __forceinline__ Published& of_chunk(i32 chunk) const { return published[chunk]; }
  __device__ __forceinline__ Published& of_group(i32 group) const { return published[chunks + group]; }
  __device__ __forceinline__ Published& until_end_of_section(i32 section) const {
    return published[chunks + chunks / kWarp + section];
  }
  __device__ __forceinline__ Published& total() const { return published[slots(chunks) - 1]; }

  // Returns the counts of all text before a chunk, in lane 0, given those of the chunk in lane 0. One warp calls it.
  __device__ __forceinline__ Counts before(i32 chunk, const Counts& own, i32 limit) const {
    const int lane = threadIdx.x % kWarp;
    const i32 group = chunk / kWarp, section = group / kWarp;
    const u32 begin = chunk * kChunkBytes, group_begin = group * kGroupBytes, section_begin = section * kSectionBytes;
    if (lane == 0) publish(of_chunk(chunk), own);
    Counts counts = lane < chunk % kWarp ? await(of_chunk(group * kWarp + lane)) : counts_of_nothing();
    const Counts in_group = joined_lanes(counts, group_begin, kChunkBytes, limit);
    if (lane == 0 && chunk % kWarp == kWarp - 1) publish(of_group(group), joined(in_group, own, begin, limit));
    counts = lane < group % kWarp ? await(of_group(section * kWarp + lane)) : counts_of_nothing();
    counts = joined(joined_lanes(counts, section_begin, kGroupBytes, limit), in_group, group_begin, limit);
    if (section > 0) counts = joined(await(until_end_of_section(section - 1)), counts, section_begin, limit);
    if (lane == 0) {
      const Counts until = joined(counts, own, begin, limit);
      if ((chunk + 1) % (kWarp * kWarp) == 0) publish(until_end_of_section(section), until);
      if (chunk == chunks - 1) publish(total(), until);
    }
    return counts;
  }
};

}  // namespace blt
