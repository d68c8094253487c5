#include "decode.h"

#include "../../common/dispatch.h"
#include "decode_rows.h"
#include "items.h"

namespace blt {
namespace {

inline constexpr int64_t kPartKeys = 512;     // keys in a part: results depend on it, not on the number of threads
inline constexpr int64_t kPartCost = 16;      // the work of starting a part, in keys
inline constexpr int64_t kDecodeCost = 8;     // the cost of a key for a row of one head, in (lane, key) pairs
inline constexpr int64_t kUnorderedKeys = 8;  // the fewest keys for each query whose scores are summed in any order
inline constexpr int64_t kHeadRows = 64;      // rows of all heads together that take turns with a few keys
inline constexpr int64_t kPartsOfThread = 4;  // with fewer parts a thread, heads are divided too

// Consecutive keys of a tile. If the tile has several parts, their results go to `partial`, counted in rows.
struct Part {
  const Tile* tile;
  Range keys;
  int64_t partial;  // -1: the tile has no other part
};

int64_t work_of(const Part& part) { return part.keys.size() * part.tile->lanes.size() + kPartCost; }

// E in whole Pairs.
template <class A>
int64_t pitch_of(int64_t head_dim) {
  return (head_dim + pair_lanes<A> - 1) / pair_lanes<A> * pair_lanes<A>;
}

// A row of several parts is combined from acc [pitch], then max and sum, of each.
template <class A>
int64_t partial_pitch(int64_t head_dim) {
  return pitch_of<A>(head_dim) + pair_lanes<A>;
}

// Returns whether scores are summed along E in order. Documents of few keys occur in training, and its backward pass
// needs scores rounded like those that it computes itself.
bool in_order(const Tile& tile) { return tile.work() < kUnorderedKeys * tile.lanes.size(); }

// Divides rows into tiles: calls f<kRows>(r) for each, from row r on. The last one may have more rows than there are.
// `in_order`: all scores are sums along E in order. Returns the number of rows with those that pad the last tile.
template <class A, int kRows = lanes<A>, class F>
int64_t for_row_tiles(int64_t rows, bool in_order, const F& f, int64_t r = 0) {
  for (; in_order ? r < rows : 4 * (rows - r) > 3 * kRows; r += kRows) f.template operator()<kRows>(r);
  if constexpr (kRows > 1) return for_row_tiles<A, kRows / 2>(rows, in_order, f, r);
  return r;
}

template <class A>
int64_t padded_rows(int64_t rows, bool in_order) {
  return for_row_tiles<A>(rows, in_order, []<int>(int64_t) {});
}

// The memory of a part.
template <class A>
struct Memory {
  int64_t rows, acc_rows;  // of a key/value head, padded to whole tiles
  A* queries;              // [head][row][pitch]
  A* acc;                  // [head][acc_row][pitch]
  A *max, *sum;            // [head][row][lane], of which a tile at row r has the vector at r * kSlice
  A *first, *last;         // [row][lane], likewise: the keys of a block that each lane attends to
  A* weights;              // [head][row][key], for the heads of a step
  A* copy;                 // [key][pitch]

  static int64_t size(int64_t heads, int64_t rows, int64_t acc_rows, int64_t pitch, bool copies) {
    const auto padded = [](int64_t size) { return Scratch<A>::padded(size); };
    return padded(heads * rows * pitch) + padded(heads * acc_rows * pitch) + 2 * padded(heads * rows * lanes<A>) +
           2 * padded(rows * lanes<A>) + padded(std::max(rows, std::min(kHeadRows, heads * rows)) * kWidth<A>) +
           padded(copies ? kKeyGroup * pitch : 0);
  }
  Memory(Scratch<A>& scratch, int64_t heads, int64_t rows, int64_t acc_rows, int64_t pitch, bool copies)
      : rows(rows),
        acc_rows(acc_rows),
        queries(scratch.take(heads * rows * pitch)),
        acc(scratch.zeros(heads * acc_rows * pitch)),
        max(scratch.take(heads * rows * lanes<A>)),
        sum(scratch.take(heads * rows * lanes<A>)),
        first(scratch.take(rows * lanes<A>)),
        last(scratch.take(rows * lanes<A>)),
        weights(scratch.take(std::min(heads, step()) * rows * kWidth<A>)),
        copy(scratch.zeros(copies ? kKeyGroup * pitch : 0)) {}

