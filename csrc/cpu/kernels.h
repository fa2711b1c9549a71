// What a kernel is given and the table of kernels of one instruction set. Plain memory, no torch.
#pragma once
#include <cstdint>

namespace esper {

// What the kernels compute with, then float64 of the results, then what targets may be.
enum Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64, kInt64, kInt32, kUInt8 };

inline int bytes_of(Dtype dtype) {
  constexpr int bytes[] = {4, 2, 2, 8, 8, 4, 1};
  return bytes[dtype];
}

// Row i of a tensor [..., classes] of up to two leading dimensions, in elements; classes have stride 1.
struct RowLayout {
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
  int64_t offset(int64_t i) const {
    return i < inner ? i * inner_stride : i / inner * outer_stride + i % inner * inner_stride;
  }
};

// One call of cross entropy over `rows` rows. With x the logits after softcap c * tanh(logit / c), a row's
// loss is w_t (1 - smoothing) (lse - x_t) + smoothing / classes * sum_c w_c (lse - x_c) + z_loss * lse^2.
struct CrossEntropy {
  int64_t rows, classes;
  Dtype dtype;
  const void* logits;
  RowLayout logits_at;
  const void* targets;  // [rows], contiguous
  int target_bytes;     // 1 unsigned, 4 and 8 signed
  int64_t ignore_index;
  const float* weight;  // [classes] or null
  float weight_sum;     // sum of weight, or classes
  float smoothing, z_loss;
  float softcap;  // 0: none
  // Loss: added to `loss` and `counts` of `run`; null where not wanted.
  float* row_loss;               // [rows]
  float *saved_max, *saved_sum;  // [rows]; max of x (NaN where the row is not finite), sum of exp(x - max)
  const int64_t* topk;
  int64_t num_topk;
  // Gradient of the sum of row losses, times scale and scale_of_row; null `out`: none. `out` may be the
  // logits.
  void* out;
  RowLayout out_at;
  bool zero;  // write zeros, even where the row is not finite
  float scale;
  const float* scale_of_row;  // element i * scale_stride, or null
  int64_t scale_stride;
  bool backward;  // saved_max and saved_sum are given: gradient only
  bool stream;    // store past the caches
};

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
