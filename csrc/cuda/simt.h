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

// 16 bytes of a row.
using Words = uint4;
template <class T>
constexpr int kPerWords = 16 / sizeof(T);

template <class T>
__device__ void widen_words(const Words& words, float (&values)[kPerWords<T>]) {
  const unsigned in[] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      values[i] = __uint_as_float(in[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      values[2 * i] = __uint_as_float(in[i] << 16);
      values[2 * i + 1] = __uint_as_float(in[i] & 0xffff0000u);
    } else {
      __half2 pair;
      memcpy(&pair, &in[i], 4);
      const float2 both = __half22float2(pair);
      values[2 * i] = both.x;
      values[2 * i + 1] = both.y;
    }
  }
}

template <class T>
__device__ Words narrow_words(const float (&values)[kPerWords<T>]) {
  unsigned out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      out[i] = __float_as_uint(values[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      memcpy(&out[i], &pair, 4);
    } else {
      const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
      memcpy(&out[i], &pair, 4);
    }
  }
  return {out[0], out[1], out[2], out[3]};
}

// In one access, which the compiler does not split. The line is the first to leave the caches.
__device__ inline void store_words(Words* to, const Words& words) { __stcs(to, words); }

// Starts to bring the line at this address into the second-level cache.
__device__ inline void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// One instruction each; results below the normal numbers become 0.
__device__ inline float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float multiply_add_flushed(float a, float b, float c) {
  float result;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
}

// Adds 1 to the count if x > bar or either is NaN, in two instructions; from C++ the compiler makes three.
__device__ inline void count_above(int& count, float x, float bar) {
  asm("{ .reg .pred above; setp.gtu.f32 above, %1, %2; @above add.s32 %0, %0, 1; }"
      : "+r"(count)
      : "f"(x), "f"(bar));
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
//
// They send each other messages of 16 bytes through an inbox in shared memory, which says when all that are
// expected have come. Unlike cluster().sync(), this does not wait for what was written to global memory
// before.
#if __CUDA_ARCH__ >= 900
__device__ inline cooperative_groups::cluster_group cluster() { return cooperative_groups::this_cluster(); }

using Arrivals = uint64_t;  // an mbarrier, in shared memory

__device__ inline unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
// By one thread, before cluster().sync() and all use.
__device__ inline void open_inbox(Arrivals* arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// By one thread, once a round.
__device__ inline void expect_messages(Arrivals* arrivals, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)),
               "r"(bytes)
               : "memory");
}
// to, arrivals: where they are in this block; they are written in block `rank`.
__device__ inline void send_message(void* to, Arrivals* arrivals, int rank, const Words& message) {
  asm volatile(
      "{ .reg .u32 to, arrivals;"
      " mapa.shared::cluster.u32 to, %0, %2;"
      " mapa.shared::cluster.u32 arrivals, %1, %2;"
      " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [arrivals]; }" ::
          "r"(shared_address(to)),
      "r"(shared_address(arrivals)), "r"(rank), "r"(message.x), "r"(message.y), "r"(message.z), "r"(message.w)
      : "memory");
}
// Until all messages of a round are there; parity: that of the round's number.
__device__ inline void wait_for_messages(Arrivals* arrivals, int parity) {
  unsigned there = 0;
  while (!there)
    asm volatile(
        "{ .reg .pred there;"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [%1], %2;"
        " selp.u32 %0, 1, 0, there; }"
        : "=r"(there)
        : "r"(shared_address(arrivals)), "r"(parity)
        : "memory");
}
#else
struct OneBlock {
  __device__ int num_blocks() const { return 1; }
  __device__ int block_rank() const { return 0; }
  __device__ void sync() const {}
};
__device__ inline OneBlock cluster() { return {}; }
using Arrivals = uint64_t;
__device__ inline void open_inbox(Arrivals*) {}
__device__ inline void expect_messages(Arrivals*, int) {}
__device__ inline void send_message(void*, Arrivals*, int, const Words&) {}
__device__ inline void wait_for_messages(Arrivals*, int) {}
#endif

struct Grid {
  int blocks, threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

// Calls f(config) with the grid as CUDA wants it.
template <class Kernel, class F>
cudaError_t with_config(Kernel kernel, const Grid& grid, cudaStream_t stream, const F& f) {
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
  return f(config);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   const Arguments&... arguments) {
  return with_config(kernel, grid, stream, [&](const cudaLaunchConfig_t& config) {
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  });
}

// How many clusters of a grid the device holds at once.
template <class Kernel>
cudaError_t resident_clusters(Kernel kernel, const Grid& grid, int* clusters) {
  return with_config(kernel, grid, nullptr, [&](const cudaLaunchConfig_t& config) {
    return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  });
}

}  // namespace esper::cuda
