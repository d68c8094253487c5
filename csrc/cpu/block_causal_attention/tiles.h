// Which keys a query of packed documents sees, the tiles that this makes, and their shares among the threads.
//
// The keys of a query are an interval, neither end of which falls from one query to the next. So a tile of queries may
// span documents: it reads the keys from its first query's first to its last query's last. It stops at a document's end
// where keys that nobody sees, which may hold anything, lie between them, and where few queries see many keys. Threads get
// runs of (head, tile) items with equal numbers of streamed rows, so one long document among short ones keeps all of
// them busy.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

#include "../../common/check.h"
#include "../support/parallel.h"
#include "product.h"

namespace blt {

inline constexpr int64_t kStep = 64;  // streamed rows in a step

// (lane, streamed row) pairs below which a second thread is not worth waking.
inline constexpr int64_t kSerialWork = 16 * 1024;

// An item of work is a few tiles, so that each streamed row that is gathered serves all of them: as many as fit into
// kBlockBytes, which is meant to leave room in a cache of the second level, and into kMaxRows lanes.
inline constexpr int64_t kBlockBytes = 512 * 1024, kMaxRows = 512;
template <class A>
inline constexpr int64_t kMaxTiles = kMaxRows / kWidth<A>;

// Tiles of an item with so many blocks of E * kWidth elements each.
template <class A>
int64_t tiles_of_item(int64_t blocks, int64_t width) {
  const int64_t fit = kBlockBytes / (blocks * width * kWidth<A> * static_cast<int64_t>(sizeof(A)));
  return std::clamp<int64_t>(fit, 1, kMaxTiles<A>);
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range overlap(const Range& a, const Range& b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// Which keys a query sees.
struct Visibility {
  const int32_t* cu_q;
  const int32_t* cu_k;
  const int32_t* used;  // keys of each document that count, or null
  int64_t documents, window;
  bool causal;

  int64_t document_of(int64_t row) const { return std::upper_bound(cu_q + 1, cu_q + documents + 1, row) - cu_q - 1; }

  // Behind the last key of document b that counts.
  int64_t last_key(int64_t b) const {
    return used ? std::min<int64_t>(int64_t{cu_k[b]} + std::max(used[b], 0), cu_k[b + 1]) : cu_k[b + 1];
  }

  // Of a row of document b.
  Range keys(int64_t row, int64_t b) const {
    const int64_t begin = cu_k[b];
    const int64_t end = last_key(b);
    const int64_t aligned = row + end - cu_q[b + 1];
    const int64_t first = std::max(begin, aligned - window + 1);
    const int64_t last = std::min(end, causal ? aligned + 1 : aligned + window);
    return {first, std::max(first, last)};
  }
};

// Rows in the lanes, and the rows that are streamed past them.
struct Tile {
  Range lanes, streamed;
  int64_t work() const { return streamed.end - streamed.begin; }
};

inline Range keys_of(std::span<const Tile> tiles) { return {tiles.front().streamed.begin, tiles.back().streamed.end}; }

inline constexpr int64_t kKeysOfFew = 8;  // for each query

// Do a document's queries, as in decoding with a cache, deserve a tile of their own (decode.h)? Others' keys
// would cost them more than lanes that stay empty.
inline bool has_few_queries(const Visibility& visible, int64_t b, int64_t width) {
  const int64_t begin = visible.cu_q[b], end = visible.cu_q[b + 1];
  const int64_t seen = visible.keys(end - 1, b).end - visible.keys(begin, b).begin;
  return end - begin <= width / 4 && seen >= kKeysOfFew * (end - begin);
}

// Tiles of queries, with the keys that their queries see; rows beyond the last document are in none.
inline std::vector<Tile> query_tiles(const Visibility& visible, int64_t width) {
  std::vector<Tile> tiles;
  const int64_t rows = visible.cu_q[visible.documents];
  for (int64_t begin = 0, b = 0; begin < rows;) {
    while (visible.cu_q[b + 1] <= begin) ++b;
    int64_t end = std::min(rows, begin + width);
    Range keys = visible.keys(begin, b);
    for (int64_t row = begin + 1, c = b; row < end; ++row) {
      while (visible.cu_q[c + 1] <= row) ++c;
      const Range seen = visible.keys(row, c);
      const bool alone = row == visible.cu_q[c] && (has_few_queries(visible, c, width) ||
                                                    has_few_queries(visible, visible.document_of(row - 1), width));
      const bool gap = seen.size() > 0 && keys.size() > 0 && seen.begin > keys.end;
      if (alone || gap)
        end = row;
      else if (seen.size() > 0)
        keys = keys.size() == 0 ? seen : Range{keys.begin, std::max(keys.end, seen.end)};
    }
    tiles.push_back({{begin, end}, keys});
    begin = end;
  }
  return tiles;
}

// Tiles of keys, with the queries that see them. Both ends of what a tile of queries sees never fall.
inline std::vector<Tile> key_tiles(const std::vector<Tile>& queries, int64_t keys, int64_t width) {
  std::vector<Tile> tiles;
  auto first = queries.begin();
  for (int64_t begin = 0; begin < keys; begin += width) {
    Tile tile = {{begin, std::min(keys, begin + width)}, {0, 0}};
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

// Blocks that a thread works in: take() hands out whole cache lines of its share of one allocation.
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

// Elements of scratch for an item of tiles with so many blocks of [E][lane] each: with two of [step][lane] and of [step][E].
template <class A>
int64_t tile_scratch(int64_t blocks, int64_t width) {
  return Scratch<A>::padded(whole_vectors<A>(width) * kWidth<A>) * blocks * tiles_of_item<A>(blocks, width) +
         2 * (kStep * kWidth<A> + Scratch<A>::padded(kStep * width));
}

// --- shares of the work -----------------------------------------------------------------------------------------------

// Tiles that follow each other, and overlap in what they stream.
using Run = std::span<const Tile>;

// A tile has one unit of work for its own rows.
inline int64_t work_of(const Run& run) {
  int64_t work = 0;
  for (const Tile& tile : run) work += tile.work() + 1;
  return work;
}

// Runs of at most `most` tiles.
inline std::vector<Run> runs_of(std::span<const Tile> tiles, int64_t most) {
  std::vector<Run> runs;
  for (size_t begin = 0, end; begin < tiles.size(); begin = end) {
    for (end = begin + 1; end < tiles.size() && static_cast<int64_t>(end - begin) < most; ++end)
      if (tiles[end].streamed.begin >= tiles[end - 1].streamed.end || tiles[end].work() == 0) break;
    runs.push_back(tiles.subspan(begin, end - begin));
  }
  return runs;
}

// Tiles of keys, and the rows of the queries that they stream, for which there are sums of their own: [head][row][E].
struct Segment {
  std::vector<Run> runs;
  Range rows;
  int64_t before;  // rows in the sums of the segments before
};

inline int64_t work_of(const Segment& segment) {
  int64_t work = 0;
  for (const Run& run : segment.runs) work += work_of(run);
  return work;
}

// Segments of all groups keep as many threads busy. They cost memory: up to kMostSums rows of sums for each row of the
// queries. Where there are documents or windows to cut between, more of them cost less.
inline constexpr int64_t kSegments = 32, kMostSums = 6, kCheapSegments = 256;
inline constexpr double kCheapSums = 1.5;

// Segments with about equal work, of runs of at most `most` tiles. In the sums, each has `padding` rows behind its own.
inline std::vector<Segment> segments_of(std::span<const Tile> tiles, int64_t groups, int64_t most, int64_t queries,
                                        int64_t padding) {
  const int64_t total = work_of(tiles);
  for (int64_t count = (kCheapSegments + groups - 1) / groups;; count /= 2) {
    std::vector<Segment> segments;
    int64_t rows = 0;
    for (size_t begin = 0, end = 0, done = 0; begin < tiles.size(); begin = end) {
      const int64_t limit = (total * (static_cast<int64_t>(segments.size()) + 1) + count - 1) / count;
      Range seeing = {0, 0};
      while (end < tiles.size() && (end == begin || static_cast<int64_t>(done) < limit)) {
        const Tile& tile = tiles[end++];
        done += tile.work() + 1;
        if (tile.work() > 0) seeing = {seeing.size() > 0 ? seeing.begin : tile.streamed.begin, tile.streamed.end};
      }
      segments.push_back({runs_of(tiles.subspan(begin, end - begin), most), seeing, rows});
      rows += seeing.size() + padding;
    }
    const double sums = static_cast<double>(rows) / static_cast<double>(queries);
    if (count == 1 || sums <= kCheapSums || (count * groups <= kSegments && sums <= kMostSums)) return segments;
  }
}

// Calls f(head, item, scratch) for all heads and items, with equal shares of the work for the threads. A streamed row
// costs as much as `cost` (lane, row) pairs; f gets `size` elements of scratch.
template <class A, class Item, class F>
void for_each_item(const Tensor& like, int64_t heads, const std::vector<Item>& items, int64_t cost, int64_t size, F f) {
  if (items.empty()) return;
  std::vector<int64_t> before = {0};  // work before each item
  for (const Item& item : items) before.push_back(before.back() + work_of(item));
  const int64_t total = heads * before.back();
  const int64_t threads = total * cost <= kSerialWork ? 1 : torch::stable::get_num_threads();
  Tensor memory = torch::stable::new_empty(like, {threads * size}, accumulator(like));
  A* const scratch = memory.mutable_data_ptr<A>();
  parallel_for(threads, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = total * first / threads, end = total * last / threads;
    for (int64_t head = 0; head < heads; ++head)
      for (size_t i = 0; i < items.size(); ++i) {
        const int64_t start = head * before.back() + before[i];
        if (begin <= start && start < end) f(head, items[i], Scratch<A>{scratch + first * size});
      }
  });
}

}  // namespace blt
