// Cross entropy of a row, as a group of threads computes it: what it has seen so far, its loss and counts,
// its gradient; and how blocks add up what their rows gave. cross_entropy.cu has the kernels that use it.
#pragma once
#include "cuda/driver.h"
#include "cuda/rows.h"

namespace esper::cuda {
namespace {  // part of cross_entropy.cu

// As in reference.py: gradients are 0 in the same places on every backend.
constexpr float kLowestExponent = -86;
constexpr float kSmallest = 1.17549435e-38f;
constexpr int kFewThreads = 128, kManyThreads = 256;
constexpr int kFewBlocks = 6,
              kManyBlocks = 2;  // at least, on a multiprocessor; kFewBlocks / 2 of 1024 classes
constexpr int kFewClasses = 1024;
constexpr int kKeptBytes = 110 << 10;  // of a row in one block, where clusters allow: two blocks then fit
constexpr int kLargestCluster = 8;     // the largest that every chip with clusters supports
constexpr int kCountHere = 128 << 10;  // bytes of targets up to which every block counts all of them
constexpr int kCountBlocks = 64;       // blocks that count the targets first if there are more
constexpr int kRowCounts = kBadTargets + 1;          // kValid to kBadTargets, of MeterCount
constexpr int kMostCounts = kRowCounts + kMostTopk;  // then correct@k

struct Batch {
  LossRows p;
  int lanes;  // per row, for cross_entropy_warp_rows
  LossNumbers numbers;
  int64_t reduction;
  const double* weights;  // kCountBlocks parts of the sum of the rows' weights; null: add them up here
  float* loss;            // []
  double* sums;           // a meter's, as `counts`
  int64_t *counts, topk[kMostTopk];
  double* partials;  // [columns, blocks]
  unsigned* ticket;  // null where neither loss nor meter is wanted
};

ESPER_ANYWHERE bool normalized(const Batch& b) { return b.reduction == kMean && b.numbers.has_normalizer; }

// The same for every row, in every thread.
struct Scalars {
  float smoothing, z_loss, softcap, weight_sum, scale;
  bool zero;
};

struct Row {
  int64_t i;
  int target;  // -1 where the row is not valid
  bool ignored;
  float class_weight, logit, x;  // of the target; x: after softcap
  float second_x = 0;            // with MixUp, of the second target
  __device__ float reference() const { return x - x == 0 ? x : 0; }
};

// What a group of threads has seen of a row. The sum leaves the target out: if the target has nearly all of
// the softmax, 1 - softmax would otherwise be nothing but rounding errors.
struct State {
  float top;     // the largest x, the target's included
  float others;  // sum of exp(x - top)
  float smooth;  // sum of w_c (x_c - x_t), only with smoothing
  int ahead;     // logits that rank before the target's
};

struct Tally {
  double loss = 0, weight = 0;
};

struct Shared {
  State scratch[kMostWarps], of_block[2];
  double totals[2 + kMostCounts];  // loss, weight; then counts, which a double holds exactly
  unsigned counts[kMostCounts], flag;
};
constexpr int64_t kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;

struct Merge {
  __device__ State operator()(State a, State b) const {
    const bool first = a.top >= b.top;  // either order gives the same bits
    const float high = first ? a.others : b.others, low = first ? b.others : a.others;
    const float top = fmaxf(a.top, b.top), below = fminf(a.top, b.top);
    return {top, high + low * (below == top ? 1 : __expf(below - top)), a.smooth + b.smooth,
            a.ahead + b.ahead};
  }
};

__device__ bool is_finite(float x) { return x - x == 0; }

template <bool kCap>
__device__ float capped(float x, float softcap) {
  return kCap ? softcap * tanhf(x / softcap) : x;
}

__device__ double weight_of_rows(const LossRows& p, int64_t first, int64_t step) {
  double sum = 0;
  for (int64_t i = first; i < p.rows; i += step) {
    const int64_t target = target_of(p, i);
    if (is_valid(p, target)) sum += p.weight ? p.weight[target] : 1;
  }
  return sum;
}

__device__ double sum_of_block(double x, Shared& shared) {
  return reduce_block(x, 0.0, reinterpret_cast<double*>(shared.scratch), Add());
}

__global__ void sum_row_weights(const __grid_constant__ Batch b, double* weights) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const double sum =
      sum_of_block(weight_of_rows(b.p, first, static_cast<int64_t>(gridDim.x) * blockDim.x), shared);
  if (threadIdx.x == 0) weights[blockIdx.x] = sum;
}

__device__ Scalars prepare(const Batch& b, Shared& shared) {
  const LossRows& p = b.p;
  if (threadIdx.x < kMostCounts) shared.counts[threadIdx.x] = 0;
  __syncthreads();
  Scalars s{static_cast<float>(b.numbers.label_smoothing.read()),
            static_cast<float>(b.numbers.z_loss.read()),
            static_cast<float>(b.numbers.softcap.read()),
            static_cast<float>(p.classes),
            1,
            false};
  if (s.smoothing > 0 && p.weight) {
    double sum = 0;
    for (int64_t c = threadIdx.x; c < p.classes; c += blockDim.x) sum += p.weight[c];
    s.weight_sum = sum_of_block(sum, shared);
  }
  if (!p.out) return s;
  double denominator = 1, scale = b.numbers.grad_scale.read();
  if (p.backward) {
    denominator = *p.saved_denominator;
    if (p.scale_stride == 0) scale *= *p.scale_of_row;
  } else if (normalized(b)) {
    denominator = b.numbers.normalizer.read();
  } else if (b.reduction == kMean) {
    const int thread = threadIdx.x;
    denominator = sum_of_block(
        b.weights ? (thread < kCountBlocks ? b.weights[thread] : 0) : weight_of_rows(p, thread, blockDim.x),
        shared);
  }
  s.scale = scale / denominator;
  s.zero = denominator == 0;
  return s;
}

template <class T, bool kCap>
__device__ Row open_row(const LossRows& p, const Scalars& s, int64_t i) {
  const int64_t target = target_of(p, i);
  Row row{i, -1, target == p.ignore_index, 0, 0, 0};
  if (!is_valid(p, target)) return row;
  const T* logits = static_cast<const T*>(p.logits) + p.logits_at.offset(i);
  row.target = target;
  row.class_weight = p.weight ? p.weight[target] : 1;
  row.logit = widen(logits[target]);
  row.x = capped<kCap>(row.logit, s.softcap);
  if (!p.second) return row;
  const int64_t second = p.second[i];
  if (second >= 0 && second < p.classes) row.second_x = capped<kCap>(widen(logits[second]), s.softcap);
  return row;
}

// The state of a row before its logits are read or, in backward, after.
__device__ State state_of(const LossRows& p, const Row& row) {
  if (p.backward) return {p.saved_max[row.i], p.saved_sum[row.i], 0, 0};
  return {row.x == row.x ? row.x : -INFINITY, 0, 0, 0};
}

// The logits of classes first, first + step, ...; those outside of the row are -inf.
template <bool kCap, int n>
__device__ void absorb(const LossRows& p, const Scalars& s, const Row& row, const float (&logits)[n],
                       int first, int step, State& state) {
  const unsigned classes = p.classes, target = row.target;
  float x[n], top = state.top;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const unsigned c = first + j * step;  // huge before the row
    state.ahead += logits[j] > row.logit || (logits[j] == row.logit && c < target);
    x[j] = logits[j];
    if (kCap) x[j] = c < classes ? capped<kCap>(logits[j], s.softcap) : -INFINITY;
    top = fmaxf(top, x[j]);  // leaves out NaN, which the sum keeps
  }
  if (top > state.top) {
    state.others *= __expf(state.top - top);
    state.top = top;
  }
  const float shift = top == -INFINITY ? 0 : top;  // -inf - -inf would be NaN
#pragma unroll
  for (int j = 0; j < n; ++j)
    state.others += static_cast<unsigned>(first + j * step) == target ? 0 : __expf(x[j] - shift);
  if (s.smoothing > 0) {
    const float reference = row.reference();
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const unsigned c = first + j * step;
      if (c < classes) state.smooth += (p.weight ? p.weight[c] : 1) * (x[j] - reference);
    }
  }
}

