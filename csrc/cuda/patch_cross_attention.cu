// Launchers of patch_cross_attention.cuh. A grid of one group of lanes for each patch and head, at least one patch,
// since that zeroes what no patch owns.

#include "patch_cross_attention.cuh"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../common/launch.h"
#include "patch_cross_attention_bwd.cuh"

namespace blt {
namespace {

constexpr int64_t kMaxWidth = 256;

Tensor unit_stride(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x); }

void check_like(const Tensor& x, const char* name, const Tensor& like) {
  check_dim(x, name, 3);
  check_dtype(x, name, like.scalar_type());
  for (int dim = 0; dim < 3; ++dim) check_size(x, name, dim, like.size(dim));
}

template <class T>
HeadRows<const T> rows_of(const Device& device, const Tensor& x) {
  return {device.read<T>(x), x.stride(0), x.stride(1)};
}

template <class T>
HeadRows<T> output_rows(const Device& device, Tensor& x) {
  return {device.write<T>(x), x.stride(0), x.stride(1)};
}

// What forward and backward are given, checked, with unit strides where kernels want them.
struct Arguments {
  Tensor q, k, v, patch_offsets, cu_patches, ids;
  bool encode;
  int64_t queries_per_patch, window, capacity, num_bytes;
  double scale;

  Arguments(Tensor q_, Tensor k_, Tensor v_, Tensor patch_offsets_, Tensor cu_patches_, Tensor ids_,
            const std::string& direction, int64_t queries_per_patch_, std::optional<int64_t> window_,
            std::optional<double> scale_)
      : q(std::move(q_)),
        k(std::move(k_)),
        v(std::move(v_)),
        patch_offsets(std::move(patch_offsets_)),
        cu_patches(std::move(cu_patches_)),
        ids(std::move(ids_)),
        encode(direction == "encode"),
        queries_per_patch(queries_per_patch_) {
    STD_TORCH_CHECK(encode || direction == "decode", "direction: expected encode or decode, got ", direction);
    STD_TORCH_CHECK(queries_per_patch >= 1, "queries_per_patch: expected a value >= 1, got ", queries_per_patch);
    STD_TORCH_CHECK(!window_ || *window_ >= 1, "window: expected a value >= 1, got ", window_.value_or(0));
    check_dim(q, "q", 3);
    check_dim(k, "k", 3);
    check_dtype(k, "k", q.scalar_type());
    check_like(v, "v", k);
    check_size(k, "k", 1, q.size(1));
    check_size(k, "k", 2, q.size(2));
    STD_TORCH_CHECK(q.size(2) <= kMaxWidth, "q: expected heads of at most ", kMaxWidth, " numbers on CUDA, got ",
                    q.size(2));
    check_int32(patch_offsets, "patch_offsets");
    check_int32(cu_patches, "cu_patches");
    check_int32(ids, "ids");
    capacity = count_of(patch_offsets, "patch_offsets");
    count_of(cu_patches, "cu_patches");
    num_bytes = (encode ? k : q).size(0);
    check_size(ids, "ids", 0, num_bytes);
    const int64_t rows = (encode ? q : k).size(0);
    STD_TORCH_CHECK(capacity == 0 ? rows == 0 : rows % capacity == 0 && rows / capacity == queries_per_patch,
                    encode ? "q" : "k", ": expected ", capacity, " * ", queries_per_patch, " rows, got ", rows);
    window = std::clamp<int64_t>(window_.value_or(1), 1, std::max<int64_t>(1, capacity));
    scale = scale_.value_or(1 / std::sqrt(static_cast<double>(q.size(2))));
    q = unit_stride(q), k = unit_stride(k), v = unit_stride(v);
  }

