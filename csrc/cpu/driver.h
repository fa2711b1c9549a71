// A checked call of an op on the CPU: splits the work among threads and adds the parts up in a fixed order.
// Plain memory, no torch.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"

namespace esper {

// Calls f(begin, end) for parts of [0, n), in parallel.
using Range = std::function<void(int64_t, int64_t)>;
using ParallelFor = void (*)(int64_t n, const Range& f);

// What the work is divided by. No bit of a result depends on it.
struct Machine {
  ParallelFor parallel_for;
  int64_t cache_bytes;  // of the second-level cache of a core
};

// Loss and counts, and the gradient if `out` is given. Throws std::out_of_range for a bad target, before
// anything is written.
void cross_entropy(const LossCall&, const Kernels&, const Machine&);

// The gradient, from what `cross_entropy` saved. grad_output: [], or one number per row.
void cross_entropy_backward(const LossCall&, const Array& grad_output, const Kernels&, const Machine&);

// What a shard of the classes contributes to the loss of each row; nothing for ignored rows. Throws
// std::out_of_range for a bad target, before anything is written.
void class_sums(const ClassSumsCall&, const Kernels&, const Machine&);

// Log-probabilities and entropies, or the gradient. Throws std::out_of_range for a bad target, before
// anything is written.
void token_logprobs(const LogprobCall&, const Kernels&, const Machine&);

// Tensors are contiguous.
void grad_stats(const std::vector<Array>& tensors, double inv_scale, const GradStatsOut&, const Kernels&,
                const Machine&);

// In the order of INSTRUCTION_SETS in esper_kernels/config.py.
constexpr const char* kInstructionSets[] = {"auto", "avx512bf16", "avx512", "avx2", "baseline"};
constexpr int64_t kNumInstructionSets = 5;
// Null if this machine or build lacks it.
const Kernels* kernels_at(int64_t instruction_set);

}  // namespace esper