// The gradient of a row: of_softmax * exp(x - top) - everywhere * w_c, and a value of its own at the target.
// That at a second target is written over it.
struct Gradient {
  bool zero;
  int target, second;  // second: -1 for none
  float top, of_softmax, everywhere, at_target, at_second;

  template <bool kCap>
  __device__ float at(const LossRows& p, const Scalars& s, int c, float logit) const {
    if (zero) return 0;
    const float x = capped<kCap>(logit, s.softcap);
    float g = of_softmax * (x - top <= kLowestExponent ? 0 : __expf(x - top));
    if (everywhere != 0) g -= everywhere * (p.weight ? p.weight[c] : 1);
    if (c == target) g = at_target;
    if (kCap) g *= 1 - (x / s.softcap) * (x / s.softcap);
    return fabsf(g) < kSmallest ? 0 : g;
  }
};

// The weights of a row's targets. Looked up when the row is closed, so that no registers hold them before.
struct Weights {
  float of_target = 0;  // class weight times share
  int second = -1;      // with MixUp and a share: the second target
  float second_class = 0, of_second = 0, share_sum = 1;
};

__device__ Weights weights_of(const LossRows& p, const Row& row) {
  Weights w{row.class_weight};
  if (!p.second || row.target < 0) return w;
  const int64_t second = p.second[row.i];
  const float share = p.shares[p.rows + row.i];
  w.of_target *= p.shares[row.i];
  w.share_sum = p.shares[row.i] + share;
  if (share == 0 || second < 0 || second >= p.classes) return w;
  w.second = second;
  w.second_class = p.weight ? p.weight[second] : 1;
  w.of_second = share * w.second_class;
  return w;
}

