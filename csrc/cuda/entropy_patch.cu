// Launches the kernels of entropy_patch.cuh, with every rule that divides a text into patches.

#include "entropy_patch.cuh"

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "../common/args/entropy_patch.h"
#include "../launch/launch.h"
#include "token_entropy.h"

namespace blt {
namespace {

// --- layouts ---------------------------------------------------------------------------------------------------------

// Without cu_seqlens it makes `num_documents` documents of the same length.
Documents check_documents(const Device& device, std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                          int64_t bytes) {
  STD_TORCH_CHECK(bytes <= std::numeric_limits<int32_t>::max() - 2 * kChunkBytes, "cu_seqlens: ", bytes,
                  " positions do not fit into int32");
  if (cu_seqlens) {
    const int64_t count = check_num_segments(*cu_seqlens, "cu_seqlens");
    return {device.read<i32>(*cu_seqlens), count, static_cast<i32>(bytes), 0};
  }
  const i32 length = check_even_documents(num_documents, bytes);
  return {nullptr, num_documents, static_cast<i32>(bytes), length};
}

// Describes a layout to build: its documents, its capacity, and the memory through which blocks exchange their counts.
struct Plan {
  Documents documents;
  int64_t capacity;
  LayoutScratch scratch;
  Tensor memory;
};

Plan plan_layout(const Device& device, const Documents& documents, const Tensor& like,
                 std::optional<int64_t> max_patches) {
  const int64_t bytes = documents.bytes, capacity = check_capacity(max_patches, bytes);
  const int64_t chunks = bytes / kChunkBytes + 1;
  const int64_t parts = capacity >= bytes ? 0 : std::min<int64_t>(ceil_div<int64_t>(documents.count, 128), kMaxParts);
  constexpr int64_t kWords = sizeof(Published) / sizeof(i32);
  const int64_t published = ChunkCounts::slots(chunks) * kWords;
  Tensor memory = device_output(like, {published + 1 + parts}, ScalarType::Int);
  i32* const words = device.write<i32>(memory);
  const ChunkCounts counts = {reinterpret_cast<Published*>(words), words + published, static_cast<i32>(chunks)};
  return {documents, capacity, {counts, words + published + 1, static_cast<int>(parts)}, memory};
}

// Builds the layout after a launch that has prepared it.
template <class Rule>
LayoutTensors launch_layout(const Device& device, const Rule& rule, const Plan& plan,
                            std::optional<int64_t> max_patch_length) {
  check_max_patch_length(max_patch_length);
  const i32 limit = static_cast<i32>(std::min<int64_t>(max_patch_length.value_or(kNoLimit), kNoLimit));
  const int64_t bytes = plan.documents.bytes, capacity = plan.capacity;
  const bool even = plan.documents.offsets == nullptr;
  const auto output = [&](int64_t size) { return device_output(plan.memory, {size}); };
  Tensor patch_offsets = output(capacity + 1), cu_patches = output(plan.documents.count + 1), patch_ids = output(bytes),
         decode_ids = output(bytes), decode_offsets = output(capacity + 1),
         cu_seqlens = output(even ? plan.documents.count + 1 : 0);
  Tensor overflowed = device_output(plan.memory, {1}, ScalarType::Bool);
  const LayoutOutputs out = {.patch_offsets = device.write<i32>(patch_offsets),
                             .cu_patches = device.write<i32>(cu_patches),
                             .patch_ids = device.write<i32>(patch_ids),
                             .decode_ids = device.write<i32>(decode_ids),
                             .decode_offsets = device.write<i32>(decode_offsets),
                             .overflowed = device.write<bool>(overflowed),
                             .cu_seqlens = even ? device.write<i32>(cu_seqlens) : nullptr,
                             .capacity = capacity};
  const int64_t blocks = plan.scratch.counts.chunks + ceil_div<int64_t>(capacity + 1, kChunkBytes);
  device.launch<patch_layout_kernel<Rule>>({.grid = {blocks}, .block = kLayoutThreads}, rule, plan.documents, limit,
                                           plan.scratch, out);
  return {patch_offsets, cu_patches, patch_ids, decode_ids, decode_offsets, overflowed, cu_seqlens};
}

template <class Rule>
LayoutTensors build_layout(const Device& device, const Rule& rule, const Documents& documents, const Tensor& like,
                           std::optional<int64_t> max_patch_length, std::optional<int64_t> max_patches) {
  const Plan plan = plan_layout(device, documents, like, max_patches);
  const int64_t work = std::max<int64_t>(ChunkCounts::slots(plan.scratch.counts.chunks), plan.scratch.parts * kWarp);
  device.launch<prepare_layout_kernel>({.grid = {ceil_div<int64_t>(work, kLayoutThreads)}, .block = kLayoutThreads},
                                       documents, plan.scratch);
  return launch_layout(device, rule, plan, max_patch_length);
}

// Calls f with the EntropyRule of the entropies.
template <class F>
LayoutTensors dispatch_rule(const Device& device, const Tensor& entropy, double threshold,
                            std::optional<double> threshold_add, bool monotonic, F&& f) {
  const EntropyMode mode = monotonic       ? EntropyMode::kMonotonic
                           : threshold_add ? EntropyMode::kBoth
                                           : EntropyMode::kGlobal;
  return dispatch_device_float(entropy.scalar_type(), "entropy", [&]<class T>(Tag<T>) {
    return f(EntropyRule<T>{device.read<T>(entropy), static_cast<float>(threshold),
                            static_cast<float>(threshold_add.value_or(0)), mode});
  });
}

LayoutTensors patch_starts_fwd_cuda(const Tensor& entropy, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                    double threshold, std::optional<double> threshold_add, bool monotonic,
                                    std::optional<int64_t> max_patch_length, std::optional<int64_t> max_patches) {
  const Tensor values = check_values(entropy, "entropy");
  const Device device(values);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, values.size(0));
  return dispatch_rule(device, values, threshold, threshold_add, monotonic, [&](const auto& rule) {
    return build_layout(device, rule, documents, values, max_patch_length, max_patches);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> entropy_patch_fwd_cuda(
    const Tensor& logits, std::optional<Tensor> cu_seqlens, int64_t num_documents, double threshold,
    std::optional<double> threshold_add, bool monotonic, std::optional<int64_t> max_patch_length,
    std::optional<int64_t> max_patches) {
  const Tensor rows = check_logits(logits);
  const Device device(rows);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, rows.size(0));
  const Plan plan = plan_layout(device, documents, rows, max_patches);
  EntropyTensors outputs = entropy_outputs(rows);
  Tensor &entropy = std::get<0>(outputs), &log_sum = std::get<1>(outputs);
  dispatch_device_float(rows.scalar_type(), "logits", [&]<class T>(Tag<T>) {
    LaunchConfig config = entropy_config<T>(rows.size(0));
    config.grid.x = std::max<int64_t>(config.grid.x, 1);
    device.launch<entropy_patch_fwd_kernel<T>>(config, logit_rows<T>(device, rows), documents, plan.scratch,
                                               device.write<acc_t<T>>(entropy), device.write<acc_t<T>>(log_sum));
  });
  LayoutTensors layout = dispatch_rule(device, entropy, threshold, threshold_add, monotonic, [&](const auto& rule) {
    return launch_layout(device, rule, plan, max_patch_length);
  });
  return std::tuple_cat(std::move(outputs), std::move(layout));
}

// Builds a layout by the rule that rule_of(ids) returns.
template <class F>
LayoutTensors layout_of_tokens(const Tensor& tokens, std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                               std::optional<int64_t> max_patches, F&& rule_of) {
  const Tensor ids = check_values(tokens, "tokens");
  const Device device(ids);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, ids.size(0));
  return dispatch_tokens(ids, [&]<class T>(Tag<T>) {
    return build_layout(device, rule_of(device.read<T>(ids)), documents, ids, std::nullopt, max_patches);
  });
}

LayoutTensors space_patch_fwd_cuda(const Tensor& tokens, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                   std::optional<int64_t> max_patches) {
  return layout_of_tokens(tokens, cu_seqlens, num_documents, max_patches,
                          []<class T>(const T* ids) { return SpaceRule<T>{ids}; });
}

LayoutTensors static_patch_fwd_cuda(Tensor cu_seqlens, int64_t num_bytes, int64_t size, int64_t first,
                                    std::optional<int64_t> max_patches) {
  check_static_patch(num_bytes, size, first);
  const Device device(cu_seqlens);
  std::optional<Tensor> given = cu_seqlens;
  const Documents documents = check_documents(device, given, 0, num_bytes);
  const auto clamped = [](int64_t x) { return static_cast<i32>(std::min<int64_t>(x, kNoLimit)); };
  return build_layout(device, StaticRule{clamped(size), clamped(first)}, documents, cu_seqlens, std::nullopt,
                      max_patches);
}

LayoutTensors delimiter_patch_fwd_cuda(const Tensor& tokens, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                       int64_t id, std::optional<int64_t> max_patches) {
  return layout_of_tokens(tokens, cu_seqlens, num_documents, max_patches,
                          [=]<class T>(const T* ids) { return DelimiterRule<T>{ids, id}; });
}

LayoutTensors topk_patch_fwd_cuda(const Tensor& entropy, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                  int64_t patch_size, std::optional<int64_t> max_patches) {
  check_patch_size(patch_size);
  const Tensor values = check_values(entropy, "entropy");
  const Device device(values);
  const Documents documents = check_documents(device, cu_seqlens, num_documents, values.size(0));
  Tensor boundaries = device_output(values, {values.size(0)}, ScalarType::Byte);
  u8* const chosen = device.write<u8>(boundaries);
  dispatch_device_float(values.scalar_type(), "entropy", [&]<class T>(Tag<T>) {
    device.launch<topk_patch_fwd_kernel<T>>({.grid = {documents.count}, .block = kTopkThreads}, device.read<T>(values),
                                            documents, static_cast<i32>(std::min<int64_t>(patch_size, kNoLimit)),
                                            chosen);
  });
  return build_layout(device, GivenRule{chosen}, documents, values, std::nullopt, max_patches);
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("entropy_patch_fwd", TORCH_BOX(&entropy_patch_fwd_cuda));
  m.impl("patch_starts_fwd", TORCH_BOX(&patch_starts_fwd_cuda));
  m.impl("space_patch_fwd", TORCH_BOX(&space_patch_fwd_cuda));
  m.impl("static_patch_fwd", TORCH_BOX(&static_patch_fwd_cuda));
  m.impl("delimiter_patch_fwd", TORCH_BOX(&delimiter_patch_fwd_cuda));
  m.impl("topk_patch_fwd", TORCH_BOX(&topk_patch_fwd_cuda));
}

}  // namespace blt
