// Torch's tensors as the kernels see them, through libtorch's stable ABI, and the schemas of the ops.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <vector>

#include "call.h"

namespace esper {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Each number may be given as a tensor at the end instead. second and shares: with MixUp, see LossCall.
constexpr const char* kSchemas[] = {
    "cross_entropy(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, float label_smoothing, "
    "float z_loss, float? softcap, int reduction, float? normalizer, int instruction_set, float grad_scale, "
    "Tensor(a!)? sums, Tensor(b!)? counts, Tensor(c!)? ticket, int[] topk, int[] measures, "
    "Tensor(d!)? loss, Tensor(e!)? saved, Tensor(f!)? out, Tensor? label_smoothing_at=None, Tensor? "
    "z_loss_at=None, "
    "Tensor? softcap_at=None, Tensor? normalizer_at=None, Tensor? grad_scale_at=None, Tensor? second=None, "
    "Tensor? shares=None) -> ()",
    "cross_entropy_backward(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, int instruction_set, Tensor grad_output, "
    "Tensor saved, Tensor(a!) out, Tensor? label_smoothing_at=None, Tensor? z_loss_at=None, "
    "Tensor? softcap_at=None, Tensor? second=None, Tensor? shares=None, int first_class=0, "
    "int? num_classes=None) -> ()",
    "class_sums(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, bool smoothed, "
    "float? softcap, int instruction_set, int first_class, int num_classes, Tensor? target_logits, "
    "Tensor? second, Tensor? shares, int[] measures, Tensor(a!) sums) -> ()",
    "token_logprobs(Tensor logits, Tensor targets, int ignore_index, float temperature, "
    "int instruction_set, Tensor(a!) logprobs, Tensor(b!)? entropy, Tensor(c!)? row_sums) -> ()",
    "token_logprobs_backward(Tensor logits, Tensor targets, int ignore_index, float temperature, "
    "int instruction_set, Tensor? entropy, Tensor row_sums, Tensor grad_logprobs, Tensor? grad_entropy, "
    "Tensor(a!) out) -> ()",
    "grad_stats(Tensor[] tensors, Tensor? inv_scale, int instruction_set, Tensor(a!) magnitudes, "
    "Tensor(b!) counts, Tensor(c!) total_norm, Tensor(d!) found_inf, Tensor(e!)? table=None, "
    "Tensor(f!)? table_on_host=None) -> ()",
    "use_huge_pages(Tensor x) -> ()",
};

inline Dtype dtype_of(const Tensor& x) {
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
      throw std::invalid_argument("esper: a tensor has a dtype that is not served");
  }
}

inline Array array_of(const Tensor& x) {
  int64_t storage_bytes = 0;
  // Not STABLE_TORCH_ERROR_CODE_CHECK: torch 2.10 to 2.12 do not have it.
  STD_TORCH_CHECK(aoti_torch_get_storage_size(x.get(), &storage_bytes) == AOTI_TORCH_SUCCESS,
                  "torch does not tell the size of a storage");
  const Dtype dtype = dtype_of(x);
  return {x.data_ptr(),       x.dim(), x.sizes().data(),
          x.strides().data(), dtype,   storage_bytes - x.storage_offset() * bytes_of(dtype)};
}

// Arrays of the tensors of one call, with the copies that it keeps alive.
struct Arrays {
  const Tensor& beside;  // all others are on its device
  std::vector<Tensor> copies{};

  Array of(const Tensor& x) const {
    if (x.is_cpu() != beside.is_cpu() || x.get_device_index() != beside.get_device_index())
      throw std::invalid_argument("esper: expected all tensors on one device");
    return array_of(x);
  }
  std::optional<Array> of(const MaybeTensor& x) const {
    return x ? std::optional<Array>(of(*x)) : std::nullopt;
  }
  // Replaces an array by a contiguous copy unless kernels can read it as it is.
  void make_usable(const Tensor& x, Access access, Array* array) {
    if (usable(*array, access)) return;
    Tensor copy = torch::stable::contiguous(x);
    if (!array_of(copy).aligned()) copy = torch::stable::clone(copy);
    copies.push_back(copy);
    *array = array_of(copy);
  }
  Tensor with_dtype(const Tensor& x, ScalarType dtype) {
    if (x.scalar_type() == dtype) return x;
    copies.push_back(torch::stable::to(x, dtype));
    return copies.back();
  }
  // A number that may be given as a [] tensor. Kernels read one on their own device; it is read here if it
  // is on the CPU and they are not.
  Number number(double value, const MaybeTensor& tensor) {
    if (!tensor) return {value};
    const bool is_float = dtype_of(*tensor) == kFloat32;
    const Tensor readable = is_float ? *tensor : with_dtype(*tensor, ScalarType::Double);
    const Array x = array_of(readable);
    if (x.dims != 0 || x.reach() > x.room || !x.aligned())
      throw std::invalid_argument("esper: expected a 0-d tensor as a number");
    const Number number{value, x.data, x.dtype == kFloat64, true};
    if (readable.is_cpu() == beside.is_cpu()) return number;
    if (!readable.is_cpu())
      throw std::invalid_argument("esper: expected a number's tensor on the logits' device or the CPU");
    return {number.read(), nullptr, false, true};
  }
};

// The inputs of cross entropy and its backward. Weight becomes float32.
inline LossCall inputs_of(Arrays& arrays, const Tensor& logits, const Tensor& targets, MaybeTensor& weight,
                          const MaybeTensor& second, const MaybeTensor& shares, int64_t ignore_index,
                          const LossNumbers& numbers) {
  if (weight) {
    const Dtype dtype = dtype_of(*weight);
    if (dtype > kFloat64) throw std::invalid_argument("esper: expected weight of a floating dtype");
    weight = arrays.with_dtype(*weight, ScalarType::Float);
  }
  LossCall call{arrays.of(logits), arrays.of(targets), arrays.of(weight), arrays.of(second),
                arrays.of(shares)};
  call.ignore_index = ignore_index;
  call.numbers = numbers;
  return call;
}

// Runs a checked call, with copies in place of inputs that kernels cannot read, and of an `out` that they
// cannot write. access: to logits and `out`.
template <class Run>
void run_usable(Access access, LossCall& call, Arrays& arrays, const Tensor& logits, const Tensor& targets,
                const MaybeTensor& weight, const MaybeTensor& out, const Run& run) {
  arrays.make_usable(logits, access, &call.logits);
  arrays.make_usable(targets, Access::kContiguous, &call.targets);
  if (weight) arrays.make_usable(*weight, Access::kContiguous, &*call.weight);
  if (!call.out || usable(*call.out, access)) return run();
  Tensor written = torch::stable::new_empty(*out, out->sizes());
  call.out = array_of(written);
  run();
  Tensor given = *out;
  torch::stable::copy_(given, written);
}

}  // namespace esper
