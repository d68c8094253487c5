// Runs loops over ranges on torch's threads. A loop of at most `grain` steps runs in the calling thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace blt {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

template <class F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  if (size <= 0) return;
  if (size <= grain) {
    f(int64_t{0}, size);
  } else {
    torch::stable::parallel_for(0, size, grain, f);
  }
}

// Calls f(first, last) for runs of segments, where segment s is [offsets[s], offsets[s+1]). Threads get equal shares of
// the work; a segment costs its length plus one step.
template <class Offset, class F>
void parallel_segments(const Offset* offsets, int64_t segments, int64_t grain, const F& f) {
  const auto before = [=](int64_t s) { return offsets[s] - offsets[0] + s; };
  const auto segment_at = [=](int64_t work) {
    int64_t low = 0, high = segments;  // finds the first segment with before(s) >= work
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      before(middle) < work ? low = middle + 1 : high = middle;
    }
    return low;
  };
  parallel_for(before(segments), grain, [&](int64_t begin, int64_t end) {
    const int64_t first = segment_at(begin), last = segment_at(end);
    if (first < last) f(first, last);
  });
}

}  // namespace blt
