// The name of a kernel, for those who launch it by name.
#pragma once

#include <string_view>

// Not in blt itself: GCC leaves out the namespace that a signature is in.
namespace blt::names {

// "blt::name<types>" as C++ spells it, from the signature of this function.
template <auto kKernel>
std::string_view kernel_name() {
  const std::string_view signature = __PRETTY_FUNCTION__;
  const size_t begin = signature.find("kKernel = ") + 10;
  return signature.substr(begin, signature.find_first_of(";]", begin) - begin);
}

}  // namespace blt::names
