// Boxes a kernel for torch, and notes the types that it takes and returns, which the loader compares with the schema of
// its operator: torch itself compares nothing, so that a module of an older build would read arguments of other types.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace blt {

// Has the name of a type in schemas; of a tuple, the names of its types.
template <class T>
struct SchemaType;
template <>
struct SchemaType<torch::stable::Tensor> {
  static std::string name() { return "Tensor"; }
};
template <>
struct SchemaType<int64_t> {
  static std::string name() { return "int"; }
};
template <>
struct SchemaType<double> {
  static std::string name() { return "float"; }
};
template <>
struct SchemaType<bool> {
  static std::string name() { return "bool"; }
};
template <>
struct SchemaType<std::string> {
  static std::string name() { return "str"; }
};
template <class T>
struct SchemaType<std::optional<T>> {
  static std::string name() { return SchemaType<T>::name() + "?"; }
};
template <class T>
struct SchemaType<std::vector<T>> {
  static std::string name() { return SchemaType<T>::name() + "[]"; }
};
template <>
struct SchemaType<void> {
  static std::string name() { return ""; }
};
template <class... T>
struct SchemaType<std::tuple<T...>> {
  static std::string name() {
    std::string names;
    ((names += SchemaType<T>::name() + ' '), ...);
    if (!names.empty()) names.pop_back();
    return names;
  }
};

template <class Result, class... Arguments>
std::string signature_of(Result (*)(Arguments...)) {
  using Taken = std::tuple<std::remove_cvref_t<Arguments>...>;
  return SchemaType<Taken>::name() + " -> " + SchemaType<Result>::name();
}

// Has a line "name: types -> types" for each kernel of this module.
inline std::string& signatures() {
  static std::string all;
  return all;
}

template <class Kernel>
void note_signature(const char* name, Kernel kernel) {
  signatures() += std::string(name) + ": " + signature_of(kernel) + "\n";
}

}  // namespace blt

#define BLT_KERNELS_BOX(kernel) (::blt::note_signature(#kernel, kernel), TORCH_BOX(kernel))
