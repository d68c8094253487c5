#include "few_row_product.h"

#include <algorithm>
#include <cstring>

#include "support/vec.h"

namespace blt {
namespace {

constexpr int kWeights = kLanes == 16 ? 4 : 2;  // AVX-512 has 32 registers, AVX2 16: sums and weights fit into them
constexpr int kMaxRows = 6;
constexpr int64_t kLineBytes = 64;

VecF load_lanes(const float* p) { return load(p); }

VecF load_lanes(const BFloat16* p) {
  VecU16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bit_cast<VecF>(__builtin_convertvector(bits, VecU) << 16);
}

VecF load_lanes(const int8_t* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (VecF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t VecI8 __attribute__((vector_size(kLanes)));
  VecI8 values;
  std::memcpy(&values, p, sizeof(values));
  return __builtin_convertvector(__builtin_convertvector(values, VecI), VecF);
#endif
}

// Loads the last K % kLanes elements of a row of K; the other lanes are 0, so that they add nothing.
struct Tail {
  explicit Tail(int64_t width) : whole(width / kLanes * kLanes), count(width - whole) {
    for (int i = 0; i < kLanes; ++i) mask[i] = i >= kLanes - count ? -1 : 0;
  }
  template <class W>
  VecF operator()(const W* row) const {
    if (whole > 0) return bit_cast<VecF>(bit_cast<VecI>(load_lanes(row + whole + count - kLanes)) & mask);
    W cells[kLanes] = {};
    std::memcpy(cells, row, static_cast<size_t>(count) * sizeof(W));
    return load_lanes(cells);
  }
  int64_t whole, count;
  VecI mask;
};

template <class W>
struct Rows {
  const W* data;
  int64_t stride;
  const W* row(int64_t i) const { return data + i * stride; }
};

// A group of rows prefetches this share of the next tile's lines. Were all of them asked for in the first group, it
// would wait for memory, and memory would be idle during the others.
struct Share {
  int64_t group, groups;
};

// Computes y[m * y_stride + n] for m < kRows and n < kCount.
template <int kRows, int kCount, class W>
inline void multiply_tile(float* y, int64_t y_stride, Matrix x, Rows<W> weight, const Tail& tail, Share share) {
  constexpr int kSums = (kRows * kCount + kLanes - 1) / kLanes * kLanes;
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(W));
  VecF sums[kSums] = {};
  const auto add = [&](auto load_columns) {
    VecF w[kCount];
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) w[n] = load_columns(weight.row(n));
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const VecF a = load_columns(x.row(m));
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) sums[m * kCount + n] += a * w[n];
    }
  };
  int64_t ahead = (tail.whole / kLine + share.groups) / share.groups * share.group * kLine, wait = 0;
  for (int64_t line = 0; line < tail.whole; line += kLine) {
    if (wait-- == 0) {
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) __builtin_prefetch(weight.row(kCount + n) + ahead);
      ahead += kLine, wait = share.groups - 1;
    }
    const int64_t end = std::min(tail.whole, line + kLine);
    for (int64_t k = line; k < end; k += kLanes) add([k](const auto* row) { return load_lanes(row + k); });
  }
  if (tail.count > 0) add(tail);

  float cells[kSums];
#pragma GCC unroll 6
  for (int i = 0; i < kSums; i += kLanes) store(cells + i, lane_sums<float>(sums + i));
  for (int m = 0; m < kRows; ++m) std::memcpy(y + m * y_stride, cells + m * kCount, kCount * sizeof(float));
}

template <int kCount, int kRows = kMaxRows, class W>
inline void multiply_rows(int64_t rows, float* y, int64_t y_stride, Matrix x, Rows<W> weight, const Tail& tail,
                          Share share) {
  if (rows == kRows) return multiply_tile<kRows, kCount>(y, y_stride, x, weight, tail, share);
  if constexpr (kRows > 1) multiply_rows<kCount, kRows - 1>(rows, y, y_stride, x, weight, tail, share);
}

template <class W>
void multiply_by(const Product& product, Matrix x, int64_t rows, int64_t width, int64_t begin, int64_t end) {
  const auto [data, dtype, stride, outputs, scale] = product.weights;
  const Rows<W> weights = {static_cast<const W*>(data), stride};
  const Tail tail(width);
  const int64_t groups = (rows + kMaxRows - 1) / kMaxRows;
  const auto multiply = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t n) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = rows * group / groups, last = rows * (group + 1) / groups;
      multiply_rows<kCount>(last - first, product.y + first * outputs + n, outputs, {x.row(first), x.stride},
                            Rows<W>{weights.row(n), stride}, tail, {group, groups});
    }
  };
  int64_t n = begin;
  for (; n + kWeights <= end; n += kWeights) multiply(std::integral_constant<int, kWeights>{}, n);
  for (; n < end; ++n) multiply(std::integral_constant<int, 1>{}, n);
  if (scale == nullptr) return;
  for (int64_t m = 0; m < rows; ++m) {
    float* const y = product.y + m * outputs + begin;
    map_row<float>(y, end - begin, [](auto y, auto s) { return y * s; }, y, scale + begin);
  }
}

}  // namespace

void multiply(const Product& product, Matrix x, int64_t rows, int64_t width, int64_t begin, int64_t end) {
  switch (product.weights.dtype) {
    case ScalarType::BFloat16: return multiply_by<BFloat16>(product, x, rows, width, begin, end);
    case ScalarType::Char: return multiply_by<int8_t>(product, x, rows, width, begin, end);
    default: return multiply_by<float>(product, x, rows, width, begin, end);
  }
}

}  // namespace blt
