// What the kernels are made of: sums over warps and blocks in a fixed order, and rows read 16 bytes at a
// time.
#pragma once
#include "../call.h"
#include "cuda/simt.h"

namespace esper::cuda {

constexpr int kMostWarps = 32;

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The same result in every lane of each group of `lanes` neighbours.
template <class T, class F>
__device__ T reduce_lanes(T x, int lanes, F f) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x = f(x, shuffle_xor(x, distance));
  return x;
}

// The same result in every thread. All threads of the block call it; scratch: kMostWarps of T, free on
// return.
template <class T, class F>
__device__ T reduce_block(T x, T identity, T* scratch, F f) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = reduce_lanes(x, kWarp, f);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return reduce_lanes(lane < warps ? scratch[lane] : identity, kWarp, f);
}

// Whether this block is the last of `blocks` to arrive here, so that it sees what the others wrote before.
// The ticket is 0 before the first block and after the last. flag: shared, free after the next barrier.
__device__ inline bool is_last(unsigned* ticket, unsigned blocks, unsigned* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *flag = atomicAdd(ticket, 1u) == blocks - 1;
    if (*flag) *ticket = 0;
  }
  __syncthreads();
  __threadfence();
  return *flag;
}

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// n contiguous elements anywhere in memory, cut into vectors at 16 byte boundaries: the first and the last
// vector may be partly outside.
template <class T>
struct Span {
  static constexpr int kSize = Vector<T>::kSize;
  T* data;
  int64_t n;

  __device__ int before() const { return reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T); }
  __device__ int64_t vectors() const { return (before() + n + kSize - 1) / kSize; }
  // The element that vector v begins with; it may be outside.
  __device__ int64_t first(int64_t v) const { return v * kSize - before(); }
  __device__ bool whole(int64_t begin) const { return begin >= 0 && begin + kSize <= n; }

  // From element `begin` on, which is that of a vector; -inf where there is none.
  __device__ auto load(int64_t begin) const {
    using Value = std::remove_const_t<T>;
    using Whole = Vector<Value>;
    if (whole(begin)) return *reinterpret_cast<const Whole*>(data + begin);
    Whole result;
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      result.x[j] = begin + j >= 0 && begin + j < n ? data[begin + j] : narrow<Value>(-INFINITY);
    return result;
  }
  __device__ void store(int64_t begin, const Vector<T>& values) const {
    if (whole(begin) && reinterpret_cast<uintptr_t>(data + begin) % 16 == 0) {
      *reinterpret_cast<Vector<T>*>(data + begin) = values;
      return;
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (begin + j >= 0 && begin + j < n) data[begin + j] = values.x[j];
  }
};

// Calls f(v, vector) for this thread's share of the vectors of a span from `begin` to `end`, with several
// loads in flight. Elements outside of the span are -inf.
template <class T, class F>
__device__ void for_vectors(const Span<const T>& span, int64_t begin, int64_t end, bool reverse, const F& f) {
  constexpr int kInFlight = 4;
  Vector<T> x[kInFlight];
  const auto place = [&](int64_t v) { return reverse ? begin + end - 1 - v : v; };
  for (int64_t at = begin + threadIdx.x; at < end; at += kInFlight * blockDim.x) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t v = at + j * blockDim.x;
      if (v < end) x[j] = span.load(span.first(place(v)));
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t v = at + j * blockDim.x;
      if (v < end) f(place(v), x[j]);
    }
  }
}

}  // namespace esper::cuda