// The loss and the counts of a row whose logits have all been absorbed, added up by one thread of its group.
__device__ Gradient close_row(const Batch& b, const Scalars& s, const Row& row, const State& state,
                              bool leader, Tally& tally, Shared& shared) {
  const LossRows& p = b.p;
  const bool valid = row.target >= 0;
  const Weights w = weights_of(p, row);
  const float e_target = expf(row.x - state.top), sum = state.others + e_target;
  const float log_sum = row.x == state.top ? log1pf(state.others) : logf(sum), lse = state.top + log_sum;
  const bool finite = is_finite(state.top) && sum == sum;
  if (leader && !p.backward) {
    double loss = 0;
    if (valid) {
      loss = static_cast<double>(w.of_target) * (1 - s.smoothing) * (log_sum - (row.x - state.top));
      if (p.second) {  // not products with 0: beside a -inf logit the other factor is inf
        if (w.of_target == 0) loss = 0;
        if (w.of_second != 0)
          loss +=
              static_cast<double>(w.of_second) * (1 - s.smoothing) * (log_sum - (row.second_x - state.top));
      }
      if (s.smoothing > 0) {
        const double above = log_sum + (static_cast<double>(state.top) - row.reference());
        loss += static_cast<double>(s.smoothing) / p.classes * w.share_sum *
                (s.weight_sum * above - state.smooth);
      }
      if (s.z_loss != 0) loss += static_cast<double>(s.z_loss) * w.share_sum * lse * lse;
      if (!finite) loss = NAN;
    }
    tally.loss += loss;
    tally.weight += w.of_target + w.of_second;
    const bool bad = !valid && !row.ignored;
    if (p.row_loss) p.row_loss[row.i] = bad && !b.counts ? NAN : loss;
    if (p.saved_max) {
      p.saved_max[row.i] = finite ? state.top : NAN;
      p.saved_sum[row.i] = state.others;
    }
    atomicAdd(&shared.counts[valid ? kValid : row.ignored ? kIgnored : kBadTargets], 1u);
    if (valid && !finite) atomicAdd(&shared.counts[kNonfinite], 1u);
    for (int k = 0; k < p.num_topk; ++k)
      if (valid && finite && state.ahead < b.topk[k]) atomicAdd(&shared.counts[kRowCounts + k], 1u);
  }
  if (!p.out) return {};
  const float scale = p.backward && p.scale_stride ? s.scale * p.scale_of_row[row.i] : s.scale;
  const float on_target = w.of_target * (1 - s.smoothing) * scale,
              everywhere = s.smoothing / p.classes * w.share_sum * scale;
  const float on_second = p.second ? w.of_second * (1 - s.smoothing) * scale : 0;  // 0 * inf is NaN
  float rest = on_second;
  if (s.smoothing > 0) rest += everywhere * s.weight_sum;
  if (s.z_loss != 0) rest += 2 * s.z_loss * w.share_sum * lse * scale;
  const float at_target =
      rest * (e_target / sum) - on_target * (state.others / sum) - everywhere * row.class_weight;
  const float of_softmax = finite ? (on_target + rest) / sum : NAN;
  float at_second = 0;
  if (w.second >= 0) {
    at_second = of_softmax * expf(row.second_x - state.top) - everywhere * w.second_class - on_second;
    if (s.softcap != 0) at_second *= 1 - (row.second_x / s.softcap) * (row.second_x / s.softcap);
    if (fabsf(at_second) < kSmallest) at_second = 0;
  }
  return {!valid || s.zero,         row.target, w.second, state.top, of_softmax, everywhere,
          finite ? at_target : NAN, at_second};
}

