// From boundary decisions to the tensors of a PatchLayout, in one kernel: what PatchLayout.from_cuts specifies.
//
//   rule(t, i) -> bool: does the byte after byte t, which is byte i of its document, start a patch?
//
// How it becomes parallel. Call starts at the first byte of a document `firsts` and all other starts `inners`.
//   - A document that is not empty always has its first, so R = C - (all firsts) patches are left for inners, and giving
//     them out in the order of the bytes is what from_cuts does: patch of byte t = firsts up to t + min(inners up to t, R) - 1.
//     So the whole layout follows from two running counts.
//   - Where the patches of a rule must not be longer than m, a byte t starts a patch after it if t - j is a multiple of m,
//     with j the last byte up to t for which the rule itself says so: a running maximum. Without a limit m is so large that
//     only t = j is. Every document's first byte is a j (the rules that have a limit say so), so none crosses documents.
// A block asks the rule about the bytes of its chunk and keeps the answers as bits. The j before a chunk is not known then, but
// only the bytes before the chunk's first own j, its `head`, depend on it, and how many of them start patches is a quotient:
// counts of chunks can be joined. chunk_counts.cuh tells a block those of all chunks before its own, within the launch.
// R is needed before all chunks are known: documents that are not empty are counted in the launch before (prepare_layout),
// unless C is so large that no start is ever dropped.
//
// Tiling: a block owns a chunk of 2048 bytes, 64 words of 32 bits; lanes are the bytes of a word in ballots, and a warp
// scans 64 words. Documents that begin in a chunk are found by a search of 32 probes a step and marked as bits in shared
// memory: nothing costs time for documents that are elsewhere, empty ones in any number included. Blocks behind those of
// the chunks write the offsets beyond the last patch, which wait for all chunks.
// Bytes, for each of T: what the rule reads (4 of an fp32 entropy), 8 for two ids; 8 for each of C patches and 8 for each
// document; at most 3 KB for a chunk to know what is before it. Roofline: a memory copy that is 1/40 of what the logits take.
#pragma once

#include "chunk_counts.cuh"

namespace blt {

inline constexpr int kLayoutThreads = 512;
inline constexpr int kLayoutWarps = kLayoutThreads / kWarp;
inline constexpr int kChunkWords = kChunkBytes / 32;

// Bytes [at(b), at(b+1)) are document b; `bytes` of them at most, and fewer than 2^31 - 2 kChunkBytes.
struct Documents {
  const i32* offsets;  // [count + 1], or null for documents of `length` bytes each
  i64 count;
  i32 bytes, length;

  __device__ __forceinline__ i32 at(i64 b) const {
    return offsets != nullptr ? offsets[b] : static_cast<i32>(b) * length;
  }
  __device__ __forceinline__ i32 end() const { return most(0, least(at(count), bytes)); }
};

__device__ __forceinline__ u32 bits_before(int bit) { return (1u << bit) - 1; }
__device__ __forceinline__ u32 bits_until(int bit) { return bits_before(bit) | 1u << bit; }
__device__ __forceinline__ i32 highest_bit(u32 word) { return 31 - __clz(static_cast<int>(word)); }

// The first of `size` sorted values that is at least `bound`, or `size`. All lanes of the warp take part.
__device__ __forceinline__ i64 lower_bound(const i32* values, i64 size, i32 bound) {
  i64 low = 0, high = size;
  while (low < high) {
    const i64 step = ceil_div<i64>(high - low, kWarp), probe = low + threadIdx.x % kWarp * step;
    const int below = __popc(__ballot_sync(kAllLanes, probe < high && values[probe] < bound));
    high = least(high, low + below * step);
    if (below > 0) low += (below - 1) * step + 1;
  }
  return low;
}

// The first document, or the end of the last one, at this position or behind. All lanes of the warp take part.
__device__ __forceinline__ i64 first_document_from(const Documents& documents, i32 position) {
  if (documents.offsets != nullptr) return lower_bound(documents.offsets, documents.count + 1, position);
  if (position == 0) return 0;
  return documents.length > 0 ? least(ceil_div<i64>(position, documents.length), documents.count + 1)
                              : documents.count + 1;
}

// Bits for the bytes of a chunk, and what is known before each word: [kChunkWords] is what is known behind the chunk.
struct ChunkBits {
  u32 begins[kChunkWords + 1];  // documents begin here, or the last one ends; one word more, to look ahead
  u32 cuts[kChunkWords];        // the rule says yes
  u32 inners[kChunkWords];      // an inner follows
  i32 begin_before[kChunkWords + 1], cut_before[kChunkWords + 1];  // the last one before a word, absolute
  i32 inners_before[kChunkWords + 1], firsts_before[kChunkWords + 1];

