// Cross entropy of a row, as a group of threads computes it: what it has seen so far, its loss and counts,
// its gradient; and how blocks add up what their rows gave. cross_entropy.cu has the kernels that use it.
#pragma once
#include "cuda/cross_entropy_measures.h"
#include "cuda/driver.h"

namespace esper::cuda {
namespace {  // part of cross_entropy.cu

constexpr int kFewThreads = 128;               // of a block
constexpr int kManyThreads = 512;              // on a multiprocessor, at least: in one block or more
constexpr int kWarps = kManyThreads / kWarp;   // of a block, at most
constexpr int kFewClasses = 256;               // up to which lanes have rows in registers
constexpr int kAlonePerLane = 12;              // classes up to which a lane takes a row by itself
constexpr int kFewPerLane = kFewClasses / 16;  // classes of a lane otherwise, at most
// Blocks on a multiprocessor, at least, so that no lane spills: those with 16 classes need more registers, as
// do measures, and more of them compiled for Blackwell.
constexpr int kFewBlocks = 5;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int few_blocks(bool alone, bool measured) { return kFewBlocks - !alone - measured; }
#else
constexpr int few_blocks(bool alone, bool measured) { return kFewBlocks - (!alone && measured); }
#endif
constexpr int kWordsOfWarp = 256;      // of rows up to which a warp takes a row by itself
constexpr int kKeptBytes = 110 << 10;  // of a row in one block, where clusters allow: two blocks then fit
constexpr int kLargestCluster = 8;     // the largest that every chip with clusters supports
constexpr int kCountHere = 128 << 10;  // bytes of targets up to which every block counts all of them
constexpr int kCountBlocks = 64;       // blocks that count the targets first if there are more
constexpr int kRowCounts = kBadTargets + 1;          // kValid to kBadTargets, of MeterCount
constexpr int kMostCounts = kRowCounts + kMostTopk;  // then correct@k

struct Batch {
  LossRows p;
  int team;        // threads that share a row
  int kept_words;  // room in shared memory for the row of each team; for few classes, for a tile of rows
  bool logits_adjacent, out_adjacent;  // whether rows lie side by side in memory
  LossNumbers numbers;
  int64_t reduction;
  const double* weights;  // kCountBlocks parts of the sum of the rows' weights; null: add them up here
  float* loss;            // []
  double* sums;           // a meter's, as `counts`
  int64_t *counts, topk[kMostTopk];
  double* partials;  // [columns, blocks]
  unsigned* ticket;  // null where neither loss nor meter is wanted
  Measuring measuring;
};

ESPER_ANYWHERE bool normalized(const Batch& b) { return b.reduction == kMean && b.numbers.has_normalizer; }

template <class S>
struct Shared {
  // By turns: others may still read those of the row before.
  S of_warp[2][kWarps];
  alignas(16) S of_block[2][kLargestCluster];
  Arrivals arrivals[2];  // of of_block
  typename S::Tally of_leader[kWarps];
  double scratch[kWarps];
  double totals[2 + kMostCounts + S::kMeasures];  // see `finish`
  unsigned counts[kMostCounts], flag;
};
template <class S>
constexpr int64_t kSharedBytes = (sizeof(Shared<S>) + 15) / 16 * 16;

// The sum over rows first, first + step, ...
__device__ double weight_of_rows(const LossRows& p, int64_t first, int64_t step) {
  if (!p.weight) {
    int64_t count = 0;
#pragma unroll 4
    for (int64_t i = first; i < p.rows; i += step) count += is_valid(p, target_of(p, i));
    return count;
  }
  double sum = 0;
  for (int64_t i = first; i < p.rows; i += step) {
    const int64_t target = target_of(p, i);
    if (is_valid(p, target)) sum += p.weight[target];
  }
  return sum;
}

template <class S>
__device__ double sum_of_block(double x, Shared<S>& shared) {
  return reduce_block(x, 0.0, shared.scratch, Add());
}

__global__ void sum_row_weights(const __grid_constant__ Batch b, double* weights) {
  Shared<State>& shared = *reinterpret_cast<Shared<State>*>(shared_memory());
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const double sum =
      sum_of_block(weight_of_rows(b.p, first, static_cast<int64_t>(gridDim.x) * blockDim.x), shared);
  if (threadIdx.x == 0) weights[blockIdx.x] = sum;
}

template <class S>
__device__ Scalars prepare(const Batch& b, Shared<S>& shared) {
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

// logits: of row i.
template <class T, bool kCap>
__device__ Row open_row(const LossRows& p, const Scalars& s, int64_t i, int64_t target, const T* logits) {
  Row row{i, -1, target == p.ignore_index, 0, 0, 0};
  if (!is_valid(p, target)) return row;
  row.target = target;
  row.class_weight = p.weight ? p.weight[target] : 1;
  row.logit = widen(logits[target]);
  row.x = capped<kCap>(row.logit, s.softcap);
  if (!p.second) return row;
  const int64_t second = p.second[i];
  if (second >= 0 && second < p.classes) row.second_x = capped<kCap>(widen(logits[second]), s.softcap);
  return row;
}

// Brings row i into the second-level cache, or starts to; thread: of `threads` that do it together.
template <class T>
__device__ void prefetch_row(const LossRows& p, int64_t i, int thread, int threads) {
  if (i >= p.rows) return;
  constexpr int kLine = 128 / sizeof(T);
  const T* row = static_cast<const T*>(p.logits) + p.logits_at.offset(i);
  for (int64_t at = thread * kLine; at < p.classes; at += threads * kLine) prefetch(row + at);
}

// Of a valid row, in backward.
template <class S>
__device__ S saved_state(const LossRows& p, const Row& row) {
  S state{};
  state.top = p.saved_max[row.i];
  state.others = p.saved_sum[row.i];
  return state;
}

// Merges the states of a team's threads into that of the row, which each thread gets. All of them call it.
template <class S>
__device__ S state_of_team(const S& mine, int team, bool smooth, S* of_warp) {
  const S state = merged(mine, kWarp, smooth);
  if (team == kWarp) return state;
  const int lane = threadIdx.x % kWarp, warps = team / kWarp;
  if (lane == 0) of_warp[threadIdx.x / kWarp] = state;
  __syncthreads();
  return merged(of_warp[lane % warps], warps, smooth);
}

// Merges the states of a cluster's blocks into that of the row, which each of their threads gets. All of them
// call it. round: the number of earlier calls.
template <class S>
__device__ S state_of_cluster(const S& mine, int blocks, int round, bool smooth, Shared<S>& shared) {
  constexpr int kMessages = sizeof(S) / sizeof(Words);
  static_assert(sizeof(S) == kMessages * sizeof(Words));
  S* inbox = shared.of_block[round % 2];
  Arrivals* arrivals = &shared.arrivals[round % 2];
  const int thread = threadIdx.x;
  if (thread == 0) expect_messages(arrivals, blocks * sizeof(S));
  if (thread < blocks) {
    Words messages[kMessages];
    memcpy(messages, &mine, sizeof(S));
    Words* const to = reinterpret_cast<Words*>(inbox + cluster().block_rank());
#pragma unroll
    for (int i = 0; i < kMessages; ++i) send_message(to + i, arrivals, thread, messages[i]);
  }
  wait_for_messages(arrivals, round / 2 % 2);
  return merged(inbox[thread % blocks], blocks, smooth);
}

// The weights of a row's targets. They are looked up after the row was read, so that no registers hold them
// meanwhile.
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
template <class S>
__device__ Gradient close_row(const Batch& b, const Scalars& s, const Row& row, const S& state, bool leader,
                              typename S::Tally& tally, Shared<S>& shared) {
  const LossRows& p = b.p;
  const bool valid = row.target >= 0;
  const Weights w = weights_of(p, row);
  const float e_target = expf(row.x - state.top), sum = state.others + e_target;
  const float log_sum = row.x == state.top ? log1pf(state.others) : logf(sum), lse = state.top + log_sum;
  const bool finite = is_finite(state.top) && sum > 0;  // 0: all logits are -inf
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
    if constexpr (S::kMeasures > 0)
      if (valid && finite) add_measures(b.measuring, p, row, s.softcap, state, log_sum, tally);
  }
  if (!p.out) return Gradient{true};
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
  const auto written = [&](float g, float x) {
    if (s.softcap != 0) g *= Gradient::slope(x, s.softcap);
    return fabsf(g) < kSmallest ? 0 : g;
  };
  Gradient gradient{!valid || s.zero};
  gradient.target = row.target;
  gradient.second = w.second;
  gradient.top = state.top;
  gradient.lowered_of_softmax = of_softmax * exp2f(kDrop);
  gradient.everywhere = everywhere;
  gradient.at_target = written(finite ? at_target : NAN, row.x);
  if (w.second >= 0)
    gradient.at_second = written(
        of_softmax * expf(row.second_x - state.top) - everywhere * w.second_class - on_second, row.second_x);
  return gradient;
}

// Adds up the block's tally; the last of the blocks adds up all of them, in order, and writes the results.
// Columns: loss, weight; counts, which a double holds exactly; sums of measures.
template <class S>
__device__ void finish(const Batch& b, const typename S::Tally& tally, int block, int blocks,
                       Shared<S>& shared) {
  if (!b.ticket) return;
  if constexpr (S::kMeasures > 0) {
    __syncthreads();
    add_block_counts(b.measuring);
  }
  const int before = 2 + kRowCounts + b.p.num_topk, columns = before + S::kMeasures, thread = threadIdx.x;
  const double loss = sum_of_block(tally.loss, shared), weight = sum_of_block(tally.weight, shared);
  if constexpr (S::kMeasures > 0)
#pragma unroll
    for (int k = 0; k < S::kMeasures; ++k) {
      const double sum = sum_of_block(tally.measures[k], shared);
      if (thread == 0) b.partials[static_cast<int64_t>(before + k) * blocks + block] = sum;
    }
  for (int column = thread; column < before; column += blockDim.x)
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
  if constexpr (S::kMeasures > 0) write_measures(b.measuring, shared.totals + before);
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
