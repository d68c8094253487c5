#include "short.h"

#include "../../common/dispatch.h"
#include "../head_tiles.h"
#include "../support/rows.h"

namespace blt {

ShortDocuments::ShortDocuments(const KeyRanges& ranges) {
  size_t numbers[kShort + 1][kShort + 1] = {};  // count the shapes from 1
  for (int64_t b = 0; b < ranges.documents; ++b) {
    const int64_t queries = ranges.cu_seqlens_q[b + 1] - ranges.cu_seqlens_q[b];
    const int64_t keys = ranges.keys_end(b) - ranges.cu_seqlens_k[b];
    if (queries > kShort || keys > kShort) {
      if (others_.empty() || others_.back().end < b) others_.push_back({b, b});
      others_.back().end = b + 1;
      continue;
    }
    size_t& number = numbers[queries][keys];
    if (number == 0) {
      shapes_.push_back({queries, keys, {}});
      number = shapes_.size();
    }
    shapes_[number - 1].documents.push_back(b);
  }
}

namespace {

inline constexpr int64_t kMultiplied = 2, kSummed = 4;  // rows that dots and weighted_sums take together

// Has the pairs of a shape: the queries and the keys of a document that take part, and then, counted from the first of
// these, the keys [first_key[i], last_key[i]) of query i and the queries of key j.
struct Pairs {
  Range queries, keys;
  int64_t first_key[kShort], last_key[kShort], first_query[kShort], last_query[kShort];

