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

}  // namespace esper::cuda
