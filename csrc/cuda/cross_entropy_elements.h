// What cross entropy does with the elements of a row: their sum of exponentials and the rank of the target
// when it is read, and their gradients. As few instructions per element as possible, because they bound the
// speed.
#pragma once
#include "cuda/rows.h"
#include "cuda/words.h"

namespace esper::cuda {
namespace {  // part of cross_entropy.cu

// As in reference.py: gradients are 0 in the same places on every backend.
constexpr float kLowestExponent = -86;
constexpr float kSmallest = 1.17549435e-38f;
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -3.40282347e38f;

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

__device__ bool is_finite(float x) { return x - x == 0; }

template <bool kCap>
__device__ float capped(float x, float softcap) {
  return kCap ? softcap * tanhf(x / softcap) : x;
}

// The largest float less than x; NaN for -inf.
__device__ float next_below(float x) {
  if (x == 0) return -0x1p-149f;
  int bits;
  memcpy(&bits, &x, 4);
  bits += x > 0 ? -1 : 1;
  memcpy(&x, &bits, 4);
  return x;
}

// exp(x - top), as the power of 2 that a GPU has one instruction for.
__device__ float exp_of(float x, float top) { return exp2_flushed((x - top) * kLog2E); }

// The same, but 0 from kLowestExponent on, and divided by 2^kDrop: what kLowestExponent gives is then just
// less than any normal number, so the instruction itself makes it 0. The last bits are for rounding.
constexpr float kDrop = 126 + 2e-5 + static_cast<double>(kLowestExponent) * kLog2E;
__device__ float lowered_exp_of(float x, float top) { return exp2_flushed(fmaf(x - top, kLog2E, -kDrop)); }

// What a thread has added up of its rows.
struct Tally {
  double loss = 0, weight = 0;
};

// What a group of threads has seen of a row. The sum leaves the target out: if the target has nearly all of
// the softmax, 1 - softmax would otherwise be nothing but rounding errors. MeasuredState has more.
struct State {
  using Tally = cuda::Tally;
  static constexpr int kMeasures = 0;  // sums of measures in the tally
  float top;                           // the largest x, the target's included, at least kLowest
  float others;                        // sum of exp(x - top)
  float smooth;                        // sum of w_c (x_c - x_t), only with smoothing
  int ahead;                           // logits that rank before the target's
};

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// All values, as a tree, so that few wait for each other.
template <int n, class F>
__device__ float fold(float (&x)[n], const F& f) {
#pragma unroll
  for (int step = 1; step < n; step *= 2)
#pragma unroll
    for (int j = 0; j + step < n; j += 2 * step) x[j] = f(x[j], x[j + step]);
  return x[0];
}

__device__ void lift(State& state, float top) {
  state.others *= exp_of(state.top, top);
  state.top = top;
}

// Of a power of two of lanes, next to each other, in each of them.
__device__ State merged(const State& mine, int lanes, bool smooth) {
  const float top = reduce_lanes(mine.top, lanes, Max());
  const float share = mine.top == top ? 1 : exp_of(mine.top, top);  // inf - inf would be NaN
  return {top, reduce_lanes(mine.others * share, lanes, Add()),
          smooth ? reduce_lanes(mine.smooth, lanes, Add()) : 0, reduce_lanes(mine.ahead, lanes, Add())};
}

// A thread's share of a row while it is read. S: State or MeasuredState.
template <class S>
struct Reader {
  S state{};

  __device__ explicit Reader(const Row& row) { state.top = fmaxf(row.x, kLowest); }  // NaN: kLowest

  __device__ void raise(float top) {
    if (!(top > state.top)) return;
    lift(state, top);
  }

