// Multiplies bf16 matrices in the tile registers of AMX, exact and summed in fp32, and makes the layouts that they
// read.
//
// The left factor is read as rows. The right factor is a block of pairs, pairs[d / 2][lane][d % 2]. `pack_transposed`
// makes it from the rows of a tensor, and `join` from two vectors of weights.
#pragma once

#include "blocks.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__AVX512DQ__)
#define BLT_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace blt {

#if BLT_AMX

// Returns whether the processor has AMX with bf16 and the system lets this process use it.
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

inline constexpr int64_t kAmxStep = 128;                   // twice kStep rows: sums are loaded and stored half as often
inline constexpr int64_t kTileRows = 16, kTileDepth = 32;  // a tile register holds 16 rows of 64 bytes

// It is a constant, because GCC believes that the instruction reads only the first 8 bytes, and drops other stores.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig kTileConfig;

// Configures eight tile registers of full size for the current thread during the object's lifetime.
struct TileRegisters {
  __attribute__((target("amx-tile"))) TileRegisters() { _tile_loadconfig(&kTileConfig); }
  __attribute__((target("amx-tile"))) ~TileRegisters() { _tile_release(); }
};

// Sets or adds to out[row][lane] the sum over d of left[row][d] * right[d][lane] for 32 rows and 32 lanes, in four
// registers. Rows of `out` and pairs of rows of `right` have `pitch` lanes.
__attribute__((target("amx-tile,amx-bf16"))) inline void amx_square(float* out, const BFloat16* left, int64_t stride,
                                                                    const BFloat16* right, int64_t depth, bool add,
                                                                    int64_t pitch) {
  const int64_t bytes = pitch * 4;
  float* const below = out + kTileRows * pitch;
  if (add) {
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, out + kTileRows, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + kTileRows, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; d += kTileDepth) {
    _tile_loadd(4, left + d, stride * 2);
    _tile_loadd(5, left + kTileRows * stride + d, stride * 2);
    _tile_loadd(6, right + d * pitch, bytes);
    _tile_loadd(7, right + d * pitch + 2 * kTileRows, bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + kTileRows, bytes);
  _tile_stored(2, below, bytes);
  _tile_stored(3, below + kTileRows, bytes);
}

// Does so for `rows` rows and `pitch` lanes, both multiples of 32. By default `out` is a block.
__attribute__((target("amx-tile,amx-bf16"))) inline void amx_product(float* out, int64_t rows, const BFloat16* left,
                                                                     int64_t stride, const BFloat16* right,
                                                                     int64_t depth, bool add,
                                                                     int64_t pitch = kWidth<float>) {
  for (int64_t i = 0; i < rows; i += 2 * kTileRows)
    for (int64_t lane = 0; lane < pitch; lane += 2 * kTileRows)
      amx_square(out + i * pitch + lane, left + i * stride, stride, right + 2 * lane, depth, add, pitch);
}

// --- layouts ---------------------------------------------------------------------------------------------------------

// Rows are gathered kGathered at a time. The stride of their columns is an odd number of cache lines, so that columns
// do not all fall into one set of the cache.
inline constexpr int64_t kGathered = 256, kColumnStride = kGathered + 2 * kTileRows;

inline int64_t whole_squares(int64_t rows) { return (rows + 2 * kTileRows - 1) / (2 * kTileRows) * 2 * kTileRows; }

// Moves the begin of a range down to whole registers counted from `first`, where the gathered rows begin.
inline Range whole_registers(const Range& range, int64_t first) {
  return {first + (range.begin - first) / (2 * kTileRows) * 2 * kTileRows, range.end};
}

// Sets rows[i][e] to x[range.begin + i][e], and to 0 for range.size() <= i < padded.
inline void gather(BFloat16* rows, const Heads& x, int64_t head, const Range& range, int64_t padded, int64_t width) {
  for (int64_t i = 0; i < range.size(); ++i)
    std::copy_n(x.row<BFloat16>(range.begin + i, head), width, rows + i * width);
  std::fill(rows + range.size() * width, rows + padded * width, BFloat16(0.0f));
}

// Multiplies whole vectors of numbers by a power of two, which is exact.
inline void multiply(BFloat16* x, int64_t count, float power) {
  for (int64_t i = 0; i < count; i += kLanes) store_as<BFloat16, float>(x + i, power * load_as<float>(x + i));
}

// Loads elements e and e + 1 of a row as pairs[e / 2][row], for 16 rows that are `stride` apart and even e < 32.
inline void load_pairs(VecF (&pairs)[kLanes], const BFloat16* rows, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(&pairs[i], rows + i * stride, sizeof(VecF));
  transpose<float>(pairs);
}

// Makes the right factor right[d][lane] = rows[lane][d].
inline void pack_transposed(BFloat16* right, const BFloat16* rows, int64_t width) {
  for (int64_t lane = 0; lane < kWidth<float>; lane += kLanes)
    for (int64_t e = 0; e < width; e += 2 * kLanes) {
      VecF pairs[kLanes];
      load_pairs(pairs, rows + lane * width + e, width);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        std::memcpy(right + (e + 2 * i) * kWidth<float> + 2 * lane, &pairs[i], sizeof(VecF));
    }
}

// Makes the right factor right[i][e] = rows[i][e] for an even number of rows.
inline void pack_rows(BFloat16* right, const BFloat16* rows, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t e = 0; e < width; ++e) {
      right[i * width + 2 * e] = rows[i * width + e];
      right[i * width + 2 * e + 1] = rows[(i + 1) * width + e];
    }
}

