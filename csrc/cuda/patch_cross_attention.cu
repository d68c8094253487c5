// Launches the kernels of patch_cross_attention.cuh. Every kRun units have a warp for each group of heads. Every group
// of heads has at least one warp, which zeroes what no patch owns.

#include "patch_cross_attention.cuh"

#include <algorithm>
#include <bit>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../common/args/patch_cross_attention.h"
#include "../common/box.h"
#include "../launch/launch.h"
#include "patch_cross_attention_bwd.cuh"
#include "patch_cross_attention_sum.cuh"

namespace blt {
namespace {

// Returns packed heads, by a copy where strides ask for one.
Tensor packed(const Tensor& x) { return x.dim() == 3 ? x : torch::stable::flatten(x, 0, 1); }

Tensor in_shape_of(const Tensor& like, const Tensor& x) {
  return torch::stable::view(x, {like.size(0), like.size(1), like.size(2), like.size(3)});
}

// Returns the packed gradient of x as that of x, whose order of dimensions it gets by a copy.
Tensor gradient_of(const Tensor& x, const Tensor& packed) {
  if (x.dim() == 3) return packed;
  const Tensor gradient = in_shape_of(x, packed);
  if (!heads_outside(x)) return gradient;
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(gradient, 1, 2)), 1, 2);
}

template <class T>
HeadTensor<const T> input_rows(const Device& device, const Tensor& x) {
  return {device.read<T>(x), x.stride(1), static_cast<u32>(row_bytes(x))};
}

template <class T>
HeadTensor<T> output_rows(const Device& device, Tensor& x) {
  return {device.write<T>(x), x.stride(1), static_cast<u32>(row_bytes(x))};
}

// Converts the checked arguments to what the kernels take.
struct Arguments : CrossArguments {
  explicit Arguments(CrossArguments&& checked) : CrossArguments(std::move(checked)) {
    STD_TORCH_CHECK(width() <= kMaxWidth, "q: expected heads of at most ", kMaxWidth, " numbers on CUDA, got ",
                    width());
    for (Tensor* x : {&q, &k, &v}) *x = limit_row_stride(*x, UINT32_MAX);
  }

  int heads() const { return static_cast<int>(q.size(1)); }
  int kv_heads() const { return static_cast<int>(k.size(1)); }
  int width() const { return static_cast<int>(q.size(2)); }
  int vectors() const { return capacity == 0 ? 1 : static_cast<int>(queries_per_patch); }
  // log_part is the binary logarithm of a part's size; parts() of them may be units of their own.
  int log_part() const {
    return std::max(kLogPart, 2 + static_cast<int>(std::bit_width(static_cast<uint64_t>(window - 1))));
  }
  int parts() const { return capacity == 0 || log_part() > 30 ? 0 : static_cast<int>(num_bytes >> log_part()); }
  PatchReaders readers(const Device& device) const {
    return {device.read<i32>(offsets),
            device.read<i32>(cu_patches),
            device.read<i32>(ids),
            static_cast<int>(capacity),
            static_cast<int>(documents),
            static_cast<int>(num_bytes),
            vectors(),
            static_cast<int>(window),
            parts(),
            log_part(),
            encode};
  }
  template <class T>
  CrossAttention<T> problem(const Device& device) const {
    return {input_rows<T>(device, q),
            input_rows<T>(device, k),
            input_rows<T>(device, v),
            heads(),
            kv_heads(),
            heads() / kv_heads(),
            width(),
            static_cast<acc_t<T>>(scale)};
  }
};

// Has room for the sums of units: 2 slots for every part, for the vectors that meet it and the heads of one side.
class PartMemory {
 public:
  PartMemory(const Arguments& arguments, bool needed, int heads)
      : patches_(static_cast<int>(arguments.window)),
        vectors_(arguments.vectors()),
        heads_(heads),
        slots_(needed ? 2 * arguments.parts() : 0),
        width_(arguments.width()),
        sums_(memory(arguments.q, width_)),
        softmax_(memory(arguments.q, 2)) {}
  template <class A>
  PartSums<A> sums(const Device& device) {
    return {device.write<A>(softmax_), device.write<A>(sums_), patches_, vectors_, heads_};
  }
  // Launches one block for 32 parts and a head.
  template <class T, bool kSoftmax>
  void add_up(const Device& device, const Arguments& arguments, Tensor& to, acc_t<T>* lse) {
    const LaunchConfig config = {.grid = {ceil_div<int64_t>(slots_ / 2, kWarp), heads_},
                                 .block = kPartSumThreads,
                                 .smem_bytes = sizeof(WarpSums<acc_t<T>>)};
    device.launch<patch_cross_attention_sum_kernel<T, kSoftmax>>(
        config, arguments.readers(device), sums<acc_t<T>>(device), device.write<T>(to), lse, width_);
  }

