// Calls a kernel with 64 x 50257 logits, without Python or torch: for a simulator of caches, which is too
// slow to run those. Arguments: how many calls, the kernel (0 token_logprobs, 1 the same with entropies, 2
// class_sums with label smoothing and target logits, 3 the same with measures), 1 for bfloat16.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/driver.h"

using namespace esper;

namespace {

constexpr int64_t kRows = 64, kClasses = 50257;

void serial(int64_t n, const Range& f) { f(0, n); }

}  // namespace

int main(int, char** arguments) {
  const int calls = std::atoi(arguments[1]), kernel = std::atoi(arguments[2]);
  const Dtype dtype = std::atoi(arguments[3]) ? kBFloat16 : kFloat32;
  const int64_t bytes = kRows * kClasses * bytes_of(dtype);
  std::vector<char> logits(bytes);  // zeros
  std::vector<int64_t> targets(kRows);
  std::vector<float> of_row(kRows), entropy(kRows), row_sums(2 * kRows);
  const int64_t parts = kernel == 3 ? kNumMeasuredSums : kNumClassSums;
  std::vector<double> class_parts(parts * kRows);

  const int64_t sizes[] = {kRows, kClasses}, strides[] = {kClasses, 1};
  const int64_t pair_sizes[] = {kRows, 2}, pair_strides[] = {2, 1};
  const int64_t part_sizes[] = {parts, kRows}, part_strides[] = {kRows, 1};
  const auto of_rows = [&](void* data, Dtype type) {
    return Array{data, 1, sizes, strides + 1, type, kRows * bytes_of(type)};
  };
  const LossCall batch{Array{logits.data(), 2, sizes, strides, dtype, bytes},
                       of_rows(targets.data(), kInt64)};
  LogprobCall logprobs{batch};
  logprobs.logprobs = of_rows(of_row.data(), kFloat32);
  if (kernel == 1) logprobs.entropy = of_rows(entropy.data(), kFloat32);
  logprobs.row_sums = Array{row_sums.data(), 2, pair_sizes, pair_strides, kFloat32, 8 * kRows};
  check(logprobs);
  ClassSumsCall sums{batch, of_rows(of_row.data(), kFloat32),
                     Array{class_parts.data(), 2, part_sizes, part_strides, kFloat64, 8 * parts * kRows}};
  sums.batch.numbers.label_smoothing = {1};
  sums.batch.first_class = kClasses;
  sums.batch.num_classes = 3 * kClasses;
  if (kernel == 3) sums.batch.measures = {0, 15, 1, 0};
  check(sums);
  const Kernels* kernels = find_kernels("avx2");  // valgrind knows no AVX-512
  if (!kernels) kernels = find_kernels("baseline");
  const Machine machine{serial, 1 << 20};
  for (int i = 0; i < calls; ++i)
    kernel >= 2 ? class_sums(sums, *kernels, machine) : token_logprobs(logprobs, *kernels, machine);
  std::printf("%lld\n", static_cast<long long>(bytes));
}
