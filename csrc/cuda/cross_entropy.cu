// Cross entropy over rows: loss, counts, accumulation and gradient in one launch. The fields of CrossEntropy
// are described in ../call.h.
//
// Few classes: a group of lanes a row, the row in registers. More: a block a row, or a cluster of blocks,
// each with a part of the row in its shared memory, so that it is read once. Rows that do not fit are read
// twice, from both ends, so that the second read finds the latest part in the cache.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/driver.h"
#include "cuda/rows.h"

namespace esper::cuda {
namespace {

// As in reference.py: gradients are 0 in the same places on every backend.
constexpr float kLowestExponent = -86;
constexpr float kSmallest = 1.17549435e-38f;
constexpr int kFewThreads = 128, kManyThreads = 256;
constexpr int kFewBlocks = 6,
              kManyBlocks = 2;  // at least, on a multiprocessor; kFewBlocks / 2 of 1024 classes
constexpr int kFewClasses = 1024;
constexpr int kKeptBytes = 110 << 10;  // of a row in one block, where clusters allow: two blocks then fit
constexpr int kLargestCluster = 8;     // that every chip with clusters takes
constexpr int kCountHere = 128 << 10;  // bytes of targets that every block looks through by itself
constexpr int kCountBlocks = 64;       // that count larger ones first
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
  float weight, logit, x;  // of the target; x: after softcap
  __device__ float reference() const { return x - x == 0 ? x : 0; }
};

// What a group of threads has seen of a row. The target is left out of the sum: where it has nearly all of
// the softmax, 1 - softmax would otherwise be rounding errors.
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
  row.target = target;
  row.weight = p.weight ? p.weight[target] : 1;
  row.logit = widen(static_cast<const T*>(p.logits)[p.logits_at.offset(i) + target]);
  row.x = capped<kCap>(row.logit, s.softcap);
  return row;
}

// Of a row before its logits are read; of one that the backward finds, after.
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
struct Gradient {
  bool zero;
  int target;
  float top, of_softmax, everywhere, at_target;

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

// The loss and the counts of a row whose logits have all been absorbed, added up by one thread of its group.
__device__ Gradient close_row(const Batch& b, const Scalars& s, const Row& row, const State& state,
                              bool leader, Tally& tally, Shared& shared) {
  const LossRows& p = b.p;
  const bool valid = row.target >= 0;
  const float e_target = expf(row.x - state.top), sum = state.others + e_target;
  const float log_sum = row.x == state.top ? log1pf(state.others) : logf(sum), lse = state.top + log_sum;
  const bool finite = is_finite(state.top) && sum == sum;
  if (leader && !p.backward) {
    double loss = 0;
    if (valid) {
      loss = static_cast<double>(row.weight) * (1 - s.smoothing) * (log_sum - (row.x - state.top));
      if (s.smoothing > 0) {
        const double above = log_sum + (static_cast<double>(state.top) - row.reference());
        loss += static_cast<double>(s.smoothing) / p.classes * (s.weight_sum * above - state.smooth);
      }
      if (s.z_loss != 0) loss += static_cast<double>(s.z_loss) * lse * lse;
      if (!finite) loss = NAN;
    }
    tally.loss += loss;
    tally.weight += row.weight;
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
  const float on_target = row.weight * (1 - s.smoothing) * scale,
              everywhere = s.smoothing / p.classes * scale;
  float rest = 0;
  if (s.smoothing > 0) rest += everywhere * s.weight_sum;
  if (s.z_loss != 0) rest += 2 * s.z_loss * lse * scale;
  const float at_target =
      rest * (e_target / sum) - on_target * (state.others / sum) - everywhere * row.weight;
  return {!valid || s.zero,        row.target, state.top, finite ? (on_target + rest) / sum : NAN, everywhere,
          finite ? at_target : NAN};
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

template <class T, bool kCap, int kPerLane, int kLanes>
__global__ void __launch_bounds__(kFewThreads, kPerLane > 8 ? kFewBlocks / 2 : kFewBlocks)
    cross_entropy_warp_rows(const __grid_constant__ Batch b) {
  const int lanes = kLanes ? kLanes : b.lanes;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const LossRows& p = b.p;
  const Scalars s = prepare(b, shared);
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
  Tally tally;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * groups; begin < p.rows;
       begin += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t i = begin + group;
    const bool there = i < p.rows;
    const Row row = there ? open_row<T, kCap>(p, s, i) : Row{i, -1, false, 0, 0, 0};
    State state = there ? state_of(p, row) : State{};
    float logits[kPerLane];
    if (row.target >= 0) {
      const T* at = static_cast<const T*>(p.logits) + p.logits_at.offset(i);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int c = lane + j * lanes;
        logits[j] = c < p.classes ? widen(at[c]) : -INFINITY;
      }
      if (!p.backward) absorb<kCap>(p, s, row, logits, lane, lanes, state);
    }
    if (!p.backward) state = reduce_lanes(state, lanes, Merge());
    if (!there) continue;  // only in the last round
    const Gradient gradient = close_row(b, s, row, state, lane == 0, tally, shared);
    if (!p.out) continue;
    T* out = static_cast<T*>(p.out) + p.out_at.offset(i);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int c = lane + j * lanes;
      if (c < p.classes) out[c] = narrow<T>(gradient.template at<kCap>(p, s, c, logits[j]));
    }
  }
  finish(b, tally, blockIdx.x, gridDim.x, shared);
}

