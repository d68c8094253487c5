#include "decode.h"

#include "../../common/dispatch.h"
#include "decode_rows.h"
#include "items.h"

namespace blt {
namespace {

inline constexpr int64_t kPartKeys = 256;     // keys in a part: results depend on it, not on the number of threads
inline constexpr int64_t kPartCost = 16;      // the work of starting a part, in keys
inline constexpr int64_t kDecodeCost = 8;     // the cost of a key for a row of one head, in (lane, key) pairs
inline constexpr int64_t kUnpackedKeys = 8;   // the fewest keys for each query that need not be packed
inline constexpr int64_t kPartsOfThread = 4;  // with fewer parts a thread, heads are divided too

// Consecutive keys of a tile. If the tile has several parts, their results go to `partial`, counted in rows.
struct Part {
  const Tile* tile;
  Range keys;
  int64_t partial;  // -1: the tile has no other part
};

int64_t work_of(const Part& part) { return part.keys.size() * part.tile->lanes.size() + kPartCost; }

// The softmax of the rows of some key/value heads, each row with E padded to `pitch`.
template <class A>
struct Rows {
  A* queries;  // [row][pitch], times Scaling::power
  A* acc;      // [row][pitch], sums of weights times values
  A* sum;      // [row][lane]
  A* max;      // [row]

  static int64_t size(int64_t rows, int64_t pitch) {
    const auto padded = [](int64_t size) { return Scratch<A>::padded(size); };
    return 2 * padded(rows * pitch) + padded(rows * lanes<A>) + padded(rows);
  }
  Rows(Scratch<A>& scratch, int64_t rows, int64_t pitch)
      : queries(scratch.take(rows * pitch)),
        acc(scratch.zeros(rows * pitch)),
        sum(scratch.zeros(rows * lanes<A>)),
        max(scratch.take(rows)) {
    std::fill(max, max + rows, kMaskedScore<A>);
  }
};

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

// The products of row r with `count` keys become weights exp(factor * (s - max)), and its softmax follows. Keys outside
// of `unmasked`, which counts from the first of them, are masked.
template <class A>
void exp_row(A* scores, int64_t count, const Range& unmasked, A factor, const Rows<A>& rows, int64_t r, int64_t pitch) {
  const bool masked = unmasked.begin > 0 || unmasked.end < whole_vectors<A>(count);
  const Vec<A> first = Vec<A>{} + static_cast<A>(unmasked.begin), last = Vec<A>{} + static_cast<A>(unmasked.end);
  Vec<A> peaks = Vec<A>{} + kMaskedScore<A>;
  for (int c = 0; c * lanes<A> < count; ++c) {
    Vec<A> s = load(scores + c * lanes<A>);
    if (masked) {
      const Vec<A> j = lane_numbers<A>(c);
      s = ((first <= j) & (j < last)) ? s : Vec<A>{} + kMaskedScore<A>;
      store(scores + c * lanes<A>, s);
    }
    peaks = s > peaks ? s : peaks;
  }
  // The maximum follows only when a score has grown by more than 1, so acc is seldom rescaled.
  if (any(factor * (peaks - rows.max[r]) > Vec<A>{} + A(1))) {
    const A peak = fold<A>(peaks, [](A a, A b) { return a > b ? a : b; });
    const A decay = std::exp(factor * (rows.max[r] - peak));
    rows.max[r] = peak;
    store(rows.sum + r * lanes<A>, decay * load(rows.sum + r * lanes<A>));
    for (int64_t e = r * pitch; e < (r + 1) * pitch; e += lanes<A>) store(rows.acc + e, decay * load(rows.acc + e));
  }
  const A shift = rows.max[r] == kMaskedScore<A> ? 0 : rows.max[r];
  Vec<A> sum = load(rows.sum + r * lanes<A>);
  for (int c = 0; c * lanes<A> < count; ++c) {
    const Vec<A> p = bounded_exp(load(scores + c * lanes<A>) - shift, factor);  // 0 for kMaskedScore
    store(scores + c * lanes<A>, p);
    sum += p;
  }
  store(rows.sum + r * lanes<A>, sum);
}

template <class T, class A>
struct Decoder {
  const Problem& problem;
  const OutputHeads& out;
  A* lse;
  A* partial;
  int64_t head_dim = problem.head_dim, pitch = pitch_of<A>(head_dim), shared = problem.heads_per_kv_head();
  bool padded = head_dim != pitch;
  Scaling<A> scaling{problem.scale};

