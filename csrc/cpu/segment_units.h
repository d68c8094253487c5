// Divides long segments of rows into units, which threads share.
//
// The units depend on the segments alone, and their results are combined in order, so results are the same for any
// number of threads. Most batches have no long segment and no units.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "support/parallel.h"

namespace blt {

inline constexpr int64_t kUnitRows = 512;  // the last unit of a segment has up to twice as many

// A unit is rows [begin, end) of a segment. It is the whole segment if its number is -1.
struct Unit {
  int64_t segment, begin, end, number;
};

// A long segment has the units [first, last).
struct LongSegment {
  int64_t segment, first, last;
};

class SegmentUnits {
 public:
  // Segment s is rows [offsets[s], offsets[s+1]).
  SegmentUnits(const int32_t* offsets, int64_t segments) : segments_(offsets), count_(segments) {
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t units = (offsets[s + 1] - offsets[s]) / kUnitRows;
      if (units < 2) continue;
      longs_.push_back({s, numbered_, numbered_ + units});
      numbered_ += units;
    }
    if (longs_.empty()) return;
    offsets_.reserve(static_cast<size_t>(segments + numbered_ + 1));
    auto next = longs_.begin();
    for (int64_t s = 0; s < segments; ++s) {
      const bool is_long = next != longs_.end() && next->segment == s;
      const int64_t units = is_long ? next->last - next->first : 1;
      for (int64_t u = 0; u < units; ++u) {
        offsets_.push_back(offsets[s] + static_cast<int32_t>(u * kUnitRows));
        owners_.push_back({static_cast<int32_t>(s), is_long ? static_cast<int32_t>(next->first + u) : -1});
      }
      if (is_long) ++next;
    }
    offsets_.push_back(offsets[segments]);
  }

  const std::vector<LongSegment>& longs() const { return longs_; }
  int64_t numbered() const { return numbered_; }
  // Returns the index of the long segment of a unit.
  int64_t long_index(const Unit& unit) const { return long_of(unit.number) - longs_.begin(); }

  // Calls f(unit) for the units of long segments.
  template <class F>
  void for_each_long(const F& f) const {
    parallel_for(numbered_, 1, [&](int64_t first, int64_t last) {
      auto at = long_of(first);
      for (int64_t number = first; number < last; ++number) {
        if (number == at->last) ++at;
        const int64_t begin = segments_[at->segment] + (number - at->first) * kUnitRows;
        const int64_t end = number + 1 == at->last ? segments_[at->segment + 1] : begin + kUnitRows;
        f(Unit{at->segment, begin, end, number});
      }
    });
  }

  // Calls f(unit) for all units of long segments and for all other segments.
  template <class F>
  void for_each(int64_t grain, const F& f) const {
    if (longs_.empty())
      return parallel_segments(segments_, count_, grain, [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s) f(Unit{s, segments_[s], segments_[s + 1], -1});
      });
    parallel_segments(offsets_.data(), static_cast<int64_t>(owners_.size()), grain, [&](int64_t first, int64_t last) {
      for (int64_t u = first; u < last; ++u) {
        const auto [segment, number] = owners_[static_cast<size_t>(u)];
        f(Unit{segment, offsets_[static_cast<size_t>(u)], offsets_[static_cast<size_t>(u) + 1], number});
      }
    });
  }

 private:
  std::vector<LongSegment>::const_iterator long_of(int64_t number) const {
    return std::upper_bound(longs_.begin(), longs_.end(), number,
                            [](int64_t n, const LongSegment& other) { return n < other.last; });
  }
  struct Owner {
    int32_t segment, number;
  };
  const int32_t* segments_;
  int64_t count_, numbered_ = 0;
  std::vector<LongSegment> longs_;
  std::vector<int32_t> offsets_;  // of units
  std::vector<Owner> owners_;
};

}  // namespace blt
