// A call of an op, and every check of it, for the CPU and CUDA alike. Plain memory, no torch.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#if defined(__CUDACC__)
#define ESPER_ANYWHERE __host__ __device__
#else
#define ESPER_ANYWHERE
#endif

namespace esper {

// The types that kernels compute with, then float64 for results, then the types of targets.
enum Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64, kInt64, kInt32, kUInt8 };

ESPER_ANYWHERE inline int bytes_of(Dtype dtype) {
  constexpr int bytes[] = {4, 2, 2, 8, 8, 4, 1};
  return bytes[dtype];
}

enum Reduction : int64_t { kMean, kSum, kNone };  // in the order of REDUCTIONS in esper_kernels/config.py

// A Meter's accumulators, in the order of SUMS and COUNTS in esper_kernels/meter.py.
enum MeterSum { kLossSum, kWeightSum, kBatchMeanSum, kNumSums };
enum MeterCount {
  kValid,
  kIgnored,
  kNonfinite,
  kBadTargets,
  kBatches,
  kBatchesWithValid,
  kFirstCorrect  // correct@k for each k of topk
};

// What a Meter measures besides, and how many places that takes after kNumSums and after the last
// correct@k: see MeasurePlan and its layout in esper_kernels/measures.py.
struct MeasurePlan {
  int64_t per_class = 0, bins = 0;
  bool entropy = false, confusion = false;

  ESPER_ANYWHERE bool any() const { return per_class > 0 || bins > 0 || entropy; }
  int64_t num_sums() const;
  ESPER_ANYWHERE int64_t num_class_counts() const { return per_class * (confusion ? per_class : 3); }
  int64_t num_counts() const { return num_class_counts() + 2 * bins; }
};
// The measures of a row. Those from kNll on are summed, in the order of ROW_SUMS in that file.
enum RowMeasure { kConfidence, kNll, kBrier, kEntropy, kMargin, kNumRowMeasures };

// Where row i of a tensor [..., classes] begins, in elements. Up to two leading dimensions.
struct RowLayout {
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
  ESPER_ANYWHERE int64_t offset(int64_t i) const {
    return i < inner ? i * inner_stride : i / inner * outer_stride + i % inner * inner_stride;
  }
};

// A number, or the address of one.
struct Number {
  double value = 0;
  const void* at = nullptr;  // a double if `is_double`, else a float
  bool is_double = false;
  bool from_tensor = false;  // its range is then up to the caller
  ESPER_ANYWHERE double read() const {
    if (!at) return value;
    return is_double ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
  }
};

// A tensor: its address, with sizes and strides in elements.
struct Array {
  void* data;
  int64_t dims;
  const int64_t *sizes, *strides;
  Dtype dtype;
  int64_t room;  // bytes from `data` to the end of its storage

  int64_t numel() const;
  int64_t reach() const;  // bytes from `data` to the end of the last element
  bool contiguous() const;
  bool dense() const;  // whether the elements fill a range of memory, in any order
  bool aligned() const { return reinterpret_cast<uintptr_t>(data) % bytes_of(dtype) == 0; }
  // Whether the leading dimensions of [..., classes] are such a layout.
  bool has_row_layout() const;
  int64_t class_stride() const { return sizes[dims - 1] == 1 ? 1 : strides[dims - 1]; }
  RowLayout row_layout() const;  // requires has_row_layout()
};

// Options that may be tensors: on CUDA they are then read by the kernel.
struct LossNumbers {
  Number label_smoothing, z_loss, grad_scale{1}, softcap, normalizer;
  bool has_softcap = false;
  bool has_normalizer = false;  // otherwise a mean divides by the sum of the rows' weights
};

