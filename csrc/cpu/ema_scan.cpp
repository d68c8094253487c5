// ema_scan averages rows exponentially along each document.
//
//   y[t]      = p[t] x[t] + (1 - p[t]) y[t-1], with y = 0 before a document; 0 beyond the last document
//   g[t]      = grad_y[t] + (1 - p[t+1]) g[t+1], with g = 0 behind a document
//   grad_x[t] = p[t] g[t]
//   grad_p[t] = sum over d of (x[t,d] - y[t-1,d]) g[t,d]
//
// Tiling: an item is one document and one panel of kPanel columns. Threads share the items by their rows, so that a
// thread owns whole rows where documents are many, and some of the columns where one document is long. The owner walks
// the rows in order, past a row of sums in L1. Panels have partial sums of grad_p, which are added up in order, so
// results are the same for any number of threads.
//
// Bytes: forward reads x and writes y. Backward reads grad_y, x and y and writes grad_x.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/args/ema_scan.h"
#include "../common/box.h"
#include "../common/dispatch.h"
#include "support/alloc.h"
#include "support/check_values.h"
#include "support/documents.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {
namespace {

constexpr int64_t kPanel = 128;
static_assert(kPanel % pair_lanes<float> == 0, "a column is in a whole vector, or not, for any run of panels");

// Has columns [begin, end) of the rows of one document.
struct Strip {
  Range rows, columns;
};

int64_t num_panels(int64_t width) { return std::max<int64_t>(1, (width + kPanel - 1) / kPanel); }

// Calls f(strip) for strips that cover all documents and panels once.
template <class F>
void for_each_strip(const int32_t* offsets, int64_t documents, int64_t width, const F& f) {
  const int64_t panels = num_panels(width);
  std::vector<int64_t> begins;
  begins.reserve(static_cast<size_t>(documents * panels + 1));
  for (int64_t b = 0; b < documents; ++b)
    for (int64_t panel = 0; panel < panels; ++panel)
      begins.push_back(offsets[b] * panels + panel * (offsets[b + 1] - offsets[b]));
  begins.push_back(offsets[documents] * panels);
  parallel_segments(begins.data(), documents * panels, row_grain(kPanel), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last;) {
      const int64_t b = item / panels, panel = item % panels, count = std::min(panels - panel, last - item);
      f(Strip{{offsets[b], offsets[b + 1]}, {panel * kPanel, std::min((panel + count) * kPanel, width)}});
      item += count;
    }
  });
}

Tensor ema_scan_fwd_cpu(const Tensor& x, const Tensor& p, std::optional<Tensor> cu_seqlens, int64_t num_documents) {
  const EmaArguments arguments = check_ema(x, p);
  const int64_t rows = arguments.rows, width = arguments.width, stride = arguments.x.stride(0);
  Tensor offsets = document_offsets(cu_seqlens, num_documents, arguments.x, rows);
  const int32_t* const documents = check_offsets(offsets, "cu_seqlens", rows);
  const int64_t count = offsets.size(0) - 1;
  Tensor y = new_output(arguments.x, {rows, width});
  dispatch_float(arguments.x.scalar_type(), "x", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    constexpr bool kExact = std::is_same_v<T, A>;  // y holds the sums unrounded
    const T* const from = arguments.x.const_data_ptr<T>();
    const A* const weights = arguments.p.const_data_ptr<A>();
    T* const to = y.mutable_data_ptr<T>();
    for_each_strip(documents, count, width, [&](const Strip& strip) {
      const int64_t columns = strip.columns.size();
      std::vector<A> rounded_later(static_cast<size_t>(kExact ? 0 : columns));
      const A* before = nullptr;
      for (int64_t t = strip.rows.begin; t < strip.rows.end; ++t) {
        const T* const row = from + t * stride + strip.columns.begin;
        T* const out = to + t * width + strip.columns.begin;
        A* sums = nullptr;
        if constexpr (kExact)
          sums = out;
        else
          sums = rounded_later.data();
        const A weight = weights[t], keep = A(1) - weight;
        if (before)
          map_row<A>(
              sums, columns, [weight, keep](auto value, auto sum) { return weight * value + keep * sum; }, row, before);
        else
          map_row<A>(sums, columns, [weight](auto value) { return weight * value; }, row);
        if constexpr (!kExact) map_row<A>(out, columns, kSame, static_cast<const A*>(sums));
        before = sums;
      }
    });
    std::fill(to + documents[count] * width, to + rows * width, T(0));
  });
  return y;
}

// --- backward --------------------------------------------------------------------------------------------------------

