// One call of an op on the CPU: checks what memory safety needs, splits the work, adds the parts up in a
// fixed order. Plain memory, no torch.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"

namespace esper {

// A tensor: where it lies, sizes and strides in elements.
struct Array {
  void* data;
  int64_t dims;
  const int64_t *sizes, *strides;
  Dtype dtype;

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    bool follows = true;
    for (int64_t d = dims - 1; d >= 0; --d) {
      follows = follows && (sizes[d] == 1 || strides[d] == expected);
      expected *= sizes[d];
    }
    return follows || expected == 0;
  }
};

enum Reduction : int64_t { kMean, kSum, kNone };  // in the order of esper_kernels/cross_entropy/cpp.py

// Calls f(begin, end) for parts of [0, n), in parallel.
using Range = std::function<void(int64_t, int64_t)>;
using ParallelFor = void (*)(int64_t n, const Range& f);

// Why a call was not served; nothing was written then.
enum class Outcome { kDone, kUnsupported, kBadTargets };

// Loss and counts, and where `out` is given the gradient. Pointers are null where not wanted.
struct LossCall {
  Array logits, targets;  // [..., V] with class stride 1; contiguous
  const float* weight = nullptr;
  int64_t ignore_index = -100;
  double smoothing = 0, z_loss = 0, softcap = 0;
  double normalizer = -1, grad_scale = 1;  // a negative normalizer: the sum of the weights
  int64_t reduction = kMean;
  double* sums = nullptr;  // a Meter's, in the layout of esper_kernels/meter.py
  int64_t* counts = nullptr;
  std::vector<int64_t> topk = {1};
  float *loss = nullptr, *rows = nullptr;  // [] or for kNone [N]; [2 N + 1] to keep for the gradient
  const Array* out = nullptr;              // may be the logits
};
Outcome cross_entropy(const LossCall&, const Kernels&, ParallelFor);

// The gradient from what `cross_entropy` put into `rows`: maxima, sums, the denominator. grad_output: [] or
// [N].
Outcome cross_entropy_backward(const LossCall&, const Array& grad_output, const Kernels&, ParallelFor);

// Where the statistics of T tensors go, as esper_kernels.grad_stats.GradStats.
struct GradStatsOut {
  double *norms, *max_abs;
  int64_t *zeros, *nans, *infs;
  double* total_norm;
  float* found_inf;
};
// Contiguous tensors, or empty ones.
void grad_stats(const std::vector<Array>& tensors, double inv_scale, const GradStatsOut&, const Kernels&,
                ParallelFor);

// The instruction sets by the index of esper_kernels/config.py; null where it is unknown or cannot run here.
const Kernels* kernels_at(int64_t instruction_set);

// What the library of ops offers to bindings.cpp: the calls above with torch's threads.
struct Api {
  const Kernels* (*kernels_at)(int64_t);
  Outcome (*cross_entropy)(const LossCall&, const Kernels&);
  Outcome (*cross_entropy_backward)(const LossCall&, const Array& grad_output, const Kernels&);
  void (*grad_stats)(const std::vector<Array>&, double inv_scale, const GradStatsOut&, const Kernels&);
};

}  // namespace esper
