// Sorts the bytes of a text by the row of a table that they read. So every row has one owner, which adds up the
// gradients of its bytes in order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <utility>

#include "../common/check.h"
#include "support/alloc.h"

namespace blt {

// A byte reads a table row.
struct Reader {
  uint32_t row, byte;
};

// Sorts by row, stably, in one pass per digit of the rows, from `readers` to `spare` and back. Returns the one that
// holds the result, then the other.
inline std::pair<Reader*, Reader*> sort_readers(Reader* readers, Reader* spare, int64_t count, int64_t rows) {
  constexpr int kBits = 11;  // 2048 counters stay in L1
  for (int shift = 0; rows >> shift > 0; shift += kBits) {
    std::array<int64_t, 1 << kBits> next{};
    const auto digit = [shift](Reader r) { return (r.row >> shift) & ((1 << kBits) - 1); };
    for (int64_t i = 0; i < count; ++i) ++next[digit(readers[i])];
    for (int64_t d = 0, before = 0; d < 1 << kBits; ++d) before += std::exchange(next[d], before);
    for (int64_t i = 0; i < count; ++i) spare[next[digit(readers[i])]++] = readers[i];
    std::swap(readers, spare);
  }
  return {readers, spare};
}

// Has the sorted readers of a table: [starts[g], starts[g+1]) read the g-th of the `count` rows that are read.
struct ReadRows {
  const Reader* readers;
  const int32_t* starts;
  int64_t count;
  int64_t row(int64_t g) const { return readers[starts[g]].row; }
};

// Sorts the readers of one table at a time, in one buffer of 16 bytes per byte of text.
class RowSorter {
 public:
  explicit RowSorter(const Tensor& tokens)
      : bytes_(tokens.size(0)), memory_(new_output(tokens, {2 * bytes_ + 1}, ScalarType::Long)) {}

  // find(readers, none) sets the row of every byte, to `none` (which is `rows`) where it reads none.
  template <class F>
  ReadRows group(int64_t rows, const F& find) {
    static_assert(sizeof(Reader) == sizeof(int64_t), "a reader takes an element of the memory");
    STD_TORCH_CHECK(rows < std::numeric_limits<uint32_t>::max(), "tables: ", rows, " rows are too many to sort");
    Reader* const begin = reinterpret_cast<Reader*>(memory_.mutable_data_ptr<int64_t>());
    find(begin, static_cast<uint32_t>(rows));
    const auto [readers, spare] = sort_readers(begin, begin + bytes_, bytes_, rows);
    int32_t* const starts = reinterpret_cast<int32_t*>(spare);
    int64_t count = 0, t = 0;
    for (; t < bytes_ && readers[t].row < rows; ++t)
      if (t == 0 || readers[t].row != readers[t - 1].row) starts[count++] = static_cast<int32_t>(t);
    starts[count] = static_cast<int32_t>(t);
    return {readers, starts, count};
  }

 private:
  int64_t bytes_;
  Tensor memory_;
};

}  // namespace blt
