// Dispatches from a runtime dtype to a C++ type:
//   dispatch_float(dtype, "logits", [&]<class T>(Tag<T>) { ... })
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

namespace blt {

template <class T>
struct Tag {};

// The accumulator is fp32, and fp64 for fp64.
template <class T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Bf16 and Fp16 are the types for bf16 and fp16.
template <class Bf16 = torch::headeronly::BFloat16, class Fp16 = torch::headeronly::Half, class F>
decltype(auto) dispatch_float(torch::headeronly::ScalarType dtype, const char* name, F&& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return f(Tag<float>{});
    case ScalarType::BFloat16: return f(Tag<Bf16>{});
    case ScalarType::Half: return f(Tag<Fp16>{});
    case ScalarType::Double: return f(Tag<double>{});
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float32, bfloat16, float16 or float64, got ",
                      torch::headeronly::toString(dtype));
  }
}

// Calls f with the accumulator of a dtype in place of the dtype itself.
template <class F>
decltype(auto) dispatch_accumulator(torch::headeronly::ScalarType dtype, const char* name, F&& f) {
  return dispatch_float(dtype, name, [&]<class T>(Tag<T>) { return f(Tag<accumulator_t<T>>{}); });
}

// Calls f with the dtype of storage that is accumulated in A; the inverse of dispatch_accumulator.
template <class A, class F>
void dispatch_storage(torch::headeronly::ScalarType dtype, F&& f) {
  dispatch_float(dtype, "q", [&]<class T>(Tag<T> tag) {
    if constexpr (std::is_same_v<accumulator_t<T>, A>) f(tag);
  });
}

// Long is the type for int64.
template <class Long = int64_t, class F>
decltype(auto) dispatch_int(torch::headeronly::ScalarType dtype, const char* name, F&& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Int: return f(Tag<int32_t>{});
    case ScalarType::Long: return f(Tag<Long>{});
    default: STD_TORCH_CHECK(false, name, ": expected dtype int32 or int64, got ", torch::headeronly::toString(dtype));
  }
}

}  // namespace blt