  // The logits of classes first, first + step, ...; those outside of the row are -inf. The top has been
  // raised to the largest of them.
  template <bool kCap, int n>
  __device__ void absorb(const LossRows& p, const Scalars& s, const Row& row, const float (&logits)[n],
                         int first, int step) {
    const int classes = p.classes, place = row.target - first;
    const bool holds_target = static_cast<unsigned>(place) < static_cast<unsigned>(n * step);
    // Equal logits rank before the target where their classes do.
    const float bar = place < n * step ? row.logit : next_below(row.logit);
    float x[n];
#pragma unroll
    for (int j = 0; j < n; ++j) {
      count_above(state.ahead, logits[j], bar);
      x[j] = kCap && first + j * step >= classes ? -INFINITY : capped<kCap>(logits[j], s.softcap);
    }
    if (s.smoothing > 0) {
      const float reference = row.reference();
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const int c = first + j * step;
        if (c < classes) state.smooth += (p.weight ? p.weight[c] : 1) * (x[j] - reference);
      }
    }
    if (holds_target) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        state.ahead += j * step < place && logits[j] == row.logit;
        if (j * step == place) x[j] = -INFINITY;
      }
    }
    if constexpr (S::kMeasures > 0) measure(state, p.wants_entropy, logits, x, first, step);
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = exp_of(x[j], state.top);
    state.others += fold(x, Add());
  }
};

// The gradient of a row: of_softmax * exp(x - top) - everywhere * w_c, but for the targets, which are written
// over it.
struct Gradient {
  bool zero;
  int target = -1, second = -1;  // second: -1 for none
  float top = 0;
  float lowered_of_softmax = 0;  // of_softmax * 2^kDrop
  float everywhere = 0, at_target = 0, at_second = 0;

  // Of the logits of classes first, first + step, ...
  template <bool kCap, int n>
  __device__ void compute(const LossRows& p, const Scalars& s, const float (&logits)[n], int first, int step,
                          float (&result)[n]) const {
    const auto each = [&](const auto& everywhere_at) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float x = capped<kCap>(logits[j], s.softcap);
        result[j] = multiply_add_flushed(lowered_of_softmax, lowered_exp_of(x, top),
                                         -everywhere_at(first + j * step));
        if (kCap) result[j] = multiply_add_flushed(result[j], slope(x, s.softcap), 0);
      }
    };
    if (p.weight && everywhere != 0)
      each([&](int c) { return c < p.classes ? everywhere * p.weight[c] : 0; });
    else
      each([&](int) { return everywhere; });
  }

  // For the thread that wrote these classes before.
  template <class T, class Mine>
  __device__ void write_targets(T* row, const Mine& is_mine) const {
    if (zero) return;
    if (is_mine(target)) row[target] = narrow<T>(at_target);
    if (second >= 0 && is_mine(second)) row[second] = narrow<T>(at_second);
  }

  // Of capped().
  __device__ static float slope(float x, float softcap) { return 1 - (x / softcap) * (x / softcap); }
};

// What a thread has to do with a row of more classes. A team of threads takes a row: a warp, a block, or a
// cluster of blocks which each take a part of it.
template <class T>
struct Share {
  Cut<const T> row;
  int thread, team;  // number and size within the block
  int begin, count;  // the words of the block
  bool has_ragged;   // this thread takes a ragged element as well
  int ragged;

  __device__ Share(const LossRows& p, int64_t i, int thread, int team, int part, int parts)
      : row(static_cast<const T*>(p.logits) + p.logits_at.offset(i), p.classes),
        thread(thread),
        team(team),
        begin(static_cast<int64_t>(row.words) * part / parts),
        count(static_cast<int64_t>(row.words) * (part + 1) / parts - begin),
        has_ragged(part == 0 && thread < row.ragged),
        ragged(row.ragged_element(thread)) {}
  __device__ const Words* words() const {
    return reinterpret_cast<const Words*>(row.data + row.element(begin));
  }
  __device__ int element(int word) const { return row.element(begin + word); }
  // Whether this thread takes class c.
  __device__ bool takes(int c, bool backwards) const {
    if (c < row.head || c >= row.element(row.words)) return has_ragged && c == ragged;
    const int word = (c - row.head) / kPerWords<T> - begin;
    return word >= 0 && word < count && (backwards ? count - 1 - word : word) % team == thread;
  }
};

// The gradient of a row that has none, by `threads` threads.
template <class T>
__device__ void write_zeros(const Cut<T>& row, int thread, int threads) {
  for (int word = thread; word < row.words; word += threads)
    store_words(reinterpret_cast<Words*>(row.data + row.element(word)), Words{0, 0, 0, 0});
  if (thread < row.ragged) row.data[row.ragged_element(thread)] = narrow<T>(0);
}

}  // namespace
}  // namespace esper::cuda