  // Elements of scratch for `rows` rows.
  static int64_t scratch(int64_t rows, int64_t head_dim) {
    const int64_t pitch = pitch_of<A>(head_dim);
    const int64_t block = Scratch<A>::padded(kWidth<A> * pitch);
    return Rows<A>::size(rows, pitch) + Scratch<A>::padded(rows * kWidth<A>) + (head_dim == pitch ? 1 : 2) * block;
  }

  // The rows of a block of keys or values, copied and padded with zeros where E is not whole Pairs.
  KeyRows<T> rows_of(const Heads& x, int64_t kv_head, const Range& keys, T* copy) const {
    if (!padded) return {x.row<T>(keys.begin, kv_head), x.row_stride};
    for (int64_t i = 0; i < keys.size(); ++i)
      std::copy_n(x.row<T>(keys.begin + i, kv_head), head_dim, copy + i * pitch);
    return {copy, pitch};
  }

  // Returns whether keys are packed, so that scores are summed along E in a lane. Documents of few keys occur in
  // training, and its backward pass needs scores rounded like those that it computes itself.
  static bool is_packed(const Tile& tile) { return tile.work() < kUnpackedKeys * tile.lanes.size(); }

  // Loads the queries of a head: in the order of the elements where keys are packed, else in that of Pairs.
  void load_queries(A* rows, int64_t head, const Range& queries, bool packed) const {
    for (int64_t i = 0; i < queries.size(); ++i, rows += pitch) {
      const T* const row = problem.q.row<T>(queries.begin + i, head);
      for (int64_t e = 0; e < pitch; e += pair_lanes<A>) {
        T part[pair_lanes<A>] = {};
        std::copy_n(row + e, std::min<int64_t>(pair_lanes<A>, head_dim - e), part);
        const PairOf<A> x = packed ? PairOf<A>{load_as<A>(part), load_as<A>(part + lanes<A>)} : load_pair(part);
        store(rows + e, scaling.power * x.a);
        store(rows + e + lanes<A>, scaling.power * x.b);
      }
    }
  }

  // Writes the results of a row, from its sums.
  void finish(int64_t query, int64_t head, const A* acc, A max, A sum) const {
    const A inverse_sum = max == kMaskedScore<A> ? 0 : 1 / sum;
    lse[query * problem.num_heads + head] = scaling.factor * max + std::log(sum);
    T* const row = out.row<T>(query, head);
    for (int64_t e = 0; e < head_dim; e += pair_lanes<A>) {
      T part[pair_lanes<A>];
      store_pair(part, PairOf<A>{inverse_sum * load(acc + e), inverse_sum * load(acc + e + lanes<A>)});
      std::copy_n(part, std::min<int64_t>(pair_lanes<A>, head_dim - e), row + e);
    }
  }

  // Computes a part for the key/value heads of a range.
  void attend(const Part& part, const Range& kv_heads, Scratch<A> scratch) const {
    const Range& queries = part.tile->lanes;
    const int64_t count = queries.size(), rows = shared * count;
    const bool packed = is_packed(*part.tile);
    A* const weights = scratch.take(rows * kWidth<A>);                      // [row][key]
    A* const pack = packed ? scratch.take(head_dim * kWidth<A>) : nullptr;  // [E][key]
    T* const copy = padded ? reinterpret_cast<T*>(scratch.zeros(kWidth<A> * pitch)) : nullptr;
    const Rows<A> all(scratch, kv_heads.size() * rows, pitch);
    for (int64_t head = kv_heads.begin * shared; head < kv_heads.end * shared; ++head)
      load_queries(all.queries + (head - kv_heads.begin * shared) * count * pitch, head, queries, packed);
    Range unmasked[kMaxDecodeQueries];
    for (int64_t i = 0; i < count; ++i)
      unmasked[i] = problem.ranges.keys(queries.begin + i, problem.ranges.document_of(queries.begin + i));
    for (int64_t begin = part.keys.begin; begin < part.keys.end; begin += kWidth<A>) {
      const Range keys = {begin, std::min(begin + kWidth<A>, part.keys.end)};
      const int64_t width = whole_vectors<A>(keys.size());  // of a row of weights
      for (int64_t g = kv_heads.begin; g < kv_heads.end; ++g) {
        const int64_t own = (g - kv_heads.begin) * rows;
        if (packed) {
          transpose_in(pack, problem.k, g, keys, head_dim, A(1), width);
          wide_product(weights, rows, all.queries + own * pitch, pitch, 1, pack, head_dim, false, width);
        } else {
          const KeyRows<T> k = rows_of(problem.k, g, keys, copy);
          for_row_tiles(rows, [&]<int kRows>(int64_t r) {
            dot_keys<kRows>(weights + r * width, width, all.queries + (own + r) * pitch, pitch, k, keys.size());
          });
        }
        for (int64_t r = 0; r < rows; ++r) {
          const Range& range = unmasked[r % count];
          exp_row(weights + r * width, keys.size(), {range.begin - begin, range.end - begin}, scaling.factor, all,
                  own + r, pitch);
        }
        const KeyRows<T> v = rows_of(problem.v, g, keys, copy);
        for_row_tiles(rows, [&]<int kRows>(int64_t r) {
          add_values<kRows>(all.acc + (own + r) * pitch, pitch, weights + r * width, width, v, keys.size());
        });
      }
    }
    for (int64_t r = 0; r < kv_heads.size() * rows; ++r) {
      const int64_t head = kv_heads.begin * shared + r / count;
      const A* const acc = all.acc + r * pitch;
      const A sum = fold<A>(load(all.sum + r * lanes<A>), [](A a, A b) { return a + b; });
      if (part.partial < 0) {
        finish(queries.begin + r % count, head, acc, all.max[r], sum);
      } else {
        A* const row = partial + (part.partial + head * count + r % count) * partial_pitch<A>(head_dim);
        std::copy_n(acc, pitch, row);
        row[pitch] = all.max[r], row[pitch + 1] = sum;
      }
    }
  }

