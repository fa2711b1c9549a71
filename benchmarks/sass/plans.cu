// How the CUDA cross entropy would be launched, without a GPU: a line per dtype and class count.
// Arguments: multiprocessors, bytes of shared memory of a block and of a multiprocessor, whether there are
// clusters; then class counts.
#include <cstdio>
#include <cstdlib>

#include "cuda/cross_entropy.cu"

int main(int count, char** arguments) {
  using namespace esper::cuda;
  const auto number = [&](int i) { return std::atoi(arguments[i]); };
  const Device device{number(1), number(2), number(3), number(4) != 0};
  static char gradient[16];
  for (int i = 5; i < count; ++i)
    for (const esper::Dtype dtype : {esper::kFloat32, esper::kBFloat16, esper::kFloat16}) {
      esper::LossRows p{};
      p.rows = 1 << 20;
      p.classes = number(i);
      p.dtype = dtype;
      p.out = gradient;
      const Plan plan = plan_of(p, device, kSharedBytes<State>);
      std::printf("%s %d %d %d %d %d %d %d\n",
                  dtype == esper::kFloat32    ? "float32"
                  : dtype == esper::kBFloat16 ? "bfloat16"
                                              : "float16",
                  number(i), plan.per_lane, plan.kept, plan.team, plan.grid.threads,
                  static_cast<int>(plan.grid.shared_bytes), plan.grid.cluster);
    }
}
