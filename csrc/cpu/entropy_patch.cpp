// entropy_patch: entropies of next-byte logits, boundary decisions, and the ragged layout they give.
//
// Rows of logits are spread over the threads; their entropies are written and then cut into patches in one pass over
// them, which is 1/260 of the data. Bytes moved for [T, 260] fp32 logits: 1040 read, 8 written a row for entropy and log_sum,
// 8 for the layout and 8 a patch; nothing else is allocated.
// linear_entropy runs the output head tile by tile and reduces each tile while it is in the cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "patch_layout.h"
#include "support/alloc.h"
#include "support/parallel.h"
#include "support/rows.h"
#include "token_entropy.h"

namespace blt {
namespace {

constexpr int64_t kRowGrain = 64;     // rows of logits a thread must have to be worth waking
constexpr int64_t kHeadRows = 1024;   // rows in a tile of the output head: 1 MB of fp32 logits
constexpr int64_t kSumGrain = 16384;  // elements of a running sum

Tensor check_logits(const Tensor& logits) {
  const Tensor rows = unit_rows(logits, "logits");
  STD_TORCH_CHECK(rows.size(1) >= 1, "logits: expected at least one column");
  return rows;
}

// entropy[i], log_sum[i] of logits[i] for the first `count` rows; the outputs are contiguous, the logits have unit stride in
// a row. The other rows are not read: their entropy is 0, their log_sum kUnread.
template <class T>
void entropy_rows(const Tensor& logits, int64_t count, accumulator_t<T>* entropy, accumulator_t<T>* log_sum) {
  const T* const data = logits.const_data_ptr<T>();
  const int64_t stride = logits.stride(0);
  const RowShape<T> shape(logits.size(1));
  parallel_for(count, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto row = row_entropy(data + i * stride, shape);
      entropy[i] = row.entropy;
      log_sum[i] = row.log_sum;
    }
  });
  std::fill(entropy + count, entropy + logits.size(0), accumulator_t<T>(0));
  std::fill(log_sum + count, log_sum + logits.size(0), accumulator_t<T>(kUnread));
}

template <class T>
void entropy_grad_rows(const Tensor& grad, const Tensor& logits, const accumulator_t<T>* upstream,
                       const accumulator_t<T>* entropy, const accumulator_t<T>* log_sum) {
  const T* const data = logits.const_data_ptr<T>();
  T* const out = grad.mutable_data_ptr<T>();
  const int64_t stride = logits.stride(0), width = logits.size(1);
  const RowShape<T> shape(width);
  parallel_for(logits.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* const row = out + i * width;
      if (log_sum[i] == kUnread)
        std::fill(row, row + width, T(0.0f));
      else
        row_entropy_grad(row, data + i * stride, shape, upstream[i], {entropy[i], log_sum[i]});
    }
  });
}

// Of the first `count` rows.
std::tuple<Tensor, Tensor> entropies(const Tensor& rows, int64_t count) {
  Tensor entropy = torch::stable::new_empty(rows, {rows.size(0)}, accumulator(rows));
  Tensor log_sum = torch::stable::new_empty(rows, {rows.size(0)}, accumulator(rows));
  dispatch_float(rows.scalar_type(), "logits", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    entropy_rows<T>(rows, count, entropy.mutable_data_ptr<A>(), log_sum.mutable_data_ptr<A>());
  });
  return {entropy, log_sum};
}

std::tuple<Tensor, Tensor> token_entropy_fwd_cpu(const Tensor& logits) {
  const Tensor rows = check_logits(logits);
  return entropies(rows, rows.size(0));
}

// One value a row, contiguous: a gradient that was expanded from a scalar is copied.
template <class A>
const A* row_values(Tensor& values, const char* name, int64_t rows) {
  check_dim(values, name, 1);
  check_size(values, name, 0, rows);
  values = torch::stable::contiguous(values);
  return values.const_data_ptr<A>();
}

Tensor token_entropy_bwd_cpu(Tensor grad_entropy, const Tensor& logits, Tensor entropy, Tensor log_sum) {
  const Tensor rows = check_logits(logits);
  Tensor grad = new_output(rows, {rows.size(0), rows.size(1)});
  dispatch_float(rows.scalar_type(), "logits", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    entropy_grad_rows<T>(grad, rows, row_values<A>(grad_entropy, "grad_entropy", rows.size(0)),
                         row_values<A>(entropy, "entropy", rows.size(0)),
                         row_values<A>(log_sum, "log_sum", rows.size(0)));
  });
  return grad;
}

// --- patching rules -------------------------------------------------------------------------------------------------

