// Cross entropy over rows: loss, counts, accumulation and gradient in one launch. The fields of CrossEntropy
// are described in ../call.h.
//
// Few classes: a lane or a group of them per row, with the row in registers. More classes: one block per row,
// or a cluster of blocks that each hold a part of the row in shared memory, so that the row is read once.
// Rows that do not fit are read twice, the second time backwards, to find the end of the first read in the
// cache.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/cross_entropy_few.h"

namespace esper::cuda {
namespace {

// Rows of more classes. Softcap takes many registers.
template <bool kCap>
constexpr int kWordsInFlight = kCap ? 2 : 4;

// kKept: what is read stays in `kept`, where each thread finds again what it put there.
template <class S, class T, bool kCap, bool kKept>
__device__ S read_row(const LossRows& p, const Scalars& s, const Row& row, const Share<T>& share,
                      Words* kept) {
  constexpr int kSize = kPerWords<T>, kBatch = kWordsInFlight<kCap>;
  Reader<S> reader(row);
  const int team = share.team, count = share.count;
  const Words* from = share.words();
  const auto load = [&](int k) { return from[k]; };
  for_batches<kBatch>(count, share.thread, team, load, [&](int at, const Words(&words)[kBatch], bool all) {
    float logits[kBatch][kSize], top[kSize];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (!all && at + j * team >= count) break;
      widen_words<T>(words[j], logits[j]);
#pragma unroll
      for (int k = 0; k < kSize; ++k) top[k] = j == 0 ? logits[j][k] : fmaxf(top[k], logits[j][k]);
    }
    reader.raise(capped<kCap>(fold(top, Max()), s.softcap));
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (!all && at + j * team >= count) break;
      if (kKept) kept[at + j * team] = words[j];
      reader.template absorb<kCap>(p, s, row, logits[j], share.element(at + j * team), 1);
    }
  });
  if (share.has_ragged) {
    const float logit[] = {widen(share.row.data[share.ragged])};
    reader.raise(capped<kCap>(logit[0], s.softcap));
    reader.template absorb<kCap>(p, s, row, logit, share.ragged, 1);
  }
  return reader.state;
}

// Rows that are read again are read backwards, to find the end of the first reading in the cache.
template <class T, bool kCap, bool kKept>
__device__ void write_row(const LossRows& p, const Scalars& s, const Gradient& gradient,
                          const Share<T>& share, const Words* kept, const Cut<T>& out) {
  constexpr int kSize = kPerWords<T>, kBatch = kWordsInFlight<kCap>;
  const int team = share.team, count = share.count;
  const Words* from = share.words();
  const auto place = [&](int k) { return kKept ? k : count - 1 - k; };
  const auto load = [&](int k) { return kKept ? kept[k] : from[place(k)]; };
  const bool same_phase = share.row.phase() == out.phase();
  for_batches<kBatch>(count, share.thread, team, load, [&](int at, const Words(&words)[kBatch], bool all) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (!all && at + j * team >= count) break;
      const int first = share.element(place(at + j * team));
      float logits[kSize], g[kSize];
      widen_words<T>(words[j], logits);
      gradient.compute<kCap>(p, s, logits, first, 1, g);
      if (same_phase) {
        store_words(reinterpret_cast<Words*>(out.data + first), narrow_words<T>(g));
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) out.data[first + k] = narrow<T>(g[k]);
      }
    }
  });
  if (share.has_ragged) {
    const float logit[] = {widen(share.row.data[share.ragged])};
    float g[1];
    gradient.compute<kCap>(p, s, logit, share.ragged, 1, g);
    out.data[share.ragged] = narrow<T>(g[0]);
  }
  gradient.write_targets(out.data, [&](int c) { return share.takes(c, !kKept); });
}

