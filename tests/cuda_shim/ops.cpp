// The ops of csrc/ops_cuda.cpp for CPU tensors, under a name of their own.
#include "ops_cuda.cpp"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
// torch's own refuses where there is no accelerator.
extern "C" AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
extern "C" AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

// What esper_cuda_refusal finds.
extern "C" void esper_shim_machine(int driver, int devices, bool kernels) {
  make_believe_driver = driver, make_believe_devices = devices, make_believe_kernels = kernels;
}

// Whether the stream that all ops use is being captured.
extern "C" void esper_shim_capture(bool active) {
  make_believe_capture = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

STABLE_TORCH_LIBRARY(esper_shim, m) {
  for (const char* schema : esper::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(esper_shim, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&esper::cross_entropy_op<esper::Cuda>));
  m.impl("cross_entropy_backward", TORCH_BOX(&esper::cross_entropy_backward_op<esper::Cuda>));
  m.impl("token_logprobs", TORCH_BOX(&esper::token_logprobs_op<esper::Cuda>));
  m.impl("token_logprobs_backward", TORCH_BOX(&esper::token_logprobs_backward_op<esper::Cuda>));
  m.impl("grad_stats", TORCH_BOX(&esper::grad_stats_op<esper::Cuda>));
}
