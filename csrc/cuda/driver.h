// A checked call of an op on the current CUDA device: plans the launch and queues it. Nothing waits for the
// device. No torch: memory comes from the caller.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

#include "../call.h"

namespace esper::cuda {

// Device memory that lives until the work queued so far is done.
using Allocate = std::function<void*(int64_t bytes)>;

constexpr int kMostTopk = 16;

// What the kernels limit besides esper::check; throws std::invalid_argument.
void check(const LossCall&);

// Bad targets are not valid, and are counted in `counts`; without `counts` they make the loss NaN. Without a
// ticket, one is made. Throws std::runtime_error if CUDA refuses.
void cross_entropy(const LossCall&, const Allocate&, cudaStream_t);

// The gradient, from what `cross_entropy` saved. grad_output: [], or one number per row.
void cross_entropy_backward(const LossCall&, const Array& grad_output, cudaStream_t);

// Log-probabilities and entropies, or the gradient. Rows with bad targets give NaN, and a gradient of 0.
void token_logprobs(const LogprobCall&, cudaStream_t);

// Tensors are dense, see Array. With GradStatsOut::table, only the first call and those after a tensor has
// moved fill it.
void grad_stats(const std::vector<Array>& tensors, const Number& inv_scale, const GradStatsOut&,
                const Allocate&, cudaStream_t);

// Why the kernels cannot run on the current device; empty if they can.
std::string refusal();
bool has_kernels();  // for its architecture

// What a launch plan depends on.
struct Device {
  int multiprocessors, shared_bytes_of_block, shared_bytes_of_multiprocessor;
  bool clusters;
};
Device current_device();

bool is_capturing(cudaStream_t);  // into a graph

void check(cudaError_t);

}  // namespace esper::cuda
