// Builds the tensors of a PatchLayout from boundary decisions, in one kernel. PatchLayout.from_cuts specifies it.
//
//   rule(t, i, last) -> bool: does the byte after byte t, which is byte i of its document, start a patch?
//
// `last` says that byte t is the last one of its document.
//
// The layout is computed in parallel. A document start is the first byte of a document that is not empty; all other
// patches begin at an interior start.
//   - Every document start begins a patch. So `room` = C - (number of document starts) patches are left for interior
//     starts, which from_cuts assigns in the order of the bytes:
//       patch of byte t = document starts up to t + min(interior starts up to t, room) - 1.
//     The whole layout follows from these two running counts.
//   - The rule's own decisions are called boundaries. With a maximum patch length m, a patch starts after byte t if
//     t - j is a multiple of m, where j is the last boundary up to t, a running maximum. Without a maximum length, m is
//     so large that a patch starts only where t = j. Rules with a maximum length put a boundary at the first byte of
//     every document, so no j crosses documents.
// A block evaluates the rule on the bytes of its chunk and keeps the answers as bits. It does not know the last
// boundary before the chunk yet. Only the bytes before its own first boundary, the `head`, depend on it, and the number
// of patches that start there is a quotient, so counts of chunks can be joined. chunk_counts.cuh gives a block the
// counts of all chunks before its own, within the launch. An earlier launch (prepare_layout) counts the document
// starts, unless C is so large that no start is ever dropped.
//
// Tiling: a block owns a chunk of 2048 bytes, 64 words of 32 bits. The lanes of a ballot are the bytes of a word, and
// one warp scans the 64 words. A search of 32 probes per step finds the documents that begin in a chunk, which are
// marked as bits in shared memory, so documents elsewhere cost no time, empty ones included. The blocks after those of
// the chunks wait for all chunks and write the offsets beyond the last patch.
//
// Bytes: the rule's input (4 per byte for an fp32 entropy), 8 per byte for two ids, 8 per patch of C, 8 per document,
// and at most 3 KB per chunk for the counts of other chunks. Roofline: a memory copy of 1/40 of the logits.
#pragma once

#include "chunk_counts.cuh"
#include "documents.cuh"

namespace blt {

inline constexpr int kLayoutThreads = 512;
inline constexpr int kLayoutWarps = kLayoutThreads / kWarp;
inline constexpr int kChunkWords = kChunkBytes / 32;

static_assert(kMaxPositions <= 0x7fffffff - 2 * kChunkBytes, "positions of two more chunks fit into int32");

__device__ __forceinline__ u32 bits_before(int bit) { return (1u << bit) - 1; }
__device__ __forceinline__ u32 bits_until(int bit) { return bits_before(bit) | 1u << bit; }
__device__ __forceinline__ i32 highest_bit(u32 word) { return 31 - __clz(static_cast<int>(word)); }

// Returns the index of the first of `size` sorted values that is at least `bound`, or `size`. All lanes of a warp take
// part.
__device__ __forceinline__ i64 lower_bound(const i32* values, i64 size, i32 bound) {
  i64 low = 0, high = size;
  while (low < high) {
    const i64 step = ceil_div<i64>(high - low, kWarp), probe = low + threadIdx.x % kWarp * step;
    const int below = __popc(__ballot_sync(kAllLanes, probe < high && values[probe] < bound));
    high = min(high, low + below * step);
    if (below > 0) low += (below - 1) * step + 1;
  }
  return low;
}

// Returns the first document that begins at this position or later, where the end of the last one counts as one more.
// All lanes of the warp take part.
__device__ __forceinline__ i64 first_document_from(const Documents& documents, i32 position) {
  if (documents.offsets != nullptr) return lower_bound(documents.offsets, documents.count + 1, position);
  if (position == 0) return 0;
  return documents.length > 0 ? min(ceil_div<i64>(position, documents.length), documents.count + 1)
                              : documents.count + 1;
}

// Has a bit for each byte of a chunk, and values before each word; entry [kChunkWords] is the value after the chunk.
struct ChunkBits {
  u32 begins[kChunkWords + 1];  // a document begins or the last one ends here; the last word is that of the next chunk
  u32 boundaries[kChunkWords];
  u32 interior[kChunkWords];                                            // the next byte is an interior start
  i32 begin_before[kChunkWords + 1], boundary_before[kChunkWords + 1];  // are positions of the last one before a word
  i32 interior_before[kChunkWords + 1], documents_before[kChunkWords + 1];

