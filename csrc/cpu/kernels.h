// The kernels of each instruction set, on plain memory, without torch.
#pragma once
#include <cstdint>

#include "../call.h"

namespace esper {

// Statistics of a chunk of a gradient.
struct GradChunk {
  double sum_of_squares, max_abs;
  int64_t zeros, nans, infs;
};

// The exponentials of the first kKept classes of a row are stored for its gradient, those of later classes
// computed twice, so that each thread needs at most 256 KiB, whatever the number of classes.
constexpr int64_t kKept = 65536;
constexpr int64_t kSmallestChunk = 1024;  // the smallest kChunk of cross_entropy.inc

// The functions that kernels are made of, on arrays: n elements from x to y. Half-precision numbers are given
// as their bits.
struct VectorFunctions {
  void (*exp)(const float* x, float* y, int64_t n);
  void (*log)(const float* x, float* y, int64_t n);
  void (*tanh)(const float* x, float* y, int64_t n);
  void (*widen_bfloat16)(const uint16_t* x, float* y, int64_t n);
  void (*widen_float16)(const uint16_t* x, float* y, int64_t n);
  void (*narrow_bfloat16)(const float* x, uint16_t* y, int64_t n);
  void (*narrow_float16)(const float* x, uint16_t* y, int64_t n);
};

struct Kernels {
  const char* name;
  // Computes rows [begin, end) and adds to `loss` and `counts`: the non-finite rows, then the correct rows
  // for each k of topk. scratch: scratch_size(classes) floats.
  void (*cross_entropy)(const CrossEntropy&, int64_t begin, int64_t end, float* scratch, double* loss,
                        int64_t* counts);
  // Statistics of n contiguous elements, each multiplied by inv_scale.
  GradChunk (*grad_chunk)(const void*, Dtype, int64_t n, double inv_scale);
  const VectorFunctions* vector_functions;  // null, except in the build for tests
};

// Floats that a row needs: its stored exponentials and the maximum of each chunk.
inline int64_t scratch_size(int64_t classes) {
  return (classes < kKept ? classes : kKept) + classes / kSmallestChunk + 64;
}

// Rows per block, the unit of work. Fixed by the shape, so that sums do not depend on the number of threads.
inline int64_t rows_per_block(int64_t classes) {
  const int64_t rows = 32768 / classes / 16 * 16;
  return rows > 0 ? rows : 1;
}

// The instruction sets of this build that this machine can run, best first; ends with null.
const Kernels* const* available_kernels();
// The named instruction set, for "auto" the best one; null where there is none.
const Kernels* find_kernels(const char* name);

}  // namespace esper
