// c += a b with a of 16 x 16, b of 16 x 8 and c of 16 x 8 numbers, spread over the lanes of a warp: the tensor core product
// of bf16 or fp16 numbers with fp32 sums, mma.sync.m16n8k16 of the PTX manual. sm_80, sm_90a and sm_100 have it.
//
// Lane 4 g + q holds, two 16-bit numbers to a register, the lower column or row in the lower half:
//   a[0], a[1], a[2], a[3]: columns 2 q and 2 q + 1 of rows g, g + 8, and columns 2 q + 8 and 2 q + 9 of rows g, g + 8
//   b[0], b[1]:             rows 2 q and 2 q + 1, and rows 2 q + 8 and 2 q + 9, of column g
//   c[0] ... c[3]:          columns 2 q and 2 q + 1 of row g, and of row g + 8
#pragma once

#include "device.cuh"

namespace blt {

template <class T>
struct Mma;

#ifdef __CUDACC__
#define BLT_MMA(TYPE)                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "         \
      "{%0,%1,%2,%3};"                                       \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <>
struct Mma<bf16> {
  static __device__ __forceinline__ void add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { BLT_MMA("bf16"); }
};
template <>
struct Mma<fp16> {
  static __device__ __forceinline__ void add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { BLT_MMA("f16"); }
};
#undef BLT_MMA
#else
// For the emulator: each lane gathers its two rows of a and its two columns of b from the lanes that hold them.
template <class T>
float half_of(u32 word, int half) {
  const u16 bits = static_cast<u16>(word >> 16 * half);
  return widen(std::bit_cast<T>(bits));
}

template <class T>
struct Mma {
  static void add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    const int lane = threadIdx.x % kWarp, group = lane / 4, quad = lane % 4;
    for (int part = 0; part < 2; ++part)  // columns of a and rows of b from 8 part on
      for (int other = 0; other < 4; ++other) {
        const u32 upper = __shfl_sync(kAllLanes, a[2 * part], group * 4 + other);
        const u32 lower = __shfl_sync(kAllLanes, a[2 * part + 1], group * 4 + other);
        const u32 left = __shfl_sync(kAllLanes, b[part], 2 * quad * 4 + other);
        const u32 right = __shfl_sync(kAllLanes, b[part], (2 * quad + 1) * 4 + other);
        for (int half = 0; half < 2; ++half) {
          c[0] += half_of<T>(upper, half) * half_of<T>(left, half);
          c[1] += half_of<T>(upper, half) * half_of<T>(right, half);
          c[2] += half_of<T>(lower, half) * half_of<T>(left, half);
          c[3] += half_of<T>(lower, half) * half_of<T>(right, half);
        }
      }
  }
};
#endif

}  // namespace blt
