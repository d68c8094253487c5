// The forward pass of block_causal_attention for bf16 on processors with AMX: the tiles and the softmax of
// attention_forward.h, with both products in tile registers. Products are exact and summed in fp32; the weights are rounded
// to bf16 before they meet the values, as in every flash attention on tensor cores.
#pragma once

#include "attention_forward.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__AVX512F__)
#define BLT_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace blt {

#if BLT_AMX

// Does the processor have AMX with bf16, and does the system let this process use it?
inline bool has_amx() {
  static const bool allowed = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
}

inline constexpr int64_t kTileRows = 16, kTileDepth = 32;  // of a tile register: 16 rows of 64 bytes

// In memory for good: GCC knows of the first 8 bytes only that the instruction reads, and drops stores to the rest.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig kTileConfig;

// Eight tile registers of full size for the current thread, while it lives.
struct TileRegisters {
  __attribute__((target("amx-tile"))) TileRegisters() { _tile_loadconfig(&kTileConfig); }
  __attribute__((target("amx-tile"))) ~TileRegisters() { _tile_release(); }
};

// out[32 rows][32 lanes] (+)= sum over depth of left[row][d] * right[d][lane], by four registers.
__attribute__((target("amx-tile,amx-bf16"))) inline void amx_square(float* out, const BFloat16* left, int64_t stride,
                                                                    const BFloat16* right, int64_t depth, bool add) {
  constexpr int64_t kLaneBytes = kWidth<float> * 4;
  float* const below = out + kTileRows * kWidth<float>;
  if (add) {
    _tile_loadd(0, out, kLaneBytes);
    _tile_loadd(1, out + kTileRows, kLaneBytes);
    _tile_loadd(2, below, kLaneBytes);
    _tile_loadd(3, below + kTileRows, kLaneBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; d += kTileDepth) {
    _tile_loadd(4, left + d, stride * 2);
    _tile_loadd(5, left + kTileRows * stride + d, stride * 2);
    _tile_loadd(6, right + d * kWidth<float>, kLaneBytes);
    _tile_loadd(7, right + d * kWidth<float> + 2 * kTileRows, kLaneBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, kLaneBytes);
  _tile_stored(1, out + kTileRows, kLaneBytes);
  _tile_stored(2, below, kLaneBytes);
  _tile_stored(3, below + kTileRows, kLaneBytes);
}

// The same for `rows` rows, a multiple of 32, and all lanes. `right` is as pack_pairs leaves it.
inline void amx_product(float* out, int64_t rows, const BFloat16* left, int64_t stride, const BFloat16* right,
                        int64_t depth, bool add) {
  for (int64_t i = 0; i < rows; i += 2 * kTileRows)
    for (int64_t lane = 0; lane < kWidth<float>; lane += 2 * kTileRows)
      amx_square(out + i * kWidth<float> + lane, left + i * stride, stride, right + 2 * lane, depth, add);
}

// pairs[d / 2][lane][d % 2] = block[d][lane], rounded to nearest, and 0 for rows <= d < depth. A NaN of arithmetic has no
// low bits, so it stays one without a test.
inline void pack_pairs(BFloat16* pairs, const float* block, int64_t rows, int64_t depth) {
  for (int64_t d = 0; d < depth; d += 2)
    for (int64_t lane = 0; lane < kWidth<float>; lane += kLanes) {
      const auto rounded = [=](int64_t row) {
        return row < rows ? bit_cast<VecU>(load(block + row * kWidth<float> + lane)) + 0x8000u : VecU{};
      };
      const VecU both = (rounded(d) >> 16) | (rounded(d + 1) & 0xffff0000u);
      std::memcpy(pairs + d * kWidth<float> + 2 * lane, &both, sizeof(both));
    }
}

// A step of keys as rows and of values as columns, with zeros behind them for a tile that begins at any of them.
inline constexpr int64_t kPaddedStep = 2 * kStep;

inline void gather_keys(BFloat16* keys, const Heads<const BFloat16>& x, int64_t head, const Range& rows,
                        int64_t width) {
  for (int64_t i = 0; i < rows.size(); ++i) std::copy_n(x.row(rows.begin + i, head), width, keys + i * width);
  std::fill(keys + rows.size() * width, keys + kPaddedStep * width, BFloat16(0.0f));
}

inline void gather_values(BFloat16* values, const Heads<const BFloat16>& x, int64_t head, const Range& rows,
                          int64_t width) {
  for (int64_t e = 0; e < width; e += kLanes)
    for (int64_t key = 0; key < kPaddedStep; key += kLanes) {
      VecF square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        square[i] = key + i < rows.size() ? load_as<float>(x.row(rows.begin + key + i, head) + e) : VecF{};
      if (key < rows.size()) transpose<float>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_as<BFloat16, float>(values + (e + i) * kPaddedStep + key, square[i]);
    }
}

// Elements of scratch beyond what `attend` needs.
inline int64_t amx_scratch(int64_t width) { return 2 * kStep * width; }

// As `attend`, for E a multiple of 32.
inline void attend_amx(const Problem<BFloat16>& problem, const Heads<BFloat16>& out, float* lse, int64_t head,
                       std::span<const Tile> tiles, Scratch<float> scratch) {
  const int64_t width = problem.width, group = problem.group_of(head);
  const Range streamed = keys_of(tiles);
  const float factor = static_cast<float>(std::abs(problem.scale));
  const auto take_bf16 = [&](int64_t size) { return reinterpret_cast<BFloat16*>(scratch.take(size / 2)); };
  float* const scores = scratch.take(kStep * kWidth<float>);
  BFloat16* const weights = take_bf16(kStep * kWidth<float>);
  BFloat16* const keys = take_bf16(kPaddedStep * width);
  BFloat16* const values = take_bf16(kPaddedStep * width);
  float* const transposed = scratch.take(width * kWidth<float>);
  QueryBlock<float> blocks[kMaxTiles<float>];
  BFloat16* queries[kMaxTiles<float>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    QueryBlock<float>& block = blocks[t];
    transpose_in<BFloat16, float>(transposed, problem.q, head, tiles[t].lanes, width, problem.scale < 0 ? -1 : 1);
    queries[t] = take_bf16(width * kWidth<float>);
    pack_pairs(queries[t], transposed, width, width);
    block.sums = scratch.zeros(width * kWidth<float>);
    block.keys.set(problem.visible, tiles[t], streamed.begin);
    for (int c = 0; c < kColumns; ++c) block.top[c] = broadcast(kNone<float>), block.total[c] = VecF{};
  }

  const TileRegisters registers;
  for (int64_t begin = streamed.begin; begin < streamed.end; begin += kStep) {
    const Range step = {begin, std::min(begin + kStep, streamed.end)};
    gather_keys(keys, problem.k, group, step, width);
    gather_values(values, problem.v, group, step, width);
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Range seen = overlap(step, tiles[t].streamed);
      if (seen.size() <= 0) continue;
      const int64_t skipped = seen.begin - begin, padded = (seen.size() + 31) / 32 * 32;
      const Range relative = {seen.begin - streamed.begin, seen.end - streamed.begin};
      QueryBlock<float>& block = blocks[t];
      amx_product(scores, padded, keys + skipped * width, width, queries[t], width, false);
      if (block.keys.all_see(relative))
        weigh<false>(scores, relative, factor, block, width);
      else
        weigh<true>(scores, relative, factor, block, width);
      pack_pairs(weights, scores, seen.size(), padded);
      amx_product(block.sums, width, values + skipped, kPaddedStep, weights, padded, true);
    }
  }
  for (size_t t = 0; t < tiles.size(); ++t) finish(problem, out, lse, head, tiles[t], blocks[t]);
}

#endif

}  // namespace blt