  // Heads that take turns with a few keys: as many as have kHeadRows rows.
  int64_t step() const { return std::max<int64_t>(kHeadRows / rows, 1); }
};

template <class T, class A>
struct Decoder {
  const Problem& problem;
  const OutputHeads& out;
  A* lse;
  A* partial;
  int64_t head_dim = problem.head_dim, pitch = pitch_of<A>(head_dim), shared = problem.heads_per_kv_head();
  Scaling<A> scaling{problem.scale};

  // Returns whether keys and values are not multiplied in place.
  bool copies() const { return head_dim != pitch || !std::is_same_v<T, A>; }

  // Returns whether keys and values of 16 bits are not converted. Queries and acc then have the order of Pairs.
  bool in_pairs(const Tile& tile) const {
    return !std::is_same_v<T, A> && shared * tile.lanes.size() == 1 && !in_order(tile);
  }

  // Rows of keys or values of type U: in place, or in `copy`, converted and padded with zeros.
  template <class U>
  KeyRows<U> rows_of(const Heads& x, int64_t kv_head, const Range& keys, A* copy) const {
    if constexpr (std::is_same_v<U, T>)
      if (head_dim == pitch) return {x.row<T>(keys.begin, kv_head), x.row_stride};
    U* const rows = reinterpret_cast<U*>(copy);
    if constexpr (std::is_same_v<U, A>)
      gather_rows(rows, x, kv_head, keys, head_dim, pitch);
    else
      for (int64_t i = 0; i < keys.size(); ++i)
        std::copy_n(x.row<T>(keys.begin + i, kv_head), head_dim, rows + i * pitch);
    return {rows, pitch};
  }

  // Loads the queries of a tile: `count` queries of each head from `first_head` on are rows, from number `begin` on.
  template <int kRows>
  void load_queries(A* block, int64_t first_head, const Range& queries, int64_t begin, bool pairs) const {
    constexpr int kLength = kSlice<A, kRows>, kFew = 4;  // the most rows that are faster to copy one by one
    const int64_t count = queries.size(), rows = std::min<int64_t>(kRows, shared * count - begin);
    const T* row[kRows];
    for (int64_t r = 0; r < rows; ++r)
      row[r] = problem.q.row<T>(queries.begin + (begin + r) % count, first_head + (begin + r) / count);
    if (kRows == 1 && pairs) {
      for (int64_t e = 0; e < pitch; e += pair_lanes<A>) {
        T part[pair_lanes<A>] = {};
        std::copy_n(row[0] + e, std::min<int64_t>(pair_lanes<A>, head_dim - e), part);
        const PairOf<A> x = load_pair(part);
        store_pair(block + e, PairOf<A>{scaling.power * x.a, scaling.power * x.b});
      }
      return;
    }
    int64_t e = 0;
    if constexpr (kLength == 1)
      for (; rows > kFew && e + lanes<A> <= head_dim; e += lanes<A>) {
        Vec<A> square[kRows];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) square[r] = r < rows ? scaling.power * load_as<A>(row[r] + e) : Vec<A>{};
        transpose<A>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) store(block + (e + i) * kRows, square[i]);
      }
    if (rows < kRows || head_dim < pitch)
      for (int64_t cell = e * kRows; cell < pitch * kRows; cell += lanes<A>) store(block + cell, Vec<A>{});
    for (int64_t r = 0; r < rows; ++r) {
      A* const cells = block + r * kLength;
      int64_t i = e;
      for (; i + kLength <= head_dim; i += kLength)
        for (int j = 0; j < kLength; ++j) cells[i * kRows + j] = scaling.power * static_cast<A>(row[r][i + j]);
      for (int j = 0; i + j < head_dim; ++j) cells[i * kRows + j] = scaling.power * static_cast<A>(row[r][i + j]);
    }
  }

