// Cross entropy over rows: loss, counts, accumulation and gradient in one launch. The fields of CrossEntropy
// are described in ../call.h.
//
// Few classes: a group of lanes per row, with the row in registers. More classes: one block per row, or a
// cluster of blocks that each hold a part of the row in shared memory, so that the row is read once. Rows
// that do not fit are read twice, the second time backwards, to find the end of the first read in the cache.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/cross_entropy_rows.h"

namespace esper::cuda {
namespace {

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
    const Row row = there ? open_row<T, kCap>(p, s, i) : Row{i, -1, false, 0, 0, 0, 0};
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
    // by the lane that wrote this class just now
    if (p.second && !gradient.zero && gradient.second >= 0 && lane == gradient.second % lanes)
      out[gradient.second] = narrow<T>(gradient.at_second);
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
    if (p.second && !gradient.zero && gradient.second >= 0) {
      __syncthreads();  // another thread wrote this class just now
      if (threadIdx.x == 0 && gradient.second >= in.first(begin) && gradient.second < in.first(end))
        out.data[gradient.second] = narrow<T>(gradient.at_second);
    }
  }
  if (parts > 1) cluster().sync();  // another block may still read this one's shared memory
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
  int64_t teams = p.rows, room;  // groups that work on rows; how many fit on a multiprocessor
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
    b.ticket = call.ticket ? static_cast<unsigned*>(call.ticket->data)
                           : reinterpret_cast<unsigned*>(b.partials + words);
    if (!call.ticket) check(cudaMemsetAsync(b.ticket, 0, sizeof(unsigned), stream));
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
