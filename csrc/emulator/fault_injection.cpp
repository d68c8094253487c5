// Tests of the emulator run these kernels, which have one fault or none: blt_emulated::inject_fault(name, x) -> out. x
// and out are float [n]; blocks have 64 threads.

#include <algorithm>
#include <string>

#include "../cuda/chunk_counts.cuh"
#include "../launch/launch.h"

namespace blt {
namespace {

constexpr int kThreads = 64;

__device__ i64 my_index() { return static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; }

// This kernel has no fault. It sums over a block through shared memory, which every thread writes.
__global__ void block_sum_kernel(const float* x, i64 n, float* out) {
  __shared__ float partial[kThreads];
  const i64 i = my_index();
  partial[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (i < n) out[i] = partial[0];
}

// This kernel has no fault. It sums over half warps, which have masks of their own. Warps beyond the end return early.
__global__ void half_warp_kernel(const float* x, i64 n, float* out) {
  const i64 i = my_index();
  if (i / kWarp * kWarp >= n) return;
  float sum = i < n ? x[i] : 0;
  const u32 mask = threadIdx.x % kWarp < 16 ? 0xffffu : 0xffff0000u;
  for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(mask, sum, distance);
  if (i < n) out[i] = sum;
}

// This kernel has no fault. It uses dynamic shared memory, a vote and atomics on integers.
struct Votes {
  int positive, arrivals;
};
__global__ void counts_kernel(const float* x, i64 n, float* out) {
  Votes& votes = shared_memory<Votes>();
  if (threadIdx.x == 0) votes = {0, 0};
  __syncthreads();
  const i64 i = my_index();
  const u32 positive = __ballot_sync(kAllLanes, i < n && x[i] > 0);
  if (threadIdx.x % kWarp == 0) atomicAdd(&votes.positive, __popc(positive));
  atomicAdd(&votes.arrivals, 1);
  __syncthreads();
  if (i < n) out[i] = static_cast<float>(votes.positive + 1000 * votes.arrivals);
}

// This kernel has no fault. Its last thread does all the work: one load per number of x, and a store.
__global__ void one_thread_kernel(const float* x, i64 n, float* out) {
  const i64 i = my_index();
  if (i >= n) return;
  float sum = 0;
  for (i64 j = 0; i == n - 1 && j < n; ++j) sum += x[j];
  out[i] = sum;
}

// This kernel has no fault. It loads and stores 16 bytes.
__global__ void vectors_kernel(const float* x, i64 n, float* out) {
  const i64 i = 4 * my_index();
  if (i + 4 <= n) store(out + i, load<4>(x + i));
}

// This kernel has no fault. Asynchronous copies, each in a group of its own, move numbers through shared memory.
__global__ void copies_kernel(const float* x, i64 n, float* out) {
  __shared__ float values[2][kThreads];
  const i64 i = my_index();
  if (i >= n) return;
  for (int group = 0; group < 2; ++group) {
    copy_async<1>(&values[group][threadIdx.x], x + i);
    commit_copies();
  }
  wait_for_copies<1>();
  const float first = values[0][threadIdx.x];
  wait_for_copies<0>();
  out[i] = first + values[1][threadIdx.x];
}

// A thread reads its neighbour's value without a barrier, which is a race.
__global__ void race_kernel(const float* x, i64 n, float* out) {
  __shared__ float values[kThreads];
  const i64 i = my_index();
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = i < n ? x[i] : 0;
  const float neighbour = values[(threadIdx.x + 1) % kThreads];
  if (i < n) out[i] = neighbour;
}

__global__ void divergent_barrier_kernel(const float*, i64, float*) {
  if (threadIdx.x != 7) __syncthreads();
}

__global__ void two_barriers_kernel(const float*, i64, float*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void exited_lane_kernel(const float* x, i64, float* out) {
  if (threadIdx.x == 3) return;
  out[0] = warp_sum(x[0]);
}

__global__ void missing_lane_kernel(const float* x, i64, float* out) {
  if (threadIdx.x != 3) out[0] = __shfl_xor_sync(kAllLanes, x[0], 1);
  __syncthreads();
}

__global__ void outside_mask_kernel(const float* x, i64, float* out) {
  if (threadIdx.x < 16) out[0] = __shfl_sync(0xffffu, x[0], 20);
}

__global__ void not_in_mask_kernel(const float* x, i64, float* out) {
  if (threadIdx.x < 16) out[0] = __shfl_sync(0xffu, x[0], 0);
}

__global__ void different_collectives_kernel(const float* x, i64, float* out) {
  if (threadIdx.x % 2 == 0)
    out[0] = __shfl_sync(kAllLanes, x[0], 0);
  else
    __syncwarp();
}

__global__ void unwritten_static_kernel(const float*, i64, float* out) {
  __shared__ float values[kThreads];
  if (threadIdx.x > 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[0] = values[threadIdx.x];
}

__global__ void unwritten_dynamic_kernel(const float*, i64, float* out) {
  Votes& votes = shared_memory<Votes>();
  if (threadIdx.x == 0) votes.positive = 1;
  __syncthreads();
  out[0] = static_cast<float>(votes.arrivals);
}

// Only another block has written the value.
__global__ void other_blocks_shared_kernel(const float*, i64, float* out) {
  Votes& votes = shared_memory<Votes>();
  if (blockIdx.x == 0) votes.positive = 1;
  __syncthreads();
  out[0] = static_cast<float>(votes.positive);
}

__global__ void too_little_shared_kernel(const float*, i64, float* out) {
  auto& large = shared_memory<float[1024]>();
  large[threadIdx.x] = 0;
  out[0] = large[threadIdx.x];
}

// The kernel waits only for the first of two groups of copies.
__global__ void early_copy_kernel(const float* x, i64, float* out) {
  __shared__ float values[2][kThreads];
  for (int group = 0; group < 2; ++group) {
    copy_async<1>(&values[group][threadIdx.x], x);
    commit_copies();
  }
  wait_for_copies<1>();
  out[0] = values[0][threadIdx.x] + values[1][threadIdx.x];
}

__global__ void read_behind_kernel(const float* x, i64 n, float* out) { out[0] = x[n]; }
__global__ void read_before_kernel(const float* x, i64, float* out) { out[0] = x[-1]; }
__global__ void write_behind_kernel(const float*, i64 n, float* out) { out[n] = 1; }
__global__ void write_input_kernel(const float* x, i64, float*) { const_cast<float*>(x)[0] = 1; }
__global__ void null_kernel(const float*, i64, float* out) {
  const float* volatile nothing = nullptr;
  out[0] = nothing[0];
}
__global__ void misaligned_kernel(const float* x, i64, float* out) { store(out, load<4>(x + 1)); }

// The first block waits for another one, which does not run concurrently in the emulator.
__global__ void waiting_block_kernel(const float*, i64, float* out) {
  const Published other = {};
  if (threadIdx.x == 0) out[0] = static_cast<float>(await(other).interior);
}

// Launches <name>_kernel if it is one of these.
template <auto... kKernels>
void launch_named(const Device& device, const LaunchConfig& config, const std::string& name, const Tensor& x,
                  Tensor& out) {
  const std::string ending = "::" + name + "_kernel";
  const float* const from = device.read<float>(x);
  float* const to = device.write<float>(out);
  ((names::kernel_name<kKernels>().ends_with(ending) ? device.launch<kKernels>(config, from, x.size(0), to) : void()),
   ...);
}

Tensor inject_fault(std::string name, const Tensor& x) {
  const Device device(x);
  Tensor out = device_output(x, {x.size(0)});
  const LaunchConfig config = {.grid = {std::max<int64_t>(ceil_div<int64_t>(x.size(0), kThreads), 2)},
                               .block = kThreads,
                               .smem_bytes = sizeof(Votes)};
  launch_named<block_sum_kernel, half_warp_kernel, counts_kernel, one_thread_kernel, vectors_kernel, copies_kernel,
               race_kernel, divergent_barrier_kernel, two_barriers_kernel, exited_lane_kernel, missing_lane_kernel,
               outside_mask_kernel, not_in_mask_kernel, different_collectives_kernel, unwritten_static_kernel,
               unwritten_dynamic_kernel, other_blocks_shared_kernel, too_little_shared_kernel, early_copy_kernel,
               read_behind_kernel, read_before_kernel, write_behind_kernel, write_input_kernel, null_kernel,
               misaligned_kernel, waiting_block_kernel>(device, config, name, x, out);
  if (name == "zero") device.zero(out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_emulated, m) { m.def("inject_fault(str name, Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(blt_emulated, CPU, m) { m.impl("inject_fault", TORCH_BOX(&inject_fault)); }

}  // namespace blt
