// What a Meter measures besides loss and correct predictions, for the kernels of cross entropy: what a group
// of threads sees of a row for it while the row is read, and how rows are added up.
#pragma once
#include "cuda/cross_entropy_elements.h"

namespace esper::cuda {
namespace {  // part of cross_entropy.cu

// Confidences are added up as multiples of 1 / this, because integers give the same sum in any order.
constexpr double kFixedPoint = 1 << 30;
constexpr float kDeep = -100;  // exp(kDeep) is 0; in products it stands for what may be -inf

// Up to this many counts, each block counts the rows of few classes by itself: adding each row to the meter
// at once would let many wait for the same counts.
constexpr int64_t kMostBlockCounts = 1024;

// Where a batch's measures go. Without a plan, nothing else is set.
struct Measuring {
  MeasurePlan plan;
  int64_t num_counts;
  double* sums;  // a meter's, from the first place of the measures on; likewise counts
  int64_t* counts;
  unsigned long long* confidence;  // of each bin, in fixed point, 0 before
  int in_block;                    // where a block has counts of its own in its shared memory; 0 for nowhere

  __device__ unsigned long long* block_confidence() const {
    return reinterpret_cast<unsigned long long*>(shared_memory() + in_block);
  }
  __device__ unsigned* block_counts() const {
    return reinterpret_cast<unsigned*>(block_confidence() + plan.bins);
  }
  ESPER_ANYWHERE int64_t block_words() const { return 2 * plan.bins + num_counts; }
};

// The largest logit, as stored.
struct Best {
  float largest = -INFINITY, second = -INFINITY;  // second: of the others; only if entropy is wanted
  int place = INT32_MAX;                          // the first class that has it; stays where all are -inf
};

struct BestOf {
  __device__ Best operator()(const Best& a, const Best& b) const {
    const bool first = a.largest > b.largest || (a.largest == b.largest && a.place < b.place);
    return {fmaxf(a.largest, b.largest), fmaxf(fmaxf(a.second, b.second), fminf(a.largest, b.largest)),
            first ? a.place : b.place};
  }
};

// In the order of RowMeasure, from kNll on.
struct MeasuredTally : Tally {
  double measures[kNumRowMeasures - kNll] = {};
};

struct alignas(16) MeasuredState : State {
  using Tally = MeasuredTally;
  static constexpr int kMeasures = kNumRowMeasures - kNll;
  // As `others`: sums of e^2 and, if entropy is wanted, of e (x - top), where e is exp(x - top).
  float squares, products;
  Best best;
};

__device__ void lift(MeasuredState& state, float top) {
  const float drop = fmaxf(state.top - top, kDeep), factor = exp_of(state.top, top);
  state.products = factor * (state.products + drop * state.others);
  state.squares *= factor * factor;
  lift(static_cast<State&>(state), top);
}

__device__ MeasuredState merged(const MeasuredState& mine, int lanes, bool smooth) {
  const State all = merged(static_cast<const State&>(mine), lanes, smooth);
  MeasuredState lifted = mine;
  if (lifted.top != all.top) lift(lifted, all.top);
  return {all, reduce_lanes(lifted.squares, lanes, Add()), reduce_lanes(lifted.products, lanes, Add()),
          reduce_lanes(mine.best, lanes, BestOf())};
}

// Takes in the classes first, first + step, ...: their logits, and those after softcap, but -inf for the
// target.
template <int n>
__device__ void measure(MeasuredState& state, bool entropy, const float (&logits)[n], const float (&x)[n],
                        int first, int step) {
  Best best;
  const auto look = [&](auto with_entropy) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float e = exp_of(x[j], state.top);
      state.squares += e * e;
      if constexpr (decltype(with_entropy)::value) {
        state.products += e * fmaxf(x[j] - state.top, kDeep);
        best.second = fmaxf(best.second, fminf(best.largest, logits[j]));
      }
      if (!(logits[j] > best.largest)) continue;
      best.largest = logits[j];
      best.place = first + j * step;
    }
  };
  entropy ? look(std::true_type()) : look(std::false_type());
  state.best = BestOf()(state.best, best);
}

// Adds a row that is measured; by one thread.
__device__ void add_measures(const Measuring& m, const LossRows& p, const Row& row, float softcap,
                             const MeasuredState& state, float log_sum, MeasuredTally& tally) {
  const float depth = fmaxf(row.x - state.top, kDeep), e_target = expf(depth), sum = state.others + e_target;
  const int predicted = state.best.place < p.classes ? state.best.place : 0;
  const bool correct = predicted == row.target;
  tally.measures[kNll - kNll] += log_sum - (row.x - state.top);
  tally.measures[kBrier - kNll] += (state.squares + state.others * state.others) / (sum * sum);
  if (p.wants_entropy) {
    float second = state.best.second;
    if (softcap != 0) second = capped<true>(second, softcap);
    tally.measures[kEntropy - kNll] += log_sum - (state.products + e_target * depth) / sum;
    tally.measures[kMargin - kNll] += p.classes == 1 ? INFINITY : state.top - second;
  }
  const auto add = [&](int64_t count, bool one = true) {
    if (!one) return;
    m.in_block ? atomicAdd(m.block_counts() + count, 1u)
               : atomicAdd(reinterpret_cast<unsigned long long*>(m.counts + count), 1ull);
  };
  const int64_t classes = m.plan.per_class, bins = m.plan.bins;
  if (m.plan.confusion) {
    add(row.target * classes + predicted);
  } else if (classes) {
    add(row.target);
    add(classes + row.target, correct);
    add(2 * classes + predicted);
  }
  if (!bins) return;
  const float confidence = 1 / sum;
  const int64_t scaled = confidence * static_cast<float>(bins), bin = scaled < bins ? scaled : bins - 1;
  add(m.plan.num_class_counts() + bin);
  add(m.plan.num_class_counts() + bins + bin, correct);
  const auto fixed = static_cast<unsigned long long>(confidence * kFixedPoint + 0.5);
  m.in_block ? atomicAdd(m.block_confidence() + bin, fixed) : atomicAdd(m.confidence + bin, fixed);
}

// By all threads of a block, before a barrier and the first row.
__device__ void clear_block_counts(const Measuring& m) {
  if (!m.in_block) return;
  unsigned* const words = reinterpret_cast<unsigned*>(m.block_confidence());
  for (int i = threadIdx.x; i < m.block_words(); i += blockDim.x) words[i] = 0;
}

// By all threads of a block, after a barrier and the last row.
__device__ void add_block_counts(const Measuring& m) {
  if (!m.in_block) return;
  for (int i = threadIdx.x; i < m.plan.bins; i += blockDim.x)
    if (const auto sum = m.block_confidence()[i]) atomicAdd(m.confidence + i, sum);
  for (int i = threadIdx.x; i < m.num_counts; i += blockDim.x)
    if (const unsigned long long count = m.block_counts()[i])
      atomicAdd(reinterpret_cast<unsigned long long*>(m.counts + i), count);
}

// By the last of the blocks, with all its threads. totals: those of the tallies.
__device__ void write_measures(const Measuring& m, const double* totals) {
  constexpr int kSums = MeasuredState::kMeasures;
  for (int64_t i = threadIdx.x; i < kSums + m.plan.bins; i += blockDim.x)
    m.sums[i] += i < kSums ? totals[i] : __ldcg(m.confidence + i - kSums) / kFixedPoint;
}

}  // namespace
}  // namespace esper::cuda
