#include "decode.h"

namespace blt {
namespace {

// Blocks of kWidth columns that hold E.
template <class A>
int64_t chunks_of(int64_t head_dim) {
  return (head_dim + kWidth<A> - 1) / kWidth<A>;
}

// The queries of a key/value head and the state of their softmax.
template <class A>
struct DecodeState {
  A* queries;    // [chunk][row][lane], scaled
  A* acc;        // [chunk][row][lane], sums of weights times values
  A *max, *sum;  // [row]

  static int64_t size(int64_t rows, int64_t head_dim) {
    return 2 * Scratch<A>::padded(chunks_of<A>(head_dim) * rows * kWidth<A>) + 2 * Scratch<A>::padded(rows);
  }
};

// scores[row][key] = sum over chunks of queries[chunk][row] . keys[chunk][key].
template <class A>
void dot_keys(A* scores, const A* queries, int64_t rows, const A* keys, int64_t count, int64_t chunks) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t key = 0; key < count; key += lanes<A>) {
      Vec<A> sums[lanes<A>] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int c = 0; c < kColumns; ++c) {
          const Vec<A> query = load(queries + (chunk * rows + r) * kWidth<A> + c * lanes<A>);
#pragma GCC unroll 16
          for (int i = 0; i < lanes<A>; ++i)
            sums[i] += query * load(keys + (chunk * kWidth<A> + key + i) * kWidth<A> + c * lanes<A>);
        }
      store(scores + r * kWidth<A> + key, lane_sums<A>(sums));
    }
}

// The scores of row r for the keys from `begin` on become weights, and its softmax follows. Keys outside of `keys` are
// masked.
template <class A>
void exp_row(A* scores, const Range& keys, int64_t begin, const DecodeState<A>& state, int64_t r, int64_t rows,
             int64_t chunks) {
  const A first = static_cast<A>(keys.begin - begin), last = static_cast<A>(keys.end - begin);
  Vec<A> s[kColumns], peaks = Vec<A>{} + kMaskedScore<A>, added = {};
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    const Vec<A> j = lane_numbers<A>(c);
    const Mask<A> unmasked = (first <= j) & (j < last);
    s[c] = unmasked ? load(scores + c * lanes<A>) : Vec<A>{} + kMaskedScore<A>;
    peaks = s[c] > peaks ? s[c] : peaks;
  }
  const A peak = fold<A>(peaks, [](A a, A b) { return a > b ? a : b; }), before = state.max[r];
  if (peak > before) {
    const A decay = std::exp(before - peak);
    state.max[r] = peak;
    state.sum[r] *= decay;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = (chunk * rows + r) * kWidth<A>; i < (chunk * rows + r + 1) * kWidth<A>; ++i)
        state.acc[i] *= decay;
  }
  const A shift = state.max[r] == kMaskedScore<A> ? 0 : state.max[r];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    const Vec<A> p = s[c] == kMaskedScore<A> ? Vec<A>{} : bounded_exp(s[c] - shift);
    store(scores + c * lanes<A>, p);
    added += p;
  }
  state.sum[r] += fold<A>(added, [](A a, A b) { return a + b; });
}

}  // namespace

template <class A>
int64_t decode_scratch(int64_t num_kv_heads, int64_t rows, int64_t head_dim) {
  const int64_t gathered = chunks_of<A>(head_dim) * kWidth<A> * kWidth<A>, weights = rows * kWidth<A>;
  return gathered + Scratch<A>::padded(weights) + num_kv_heads * DecodeState<A>::size(rows, head_dim);
}

template <class A>
void decode(const Problem& problem, const OutputHeads& out, A* lse, const Range& kv_heads, const Tile& tile,
            Scratch<A> scratch) {
  const int64_t head_dim = problem.head_dim, chunks = chunks_of<A>(head_dim), shared = problem.heads_per_kv_head();
  const int64_t count = tile.lanes.size(), rows = shared * count;
  const auto head_of = [&](int64_t kv_head, int64_t r) { return kv_head * shared + r / count; };
  A* const gathered = scratch.zeros(chunks * kWidth<A> * kWidth<A>);  // [chunk][key][lane]
  A* const weights = scratch.take(rows * kWidth<A>);                  // [row][key]
  A* const states = scratch.next;
  const auto state_of = [&](int64_t kv_head) {
    Scratch<A> own = {states + (kv_head - kv_heads.begin) * DecodeState<A>::size(rows, head_dim)};
    return DecodeState<A>{own.take(chunks * rows * kWidth<A>), own.take(chunks * rows * kWidth<A>), own.take(rows),
                          own.take(rows)};
  };
  for (int64_t g = kv_heads.begin; g < kv_heads.end; ++g) {
    const DecodeState<A> state = state_of(g);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t r = 0; r < rows; r += count)
        gather_chunk<A>(state.queries + (chunk * rows + r) * kWidth<A>, problem.q, head_of(g, r), tile.lanes, head_dim,
                        chunk);
    for (int64_t i = 0; i < chunks * rows * kWidth<A>; ++i) state.queries[i] *= static_cast<A>(problem.scale);
    std::fill(state.acc, state.acc + chunks * rows * kWidth<A>, A(0));
    std::fill(state.max, state.max + rows, kMaskedScore<A>);
    std::fill(state.sum, state.sum + rows, A(0));
  }
  Range keys[max_decode_queries(kWidth<A>)];
  for (int64_t i = 0; i < count; ++i)
    keys[i] = problem.ranges.keys(tile.lanes.begin + i, problem.ranges.document_of(tile.lanes.begin + i));

  for (int64_t begin = tile.streamed.begin; begin < tile.streamed.end; begin += kWidth<A>) {
    const Range step = {begin, std::min(begin + kWidth<A>, tile.streamed.end)};
    for (int64_t g = kv_heads.begin; g < kv_heads.end; ++g) {
      const DecodeState<A> state = state_of(g);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        gather_chunk<A>(gathered + chunk * kWidth<A> * kWidth<A>, problem.k, g, step, head_dim, chunk);
      dot_keys(weights, state.queries, rows, gathered, step.size(), chunks);
      for (int64_t r = 0; r < rows; ++r)
        exp_row(weights + r * kWidth<A>, keys[r % count], begin, state, r, rows, chunks);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        A* const block = gathered + chunk * kWidth<A> * kWidth<A>;
        gather_chunk<A>(block, problem.v, g, step, head_dim, chunk);
        product<A>(state.acc + chunk * rows * kWidth<A>, rows, weights, kWidth<A>, 1, block, step.size(), true);
      }
    }
  }

  for (int64_t g = kv_heads.begin; g < kv_heads.end; ++g) {
    const DecodeState<A> state = state_of(g);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t query = tile.lanes.begin + r % count;
      const A inverse_sum = state.max[r] == kMaskedScore<A> ? 0 : 1 / state.sum[r];
      lse[query * problem.num_heads + head_of(g, r)] = state.max[r] + std::log(state.sum[r]);
      for (int64_t e = 0; e < head_dim; ++e)  // the chunks of a row, side by side
        gathered[e] = inverse_sum * state.acc[(e / kWidth<A> * rows + r) * kWidth<A> + e % kWidth<A>];
      store_row<A>(out, query, head_of(g, r), head_dim, gathered);
    }
  }
}

template int64_t decode_scratch<float>(int64_t, int64_t, int64_t);
template int64_t decode_scratch<double>(int64_t, int64_t, int64_t);
template void decode(const Problem&, const OutputHeads&, float*, const Range&, const Tile&, Scratch<float>);
template void decode(const Problem&, const OutputHeads&, double*, const Range&, const Tile&, Scratch<double>);

}  // namespace blt
