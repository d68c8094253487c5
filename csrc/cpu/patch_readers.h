// Finds the tasks of patch_cross_attention: consecutive queries that all read the same consecutive keys.
//
// A patch has K vectors: queries to encode, keys to decode. Encoding, the vectors of patch p read the bytes of patches
// (p - window, p]. Decoding, the bytes with decode id d read the vectors of patches (d - window, d]; these bytes are
// neighbours. In both directions the vectors of a patch and all bytes that they meet make a task, which owns the sums
// of the vectors; the bytes of a patch and all vectors that they meet make another, which owns the sums of the bytes.
// Without a window the two are the same.
//
// Tasks of many bytes are divided into parts of their bytes. Sums of vectors over the bytes of a part go to a slot, to
// be added up in order. Parts depend on the task alone, so results are the same for any number of threads. The parts of
// a document are in the order of their bytes, so bytes that several patches meet are in the cache.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <span>
#include <tuple>
#include <vector>

#include "../common/args/patch_cross_attention.h"
#include "support/check_values.h"
#include "support/parallel.h"

namespace blt {

// All of these queries read these keys.
struct Task {
  Range queries, keys;
  bool for_queries, for_keys;  // say whose sums it owns
  int64_t slot;                // has the vectors' sums over a part of their bytes; it is -1 for all bytes
};

// The vectors of such a patch have sums in `count` slots from `slot` on.
struct DividedPatch {
  int64_t patch, slot, count;
};

inline constexpr int64_t kMinPartBytes = 128;

class PatchTasks {
 public:
  // Checks the arguments. Only a backward has sums for keys.
  PatchTasks(const CrossArguments& arguments, bool backward)
      : encode_(arguments.encode), vectors_per_patch_(arguments.queries_per_patch) {
    Tensor checked_offsets = arguments.offsets, checked_patches = arguments.cu_patches;
    const int32_t* const offsets = check_segments(checked_offsets, "offsets", arguments.num_bytes, encode_);
    const int32_t* const cu_patches = check_offsets(checked_patches, "cu_patches", arguments.capacity);
    const int32_t* const ids = arguments.ids.const_data_ptr<int32_t>();
    part_bytes_ = std::max(kMinPartBytes, 4 * arguments.window);  // ordinary patches in a window stay whole
    const int64_t window = arguments.window, capacity = arguments.capacity, occupied = cu_patches[arguments.documents];
    const bool for_vectors = encode_ || backward, for_bytes = !encode_ || backward;
    // The ids must agree with the offsets, since bytes are found by either: a byte that reads or is read has the id of
    // its patch, and all other bytes have -1.
    bool valid = offsets[capacity] == offsets[occupied];
    tasks_.reserve(static_cast<size_t>(2 * capacity));
    pairs_before_.reserve(static_cast<size_t>(2 * capacity + 1));
    const auto check_ids = [&](Range bytes, int64_t id) {
      for (int64_t t = bytes.begin; t < bytes.end; ++t) valid &= ids[t] == id;
    };
    const auto add_unread = [&](Range bytes) {
      check_ids(bytes, -1);
      if (for_bytes) add({0, 0}, bytes, false, true);
    };
    add_unread({0, offsets[0]});
    for (int64_t b = 0; b < arguments.documents; ++b) {
      const int64_t first = cu_patches[b], last = cu_patches[b + 1];
      if (first == last) continue;
      // Decoding, the bytes behind the readers of the last patch of a document read nothing.
      const auto reads = [](int32_t id) { return id >= 0; };
      const int64_t stop =
          encode_ ? offsets[last] : std::partition_point(ids + offsets[last - 1], ids + offsets[last], reads) - ids;
      const auto earlier = [&](int64_t p) { return Range{std::max(first, p - window + 1), p + 1}; };
      const auto later = [&](int64_t p) { return Range{p, std::min(last, p + window)}; };
      const auto bytes_of = [&](Range patches) {
        return Range{offsets[patches.begin], std::min<int64_t>(offsets[patches.end], stop)};
      };
      const auto met_by_vectors = [&](int64_t p) { return bytes_of(encode_ ? earlier(p) : later(p)); };
      const size_t first_task = tasks_.size();
      const int64_t first_slot = num_slots();
      for (int64_t p = first; p < last; ++p) {
        const Range own = {p, p + 1};
        check_ids(bytes_of(own), p);
        if (window == 1) {
          add(own, bytes_of(own), for_vectors, for_bytes);
        } else {
          if (for_vectors) add(own, met_by_vectors(p), true, false);
          if (for_bytes) add(encode_ ? later(p) : earlier(p), bytes_of(own), false, true);
        }
      }
      if (first_slot < num_slots()) {
        const auto place = [this](const Task& task) {
          const Range &bytes = encode_ ? task.keys : task.queries, &vectors = encode_ ? task.queries : task.keys;
          return std::tuple(bytes.begin, vectors.begin, task.for_queries);
        };
        std::sort(tasks_.begin() + first_task, tasks_.end(),
                  [&](const Task& a, const Task& b) { return place(a) < place(b); });
      }
      add_unread({stop, offsets[last]});
    }
    for (int64_t p = occupied; for_vectors && p < capacity; ++p) add({p, p + 1}, {0, 0}, true, false);
    add_unread({offsets[capacity], arguments.num_bytes});
    STD_TORCH_CHECK(valid, "ids: expected the ", encode_ ? "patch" : "decode",
                    " ids that belong to offsets and cu_patches");
    for (const Task& task : tasks_)
      pairs_before_.push_back(pairs_before_.back() + task.queries.size() * task.keys.size() / vectors_per_patch_);
  }

