// Divides long segments of rows into parts, which threads share.
//
// The parts depend on the segments alone, and their results are combined in order, so results are the same for any
// number of threads. Most batches have no long segment, and make no list of parts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "support/parallel.h"

namespace blt {

inline constexpr int64_t kPartRows = 512;  // the last part of a segment has up to twice as many

// Has rows [begin, end) of a segment. Parts of divided segments are numbered by their slots; `slot` and `divided`, the
// index of the divided segment, are -1 if the part is the whole segment.
struct Part {
  int32_t segment, begin, end, slot, divided;
};

// The parts of a divided segment have `count` slots from `slot` on.
struct DividedSegment {
  int64_t segment, slot, count;
};

class SegmentParts {
 public:
  // Segment s is rows [offsets[s], offsets[s+1]).
  SegmentParts(const int32_t* offsets, int64_t segments) : offsets_(offsets), segments_(segments) {
    const auto is_long = [](int32_t begin, int32_t end) { return end - begin >= 2 * kPartRows; };
    if (std::adjacent_find(offsets, offsets + segments + 1, is_long) == offsets + segments + 1) return;
    parts_.reserve(static_cast<size_t>(segments));
    begins_.reserve(static_cast<size_t>(segments + 1));
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t count = (offsets[s + 1] - offsets[s]) / kPartRows;
      if (count < 2) {
        add({static_cast<int32_t>(s), offsets[s], offsets[s + 1], -1, -1});
        continue;
      }
      const int32_t index = static_cast<int32_t>(divided_.size());
      divided_.push_back({s, num_slots(), count});
      for (int64_t i = 0; i < count; ++i) {
        const int32_t begin = offsets[s] + static_cast<int32_t>(i * kPartRows);
        const int32_t end = i + 1 < count ? begin + static_cast<int32_t>(kPartRows) : offsets[s + 1];
        slots_.push_back(static_cast<int64_t>(parts_.size()));
        add({static_cast<int32_t>(s), begin, end, static_cast<int32_t>(num_slots() - 1), index});
      }
    }
    begins_.push_back(offsets[segments]);
  }

  const std::vector<DividedSegment>& divided() const { return divided_; }
  int64_t num_slots() const { return static_cast<int64_t>(slots_.size()); }

  // Calls f(part) for all parts.
  template <class F>
  void for_each(int64_t grain, const F& f) const {
    if (divided_.empty())
      return parallel_segments(offsets_, segments_, grain, [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s) f(Part{static_cast<int32_t>(s), offsets_[s], offsets_[s + 1], -1, -1});
      });
    parallel_segments(begins_.data(), static_cast<int64_t>(parts_.size()), grain, [&](int64_t first, int64_t last) {
      std::for_each(parts_.begin() + first, parts_.begin() + last, f);
    });
  }

  // Calls f(part) for the parts of divided segments.
  template <class F>
  void for_each_slot(const F& f) const {
    parallel_for(num_slots(), 1, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) f(parts_[slots_[slot]]);
    });
  }

  // Calls f(segment) for the divided segments.
  template <class F>
  void for_each_divided(const F& f) const {
    parallel_for(static_cast<int64_t>(divided_.size()), 1, [&](int64_t first, int64_t last) {
      std::for_each(divided_.begin() + first, divided_.begin() + last, f);
    });
  }

 private:
  void add(const Part& part) {
    parts_.push_back(part);
    begins_.push_back(part.begin);
  }

  const int32_t* offsets_;
  int64_t segments_;
  std::vector<Part> parts_;
  std::vector<int32_t> begins_;  // are those of parts, and the end of the last
  std::vector<int64_t> slots_;   // are indices of parts
  std::vector<DividedSegment> divided_;
};

}  // namespace blt