  Pairs(const KeyRanges& ranges, const ShortDocuments::Shape& shape)
      : queries{shape.queries, shape.queries}, keys{0, 0} {
    const int64_t b = shape.documents.front(), begin = ranges.cu_seqlens_q[b], origin = ranges.cu_seqlens_k[b];
    for (int64_t i = 0; i < shape.queries; ++i) {
      const Range own = ranges.keys(begin + i, b);
      if (own.size() == 0) continue;  // the first queries of a document with fewer keys have none
      if (keys.size() == 0) queries.begin = i, keys = {own.begin - origin, own.end - origin};
      keys.end = std::max(keys.end, own.end - origin);
      first_key[i - queries.begin] = own.begin - origin - keys.begin;
      last_key[i - queries.begin] = own.end - origin - keys.begin;
    }
    for (int64_t j = 0, first = 0, last = 0; j < keys.size(); ++j) {
      while (last_key[first] <= j) ++first;
      while (last < queries.size() && first_key[last] <= j) ++last;
      first_query[j] = first, last_query[j] = last;
    }
  }
  int64_t cell(int64_t i, int64_t j) const { return i * keys.size() + j; }
};

// Points to the first row of each problem of a group.
template <class T>
struct LaneRows {
  int64_t row_stride;
  T* data[lanes<accumulator_t<std::remove_const_t<T>>>];
  LaneView<T> view() const { return {data, row_stride}; }
};

// Has the problems of a group, from number `first` on: problem i is head i % heads of document i / heads of the shape.
struct Group {
  const ShortDocuments::Shape* shape;
  const Pairs* pairs;
  int64_t first, count, heads;
  int64_t document(int64_t lane) const { return shape->documents[(first + lane) / heads]; }
  int64_t head(int64_t lane) const { return (first + lane) % heads; }
};

// Holds the sums of dk and dv over the query heads that read a head of keys.
template <class A>
struct KeySums {
  Partial<A> dk, dv;
};

// Calls f(group, sums) for groups of problems of all short documents.
template <class A, class F>
void for_each_group(const Tensor& like, const Problem& problem, const ShortDocuments& documents, int64_t heads,
                    const F& f) {
  std::vector<Pairs> pairs;
  std::vector<Group> groups;
  pairs.reserve(documents.shapes().size());
  int64_t rows = 0;
  for (const ShortDocuments::Shape& shape : documents.shapes()) {
    pairs.emplace_back(problem.ranges, shape);
    const int64_t problems = static_cast<int64_t>(shape.documents.size()) * heads;
    for (int64_t first = 0; first < problems; first += lanes<A>)
      groups.push_back({&shape, &pairs.back(), first, std::min<int64_t>(lanes<A>, problems - first), heads});
    rows += problems * (shape.queries + shape.keys);
  }
  const int64_t count = static_cast<int64_t>(groups.size());
  const int64_t grain = row_grain(problem.head_dim) * count / std::max<int64_t>(rows, 1);
  parallel_for(count, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    KeySums<A> sums = {{like, problem.head_dim}, {like, problem.head_dim}};
    for (int64_t i = begin; i < end; ++i) f(groups[i], sums);
  });
}

template <class T>
void zero_rows(const OutputHeads& x, const Range& rows, int64_t head, int64_t head_dim) {
  for (int64_t i = rows.begin; i < rows.end; ++i) std::fill_n(x.row<T>(i, head), head_dim, T(0));
}

// Computes the products of the pairs. What kMultiplied queries do not share is computed too, and may be anything.
template <class X, class Y, class A>
void dots_of_pairs(A* table, const Pairs& pairs, X x, Y y, Y next, HeadShape shape) {
  for (int64_t i = 0; i < pairs.queries.size(); i += kMultiplied) {
    const int64_t count = std::min(kMultiplied, pairs.queries.size() - i), last = i + count - 1;
    const int64_t first = pairs.first_key[i], keys = pairs.last_key[last] - first;
    const bool prefetches = next.data && last + 1 == pairs.queries.size();  // the last queries have the most keys
    dots(table + pairs.cell(i, first) * lanes<A>, pairs.keys.size(), x.from(i, 0), count, y.from(first, 0), keys,
         prefetches ? next.from(first, 0) : Y{}, shape, A(1));
  }
}

// Turns products into weights that sum to 1, and 0 for masked pairs. Calls f(query, maximum, sum).
template <class A, class F>
void softmax_of_pairs(A* table, const Pairs& pairs, A factor, const F& f) {
  for (int64_t i = 0; i < pairs.queries.size(); ++i) {
    A* const row = table + pairs.cell(i, 0) * lanes<A>;
    A* const begin = row + pairs.first_key[i] * lanes<A>;
    A* const end = row + pairs.last_key[i] * lanes<A>;
    Vec<A> top = Vec<A>{} + kMaskedScore<A>, sum = {};
    for (const A* cell = begin; cell < end; cell += lanes<A>) top = max(load(cell), top);
    const Vec<A> shift = top == kMaskedScore<A> ? Vec<A>{} : top;
    for (A* cell = begin; cell < end; cell += lanes<A>) {
      const Vec<A> p = bounded_exp(load(cell) - shift, factor);
      store(cell, p);
      sum += p;
    }
    const Vec<A> inverse_sum = top == kMaskedScore<A> ? Vec<A>{} : 1 / sum;
    for (A* cell = begin; cell < end; cell += lanes<A>) store(cell, inverse_sum * load(cell));
    std::fill(row, begin, A(0));
    std::fill(end, row + pairs.keys.size() * lanes<A>, A(0));
    f(i, top, sum);
  }
}

// Computes out_i = sum_j table_ij x_j for all queries i.
template <class T, class A>
void sums_over_keys(LaneView<T> out, LaneView<const T> x, const A* table, const Pairs& pairs, HeadShape shape) {
  Partial<A> unused{HeadView<A>{}};
  for (int64_t i = 0; i < pairs.queries.size(); i += kSummed) {
    const int64_t rows = std::min(kSummed, pairs.queries.size() - i);
    const int64_t first = pairs.first_key[i], keys = pairs.last_key[i + rows - 1] - first;
    weighted_sums<T>(out.from(i, 0), unused, rows, x.from(first, 0), keys, table + pairs.cell(i, first) * lanes<A>,
                     {1, pairs.keys.size()}, shape, {true, true});
  }
}

// Computes out_j = sum_i table_ij x_i for all keys j, or a part of these sums.
template <class T, class A>
void sums_over_queries(LaneView<T> out, Partial<A>& partial, LaneView<const T> x, const A* table, const Pairs& pairs,
                       HeadShape shape, Stage stage) {
  for (int64_t j = 0; j < pairs.keys.size(); j += kSummed) {
    const int64_t rows = std::min(kSummed, pairs.keys.size() - j);
    const int64_t first = pairs.first_query[j], queries = pairs.last_query[j + rows - 1] - first;
    Partial<A> own(stage.whole() ? HeadView<A>{} : partial.view().from(j, 0));
    weighted_sums<T>(out.from(j, 0), own, rows, x.from(first, 0), queries, table + pairs.cell(first, j) * lanes<A>,
                     {pairs.keys.size(), 1}, shape, stage);
  }
}

// Computes the problems of a group, each with a query head.
template <class T, class A>
void attend_group(const Problem& problem, const OutputHeads& out, A* lse, const Group& group) {
  const KeyRanges& ranges = problem.ranges;
  const Pairs& pairs = *group.pairs;
  const Scaling<A> scaling(problem.scale);
  LaneRows<const T> q = {problem.q.row_stride, {}}, k = {problem.k.row_stride, {}}, v = {problem.v.row_stride, {}};
  LaneRows<T> outs = {out.row_stride, {}};
  A* lses[lanes<A>];
  for (int64_t lane = 0; lane < group.count; ++lane) {
    const int64_t b = group.document(lane), head = group.head(lane), kv_head = problem.kv_head_of(head);
    const int64_t begin = ranges.cu_seqlens_q[b], query = begin + pairs.queries.begin;
    const int64_t key = ranges.cu_seqlens_k[b] + pairs.keys.begin;
    lses[lane] = lse + query * problem.num_heads + head;
    zero_rows<T>(out, {begin, query}, head, problem.head_dim);
    for (int64_t i = begin; i < query; ++i) lse[i * problem.num_heads + head] = kMaskedScore<A>;
    if (pairs.keys.size() == 0) continue;
    q.data[lane] = problem.q.row<T>(query, head), outs.data[lane] = out.row<T>(query, head);
    k.data[lane] = problem.k.row<T>(key, kv_head), v.data[lane] = problem.v.row<T>(key, kv_head);
  }
  alignas(kVecBytes) Table<A> table;
  const HeadShape shape = {group.count, problem.head_dim};
  dots_of_pairs(table, pairs, ScaledView<T>{q.view(), scaling.power}, k.view(), v.view(), shape);
  softmax_of_pairs(table, pairs, scaling.factor, [&](int64_t i, Vec<A> max, Vec<A> sum) {
    for (int64_t lane = 0; lane < group.count; ++lane)
      lses[lane][i * problem.num_heads] = scaling.factor * max[lane] + std::log(sum[lane]);
  });
  sums_over_keys<T>(outs.view(), v.view(), table, pairs, shape);
}

// Computes the gradients of the problems of a group, each with a head of keys.
template <class T, class A>
void propagate_group(const Problem& problem, const Gradients& grads, const Group& group, KeySums<A>& sums) {
  const KeyRanges& ranges = problem.ranges;
  const Pairs& pairs = *group.pairs;
  const Scaling<A> scaling(problem.scale);
  const int64_t shared = problem.heads_per_kv_head(), head_dim = problem.head_dim;
  LaneRows<const T> k = {problem.k.row_stride, {}}, v = {problem.v.row_stride, {}};
  LaneRows<T> dk = {grads.k.row_stride, {}}, dv = {grads.v.row_stride, {}};
  for (int64_t lane = 0; lane < group.count; ++lane) {
    const int64_t b = group.document(lane), head = group.head(lane), begin = ranges.cu_seqlens_k[b];
    const int64_t key = begin + pairs.keys.begin, end = key + pairs.keys.size();
    for (const OutputHeads* x : {&grads.k, &grads.v}) {
      zero_rows<T>(*x, {begin, key}, head, head_dim);
      zero_rows<T>(*x, {end, ranges.cu_seqlens_k[b + 1]}, head, head_dim);
    }
    if (pairs.keys.size() == 0) continue;
    k.data[lane] = problem.k.row<T>(key, head), v.data[lane] = problem.v.row<T>(key, head);
    dk.data[lane] = grads.k.row<T>(key, head), dv.data[lane] = grads.v.row<T>(key, head);
  }
  for (int64_t r = 0; r < shared; ++r) {
    LaneRows<const T> q = {problem.q.row_stride, {}}, g = {grads.out.row_stride, {}};
    LaneRows<T> dq = {grads.q.row_stride, {}};
    for (int64_t lane = 0; lane < group.count; ++lane) {
      const int64_t begin = ranges.cu_seqlens_q[group.document(lane)], query = begin + pairs.queries.begin;
      const int64_t head = group.head(lane) * shared + r;
      zero_rows<T>(grads.q, {begin, query}, head, head_dim);
      if (pairs.keys.size() == 0) continue;
      q.data[lane] = problem.q.row<T>(query, head), g.data[lane] = grads.out.row<T>(query, head);
      dq.data[lane] = grads.q.row<T>(query, head);
    }
    alignas(kVecBytes) Table<A> weights;
    alignas(kVecBytes) Table<A> slopes;
    const HeadShape shape = {group.count, head_dim};
    dots_of_pairs(weights, pairs, ScaledView<T>{q.view(), scaling.power}, k.view(), v.view(), shape);
    dots_of_pairs(slopes, pairs, g.view(), v.view(), {}, shape);
    softmax_of_pairs(weights, pairs, scaling.factor, [&](int64_t i, Vec<A>, Vec<A>) {
      A* const row = slopes + pairs.cell(i, 0) * lanes<A>;
      const A* const p = weights + pairs.cell(i, 0) * lanes<A>;
      const int64_t begin = pairs.first_key[i] * lanes<A>, end = pairs.last_key[i] * lanes<A>;
      Vec<A> delta = {};
      for (int64_t j = begin; j < end; j += lanes<A>) delta += load(p + j) * load(row + j);
      for (int64_t j = begin; j < end; j += lanes<A>)
        store(row + j, static_cast<A>(problem.scale) * load(p + j) * (load(row + j) - delta));
      std::fill(row, row + begin, A(0));
      std::fill(row + end, row + pairs.keys.size() * lanes<A>, A(0));
    });
    const Stage stage = {r == 0, r + 1 == shared};
    sums_over_keys<T>(dq.view(), k.view(), slopes, pairs, shape);
    sums_over_queries<T>(dk.view(), sums.dk, q.view(), slopes, pairs, shape, stage);
    sums_over_queries<T>(dv.view(), sums.dv, g.view(), weights, pairs, shape, stage);
  }
}

}  // namespace

