// Calls the CUDA driver, for launchers whose kernels NVRTC compiles.
//
// Nothing of CUDA is needed to build this, and no GPU to load it: libcuda.so.1 is opened at the first launch.
// blt_kernels/_nvrtc.py compiles a kernel by its name.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "config.h"
#include "kernel_name.h"

namespace blt::driver {

// Some launcher can launch this kernel.
struct Kernel {
  std::string name;
  std::vector<void*> functions;  // has a CUfunction per device, null until it is compiled
};
Kernel* add_kernel(std::string_view name);

template <auto kKernel>
inline Kernel* const kernel_of = add_kernel(names::kernel_name<kKernel>());

void* current_stream(int32_t device);
void zero(int32_t device, void* data, int64_t bytes, void* stream);
void launch(Kernel* kernel, int32_t device, const LaunchConfig& config, void** parameters, void* stream);

}  // namespace blt::driver