template <class S, class T, bool kCap, bool kKept>
__global__ void __launch_bounds__(kManyThreads, 1)
    cross_entropy_many_classes(const __grid_constant__ Batch b) {
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(shared_memory());
  const LossRows& p = b.p;
  const int team = b.team, thread = threadIdx.x % team, teams = blockDim.x / team;
  const int parts = kKept ? cluster().num_blocks() : 1, part = kKept ? cluster().block_rank() : 0;
  Words* kept =
      reinterpret_cast<Words*>(shared_memory() + kSharedBytes<S>) + threadIdx.x / team * b.kept_words;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / parts) * teams + threadIdx.x / team;
  prefetch_row<T>(p, first_row, part * team + thread, parts * team);
  const Scalars s = prepare(b, shared);  // counts the targets meanwhile
  if (parts > 1) {
    if (threadIdx.x < 2) open_inbox(&shared.arrivals[threadIdx.x]);
    cluster().sync();
  }
  const bool may_lead = threadIdx.x % kWarp == 0;
  typename S::Tally& tally = shared.of_leader[threadIdx.x / kWarp];  // not in registers, which the loops need
  if (may_lead) tally = {};
  int round = 0;  // of rows that are read
  for (int64_t i = first_row; i < p.rows; i += static_cast<int64_t>(gridDim.x / parts) * teams) {
    const T* const logits = static_cast<const T*>(p.logits) + p.logits_at.offset(i);
    const Row row = open_row<T, kCap>(p, s, i, target_of(p, i), logits);
    const Share<T> share(p, i, thread, team, part, parts);
    S state{};
    if (row.target >= 0 && p.backward) state = saved_state<S>(p, row);
    if (row.target >= 0 && !p.backward) {
      state = read_row<S, T, kCap, kKept>(p, s, row, share, kept);
      state = state_of_team(state, team, s.smoothing > 0, shared.of_warp[round % 2]);
      if (parts > 1) state = state_of_cluster(state, parts, round, s.smoothing > 0, shared);
      ++round;
    }
    const Gradient gradient = close_row(b, s, row, state, thread == 0 && part == 0, tally, shared);
    if (!p.out) continue;
    const Cut<T> out(static_cast<T*>(p.out) + p.out_at.offset(i), p.classes);
    if (gradient.zero) {
      write_zeros(out, part * team + thread, parts * team);
    } else {
      write_row<T, kCap, kKept>(p, s, gradient, share, kept, out);
    }
  }
  if (part == 0)
    finish(b, may_lead ? tally : typename S::Tally{}, blockIdx.x / parts, gridDim.x / parts, shared);
}

// Which kernel, and on what grid.
struct Plan {
  Grid grid;
  int team;          // threads that share a row
  int per_lane = 0;  // with few classes: how many of them a lane has, at most
  bool kept = false;
  int kept_words = 0;
};

// shared_bytes: what a block has in shared memory besides rows.
Plan plan_of(const LossRows& p, const Device& device, int64_t shared_bytes) {
  const int64_t words = p.classes * bytes_of(p.dtype) / 16;
  Plan plan{{0, kManyThreads / 2, shared_bytes}, kManyThreads / 2};
  Grid& grid = plan.grid;
  if (p.classes <= kFewClasses) {
    grid.threads = kFewThreads;
    for (plan.team = 1; plan.team * kFewPerLane < p.classes;) plan.team *= 2;
    plan.per_lane = p.classes <= kAlonePerLane ? kAlonePerLane : kFewPerLane;
    plan.kept_words = kFewThreads / plan.team * p.classes * bytes_of(p.dtype) / 16 + 2;  // in any phase
    grid.shared_bytes += 2 * plan.kept_words * 16;
  } else if (words <= kWordsOfWarp) {
    plan.team = kWarp;
  } else if (words <= 4 * 128) {  // so that each thread has several loads in flight
    plan.team = grid.threads = 128;
  }
  const int teams = grid.threads / plan.team;  // of a block
  const int most = device.clusters && teams == 1 ? kLargestCluster : 1;
  const auto kept_words = [&](int parts) { return (words + parts - 1) / parts; };
  const auto bytes = [&](int parts) { return teams * kept_words(parts) * 16 + shared_bytes; };
  const int64_t wanted = std::min(kKeptBytes, device.shared_bytes_of_block);
  int parts = 1;
  while (parts < most && bytes(parts) > wanted) parts *= 2;
  plan.kept = !plan.per_lane && p.out && !p.backward && bytes(parts) <= device.shared_bytes_of_block;
  if (plan.kept) {
    plan.kept_words = kept_words(parts);
    grid.cluster = parts;
    grid.shared_bytes = bytes(parts);
  }
  const int64_t memory_for = device.shared_bytes_of_multiprocessor / (grid.shared_bytes + 1024);
  if (plan.kept && teams == 1 && memory_for == 1) plan.team = grid.threads = kManyThreads;
  const int64_t room =
      std::min<int64_t>(plan.per_lane ? kFewBlocks : kManyThreads / grid.threads, memory_for);
  const int64_t fit = std::max<int64_t>(1, device.multiprocessors * room / grid.cluster);
  const int64_t wanted_blocks = (p.rows + teams - 1) / teams;
  grid.blocks = static_cast<int>(std::max<int64_t>(1, std::min(wanted_blocks, fit))) * grid.cluster;
  return plan;
}

using Kernel = void (*)(Batch);

template <class S, class T, bool kCap>
Kernel kernel_of(const Plan& plan) {
  if (plan.per_lane == kAlonePerLane) return cross_entropy_few_classes<S, T, kCap, kAlonePerLane, true>;
  if (plan.per_lane == kFewPerLane) return cross_entropy_few_classes<S, T, kCap, kFewPerLane, false>;
  return plan.kept ? cross_entropy_many_classes<S, T, kCap, true>
                   : cross_entropy_many_classes<S, T, kCap, false>;
}