  __device__ __forceinline__ bool begins_at(int i) const { return begins[i / 32] >> i % 32 & 1; }
  __device__ __forceinline__ i32 inners_until(int i) const {
    return inners_before[i / 32] + __popc(inners[i / 32] & bits_before(i % 32));
  }
};

// before[w] = the last set bit before word w, or `none`. One warp.
__device__ __forceinline__ void scan_last(const u32* words, i32 start, i32 none, i32* before) {
  const int lane = threadIdx.x % kWarp, w = 2 * lane;
  const auto last = [=](int i) { return words[i] != 0 ? start + i * 32 + highest_bit(words[i]) : -1; };
  const i32 first_word = last(w);
  i32 until = most(first_word, last(w + 1));
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const i32 other = __shfl_up_sync(kAllLanes, until, distance);
    if (lane >= distance) until = most(until, other);
  }
  i32 earlier = __shfl_up_sync(kAllLanes, until, 1);
  earlier = most(none, lane == 0 ? -1 : earlier);
  before[w] = earlier;
  before[w + 1] = most(earlier, first_word);
  if (lane == kWarp - 1) before[kChunkWords] = most(none, until);
}

// before[w] = how many bits are set before word w, up to byte `size` of the chunk. One warp.
__device__ __forceinline__ void scan_count(const u32* words, i32 size, i32* before) {
  const int lane = threadIdx.x % kWarp, w = 2 * lane;
  const auto count = [=](int i) {
    const i32 bits = size - i * 32;
    return bits <= 0 ? 0 : __popc(bits >= 32 ? words[i] : words[i] & bits_before(bits));
  };
  const i32 first_word = count(w), both = first_word + count(w + 1), until = warp_prefix_sum(both);
  before[w] = until - both;
  before[w + 1] = until - both + first_word;
  if (lane == kWarp - 1) before[kChunkWords] = until;
}

struct ChunkPlace {
  i32 start, end;  // of the chunk, and of the last document
  i64 document;    // the first that begins in the chunk or behind it
  i32 open;        // where the document that goes on into the chunk began, or -1
};

// Fills begins, begin_before and firsts_before. Ends in a barrier.
__device__ __forceinline__ ChunkPlace mark_documents(ChunkBits& bits, const Documents& documents, i32 start) {
  const int thread = threadIdx.x;
  if (thread <= kChunkWords) bits.begins[thread] = 0;
  const i32 end = documents.end();
  const i64 document = first_document_from(documents, start);
  // Offsets that are garbage must not lead out of the bytes before the chunk.
  const i32 open = document > 0 && start > 0 ? most(0, least(documents.at(document - 1), start - 1)) : -1;
  __syncthreads();
  for (i64 b = document + thread; b <= documents.count; b += kLayoutThreads) {
    const i32 at = documents.at(b) - start;
    if (at > kChunkBytes) break;
    if (at >= 0) atomicOr(&bits.begins[at / 32], 1u << at % 32);
  }
  __syncthreads();
  if (thread / kWarp == 0) scan_last(bits.begins, start, open, bits.begin_before);
  if (thread / kWarp == 1) scan_count(bits.begins, end - start, bits.firsts_before);
  __syncthreads();
  return {start, end, document, open};
}

// The last set bit up to bit `lane` of word w, absolute.
__device__ __forceinline__ i32 last_until(const u32* words, const i32* before, i32 start, int w, int lane) {
  const u32 set = words[w] & bits_until(lane);
  return set != 0 ? start + w * 32 + highest_bit(set) : before[w];
}

// Does a patch start behind byte t, as far as the rule and the limit say? Not behind one that no cut precedes.
__device__ __forceinline__ bool starts_behind(const ChunkBits& bits, i32 start, i32 limit, int w, int lane) {
  const i32 cut = last_until(bits.cuts, bits.cut_before, start, w, lane);
  return cut >= 0 && static_cast<u32>(start + w * 32 + lane - cut) % static_cast<u32>(limit) == 0;
}

// Fills cut_before, inners and inners_before from the cuts and the last cut before the chunk. Ends in a barrier.
__device__ __forceinline__ void find_inners(ChunkBits& bits, const ChunkPlace& place, i32 cut_before, i32 limit) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp == 0) scan_last(bits.cuts, place.start, cut_before, bits.cut_before);
  __syncthreads();
  for (int w = warp; w < kChunkWords; w += kLayoutWarps) {
    const int i = w * 32 + lane;
    const bool inner = starts_behind(bits, place.start, limit, w, lane) && !bits.begins_at(i + 1);
    const u32 vote = __ballot_sync(kAllLanes, inner && place.start + i < place.end);
    if (lane == 0) bits.inners[w] = vote;
  }
  __syncthreads();
  if (warp == 0) scan_count(bits.inners, kChunkBytes, bits.inners_before);
  __syncthreads();
}

