// The table of kernels of one instruction set. Plain memory, no torch.
#pragma once
#include <cstdint>

#include "../call.h"

namespace esper {

// Elements a gradient-statistics chunk saw.
struct GradChunk {
  double sum_of_squares, max_abs;
  int64_t zeros, nans, infs;
};

// Scratch of one thread, in floats: exponentials of a row up to this class are kept, later ones computed
// twice (so that any number of classes costs at most 256 KiB a thread).
constexpr int64_t kKept = 65536;
constexpr int64_t kSmallestChunk = 1024;  // classes a step, see cross_entropy.h

struct Kernels {
  const char* name;
  // Rows [begin, end). counts: non-finite rows, then correct rows for each of topk. scratch: scratch_size
  // floats.
  void (*cross_entropy)(const CrossEntropy&, int64_t begin, int64_t end, float* scratch, double* loss,
                        int64_t* counts);
  // n contiguous elements, each multiplied by inv_scale.
  GradChunk (*grad_chunk)(const void*, Dtype, int64_t n, double inv_scale);
};

// A row's scratch: kept exponentials and the maximum of each chunk.
inline int64_t scratch_size(int64_t classes) {
  return (classes < kKept ? classes : kKept) + classes / kSmallestChunk + 64;
}

// Rows of a unit of work: fixed by the shape, so that sums do not depend on the number of threads.
inline int64_t rows_per_block(int64_t classes) {
  const int64_t rows = 32768 / classes / 16 * 16;
  return rows > 0 ? rows : 1;
}

// The sets built into this binary that this machine can run, best first; ends with null.
const Kernels* const* available_kernels();
// The named one, the best for "auto", or null.
const Kernels* find_kernels(const char* name);

}  // namespace esper