  // Calls f<kRows>(r) for tiles of kRows rows from r on.
  template <class F>
  static void for_row_tiles(int64_t rows, const F& f) {
    int64_t r = 0;
    for (; r + kRowTile<A> <= rows; r += kRowTile<A>) f.template operator()<kRowTile<A>>(r);
    if (r + 2 <= rows) f.template operator()<2>(r), r += 2;
    if (r < rows) f.template operator()<1>(r);
  }

  // Combines `parts` parts of a row, whose first is at `row`: rows of parts are `stride` elements apart.
  void combine(int64_t query, int64_t head, A* row, int64_t parts, int64_t stride) const {
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
    finish(query, head, row, max, sum);
  }
};

}  // namespace

template <class A>
void decode(const torch::stable::Tensor& like, const Problem& problem, const OutputHeads& out, A* lse,
            const std::vector<Tile>& tiles) {
  if (tiles.empty()) return;
  std::vector<Part> parts;
  std::vector<int64_t> divided;  // first parts of the tiles that have several
  int64_t max_queries = 0, partial_rows = 0;
  for (const Tile& tile : tiles) {
    const bool several = tile.work() > kPartKeys;
    max_queries = std::max(max_queries, tile.lanes.size());
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
  const int64_t rows = (problem.num_kv_heads + head_parts - 1) / head_parts * problem.heads_per_kv_head() * max_queries;
  const int64_t partial_size = partial_pitch<A>(problem.head_dim);
  std::optional<Tensor> partial;
  if (partial_rows > 0) partial = new_output(like, {partial_rows * partial_size}, accumulator(like));
  dispatch_storage<A>(problem.k.dtype, [&]<class T>(Tag<T>) {
    const Decoder<T, A> decoder = {problem, out, lse, partial ? partial->mutable_data_ptr<A>() : nullptr};
    for_each_item<A>(like, head_parts, parts, problem.num_heads / head_parts * kDecodeCost,
                     Decoder<T, A>::scratch(rows, problem.head_dim),
                     [&](int64_t head_part, const Part& part, Scratch<A> scratch) {
                       const Range kv_heads = {problem.num_kv_heads * head_part / head_parts,
                                               problem.num_kv_heads * (head_part + 1) / head_parts};
                       decoder.attend(part, kv_heads, scratch);
                     });
    parallel_for(static_cast<int64_t>(divided.size()), kPartsOfThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Part& first = parts[divided[i]];
        const Range& queries = first.tile->lanes;
        const int64_t num_parts = (first.tile->work() + kPartKeys - 1) / kPartKeys;
        const int64_t own = problem.num_heads * queries.size();
        for (int64_t r = 0; r < own; ++r)
          decoder.combine(queries.begin + r % queries.size(), r / queries.size(),
                          decoder.partial + (first.partial + r) * partial_size, num_parts, own * partial_size);
      }
    });
  });
}

template void decode(const Tensor&, const Problem&, const OutputHeads&, float*, const std::vector<Tile>&);
template void decode(const Tensor&, const Problem&, const OutputHeads&, double*, const std::vector<Tile>&);

}  // namespace blt
