// Launches the kernels of patch_layout.cuh for a rule, with memory for their outputs and counts.
#pragma once

#include <algorithm>
#include <optional>

#include "../common/args/entropy_patch.h"
#include "../launch/launch.h"
#include "documents.h"
#include "patch_layout.cuh"

namespace blt {

// Describes a layout to build: its documents, its capacity, and the memory through which blocks exchange their counts.
struct Plan {
  Documents documents;
  int64_t capacity;
  LayoutScratch scratch;
  Tensor memory;
};

inline Plan plan_layout(const Device& device, const Documents& documents, const Tensor& like,
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

}  // namespace blt
