// Checks arguments by the values of tensors, which only the CPU kernels can read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../../common/check.h"

namespace blt {

// Checks offsets of segments, int32 [n+1]: they start at 0 (or later, unless `from_zero`), never fall and end at most
// at `total`. Makes them contiguous and returns them.
inline const int32_t* check_segments(Tensor& offsets, const char* name, int64_t total, bool from_zero = false) {
  const int32_t* const values = check_int32(offsets, name);
  STD_TORCH_CHECK(offsets.size(0) >= 1, name, ": expected at least one entry");
  STD_TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(), name, ": ", total, " positions do not fit into int32");
  bool ordered = from_zero ? values[0] == 0 : values[0] >= 0;
  for (int64_t i = 1; i < offsets.size(0); ++i) ordered &= values[i - 1] <= values[i];
  STD_TORCH_CHECK(ordered && values[offsets.size(0) - 1] <= total, name, ": expected offsets that start at 0",
                  from_zero ? "" : " or later", ", never fall and end at most at ", total);
  return values;
}

// Checks offsets of documents or patches, which start at 0.
inline const int32_t* check_offsets(Tensor& offsets, const char* name, int64_t total) {
  return check_segments(offsets, name, total, true);
}

// Checks ids of patches, int32 [n]: from -1, which means none, to `count` - 1. Makes them contiguous and returns them.
inline const int32_t* check_ids(Tensor& ids, const char* name, int64_t count) {
  const int32_t* const values = check_int32(ids, name);
  int32_t low = -1, high = -1;
  for (int64_t i = 0; i < ids.size(0); ++i) low = std::min(low, values[i]), high = std::max(high, values[i]);
  STD_TORCH_CHECK(low >= -1 && high < count, name, ": expected ids from -1 to ", count - 1, ", got ",
                  low < -1 ? low : high);
  return values;
}

}  // namespace blt
