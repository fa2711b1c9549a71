// Gradient statistics: one launch over any list of tensors, cut into pieces of equal size. The list is a
// table in device memory, filled through kernel arguments, which needs no copy that the host would wait for.
#include <algorithm>
#include <utility>

#include "cuda/driver.h"
#include "cuda/rows.h"

namespace esper::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // vectors that a thread loads before it looks at the first
constexpr int64_t kPieceElements =
    32768;  // at least; doubled until there are at most kMostPieces more than tensors
constexpr int64_t kMostPieces = 8192;
constexpr int kFewTensors = 128;  // told by one launch, in 4 KiB of arguments
constexpr int kManyTensors = CUDART_VERSION >= 12010 ? 1024 : kFewTensors;  // larger arguments came later

struct Tensor {
  const void* data;
  int64_t size;
  int32_t first_piece;
  int16_t dtype;
};

struct Job {
  Tensor* tensors;
  int num_tensors, num_pieces;
  int64_t piece;  // elements
  Number inv_scale;
  bool scaled;
  GradStatsOut out;
  double *squares, *max_abs;  // [pieces]
  int64_t* counts;            // [3, pieces]: zeros, NaN, Inf
  double* squares_of_tensor;  // [tensors]
  unsigned* tickets;          // [tensors + 1]
};

struct Found {
  double squares = 0, max_abs = 0;
  int64_t zeros = 0, nans = 0, infs = 0;
};

__device__ Found shuffle_xor(Found x, int distance) {
  return {cuda::shuffle_xor(x.squares, distance), cuda::shuffle_xor(x.max_abs, distance),
          cuda::shuffle_xor(x.zeros, distance), cuda::shuffle_xor(x.nans, distance),
          cuda::shuffle_xor(x.infs, distance)};
}

struct Merge {
  __device__ Found operator()(Found a, Found b) const {
    return {a.squares + b.squares, fmax(a.max_abs, b.max_abs), a.zeros + b.zeros, a.nans + b.nans,
            a.infs + b.infs};
  }
};

struct Shared {
  Found scratch[kMostWarps];
  unsigned flag;
};

template <int n>
struct Part {
  Tensor tensors[n];
};

template <int n>
__global__ void __launch_bounds__(kThreads)
    tell(const __grid_constant__ Part<n> part, Job job, int first, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    job.tensors[first + i] = part.tensors[i];
    job.tickets[first + i] = 0;
  }
  if (threadIdx.x == 0) job.tickets[job.num_tensors] = 0;
}

// What one thread sees of a piece. NaN is left out of the maximum and put in at the end. A float32 times a
// scale is a double, as in the definition.
template <bool kScaled>
struct Look {
  double squares = 0, max_abs = 0;
  unsigned zeros = 0, nans = 0, infs = 0;
  __device__ void at(float value, double scale) {
    double x = value;
    if (kScaled) x *= scale;
    squares = fma(x, x, squares);
    max_abs = fmax(max_abs, fabs(x));
    zeros += kScaled ? x == 0 : value == 0;
    nans += kScaled ? x != x : value != value;
    infs += kScaled ? isinf(x) : isinf(value);
  }
};

template <class T, bool kScaled>
__device__ Found look_at(const Span<const T>& span, double scale) {
  constexpr int kSize = Vector<T>::kSize;
  Look<kScaled> look;
  const int64_t vectors = span.vectors();
  for (int64_t at = threadIdx.x; at < vectors; at += kInFlight * kThreads) {
    Vector<T> x[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (at + j * kThreads < vectors) x[j] = span.load(span.first(at + j * kThreads), narrow<T>(0));
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t first = span.first(at + j * kThreads);
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        if (first + k >= 0 && first + k < span.n) look.at(widen(x[j].x[k]), scale);
    }
  }
  return {look.squares, look.max_abs, look.zeros, look.nans, look.infs};
}

template <class T>
__device__ Found look_at(const void* data, int64_t begin, int64_t n, bool scaled, double scale) {
  const Span<const T> span{static_cast<const T*>(data) + begin, n};
  return scaled ? look_at<T, true>(span, scale) : look_at<T, false>(span, scale);
}

// The tensor that piece i is part of: the last whose first piece is not behind it, empty ones skipped.
__device__ int tensor_of(const Job& job, int i) {
  int low = 0, high = job.num_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (job.tensors[middle].first_piece <= i ? low : high) = middle;
  }
  return low;
}

__device__ void write_tensor(const Job& job, int t, const Found& all) {
  job.out.norms[t] = sqrt(all.squares);
  job.out.max_abs[t] = all.nans > 0 ? NAN : all.max_abs;
  job.out.zeros[t] = all.zeros;
  job.out.nans[t] = all.nans;
  job.out.infs[t] = all.infs;
  job.squares_of_tensor[t] = all.squares;
}

// The pieces of a tensor, in order, by the last block that worked on one.
__device__ void finish_tensor(const Job& job, int t, int first, int pieces, Shared& shared) {
  Found all;
  const int64_t row = job.num_pieces;
  for (int i = first + threadIdx.x; i < first + pieces; i += kThreads)
    all = Merge()(all, Found{__ldcg(job.squares + i), __ldcg(job.max_abs + i), __ldcg(job.counts + i),
                             __ldcg(job.counts + row + i), __ldcg(job.counts + 2 * row + i)});
  all = reduce_block(all, Found{}, shared.scratch, Merge());
  if (threadIdx.x == 0) write_tensor(job, t, all);
}

