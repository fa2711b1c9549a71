// Gradient statistics: one launch over any list of tensors, cut into pieces of equal size. The list is a
// table in device memory, filled through kernel arguments, which needs no copy that the host would wait for.
#include <algorithm>

#include "cuda/driver.h"
#include "cuda/rows.h"

namespace esper::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPieceElements = 32768, kMostPieces = 8192;  // larger pieces rather than more
constexpr int kTold =
    CUDART_VERSION >= 12010 ? 512 : 128;  // tensors a launch is told of: 12 KiB of arguments

struct Tensor {
  const void* data;
  int64_t size;
  int32_t first_piece;
  int16_t dtype;
};

struct Found {
  double squares = 0, max_abs = 0;
  int64_t zeros = 0, nans = 0, infs = 0;
};

struct Job {
  Tensor* tensors;
  int num_tensors, num_pieces;
  int64_t piece;  // elements
  Number inv_scale;
  bool scaled;
  GradStatsOut out;
  Found* pieces;      // [num_pieces]
  double* squares;    // [num_tensors]
  unsigned* tickets;  // [num_tensors + 1]
};

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

struct Part {
  Tensor tensors[kTold];
};

__global__ void __launch_bounds__(kThreads)
    tell(const __grid_constant__ Part part, const __grid_constant__ Job job, int first, int count) {
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
  Look<kScaled> look;
  for_vectors(span, 0, span.vectors(), false, [&](int64_t v, const Vector<T>& x) {
    const int64_t first = span.first(v);
    const bool whole = span.whole(first);
#pragma unroll
    for (int k = 0; k < Vector<T>::kSize; ++k)
      if (whole || (first + k >= 0 && first + k < span.n)) look.at(widen(x.x[k]), scale);
  });
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
  job.squares[t] = all.squares;
}

// The pieces of a tensor, in order, by the last block that worked on one.
__device__ void finish_tensor(const Job& job, int t, int first, int pieces, Shared& shared) {
  Found all;
  for (int i = first + threadIdx.x; i < first + pieces; i += kThreads) {
    const Found* x = job.pieces + i;
    all = Merge()(all, {__ldcg(&x->squares), __ldcg(&x->max_abs), __ldcg(&x->zeros), __ldcg(&x->nans),
                        __ldcg(&x->infs)});
  }
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
    if (threadIdx.x == 0) job.pieces[i] = found;
    if (is_last(job.tickets + t, pieces, &shared.flag)) finish_tensor(job, t, x.first_piece, pieces, shared);
  }
  if (!is_last(job.tickets + job.num_tensors, gridDim.x, &shared.flag)) return;

  Found all;  // over the tensors: of the counts only whether anything is not finite
  for (int i = threadIdx.x; i < job.num_tensors; i += kThreads) {
    if (job.tensors[i].size == 0)
      write_tensor(job, i, Found{});
    else
      all = Merge()(all,
                    Found{__ldcg(job.squares + i), 0, 0, __ldcg(job.out.nans + i), __ldcg(job.out.infs + i)});
  }
  all = reduce_block(all, Found{}, shared.scratch, Merge());
  if (threadIdx.x != 0) return;
  *job.out.total_norm = sqrt(all.squares);
  *job.out.found_inf = all.nans + all.infs > 0;
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
  char* memory = static_cast<char*>(allocate(t * (sizeof(Tensor) + 8) + p * sizeof(Found) + (t + 1) * 4));
  job.tensors = reinterpret_cast<Tensor*>(memory);
  job.pieces = reinterpret_cast<Found*>(job.tensors + t);
  job.squares = reinterpret_cast<double*>(job.pieces + p);
  job.tickets = reinterpret_cast<unsigned*>(job.squares + t);
  Part part{};
  int first = 0;
  do {  // without any tensor too: it makes the ticket
    const int count = std::min(kTold, job.num_tensors - first);
    std::copy_n(tensors.begin() + first, count, part.tensors);
    check(launch(tell, Grid{1, kThreads}, stream, part, job, first, count));
    first += count;
  } while (first < job.num_tensors);
  const int most = current_device().multiprocessors * (2048 / kThreads);
  check(launch(measure, Grid{std::clamp(job.num_pieces, 1, most), kThreads, sizeof(Shared)}, stream, job));
}

}  // namespace esper::cuda