template <class S>
Kernel kernel_of(const Batch& b, const Plan& plan) {
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    return b.numbers.has_softcap ? kernel_of<S, T, true>(plan) : kernel_of<S, T, false>(plan);
  };
  return b.p.dtype == kFloat32    ? of_type(0.0f)
         : b.p.dtype == kBFloat16 ? of_type(BFloat16())
                                  : of_type(Float16());
}

// Whether the rows of a tensor lie side by side.
bool adjacent(const LossRows& p, const RowLayout& at) {
  return p.rows == 1 || (at.inner >= p.rows && at.inner_stride == p.classes);
}

// Chooses kernel and grid, and tells the kernel what the plan says.
struct Launch {
  Kernel kernel;
  Grid grid;

  explicit Launch(Batch& b) {
    Measuring& m = b.measuring;
    const bool measured = m.plan.any();
    const bool counts_in_block = measured && b.p.classes <= kFewClasses && m.num_counts <= kMostBlockCounts;
    const int64_t count_bytes = counts_in_block ? (4 * m.block_words() + 15) / 16 * 16 : 0;
    const int64_t shared_bytes = measured ? kSharedBytes<MeasuredState> : kSharedBytes<State>;
    const Plan plan = plan_of(b.p, current_device(), shared_bytes + count_bytes);
    if (counts_in_block) m.in_block = plan.grid.shared_bytes - count_bytes;
    b.team = plan.team;
    b.kept_words = plan.kept_words;
    b.logits_adjacent = adjacent(b.p, b.p.logits_at);
    b.out_adjacent = adjacent(b.p, b.p.out_at);
    kernel = measured ? kernel_of<MeasuredState>(b, plan) : kernel_of<State>(b, plan);
    grid = plan.grid;
    if (grid.cluster == 1) return;
    // One that has to wait for the others would double the time.
    int clusters = 0;
    check(resident_clusters(kernel, grid, &clusters));
    grid.blocks = std::min(grid.blocks, std::max(clusters, 1) * grid.cluster);
  }
  void run(const Batch& b, cudaStream_t stream) const { check(launch(kernel, grid, stream, b)); }
};

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
  if (call.num_classes) throw std::invalid_argument("on CUDA the logits have to be those of all classes");
  if (call.logits.sizes[call.logits.dims - 1] > INT32_MAX)
    throw std::invalid_argument("on CUDA there may be up to 2^31 - 1 classes");
}

void cross_entropy(const LossCall& call, const Allocate& allocate, cudaStream_t stream) {
  Batch b{};
  b.p = rows_of(call);
  b.numbers = call.numbers;
  b.reduction = call.reduction;
  std::copy(call.topk.begin(), call.topk.end(), b.topk);
  if (call.loss && call.reduction != kNone) b.loss = static_cast<float*>(call.loss->data);
  if (call.counts) {
    b.sums = static_cast<double*>(call.sums->data);
    b.counts = static_cast<int64_t*>(call.counts->data);
    b.measuring.plan = measures_of(call);
    b.measuring.num_counts = b.measuring.plan.num_counts();
    b.measuring.sums = b.sums + kNumSums;
    b.measuring.counts = b.counts + kFirstCorrect + b.p.num_topk;
    b.p.wants_entropy = b.measuring.plan.entropy;
  }
  const Launch main(b);

  const bool weights =
      b.p.out && b.reduction == kMean && !normalized(b) && b.p.rows * b.p.target_bytes > kCountHere;
  const bool sums = b.loss || b.counts || b.p.saved_denominator;
  const int64_t blocks = main.grid.blocks / main.grid.cluster;
  const int64_t bins = b.measuring.plan.bins;
  const int64_t words = (2 + kRowCounts + b.p.num_topk + MeasuredState::kMeasures) * blocks;
  double* memory = nullptr;
  if (weights || sums) memory = static_cast<double*>(allocate(8 * (kCountBlocks + words + bins + 1)));
  if (weights) {
    check(launch(sum_row_weights, Grid{kCountBlocks, kFewThreads, kSharedBytes<State>}, stream, b, memory));
    b.weights = memory;
  }
  if (sums) {
    b.partials = memory + kCountBlocks;
    b.measuring.confidence = reinterpret_cast<unsigned long long*>(b.partials + words);
    if (bins) check(cudaMemsetAsync(b.measuring.confidence, 0, 8 * bins, stream));
    b.ticket = call.ticket ? static_cast<unsigned*>(call.ticket->data)
                           : reinterpret_cast<unsigned*>(b.partials + words + bins);
    if (!call.ticket) check(cudaMemsetAsync(b.ticket, 0, sizeof(unsigned), stream));
  }
  main.run(b, stream);
}

void cross_entropy_backward(const LossCall& call, const Array& grad_output, cudaStream_t stream) {
  Batch b{};
  b.p = rows_of(call, &grad_output);
  b.numbers = call.numbers;
  b.reduction = call.reduction;
  if (b.p.rows == 0) return;
  Launch(b).run(b, stream);
}

}  // namespace esper::cuda
