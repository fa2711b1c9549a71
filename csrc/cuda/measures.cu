// What a Meter measures besides loss and correct predictions: the fields of LossRows in ../call.h, and how
// they are added up. The rows are read in a launch of their own, before the gradient may be written over
// them.
#include <algorithm>
#include <cstdint>

#include "cuda/driver.h"
#include "cuda/rows.h"

namespace esper::cuda {
namespace {

constexpr int kThreads = 256, kFewClasses = 1024;  // threads of a block; classes up to which a warp is enough
constexpr int kAddingThreads = kMostWarps * kWarp;
constexpr int64_t kSharedBytes = kMostWarps * sizeof(double);
// Confidences are added up as multiples of 1 / this, because integers give the same sum in any order.
constexpr double kFixedPoint = 1 << 30;

struct Measuring {
  LossRows p;
  Number softcap;
  bool has_softcap;
  MeasurePlan plan;
  double* sums;  // a meter's, from the first place of the measures on; likewise counts
  int64_t* counts;
  unsigned long long* confidence;  // of each bin, in fixed point, 0 before
};

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Min {
  __device__ int operator()(int a, int b) const { return min(a, b); }
};

template <class T>
__device__ T reduced(T x, T identity) {
  return reduce_block(x, identity, reinterpret_cast<T*>(shared_memory()), Add());
}

// The measures of a row, by all threads of a block.
template <class T>
__device__ void measure_row(const Measuring& m, int64_t i, float softcap) {
  const LossRows& p = m.p;
  const T* row = static_cast<const T*>(p.logits) + p.logits_at.offset(i);
  const int classes = p.classes;
  const auto x_of = [&](float logit) { return m.has_softcap ? softcap * tanhf(logit / softcap) : logit; };
  float mine = -INFINITY;  // the largest logit as stored
  int place = INT32_MAX;
  for (int c = threadIdx.x; c < classes; c += blockDim.x) {
    const float logit = widen(row[c]);
    if (!(logit > mine) && !(logit == mine && place == INT32_MAX)) continue;  // the first may be -inf
    mine = logit;
    place = c;
  }
  const float largest = reduce_block(mine, -INFINITY, reinterpret_cast<float*>(shared_memory()), Max());
  place = mine == largest ? place : INT32_MAX;
  place = reduce_block(place, INT32_MAX, reinterpret_cast<int*>(shared_memory()), Min());

  const float top = x_of(largest);
  float second = -INFINITY;
  double sum = 0, squares = 0, products = 0;
  for (int c = threadIdx.x; c < classes; c += blockDim.x) {
    const float z = x_of(widen(row[c])) - top, e = expf(z);
    sum += e;
    squares += e * e;
    if (!m.plan.entropy) continue;
    products += e * fmaxf(z, -100);  // not 0 * -inf
    if (c != place) second = fmaxf(second, z);
  }
  sum = reduced(sum, 0.0);
  squares = reduced(squares, 0.0);
  if (m.plan.entropy) {
    products = reduced(products, 0.0);
    second = reduce_block(second, -INFINITY, reinterpret_cast<float*>(shared_memory()), Max());
  }
  const bool finite = top - top == 0 && sum == sum;
  if (threadIdx.x != 0 || !finite) return;
  const double log_sum = log(sum), z_target = x_of(widen(row[target_of(p, i)])) - top;
  float* to = p.row_measures + i;
  p.predicted[i] = place;
  to[kConfidence * p.rows] = 1 / sum;
  to[kNll * p.rows] = log_sum - z_target;
  to[kBrier * p.rows] = fmax(1 - 2 * exp(z_target) / sum + squares / (sum * sum), 0.0);
  to[kEntropy * p.rows] = m.plan.entropy ? log_sum - products / sum : 0;
  to[kMargin * p.rows] = m.plan.entropy ? -second : 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads) measure_rows(const __grid_constant__ Measuring m) {
  const float softcap = m.softcap.read();
  for (int64_t i = blockIdx.x; i < m.p.rows; i += gridDim.x) {
    if (threadIdx.x == 0) m.p.predicted[i] = -1;
    if (is_valid(m.p, target_of(m.p, i))) measure_row<T>(m, i, softcap);
  }
}

// One block: the order of its sums is fixed, and a row takes it little.
__global__ void __launch_bounds__(kAddingThreads) add_measures(const __grid_constant__ Measuring m) {
  const LossRows& p = m.p;
  const int64_t classes = m.plan.per_class, bins = m.plan.bins;
  int64_t *const bin_rows = m.counts + m.plan.num_class_counts(), *const bin_correct = bin_rows + bins;
  const auto add = [](int64_t* to, bool one) {
    if (one) atomicAdd(reinterpret_cast<unsigned long long*>(to), 1ull);
  };
  double of_thread[kNumRowMeasures] = {};
  for (int64_t i = threadIdx.x; i < p.rows; i += blockDim.x) {
    const int64_t predicted = p.predicted[i], target = target_of(p, i);
    if (predicted < 0) continue;
    for (int k = kNll; k < kNumRowMeasures; ++k) of_thread[k] += p.row_measures[k * p.rows + i];
    const bool correct = predicted == target;
    if (m.plan.confusion) {
      add(m.counts + target * classes + predicted, true);
    } else if (classes) {
      add(m.counts + target, true);
      add(m.counts + classes + target, correct);
      add(m.counts + 2 * classes + predicted, true);
    }
    if (!bins) continue;
    const float confidence = p.row_measures[kConfidence * p.rows + i];
    const int64_t scaled = confidence * static_cast<float>(bins), bin = scaled < bins ? scaled : bins - 1;
    add(bin_rows + bin, true);
    add(bin_correct + bin, correct);
    atomicAdd(m.confidence + bin, static_cast<unsigned long long>(confidence * kFixedPoint + 0.5));
  }
  for (int k = kNll; k < kNumRowMeasures; ++k) {
    const double sum = reduced(of_thread[k], 0.0);
    if (threadIdx.x == 0) m.sums[k - kNll] += sum;
  }
  __threadfence();
  __syncthreads();
  for (int64_t bin = threadIdx.x; bin < bins; bin += blockDim.x)
    m.sums[kNumRowMeasures - kNll + bin] += __ldcg(m.confidence + bin) / kFixedPoint;
}

template <class T>
cudaError_t run(const Measuring& m, cudaStream_t stream) {
  const int threads = m.p.classes <= kFewClasses ? kWarp : kThreads;
  const int64_t most = static_cast<int64_t>(current_device().multiprocessors) * (2048 / threads);
  const Grid grid{static_cast<int>(std::min(m.p.rows, most)), threads, kSharedBytes};
  return launch(measure_rows<T>, grid, stream, m);
}

}  // namespace

void measure(const LossCall& call, const Allocate& allocate, cudaStream_t stream) {
  Measuring m{
      rows_of(call), call.numbers.softcap, call.numbers.has_softcap, measures_of(call), nullptr, nullptr,
      nullptr};
  LossRows& p = m.p;
  if (!call.counts || !m.plan.any() || p.rows == 0) return;
  m.sums = static_cast<double*>(call.sums->data) + kNumSums;
  m.counts = static_cast<int64_t*>(call.counts->data) + kFirstCorrect + call.topk.size();
  const int64_t row_bytes = 4 * (kNumRowMeasures + 1), bin_bytes = 8 * m.plan.bins;
  char* memory = static_cast<char*>(allocate(bin_bytes + row_bytes * p.rows));
  m.confidence = reinterpret_cast<unsigned long long*>(memory);
  p.row_measures = reinterpret_cast<float*>(memory + bin_bytes);
  p.predicted = reinterpret_cast<int32_t*>(p.row_measures + kNumRowMeasures * p.rows);
  if (bin_bytes) check(cudaMemsetAsync(m.confidence, 0, bin_bytes, stream));
  check(p.dtype == kFloat32    ? run<float>(m, stream)
        : p.dtype == kBFloat16 ? run<BFloat16>(m, stream)
                               : run<Float16>(m, stream));
  check(launch(add_measures, Grid{1, kAddingThreads, kSharedBytes}, stream, m));
}

}  // namespace esper::cuda
