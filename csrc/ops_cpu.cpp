// The CPU ops, registered through libtorch's stable ABI: for compiled graphs, tracers and profilers, which
// see what passes through torch's dispatcher. bindings.cpp is the shorter road to the same calls.
#include <vector>

#include "cpu/driver.h"
#include "tensors.h"

namespace {

using esper::Array;
using esper::array_of;
using esper::data;
using esper::MaybeTensor;
using esper::memory;
using esper::Tensor;

void parallel_for(int64_t n, const esper::Range& f) { torch::stable::parallel_for(0, n, 1, f); }

const esper::Kernels& kernels_of(int64_t instruction_set) {
  const esper::Kernels* found = esper::kernels_at(instruction_set);
  STD_TORCH_CHECK(found, "this machine or build lacks instruction set ", instruction_set);
  return *found;
}

// The numbers, each replaced where a tensor is given for it.
void override(const std::vector<MaybeTensor>& tensors, std::vector<double*> numbers) {
  for (size_t i = 0; i < numbers.size(); ++i)
    *numbers[i] = esper::number_of(*numbers[i], esper::at(tensors, i), false).value;
}

void cross_entropy(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index, double smoothing,
                   double z_loss, double softcap, double normalizer, double grad_scale,
                   std::vector<MaybeTensor> numbers, int64_t reduction, int64_t instruction_set,
                   MaybeTensor sums, MaybeTensor counts, std::vector<int64_t> topk, MaybeTensor loss,
                   MaybeTensor rows, MaybeTensor out, MaybeTensor) {
  override(numbers, {&smoothing, &z_loss, &normalizer, &grad_scale});
  const Array written = out ? array_of(*out) : Array{};
  esper::check(esper::cross_entropy(
      {array_of(logits), array_of(targets), data<float>(weight), ignore_index, smoothing, z_loss, softcap,
       normalizer, grad_scale, reduction, data<double>(sums), data<int64_t>(counts), topk, data<float>(loss),
       data<float>(rows), out ? &written : nullptr},
      kernels_of(instruction_set), parallel_for));
}

void cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor targets, MaybeTensor weight,
                            int64_t ignore_index, double smoothing, double z_loss, double softcap,
                            std::vector<MaybeTensor> numbers, int64_t instruction_set, Tensor rows,
                            Tensor out) {
  override(numbers, {&smoothing, &z_loss});
  const Array written = array_of(out);
  esper::LossCall call{
      array_of(logits), array_of(targets), data<float>(weight), ignore_index, smoothing, z_loss, softcap};
  call.rows = memory<float>(rows);
  call.out = &written;
  esper::check(
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
  esper::grad_stats(
      arrays, esper::number_of(1, inv_scale, false).value,
      {memory<double>(norms), memory<double>(max_abs), memory<int64_t>(zeros), memory<int64_t>(nans),
       memory<int64_t>(infs), memory<double>(total_norm), memory<float>(found_inf)},
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
  for (const char* schema : esper::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
}
