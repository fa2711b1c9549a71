// Torch's tensors as the kernels see them, through libtorch's stable ABI, and what the ops are called with.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "call.h"

namespace esper {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kSchemas[] = {
    "cross_entropy(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, float smoothing, "
    "float z_loss, float softcap, float normalizer, float grad_scale, Tensor?[] numbers, int reduction, "
    "int instruction_set, Tensor(a!)? sums, Tensor(b!)? counts, int[] topk, Tensor(c!)? loss, "
    "Tensor(d!)? rows, Tensor(e!)? out, Tensor(f!)? ticket=None) -> ()",
    "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor targets, Tensor? weight, "
    "int ignore_index, float smoothing, float z_loss, float softcap, Tensor?[] numbers, "
    "int instruction_set, Tensor rows, Tensor(a!) out) -> ()",
    "grad_stats(Tensor[] tensors, Tensor? inv_scale, int instruction_set, Tensor(a!) norms, "
    "Tensor(b!) max_abs, Tensor(c!) zeros, Tensor(d!) nans, Tensor(e!) infs, Tensor(f!) total_norm, "
    "Tensor(g!) found_inf) -> ()",
};

inline Dtype dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Long:
      return kInt64;
    case ScalarType::Int:
      return kInt32;
    case ScalarType::Byte:
      return kUInt8;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or a target's type");
  }
}

inline Array array_of(const Tensor& x) {
  return {x.data_ptr(), x.dim(), x.sizes().data(), x.strides().data(), dtype_of(x)};
}

template <class T>
T* data(const MaybeTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

// A number that may be given as a [] tensor of float32 or float64. One on the CPU is read here; one beside
// the logits on a GPU is left to the kernel.
inline Number number_of(double value, const MaybeTensor& tensor, bool left_to_kernel) {
  if (!tensor) return {value};
  const Array x = array_of(*tensor);
  STD_TORCH_CHECK(x.dims == 0 && (x.dtype == kFloat32 || x.dtype == kFloat64),
                  "expected a 0-d tensor of float32 or float64");
  const Number number{value, x.data, x.dtype == kFloat64};
  return left_to_kernel ? number : Number{number.read()};
}

inline MaybeTensor at(const std::vector<MaybeTensor>& tensors, size_t i) {
  return i < tensors.size() ? tensors[i] : std::nullopt;
}

template <class T>
T* memory(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

inline void check(Outcome outcome) {
  STD_TORCH_CHECK(outcome != Outcome::kBadTargets, "targets are outside [0, classes) and not ignore_index");
  STD_TORCH_CHECK(outcome == Outcome::kDone, "expected contiguous targets and rows, class stride 1");
}

}  // namespace esper