template <class A>
void attend_short(const Tensor& like, const Problem& problem, const OutputHeads& out, A* lse,
                  const ShortDocuments& documents) {
  dispatch_storage<A>(problem.q.dtype, [&]<class T>(Tag<T>) {
    for_each_group<A>(like, problem, documents, problem.num_heads,
                      [&](const Group& group, KeySums<A>&) { attend_group<T>(problem, out, lse, group); });
  });
}

template <class A>
void propagate_short(const Tensor& like, const Problem& problem, const Gradients& grads,
                     const ShortDocuments& documents) {
  dispatch_storage<A>(problem.q.dtype, [&]<class T>(Tag<T>) {
    for_each_group<A>(like, problem, documents, problem.num_kv_heads, [&](const Group& group, KeySums<A>& sums) {
      propagate_group<T, A>(problem, grads, group, sums);
    });
  });
}

#define BLT_FOR_ACCUMULATOR(A)                                                                              \
  template void attend_short(const Tensor&, const Problem&, const OutputHeads&, A*, const ShortDocuments&); \
  template void propagate_short<A>(const Tensor&, const Problem&, const Gradients&, const ShortDocuments&);
BLT_FOR_ACCUMULATOR(float)
BLT_FOR_ACCUMULATOR(double)
#undef BLT_FOR_ACCUMULATOR

}  // namespace blt
