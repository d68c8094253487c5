// In patch_cross_attention patches read bytes (encode), or bytes read patches (decode).
//
//   s_ij = scale q_i . k_j for the keys j that query i reads,  lse_i = log sum_j exp s_ij
//   out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
//   ds_ij = scale p_ij (g_i . v_j - g_i . out_i)
//   dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i
//
// Tiling: queries that read the same keys make a task with them, mostly K by a handful (patch_readers.h). A tile of it
// is small dense attention, for as many heads at once as a vector has lanes (head_tiles.h). A thread owns a run of
// tasks with all heads of their rows, so every tensor is read and written once, from front to back. Tasks with more
// pairs than a table has cells take several tiles, with a running softmax. Backward takes the queries and the keys of a
// patch in one pass if they only read each other; with a window the keys of a patch have a task of their own with all
// queries that read them. Every gradient has one owner, without atomics. Long tasks are divided among threads.
//
// Query heads that share a head of k and v are processed one after the other, each as a problem with as many heads as k
// and v.
//
// Bytes: forward q, k, v, out and lse once; backward q, k, v, grad_out and the gradients once, and out where a query
// has more keys than a tile. Flops per (query, key) pair and head: 4 E forward, 10 E backward. With K = 2 in fp32 that
// is about one flop per byte, so memory is the limit. A window of w takes w times as many pairs, and reads keys w times
// from the cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/args/patch_cross_attention.h"
#include "../common/box.h"
#include "../common/dispatch.h"
#include "patch_cross_attention_backward.h"
#include "support/heads.h"
#include "support/rows.h"

namespace blt {
namespace {

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
struct Output {
  HeadRows<T> out;
  accumulator_t<T>* lse;
  PartSums<accumulator_t<T>> sums;
};

// Holds the running maximum and sum of exponentials of one query in each lane.
template <class A>
struct RunningSoftmax {
  Vec<A> max = Vec<A>{} - std::numeric_limits<A>::infinity(), sum = {};

  Vec<A> shift() const { return max == -std::numeric_limits<A>::infinity() ? Vec<A>{} : max; }
  Vec<A> divisor() const { return sum == 0 ? Vec<A>{} + 1 : sum; }
  // Turns scores into weights exp(s - shift) and returns what the weights before have to be multiplied by.
  Vec<A> add(A* scores, int64_t count) {
    const Vec<A> before = max;
    for (int64_t j = 0; j < count; ++j) {
      const Vec<A> s = load(scores + j * lanes<A>);
      max = s > max ? s : max;
    }
    Vec<A> added = {};
    for (int64_t j = 0; j < count; ++j) {
      const Vec<A> weight = clamped_exp<A>(load(scores + j * lanes<A>) - shift());
      store(scores + j * lanes<A>, weight);
      added += weight;
    }
    const Vec<A> factor = clamped_exp<A>(before - shift());
    sum = sum * factor + added;
    return factor;
  }
};

// Attends from at most kTileSide queries in one group of heads, the r-th ones. With a slot the sums stay undivided.
template <class T>
void attend(const Problem<T>& problem, const Output<T>& output, const Task& task, int64_t first_query, int64_t head,
            int64_t r, HeadShape shape, Partial<accumulator_t<T>>& partial) {
  using A = accumulator_t<T>;
  alignas(kVecBytes) Table<A> table;
  RunningSoftmax<A> softmax[kTileSide];
  const Range keys = task.keys;
  const int64_t begin = task.queries.begin, m = task.queries.size(), step = kCells / m, repeats = problem.repeats;
  const auto q = repeat(problem.q, repeats, r, begin, head);
  const auto out = repeat(output.out, repeats, r, begin, head);
  for (int64_t key = keys.begin; key < keys.end; key += step) {
    const int64_t n = std::min(step, keys.end - key);
    const Stage stage = {key == keys.begin, task.slot < 0 && key + n == keys.end};
    dots(table, n, q, m, problem.k.from(key, head), n, problem.v.from(key, head), shape, problem.scale);
    for (int64_t i = 0; i < m; ++i) {
      A* const weights = table + i * n * lanes<A>;
      const Vec<A> factor = softmax[i].add(weights, n);
      const Vec<A> divisor = stage.last ? softmax[i].divisor() : Vec<A>{} + 1;
      if (stage.last)
        for (int64_t j = 0; j < n * lanes<A>; j += lanes<A>) store(weights + j, load(weights + j) / divisor);
      if (!stage.first) multiply_heads(partial.view().from(i, 0), factor / divisor, shape);
    }
    weighted_sums<T>(out, partial, m, problem.v.from(key, head), n, table, {1, n}, shape, stage);
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t lane = 0; lane < shape.heads; ++lane) {
      const int64_t query_head = (head + lane) * repeats + r;
      if (task.slot < 0) {
        output.lse[(begin + i) * problem.query_heads() + query_head] =
            softmax[i].shift()[lane] + std::log(softmax[i].sum[lane]);
      } else {
        A* const own = output.sums.softmax + 2 * output.sums.at(task.slot, begin + i - first_query, query_head);
        own[0] = softmax[i].max[lane], own[1] = softmax[i].sum[lane];
      }
    }
}

template <class T>
void attend_task(const Problem<T>& problem, const Output<T>& output, const Task& task,
                 Partial<accumulator_t<T>>& partial) {
  using A = accumulator_t<T>;
  const Range queries = task.queries;
  if (task.keys.size() == 0) {
    clear(output.out, queries, problem.query_heads(), problem.width);
    std::fill_n(output.lse + queries.begin * problem.query_heads(), queries.size() * problem.query_heads(),
                -std::numeric_limits<A>::infinity());
    return;
  }
  for (int64_t r = 0; r < problem.repeats; ++r)
    for_each_group<A>(problem.heads, problem.width, [&](int64_t head, HeadShape shape) {
      for (int64_t i = queries.begin; i < queries.end; i += kTileSide) {
        Task tile = task;
        tile.queries = {i, std::min(i + kTileSide, queries.end)};
        if (task.slot < 0) {
          attend(problem, output, tile, queries.begin, head, r, shape, partial);
        } else {
          Partial<A> own(output.sums.of(task.slot, i - queries.begin, head * problem.repeats + r, problem.repeats));
          attend(problem, output, tile, queries.begin, head, r, shape, own);
        }
      }
    });
}

// --- parts -----------------------------------------------------------------------------------------------------------

// Holds the sums of parts.
template <class A>
class PartMemory {
 public:
  PartMemory(const PatchTasks& tasks, int64_t heads, int64_t width)
      : data_(tasks.num_slots() * tasks.vectors_per_patch() * heads * padded_width<A>(width)),
        softmax_(2 * tasks.num_slots() * tasks.vectors_per_patch() * heads),
        sums_{data_.data(), softmax_.data(), tasks.vectors_per_patch(), heads, padded_width<A>(width)} {}
  const PartSums<A>& sums() const { return sums_; }

