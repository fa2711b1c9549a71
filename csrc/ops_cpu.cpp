// The CPU ops, registered through libtorch's stable ABI. There is no Python in this library.
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/driver.h"
#include "ops.h"

namespace esper {
namespace {

void parallel_for(int64_t n, const Range& f) { torch::stable::parallel_for(0, n, 1, f); }

Machine machine() { return {parallel_for, second_level_cache()}; }

const Kernels& kernels_of(int64_t instruction_set) {
  const Kernels* found = kernels_at(instruction_set);
  if (!found) throw std::invalid_argument("esper: this machine or build lacks that instruction set");
  return *found;
}

struct Cpu {
  static constexpr Access kAccess = Access::kAnyClassStride;
  const Kernels& kernels;

  Cpu(const Tensor&, int64_t instruction_set) : kernels(kernels_of(instruction_set)) {}
  static void check(const LossCall&) {}
  void cross_entropy(const LossCall& call) const { esper::cross_entropy(call, kernels, machine()); }
  void cross_entropy_backward(const LossCall& call, const Array& grad_output) const {
    esper::cross_entropy_backward(call, grad_output, kernels, machine());
  }
  void class_sums(const ClassSumsCall& call) const { esper::class_sums(call, kernels, machine()); }
  void token_logprobs(const LogprobCall& call) const { esper::token_logprobs(call, kernels, machine()); }
  void grad_stats(const std::vector<Array>& tensors, const Number& inv_scale, const GradStatsOut& out) const {
    esper::grad_stats(tensors, inv_scale.read(), out, kernels, machine());
  }
};

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
  m.impl("cross_entropy", TORCH_BOX(&esper::cross_entropy_op<esper::Cpu>));
  m.impl("cross_entropy_backward", TORCH_BOX(&esper::cross_entropy_backward_op<esper::Cpu>));
  m.impl("class_sums", TORCH_BOX(&esper::class_sums_op<esper::Cpu>));
  m.impl("token_logprobs", TORCH_BOX(&esper::token_logprobs_op<esper::Cpu>));
  m.impl("token_logprobs_backward", TORCH_BOX(&esper::token_logprobs_backward_op<esper::Cpu>));
  m.impl("grad_stats", TORCH_BOX(&esper::grad_stats_op<esper::Cpu>));
  m.impl("use_huge_pages", TORCH_BOX(&esper::use_huge_pages_op));
}