  // Sets the keys of a block that each lane of a tile attends to, counted from `origin`.
  template <int kRows>
  static void set_bounds(const Memory<A>& memory, int64_t begin, const Range* unmasked, int64_t count, int64_t rows,
                         int64_t origin) {
    for (int64_t lane = 0; lane < lanes<A>; ++lane) {
      const int64_t r = begin + lane / kSlice<A, kRows>;
      const Range keys = r < rows ? unmasked[r % count] : Range{0, 0};
      const int64_t cell = begin * kSlice<A, kRows> + lane;
      memory.first[cell] = static_cast<A>(std::clamp<int64_t>(keys.begin - origin, 0, kWidth<A>));
      memory.last[cell] = static_cast<A>(std::clamp<int64_t>(keys.end - origin, 0, kWidth<A>));
    }
  }

  // Writes the results of a row, from its sums.
  void finish(int64_t query, int64_t head, const A* acc, A max, A sum, bool pairs) const {
    const A inverse_sum = max == kMaskedScore<A> ? 0 : 1 / sum;
    lse[query * problem.num_heads + head] = scaling.factor * max + std::log(sum);
    T* const row = out.row<T>(query, head);
    for (int64_t e = 0; e < head_dim; e += pair_lanes<A>) {
      T part[pair_lanes<A>];
      const PairOf<A> x = {inverse_sum * load(acc + e), inverse_sum * load(acc + e + lanes<A>)};
      if (pairs)
        store_pair(part, x);
      else
        store_as<T, A>(part, x.a), store_as<T, A>(part + lanes<A>, x.b);
      std::copy_n(part, std::min<int64_t>(pair_lanes<A>, head_dim - e), row + e);
    }
  }

