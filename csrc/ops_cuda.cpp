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

// A meter's ticket, which the last block of a launch sets back to 0.
unsigned* ticket_of(const Array& x) {
  if (x.dtype != kInt32 || x.numel() != 1 || x.reach() > x.room || !x.aligned())
    throw std::invalid_argument("esper: expected a ticket of one int32");
  return static_cast<unsigned*>(x.data);
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

void cross_entropy_op(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index,
                      double label_smoothing, double z_loss, std::optional<double> softcap, int64_t reduction,
                      std::optional<double> normalizer, int64_t, double grad_scale, MaybeTensor sums,
                      MaybeTensor counts, MaybeTensor ticket, std::vector<int64_t> topk, MaybeTensor loss,
                      MaybeTensor saved, MaybeTensor out, MaybeTensor label_smoothing_at,
                      MaybeTensor z_loss_at, MaybeTensor softcap_at, MaybeTensor normalizer_at,
                      MaybeTensor grad_scale_at) {
  const DeviceGuard guard(logits.get_device_index());
  Arrays arrays{logits};
  const LossNumbers numbers{arrays.number(label_smoothing, label_smoothing_at),
                            arrays.number(z_loss, z_loss_at),
                            arrays.number(grad_scale, grad_scale_at),
                            arrays.number(softcap.value_or(0), softcap_at),
                            arrays.number(normalizer.value_or(0), normalizer_at),
                            softcap || softcap_at,
                            normalizer || normalizer_at};
  LossCall call = inputs_of(arrays, logits, targets, weight, ignore_index, numbers);
  call.reduction = reduction;
  call.sums = arrays.of(sums);
  call.counts = arrays.of(counts);
  call.topk = std::move(topk);
  call.loss = arrays.of(loss);
  call.saved = arrays.of(saved);
  call.out = arrays.of(out);
  check(call);
  cuda::check(call);
  unsigned* const zero = ticket ? ticket_of(arrays.of(*ticket)) : nullptr;
  Workspace workspace{logits};
  run_usable(call, arrays, logits, targets, weight, out,
             [&] { cuda::cross_entropy(call, zero, std::ref(workspace), stream_of(logits)); });
}

void cross_entropy_backward_op(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index,
                               double label_smoothing, double z_loss, std::optional<double> softcap, int64_t,
                               Tensor grad_output, Tensor saved, Tensor out, MaybeTensor label_smoothing_at,
                               MaybeTensor z_loss_at, MaybeTensor softcap_at) {
  const DeviceGuard guard(logits.get_device_index());
  Arrays arrays{logits};
  const LossNumbers numbers{arrays.number(label_smoothing, label_smoothing_at),
                            arrays.number(z_loss, z_loss_at),
                            {1},
                            arrays.number(softcap.value_or(0), softcap_at),
                            {},
                            softcap || softcap_at};
  LossCall call = inputs_of(arrays, logits, targets, weight, ignore_index, numbers);
  call.saved = arrays.of(saved);
  call.out = arrays.of(out);
  Array gradient = arrays.of(grad_output);
  arrays.make_usable(grad_output, false, &gradient);
  check_backward(call, gradient);
  cuda::check(call);
  run_usable(call, arrays, logits, targets, weight, out,
             [&] { cuda::cross_entropy_backward(call, gradient, stream_of(logits)); });
}

void grad_stats_op(std::vector<Tensor> tensors, MaybeTensor inv_scale, int64_t, Tensor norms, Tensor max_abs,
                   Tensor zeros, Tensor nans, Tensor infs, Tensor total_norm, Tensor found_inf) {
  const DeviceGuard guard(norms.get_device_index());
  Arrays arrays{norms};
  std::vector<Array> gradients;
  for (const Tensor& x : tensors) gradients.push_back(arrays.of(x));
  const GradStatsOut out =
      check(gradients, {arrays.of(norms), arrays.of(max_abs), arrays.of(zeros), arrays.of(nans),
                        arrays.of(infs), arrays.of(total_norm), arrays.of(found_inf)});
  const Number scale = arrays.number(1, inv_scale);
  for (size_t i = 0; i < tensors.size(); ++i) arrays.make_usable(tensors[i], false, &gradients[i]);
  Workspace workspace{norms};
  cuda::grad_stats(gradients, scale, out, std::ref(workspace), stream_of(norms));
}

}  // namespace
}  // namespace esper

// Why the kernels cannot run on the current device, cut to `size` bytes; empty where they can.
extern "C" __attribute__((visibility("default"))) void esper_cuda_refusal(char* reason, int64_t size) {
  std::snprintf(reason, size, "%s", esper::cuda::refusal().c_str());
}

STABLE_TORCH_LIBRARY_IMPL(esper, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&esper::cross_entropy_op));
  m.impl("cross_entropy_backward", TORCH_BOX(&esper::cross_entropy_backward_op));
  m.impl("grad_stats", TORCH_BOX(&esper::grad_stats_op));
}