__global__ void __launch_bounds__(kThreads, 2) measure(const __grid_constant__ Job job) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const double scale = job.scaled ? job.inv_scale.read() : 1;
  const int64_t share = blockIdx.x, shares = gridDim.x;
  const int begin = job.num_pieces * share / shares, end = job.num_pieces * (share + 1) / shares;
  int t = begin < end ? tensor_of(job, begin) : 0;
  for (int i = begin; i < end; ++i) {
    while (t + 1 < job.num_tensors && job.tensors[t + 1].first_piece <= i) ++t;
    const Tensor x = job.tensors[t];
    const int64_t from = (i - x.first_piece) * job.piece, n = min(job.piece, x.size - from);
    Found found;
    if (x.dtype == kFloat32) found = look_at<float>(x.data, from, n, job.scaled, scale);
    if (x.dtype == kBFloat16) found = look_at<BFloat16>(x.data, from, n, job.scaled, scale);
    if (x.dtype == kFloat16) found = look_at<Float16>(x.data, from, n, job.scaled, scale);
    found = reduce_block(found, Found{}, shared.scratch, Merge());
    const int pieces = (x.size + job.piece - 1) / job.piece;
    if (pieces == 1) {
      if (threadIdx.x == 0) write_tensor(job, t, found);
      continue;
    }
    if (threadIdx.x == 0) {
      const int64_t row = job.num_pieces;
      job.squares[i] = found.squares;
      job.max_abs[i] = found.max_abs;
      job.counts[i] = found.zeros;
      job.counts[row + i] = found.nans;
      job.counts[2 * row + i] = found.infs;
    }
    if (is_last(job.tickets + t, pieces, &shared.flag)) finish_tensor(job, t, x.first_piece, pieces, shared);
  }
  if (!is_last(job.tickets + job.num_tensors, gridDim.x, &shared.flag)) return;

  Found all;  // over the tensors: of the counts only whether anything is not finite
  for (int i = threadIdx.x; i < job.num_tensors; i += kThreads) {
    if (job.tensors[i].size == 0)
      write_tensor(job, i, Found{});
    else
      all = Merge()(all, Found{__ldcg(job.squares_of_tensor + i), 0, 0, __ldcg(job.out.nans + i),
                               __ldcg(job.out.infs + i)});
  }
  all = reduce_block(all, Found{}, shared.scratch, Merge());
  if (threadIdx.x != 0) return;
  *job.out.total_norm = sqrt(all.squares);
  *job.out.found_inf = all.nans + all.infs > 0;
}

template <int n>
void tell_all(const Job& job, const std::vector<Tensor>& tensors, cudaStream_t stream) {
  Part<n> part{};
  size_t first = 0;
  do {  // without any tensor too: it makes the ticket
    const int count = std::min<size_t>(n, tensors.size() - first);
    std::copy_n(tensors.begin() + first, count, part.tensors);
    check(launch(tell<n>, Grid{1, kThreads}, stream, part, job, static_cast<int>(first), count));
    first += count;
  } while (first < tensors.size());
}

}  // namespace

void grad_stats(const std::vector<Array>& arrays, const Number& inv_scale, const GradStatsOut& out,
                const Allocate& allocate, cudaStream_t stream) {
  Job job{};
  job.num_tensors = arrays.size();
  job.inv_scale = inv_scale;
  job.scaled = inv_scale.at || inv_scale.value != 1;
  job.out = out;
  int64_t elements = 0;
  for (const Array& x : arrays) elements += x.numel();
  for (job.piece = kPieceElements; elements / job.piece > kMostPieces;) job.piece *= 2;
  std::vector<Tensor> tensors;
  for (const Array& x : arrays) {
    const int64_t size = x.numel();
    tensors.push_back({x.data, size, job.num_pieces, static_cast<int16_t>(x.dtype)});
    job.num_pieces += (size + job.piece - 1) / job.piece;
  }

  const int64_t t = job.num_tensors, p = job.num_pieces;
  char* memory = static_cast<char*>(allocate(t * (sizeof(Tensor) + 8) + p * 5 * 8 + (t + 1) * 4));
  const auto take = [&](int64_t bytes) { return std::exchange(memory, memory + bytes); };
  job.tensors = reinterpret_cast<Tensor*>(take(t * sizeof(Tensor)));
  job.squares_of_tensor = reinterpret_cast<double*>(take(t * 8));
  job.squares = reinterpret_cast<double*>(take(p * 8));
  job.max_abs = reinterpret_cast<double*>(take(p * 8));
  job.counts = reinterpret_cast<int64_t*>(take(p * 3 * 8));
  job.tickets = reinterpret_cast<unsigned*>(take((t + 1) * 4));
  t <= kFewTensors ? tell_all<kFewTensors>(job, tensors, stream)
                   : tell_all<kManyTensors>(job, tensors, stream);
  const int most = current_device().multiprocessors * (2048 / kThreads);
  check(launch(measure, Grid{std::clamp(job.num_pieces, 1, most), kThreads, sizeof(Shared)}, stream, job));
}

}  // namespace esper::cuda
