#include "cuda/driver.h"

#include <stdexcept>

namespace esper::cuda {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

Device current_device() {
  int index = 0, values[4];
  check(cudaGetDevice(&index));
  constexpr cudaDeviceAttr names[] = {cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                      cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                      cudaDevAttrComputeCapabilityMajor};
  for (int i = 0; i < 4; ++i) check(cudaDeviceGetAttribute(&values[i], names[i], index));
  return {values[0], values[1], values[2], values[3] >= 9};
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

std::string refusal() {
  int driver = 0, built = 0, devices = 0;
  cudaDriverGetVersion(&driver);  // 0 without one; 13000 for CUDA 13.0
  cudaRuntimeGetVersion(&built);
  const auto name = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version / 10 % 100);
  };
  if (driver == 0) return "there is no NVIDIA driver";
  if (driver / 1000 < built / 1000)
    return "the driver serves CUDA " + name(driver) + ", the kernels were built with " + name(built) +
           "; it takes a driver from R" + (built < 13000 ? "525" : "580") + " on, or a build with a CUDA " +
           std::to_string(driver / 1000) + " toolkit";
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    cudaGetLastError();
    return "there is no CUDA device";
  }
  if (!has_kernels())
    return "the kernels were not built for this GPU; name its architecture in TORCH_CUDA_ARCH_LIST";
  return "";
}

}  // namespace esper::cuda