 private:
  std::vector<A> data_, softmax_;
  PartSums<A> sums_;
};

// Sets out to the sums of the parts of every divided patch, added up, with weights exp(m_n - m) / l for a softmax.
template <class T>
void add_up(const PatchTasks& tasks, const PartSums<accumulator_t<T>>& sums, const HeadRows<T>& out,
            accumulator_t<T>* lse, int64_t width) {
  using A = accumulator_t<T>;
  const int64_t per_patch = sums.vectors * sums.heads;
  parallel_for(static_cast<int64_t>(tasks.divided().size()) * per_patch, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> whole(static_cast<size_t>(sums.padded));
    for (int64_t i = begin; i < end; ++i) {
      const DividedPatch& divided = tasks.divided()[i / per_patch];
      const int64_t vector = i % per_patch / sums.heads, head = i % sums.heads;
      const int64_t to = divided.patch * sums.vectors + vector;
      const auto softmax = [&](int64_t n) { return sums.softmax + 2 * sums.at(divided.slot + n, vector, head); };
      A max = -std::numeric_limits<A>::infinity(), total = 0;
      for (int64_t n = 0; lse && n < divided.count; ++n) max = std::max(max, softmax(n)[0]);
      const A shift = std::isinf(max) ? A(0) : max;
      std::fill(whole.begin(), whole.end(), A(0));
      for (int64_t n = 0; n < divided.count; ++n) {
        const A weight = lse ? std::exp(softmax(n)[0] - shift) : A(1);
        if (lse) total += weight * softmax(n)[1];
        const A* const own = sums.of(divided.slot + n, vector, head, 1).data;
        for (int64_t e = 0; e < sums.padded; ++e) whole[e] += weight * own[e];
      }
      if (lse) lse[to * sums.heads + head] = shift + std::log(total);
      const A divisor = !lse || total == 0 ? A(1) : total;
      for (A& x : whole) x /= divisor;
      T* const row_out = out.at(to, head);  // sums have the order of pairs
      int64_t e = 0;
      for (; e + pair_lanes<A> <= width; e += pair_lanes<A>) store_pair(row_out + e, load_pair(whole.data() + e));
      if (e < width) store_part(row_out + e, load_pair(whole.data() + e), width - e);
    }
  });
}

// --- entries ---------------------------------------------------------------------------------------------------------

template <class T>
HeadRows<T> rows_at(T* data, const Tensor& x) {
  if (x.dim() == 3) return {{data, x.stride(0), x.stride(1)}};
  const int64_t jump = x.size(0) > 1 ? x.stride(0) - x.size(1) * x.stride(1) : 0;
  return {{data, x.stride(1), x.stride(2)}, std::max<int64_t>(x.size(1), 1), jump};
}

template <class T>
HeadRows<const T> rows_of(const Tensor& x) {
  return rows_at(x.const_data_ptr<T>(), x);
}

template <class T>
HeadRows<T> output_rows(Tensor& x) {
  return rows_at(x.mutable_data_ptr<T>(), x);
}

// Checks the arguments, and packs padded tensors in which a task has rows of several of the B.
PatchTasks tasks_of(CrossArguments& arguments, bool backward) {
  PatchTasks tasks(arguments, backward);
  const auto pack = [&](Tensor& x, bool of_queries) {
    if (x.dim() == 4 && tasks.cross(x.size(1), of_queries)) x = as_contiguous(x);
  };
  pack(arguments.q, true), pack(arguments.k, false), pack(arguments.v, false);
  return tasks;
}

// Returns a contiguous tensor in the order of dimensions that the gradient of x has.
Tensor as_gradient(const Tensor& x, const Tensor& contiguous) {
  if (!heads_outside(x)) return contiguous;
  return torch::stable::transpose(as_contiguous(torch::stable::transpose(contiguous, 1, 2)), 1, 2);
}

template <class T>
Problem<T> problem_of(const CrossArguments& arguments) {
  return {rows_of<T>(arguments.q),
          rows_of<T>(arguments.k),
          rows_of<T>(arguments.v),
          arguments.kv_heads(),
          arguments.heads() / arguments.kv_heads(),
          arguments.width(),
          static_cast<accumulator_t<T>>(arguments.scale)};
}

std::tuple<Tensor, Tensor> patch_cross_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor offsets,
                                                         Tensor cu_patches, Tensor ids, std::string direction,
                                                         int64_t queries_per_patch, std::optional<int64_t> window,
                                                         std::optional<double> scale) {
  CrossArguments arguments =
      check_cross_attention(q, k, v, offsets, cu_patches, ids, direction, queries_per_patch, window, scale);
  const PatchTasks tasks = tasks_of(arguments, false);
  Tensor out = new_like(q);
  Tensor lse = new_like(q, 1, accumulator(q));
  dispatch_float(q.scalar_type(), "q", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(arguments);
    const int64_t heads = problem.query_heads(), width = problem.width;
    const PartMemory<A> memory(tasks, heads, width);
    const Output<T> output = {output_rows<T>(out), lse.mutable_data_ptr<A>(), memory.sums()};
    tasks.for_each_run(row_grain(heads * width), [&](std::span<const Task> run) {
      Partial<A> partial(q, width);
      for (const Task& task : run) attend_task(problem, output, task, partial);
    });
    if (tasks.encode()) add_up<T>(tasks, output.sums, output.out, output.lse, width);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> patch_cross_attention_bwd_cpu(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                 Tensor out, Tensor lse, Tensor offsets,
                                                                 Tensor cu_patches, Tensor ids, std::string direction,
                                                                 int64_t queries_per_patch,
                                                                 std::optional<int64_t> window,
                                                                 std::optional<double> scale) {
  CrossArguments arguments =
      check_cross_attention(q, k, v, offsets, cu_patches, ids, direction, queries_per_patch, window, scale);
  check_cross_grads(arguments, grad_out, out, lse);
  const PatchTasks tasks = tasks_of(arguments, true);
  if (q.dim() == 4 && tasks.cross(q.size(1), true)) grad_out = as_contiguous(grad_out), out = as_contiguous(out);
  // The gradients of what was packed are packed.
  Tensor grad_q = new_gradient(arguments.q), grad_k = new_gradient(arguments.k), grad_v = new_gradient(arguments.v);
  dispatch_float(q.scalar_type(), "q", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    const Problem<T> problem = problem_of<T>(arguments);
    const int64_t heads = tasks.encode() ? problem.query_heads() : problem.heads, width = problem.width;
    const PartMemory<A> first(tasks, heads, width), second(tasks, heads, width);
    const Gradients<T> grads = {rows_of<T>(grad_out),         rows_of<T>(out),        lse.const_data_ptr<A>(),
                                output_rows<T>(grad_q),       output_rows<T>(grad_k), output_rows<T>(grad_v),
                                {first.sums(), second.sums()}};
    tasks.for_each_run(row_grain(problem.query_heads() * width), [&](std::span<const Task> run) {
      Partials<A> partials = {{q, width}, {q, width}, {q, width}};
      for (const Task& task : run) grad_task(problem, grads, task, tasks.encode(), partials);
    });
    if (tasks.encode()) return add_up<T>(tasks, grads.sums[0], grads.q, nullptr, width);
    add_up<T>(tasks, grads.sums[0], grads.k, nullptr, width);
    add_up<T>(tasks, grads.sums[1], grads.v, nullptr, width);
  });
  return {as_gradient(q, grad_q), as_gradient(k, grad_k), as_gradient(v, grad_v)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_cross_attention_fwd", BLT_KERNELS_BOX(&patch_cross_attention_fwd_cpu));
  m.impl("patch_cross_attention_bwd", BLT_KERNELS_BOX(&patch_cross_attention_bwd_cpu));
}

}  // namespace blt