  __device__ __forceinline__ bool begins_at(int i) const { return begins[i / 32] >> i % 32 & 1; }
  __device__ __forceinline__ i32 interior_until(int i) const {
    return interior_before[i / 32] + __popc(interior[i / 32] & bits_before(i % 32));
  }
};

// Sets before[w] to the fold of `none` and value(i) of all words i before w. One warp calls it, and the two below.
template <class Value, class Fold>
__device__ __forceinline__ void scan_words(i32 none, i32* before, const Value& value, const Fold& fold) {
  const int lane = threadIdx.x % kWarp, w = 2 * lane;
  const i32 first_word = value(w), until = warp_prefix_fold(fold(first_word, value(w + 1)), fold);
  const i32 others = __shfl_up_sync(kAllLanes, until, 1), earlier = lane == 0 ? none : fold(none, others);
  before[w] = earlier;
  before[w + 1] = fold(earlier, first_word);
  if (lane == kWarp - 1) before[kChunkWords] = fold(none, until);
}

// Sets before[w] to the position of the last set bit before word w, or to `none`.
__device__ __forceinline__ void scan_last(const u32* words, i32 start, i32 none, i32* before) {
  const auto last = [=](int i) { return words[i] != 0 ? start + i * 32 + highest_bit(words[i]) : -1; };
  scan_words(none, before, last, Max{});
}

// Sets before[w] to the number of bits set before word w, up to byte `size` of the chunk.
__device__ __forceinline__ void scan_count(const u32* words, i32 size, i32* before) {
  const auto count = [=](int i) {
    const i32 bits = size - i * 32;
    return bits <= 0 ? 0 : __popc(bits >= 32 ? words[i] : words[i] & bits_before(bits));
  };
  scan_words(0, before, count, Sum{});
}

struct ChunkPlace {
  i32 start, end;  // are the start of the chunk and the end of the last document
  i64 document;    // is the first document that begins in the chunk or later
  i32 open;        // is the start of the document that continues into the chunk, or -1
};

// Fills begins, begin_before and documents_before. It ends with a barrier.
__device__ __forceinline__ ChunkPlace mark_documents(ChunkBits& bits, const Documents& documents, i32 start) {
  const int thread = threadIdx.x;
  if (thread <= kChunkWords) bits.begins[thread] = 0;
  const i32 end = documents.end();
  const i64 document = first_document_from(documents, start);
  // Invalid offsets must not lead out of the bytes before the chunk.
  const i32 open = document > 0 && start > 0 ? max(0, min(documents.at(document - 1), start - 1)) : -1;
  __syncthreads();
  for (i64 b = document + thread; b <= documents.count; b += kLayoutThreads) {
    const i32 at = documents.at(b) - start;
    if (at > kChunkBytes) break;
    if (at >= 0) atomicOr(&bits.begins[at / 32], 1u << at % 32);
  }
  __syncthreads();
  if (thread / kWarp == 0) scan_last(bits.begins, start, open, bits.begin_before);
  if (thread / kWarp == 1) scan_count(bits.begins, end - start, bits.documents_before);
  __syncthreads();
  return {start, end, document, open};
}

// Returns the position of the last set bit up to bit `lane` of word w.
__device__ __forceinline__ i32 last_until(const u32* words, const i32* before, i32 start, int w, int lane) {
  const u32 set = words[w] & bits_until(lane);
  return set != 0 ? start + w * 32 + highest_bit(set) : before[w];
}

// Returns true if the rule and the limit start a patch after this byte. No patch starts after a byte that has no
// boundary before it.
__device__ __forceinline__ bool starts_after(const ChunkBits& bits, i32 start, i32 limit, int w, int lane) {
  const i32 boundary = last_until(bits.boundaries, bits.boundary_before, start, w, lane);
  return boundary >= 0 && static_cast<u32>(start + w * 32 + lane - boundary) % static_cast<u32>(limit) == 0;
}

// Fills boundary_before, interior and interior_before from the last boundary before the chunk. It ends with a barrier.
__device__ __forceinline__ void find_interior_starts(ChunkBits& bits, const ChunkPlace& place, i32 earlier_boundary,
                                                     i32 limit) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp == 0) scan_last(bits.boundaries, place.start, earlier_boundary, bits.boundary_before);
  __syncthreads();
  for (int w = warp; w < kChunkWords; w += kLayoutWarps) {
    const int i = w * 32 + lane;
    const bool interior = starts_after(bits, place.start, limit, w, lane) && !bits.begins_at(i + 1);
    const u32 vote = __ballot_sync(kAllLanes, interior && place.start + i < place.end);
    if (lane == 0) bits.interior[w] = vote;
  }
  __syncthreads();
  if (warp == 0) scan_count(bits.interior, kChunkBytes, bits.interior_before);
  __syncthreads();
}

