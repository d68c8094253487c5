// Moves rows of heads in and out of blocks, for all storage dtypes.

#include "blocks.h"

#include "../../common/dispatch.h"

namespace blt {

namespace {

// Has its numbers as parameters, which stay in registers. What a lambda captures is read again after every store.
template <class A, class T>
void copy_rows(A* block, int64_t pitch, const T* row, int64_t stride, int64_t count, int64_t head_dim) {
  const int64_t whole = head_dim / lanes<A> * lanes<A>;
  for (int64_t i = 0; i < count; ++i, block += pitch, row += stride) {
    for (int64_t e = 0; e < whole; e += lanes<A>) store(block + e, load_as<A>(row + e));
    for (int64_t e = whole; e < head_dim; ++e) block[e] = static_cast<A>(row[e]);
  }
}

}  // namespace

template <class A>
void gather_rows(A* block, const Heads& x, int64_t head, const Range& rows, int64_t head_dim, int64_t pitch) {
  dispatch_storage<A>(x.dtype, [&]<class T>(Tag<T>) {
    for (int64_t begin = rows.begin, end; begin < rows.end; begin = end) {
      end = x.even_rows(begin, rows.end);
      copy_rows(block + (begin - rows.begin) * pitch, pitch, x.row<T>(begin, head), x.row_stride, end - begin,
                head_dim);
    }
  });
}

template <class A>
void gather_chunk(A* block, const Heads& x, int64_t head, const Range& rows, int64_t head_dim, int64_t chunk) {
  dispatch_storage<A>(x.dtype, [&]<class T>(Tag<T>) {
    const int64_t begin = chunk * kWidth<A>;
    for (int64_t i = 0; i < rows.size(); ++i) {
      const T* const row = x.row<T>(rows.begin + i, head) + begin;
      for (int64_t e = 0; e < kWidth<A>; e += 64 / sizeof(T)) __builtin_prefetch(row + x.head_stride + e);
      for (int64_t lane = 0; lane < kWidth<A>; lane += lanes<A>) {
        A* const cells = block + i * kWidth<A> + lane;
        if (begin + lane + lanes<A> <= head_dim)
          store(cells, load_as<A>(row + lane));
        else
          for (int64_t l = 0; l < lanes<A>; ++l)
            cells[l] = begin + lane + l < head_dim ? static_cast<A>(row[lane + l]) : A(0);
      }
    }
  });
}

template <class A>
A* transpose_in(A* block, const Heads& x, int64_t head, const Range& rows, int64_t head_dim, A factor, int64_t width) {
  dispatch_storage<A>(x.dtype, [&]<class T>(Tag<T>) {
    const int64_t begin = rows.begin, count = rows.size();
    const int64_t whole = head_dim / lanes<A> * lanes<A>;
    for (int64_t lane = 0; lane < width; lane += lanes<A>) {
      const T* row[lanes<A>];
      for (int64_t i = 0; i < lanes<A>; ++i) row[i] = lane + i < count ? x.row<T>(begin + lane + i, head) : nullptr;
      for (int64_t e = 0; e < whole; e += lanes<A>) {
        Vec<A> square[lanes<A>];
#pragma GCC unroll 16
        for (int i = 0; i < lanes<A>; ++i) square[i] = row[i] ? factor * load_as<A>(row[i] + e) : Vec<A>{};
        transpose<A>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes<A>; ++i) store(block + (e + i) * width + lane, square[i]);
      }
      for (int64_t i = 0; i < lanes<A>; ++i)
        for (int64_t e = whole; e < head_dim; ++e)
          block[e * width + lane + i] = row[i] ? factor * static_cast<A>(row[i][e]) : A(0);
    }
  });
  return block;
}

template <class A>
void transpose_out(const OutputHeads& x, int64_t head, const Range& rows, int64_t head_dim, const A* block,
                   const A* factor) {
  dispatch_storage<A>(x.dtype, [&]<class T>(Tag<T>) {
    const int64_t begin = rows.begin, count = rows.size();
    const int64_t whole = head_dim / lanes<A> * lanes<A>;
    for (int64_t lane = 0; lane < count; lane += lanes<A>) {
      const int64_t own = std::min<int64_t>(count - lane, lanes<A>);
      T* row[lanes<A>];
      for (int64_t i = 0; i < own; ++i) row[i] = x.row<T>(begin + lane + i, head);
      for (int64_t e = 0; e < whole; e += lanes<A>) {
        Vec<A> square[lanes<A>];
#pragma GCC unroll 16
        for (int i = 0; i < lanes<A>; ++i) square[i] = load(block + (e + i) * kWidth<A> + lane);
        transpose<A>(square);
        for (int64_t i = 0; i < own; ++i) store_as<T, A>(row[i] + e, factor[lane + i] * square[i]);
      }
      for (int64_t i = 0; i < own; ++i)
        for (int64_t e = whole; e < head_dim; ++e)
          row[i][e] = static_cast<T>(factor[lane + i] * block[e * kWidth<A> + lane + i]);
    }
  });
}

template <class A>
void store_row(const OutputHeads& x, int64_t i, int64_t head, int64_t head_dim, const A* row) {
  dispatch_storage<A>(x.dtype, [&]<class T>(Tag<T>) {
    T* const out = x.row<T>(i, head);
    int64_t e = 0;
    for (; e + lanes<A> <= head_dim; e += lanes<A>) store_as<T, A>(out + e, load(row + e));
    for (; e < head_dim; ++e) out[e] = static_cast<T>(row[e]);
  });
}

template <class A>
void dot_rows(A* out, const Heads& x, const Heads& y, int64_t begin, int64_t end, int64_t num_heads, int64_t head_dim) {
  dispatch_storage<A>(x.dtype, [&]<class T>(Tag<T>) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const left = x.row<T>(i / num_heads, i % num_heads);
      const T* const right = y.row<T>(i / num_heads, i % num_heads);
      A sum = 0;
      for (int64_t e = 0; e < head_dim; ++e) sum += static_cast<A>(left[e]) * static_cast<A>(right[e]);
      out[i] = sum;
    }
  });
}

#define BLT_FOR_ACCUMULATOR(A)                                                                         \
  template void gather_rows(A*, const Heads&, int64_t, const Range&, int64_t, int64_t);                \
  template void gather_chunk(A*, const Heads&, int64_t, const Range&, int64_t, int64_t);               \
  template A* transpose_in(A*, const Heads&, int64_t, const Range&, int64_t, A, int64_t);              \
  template void transpose_out(const OutputHeads&, int64_t, const Range&, int64_t, const A*, const A*); \
  template void store_row(const OutputHeads&, int64_t, int64_t, int64_t, const A*);                    \
  template void dot_rows(A*, const Heads&, const Heads&, int64_t, int64_t, int64_t, int64_t);
BLT_FOR_ACCUMULATOR(float)
BLT_FOR_ACCUMULATOR(double)
#undef BLT_FOR_ACCUMULATOR

}  // namespace blt
