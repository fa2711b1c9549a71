// Cross entropy over rows: loss, counts, accumulation and gradient in one launch. The fields of CrossEntropy
// are described in ../call.h.
//
// Few classes: a group of lanes a row, the row in registers. More: a block a row, or a cluster of blocks,
// each with a part of the row in its shared memory, so that it is read once. Rows that do not fit are read
// twice, from both ends, so that the second read finds the latest part in the cache.
#include <algorithm>

#include "cuda/driver.h"
#include "cuda/rows.h"

namespace esper::cuda {
namespace {

constexpr int kFewThreads = 128, kManyThreads = 256;
constexpr int kFewClasses = 1024;
constexpr int kInFlight = 4;           // vectors that a thread loads before it looks at the first
constexpr int kKeptBytes = 110 << 10;  // of a row in one block, where clusters allow: two blocks then fit
constexpr int kLargestCluster = 8;     // that every chip with clusters takes
constexpr int kCountHere = 128 << 10;  // bytes of targets that every block looks through by itself
constexpr int kCountBlocks = 64;       // that count larger ones first
constexpr int kNumCounts = 4;          // valid, ignored, non-finite, bad; then correct@k
constexpr int kMostCounts = kNumCounts + kMostTopk;

struct Batch {
  CrossEntropy p;  // without the values that Scalars has
  LossNumbers numbers;
  int64_t reduction;
  const double* weights;  // kCountBlocks parts of the sum of the rows' weights; null: add them up here
  float* denominator;     // what is kept for, or found by, the backward
  float* loss;            // []
  double* sums;           // a meter's, as `counts`
  int64_t *counts, topk[kMostTopk];
  double* partial_sums;     // [2, blocks]: loss, weight; null where neither loss nor meter is wanted
  int64_t* partial_counts;  // [kNumCounts + num_topk, blocks]
  unsigned* ticket;
};

// The same for every row, in every thread.
struct Scalars {
  float smoothing, z_loss, weight_sum, scale;
  bool zero;
};

struct Row {
  int64_t i;
  int target;  // -1 where the row is not valid
  bool ignored;
  float weight, logit, x;  // of the target; x: after softcap
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
  double sums[2];
  int64_t totals[kMostCounts];
  unsigned counts[kMostCounts], flag;
};
constexpr int64_t kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;

__device__ State shuffle_xor(State s, int distance) {
  return {cuda::shuffle_xor(s.top, distance), cuda::shuffle_xor(s.others, distance),
          cuda::shuffle_xor(s.smooth, distance), cuda::shuffle_xor(s.ahead, distance)};
}

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

__device__ int64_t target_of(const CrossEntropy& p, int64_t i) {
  if (p.target_bytes == 8) return static_cast<const int64_t*>(p.targets)[i];
  return p.target_bytes == 4 ? static_cast<const int32_t*>(p.targets)[i]
                             : static_cast<const uint8_t*>(p.targets)[i];
}

__device__ bool is_valid(const CrossEntropy& p, int64_t target) {
  return target != p.ignore_index && target >= 0 && target < p.classes;
}

__device__ double weight_of_rows(const CrossEntropy& p, int64_t first, int64_t step) {
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

__global__ void count_weights(const __grid_constant__ Batch b, double* weights) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const double sum =
      sum_of_block(weight_of_rows(b.p, first, static_cast<int64_t>(gridDim.x) * blockDim.x), shared);
  if (threadIdx.x == 0) weights[blockIdx.x] = sum;
}

__device__ Scalars prepare(const Batch& b, Shared& shared) {
  const CrossEntropy& p = b.p;
  if (threadIdx.x < kMostCounts) shared.counts[threadIdx.x] = 0;
  __syncthreads();
  Scalars s{static_cast<float>(b.numbers.smoothing.read()), static_cast<float>(b.numbers.z_loss.read()),
            static_cast<float>(p.classes), 1, false};
  if (s.smoothing > 0 && p.weight) {
    double sum = 0;
    for (int64_t c = threadIdx.x; c < p.classes; c += blockDim.x) sum += p.weight[c];
    s.weight_sum = sum_of_block(sum, shared);
  }
  if (!p.out) return s;
  double denominator = 1, scale = b.numbers.grad_scale.read();
  if (p.backward) {
    denominator = *b.denominator;
    if (p.scale_stride == 0) scale *= *p.scale_of_row;
  } else if (b.reduction == kMean && b.numbers.has_normalizer) {
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
__device__ Row open_row(const CrossEntropy& p, int64_t i) {
  const int64_t target = target_of(p, i);
  Row row{i, -1, target == p.ignore_index, 0, 0, 0};
  if (!is_valid(p, target)) return row;
  row.target = target;
  row.weight = p.weight ? p.weight[target] : 1;
  row.logit = widen(static_cast<const T*>(p.logits)[p.logits_at.offset(i) + target]);
  row.x = capped<kCap>(row.logit, p.softcap);
  return row;
}

__device__ float reference_of(const Row& row) { return is_finite(row.x) ? row.x : 0; }

// Of a row before its logits are read; of one that the backward finds, after.
__device__ State state_of(const CrossEntropy& p, const Row& row) {
  if (p.backward) return {p.saved_max[row.i], p.saved_sum[row.i], 0, 0};
  return {row.x == row.x ? row.x : -INFINITY, 0, 0, 0};
}

// The logits of classes first, first + step, ...; those outside of the row are -inf.
template <bool kCap, int n>
__device__ void absorb(const CrossEntropy& p, const Scalars& s, const Row& row, const float (&logits)[n],
                       int first, int step, State& state) {
  const unsigned classes = p.classes, target = row.target;
  float x[n], top = state.top;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const unsigned c = first + j * step;  // huge before the row
    state.ahead += logits[j] > row.logit || (logits[j] == row.logit && c < target);
    x[j] = logits[j];
    if (kCap) x[j] = c < classes ? capped<kCap>(logits[j], p.softcap) : -INFINITY;
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
    const float reference = reference_of(row);
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
  __device__ float at(const CrossEntropy& p, int c, float logit) const {
    if (zero) return 0;
    const float x = capped<kCap>(logit, p.softcap);
    float g = of_softmax * __expf(x - top);
    if (everywhere != 0) g -= everywhere * (p.weight ? p.weight[c] : 1);
    if (c == target) g = at_target;
    return kCap ? g * (1 - (x / p.softcap) * (x / p.softcap)) : g;
  }
};

// The loss and the counts of a row whose logits have all been absorbed, added up by one thread of its group.
__device__ Gradient close_row(const Batch& b, const Scalars& s, const Row& row, const State& state,
                              bool leader, Tally& tally, Shared& shared) {
  const CrossEntropy& p = b.p;
  const bool valid = row.target >= 0;
  const float e_target = expf(row.x - state.top), sum = state.others + e_target;
  const float log_sum = row.x == state.top ? log1pf(state.others) : logf(sum), lse = state.top + log_sum;
  const bool finite = is_finite(state.top) && sum == sum;
  if (leader && !p.backward) {
    double loss = 0;
    if (valid) {
      loss = static_cast<double>(row.weight) * (1 - s.smoothing) * (log_sum - (row.x - state.top));
      if (s.smoothing > 0) {
        const double above = log_sum + (static_cast<double>(state.top) - reference_of(row));
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
    atomicAdd(&shared.counts[valid ? 0 : row.ignored ? 1 : 3], 1u);
    if (valid && !finite) atomicAdd(&shared.counts[2], 1u);
    for (int k = 0; k < p.num_topk; ++k)
      if (valid && finite && state.ahead < b.topk[k]) atomicAdd(&shared.counts[kNumCounts + k], 1u);
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
  const int num_counts = kNumCounts + b.p.num_topk, thread = threadIdx.x;
  const double loss = sum_of_block(tally.loss, shared), weight = sum_of_block(tally.weight, shared);
  if (thread == 0) {
    b.partial_sums[block] = loss;
    b.partial_sums[blocks + block] = weight;
  }
  if (thread < num_counts)
    b.partial_counts[static_cast<int64_t>(thread) * blocks + block] = shared.counts[thread];
  if (!is_last(b.ticket, blocks, &shared.flag)) return;

  const auto sum_of_blocks = [&](const auto* parts) {
    std::decay_t<decltype(*parts)> sum = 0;
    for (int64_t i = thread % kWarp; i < blocks; i += kWarp) sum += __ldcg(parts + i);
    return reduce_lanes(sum, kWarp, Add());
  };
  for (int column = thread / kWarp; column < 2 + num_counts; column += blockDim.x / kWarp) {
    const int64_t row = static_cast<int64_t>(column) * blocks;
    if (column < 2) {
      shared.sums[column] = sum_of_blocks(b.partial_sums + row);
    } else {
      shared.totals[column - 2] = sum_of_blocks(b.partial_counts + row - 2 * blocks);
    }
  }
  __syncthreads();
  if (thread != 0) return;
  const double loss_sum = shared.sums[0], weight_sum = shared.sums[1];
  const int64_t *totals = shared.totals, valid = totals[0];
  double denominator = 1;
  if (b.reduction == kMean) denominator = b.numbers.has_normalizer ? b.numbers.normalizer.read() : weight_sum;
  if (b.denominator) *b.denominator = denominator;
  const bool unknown = !b.counts && totals[3] > 0;  // a meter reports bad targets; else the loss has to
  if (b.loss) *b.loss = denominator == 0 || unknown ? NAN : loss_sum / denominator;
  if (!b.counts) return;
  b.sums[0] += loss_sum;
  b.sums[1] += weight_sum;
  if (valid) b.sums[2] += loss_sum / weight_sum;
  for (int i = 0; i < kNumCounts; ++i) b.counts[i] += totals[i];
  b.counts[kNumCounts] += 1;
  b.counts[kNumCounts + 1] += valid > 0;
  for (int k = 0; k < b.p.num_topk; ++k) b.counts[kNumCounts + 2 + k] += totals[kNumCounts + k];
}

template <class T, bool kCap, int kPerLane, int kLanes>
__global__ void __launch_bounds__(kFewThreads, kPerLane > 8 ? 3 : 6)
    few_classes(const __grid_constant__ Batch b, int some_lanes) {
  const int lanes = kLanes ? kLanes : some_lanes;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const CrossEntropy& p = b.p;
  const Scalars s = prepare(b, shared);
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
  Tally tally;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * groups; begin < p.rows;
       begin += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t i = begin + group;
    const bool there = i < p.rows;
    const Row row = there ? open_row<T, kCap>(p, i) : Row{i, -1, false, 0, 0, 0};
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
      if (c < p.classes) out[c] = narrow<T>(gradient.template at<kCap>(p, c, logits[j]));
    }
  }
  finish(b, tally, blockIdx.x, gridDim.x, shared);
}

// Calls f(v, vector) for this thread's vectors of a part of a row, with several loads in flight.
template <class T, class F>
__device__ void for_vectors(const Span<const T>& row, int64_t begin, int64_t end, bool reverse, const F& f) {
  Vector<T> x[kInFlight];
  for (int64_t at = begin + threadIdx.x; at < end; at += kInFlight * blockDim.x) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t v = at + j * blockDim.x;
      if (v < end) x[j] = row.load(row.first(reverse ? begin + end - 1 - v : v), narrow<T>(-INFINITY));
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t v = at + j * blockDim.x;
      if (v < end) f(reverse ? begin + end - 1 - v : v, x[j]);
    }
  }
}

template <class T, bool kCap, bool kKept>
__global__ void __launch_bounds__(kManyThreads, 2) many_classes(const __grid_constant__ Batch b) {
  constexpr int kSize = Vector<T>::kSize;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  Vector<T>* kept =
      reinterpret_cast<Vector<T>*>(shared_memory() + kSharedBytes);  // a thread's own, never shared
  const CrossEntropy& p = b.p;
  const Scalars s = prepare(b, shared);
  const int parts = kKept ? cluster_blocks() : 1, part = kKept ? rank_in_cluster() : 0;
  const int teams = gridDim.x / parts, team = blockIdx.x / parts;
  Tally tally;
  int turn = 0;
  for (int64_t i = team; i < p.rows; i += teams) {
    const Row row = open_row<T, kCap>(p, i);
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
        sync_cluster();
        const int lane = threadIdx.x % kWarp;
        state = lane < parts ? *in_block(&shared.of_block[turn], lane) : nothing;
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
        const int c = first + j;
        const bool inside = c >= 0 && c < p.classes;
        g.x[j] = narrow<T>(inside ? gradient.template at<kCap>(p, c, widen(x.x[j])) : 0);
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
  if (parts > 1) sync_cluster();  // nobody leaves while its shared memory may be read
  if (part == 0) finish(b, tally, team, teams, shared);
}

// Which kernel, and on what grid. `lanes` 0: many_classes.
struct Plan {
  Grid grid;
  int lanes = 0;
  bool kept = false;
};

Plan plan_of(const CrossEntropy& p, const Device& device) {
  Plan plan;
  Grid& grid = plan.grid;
  grid.shared_bytes = kSharedBytes;
  int64_t teams = p.rows;
  int room;  // teams that are resident on a multiprocessor
  if (p.classes <= kFewClasses) {
    for (plan.lanes = 1; plan.lanes < kWarp && plan.lanes * 8 < p.classes;) plan.lanes *= 2;
    grid.threads = kFewThreads;
    const int64_t groups = kFewThreads / plan.lanes;
    teams = (p.rows + groups - 1) / groups;
    room = 16;
  } else {
    const int64_t size = 16 / bytes_of(p.dtype), vectors = (p.classes + size - 1) / size + 1;
    const auto bytes = [&](int parts) { return ((vectors + parts - 1) / parts + 1) * 16 + kSharedBytes; };
    if (p.out && !p.backward) {
      const int64_t wanted = std::min(kKeptBytes, device.shared_bytes_of_block);
      while (device.clusters && grid.cluster < kLargestCluster && bytes(grid.cluster) > wanted)
        grid.cluster *= 2;
      plan.kept = bytes(grid.cluster) <= device.shared_bytes_of_block;
      if (plan.kept)
        grid.shared_bytes = bytes(grid.cluster);
      else
        grid.cluster = 1;
    }
    const int64_t share = vectors / grid.cluster / kInFlight;
    for (grid.threads = 128; grid.threads < kManyThreads && grid.threads < share;) grid.threads *= 2;
    room = 2048 / grid.threads;
    if (plan.kept) {
      const int64_t fit = device.shared_bytes_of_multiprocessor / (grid.shared_bytes + 1024);
      room = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(room, fit)));
    }
  }
  const int64_t most = std::max(1, device.multiprocessors * room / grid.cluster);
  grid.blocks = static_cast<int>(std::max<int64_t>(1, std::min(teams, most))) * grid.cluster;
  return plan;
}

template <class T, bool kCap>
void run(const Batch& b, const Plan& plan, cudaStream_t stream) {
  if (plan.lanes > 0 && plan.lanes * 8 >= b.p.classes)
    check(launch(few_classes<T, kCap, 8, 0>, plan.grid, stream, b, plan.lanes));
  else if (plan.lanes > 0)
    check(launch(few_classes<T, kCap, kFewClasses / kWarp, kWarp>, plan.grid, stream, b, plan.lanes));
  else if (plan.kept)
    check(launch(many_classes<T, kCap, true>, plan.grid, stream, b));
  else
    check(launch(many_classes<T, kCap, false>, plan.grid, stream, b));
}

template <class T>
void run(const Batch& b, const Plan& plan, cudaStream_t stream) {
  b.p.softcap == 0 ? run<T, false>(b, plan, stream) : run<T, true>(b, plan, stream);
}

void run(const Batch& b, const Plan& plan, cudaStream_t stream) {
  if (b.p.dtype == kFloat32) run<float>(b, plan, stream);
  if (b.p.dtype == kBFloat16) run<BFloat16>(b, plan, stream);
  if (b.p.dtype == kFloat16) run<Float16>(b, plan, stream);
}

bool start(const LossCall& call, const LossNumbers& numbers, Batch* b) {
  if (!lay_out(call, &b->p) || b->p.classes > INT32_MAX) return false;
  b->numbers = numbers;
  b->reduction = call.reduction;
  if (call.rows) {
    b->p.saved_max = call.rows;
    b->p.saved_sum = call.rows + b->p.rows;
    b->denominator = call.rows + 2 * b->p.rows;
  }
  return true;
}

}  // namespace

bool has_kernels() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, count_weights) == cudaSuccess;
  if (!found) cudaGetLastError();  // or torch would report it as its own
  return found;
}

