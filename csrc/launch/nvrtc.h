// Launches kernels that NVRTC compiled: the third way of launch.h, in _C_jit.
//
// No header and no library of CUDA's runtime or driver is needed to build this, nor a GPU to load it: the driver is opened
// when a kernel is first launched. blt_kernels/_nvrtc.py compiles the kernel that is asked for by name.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernel_name.h"

namespace blt::jit {

// Every kernel that some launcher may launch has an entry.
struct Entry {
  std::string name;
  std::vector<void*> functions;  // CUfunction by device, null until it is compiled
};
Entry* add_entry(std::string_view name);

template <auto kKernel>
struct Known {
  static inline Entry* const entry = add_entry(names::kernel_name<kKernel>());
};

void* current_stream(int32_t device);
void zero(int32_t device, void* data, int64_t bytes, void* stream);
void launch(Entry* entry, int32_t device, int64_t blocks, int64_t rows, int threads, int64_t shared, void** arguments,
            void* stream);

}  // namespace blt::jit
