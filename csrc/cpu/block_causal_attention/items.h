// Divides the work of block_causal_attention among threads.
#pragma once

#include "../support/alloc.h"
#include "../support/parallel.h"
#include "tiles.h"

namespace blt {

inline constexpr int64_t kSerialWork = 16 * 1024;  // so many (lane, streamed row) pairs are worth a second thread
inline constexpr size_t kNearBytes = 48 * 1024;    // scratch of this size is on the stack: allocating takes 0.5 us

// Calls f(head, item, scratch) for all heads and items, with equal shares of the work for the threads. A streamed row
// costs as much as `cost` (lane, row) pairs; f gets `size` elements of scratch.
template <class A, class Item, class F>
void for_each_item(const Tensor& like, int64_t heads, const std::vector<Item>& items, int64_t cost, int64_t size, F f) {
  if (items.empty()) return;
  std::vector<int64_t> before = {0};  // is the work before each item
  for (const Item& item : items) before.push_back(before.back() + work_of(item));
  const int64_t total = heads * before.back();
  const int64_t threads = total * cost <= kSerialWork ? 1 : torch::stable::get_num_threads();
  alignas(kVecBytes) A near[kNearBytes / sizeof(A)];
  std::optional<Tensor> memory;
  if (threads * size * sizeof(A) > kNearBytes)
    memory = new_output(like, {threads * size}, accumulator(like));
  else if (blt_kernels_poison_outputs)
    std::memset(near, 0xff, sizeof(near));
  A* const scratch = memory ? memory->mutable_data_ptr<A>() : near;
  parallel_for(threads, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = total * first / threads, end = total * last / threads;
    for (int64_t head = 0; head < heads; ++head)
      for (size_t i = 0; i < items.size(); ++i) {
        const int64_t start = head * before.back() + before[i];
        if (begin <= start && start < end) f(head, items[i], Scratch<A>{scratch + first * size});
      }
  });
}

}  // namespace blt