template <class T, bool kCap, bool kKept>
__global__ void __launch_bounds__(kManyThreads, kManyBlocks)
    cross_entropy_block_rows(const __grid_constant__ Batch b) {
  constexpr int kSize = Vector<T>::kSize;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  Vector<T>* kept = reinterpret_cast<Vector<T>*>(shared_memory() + kSharedBytes);  // each thread its own
  const LossRows& p = b.p;
  const Scalars s = prepare(b, shared);
  const int parts = kKept ? cluster().num_blocks() : 1, part = kKept ? cluster().block_rank() : 0;
  const unsigned classes = p.classes;
  const int teams = gridDim.x / parts, team = blockIdx.x / parts;
  Tally tally;
  int turn = 0;
  for (int64_t i = team; i < p.rows; i += teams) {
    const Row row = open_row<T, kCap>(p, s, i);
    const Span<const T> in{static_cast<const T*>(p.logits) + p.logits_at.offset(i), p.classes};
    const int64_t begin = in.vectors() * part / parts, end = in.vectors() * (part + 1) / parts;
    State state = state_of(p, row);
    if (row.target >= 0 && !p.backward) {
      for_vectors(in, begin, end, false, [&](int64_t v, const Vector<T>& x) {
        if (kKept) kept[v - begin] = x;
        float logits[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) logits[j] = widen(x.x[j]);
        absorb<kCap>(p, s, row, logits, in.first(v), 1, state);
      });
      constexpr State nothing{-INFINITY, 0, 0, 0};
      state = reduce_block(state, nothing, shared.scratch, Merge());
      if (parts > 1) {
        turn = 1 - turn;  // the other slot may still be read
        if (threadIdx.x == 0) shared.of_block[turn] = state;
        cluster().sync();
        const int lane = threadIdx.x % kWarp;
        state = lane < parts ? *cluster().map_shared_rank(&shared.of_block[turn], lane) : nothing;
        state = reduce_lanes(state, kWarp, Merge());
      }
    }
    const Gradient gradient = close_row(b, s, row, state, threadIdx.x == 0 && part == 0, tally, shared);
    if (!p.out) continue;
    const Span<T> out{static_cast<T*>(p.out) + p.out_at.offset(i), p.classes};
    const auto write = [&](int64_t v, const Vector<T>& x) {
      const int64_t first = in.first(v);
      Vector<T> g;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const unsigned c = first + j;  // huge before the row
        g.x[j] = narrow<T>(c < classes ? gradient.template at<kCap>(p, s, c, widen(x.x[j])) : 0);
      }
      out.store(first, g);
    };
    if (gradient.zero) {
      for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) out.store(in.first(v), Vector<T>{});
    } else if (kKept) {
      for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) write(v, kept[v - begin]);
    } else {
      for_vectors(in, begin, end, !p.backward, write);
    }
  }
  if (parts > 1) cluster().sync();  // nobody leaves while its shared memory may be read
  if (part == 0) finish(b, tally, team, teams, shared);
}

// Which kernel, and on what grid. `lanes` 0: cross_entropy_block_rows.
struct Plan {
  Grid grid;
  int lanes = 0;
  bool kept = false;
};