  int64_t heads() const { return q.size(1); }
  int64_t width() const { return q.size(2); }
  PatchReaders readers(const Device& device) const {
    return {device.read<i32>(patch_offsets),
            device.read<i32>(cu_patches),
            device.read<i32>(ids),
            capacity,
            cu_patches.size(0) - 1,
            num_bytes,
            queries_per_patch,
            window,
            encode};
  }
  template <class T>
  CrossAttention<T> problem(const Device& device) const {
    return {rows_of<T>(device, q),       rows_of<T>(device, k), rows_of<T>(device, v), heads(), width(),
            static_cast<acc_t<T>>(scale)};
  }
};

// Rows that a group holds where there may be any number of them.
template <class S>
inline constexpr int kChunk = S::kPacks > 4 ? 1 : 2;

template <class S>
Shape shape_of(const Arguments& arguments) {
  const int64_t warps = std::max<int64_t>(arguments.capacity, 1) * ceil_div<int64_t>(arguments.heads(), S::kHeads);
  return {.blocks = ceil_div<int64_t>(warps, kAttentionThreads / kWarp), .threads = kAttentionThreads};
}

// f(Split) with the fewest lanes that hold a row in vectors of 16 bytes, if all rows of the tensors begin at a multiple
// of that; else number by number. fp64 is for checks, and always takes that way.
template <class T, class F>
void dispatch_split(std::initializer_list<const Tensor*> tensors, F&& f) {
  const int64_t width = (*tensors.begin())->size(2);
  if constexpr (sizeof(T) < 8) {
    constexpr int kPack = 16 / sizeof(T);
    int64_t bits = bytes_of<T>(width);
    for (const Tensor* x : tensors) bits |= address(x->const_data_ptr()) | bytes_of<T>(x->stride(0) | x->stride(1));
    if (bits % 16 == 0) {
      if constexpr (sizeof(T) == 2) {
        if (width <= 4 * kPack) return f(Split<T, kPack, 1, 4>{});
      }
      if (width <= 8 * kPack) return f(Split<T, kPack, 1, 8>{});
      if (width <= 16 * kPack) return f(Split<T, kPack, 1, 16>{});
      if (width <= 32 * kPack) return f(Split<T, kPack, 1, 32>{});
      if constexpr (sizeof(T) == 4) return f(Split<T, kPack, 2, 32>{});
    }
  }
  if (width <= 32) return f(Split<T, 1, 4, 8>{});
  f(Split<T, 1, kMaxWidth / kWarp, kWarp>{});
}

// f(Constant<rows that a group holds at once>) for `rows` of them: 1, 2 or 4 in vectors, else what registers allow.
template <class S, class F>
void dispatch_held(int64_t rows, F&& f) {
  if constexpr (S::kPack > 1) {
    if (rows == 1) return f(Constant<1>{});
    if (rows > 2) return f(Constant<4>{});
  }
  f(Constant<kChunk<S>>{});
}

std::tuple<Tensor, Tensor> patch_cross_attention_fwd_cuda(Tensor q, Tensor k, Tensor v, Tensor patch_offsets,
                                                          Tensor cu_patches, Tensor ids, std::string direction,
                                                          int64_t queries_per_patch, std::optional<int64_t> window,
                                                          std::optional<double> scale) {
  const Arguments arguments(q, k, v, patch_offsets, cu_patches, ids, direction, queries_per_patch, window, scale);
  const Device device(q);
  Tensor out = device_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = device_output(q, {q.size(0), q.size(1)}, accumulator(q));
  if (lse.numel() == 0) return {out, lse};
  dispatch_device_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto problem = arguments.problem<T>(device);
    const CrossOutput<T> output = {output_rows<T>(device, out), device.write<acc_t<T>>(lse)};
    dispatch_split<T>({&arguments.q, &arguments.k, &arguments.v, &out}, [&](auto split) {
      using S = decltype(split);
      dispatch_held<S>(arguments.encode ? queries_per_patch : kChunk<S>, [&](auto held) {
        device.launch<patch_cross_attention_fwd_kernel<S, held()>>(shape_of<S>(arguments), problem,
                                                                   arguments.readers(device), output);
      });
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> patch_cross_attention_bwd_cuda(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                  Tensor out, Tensor lse, Tensor patch_offsets,
                                                                  Tensor cu_patches, Tensor ids, std::string direction,
                                                                  int64_t queries_per_patch,
                                                                  std::optional<int64_t> window,
                                                                  std::optional<double> scale) {
  const Arguments arguments(q, k, v, patch_offsets, cu_patches, ids, direction, queries_per_patch, window, scale);
  check_like(grad_out, "grad_out", q);
  check_like(out, "out", q);
  check_dim(lse, "lse", 2);
  check_dtype(lse, "lse", accumulator(q));
  for (int dim = 0; dim < 2; ++dim) check_size(lse, "lse", dim, q.size(dim));
  grad_out = unit_stride(grad_out), lse = torch::stable::contiguous(lse);
  const Device device(q);
  const int64_t heads = arguments.heads();
  Tensor grad_q = device_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = device_output(k, {k.size(0), k.size(1), k.size(2)});
  Tensor grad_v = device_output(v, {v.size(0), v.size(1), v.size(2)});
  if (grad_q.numel() == 0 && grad_k.numel() == 0) return {grad_q, grad_k, grad_v};
  dispatch_device_float(q.scalar_type(), "q", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const auto problem = arguments.problem<T>(device);
    const PatchReaders readers = arguments.readers(device);
    CrossGradients<T> grads = {
        rows_of<T>(device, grad_out),   device.read<A>(lse),           nullptr, output_rows<T>(device, grad_q),
        output_rows<T>(device, grad_k), output_rows<T>(device, grad_v)};
    dispatch_split<T>(
        {&arguments.q, &arguments.k, &arguments.v, &grad_out, &grad_q, &grad_k, &grad_v}, [&](auto split) {
          using S = decltype(split);
          const Shape shape = shape_of<S>(arguments);
          dispatch_held<S>(queries_per_patch, [&](auto held) {
            if (arguments.window == 1 && queries_per_patch <= held()) {
              if (arguments.encode)
                device.launch<patch_cross_attention_bwd_kernel<S, held(), Pass::kEncode>>(shape, problem, readers,
                                                                                          grads);
              else
                device.launch<patch_cross_attention_bwd_kernel<S, held(), Pass::kDecode>>(shape, problem, readers,
                                                                                          grads);
              return;
            }
            Tensor softmax = device_output(q, {q.size(0), heads, 2}, accumulator(q));
            grads.softmax = device.write<A>(softmax);
            device.launch<patch_cross_attention_bwd_kernel<S, kChunk<S>, Pass::kQueries>>(shape, problem, readers,
                                                                                          grads);
            device.launch<patch_cross_attention_bwd_kernel<S, kChunk<S>, Pass::kKeys>>(shape, problem, readers, grads);
          });
        });
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("patch_cross_attention_fwd", TORCH_BOX(&patch_cross_attention_fwd_cuda));
  m.impl("patch_cross_attention_bwd", TORCH_BOX(&patch_cross_attention_bwd_cuda));
}

}  // namespace blt
