// The part of the CUDA runtime that csrc/cuda calls, on a make-believe device: see simt.cpp.
#pragma once
#include <cstddef>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
struct cudaFuncAttributes {};
typedef struct CUstream_st* cudaStream_t;

#define CUDART_VERSION 13000
inline int make_believe_driver = CUDART_VERSION, make_believe_devices = 1;
inline bool make_believe_kernels = true;
inline cudaStreamCaptureStatus make_believe_capture = cudaStreamCaptureStatusNone;
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaMemsetAsync(void*, int value, size_t bytes, cudaStream_t);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = make_believe_devices, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = make_believe_driver, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = make_believe_capture, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "make-believe"; }
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F) {
  return make_believe_kernels ? cudaSuccess : cudaErrorInvalidValue;
}
