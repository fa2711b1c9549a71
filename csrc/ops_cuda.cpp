// The CUDA ops, registered through libtorch's stable ABI under the schemas that the library of CPU ops
// defines. Everything is queued on torch's current stream; nothing waits for the device.
#include <torch/csrc/stable/accelerator.h>

#include <cstdio>
#include <functional>
#include <vector>

#include "cuda/driver.h"
#include "tensors.h"

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

// A number given as a tensor: beside `x` it is read by the kernel, on the CPU here.
Number number_of(double value, const MaybeTensor& tensor, const Tensor& x) {
  return esper::number_of(value, tensor, tensor && tensor->is_cpu() == x.is_cpu());
}

// Memory from torch's allocator, kept until the launches are queued: it is then in the order of the stream.
struct Workspace {
  const Tensor& beside;
  std::vector<Tensor> tensors{};
  void* operator()(int64_t bytes) {
    tensors.push_back(torch::stable::new_empty(beside, {bytes}, torch::headeronly::ScalarType::Byte));
    return tensors.back().data_ptr();
  }
};

void cross_entropy(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index, double smoothing,
                   double z_loss, double softcap, double normalizer, double grad_scale,
                   std::vector<MaybeTensor> numbers, int64_t reduction, int64_t, MaybeTensor sums,
                   MaybeTensor counts, std::vector<int64_t> topk, MaybeTensor loss, MaybeTensor rows,
                   MaybeTensor out, MaybeTensor ticket) {
  const DeviceGuard guard(logits.get_device_index());
  STD_TORCH_CHECK(topk.size() <= cuda::kMostTopk, "on CUDA a Meter counts correct@k for up to ",
                  cuda::kMostTopk, " k, got ", topk.size());
  const Array written = out ? array_of(*out) : Array{};
  const cuda::LossNumbers given{
      number_of(smoothing, at(numbers, 0), logits), number_of(z_loss, at(numbers, 1), logits),
      number_of(grad_scale, at(numbers, 3), logits), number_of(normalizer, at(numbers, 2), logits)};
  Workspace workspace{logits};
  check(cuda::cross_entropy(
      {array_of(logits), array_of(targets), data<float>(weight), ignore_index, smoothing, z_loss, softcap,
       normalizer, grad_scale, reduction, data<double>(sums), data<int64_t>(counts), topk, data<float>(loss),
       data<float>(rows), out ? &written : nullptr},
      given, data<unsigned>(ticket), std::ref(workspace), stream_of(logits)));
}

void cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor targets, MaybeTensor weight,
                            int64_t ignore_index, double smoothing, double z_loss, double softcap,
                            std::vector<MaybeTensor> numbers, int64_t, Tensor rows, Tensor out) {
  const DeviceGuard guard(logits.get_device_index());
  const Array written = array_of(out);
  LossCall call{array_of(logits), array_of(targets), data<float>(weight), ignore_index, smoothing, z_loss,
                softcap};
  call.rows = memory<float>(rows);
  call.out = &written;
  const cuda::LossNumbers given{
      number_of(smoothing, at(numbers, 0), logits), number_of(z_loss, at(numbers, 1), logits), {1}, {}};
  check(cuda::cross_entropy_backward(call, given, array_of(grad_output), stream_of(logits)));
}

void grad_stats(std::vector<Tensor> tensors, MaybeTensor inv_scale, int64_t, Tensor norms, Tensor max_abs,
                Tensor zeros, Tensor nans, Tensor infs, Tensor total_norm, Tensor found_inf) {
  const DeviceGuard guard(norms.get_device_index());
  std::vector<Array> arrays;
  for (Tensor& x : tensors) {
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    arrays.push_back(array_of(x));
    STD_TORCH_CHECK(arrays.back().dtype <= kFloat16, "expected float32, bfloat16 or float16");
  }
  Workspace workspace{norms};
  cuda::grad_stats(
      arrays, number_of(1, inv_scale, norms),
      {memory<double>(norms), memory<double>(max_abs), memory<int64_t>(zeros), memory<int64_t>(nans),
       memory<int64_t>(infs), memory<double>(total_norm), memory<float>(found_inf)},
      std::ref(workspace), stream_of(norms));
}

}  // namespace
}  // namespace esper

// Why the kernels cannot run on the current device, cut to `size` bytes; empty where they can.
extern "C" __attribute__((visibility("default"))) void esper_cuda_refusal(char* reason, int64_t size) {
  std::snprintf(reason, size, "%s", esper::cuda::refusal().c_str());
}

STABLE_TORCH_LIBRARY_IMPL(esper, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&esper::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&esper::cross_entropy_backward));
  m.impl("grad_stats", TORCH_BOX(&esper::grad_stats));
}
