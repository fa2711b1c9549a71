// The only place that knows the CUDA toolchain: launches, shared memory, clusters, conversions. The tests put
// another header in its place, which runs the same kernels on the host (tests/cuda_shim).
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace esper::cuda {

constexpr int kWarp = 32;

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(Float16 x) { return __half2float(x); }
template <class T>
__device__ T narrow(float x) {
  if constexpr (sizeof(T) == 4) return x;
  if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, Float16>) return __float2half_rn(x);
}

// x of the lane whose number differs by the bits of `distance`; all lanes of the warp call it.
template <class T>
__device__ T shuffle_xor(T x, int distance) {
  static_assert(sizeof(T) % 4 == 0);
  int words[sizeof(T) / 4];
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (int& word : words) word = __shfl_xor_sync(0xffffffffu, word, distance);
  memcpy(&x, words, sizeof(T));
  return x;
}

// The dynamic shared memory of this block; kernels have no other.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// The blocks that see each other's shared memory: one if the launch or the chip has no clusters.
#if __CUDA_ARCH__ >= 900
__device__ inline cooperative_groups::cluster_group cluster() { return cooperative_groups::this_cluster(); }
#else
struct OneBlock {
  __device__ int num_blocks() const { return 1; }
  __device__ int block_rank() const { return 0; }
  __device__ void sync() const {}
  template <class T>
  __device__ T* map_shared_rank(T* mine, int) const {
    return mine;
  }
};
__device__ inline OneBlock cluster() { return {}; }
#endif

struct Grid {
  int blocks, threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (grid.shared_bytes > 48 * 1024) {  // more than chips give by default
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace esper::cuda