  // Computes a part for the key/value heads of a range, with keys and values of type U.
  template <class U>
  void attend(const Part& part, const Range& kv_heads, Scratch<A> scratch) const {
    constexpr bool kPairs = !std::is_same_v<U, A>;
    const Range& queries = part.tile->lanes;
    const int64_t count = queries.size(), rows = shared * count;
    const Memory<A> memory(scratch, kv_heads.size(), padded_rows<A>(rows, in_order(*part.tile)),
                           padded_rows<A>(rows, false), pitch, copies());
    const auto for_tiles = [&](const auto& f) {
      if constexpr (kPairs)
        f.template operator()<1>(0);
      else
        for_row_tiles<A>(rows, in_order(*part.tile), f);
    };
    for (int64_t g = kv_heads.begin; g < kv_heads.end; ++g)
      for_tiles([&]<int kRows>(int64_t r) {
        const int64_t row = (g - kv_heads.begin) * memory.rows, vector = row * lanes<A> + r * kSlice<A, kRows>;
        load_queries<kRows>(memory.queries + (row + r) * pitch, g * shared, queries, r, kPairs);
        store(memory.max + vector, Vec<A>{} + kMaskedScore<A>);
        store(memory.sum + vector, Vec<A>{});
      });
    Range unmasked[kMaxDecodeQueries];
    for (int64_t i = 0; i < count; ++i)
      unmasked[i] = problem.ranges.keys(queries.begin + i, problem.ranges.document_of(queries.begin + i));
    for (int64_t begin = part.keys.begin; begin < part.keys.end; begin += kWidth<A>) {
      const Range block = {begin, std::min(begin + kWidth<A>, part.keys.end)};
      bool masked = block.size() % lanes<A> != 0;
      for (int64_t i = 0; i < count; ++i) masked |= unmasked[i].begin > block.begin || unmasked[i].end < block.end;
      if (masked) for_tiles([&]<int kRows>(int64_t r) { set_bounds<kRows>(memory, r, unmasked, count, rows, begin); });
      for (int64_t g = kv_heads.begin; g < kv_heads.end; g += memory.step())
        attend_block<U>(block, masked, {g, std::min(g + memory.step(), kv_heads.end)}, g - kv_heads.begin, rows, memory,
                        for_tiles);
    }
    for (int64_t g = kv_heads.begin; g < kv_heads.end; ++g)
      for_tiles([&]<int kRows>(int64_t begin) {
        const int64_t vector = (g - kv_heads.begin) * memory.rows * lanes<A> + begin * kSlice<A, kRows>;
        A sums[lanes<A>];
        store(sums, fold_slices<A, kSlice<A, kRows> / 2>(load(memory.sum + vector),
                                                         [](Vec<A> a, Vec<A> b) { return a + b; }));
        for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) {
          const int64_t head = g * shared + r / count, lane = (r - begin) * kSlice<A, kRows>;
          const A* const acc = memory.acc + ((g - kv_heads.begin) * memory.acc_rows + r) * pitch;
          if (part.partial < 0) {
            finish(queries.begin + r % count, head, acc, memory.max[vector + lane], sums[lane], kPairs);
          } else {
            A* const row = partial + (part.partial + head * count + r % count) * partial_pitch<A>(head_dim);
            std::copy_n(acc, pitch, row);
            row[pitch] = memory.max[vector + lane], row[pitch + 1] = sums[lane];
          }
        }
      });
  }

  // Computes a block of keys for the heads of a step, the first of which is number `first` in memory. With several
  // rows, heads take turns with kKeyGroup keys: a row of the tensor holds the heads side by side, and is read at about
  // one time.
  template <class U, class F>
  void attend_block(const Range& block, bool masked, const Range& kv_heads, int64_t first, int64_t rows,
                    const Memory<A>& memory, const F& for_tiles) const {
    const int64_t group = rows == 1 && head_dim == pitch && std::is_same_v<T, U> ? kWidth<A> : kKeyGroup;
    const auto for_groups = [&](const Heads& x, int64_t size, const auto& f) {
      for (int64_t begin = block.begin; begin < block.end; begin += size) {
        const Range keys = {begin, std::min(begin + size, block.end)};
        for (int64_t i = 0; i < kv_heads.size(); ++i)
          f(i, begin - block.begin, rows_of<U>(x, kv_heads.begin + i, keys, memory.copy), keys.size());
      }
    };
    for_groups(problem.k, group, [&](int64_t i, int64_t key, const KeyRows<U>& k, int64_t size) {
      for_tiles([&]<int kRows>(int64_t r) {
        for (int64_t j = 0; j < size; j += kKeyGroup)
          dot_keys<kRows>(memory.weights + (i * memory.rows + r) * kWidth<A> + (key + j) * kRows,
                          memory.queries + ((first + i) * memory.rows + r) * pitch, pitch,
                          KeyRows<U>{k.row(j), k.stride}, std::min<int64_t>(size - j, kKeyGroup));
      });
    });
    for (int64_t i = 0; i < kv_heads.size(); ++i)
      for_tiles([&]<int kRows>(int64_t r) {
        const int64_t slice = r * kSlice<A, kRows>, vector = (first + i) * memory.rows * lanes<A> + slice;
        const TileSoftmax<A> softmax = {memory.max + vector, memory.sum + vector,
                                        memory.acc + ((first + i) * memory.acc_rows + r) * pitch,
                                        std::min<int64_t>(kRows, rows - r), pitch};
        exp_scores<kRows>(memory.weights + (i * memory.rows + r) * kWidth<A>, block.size(),
                          masked ? memory.first + slice : nullptr, memory.last + slice, scaling.factor, softmax);
      });
    for_groups(problem.v, group, [&](int64_t i, int64_t key, const KeyRows<U>& v, int64_t size) {
      for_tiles([&]<int kRows>(int64_t r) {
        const A* const weights = memory.weights + (i * memory.rows + r) * kWidth<A> + key * kRows;
        A* const acc = memory.acc + ((first + i) * memory.acc_rows + r) * pitch;
        const auto add = [&]<int kOwn>(int64_t own) {
          add_values<kRows, kOwn>(acc + own * pitch, pitch, weights + own * kSlice<A, kRows>, v, size);
        };
        if constexpr (kRows == lanes<A>)
          for_row_tiles<A>(std::min<int64_t>(kRows, rows - r), false, add);
        else
          add.template operator()<kRows>(0);
      });
    });
  }

  // Combines `parts` parts of a row, whose first is at `row`: rows of parts are `stride` elements apart.
  void combine(int64_t query, int64_t head, A* row, int64_t parts, int64_t stride, bool pairs) const {
    A max = kMaskedScore<A>, sum = 0;
    for (int64_t i = 0; i < parts; ++i) max = std::max(max, row[i * stride + pitch]);
    const A shift = max == kMaskedScore<A> ? 0 : max;
    for (int64_t i = 0; i < parts; ++i) {
      const A* const other = row + i * stride;
      const A weight = std::exp(scaling.factor * (other[pitch] - shift));
      sum += weight * other[pitch + 1];
      for (int64_t e = 0; e < pitch; e += lanes<A>)
        store(row + e, (i > 0 ? load(row + e) : Vec<A>{}) + weight * load(other + e));
    }
    finish(query, head, row, max, sum, pairs);
  }
};

}  // namespace

