// The kernel of cross entropy for few classes. A lane or a group of them takes a row and has it in registers.
// A block brings the rows of all its groups, a tile, to shared memory, and their gradients back from there,
// in 16-byte words where rows lie side by side.
#pragma once
#include "cuda/cross_entropy_rows.h"

namespace esper::cuda {
namespace {  // part of cross_entropy.cu

// What a lane has of a tile: every `lanes`-th class of one row.
struct Place {
  int lanes, lane, row, classes;
  int rows;       // of the tile
  int64_t begin;  // its first row
  __device__ bool there() const { return row < rows; }
};

// The rows of a tile, one after the other in shared memory: those of a tensor, or what is to be written
// there.
template <class T>
struct Tile {
  T* tensor;
  const RowLayout& layout;
  bool adjacent;  // the rows of the tensor lie side by side

  __device__ T* first(const Place& at) const { return tensor + at.begin * at.classes; }  // if adjacent
  __device__ T* row(const Place& at) const { return tensor + layout.offset(at.begin + at.row); }
  // Where the tile begins. memory: at a 16-byte boundary, with 15 bytes more than the rows need.
  __device__ std::remove_const_t<T>* in(unsigned char* memory, const Place& at) const {
    return in_phase(memory, adjacent ? first(at) : nullptr);
  }
  template <int kWords>
  __device__ void read(std::remove_const_t<T>* tile, const Place& at) const {
    if (adjacent) {
      copy_words<kWords>(first(at), tile, at.rows * at.classes);
    } else if (at.there()) {
      const T* const from = row(at);
      for (int c = at.lane; c < at.classes; c += at.lanes) tile[at.row * at.classes + c] = from[c];
    }
  }
  template <int kWords>
  __device__ void write(const T* tile, const Place& at) const {
    if (adjacent) {
      copy_words<kWords>(tile, first(at), at.rows * at.classes);
    } else if (at.there()) {
      T* const to = row(at);
      for (int c = at.lane; c < at.classes; c += at.lanes) to[c] = tile[at.row * at.classes + c];
    }
  }
};

// What this lane has seen of a row in shared memory, and the logits, -inf outside of the row.
template <class S, bool kCap, class T, int n>
__device__ S read_few(const LossRows& p, const Scalars& s, const Row& row, const Place& at, const T* data,
                      float (&logits)[n]) {
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const int c = at.lane + j * at.lanes;
    logits[j] = c < at.classes ? widen(data[c]) : -INFINITY;
    top = fmaxf(top, logits[j]);
  }
  if (p.backward) return saved_state<S>(p, row);
  Reader<S> reader(row);
  reader.raise(capped<kCap>(top, s.softcap));
  reader.template absorb<kCap>(p, s, row, logits, at.lane, at.lanes);
  return reader.state;
}

// The gradient of this lane's classes, into a row in shared memory.
template <bool kCap, class T, int n>
__device__ void write_few(const LossRows& p, const Scalars& s, const Gradient& gradient, const Place& at,
                          const float (&logits)[n], T* data) {
  float g[n] = {};
  if (!gradient.zero) gradient.compute<kCap>(p, s, logits, at.lane, at.lanes, g);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const int c = at.lane + j * at.lanes;
    if (c < at.classes) data[c] = narrow<T>(g[j]);
  }
  gradient.write_targets(data, [&](int c) { return c % at.lanes == at.lane; });
}

// kPerLane: the most classes of a lane. kAlone: a lane takes a row by itself. S: see Reader.
template <class S, class T, bool kCap, int kPerLane, bool kAlone>
__global__ void __launch_bounds__(kFewThreads, few_blocks(kAlone, S::kMeasures > 0))
    cross_entropy_few_classes(const __grid_constant__ Batch b) {
  constexpr int kWords = (kPerLane * sizeof(T) + 15) / 16;  // of a tile, for each thread
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(shared_memory());
  unsigned char* const memory = shared_memory() + kSharedBytes<S>;
  const LossRows& p = b.p;
  const Tile<const T> logits_tile{static_cast<const T*>(p.logits), p.logits_at, b.logits_adjacent};
  const Tile<T> out_tile{static_cast<T*>(p.out), p.out_at, b.out_adjacent};
  if constexpr (S::kMeasures > 0) clear_block_counts(b.measuring);
  const Scalars s = prepare(b, shared);
  const int lanes = kAlone ? 1 : b.team, thread = threadIdx.x, groups = blockDim.x / lanes;
  Place at{lanes, thread % lanes, thread / lanes, static_cast<int>(p.classes)};
  typename S::Tally tally;
  for (at.begin = static_cast<int64_t>(blockIdx.x) * groups; at.begin < p.rows;
       at.begin += static_cast<int64_t>(gridDim.x) * groups) {
    at.rows = min(static_cast<int64_t>(groups), p.rows - at.begin);
    const int64_t i = at.begin + at.row, target = at.there() ? target_of(p, i) : -1;
    T* const in = logits_tile.in(memory, at);
    logits_tile.template read<kWords>(in, at);
    __syncthreads();
    T* const data = in + at.row * at.classes;
    const Row row = at.there() ? open_row<T, kCap>(p, s, i, target, data) : Row{i, -1, false, 0, 0, 0};
    S state{};
    float logits[kPerLane];
    if (row.target >= 0) state = read_few<S, kCap>(p, s, row, at, data, logits);
    if (!p.backward) state = merged(state, lanes, s.smoothing > 0);
    T* const out = out_tile.in(memory + b.kept_words * 16, at);
    if (at.there()) {
      const Gradient gradient = close_row(b, s, row, state, at.lane == 0, tally, shared);
      if (p.out) write_few<kCap>(p, s, gradient, at, logits, out + at.row * at.classes);
    }
    __syncthreads();
    if (p.out) out_tile.template write<kWords>(out, at);
  }
  finish(b, tally, blockIdx.x, gridDim.x, shared);
}

}  // namespace
}  // namespace esper::cuda
