// The forward pass of block_causal_attention for few queries, as in decoding with a cache.
//
// A tile of few queries would leave most lanes empty, so here the width E lies across the lanes, padded with zeros to
// chunks of kWidth, and keys across them in the softmax. All heads of a group share what is read of their keys and
// values: rows are (head, query) pairs.
#pragma once

#include "../head_tiles.h"
#include "blocks.h"

namespace blt {

// Up to here a tile is one of few queries.
template <class A>
inline constexpr int64_t kFew = kWidth<A> / 4;

// Cost of a streamed key for a row of few, in (lane, key) pairs: one row cannot keep the multiply-adds busy.
inline constexpr int64_t kFewCost = 8;

// Blocks of kWidth columns that hold E.
template <class A>
int64_t chunks_of(int64_t width) {
  return (width + kWidth<A> - 1) / kWidth<A>;
}

// Elements of scratch: what is known of one group, and all of it.
template <class A>
int64_t few_state(int64_t rows, int64_t width) {
  return 2 * Scratch<A>::padded(chunks_of<A>(width) * rows * kWidth<A>) + 2 * Scratch<A>::padded(rows);
}

template <class A>
int64_t few_scratch(int64_t groups, int64_t rows, int64_t width) {
  return chunks_of<A>(width) * kWidth<A> * kWidth<A> + Scratch<A>::padded(rows * kWidth<A>) +
         groups * few_state<A>(rows, width);
}

// What is known of the softmax of the rows of a group.
template <class A>
struct FewRows {
  A* queries;  // [chunk][row][lane], scaled
  A* sums;     // [chunk][row][lane], of weights times values
  A *top, *total;
};

// scores[row][key] = sum over chunks of queries[chunk][row] . keys[chunk][key]
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

// weights [row][key] come in as scores; keys `seen` of `step` count.
template <class A>
void weigh_row(A* weights, const Range& seen, int64_t begin, const FewRows<A>& group, int64_t r, int64_t rows,
               int64_t chunks) {
  const A first = static_cast<A>(seen.begin - begin), last = static_cast<A>(seen.end - begin);
  Vec<A> s[kColumns], peaks = Vec<A>{} + kNone<A>, added = {};
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    const Vec<A> j = lane_numbers<A>(c);
    s[c] = (first <= j) & (j < last) ? load(weights + c * lanes<A>) : Vec<A>{} + kNone<A>;
    peaks = s[c] > peaks ? s[c] : peaks;
  }
  const A peak = fold_lanes<A>(peaks, [](auto a, auto b) { return a > b ? a : b; }), top = group.top[r];
  if (peak > top) {
    const A decay = std::exp(top - peak);
    group.top[r] = peak;
    group.total[r] *= decay;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = (chunk * rows + r) * kWidth<A>; i < (chunk * rows + r + 1) * kWidth<A>; ++i)
        group.sums[i] *= decay;
  }
  const A shift = group.top[r] == kNone<A> ? 0 : group.top[r];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    const Vec<A> p = s[c] == kNone<A> ? Vec<A>{} : bounded_exp(s[c] - shift);
    store(weights + c * lanes<A>, p);
    added += p;
  }
  group.total[r] += fold_lanes<A>(added, [](auto a, auto b) { return a + b; });
}

// out and lse of the queries of a tile, in the heads of some groups. Rows of keys hold all groups side by side, so they
// are read a step at a time for all of them.
template <class T, class A>
void attend_few(const Problem<T>& problem, const Heads<T>& out, A* lse, const Range& groups, const Tile& tile,
                Scratch<A> scratch) {
  const int64_t width = problem.width, chunks = chunks_of<A>(width), shared = problem.heads / problem.groups;
  const int64_t count = tile.lanes.size(), rows = shared * count;
  const auto head_of = [&](int64_t g, int64_t r) { return g * shared + r / count; };
  A* const gathered = scratch.zeros(chunks * kWidth<A> * kWidth<A>);  // [chunk][key][lane]
  A* const weights = scratch.take(rows * kWidth<A>);                  // [row][key]
  A* const states = scratch.next;
  const auto state_of = [&](int64_t g) {
    Scratch<A> own = {states + (g - groups.begin) * few_state<A>(rows, width)};
    return FewRows<A>{own.take(chunks * rows * kWidth<A>), own.take(chunks * rows * kWidth<A>), own.take(rows),
                      own.take(rows)};
  };
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const FewRows<A> state = state_of(g);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t r = 0; r < rows; r += count)
        gather_chunk<T, A>(state.queries + (chunk * rows + r) * kWidth<A>, problem.q, head_of(g, r), tile.lanes, width,
                           chunk);
    for (int64_t i = 0; i < chunks * rows * kWidth<A>; ++i) state.queries[i] *= static_cast<A>(problem.scale);
    std::fill(state.sums, state.sums + chunks * rows * kWidth<A>, A(0));
    std::fill(state.top, state.top + rows, kNone<A>);
    std::fill(state.total, state.total + rows, A(0));
  }
  Range seen[kFew<A>];
  for (int64_t i = 0; i < count; ++i)
    seen[i] = problem.visible.keys(tile.lanes.begin + i, problem.visible.document_of(tile.lanes.begin + i));

  for (int64_t begin = tile.streamed.begin; begin < tile.streamed.end; begin += kWidth<A>) {
    const Range step = {begin, std::min(begin + kWidth<A>, tile.streamed.end)};
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const FewRows<A> state = state_of(g);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        gather_chunk<T, A>(gathered + chunk * kWidth<A> * kWidth<A>, problem.k, g, step, width, chunk);
      dot_keys(weights, state.queries, rows, gathered, step.size(), chunks);
      for (int64_t r = 0; r < rows; ++r)
        weigh_row(weights + r * kWidth<A>, seen[r % count], begin, state, r, rows, chunks);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        A* const block = gathered + chunk * kWidth<A> * kWidth<A>;
        gather_chunk<T, A>(block, problem.v, g, step, width, chunk);
        product(state.sums + chunk * rows * kWidth<A>, rows, weights, kWidth<A>, 1, block, step.size(), true);
      }
    }
  }

  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const FewRows<A> state = state_of(g);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = tile.lanes.begin + r % count;
      const A share = state.top[r] == kNone<A> ? 0 : 1 / state.total[r];
      lse[i * problem.heads + head_of(g, r)] = state.top[r] + std::log(state.total[r]);
      T* const row = out.row(i, head_of(g, r));
      for (int64_t e = 0; e < width; ++e)
        row[e] = static_cast<T>(share * state.sums[(e / kWidth<A> * rows + r) * kWidth<A> + e % kWidth<A>]);
    }
  }
}

}  // namespace blt
