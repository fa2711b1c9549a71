// In place of csrc/cuda/simt.h: the kernels as ordinary C++ on the host. The blocks of a launch run in turn,
// a cluster's together; their threads are fibers, which run from one barrier or shuffle to the next.
#pragma once
#include <cuda_runtime_api.h>
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __device__
#define __global__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
inline void __threadfence() {}
using std::max;
using std::min;
inline float __expf(float x) { return expf(x); }
template <class T>
T __ldcg(const T* x) {
  return *x;
}
template <class T>
T atomicAdd(T* to, T x) {
  const T before = *to;
  *to += x;
  return before;
}

namespace esper::cuda {

constexpr int kWarp = 32;

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline float widen(float x) { return x; }
inline float widen(Float16 x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
template <class T>
T narrow(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return static_cast<T>(x);
  }
}

struct alignas(16) Words {
  uint32_t x, y, z, w;
};
template <class T>
constexpr int kPerWords = 16 / sizeof(T);

template <class T>
void widen_words(const Words& words, float (&values)[kPerWords<T>]) {
  T elements[kPerWords<T>];
  std::memcpy(elements, &words, 16);
  for (int i = 0; i < kPerWords<T>; ++i) values[i] = widen(elements[i]);
}

template <class T>
Words narrow_words(const float (&values)[kPerWords<T>]) {
  T elements[kPerWords<T>];
  for (int i = 0; i < kPerWords<T>; ++i) elements[i] = narrow<T>(values[i]);
  Words words;
  std::memcpy(&words, elements, 16);
  return words;
}

inline void store_words(Words* to, const Words& words) { *to = words; }
inline void prefetch(const void*) {}
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
inline float exp2_flushed(float x) { return flushed(exp2f(flushed(x))); }
inline float multiply_add_flushed(float a, float b, float c) {
  return flushed(fmaf(flushed(a), flushed(b), flushed(c)));
}
inline void count_above(int& count, float x, float bar) { count += !(x <= bar); }

// The 8 bytes that the lane `distance` away holds out.
uint64_t exchange(uint64_t mine, int distance);
template <class T>
T shuffle_xor(T x, int distance) {
  uint64_t words[(sizeof(T) + 7) / 8] = {};
  std::memcpy(words, &x, sizeof(T));
  for (uint64_t& word : words) word = exchange(word, distance);
  std::memcpy(&x, words, sizeof(T));
  return x;
}

unsigned char* shared_memory();

struct Cluster {
  int num_blocks() const;
  int block_rank() const;
  void sync() const;
};
inline Cluster cluster() { return {}; }

struct Arrivals {
  int bytes, expecting, round;  // still to come; whether the round's number of bytes is yet unknown
};
void open_inbox(Arrivals*);
void expect_messages(Arrivals*, int bytes);
void send_message(void* to, Arrivals*, int rank, const Words& message);
void wait_for_messages(Arrivals*, int parity);

struct Grid {
  int blocks, threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

int resident_clusters_of(const Grid&);
template <class Kernel>
cudaError_t resident_clusters(Kernel, const Grid& grid, int* clusters) {
  *clusters = resident_clusters_of(grid);
  return cudaSuccess;
}

cudaError_t run_grid(const Grid&, const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t,
                   const Arguments&... arguments) {
  return run_grid(grid, [&] { kernel(Parameters(arguments)...); });
}

}  // namespace esper::cuda