 private:
  Tensor memory(const Tensor& like, int64_t width) const {
    return device_output(like, {slots_ * patches_ * vectors_, heads_, width}, accumulator(like));
  }
  int patches_, vectors_, heads_;
  int64_t slots_;
  int width_;
  Tensor sums_, softmax_;
};

template <class S, class Ring>
LaunchConfig config_of(const Arguments& arguments) {
  const int64_t units = arguments.capacity + arguments.parts(), groups = ceil_div(arguments.kv_heads(), S::kHeads);
  return {.grid = {groups * std::max<int64_t>(1, ceil_div<int64_t>(units, kRun * kWarps))},
          .block = kThreads,
          .smem_bytes = sizeof(Rings<Ring>)};
}

// Calls f(Split) with the fewest lanes, from 8 on, that hold a row in vectors of 16 bytes, if all rows of the tensors
// begin at a multiple of 16 bytes, else with a vector of one number. fp64 is for checks, and always takes the latter.
template <class T, class F>
void dispatch_split(std::initializer_list<const Tensor*> tensors, F&& f) {
  if constexpr (sizeof(T) < 8) {
    constexpr int kVec = 16 / sizeof(T), kFew = 64 / kVec;  // lanes for a width of 64
    const int64_t width = (*tensors.begin())->size(2);
    int64_t bits = bytes_of<T>(width);
    for (const Tensor* x : tensors) bits |= address(x->const_data_ptr()) | row_bytes(*x) | bytes_of<T>(x->stride(1));
    if (bits % 16 == 0) {
      if (width <= 64) return f(Split<T, kVec, 1, kFew>{});
      if (width <= 128) return f(Split<T, kVec, 1, 2 * kFew>{});
      return f(Split<T, kVec, kMaxWidth / kVec / kWarp, kWarp>{});
    }
  }
  f(Split<T, 1, kMaxWidth / kWarp, kWarp>{});
}