// One call of cross entropy: loss and counts, and the gradient if `out` is given.
struct LossCall {
  Array logits, targets;        // [..., V] and [...]
  std::optional<Array> weight;  // float32 [V]
  // With MixUp: int64 [...], the second target of each row, and float32 [2, ...], the shares of both.
  std::optional<Array> second = {}, shares = {};
  int64_t ignore_index = -100;
  // Where the logits are a shard of the classes: the index of the first one, and the number of all classes.
  // Targets and weight are those of all classes. CPU only.
  int64_t first_class = 0;
  std::optional<int64_t> num_classes = {};
  LossNumbers numbers = {};
  int64_t reduction = kMean;
  // A Meter's, float64, int64 and int32 [1]; kernels on a GPU use the ticket, 0 between launches.
  std::optional<Array> sums, counts, ticket;
  std::vector<int64_t> topk = {};
  std::vector<int64_t> measures = {};  // the numbers of a MeasurePlan, or none
  std::optional<Array> loss;           // float32 [], or [N] for kNone
  std::optional<Array> saved;  // float32 [2 N + 1]: maxima, sums, denominator; written forward, read backward
  std::optional<Array> out;    // like the logits, and may be the logits themselves
};

// What kernels on every device read of a call over `rows` rows. With x the logits after softcap
// c * tanh(logit / c), a row's loss is
// w_t (1 - smoothing) (lse - x_t) + smoothing / classes * sum_c w_c (lse - x_c) + z_loss * lse^2.
// With `second` it is shares[i] times that of the target plus shares[rows + i] times that of the second
// target, which is another class; a share of 0 stands for a target that is ignored. The target is the one
// that counts.
struct LossRows {
  int64_t rows, classes;
  Dtype dtype;
  const void* logits;
  RowLayout logits_at;
  int64_t class_stride;  // of the logits
  const void* targets;   // [rows], contiguous
  int target_bytes;      // 1 unsigned, 4 and 8 signed
  int64_t ignore_index;
  const int64_t* second;  // [rows] or null
  const float* shares;    // [2 rows] or null
  const float* weight;    // [classes] or null
  float* row_loss;        // [rows] or null
  // [rows], or null: the maximum of x (NaN if the row is not finite), and the sum of exp(x - maximum), on
  // CUDA over the classes other than the target. Read if `backward`, otherwise written.
  float *saved_max, *saved_sum;
  float* saved_denominator;  // what the sum of row losses is divided by
  int64_t num_topk;
  // Where measures are wanted, on the CPU: the predicted class of each row, -1 for one that is not measured,
  // and its RowMeasures, [kNumRowMeasures, rows], which are 0 then. Entropy and margin only if wanted.
  int32_t* predicted;  // [rows] or null
  float* row_measures;
  bool wants_entropy;  // in ClassSums too
  void* out;           // the gradient, or null; may be the logits
  RowLayout out_at;
  int64_t out_class_stride;
  bool backward;              // the gradient only, from saved_max and saved_sum
  const float* scale_of_row;  // the gradient's factor for row i is element i * scale_stride; or null
  int64_t scale_stride;
  // The logits are those of `classes` of all_classes classes, from first_class on; targets, second and weight
  // count all of them. Less than all only if `backward` or in ClassSums.
  int64_t first_class, all_classes;
};

ESPER_ANYWHERE inline int64_t target_of(const LossRows& p, int64_t i) {
  if (p.target_bytes == 8) return static_cast<const int64_t*>(p.targets)[i];
  if (p.target_bytes == 4) return static_cast<const int32_t*>(p.targets)[i];
  return static_cast<const uint8_t*>(p.targets)[i];
}

// Calls f with the targets, of their type.
template <class F>
auto with_targets(const LossRows& p, const F& f) {
  if (p.target_bytes == 8) return f(static_cast<const int64_t*>(p.targets));
  if (p.target_bytes == 4) return f(static_cast<const int32_t*>(p.targets));
  return f(static_cast<const uint8_t*>(p.targets));
}

ESPER_ANYWHERE inline bool is_valid(const LossRows& p, int64_t target) {
  return target != p.ignore_index && target >= 0 && target < p.all_classes;
}

