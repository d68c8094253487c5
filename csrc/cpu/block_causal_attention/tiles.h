// Finds the keys that each query of packed documents attends to, makes tiles from them, and divides the tiles among
// threads.
//
// The keys of a query are a range, and neither end of it falls from one query to the next. So a tile of queries may
// span documents: it reads the keys from the start of its first query's range to the end of its last query's range. A
// tile ends where masked keys would lie inside that, because they may hold NaN, and around a document that takes the
// decode path. Threads get runs of (head, tile) items with equal numbers of streamed rows, so one long document among
// short ones keeps all of them busy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "../support/parallel.h"
#include "product.h"

namespace blt {

inline constexpr int64_t kStep = 64;  // a step has so many streamed rows

// An item of work is a few tiles, so that each streamed row is gathered once for all of them: as many tiles as fit into
// kBlockBytes, which leaves room in an L2 cache, and into kMaxLanes lanes.
inline constexpr int64_t kBlockBytes = 512 * 1024, kMaxLanes = 512;
template <class A>
inline constexpr int64_t kMaxTiles = kMaxLanes / kWidth<A>;

// Returns the number of tiles in an item whose tiles have `blocks` blocks of head_dim * kWidth elements each.
template <class A>
int64_t tiles_of_item(int64_t blocks, int64_t head_dim) {
  const int64_t fit = kBlockBytes / (blocks * head_dim * kWidth<A> * static_cast<int64_t>(sizeof(A)));
  return std::clamp<int64_t>(fit, 1, kMaxTiles<A>);
}

inline Range overlap(const Range& a, const Range& b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// Computes the range of keys that each query attends to.
struct KeyRanges {
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  const int32_t* seqused_k;  // counts the unmasked keys of each document, or is null
  int64_t documents, window;
  bool causal;

  int64_t document_of(int64_t query) const {
    return std::upper_bound(cu_seqlens_q + 1, cu_seqlens_q + documents + 1, query) - cu_seqlens_q - 1;
  }

  // Returns the end of the unmasked keys of document b.
  int64_t keys_end(int64_t b) const {
    const int64_t end = cu_seqlens_k[b + 1];
    return seqused_k ? std::min<int64_t>(int64_t{cu_seqlens_k[b]} + std::max(seqused_k[b], 0), end) : end;
  }

  // Returns the keys that a query of document b attends to.
  Range keys(int64_t query, int64_t b) const {
    const int64_t begin = cu_seqlens_k[b];
    const int64_t end = keys_end(b);
    const int64_t aligned = query + end - cu_seqlens_q[b + 1];
    const int64_t first = std::max(begin, aligned - window + 1);
    const int64_t last = std::min(end, causal ? aligned + 1 : aligned + window);
    return {first, std::max(first, last)};
  }
};

// Some rows lie across the vector lanes, others are streamed past them.
struct Tile {
  Range lanes, streamed;
  bool few = false;  // a tile of few queries takes the decode path (decode.h)
  int64_t work() const { return streamed.size(); }
};

// Returns the rows that some tiles stream, of which each tile's follow the previous one's.
inline Range streamed_by(std::span<const Tile> tiles) {
  return {tiles.front().streamed.begin, tiles.back().streamed.end};
}

// At most so many queries of a document take the decode path together.
inline constexpr int64_t kMaxDecodeQueries = 16;

// Makes tiles of up to `lanes` queries of the documents and the keys that they attend to. A document of at most `alone`
// queries is a tile of few queries, and so is what is left of a longer one.
inline std::vector<Tile> query_tiles(const KeyRanges& ranges, const Range& documents, int64_t lanes, int64_t alone) {
  std::vector<Tile> tiles;
  const int64_t queries = ranges.cu_seqlens_q[documents.end];
  const auto size_of = [&](int64_t b) { return ranges.cu_seqlens_q[b + 1] - ranges.cu_seqlens_q[b]; };
  for (int64_t begin = ranges.cu_seqlens_q[documents.begin], b = documents.begin; begin < queries;) {
    while (ranges.cu_seqlens_q[b + 1] <= begin) ++b;
    int64_t end = std::min(queries, begin + lanes);
    if (size_of(b) <= alone) end = ranges.cu_seqlens_q[b + 1];
    Range keys = ranges.keys(begin, b);
    for (int64_t query = begin + 1, c = b; query < end; ++query) {
      while (ranges.cu_seqlens_q[c + 1] <= query) ++c;
      const Range more = ranges.keys(query, c);
      const bool gap = more.size() > 0 && keys.size() > 0 && more.begin > keys.end;
      if (gap || (c > b && size_of(c) <= alone))
        end = query;
      else if (more.size() > 0)
        keys = keys.size() == 0 ? more : Range{keys.begin, std::max(keys.end, more.end)};
    }
    tiles.push_back({{begin, end}, keys, end - begin <= std::min(alone, size_of(b) <= alone ? alone : lanes / 4)});
    begin = end;
  }
  return tiles;
}

// Makes tiles of up to `lanes` keys and the queries that attend to them.
inline std::vector<Tile> key_tiles(std::span<const Tile> queries, const Range& keys, int64_t lanes) {
  std::vector<Tile> tiles;
  auto first = queries.begin();
  for (int64_t begin = keys.begin; begin < keys.end; begin += lanes) {
    Tile tile = {{begin, std::min(keys.end, begin + lanes)}, {0, 0}};
    while (first != queries.end() && (first->work() == 0 || first->streamed.end <= begin)) ++first;
    for (auto q = first; q != queries.end() && (q->work() == 0 || q->streamed.begin < tile.lanes.end); ++q) {
      if (q->work() == 0) continue;
      if (tile.work() == 0) tile.streamed.begin = q->lanes.begin;
      tile.streamed.end = q->lanes.end;
    }
    tiles.push_back(tile);
  }
  return tiles;
}

// Hands out whole cache lines of the memory that a thread works in.
template <class A>
struct Scratch {
  A* next;
  static int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }
  A* take(int64_t size) {
    A* const begin = next;
    next += padded(size);
    return begin;
  }
  A* zeros(int64_t size) {
    A* const begin = take(size);
    std::fill(begin, begin + size, A(0));
    return begin;
  }
};

// Returns elements of scratch for an item whose tiles have `blocks` blocks of [E][lane]: two blocks of [step][lane] and
// two of [step][E] are added.
template <class A>
int64_t tile_scratch(int64_t blocks, int64_t head_dim) {
  return Scratch<A>::padded(whole_vectors<A>(head_dim) * kWidth<A>) * blocks * tiles_of_item<A>(blocks, head_dim) +
         2 * (kStep * kWidth<A> + Scratch<A>::padded(kStep * head_dim));
}

// --- division of the work --------------------------------------------------------------------------------------------

// A run has consecutive tiles whose streamed rows overlap.
using Run = std::span<const Tile>;

// The work of a tile is its streamed rows, and one more for its own rows.
inline int64_t work_of(const Run& run) {
  int64_t work = 0;
  for (const Tile& tile : run) work += tile.work() + 1;
  return work;
}

// Divides tiles into runs of at most `max_tiles`.
inline std::vector<Run> runs_of(std::span<const Tile> tiles, int64_t max_tiles) {
  std::vector<Run> runs;
  for (size_t begin = 0, end; begin < tiles.size(); begin = end) {
    for (end = begin + 1; end < tiles.size() && static_cast<int64_t>(end - begin) < max_tiles; ++end)
      if (tiles[end].streamed.begin >= tiles[end - 1].streamed.end || tiles[end].work() == 0) break;
    runs.push_back(tiles.subspan(begin, end - begin));
  }
  return runs;
}

// A segment has tiles of keys, with sums of dq of their own for the queries that they stream: [head][query][E].
struct Segment {
  std::vector<Run> runs;
  Range queries;
  int64_t before;  // counts rows in the sums of all previous segments
};

inline int64_t work_of(const Segment& segment) {
  int64_t work = 0;
  for (const Run& run : segment.runs) work += work_of(run);
  return work;
}

// The segments of all key/value heads are the units of parallel work. They cost memory: up to kMaxSums rows of sums for
// each query. Where documents or windows keep that below kCheapSums, there may be more segments.
inline constexpr int64_t kSegments = 32, kMaxSums = 6, kCheapSegments = 256;
inline constexpr double kCheapSums = 1.5;

// Divides tiles into segments of about equal work, of runs of at most `max_tiles`. Each segment's sums end with
// `padding` rows.
inline std::vector<Segment> segments_of(std::span<const Tile> tiles, int64_t num_kv_heads, int64_t max_tiles,
                                        int64_t queries, int64_t padding) {
  const int64_t total = work_of(tiles);
  for (int64_t count = (kCheapSegments + num_kv_heads - 1) / num_kv_heads;; count /= 2) {
    std::vector<Segment> segments;
    int64_t rows = 0;
    for (size_t begin = 0, end = 0, done = 0; begin < tiles.size(); begin = end) {
      const int64_t limit = (total * (static_cast<int64_t>(segments.size()) + 1) + count - 1) / count;
      Range streamed = {0, 0};
      while (end < tiles.size() && (end == begin || static_cast<int64_t>(done) < limit)) {
        const Tile& tile = tiles[end++];
        done += tile.work() + 1;
        if (tile.work() > 0) streamed = {streamed.size() > 0 ? streamed.begin : tile.streamed.begin, tile.streamed.end};
      }
      segments.push_back({runs_of(tiles.subspan(begin, end - begin), max_tiles), streamed, rows});
      rows += streamed.size() + padding;
    }
    const double sums = static_cast<double>(rows) / static_cast<double>(queries);
    if (count == 1 || sums <= kCheapSums || (count * num_kv_heads <= kSegments && sums <= kMaxSums)) return segments;
  }
}

}  // namespace blt