// Adds up the block's tally; the last of the blocks adds up all of them, in order, and writes the results.
__device__ void finish(const Batch& b, const Tally& tally, int block, int blocks, Shared& shared) {
  if (!b.ticket) return;
  const int columns = 2 + kRowCounts + b.p.num_topk, thread = threadIdx.x;
  const double loss = sum_of_block(tally.loss, shared), weight = sum_of_block(tally.weight, shared);
  for (int column = thread; column < columns; column += blockDim.x)
    b.partials[static_cast<int64_t>(column) * blocks + block] = column == 0   ? loss
                                                                : column == 1 ? weight
                                                                              : shared.counts[column - 2];
  if (!is_last(b.ticket, blocks, &shared.flag)) return;
  for (int column = thread / kWarp; column < columns; column += blockDim.x / kWarp) {
    double sum = 0;
    for (int64_t i = thread % kWarp; i < blocks; i += kWarp)
      sum += __ldcg(b.partials + static_cast<int64_t>(column) * blocks + i);
    shared.totals[column] = reduce_lanes(sum, kWarp, Add());
  }
  __syncthreads();
  if (thread != 0) return;
  const double loss_sum = shared.totals[0], weight_sum = shared.totals[1], *counts = shared.totals + 2;
  double denominator = b.reduction == kMean ? weight_sum : 1;
  if (normalized(b)) denominator = b.numbers.normalizer.read();
  if (b.p.saved_denominator) *b.p.saved_denominator = denominator;
  const bool unknown =
      !b.counts && counts[kBadTargets] > 0;  // a meter reports bad targets; else the loss has to
  if (b.loss) *b.loss = denominator == 0 || unknown ? NAN : loss_sum / denominator;
  if (!b.counts) return;
  b.sums[kLossSum] += loss_sum;
  b.sums[kWeightSum] += weight_sum;
  if (counts[kValid] > 0) b.sums[kBatchMeanSum] += loss_sum / weight_sum;
  for (int i = 0; i < kRowCounts; ++i) b.counts[i] += counts[i];
  b.counts[kBatches] += 1;
  b.counts[kBatchesWithValid] += counts[kValid] > 0;
  for (int k = 0; k < b.p.num_topk; ++k) b.counts[kFirstCorrect + k] += counts[kRowCounts + k];
}

}  // namespace
}  // namespace esper::cuda