// What a shard of the classes contributes to the loss of a row, with x the logits after softcap.
enum ClassSum {
  kMaximum,      // of x; NaN if x holds NaN or +inf
  kExponential,  // sum of exp(x - origin), the origin being the maximum, or 0 where that is -inf
  kTarget,       // x of the target, 0 if it lies elsewhere
  kSecond,       // likewise of the second target
  kWeighted,     // with label smoothing, sum of w_c (x_c - origin)
  kWeights,      // with label smoothing, sum of w_c
  kAhead,        // with target_logits, the classes that rank before the target
  kNumClassSums,
  // With measures also these:
  kLargest = kNumClassSums,  // the largest logit, as stored
  kPlace,                    // the first class that has it
  kSquare,                   // sum of exp(x - origin)^2
  kProduct,                  // with entropy, sum of exp(x - origin) (x - origin)
  kRunnerUp,                 // with entropy, x of the largest other logit; -inf without any
  kNumMeasuredSums
};

// One call of class_sums.
struct ClassSumsCall {
  // The inputs, and the measures; label smoothing counts as on or off. The other fields stay empty.
  LossCall batch;
  std::optional<Array> target_logits;  // float32 [N], of each row's target, wherever it lies
  Array sums;  // float64 [kNumClassSums, N], with measures [kNumMeasuredSums, N], written
};

// One call of token_logprobs: log-probabilities and entropies or, if `batch.out` is given, the gradient.
struct LogprobCall {
  LossCall batch;  // logits, targets, ignore_index and out; the other fields stay empty
  double temperature = 1;
  std::optional<Array> logprobs;                     // float32 [N], written forward
  std::optional<Array> entropy;                      // float32 [N], written forward, read backward
  std::optional<Array> row_sums;                     // float32 [N, 2], written forward, read backward
  std::optional<Array> grad_logprobs, grad_entropy;  // float32 [N], read backward
};

// What kernels on every device read of it. With z_c = (logit_c - top) / temperature, top the largest logit
// of a row and S the sum of exp(z_c), the log-probability of a class is z_c - log(S), and the entropy
// log(S) - sum_c z_c exp(z_c) / S. A row whose top or S is not finite gives NaN.
struct LogprobRows : LossRows {
  double temperature;
  float *logprobs, *entropy;  // [rows]; entropy may be null
  float* row_sums;            // [rows, 2], top and S of each row; null where no backward follows
  const float *grad_logprobs, *grad_entropy;  // [rows]; grad_entropy may be null
};

// Where the statistics of T tensors go; the fields of esper_kernels.GradStats.
struct GradStatsArrays {
  Array magnitudes;  // float64 [2, T]: norms, max_abs
  Array counts;      // int64 [3, T]: zeros, nans, infs
  Array total_norm, found_inf;
  // int32 [T + 1, kGradTableWords]: what CUDA keeps between calls to find the tensors by, and what the host
  // knows of it; both or neither. -1 everywhere on the host: nothing yet.
  std::optional<Array> table = {}, table_on_host = {};
};
constexpr int kGradTableWords = 5;
struct GradStatsOut {
  double *norms, *max_abs;
  int64_t *zeros, *nans, *infs;
  double* total_norm;
  float* found_inf;
  int32_t *table, *table_on_host;
};

// The checks. Each throws std::invalid_argument for a call that would access the wrong memory or makes no
// sense, before anything is written. Values in device memory are not checked.
void check(const LossCall&);
void check_backward(const LossCall&, const Array& grad_output);
void check(const ClassSumsCall&);
void check(const LogprobCall&);
GradStatsOut check(const std::vector<Array>& tensors, const GradStatsArrays&);

// The plan of a checked call.
MeasurePlan measures_of(const LossCall&);
// A checked call as the kernels see it. Logits, targets, weight and out have been replaced by copies where
// `usable` is false. backward: grad_output, which is [] or one number per row.
LossRows rows_of(const LossCall&, const Array* grad_output = nullptr);
LogprobRows rows_of(const LogprobCall&);
// How kernels read an array: in one piece; in one piece whatever the order, as channels-last; by rows with
// the classes next to each other; or by rows.
enum class Access { kContiguous, kDense, kRows, kAnyClassStride };
bool usable(const Array& x, Access access);

}  // namespace esper