template <class A>
void decode(const torch::stable::Tensor& like, const Problem& problem, const OutputHeads& out, A* lse,
            const std::vector<Tile>& tiles) {
  if (tiles.empty()) return;
  std::vector<Part> parts;
  std::vector<int64_t> divided;                      // first parts of the tiles that have several
  int64_t rows = 0, acc_rows = 0, partial_rows = 0;  // of a key/value head, padded
  for (const Tile& tile : tiles) {
    const bool several = tile.work() > kPartKeys;
    const int64_t own = problem.heads_per_kv_head() * tile.lanes.size();
    rows = std::max(rows, padded_rows<A>(own, in_order(tile))),
    acc_rows = std::max(acc_rows, padded_rows<A>(own, false));
    if (several) divided.push_back(static_cast<int64_t>(parts.size()));
    int64_t begin = tile.streamed.begin;
    do {
      const Range keys = {begin, std::min(begin + kPartKeys, tile.streamed.end)};
      parts.push_back({&tile, keys, several ? partial_rows : -1});
      if (several) partial_rows += problem.num_heads * tile.lanes.size();
      begin = keys.end;
    } while (begin < tile.streamed.end);
  }
  const int64_t threads = torch::stable::get_num_threads();
  const bool many = static_cast<int64_t>(parts.size()) >= kPartsOfThread * threads;
  const int64_t head_parts = many ? 1 : std::min(problem.num_kv_heads, threads);
  const int64_t max_kv_heads = (problem.num_kv_heads + head_parts - 1) / head_parts;
  const int64_t partial_size = partial_pitch<A>(problem.head_dim);
  std::optional<Tensor> partial;
  if (partial_rows > 0) partial = new_output(like, {partial_rows * partial_size}, accumulator(like));
  dispatch_storage<A>(problem.k.dtype, [&]<class T>(Tag<T>) {
    const Decoder<T, A> decoder = {problem, out, lse, partial ? partial->mutable_data_ptr<A>() : nullptr};
    for_each_item<A>(like, head_parts, parts, problem.num_heads / head_parts * kDecodeCost,
                     Memory<A>::size(max_kv_heads, rows, acc_rows, decoder.pitch, decoder.copies()),
                     [&](int64_t head_part, const Part& part, Scratch<A> scratch) {
                       const Range kv_heads = {problem.num_kv_heads * head_part / head_parts,
                                               problem.num_kv_heads * (head_part + 1) / head_parts};
                       if (decoder.in_pairs(*part.tile))
                         decoder.template attend<T>(part, kv_heads, scratch);
                       else
                         decoder.template attend<A>(part, kv_heads, scratch);
                     });
    parallel_for(static_cast<int64_t>(divided.size()), kPartsOfThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Part& first = parts[divided[i]];
        const Range& queries = first.tile->lanes;
        const int64_t num_parts = (first.tile->work() + kPartKeys - 1) / kPartKeys;
        const int64_t own = problem.num_heads * queries.size();
        for (int64_t r = 0; r < own; ++r)
          decoder.combine(queries.begin + r % queries.size(), r / queries.size(),
                          decoder.partial + (first.partial + r) * partial_size, num_parts, own * partial_size,
                          decoder.in_pairs(*first.tile));
      }
    });
  });
}

template void decode(const Tensor&, const Problem&, const OutputHeads&, float*, const std::vector<Tile>&);
template void decode(const Tensor&, const Problem&, const OutputHeads&, double*, const std::vector<Tile>&);

}  // namespace blt
