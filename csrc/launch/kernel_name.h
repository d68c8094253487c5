// Finds the name of a kernel in C++, by which NVRTC compiles it.
#pragma once

#include <string_view>

// This is not in blt itself, since GCC omits the namespace of a signature.
namespace blt::names {

// Returns "blt::name<types>", from the signature of this function.
template <auto kKernel>
std::string_view kernel_name() {
  const std::string_view signature = __PRETTY_FUNCTION__;
  const size_t begin = signature.find("kKernel = ") + 10;
  return signature.substr(begin, signature.find_first_of(";]", begin) - begin);
}

}  // namespace blt::names