// Makes the left factor columns[e][i] = rows[i][e] for `count` rows, a multiple of 32.
inline void gather_columns(BFloat16* columns, const BFloat16* rows, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; i += 2 * kLanes)
    for (int64_t e = 0; e < width; e += 2 * kLanes) {
      VecF even[kLanes], odd[kLanes];  // are halves of rows
      load_pairs(even, rows + i * width + e, 2 * width);
      load_pairs(odd, rows + (i + 1) * width + e, 2 * width);
#pragma GCC unroll 16
      for (int pair = 0; pair < kLanes; ++pair) {
        const VecU a = bit_cast<VecU>(even[pair]), b = bit_cast<VecU>(odd[pair]);
        const VecU first = (a & 0xffffu) | (b << 16), second = (a >> 16) | (b & 0xffff0000u);
        BFloat16* const column = columns + (e + 2 * pair) * kColumnStride + i;
        std::memcpy(column, &first, sizeof(VecU));
        std::memcpy(column + kColumnStride, &second, sizeof(VecU));
      }
    }
}

// Stores two vectors as pairs of a right factor, rounded to nearest. NaN needs no test: arithmetic makes NaN without
// low bits.
inline void join(BFloat16* pairs, VecF even, VecF odd) {
  const VecU low = bit_cast<VecU>(even) + 0x8000u, high = bit_cast<VecU>(odd) + 0x8000u;
  const VecU both = (low >> 16) | (high & 0xffff0000u);
  std::memcpy(pairs, &both, sizeof(both));
}

// Returns 2^x with a relative error below 2e-7, and 0 below -126: products with subnormal weights would take long.
inline VecF exp2_or_zero(VecF x) {
  constexpr float kExp2[] = {1.0f, 0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
  const VecF f = (VecF)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  VecF p = broadcast(kExp2[5]);
  for (int i = 4; i >= 0; --i) p = p * f + kExp2[i];
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // a NaN stays
  return (VecF)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)(x - f));
}

// --- scratch ---------------------------------------------------------------------------------------------------------

inline BFloat16* take_bf16(Scratch<float>& scratch, int64_t size) {
  return reinterpret_cast<BFloat16*>(scratch.take(size / 2));
}

// Returns elements of scratch for an item whose tiles have `blocks` blocks of fp32, or twice as many of bf16, and for
// `gathered` gathered factors.
inline int64_t amx_scratch(int64_t blocks, int64_t gathered, int64_t head_dim) {
  const int64_t block = Scratch<float>::padded(head_dim * kWidth<float>);
  return block * blocks * tiles_of_item<float>(blocks, head_dim) + 4 * kAmxStep * kWidth<float> +
         gathered * kColumnStride * head_dim / 2;
}

// Gathers the rows of a tile times `power`, with `rows` as room for them, and packs them as a right factor.
inline BFloat16* pack_tile(Scratch<float>& scratch, BFloat16* rows, const Heads& x, int64_t head, const Range& range,
                           int64_t head_dim, float power) {
  BFloat16* const right = take_bf16(scratch, head_dim * kWidth<float>);
  gather(rows, x, head, range, kWidth<float>, head_dim);
  multiply(rows, kWidth<float> * head_dim, power);
  pack_transposed(right, rows, head_dim);
  return right;
}

#endif

}  // namespace blt
