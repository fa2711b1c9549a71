// The CPU ops, registered through libtorch's stable ABI: for compiled graphs, tracers and profilers, which
// see what passes through torch's dispatcher. bindings.cpp is the shorter road to the same calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <vector>

#include "cpu/driver.h"

namespace {

using esper::Array;
using esper::Outcome;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

void parallel_for(int64_t n, const esper::Range& f) { torch::stable::parallel_for(0, n, 1, f); }

const esper::Kernels& kernels_of(int64_t instruction_set) {
  const esper::Kernels* found = esper::kernels_at(instruction_set);
  STD_TORCH_CHECK(found, "this machine or build lacks instruction set ", instruction_set);
  return *found;
}

esper::Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return esper::kFloat32;
    case ScalarType::BFloat16:
      return esper::kBFloat16;
    case ScalarType::Half:
      return esper::kFloat16;
    case ScalarType::Double:
      return esper::kFloat64;
    case ScalarType::Long:
      return esper::kInt64;
    case ScalarType::Int:
      return esper::kInt32;
    case ScalarType::Byte:
      return esper::kUInt8;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or a target's type");
  }
}

Array array_of(const Tensor& x) {
  return {x.data_ptr(), x.dim(), x.sizes().data(), x.strides().data(), dtype_of(x)};
}

template <class T>
T* data(const MaybeTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

// Options given as tensors: float64 [smoothing, z_loss, normalizer, grad_scale], NaN where the number counts.
void override(const MaybeTensor& numbers, std::vector<double*> values) {
  if (!numbers) return;
  const double* given = data<double>(numbers);
  for (size_t i = 0; i < values.size(); ++i)
    if (!std::isnan(given[i])) *values[i] = given[i];
}

void check(Outcome outcome) {
  STD_TORCH_CHECK(outcome != Outcome::kBadTargets, "targets are outside [0, classes) and not ignore_index");
  STD_TORCH_CHECK(outcome == Outcome::kDone, "expected contiguous targets and rows, class stride 1");
}

void cross_entropy(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index, double smoothing,
                   double z_loss, double softcap, double normalizer, double grad_scale, MaybeTensor numbers,
                   int64_t reduction, int64_t instruction_set, MaybeTensor sums, MaybeTensor counts,
                   std::vector<int64_t> topk, MaybeTensor loss, MaybeTensor rows, MaybeTensor out) {
  override(numbers, {&smoothing, &z_loss, &normalizer, &grad_scale});
  const Array written = out ? array_of(*out) : Array{};
  check(esper::cross_entropy(
      {array_of(logits), array_of(targets), data<float>(weight), ignore_index, smoothing, z_loss, softcap,
       normalizer, grad_scale, reduction, data<double>(sums), data<int64_t>(counts), topk, data<float>(loss),
       data<float>(rows), out ? &written : nullptr},
      kernels_of(instruction_set), parallel_for));
}

void cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor targets, MaybeTensor weight,
                            int64_t ignore_index, double smoothing, double z_loss, double softcap,
                            MaybeTensor numbers, int64_t instruction_set, Tensor rows, Tensor out) {
  override(numbers, {&smoothing, &z_loss});
  const Array written = array_of(out);
  esper::LossCall call{
      array_of(logits), array_of(targets), data<float>(weight), ignore_index, smoothing, z_loss, softcap};
  call.rows = static_cast<float*>(rows.data_ptr());
  call.out = &written;
  check(
      esper::cross_entropy_backward(call, array_of(grad_output), kernels_of(instruction_set), parallel_for));
}

void grad_stats(std::vector<Tensor> tensors, MaybeTensor inv_scale, int64_t instruction_set, Tensor norms,
                Tensor max_abs, Tensor zeros, Tensor nans, Tensor infs, Tensor total_norm, Tensor found_inf) {
  std::vector<Array> arrays;
  for (Tensor& x : tensors) {
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    arrays.push_back(array_of(x));
    STD_TORCH_CHECK(arrays.back().dtype <= esper::kFloat16, "expected float32, bfloat16 or float16");
  }
  const auto doubles = [](const Tensor& x) { return static_cast<double*>(x.data_ptr()); };
  const auto integers = [](const Tensor& x) { return static_cast<int64_t*>(x.data_ptr()); };
  esper::grad_stats(arrays, inv_scale ? *data<double>(inv_scale) : 1,
                    {doubles(norms), doubles(max_abs), integers(zeros), integers(nans), integers(infs),
                     doubles(total_norm), static_cast<float*>(found_inf.data_ptr())},
                    kernels_of(instruction_set), parallel_for);
}

}  // namespace

// For bindings.cpp, which has no torch in it and borrows torch's threads here.
extern "C" __attribute__((visibility("default"))) const esper::Api* esper_api() {
  static const esper::Api api{
      esper::kernels_at,
      [](const esper::LossCall& call, const esper::Kernels& kernels) {
        return esper::cross_entropy(call, kernels, parallel_for);
      },
      [](const esper::LossCall& call, const Array& grad_output, const esper::Kernels& kernels) {
        return esper::cross_entropy_backward(call, grad_output, kernels, parallel_for);
      },
      [](const std::vector<Array>& tensors, double inv_scale, const esper::GradStatsOut& out,
         const esper::Kernels& kernels) {
        esper::grad_stats(tensors, inv_scale, out, kernels, parallel_for);
      }};
  return &api;
}

STABLE_TORCH_LIBRARY(esper, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, float smoothing, "
      "float z_loss, float softcap, float normalizer, float grad_scale, Tensor? numbers, int reduction, "
      "int instruction_set, Tensor(a!)? sums, Tensor(b!)? counts, int[] topk, Tensor(c!)? loss, "
      "Tensor(d!)? rows, Tensor(e!)? out) -> ()");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor targets, Tensor? weight, "
      "int ignore_index, float smoothing, float z_loss, float softcap, Tensor? numbers, int instruction_set, "
      "Tensor rows, Tensor(a!) out) -> ()");
  m.def(
      "grad_stats(Tensor[] tensors, Tensor? inv_scale, int instruction_set, Tensor(a!) norms, "
      "Tensor(b!) max_abs, Tensor(c!) zeros, Tensor(d!) nans, Tensor(e!) infs, Tensor(f!) total_norm, "
      "Tensor(g!) found_inf) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
}