// --- the launch before ------------------------------------------------------------------------------------------------

// What the layout kernel finds ready: nothing published, and how many documents of each of `parts` parts are not empty.
inline constexpr int kMaxParts = 256;
struct LayoutScratch {
  ChunkCounts counts;
  i32* documents;  // [parts]
  int parts;       // up to kMaxParts; 0 if the capacity is so large that the number of documents does not matter
};

// By all blocks of a launch of kThreads threads. A warp counts the documents of a part.
template <int kThreads>
__device__ __forceinline__ void prepare_layout(const Documents& documents, const LayoutScratch& scratch) {
  const i64 thread = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x,
            threads = static_cast<i64>(gridDim.x) * kThreads;
  if (thread == 0) *scratch.counts.next_ticket = 0;
  for (i64 slot = thread; slot < ChunkCounts::slots(scratch.counts.chunks); slot += threads)
    scratch.counts.published[slot].ready = 0;
  const i64 each = ceil_div<i64>(documents.count, most(1, scratch.parts));
  for (i64 part = thread / kWarp; part < scratch.parts; part += threads / kWarp) {
    i32 count = 0;
#pragma unroll 4
    for (i64 b = part * each + thread % kWarp; b < least((part + 1) * each, documents.count); b += kWarp)
      count += documents.at(b) < documents.at(b + 1);
    count = warp_sum(count);
    if (thread % kWarp == 0) scratch.documents[part] = count;
  }
}

static __global__ void __launch_bounds__(kLayoutThreads)
    prepare_layout_kernel(Documents documents, LayoutScratch scratch) {
  prepare_layout<kLayoutThreads>(documents, scratch);
}

// --- the layout -------------------------------------------------------------------------------------------------------

// The counts of a chunk. By one warp.
__device__ __forceinline__ Counts chunk_counts(const ChunkBits& bits, const ChunkPlace& place) {
  const int lane = threadIdx.x % kWarp;
  i32 head = least(kChunkBytes, most(0, place.end - place.start));
  for (int w = lane; w < kChunkWords; w += kWarp)
    if (bits.cuts[w] != 0) head = least(head, w * 32 + __ffs(static_cast<int>(bits.cuts[w])) - 1);
  head = warp_fold(head, [](i32 a, i32 b) { return least(a, b); });
  if (head > 0 && bits.begins_at(head)) --head;
  const i32 last_begin = bits.begin_before[kChunkWords] - place.start, inners = bits.inners_before[kChunkWords];
  return {bits.cut_before[kChunkWords], head, inners, last_begin < 0 ? 0 : inners - bits.inners_until(last_begin),
          bits.firsts_before[kChunkWords]};
}

struct LayoutOutputs {
  i32* patch_offsets;           // [capacity + 1]
  i32* cu_patches;              // [documents + 1]
  i32 *patch_ids, *decode_ids;  // [bytes]
  i32* decode_offsets;          // [capacity + 1]
  bool* overflowed;             // [1]
  i32* cu_seqlens;              // [documents + 1], or null if they were given
  i64 capacity;
};

// All firsts, in each lane of a warp.
__device__ __forceinline__ i32 all_firsts(const LayoutScratch& scratch) {
  i32 count = 0;
  for (int part = threadIdx.x % kWarp; part < scratch.parts; part += kWarp) count += scratch.documents[part];
  return warp_sum(count);
}

// Writes kChunkBytes of the offsets beyond the last patch, those of block `filler` of as many as that takes.
__device__ __forceinline__ void fill_offsets(const Documents& documents, const Counts& total, i32 room, i64 filler,
                                             const LayoutOutputs& out) {
  const i64 patches = static_cast<i64>(total.documents) + least(total.interior, room);
  const i32 end = documents.end();
  for (i64 p = filler * kChunkBytes + threadIdx.x; p < (filler + 1) * kChunkBytes; p += kLayoutThreads)
    if (p >= patches && p <= out.capacity) out.patch_offsets[p] = out.decode_offsets[p] = end;
}