// Points to one row in a panel of columns: `sums` is g of the next row, and becomes g of this one.
template <class T>
struct GradRow {
  const T *grad_y, *x, *previous;
  accumulator_t<T>* sums;
  T* grad_x;
};

// Writes grad_x of a row and returns the panel's part of grad_p. `keep` is 1 - p of the next row.
template <class T, class A = accumulator_t<T>>
A step_back(const GradRow<T>& row, int64_t width, A weight, A keep) {
  constexpr int kStep = pair_lanes<A>;
  PairOf<A> dots = {};
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    const PairOf<A> grad = load_pair(row.grad_y + c), sum = load_pair(static_cast<const A*>(row.sums + c));
    const PairOf<A> x = load_pair(row.x + c), previous = load_pair(row.previous + c);
    const PairOf<A> g = {grad.a + keep * sum.a, grad.b + keep * sum.b};
    store_pair(row.sums + c, g);
    store_pair(row.grad_x + c, PairOf<A>{weight * g.a, weight * g.b});
    dots.a += (x.a - previous.a) * g.a;
    dots.b += (x.b - previous.b) * g.b;
  }
  A dot = lane_sum<A>(dots.a + dots.b);
  for (; c < width; ++c) {
    const A g = static_cast<A>(row.grad_y[c]) + keep * row.sums[c];
    row.sums[c] = g;
    row.grad_x[c] = static_cast<T>(weight * g);
    dot += (static_cast<A>(row.x[c]) - static_cast<A>(row.previous[c])) * g;
  }
  return dot;
}

std::tuple<Tensor, Tensor> ema_scan_bwd_cpu(const Tensor& grad_out, const Tensor& x, const Tensor& p, const Tensor& y,
                                            std::optional<Tensor> cu_seqlens, int64_t num_documents) {
  const EmaArguments arguments = check_ema(x, p);
  const Tensor grads = check_like_x(grad_out, "grad_out", x), averages = check_like_x(y, "y", x);
  const int64_t rows = arguments.rows, width = arguments.width, stride = arguments.x.stride(0);
  Tensor offsets = document_offsets(cu_seqlens, num_documents, arguments.x, rows);
  const int32_t* const documents = check_offsets(offsets, "cu_seqlens", rows);
  const int64_t count = offsets.size(0) - 1, panels = num_panels(width);
  Tensor grad_x = new_output(arguments.x, {rows, width}), grad_p = new_output(arguments.p, {rows});
  dispatch_float(arguments.x.scalar_type(), "x", [&]<class T>(Tag<T>) {
    using A = accumulator_t<T>;
    const T *const grad = grads.const_data_ptr<T>(), *const from = arguments.x.const_data_ptr<T>();
    const T* const averaged = averages.const_data_ptr<T>();
    const A* const weights = arguments.p.const_data_ptr<A>();
    T* const to = grad_x.mutable_data_ptr<T>();
    std::vector<A> parts(static_cast<size_t>(panels * rows));  // [panels][rows]
    for_each_strip(documents, count, width, [&](const Strip& strip) {
      const int64_t begin = strip.columns.begin, columns = strip.columns.size();
      std::vector<A> sums(static_cast<size_t>(columns));
      const std::vector<T> zeros(static_cast<size_t>(columns), T(0));
      for (int64_t t = strip.rows.end - 1; t >= strip.rows.begin; --t) {
        const A keep = t + 1 < strip.rows.end ? A(1) - weights[t + 1] : A(0);
        const T* const previous = t > strip.rows.begin ? averaged + (t - 1) * averages.stride(0) + begin : zeros.data();
        for (int64_t c = 0; c < columns; c += kPanel) {
          const GradRow<T> row = {grad + t * grads.stride(0) + begin + c, from + t * stride + begin + c, previous + c,
                                  sums.data() + c, to + t * width + begin + c};
          parts[(begin + c) / kPanel * rows + t] = step_back(row, std::min(kPanel, columns - c), weights[t], keep);
        }
      }
    });
    const int64_t end = documents[count];
    std::fill(to + end * width, to + rows * width, T(0));
    A* const of_rows = grad_p.mutable_data_ptr<A>();
    std::copy_n(parts.data(), rows, of_rows);
    for (int64_t panel = 1; panel < panels; ++panel)
      map_row<A>(of_rows, rows, kAdd, static_cast<const A*>(of_rows),
                 static_cast<const A*>(parts.data() + panel * rows));
  });
  return {grad_x, grad_p};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("ema_scan_fwd", BLT_KERNELS_BOX(&ema_scan_fwd_cpu));
  m.impl("ema_scan_bwd", BLT_KERNELS_BOX(&ema_scan_bwd_cpu));
}

}  // namespace blt