struct Rules {
  double threshold;
  std::optional<double> threshold_add;
  bool monotonic;
  std::optional<int64_t> max_patch_length;
};

LayoutTensors starts_from_entropy(const auto* entropy, const TextDocuments& text, int64_t num_bytes, const Rules& rules,
                                  std::optional<int64_t> max_patches) {
  const float threshold = static_cast<float>(rules.threshold);
  const auto h = [=](int64_t t) { return static_cast<float>(entropy[t]); };
  const auto build = [&](auto cut) {
    if (!rules.max_patch_length) return build_layout(text, num_bytes, max_patches, cut);
    STD_TORCH_CHECK(*rules.max_patch_length >= 1, "max_patch_length: expected at least 1, got ",
                    *rules.max_patch_length);
    // A cut at the length limit starts the count anew, just as a cut by the rule does.
    return build_layout(text, num_bytes, max_patches,
                        [=, limit = *rules.max_patch_length, length = int64_t{0}](int64_t t, int64_t i) mutable {
                          length = i == 0 ? 1 : length + 1;
                          const bool starts = cut(t, i) | (length == limit);
                          length = starts ? 0 : length;
                          return starts;
                        });
  };
  if (rules.monotonic)
    return build([=](int64_t t, int64_t i) { return (i < 2) | (h(t) - h(t - (i > 0)) > threshold); });
  if (rules.threshold_add) {
    const float add = static_cast<float>(*rules.threshold_add);
    return build(
        [=](int64_t t, int64_t i) { return (i < 2) | ((i > 2) & (h(t) - h(t - (i > 0)) > add) & (h(t) > threshold)); });
  }
  return build([=](int64_t t, int64_t i) { return (i == 0) | (h(t) > threshold); });
}