std::tuple<Tensor, Tensor> patch_cross_attention_fwd_cuda(Tensor q, Tensor k, Tensor v, Tensor offsets,
                                                          Tensor cu_patches, Tensor ids, std::string direction,
                                                          int64_t queries_per_patch, std::optional<int64_t> window,
                                                          std::optional<double> scale) {
  if (q.dim() == 4 || k.dim() == 4) {
    const auto [out, lse] = patch_cross_attention_fwd_cuda(packed(q), packed(k), packed(v), offsets, cu_patches, ids,
                                                           direction, queries_per_patch, window, scale);
    if (q.dim() == 3) return {out, lse};
    return {in_shape_of(q, out), torch::stable::view(lse, {q.size(0), q.size(1), q.size(2)})};
  }
  const Arguments arguments(
      check_cross_attention(q, k, v, offsets, cu_patches, ids, direction, queries_per_patch, window, scale));
  const Device device(q);
  Tensor out = device_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = device_output(q, {q.size(0), q.size(1)}, accumulator(q));
  if (lse.numel() == 0) return {out, lse};
  PartMemory parts(arguments, arguments.encode, arguments.heads());
  dispatch_device_float(q.scalar_type(), "q", [&]<class T>(Tag<T>) {
    using A = acc_t<T>;
    const auto problem = arguments.problem<T>(device);
    const PatchReaders readers = arguments.readers(device);
    const CrossOutput<T> output = {output_rows<T>(device, out), device.write<A>(lse), parts.sums<A>(device)};
    dispatch_split<T>({&arguments.q, &arguments.k, &arguments.v, &out}, [&]<class S>(S) {
      if (!arguments.encode && arguments.window == 1 && arguments.vectors() <= S::kHeld)
        device.launch<patch_cross_attention_fwd_keys_kernel<S>>(config_of<S, QueryRing<S>>(arguments), problem, readers,
                                                                output);
      else
        device.launch<patch_cross_attention_fwd_queries_kernel<S>>(config_of<S, KeyRing<S>>(arguments), problem,
                                                                   readers, output);
    });
    parts.add_up<T, true>(device, arguments, out, output.lse);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> patch_cross_attention_bwd_cuda(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                  Tensor out, Tensor lse, Tensor offsets,
                                                                  Tensor cu_patches, Tensor ids, std::string direction,
                                                                  int64_t queries_per_patch,
                                                                  std::optional<int64_t> window,
                                                                  std::optional<double> scale) {
  if (q.dim() == 4 || k.dim() == 4) {
    const Tensor packed_lse = q.dim() == 4 ? torch::stable::flatten(lse, 0, 1) : lse;
    const auto [grad_q, grad_k, grad_v] =
        patch_cross_attention_bwd_cuda(packed(grad_out), packed(q), packed(k), packed(v), packed(out), packed_lse,
                                       offsets, cu_patches, ids, direction, queries_per_patch, window, scale);
    return {gradient_of(q, grad_q), gradient_of(k, grad_k), gradient_of(v, grad_v)};
  }
  const Arguments arguments(
      check_cross_attention(q, k, v, offsets, cu_patches, ids, direction, queries_per_patch, window, scale));
  check_cross_grads(arguments, grad_out, out, lse);
  grad_out = limit_row_stride(grad_out, UINT32_MAX), out = limit_row_stride(out, UINT32_MAX);
  const Device device(q);
  const int heads = arguments.heads(), kv_heads = arguments.kv_heads();
  Tensor grad_q = device_output(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = device_output(k, {k.size(0), k.size(1), k.size(2)});
  Tensor grad_v = device_output(v, {v.size(0), v.size(1), v.size(2)});
  if (grad_q.numel() == 0 && grad_k.numel() == 0) return {grad_q, grad_k, grad_v};
  PartMemory q_parts(arguments, arguments.encode, heads), k_parts(arguments, !arguments.encode, kv_heads),
      v_parts(arguments, !arguments.encode, kv_heads);
  dispatch_device_float(q.scalar_type(), "q", [&]<class T>(Tag<T>) {
    using A = acc_t<T>;
    const auto problem = arguments.problem<T>(device);
    const PatchReaders readers = arguments.readers(device);
    CrossGradients<T> grads = {input_rows<T>(device, grad_out),
                               input_rows<T>(device, out),
                               device.read<A>(lse),
                               nullptr,
                               output_rows<T>(device, grad_q),
                               output_rows<T>(device, grad_k),
                               output_rows<T>(device, grad_v),
                               q_parts.sums<A>(device),
                               k_parts.sums<A>(device),
                               v_parts.sums<A>(device)};
    dispatch_split<T>(
        {&arguments.q, &arguments.k, &arguments.v, &grad_out, &out, &grad_q, &grad_k, &grad_v}, [&]<class S>(S) {
          const LaunchConfig of_queries = config_of<S, BackwardKeyRing<S>>(arguments);
          const LaunchConfig of_keys = config_of<S, BackwardQueryRing<S>>(arguments);
          if (arguments.window == 1 && arguments.vectors() <= S::kHeld) {
            if (arguments.encode && heads == kv_heads)
              return device.launch<patch_cross_attention_bwd_queries_kernel<S>>(of_queries, problem, readers, grads);
            if (!arguments.encode)
              return device.launch<patch_cross_attention_bwd_keys_kernel<S>>(of_keys, problem, readers, grads);
          }
          LaunchConfig of_both = of_queries;
          of_both.smem_bytes = std::max(of_queries.smem_bytes, of_keys.smem_bytes);
          const int halo = static_cast<int>(arguments.window) - 1;
          const bool together = halo <= kRun * kWarps;
          Tensor softmax = device_output(q, {(together && halo > 0 ? 2 : 1) * q.size(0), heads, 2}, accumulator(q));
          grads.softmax = device.write<A>(softmax);
          const auto launch = [&](const Passes& passes) {
            device.launch<patch_cross_attention_bwd_both_kernel<S>>(of_both, problem, readers, grads, passes);
          };
          if (together) return launch({true, true, halo});
          launch({true, false, 0});
          launch({false, true, 0});
        });
    q_parts.add_up<T, false>(device, arguments, grad_q, nullptr);
    k_parts.add_up<T, false>(device, arguments, grad_k, nullptr);
    v_parts.add_up<T, false>(device, arguments, grad_v, nullptr);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("patch_cross_attention_fwd", BLT_KERNELS_BOX(&patch_cross_attention_fwd_cuda));
  m.impl("patch_cross_attention_bwd", BLT_KERNELS_BOX(&patch_cross_attention_bwd_cuda));
}

}  // namespace blt
