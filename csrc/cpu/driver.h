// One call of an op on the CPU: checks what memory safety needs, splits the work, adds the parts up in a
// fixed order. Plain memory, no torch.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"

namespace esper {

// Calls f(begin, end) for parts of [0, n), in parallel.
using Range = std::function<void(int64_t, int64_t)>;
using ParallelFor = void (*)(int64_t n, const Range& f);

// Loss and counts, and where `out` is given the gradient.
Outcome cross_entropy(const LossCall&, const Kernels&, ParallelFor);

// The gradient from what `cross_entropy` put into `rows`: maxima, sums, the denominator. grad_output: [] or
// [N].
Outcome cross_entropy_backward(const LossCall&, const Array& grad_output, const Kernels&, ParallelFor);

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