Outcome cross_entropy(const LossCall& call, const LossNumbers& numbers, unsigned* ticket,
                      const Allocate& allocate, cudaStream_t stream) {
  Batch b{};
  if (call.topk.size() > kMostTopk || !start(call, numbers, &b)) return Outcome::kUnsupported;
  std::copy(call.topk.begin(), call.topk.end(), b.topk);
  b.p.num_topk = call.counts ? call.topk.size() : 0;
  (call.reduction == kNone ? b.p.row_loss : b.loss) = call.loss;
  b.sums = call.sums;
  b.counts = call.counts;
  const Plan plan = plan_of(b.p, current_device());

  const bool weights =
      b.p.out && b.reduction == kMean && !numbers.has_normalizer && b.p.rows * b.p.target_bytes > kCountHere;
  const bool sums = b.loss || b.counts || b.denominator;
  const int64_t blocks = plan.grid.blocks / plan.grid.cluster;
  const int64_t words = 2 * blocks + (kNumCounts + b.p.num_topk) * blocks;
  double* memory = nullptr;
  if (weights || sums) memory = static_cast<double*>(allocate(8 * (kCountBlocks + words + 1)));
  if (weights) {
    check(launch(count_weights, Grid{kCountBlocks, kFewThreads, kSharedBytes}, stream, b, memory));
    b.weights = memory;
  }
  if (sums) {
    b.partial_sums = memory + kCountBlocks;
    b.partial_counts = reinterpret_cast<int64_t*>(b.partial_sums + 2 * blocks);
    b.ticket = ticket ? ticket : reinterpret_cast<unsigned*>(memory + kCountBlocks + words);
    if (!ticket) check(cudaMemsetAsync(b.ticket, 0, sizeof(unsigned), stream));
  }
  run(b, plan, stream);
  return Outcome::kDone;
}

Outcome cross_entropy_backward(const LossCall& call, const LossNumbers& numbers, const Array& grad_output,
                               cudaStream_t stream) {
  Batch b{};
  if (!call.out || !call.rows || grad_output.dtype != kFloat32 || !grad_output.contiguous() ||
      !start(call, numbers, &b))
    return Outcome::kUnsupported;
  b.p.backward = true;
  b.p.scale_of_row = static_cast<const float*>(grad_output.data);
  b.p.scale_stride = grad_output.numel() == 1 ? 0 : 1;
  if (b.p.scale_stride && grad_output.numel() != b.p.rows) return Outcome::kUnsupported;
  if (b.p.rows == 0) return Outcome::kDone;
  run(b, plan_of(b.p, current_device()), stream);
  return Outcome::kDone;
}

}  // namespace esper::cuda
