// A call of an op, on the CPU and on CUDA alike. Plain memory, no torch.
#pragma once
#include <cstdint>
#include <vector>

#if defined(__CUDACC__)
#define ESPER_ANYWHERE __host__ __device__
#else
#define ESPER_ANYWHERE
#endif

namespace esper {

// What the kernels compute with, then float64 of the results, then what targets may be.
enum Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64, kInt64, kInt32, kUInt8 };

ESPER_ANYWHERE inline int bytes_of(Dtype dtype) {
  constexpr int bytes[] = {4, 2, 2, 8, 8, 4, 1};
  return bytes[dtype];
}

// Row i of a tensor [..., classes] of up to two leading dimensions, in elements; classes have stride 1.
struct RowLayout {
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
  ESPER_ANYWHERE int64_t offset(int64_t i) const {
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
  float* saved_denominator;      // what the loss is divided by
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

// A number, or where it is found.
struct Number {
  double value = 0;
  const void* at = nullptr;  // double where wide, else float
  bool wide = false;
  ESPER_ANYWHERE double read() const {
    if (!at) return value;
    return wide ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
  }
};

// A tensor: where it lies, sizes and strides in elements.
struct Array {
  void* data;
  int64_t dims;
  const int64_t *sizes, *strides;
  Dtype dtype;

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    bool follows = true;
    for (int64_t d = dims - 1; d >= 0; --d) {
      follows = follows && (sizes[d] == 1 || strides[d] == expected);
      expected *= sizes[d];
    }
    return follows || expected == 0;
  }
};

enum Reduction : int64_t { kMean, kSum, kNone };  // in the order of esper_kernels/cross_entropy/cpp.py

// Why a call was not served; nothing was written then.
enum class Outcome { kDone, kUnsupported, kBadTargets };

// Loss and counts, and where `out` is given the gradient. Pointers are null where not wanted.
struct LossCall {
  Array logits, targets;  // [..., V] with class stride 1; contiguous
  const float* weight = nullptr;
  int64_t ignore_index = -100;
  double smoothing = 0, z_loss = 0, softcap = 0;
  double normalizer = -1, grad_scale = 1;  // a negative normalizer: the sum of the weights
  int64_t reduction = kMean;
  double* sums = nullptr;  // a Meter's, in the layout of esper_kernels/meter.py
  int64_t* counts = nullptr;
  std::vector<int64_t> topk = {1};
  float *loss = nullptr, *rows = nullptr;  // [] or for kNone [N]; [2 N + 1] to keep for the gradient
  const Array* out = nullptr;              // may be the logits
};
// The shape of the call, its strides and plain options; false where the tensors are not as promised.
bool lay_out(const LossCall&, CrossEntropy*);

// Where the statistics of T tensors go, as esper_kernels.grad_stats.GradStats.
struct GradStatsOut {
  double *norms, *max_abs;
  int64_t *zeros, *nans, *infs;
  double* total_norm;
  float* found_inf;
};

}  // namespace esper