  bool encode() const { return encode_; }
  // Returns whether the queries or the keys of a task are in several runs of `length` rows.
  bool cross(int64_t length, bool of_queries) const {
    return std::any_of(tasks_.begin(), tasks_.end(), [&](const Task& task) {
      const Range& rows = of_queries ? task.queries : task.keys;
      return task.queries.size() > 0 && task.keys.size() > 0 && rows.begin / length != (rows.end - 1) / length;
    });
  }
  int64_t vectors_per_patch() const { return vectors_per_patch_; }
  int64_t num_slots() const { return divided_.empty() ? 0 : divided_.back().slot + divided_.back().count; }
  const std::vector<DividedPatch>& divided() const { return divided_; }

  // Calls f(tasks) for runs of tasks, with equal numbers of (byte, patch) pairs per thread.
  template <class F>
  void for_each_run(int64_t grain, const F& f) const {
    parallel_segments(
        pairs_before_.data(), static_cast<int64_t>(tasks_.size()), grain,
        [&](int64_t first, int64_t last) { f(std::span<const Task>(tasks_.data() + first, tasks_.data() + last)); });
  }

 private:
  void add(Range patches, Range bytes, bool for_vectors, bool for_bytes) {
    const int64_t count = bytes.size() > 2 * part_bytes_ ? bytes.size() / part_bytes_ : 1;
    const bool keeps = for_vectors && count > 1;
    const int64_t slot = num_slots();
    if (keeps) divided_.push_back({patches.begin, slot, count});
    const Range vectors = {patches.begin * vectors_per_patch_, patches.end * vectors_per_patch_};
    for (int64_t i = 0; i < count; ++i) {
      const Range own = {bytes.begin + i * bytes.size() / count, bytes.begin + (i + 1) * bytes.size() / count};
      tasks_.push_back(encode_ ? Task{vectors, own, for_vectors, for_bytes, keeps ? slot + i : -1}
                               : Task{own, vectors, for_bytes, for_vectors, keeps ? slot + i : -1});
    }
  }

  bool encode_;
  int64_t vectors_per_patch_, part_bytes_;
  std::vector<Task> tasks_;
  std::vector<int64_t> pairs_before_ = {0};
  std::vector<DividedPatch> divided_;
};

}  // namespace blt