LayoutTensors patch_starts_fwd_cpu(const Tensor& entropy, const std::optional<Tensor>& cu_seqlens,
                                   int64_t num_documents, double threshold, std::optional<double> threshold_add,
                                   bool monotonic, std::optional<int64_t> max_patch_length,
                                   std::optional<int64_t> max_patches) {
  check_dim(entropy, "entropy", 1);
  const Tensor values = torch::stable::contiguous(entropy);
  const TextDocuments text(cu_seqlens, num_documents, values, values.size(0));
  return dispatch_float(values.scalar_type(), "entropy", [&](auto tag) {
    using T = typename decltype(tag)::type;
    return starts_from_entropy(values.const_data_ptr<T>(), text, values.size(0),
                               {threshold, threshold_add, monotonic, max_patch_length}, max_patches);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> entropy_patch_fwd_cpu(
    const Tensor& logits, const std::optional<Tensor>& cu_seqlens, int64_t num_documents, double threshold,
    std::optional<double> threshold_add, bool monotonic, std::optional<int64_t> max_patch_length,
    std::optional<int64_t> max_patches) {
  const Tensor rows = check_logits(logits);
  int64_t count = rows.size(0);
  if (cu_seqlens) {
    Tensor offsets = *cu_seqlens;
    count = check_offsets(offsets, "cu_seqlens", rows.size(0))[offsets.size(0) - 1];
  }
  auto scores = entropies(rows, count);
  auto layout = patch_starts_fwd_cpu(std::get<0>(scores), cu_seqlens, num_documents, threshold, threshold_add,
                                     monotonic, max_patch_length, max_patches);
  return std::tuple_cat(std::move(scores), std::move(layout));
}

// ASCII letters and digits, and UTF-8 continuation bytes, go on with a patch; everything else is space-like.
constexpr std::array<bool, 256> kSpaceLike = [] {
  std::array<bool, 256> table{};
  for (int byte = 0; byte < 256; ++byte) {
    const bool digit = '0' <= byte && byte <= '9';
    const bool letter = ('A' <= byte && byte <= 'Z') || ('a' <= byte && byte <= 'z');
    const bool continuation = 0x80 <= byte && byte < 0xC0;
    table[byte] = !digit && !letter && !continuation;
  }
  return table;
}();

LayoutTensors space_patch_fwd_cpu(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                  std::optional<int64_t> max_patches) {
  check_dim(tokens, "tokens", 1);
  const Tensor ids = torch::stable::contiguous(tokens);
  const TextDocuments text(cu_seqlens, num_documents, ids, ids.size(0));
  return dispatch_int(ids.scalar_type(), "tokens", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const id = ids.const_data_ptr<T>();
    const auto space_like = [](T token) { return token < 4 || token >= 260 || kSpaceLike[token - 4]; };
    return build_layout(text, ids.size(0), max_patches, [=](int64_t t, int64_t i) {
      return i == 0 || id[t] < 4 || (space_like(id[t]) && !space_like(id[t - 1]));
    });
  });
}

LayoutTensors static_patch_fwd_cpu(const Tensor& cu_seqlens, int64_t num_bytes, int64_t size, int64_t first,
                                   std::optional<int64_t> max_patches) {
  STD_TORCH_CHECK(num_bytes >= 0, "num_bytes: expected a value >= 0, got ", num_bytes);
  STD_TORCH_CHECK(size >= 1 && first >= 1, "size, first: expected values >= 1, got ", size, " and ", first);
  return build_layout(cu_seqlens, num_bytes, max_patches, [=, left = first](int64_t, int64_t i) mutable {
    left = i == 0 ? first - 1 : left - 1;
    if (left > 0) return false;
    left = size;
    return true;
  });
}

LayoutTensors delimiter_patch_fwd_cpu(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens,
                                      int64_t num_documents, int64_t id, std::optional<int64_t> max_patches) {
  check_dim(tokens, "tokens", 1);
  const Tensor ids = torch::stable::contiguous(tokens);
  const TextDocuments text(cu_seqlens, num_documents, ids, ids.size(0));
  return dispatch_int(ids.scalar_type(), "tokens", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const token = ids.const_data_ptr<T>();
    return build_layout(text, ids.size(0), max_patches, [=](int64_t t, int64_t i) { return i == 0 || token[t] == id; });
  });
}

// Per document, the S // patch_size - 2 highest entropies after the first; the earlier of equal ones, NaN above all.
LayoutTensors topk_patch_fwd_cpu(const Tensor& entropy, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                 int64_t patch_size, std::optional<int64_t> max_patches) {
  check_dim(entropy, "entropy", 1);
  STD_TORCH_CHECK(patch_size >= 1, "patch_size: expected a value >= 1, got ", patch_size);
  const Tensor values = torch::stable::contiguous(entropy);
  const TextDocuments text(cu_seqlens, num_documents, values, values.size(0));
  Tensor offsets = text.cu_seqlens;
  const int32_t* const documents = check_offsets(offsets, "cu_seqlens", values.size(0));
  std::vector<bool> chosen(values.size(0), false);
  dispatch_float(values.scalar_type(), "entropy", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const data = values.const_data_ptr<T>();
    const auto key = [=](int32_t t) {
      const float h = static_cast<float>(data[t]);
      return std::isnan(h) ? std::pair(1, 0.0f) : std::pair(0, h);
    };
    const auto before = [=](int32_t t, int32_t u) { return key(t) != key(u) ? key(t) > key(u) : t < u; };
    std::vector<int32_t> order;
    for (int64_t b = 0; b + 1 < offsets.size(0); ++b) {
      const int32_t size = documents[b + 1] - documents[b];
      const int64_t count = std::min<int64_t>(size / patch_size - 2, size - 1);
      if (count <= 0) continue;
      order.resize(size - 1);
      std::iota(order.begin(), order.end(), documents[b] + 1);
      if (count < size - 1) std::nth_element(order.begin(), order.begin() + count, order.end(), before);
      for (int64_t k = 0; k < count; ++k) chosen[order[k]] = true;
    }
  });
  return build_layout(text, values.size(0), max_patches, [&](int64_t t, int64_t i) { return i == 0 || chosen[t]; });
}

// --- linear_entropy ---------------------------------------------------------------------------------------------------

// out = op(args...) through torch's dispatcher, for ops whose last argument is `out`.
template <class... Args>
void call_out(const char* op, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the result holds
}

Tensor rows_of(const Tensor& x, int64_t begin, int64_t count) {
  Tensor source = x;
  return torch::stable::narrow(source, 0, begin, count);
}

void check_head(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_dim(hidden, "hidden", 2);
  check_dim(weight, "weight", 2);
  check_dtype(weight, "weight", hidden.scalar_type());
  check_size(weight, "weight", 1, hidden.size(1));
  STD_TORCH_CHECK(weight.size(0) >= 1, "weight: expected an alphabet of at least 1");
  if (bias) {
    check_dim(*bias, "bias", 1);
    check_dtype(*bias, "bias", hidden.scalar_type());
    check_size(*bias, "bias", 0, weight.size(0));
  }
}

// Calls f(begin, count, hidden rows, logits) for each tile of rows; the logits live in one buffer that is used again.
template <class F>
void for_each_tile(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, F f) {
  const int64_t rows = hidden.size(0);
  Tensor buffer = torch::stable::new_empty(hidden, {std::min(rows, kHeadRows), weight.size(0)});
  for (int64_t begin = 0; begin < rows; begin += kHeadRows) {
    const int64_t count = std::min(kHeadRows, rows - begin);
    const Tensor tile = rows_of(hidden, begin, count), logits = rows_of(buffer, 0, count);
    call_out("aten::linear", tile, weight, bias, logits);
    f(begin, count, tile, logits);
  }
}

