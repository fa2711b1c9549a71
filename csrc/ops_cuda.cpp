// The CUDA ops, registered through libtorch's stable ABI under the schemas that the library of CPU ops
// defines. Everything is queued on torch's current stream; nothing waits for the device.
#include <torch/csrc/stable/accelerator.h>

#include <cstdio>
#include <functional>
#include <vector>

#include "cuda/driver.h"
#include "ops.h"

namespace esper {
namespace {

using torch::stable::accelerator::DeviceGuard;

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  // Not STABLE_TORCH_ERROR_CODE_CHECK: torch 2.10 to 2.12 do not have it.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "torch does not tell the current stream of CUDA device ", x.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

// Memory from torch's allocator, held until the launches are queued; after that the order of the stream
// protects it.
struct Workspace {
  const Tensor& beside;
  std::vector<Tensor> tensors{};
  void* operator()(int64_t bytes) {
    tensors.push_back(torch::stable::new_empty(beside, {bytes}, torch::headeronly::ScalarType::Byte));
    return tensors.back().data_ptr();
  }
};

struct Cuda {
  static constexpr Access kAccess = Access::kRows;
  const DeviceGuard guard;
  const cudaStream_t stream;
  Workspace workspace;

  Cuda(const Tensor& beside, int64_t)
      : guard(beside.get_device_index()), stream(stream_of(beside)), workspace{beside} {}
  static void check(const LossCall& call) { cuda::check(call); }
  void cross_entropy(const LossCall& call) { cuda::cross_entropy(call, std::ref(workspace), stream); }
  void cross_entropy_backward(const LossCall& call, const Array& grad_output) {
    cuda::cross_entropy_backward(call, grad_output, stream);
  }
  void token_logprobs(const LogprobCall& call) { cuda::token_logprobs(call, stream); }
  void grad_stats(const std::vector<Array>& tensors, const Number& inv_scale, const GradStatsOut& out) {
    cuda::grad_stats(tensors, inv_scale, out, std::ref(workspace), stream);
  }
};

}  // namespace
}  // namespace esper

// Why the kernels cannot run on the current device, cut to `size` bytes; empty where they can.
extern "C" __attribute__((visibility("default"))) void esper_cuda_refusal(char* reason, int64_t size) {
  std::snprintf(reason, size, "%s", esper::cuda::refusal().c_str());
}

STABLE_TORCH_LIBRARY_IMPL(esper, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&esper::cross_entropy_op<esper::Cuda>));
  m.impl("cross_entropy_backward", TORCH_BOX(&esper::cross_entropy_backward_op<esper::Cuda>));
  m.impl("token_logprobs", TORCH_BOX(&esper::token_logprobs_op<esper::Cuda>));
  m.impl("token_logprobs_backward", TORCH_BOX(&esper::token_logprobs_backward_op<esper::Cuda>));
  m.impl("grad_stats", TORCH_BOX(&esper::grad_stats_op<esper::Cuda>));
}
