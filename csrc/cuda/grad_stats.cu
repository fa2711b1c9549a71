// Gradient statistics: one launch over any list of tensors, cut into pieces of equal size. The list is a
// table in device memory, filled through kernel arguments, which needs no copy that the host would wait for.
#include <algorithm>

#include "cuda/driver.h"
#include "cuda/rows.h"

namespace esper::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPieceElements = 32768, kMostPieces = 8192;  // beyond this many, pieces get larger instead
constexpr int kTableTensors = CUDART_VERSION >= 12010 ? 512 : 128;  // tensors per launch: 12 KiB of arguments

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
  Tensor tensors[kTableTensors];
};

__global__ void __launch_bounds__(kThreads)
    write_tensor_table(const __grid_constant__ Part part, const __grid_constant__ Job job, int first,
                       int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    job.tensors[first + i] = part.tensors[i];
    job.tickets[first + i] = 0;
  }
  if (threadIdx.x == 0) job.tickets[job.num_tensors] = 0;
}

// What one thread sees of a piece. NaN is left out of the maximum and put in at the end.
template <class Value>
struct Look {
  double squares = 0;
  Value max_abs = 0;
  unsigned zeros = 0, nans = 0, infs = 0;
  __device__ void at(Value x) {
    squares = fma(static_cast<double>(x), static_cast<double>(x), squares);
    max_abs = fmax(max_abs, fabs(x));
    zeros += x == 0;
    nans += x != x;
    infs += isinf(x);
  }
};

// Multiplies each value by `scale`, in double: once at the end if the square of the scale is an ordinary
// number, and value by value otherwise.
template <class T>
__device__ Found look_at(const void* data, int64_t begin, int64_t n, double scale) {
  constexpr int kSize = Vector<T>::kSize;
  const Span<const T> span{static_cast<const T*>(data) + begin, n};
  if (!(fabs(scale) > 1e-100 && fabs(scale) < 1e100)) {
    Look<double> look;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) look.at(widen(span.data[i]) * scale);
    return {look.squares, look.max_abs, look.zeros, look.nans, look.infs};
  }
  Look<float> look;
  for_vectors(span, 0, span.vectors(), false, [&](int64_t v, const Vector<T>& x) {
    const int64_t first = span.first(v);
    const bool whole = span.whole(first);
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      if (whole || (first + k >= 0 && first + k < n)) look.at(widen(x.x[k]));
  });
  return {look.squares * scale * scale, look.max_abs * fabs(scale), look.zeros, look.nans, look.infs};
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

__global__ void __launch_bounds__(kThreads, 2) grad_stats_pieces(const __grid_constant__ Job job) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const double scale = job.inv_scale.read();
  const int64_t share = blockIdx.x, shares = gridDim.x;
  const int begin = job.num_pieces * share / shares, end = job.num_pieces * (share + 1) / shares;
  int t = begin < end ? tensor_of(job, begin) : 0;
  for (int i = begin; i < end; ++i) {
    while (t + 1 < job.num_tensors && job.tensors[t + 1].first_piece <= i) ++t;
    const Tensor x = job.tensors[t];
    const int64_t from = (i - x.first_piece) * job.piece, n = min(job.piece, x.size - from);
    Found found;
    if (x.dtype == kFloat32) found = look_at<float>(x.data, from, n, scale);
    if (x.dtype == kBFloat16) found = look_at<BFloat16>(x.data, from, n, scale);
    if (x.dtype == kFloat16) found = look_at<Float16>(x.data, from, n, scale);
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

  Found all;  // over all tensors; of the counts, only whether anything is not finite
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
  do {  // even without any tensor, because it makes the ticket
    const int count = std::min(kTableTensors, job.num_tensors - first);
    std::copy_n(tensors.begin() + first, count, part.tensors);
    check(launch(write_tensor_table, Grid{1, kThreads}, stream, part, job, first, count));
    first += count;
  } while (first < job.num_tensors);
  const int most = current_device().multiprocessors * (2048 / kThreads);
  check(launch(grad_stats_pieces, Grid{std::clamp(job.num_pieces, 1, most), kThreads, sizeof(Shared)}, stream,
               job));
}

}  // namespace esper::cuda
