// Rows of any alignment in 16-byte words, without a bounds check inside.
#pragma once
#include "cuda/simt.h"

namespace esper::cuda {

// n elements of a row: whole words at 16-byte boundaries, and the ragged elements before and after them.
template <class T>
struct Cut {
  T* data;
  int head, words, ragged;

  __device__ Cut(T* data, int64_t n)
      : data(data),
        head(min(n, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T)))),
        words((n - head) / kPerWords<T>),
        ragged(n - static_cast<int64_t>(words) * kPerWords<T>) {}
  __device__ int phase() const { return reinterpret_cast<uintptr_t>(data) % 16; }
  // The first element of a word.
  __device__ int element(int word) const { return head + word * kPerWords<T>; }
  // The k-th ragged element.
  __device__ int ragged_element(int k) const { return k < head ? k : k + words * kPerWords<T>; }
};

// Calls f(at, words, all) for the share of `thread` among n words, with kBatch of them in flight. load(i)
// reads word i. words[j] is number at + j * threads, and is there if `all` or if that is less than n.
template <int kBatch, class Load, class F>
__device__ void for_batches(int n, int thread, int threads, const Load& load, const F& f) {
  Words words[kBatch];
  int at = thread;
  for (; at + (kBatch - 1) * threads < n; at += kBatch * threads) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) words[j] = load(at + j * threads);
    f(at, words, true);
  }
  if (at >= n) return;
#pragma unroll
  for (int j = 0; j < kBatch - 1; ++j)
    if (at + j * threads < n) words[j] = load(at + j * threads);
  f(at, words, false);
}

// Where elements lie in `memory`, at a 16-byte boundary, as far behind such a boundary as at `from`.
template <class T>
__device__ std::remove_const_t<T>* in_phase(unsigned char* memory, T* from) {
  return reinterpret_cast<std::remove_const_t<T>*>(memory + reinterpret_cast<uintptr_t>(from) % 16);
}

// Copies n elements between global and shared memory, by the whole block. Both begin equally far behind a
// 16-byte boundary, so that whole words are copied: up to kMost by a thread, all in flight together.
template <int kMost, class T>
__device__ void copy_words(const T* from, T* to, int n) {
  const Cut<const T> cut(from, n);
  const int thread = threadIdx.x, threads = blockDim.x;
  const Words* const source = reinterpret_cast<const Words*>(from + cut.head);
  Words* const target = reinterpret_cast<Words*>(to + cut.head);
  Words words[kMost];
#pragma unroll
  for (int j = 0; j < kMost; ++j)
    if (thread + j * threads < cut.words) words[j] = source[thread + j * threads];
  if (thread < cut.ragged) to[cut.ragged_element(thread)] = from[cut.ragged_element(thread)];
#pragma unroll
  for (int j = 0; j < kMost; ++j)
    if (thread + j * threads < cut.words) target[thread + j * threads] = words[j];
}

}  // namespace esper::cuda