// --- the earlier launch ----------------------------------------------------------------------------------------------

// When the layout kernel starts, no counts are published and `documents` has the number of non-empty documents in each
// of `parts` parts.
inline constexpr int kMaxParts = 256;
struct LayoutScratch {
  ChunkCounts counts;
  i32* documents;  // [parts]
  int parts;       // is at most kMaxParts, and 0 if the capacity is so large that no start is dropped
};

// All blocks of a launch of kThreads threads call this. A warp counts the documents of one part.
template <int kThreads>
__device__ __forceinline__ void prepare_layout(const Documents& documents, const LayoutScratch& scratch) {
  const i64 thread = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x,
            threads = static_cast<i64>(gridDim.x) * kThreads;
  if (thread == 0) *scratch.counts.next_ticket = 0;
  for (i64 slot = thread; slot < ChunkCounts::slots(scratch.counts.chunks); slot += threads)
    scratch.counts.published[slot].ready = 0;
  const i64 each = ceil_div<i64>(documents.count, max(1, scratch.parts));
  for (i64 part = thread / kWarp; part < scratch.parts; part += threads / kWarp) {
    i32 count = 0;
#pragma unroll 4
    for (i64 b = part * each + thread % kWarp; b < min((part + 1) * each, documents.count); b += kWarp)
      count += documents.at(b) < documents.at(b + 1);
    count = warp_sum(count);
    if (thread % kWarp == 0) scratch.documents[part] = count;
  }
}

static __global__ void __launch_bounds__(kLayoutThreads)
    prepare_layout_kernel(Documents documents, LayoutScratch scratch) {
  prepare_layout<kLayoutThreads>(documents, scratch);
}

// --- the layout ------------------------------------------------------------------------------------------------------