Plan plan_of(const LossRows& p, const Device& device) {
  Plan plan{{0, kManyThreads, kSharedBytes}};
  Grid& grid = plan.grid;
  int64_t teams = p.rows, room;  // what works on rows; how many a multiprocessor holds
  if (p.classes <= kFewClasses) {
    for (plan.lanes = 1; plan.lanes < kWarp && plan.lanes * 8 < p.classes;) plan.lanes *= 2;
    grid.threads = kFewThreads;
    teams = (p.rows * plan.lanes + kFewThreads - 1) / kFewThreads;
    room = plan.lanes * 8 < p.classes ? kFewBlocks / 2 : kFewBlocks;
  } else {
    const int64_t vectors = p.classes * bytes_of(p.dtype) / 16 + 2;
    const auto bytes = [&](int parts) { return (vectors / parts + 2) * 16 + kSharedBytes; };
    const int most = device.clusters ? kLargestCluster : 1;
    const int64_t wanted = std::min(kKeptBytes, device.shared_bytes_of_block);
    int parts = 1;
    while (parts < most && bytes(parts) > wanted) parts *= 2;
    plan.kept = p.out && !p.backward && bytes(parts) <= device.shared_bytes_of_block;
    if (plan.kept) grid.shared_bytes = bytes(grid.cluster = parts);
    if (vectors / grid.cluster <= 4 * 128) grid.threads = 128;  // so that each has several loads in flight
    room = std::min<int64_t>(kManyBlocks * kManyThreads / grid.threads,
                             device.shared_bytes_of_multiprocessor / (grid.shared_bytes + 1024));
  }
  const int64_t most = std::max<int64_t>(1, device.multiprocessors * room / grid.cluster);
  grid.blocks = static_cast<int>(std::max<int64_t>(1, std::min(teams, most))) * grid.cluster;
  return plan;
}

using Kernel = void (*)(Batch);

template <class T, bool kCap>
Kernel kernel_of(const LossRows& p, const Plan& plan) {
  if (plan.lanes * 8 >= p.classes) return cross_entropy_warp_rows<T, kCap, 8, 0>;
  if (plan.lanes) return cross_entropy_warp_rows<T, kCap, kFewClasses / kWarp, kWarp>;
  return plan.kept ? cross_entropy_block_rows<T, kCap, true> : cross_entropy_block_rows<T, kCap, false>;
}

void run(Batch& b, const Plan& plan, cudaStream_t stream) {
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    return b.numbers.has_softcap ? kernel_of<T, true>(b.p, plan) : kernel_of<T, false>(b.p, plan);
  };
  b.lanes = plan.lanes;
  const Dtype dtype = b.p.dtype;
  const Kernel kernel = dtype == kFloat32    ? of_type(0.0f)
                        : dtype == kBFloat16 ? of_type(BFloat16())
                                             : of_type(Float16());
  check(launch(kernel, plan.grid, stream, b));
}

}  // namespace

bool has_kernels() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, sum_row_weights) == cudaSuccess;
  if (!found) cudaGetLastError();  // or torch would report it as its own
  return found;
}

void check(const LossCall& call) {
  if (call.topk.size() > kMostTopk)
    throw std::invalid_argument("on CUDA a Meter counts correct@k for up to " + std::to_string(kMostTopk) +
                                " k, got " + std::to_string(call.topk.size()));
  if (call.logits.sizes[call.logits.dims - 1] > INT32_MAX)
    throw std::invalid_argument("on CUDA there may be up to 2^31 - 1 classes");
}

void cross_entropy(const LossCall& call, unsigned* ticket, const Allocate& allocate, cudaStream_t stream) {
  Batch b{};
  b.p = rows_of(call);
  b.numbers = call.numbers;
  b.reduction = call.reduction;
  std::copy(call.topk.begin(), call.topk.end(), b.topk);
  if (call.loss && call.reduction != kNone) b.loss = static_cast<float*>(call.loss->data);
  if (call.counts) {
    b.sums = static_cast<double*>(call.sums->data);
    b.counts = static_cast<int64_t*>(call.counts->data);
  }
  const Plan plan = plan_of(b.p, current_device());

  const bool weights =
      b.p.out && b.reduction == kMean && !normalized(b) && b.p.rows * b.p.target_bytes > kCountHere;
  const bool sums = b.loss || b.counts || b.p.saved_denominator;
  const int64_t blocks = plan.grid.blocks / plan.grid.cluster;
  const int64_t words = (2 + kRowCounts + b.p.num_topk) * blocks;
  double* memory = nullptr;
  if (weights || sums) memory = static_cast<double*>(allocate(8 * (kCountBlocks + words + 1)));
  if (weights) {
    check(launch(sum_row_weights, Grid{kCountBlocks, kFewThreads, kSharedBytes}, stream, b, memory));
    b.weights = memory;
  }
  if (sums) {
    b.partials = memory + kCountBlocks;
    b.ticket = ticket ? ticket : reinterpret_cast<unsigned*>(b.partials + words);
    if (!ticket) check(cudaMemsetAsync(b.ticket, 0, sizeof(unsigned), stream));
  }
  run(b, plan, stream);
}

void cross_entropy_backward(const LossCall& call, const Array& grad_output, cudaStream_t stream) {
  Batch b{};
  b.p = rows_of(call, &grad_output);
  b.numbers = call.numbers;
  b.reduction = call.reduction;
  if (b.p.rows == 0) return;
  run(b, plan_of(b.p, current_device()), stream);
}

}  // namespace esper::cuda
