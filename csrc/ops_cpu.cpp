// The CPU ops, registered through libtorch's stable ABI. There is no Python in this library.
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/driver.h"
#include "tensors.h"

namespace esper {
namespace {

void parallel_for(int64_t n, const Range& f) { torch::stable::parallel_for(0, n, 1, f); }

const Kernels& kernels_of(int64_t instruction_set) {
  const Kernels* found = kernels_at(instruction_set);
  if (!found) throw std::invalid_argument("esper: this machine or build lacks that instruction set");
  return *found;
}

void cross_entropy_op(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index,
                      double label_smoothing, double z_loss, std::optional<double> softcap, int64_t reduction,
                      std::optional<double> normalizer, int64_t instruction_set, double grad_scale,
                      MaybeTensor sums, MaybeTensor counts, MaybeTensor, std::vector<int64_t> topk,
                      MaybeTensor loss, MaybeTensor saved, MaybeTensor out, MaybeTensor label_smoothing_at,
                      MaybeTensor z_loss_at, MaybeTensor softcap_at, MaybeTensor normalizer_at,
                      MaybeTensor grad_scale_at) {
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
  const Kernels& kernels = kernels_of(instruction_set);
  run_usable(call, arrays, logits, targets, weight, out, [&] { cross_entropy(call, kernels, parallel_for); });
}

void cross_entropy_backward_op(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index,
                               double label_smoothing, double z_loss, std::optional<double> softcap,
                               int64_t instruction_set, Tensor grad_output, Tensor saved, Tensor out,
                               MaybeTensor label_smoothing_at, MaybeTensor z_loss_at,
                               MaybeTensor softcap_at) {
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
  const Kernels& kernels = kernels_of(instruction_set);
  run_usable(call, arrays, logits, targets, weight, out,
             [&] { cross_entropy_backward(call, gradient, kernels, parallel_for); });
}

void grad_stats_op(std::vector<Tensor> tensors, MaybeTensor inv_scale, int64_t instruction_set, Tensor norms,
                   Tensor max_abs, Tensor zeros, Tensor nans, Tensor infs, Tensor total_norm,
                   Tensor found_inf) {
  Arrays arrays{norms};
  std::vector<Array> gradients;
  for (const Tensor& x : tensors) gradients.push_back(arrays.of(x));
  const GradStatsOut out =
      check(gradients, {arrays.of(norms), arrays.of(max_abs), arrays.of(zeros), arrays.of(nans),
                        arrays.of(infs), arrays.of(total_norm), arrays.of(found_inf)});
  const double scale = arrays.number(1, inv_scale).read();
  const Kernels& kernels = kernels_of(instruction_set);
  for (size_t i = 0; i < tensors.size(); ++i) arrays.make_usable(tensors[i], false, &gradients[i]);
  grad_stats(gradients, scale, out, kernels, parallel_for);
}

// Asks the system for huge pages if fresh memory is this large: a page fault per 4 KiB would cost more than
// computing what is written there. It is only a hint.
void use_huge_pages_op(Tensor x) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const Array array = array_of(x);
  const uintptr_t start = reinterpret_cast<uintptr_t>(array.data), end = start + array.reach();
  const uintptr_t from = (start + kPage - 1) / kPage * kPage, to = end / kPage * kPage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace esper

// What Python reads with ctypes: the compiler, and whether an instruction set can run here.
extern "C" __attribute__((visibility("default"))) const char* esper_compiler() { return __VERSION__; }
extern "C" __attribute__((visibility("default"))) bool esper_has_instruction_set(int64_t index) {
  return esper::kernels_at(index) != nullptr;
}

STABLE_TORCH_LIBRARY(esper, m) {
  for (const char* schema : esper::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&esper::cross_entropy_op));
  m.impl("cross_entropy_backward", TORCH_BOX(&esper::cross_entropy_backward_op));
  m.impl("grad_stats", TORCH_BOX(&esper::grad_stats_op));
  m.impl("use_huge_pages", TORCH_BOX(&esper::use_huge_pages_op));
}
