// One call of an op on the current CUDA device: checks what memory safety needs, plans the launch, queues it.
// Nothing waits for the device. No torch: memory comes from the caller.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

#include "../call.h"

namespace esper::cuda {

// Memory of the device that lives until the work queued so far is done.
using Allocate = std::function<void*(int64_t bytes)>;

// Options of a LossCall that may be on the device; they replace its own.
struct LossNumbers {
  Number smoothing, z_loss, grad_scale;
  Number normalizer;  // one below 0: the sum of the weights
};

constexpr int kMostTopk = 16;

// Bad targets are not valid and counted in `counts`; without `counts` they make the loss NaN. ticket: 0, and
// 0 again afterwards; null to have one made. Throws std::runtime_error where CUDA refuses.
Outcome cross_entropy(const LossCall&, const LossNumbers&, unsigned* ticket, const Allocate&, cudaStream_t);

// The gradient from what `cross_entropy` put into `rows`: a row's maximum, the sum of exp(x - maximum) over
// the classes besides the target, then the denominator. grad_output: [] or [N].
Outcome cross_entropy_backward(const LossCall&, const LossNumbers&, const Array& grad_output, cudaStream_t);

// Contiguous tensors, or empty ones.
void grad_stats(const std::vector<Array>& tensors, const Number& inv_scale, const GradStatsOut&,
                const Allocate&, cudaStream_t);

// Why the kernels cannot run on the current device; empty where they can.
std::string refusal();
bool has_kernels();  // for its architecture

// What a launch is planned with.
struct Device {
  int multiprocessors, shared_bytes_of_block, shared_bytes_of_multiprocessor;
  bool clusters;
};
Device current_device();

void check(cudaError_t);

}  // namespace esper::cuda