std::tuple<Tensor, Tensor> linear_entropy_fwd_cpu(const Tensor& hidden, const Tensor& weight,
                                                  const std::optional<Tensor>& bias) {
  check_head(hidden, weight, bias);
  Tensor entropy = torch::stable::new_empty(hidden, {hidden.size(0)}, accumulator(hidden));
  Tensor log_sum = torch::stable::new_empty(hidden, {hidden.size(0)}, accumulator(hidden));
  dispatch_float(hidden.scalar_type(), "hidden", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    A* const entropies = entropy.mutable_data_ptr<A>();
    A* const log_sums = log_sum.mutable_data_ptr<A>();
    for_each_tile(hidden, weight, bias, [&](int64_t begin, int64_t, const Tensor&, const Tensor& logits) {
      entropy_rows<T>(logits, logits.size(0), entropies + begin, log_sums + begin);
    });
  });
  return {entropy, log_sum};
}

// sums += x, element by element.
template <class T, class A>
void add_to(A* sums, const T* x, int64_t size) {
  parallel_for(size, kSumGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] += static_cast<A>(x[i]);
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_entropy_bwd_cpu(Tensor grad_entropy, const Tensor& hidden,
                                                          const Tensor& weight, const std::optional<Tensor>& bias,
                                                          Tensor entropy, Tensor log_sum) {
  check_head(hidden, weight, bias);
  const int64_t rows = hidden.size(0), alphabet = weight.size(0), width = weight.size(1);
  Tensor grad_hidden = new_output(hidden, {rows, width});
  Tensor weight_sum = torch::stable::new_zeros(weight, {alphabet, width}, accumulator(weight));
  Tensor bias_sum = torch::stable::new_zeros(weight, {alphabet}, accumulator(weight));
  dispatch_float(hidden.scalar_type(), "hidden", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const A* const upstream = row_values<A>(grad_entropy, "grad_entropy", rows);
    const A* const entropies = row_values<A>(entropy, "entropy", rows);
    const A* const log_sums = row_values<A>(log_sum, "log_sum", rows);
    A* const bias_sums = bias_sum.mutable_data_ptr<A>();
    Tensor buffer = torch::stable::new_empty(hidden, {std::min(rows, kHeadRows), alphabet});
    Tensor product = torch::stable::new_empty(weight, {alphabet, width});
    for_each_tile(hidden, weight, bias, [&](int64_t begin, int64_t count, const Tensor& tile, const Tensor& logits) {
      Tensor grad = rows_of(buffer, 0, count);
      entropy_grad_rows<T>(grad, logits, upstream + begin, entropies + begin, log_sums + begin);
      call_out("aten::mm", grad, weight, rows_of(grad_hidden, begin, count));
      call_out("aten::mm", torch::stable::transpose(grad, 0, 1), tile, product);
      add_to(weight_sum.mutable_data_ptr<A>(), product.const_data_ptr<T>(), alphabet * width);
      const T* const grads = grad.const_data_ptr<T>();
      for (int64_t i = 0; i < count; ++i)
        for (int64_t a = 0; a < alphabet; ++a) bias_sums[a] += static_cast<A>(grads[i * alphabet + a]);
    });
  });
  const auto rounded = [&](const Tensor& sum) { return torch::stable::to(sum, weight.scalar_type()); };
  return {grad_hidden, rounded(weight_sum), rounded(bias_sum)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("token_entropy_fwd", TORCH_BOX(&token_entropy_fwd_cpu));
  m.impl("token_entropy_bwd", TORCH_BOX(&token_entropy_bwd_cpu));
  m.impl("linear_entropy_fwd", TORCH_BOX(&linear_entropy_fwd_cpu));
  m.impl("linear_entropy_bwd", TORCH_BOX(&linear_entropy_bwd_cpu));
  m.impl("entropy_patch_fwd", TORCH_BOX(&entropy_patch_fwd_cpu));
  m.impl("patch_starts_fwd", TORCH_BOX(&patch_starts_fwd_cpu));
  m.impl("space_patch_fwd", TORCH_BOX(&space_patch_fwd_cpu));
  m.impl("static_patch_fwd", TORCH_BOX(&static_patch_fwd_cpu));
  m.impl("delimiter_patch_fwd", TORCH_BOX(&delimiter_patch_fwd_cpu));
  m.impl("topk_patch_fwd", TORCH_BOX(&topk_patch_fwd_cpu));
}

}  // namespace blt