// Writes what belongs to the bytes and documents of a chunk.
__device__ __forceinline__ void write_layout(const ChunkBits& bits, const ChunkPlace& place, const Documents& documents,
                                             const Counts& before, i32 limit, i32 room, const LayoutOutputs& out) {
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const i32 start = place.start;
  const auto inners_until = [&](int i) { return before.interior + bits.inners_until(i); };
  // In garbage there may be more documents than patches.
  const auto in_range = [&](i32 patch) { return static_cast<i32>(least<i64>(patch, out.capacity - 1)); };
  const auto write = [&](i32* offsets, i32 patch, i32 t) {
    if (patch >= 0 && patch < out.capacity) offsets[patch] = t;
  };

  for (i64 b = place.document + thread; b <= documents.count; b += kLayoutThreads) {
    const i32 at = documents.at(b) - start;
    if (at >= kChunkBytes) break;
    if (at < 0) continue;
    if (out.cu_seqlens != nullptr) out.cu_seqlens[b] = start + at;
    const u32 firsts = bits.begins[at / 32] & bits_before(at % 32);
    out.cu_patches[b] =
        in_range(before.documents + bits.firsts_before[at / 32] + __popc(firsts) - 1 + least(inners_until(at), room)) +
        1;
  }

  for (int w = warp; w < kChunkWords; w += kLayoutWarps) {
    const int i = w * 32 + lane;
    const i32 t = start + i;
    if (t >= documents.bytes) break;
    if (t >= place.end) {
      out.patch_ids[t] = out.decode_ids[t] = -1;
      continue;
    }
    const i32 firsts = before.documents + bits.firsts_before[w] + __popc(bits.begins[w] & bits_until(lane));
    const i32 inners = inners_until(i), inners_behind = inners + (bits.inners[w] >> lane & 1);
    const i32 kept = least(inners, room), kept_behind = least(inners_behind, room);
    const i32 begin = last_until(bits.begins, bits.begin_before, start, w, lane) - start;
    const i32 inners_of_earlier = begin >= 0 ? inners_until(begin) : before.interior - before.since_document;
    const i32 kept_of_earlier = least(inners_of_earlier, room);
    const i32 patch = firsts - 1 + kept;
    // The patches that the document has had when the next byte begins.
    i32 kept_next = kept_behind;
    const bool last = bits.begins_at(i + 1);
    if (last) {
      const bool dropped = inners > room && inners > inners_of_earlier;
      kept_next = kept + (!dropped && starts_behind(bits, start, limit, w, lane));
    }
    out.patch_ids[t] = in_range(patch);
    out.decode_ids[t] = kept_next > kept_of_earlier ? in_range(firsts - 2 + kept_next) : -1;
    if (bits.begins_at(i)) write(out.patch_offsets, patch, t);
    if (kept_behind > kept) write(out.patch_offsets, patch + 1, t + 1);
    // The last byte of a patch reads it, unless it ends its document and no patch starts after it.
    const bool opens = kept_next > kept;
    if (last || opens) write(out.decode_offsets, patch, t + !opens);
  }
}

// Blocks: one a chunk, and one for each kChunkBytes of capacity + 1.
template <class Rule>
__global__ void __launch_bounds__(kLayoutThreads, 3)
    patch_layout_kernel(Rule rule, Documents documents, i32 limit, LayoutScratch scratch, LayoutOutputs out) {
  __shared__ ChunkBits bits;
  __shared__ Counts counts;  // before the chunk; for those who fill, of all chunks
  __shared__ i32 ticket, room;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  if (thread == 0) ticket = atomicAdd(scratch.counts.next_ticket, 1);
  if (warp == 1) {
    const i32 firsts = all_firsts(scratch);
    if (lane == 0) room = static_cast<i32>(most<i64>(0, out.capacity - firsts));
  }
  __syncthreads();
  const i32 chunk = ticket, chunks = scratch.counts.chunks;
  if (chunk >= chunks) {
    if (thread == 0) counts = await(scratch.counts.total());
    __syncthreads();
    return fill_offsets(documents, counts, room, chunk - chunks, out);
  }

  const i32 start = chunk * kChunkBytes;
  const ChunkPlace place = mark_documents(bits, documents, start);
  for (int w = warp; w < kChunkWords; w += kLayoutWarps) {
    const i32 t = start + w * 32 + lane;
    const i32 begin = most(0, last_until(bits.begins, bits.begin_before, start, w, lane));
    const u32 vote = __ballot_sync(kAllLanes, t < place.end && rule(t, t - begin));
    if (lane == 0) bits.cuts[w] = vote;
  }
  __syncthreads();
  find_inners(bits, place, -1, limit);
  if (warp == 0) {
    const Counts own = chunk_counts(bits, place), before = scratch.counts.before(chunk, own, limit);
    if (lane == 0) counts = before;
    if (lane == 0 && chunk == chunks - 1)
      *out.overflowed = joined(before, own, static_cast<u32>(start), limit).interior > room;
  }
  __syncthreads();
  if (limit < kNoLimit) find_inners(bits, place, counts.last_boundary, limit);
  write_layout(bits, place, documents, counts, limit, room, out);
}

}  // namespace blt
