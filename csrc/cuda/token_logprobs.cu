// Log-probabilities of targets and entropies, and their gradient: a block per row, which is read once.
// LogprobRows in ../call.h has the formulas.
#include <algorithm>

#include "cuda/driver.h"
#include "cuda/rows.h"

namespace esper::cuda {
namespace {

// As in reference.py of cross entropy: gradients are 0 in the same places on every backend.
constexpr float kLowestExponent = -86;
constexpr float kSmallest = 1.17549435e-38f;
constexpr int kThreads = 256;
constexpr int kFewClasses = 1024;  // up to which a warp is enough

__device__ bool is_finite(float x) { return x - x == 0; }

// z = (x - top) / temperature, at least kLowestExponent (0 times -inf would be NaN); NaN stays.
__device__ float exponent(float x, float top, float inverse_temperature) {
  const float z = (x - top) * inverse_temperature;
  return z <= kLowestExponent ? kLowestExponent : z;
}

__device__ float exp_of(float z) { return z <= kLowestExponent ? 0 : __expf(z); }

// What a thread has seen of a row: its largest logit, and the sums of exp(z) and of z exp(z).
struct State {
  float top, sum, weighted;

  __device__ State lowered_to(float new_top, float inverse_temperature) const {
    if (top == new_top) return *this;
    const float drop = exponent(top, new_top, inverse_temperature), factor = exp_of(drop);
    return {new_top, factor * sum, factor * (weighted + drop * sum)};
  }
};

struct Merge {
  float inverse_temperature;
  __device__ State operator()(const State& a, const State& b) const {
    const float top = fmaxf(a.top, b.top);
    const State x = a.lowered_to(top, inverse_temperature), y = b.lowered_to(top, inverse_temperature);
    return {top, x.sum + y.sum, x.weighted + y.weighted};
  }
};

template <int n>
__device__ void absorb(const float (&logits)[n], float inverse_temperature, State& state) {
  float top = state.top;
#pragma unroll
  for (int j = 0; j < n; ++j) top = fmaxf(top, logits[j]);  // leaves out NaN, which the sum keeps
  state = state.lowered_to(top, inverse_temperature);
  const float shift = top == -INFINITY ? 0 : top;  // -inf - -inf would be NaN
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const float z = exponent(logits[j], shift, inverse_temperature), e = exp_of(z);
    state.sum += e;
    state.weighted += e * z;
  }
}

template <class T>
__device__ void widened(const Vector<T>& x, float (&logits)[Vector<T>::kSize]) {
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; ++j) logits[j] = widen(x.x[j]);
}

template <class T>
__device__ Span<const T> logits_of(const LogprobRows& p, int64_t i) {
  return {static_cast<const T*>(p.logits) + p.logits_at.offset(i), p.classes};
}

__device__ void write_row(const LogprobRows& p, int64_t i, float logprob, float entropy, float top,
                          float sum) {
  p.logprobs[i] = logprob;
  if (p.entropy) p.entropy[i] = entropy;
  if (!p.row_sums) return;
  p.row_sums[2 * i] = top;
  p.row_sums[2 * i + 1] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) token_logprobs_rows(const __grid_constant__ LogprobRows p) {
  State* scratch = reinterpret_cast<State*>(shared_memory());
  const float inverse = 1 / p.temperature;
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const int64_t target = target_of(p, i);
    if (!is_valid(p, target)) {
      const float value = target == p.ignore_index ? 0 : NAN;
      if (threadIdx.x == 0) write_row(p, i, value, value, 0, 1);
      continue;
    }
    const Span<const T> in = logits_of<T>(p, i);
    constexpr State nothing{-INFINITY, 0, 0};
    State state = nothing;
    for_vectors(in, 0, in.vectors(), false, [&](int64_t, const Vector<T>& x) {
      float logits[Vector<T>::kSize];
      widened(x, logits);
      absorb(logits, inverse, state);
    });
    state = reduce_block(state, nothing, scratch, Merge{inverse});
    if (threadIdx.x != 0) continue;
    const bool finite = is_finite(state.top) && state.sum == state.sum;
    const double log_sum = log(static_cast<double>(state.sum));
    const double z = (static_cast<double>(widen(in.data[target])) - state.top) / p.temperature;
    write_row(p, i, finite ? z - log_sum : NAN, finite ? log_sum - state.weighted / state.sum : NAN,
              state.top, state.sum);
  }
}

// The gradient of a row: that of the log-probability is (1[target] - p) / temperature, and that of the
// entropy is -p (log p + H) / temperature, with p the softmax and H the entropy.
struct Gradient {
  float top, inverse_temperature, of_logprob;
  float flat, per_z;  // the gradient is exp(z) (flat + per_z z), and of_logprob more at the target

  __device__ Gradient(const LogprobRows& p, int64_t i) {
    const float sum = p.row_sums[2 * i + 1];
    float of_entropy = 0;
    top = p.row_sums[2 * i];
    inverse_temperature = 1 / p.temperature;
    of_logprob = p.grad_logprobs[i] * inverse_temperature;
    float constant = of_logprob;
    if (p.grad_entropy) {
      of_entropy = p.grad_entropy[i] * inverse_temperature;
      constant += of_entropy * (p.entropy[i] - logf(sum));
    }
    flat = is_finite(top) && is_finite(sum) ? -constant / sum : NAN;
    per_z = -of_entropy / sum;
  }
  __device__ float at(float logit, bool is_target) const {
    const float z = exponent(logit, top, inverse_temperature);
    const float g = exp_of(z) * (flat + per_z * z) + (is_target ? of_logprob : 0);
    return fabsf(g) < kSmallest ? 0 : g;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) token_logprobs_gradients(const __grid_constant__ LogprobRows p) {
  constexpr int kSize = Vector<T>::kSize;
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const int64_t target = target_of(p, i);
    const Span<const T> in = logits_of<T>(p, i);
    const Span<T> out{static_cast<T*>(p.out) + p.out_at.offset(i), p.classes};
    if (!is_valid(p, target)) {
      for (int64_t v = threadIdx.x; v < in.vectors(); v += blockDim.x) out.store(in.first(v), Vector<T>{});
      continue;
    }
    const Gradient gradient(p, i);
    for_vectors(in, 0, in.vectors(), false, [&](int64_t v, const Vector<T>& x) {
      const int64_t first = in.first(v);
      Vector<T> g;
#pragma unroll
      for (int j = 0; j < kSize; ++j) g.x[j] = narrow<T>(gradient.at(widen(x.x[j]), first + j == target));
      out.store(first, g);
    });
  }
}

template <class T>
cudaError_t run(const LogprobRows& p, cudaStream_t stream) {
  const int threads = p.classes <= kFewClasses ? kWarp : kThreads;
  const int64_t most = static_cast<int64_t>(current_device().multiprocessors) * (2048 / threads);
  const Grid grid{static_cast<int>(std::min(p.rows, most)), threads, kMostWarps * sizeof(State)};
  return launch(p.backward ? token_logprobs_gradients<T> : token_logprobs_rows<T>, grid, stream, p);
}

}  // namespace

void token_logprobs(const LogprobCall& call, cudaStream_t stream) {
  const LogprobRows p = rows_of(call);
  if (p.rows == 0) return;
  check(p.dtype == kFloat32    ? run<float>(p, stream)
        : p.dtype == kBFloat16 ? run<BFloat16>(p, stream)
                               : run<Float16>(p, stream));
}

}  // namespace esper::cuda
