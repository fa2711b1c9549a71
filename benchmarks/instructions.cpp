// Calls the CPU kernels of cross entropy, without Python or torch, so that instructions can be counted.
// Arguments: how many calls, rows, classes, dtype (0 float32, 1 bfloat16, 2 float16), instruction set.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/driver.h"

using namespace esper;

namespace {

void serial(int64_t n, const Range& f) { f(0, n); }

}  // namespace

int main(int, char** arguments) {
  const int calls = std::atoi(arguments[1]);
  const int64_t rows = std::atoll(arguments[2]), classes = std::atoll(arguments[3]);
  const Dtype dtype = static_cast<Dtype>(std::atoi(arguments[4]));
  const Kernels* kernels = find_kernels(arguments[5]);
  if (!kernels) {
    std::fprintf(stderr, "this machine lacks %s\n", arguments[5]);
    return 1;
  }
  const int64_t bytes = rows * classes * bytes_of(dtype);
  std::vector<char> logits(bytes), out(bytes);  // zeros
  std::vector<int64_t> targets(rows), counts(kFirstCorrect + 1);
  std::vector<double> sums(kNumSums);
  const int64_t sizes[] = {rows, classes}, strides[] = {classes, 1}, one[] = {1};
  const int64_t num_sums[] = {kNumSums}, num_counts[] = {kFirstCorrect + 1};
  LossCall call{Array{logits.data(), 2, sizes, strides, dtype, bytes},
                Array{targets.data(), 1, sizes, one, kInt64, 8 * rows}};
  call.sums = Array{sums.data(), 1, num_sums, one, kFloat64, 8 * kNumSums};
  call.counts = Array{counts.data(), 1, num_counts, one, kInt64, 8 * (kFirstCorrect + 1)};
  call.topk = {1};
  call.out = Array{out.data(), 2, sizes, strides, dtype, bytes};
  check(call);
  for (int i = 0; i < calls; ++i) cross_entropy(call, *kernels, {serial, second_level_cache()});
}