// Returns the counts of a chunk. One warp calls it.
__device__ __forceinline__ Counts chunk_counts(const ChunkBits& bits, const ChunkPlace& place) {
  const int lane = threadIdx.x % kWarp;
  i32 head = min(kChunkBytes, max(0, place.end - place.start));
  for (int w = lane; w < kChunkWords; w += kWarp)
    if (bits.boundaries[w] != 0) head = min(head, w * 32 + __ffs(static_cast<int>(bits.boundaries[w])) - 1);
  head = warp_fold(head, [](i32 a, i32 b) { return min(a, b); });
  if (head > 0 && bits.begins_at(head)) --head;
  const i32 last_begin = bits.begin_before[kChunkWords] - place.start, interior = bits.interior_before[kChunkWords];
  return {bits.boundary_before[kChunkWords], head, interior,
          last_begin < 0 ? 0 : interior - bits.interior_until(last_begin), bits.documents_before[kChunkWords]};
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

// Returns the number of document starts in each lane of a warp.
__device__ __forceinline__ i32 all_document_starts(const LayoutScratch& scratch) {
  i32 count = 0;
  for (int part = threadIdx.x % kWarp; part < scratch.parts; part += kWarp) count += scratch.documents[part];
  return warp_sum(count);
}

// Writes the kChunkBytes offsets of block `filler` that lie beyond the last patch.
__device__ __forceinline__ void fill_offsets(const Documents& documents, const Counts& total, i32 room, i64 filler,
                                             const LayoutOutputs& out) {
  const i64 patches = static_cast<i64>(total.documents) + min(total.interior, room);
  const i32 end = documents.end();
  for (i64 p = filler * kChunkBytes + threadIdx.x; p < (filler + 1) * kChunkBytes; p += kLayoutThreads)
    if (p >= patches && p <= out.capacity) out.patch_offsets[p] = out.decode_offsets[p] = end;
}

// Writes the outputs of the bytes and documents of a chunk.
__device__ __forceinline__ void write_layout(const ChunkBits& bits, const ChunkPlace& place, const Documents& documents,
                                             const Counts& before, i32 limit, i32 room, const LayoutOutputs& out) {
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const i32 start = place.start;
  const auto interior_until = [&](int i) { return before.interior + bits.interior_until(i); };
  // Invalid offsets may describe more documents than patches.
  const auto in_range = [&](i32 patch) { return static_cast<i32>(min<i64>(patch, out.capacity - 1)); };
  const auto write = [&](i32* offsets, i32 patch, i32 t) {
    if (patch >= 0 && patch < out.capacity) offsets[patch] = t;
  };

  for (i64 b = place.document + thread; b <= documents.count; b += kLayoutThreads) {
    const i32 at = documents.at(b) - start;
    if (at >= kChunkBytes) break;
    if (at < 0) continue;
    if (out.cu_seqlens != nullptr) out.cu_seqlens[b] = start + at;
    const u32 starts = bits.begins[at / 32] & bits_before(at % 32);
    out.cu_patches[b] = in_range(before.documents + bits.documents_before[at / 32] + __popc(starts) - 1 +
                                 min(interior_until(at), room)) +
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
    const i32 document_starts = before.documents + bits.documents_before[w] + __popc(bits.begins[w] & bits_until(lane));
    const i32 interior = interior_until(i), interior_after = interior + (bits.interior[w] >> lane & 1);
    const i32 kept = min(interior, room), kept_after = min(interior_after, room);
    const i32 begin = last_until(bits.begins, bits.begin_before, start, w, lane) - start;
    const i32 interior_of_earlier = begin >= 0 ? interior_until(begin) : before.interior - before.since_document;
    const i32 kept_of_earlier = min(interior_of_earlier, room);
    const i32 patch = document_starts - 1 + kept;
    i32 kept_next = kept_after;  // counts interior starts that are kept up to the next byte
    const bool last = bits.begins_at(i + 1);
    if (last) {
      const bool dropped = interior > room && interior > interior_of_earlier;
      kept_next = kept + (!dropped && starts_after(bits, start, limit, w, lane));
    }
    out.patch_ids[t] = in_range(patch);
    out.decode_ids[t] = kept_next > kept_of_earlier ? in_range(document_starts - 2 + kept_next) : -1;
    if (bits.begins_at(i)) write(out.patch_offsets, patch, t);
    if (kept_after > kept) write(out.patch_offsets, patch + 1, t + 1);
    // The last byte of a patch reads that patch, unless it ends its document and no patch starts after it.
    const bool opens = kept_next > kept;
    if (last || opens) write(out.decode_offsets, patch, t + !opens);
  }
}

// There is a block per chunk, then a block per kChunkBytes of the capacity + 1 offsets.
template <class Rule>
__global__ void __launch_bounds__(kLayoutThreads, 3)
    patch_layout_kernel(Rule rule, Documents documents, i32 limit, LayoutScratch scratch, LayoutOutputs out) {
  __shared__ ChunkBits bits;
  __shared__ Counts counts;  // are those before the chunk, or those of all chunks in blocks that fill offsets
  __shared__ i32 ticket, room;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  if (thread == 0) ticket = atomicAdd(scratch.counts.next_ticket, 1);
  if (warp == 1) {
    const i32 starts = all_document_starts(scratch);
    if (lane == 0) room = static_cast<i32>(max<i64>(0, out.capacity - starts));
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
    const i32 begin = max(0, last_until(bits.begins, bits.begin_before, start, w, lane));
    const bool last = bits.begins_at(w * 32 + lane + 1);
    const u32 vote = __ballot_sync(kAllLanes, t < place.end && rule(t, t - begin, last));
    if (lane == 0) bits.boundaries[w] = vote;
  }
  __syncthreads();
  find_interior_starts(bits, place, -1, limit);
  if (warp == 0) {
    const Counts own = chunk_counts(bits, place), before = scratch.counts.before(chunk, own, limit);
    if (lane == 0) counts = before;
    if (lane == 0 && chunk == chunks - 1)
      *out.overflowed = joined(before, own, static_cast<u32>(start), limit).interior > room;
  }
  __syncthreads();
  if (limit < kNoLimit) find_interior_starts(bits, place, counts.last_boundary, limit);
  write_layout(bits, place, documents, counts, limit, room, out);
}

}  // namespace blt
