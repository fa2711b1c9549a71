// Gradient statistics: one launch over any list of tensors, cut into pieces of equal size, of which each
// block takes a share. The list is a table in device memory, filled through kernel arguments, which needs no
// copy that the host would wait for; it is filled again only when a tensor has moved.
#include <algorithm>
#include <cstring>

#include "cuda/driver.h"
#include "cuda/rows.h"

namespace esper::cuda {
namespace {

constexpr int kThreads = 256, kBlocks = 4;                           // blocks per multiprocessor
constexpr int64_t kPiece = 8192;                                     // elements
constexpr int kTableTensors = CUDART_VERSION >= 12010 ? 2016 : 240;  // per launch: as arguments may be long

// One more, behind the last, begins where the last ends.
struct Tensor {
  const void* data;
  int32_t first_piece;
  uint16_t missing;  // elements that its last piece has less than the others
  uint16_t dtype;
};
static_assert(sizeof(Tensor) == kGradTableWords * 4 - sizeof(unsigned));

struct Found {
  double squares = 0, max_abs = 0;
  int64_t zeros = 0, nans = 0, infs = 0;
};

struct Job {
  Tensor* tensors;    // [num_tensors + 1]
  unsigned* tickets;  // [num_tensors + 1]
  int num_tensors, num_pieces;
  Number inv_scale;
  GradStatsOut out;
  Found* runs;      // [num_tensors + blocks]: of tensor t, what block b found is at t + b
  double* squares;  // [num_tensors]
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
    write_tensor_table(const __grid_constant__ Part part, Tensor* tensors, unsigned* tickets, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    tensors[i] = part.tensors[i];
    tickets[i] = 0;
  }
}

// What one thread sees. Squares of float32 neither overflow nor underflow in double, so a NaN or an infinity
// shows in their sum, and costs nothing where there is none. Two sums hide the latency of one.
struct Look {
  double squares[2] = {};
  float max_abs = 0;
  unsigned zeros = 0;
  __device__ void at(float x, int k) {
    squares[k % 2] = fma(static_cast<double>(x), static_cast<double>(x), squares[k % 2]);
    max_abs = fmaxf(max_abs, fabsf(x));
    zeros += x == 0;
  }
};

// This thread's share of n elements: vectors at 16 byte boundaries, and single ones before and behind them.
template <class T>
__device__ Look look_at(const T* data, int64_t n) {
  constexpr int kSize = Vector<T>::kSize, kInFlight = 4;
  const int64_t head = min(n, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T)));
  const int64_t vectors = (n - head) / kSize;
  const auto* from = reinterpret_cast<const Vector<T>*>(data + head);
  Look look;
  const auto take = [&](const Vector<T>& x) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) look.at(widen(x.x[k]), k);
  };
  int64_t v = threadIdx.x;
  for (; v + (kInFlight - 1) * kThreads < vectors; v += kInFlight * kThreads) {
    Vector<T> x[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) x[j] = from[v + j * kThreads];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) take(x[j]);
  }
  for (; v < vectors; v += kThreads) take(from[v]);
  const int64_t single = threadIdx.x < head ? threadIdx.x : threadIdx.x + vectors * kSize;
  if (single < n) look.at(widen(data[single]), 0);
  return look;
}

// The same for scales that are 0, extreme or not finite, and to count NaN and infinity. A call of its own, so
// that the usual look keeps its registers.
template <class T>
__device__ __noinline__ Found look_closely(const T* data, int64_t n, double scale) {
  Found found;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const double x = widen(data[i]) * scale;
    found.squares = fma(x, x, found.squares);
    found.max_abs = fmax(found.max_abs, fabs(x));  // NaN is put in at the end
    found.zeros += x == 0;
    found.nans += x != x;
    found.infs += isinf(x);
  }
  return found;
}

// The n elements of a tensor from `begin` on, each multiplied by `scale`; the same in every thread.
template <class T>
__device__ Found measure(const void* tensor, int64_t begin, int64_t n, double scale, Found* scratch) {
  const T* data = static_cast<const T*>(tensor) + begin;
  if (fabs(scale) > 1e-100 && fabs(scale) < 1e100) {  // its square is an ordinary number
    const Look look = look_at(data, n);
    const double squares = look.squares[0] + look.squares[1];
    const Found found = reduce_block(Found{squares * scale * scale, look.max_abs * fabs(scale), look.zeros},
                                     Found{}, scratch, Merge());
    if (found.squares < INFINITY) return found;
  }
  return reduce_block(look_closely(data, n, scale), Found{}, scratch, Merge());
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

// Block b takes the pieces from this one on to that of block b + 1.
__device__ int first_piece_of(const Job& job, int64_t b) { return job.num_pieces * b / gridDim.x; }
__device__ int block_of(const Job& job, int64_t piece) {
  return ((piece + 1) * gridDim.x - 1) / job.num_pieces;
}

__device__ void write_tensor(const Job& job, int t, const Found& all) {
  job.out.norms[t] = sqrt(all.squares);
  job.out.max_abs[t] = all.nans > 0 ? NAN : all.max_abs;
  job.out.zeros[t] = all.zeros;
  job.out.nans[t] = all.nans;
  job.out.infs[t] = all.infs;
  job.squares[t] = all.squares;
}

// What the blocks from `first` to `last` found of a tensor, in order, by the last that worked on it.
__device__ void finish_tensor(const Job& job, int t, int first, int last, Shared& shared) {
  Found all;
  for (int b = first + threadIdx.x; b <= last; b += kThreads) {
    const Found* x = job.runs + t + b;
    all = Merge()(all, {__ldcg(&x->squares), __ldcg(&x->max_abs), __ldcg(&x->zeros), __ldcg(&x->nans),
                        __ldcg(&x->infs)});
  }
  all = reduce_block(all, Found{}, shared.scratch, Merge());
  if (threadIdx.x == 0) write_tensor(job, t, all);
}

// This block's share of tensor t, from piece `begin` to `end`.
__device__ void run(const Job& job, int t, int begin, int end, double scale, Shared& shared) {
  const Tensor x = job.tensors[t];
  const int behind = job.tensors[t + 1].first_piece;
  const int64_t from = (begin - x.first_piece) * kPiece;
  const int64_t n = (end - begin) * kPiece - (end == behind ? x.missing : 0);
  Found found;
  if (x.dtype == kFloat32) found = measure<float>(x.data, from, n, scale, shared.scratch);
  if (x.dtype == kBFloat16) found = measure<BFloat16>(x.data, from, n, scale, shared.scratch);
  if (x.dtype == kFloat16) found = measure<Float16>(x.data, from, n, scale, shared.scratch);
  const int first = block_of(job, x.first_piece), last = block_of(job, behind - 1);
  if (first == last) {
    if (threadIdx.x == 0) write_tensor(job, t, found);
    return;
  }
  if (threadIdx.x == 0) job.runs[t + blockIdx.x] = found;
  if (is_last(job.tickets + t, last - first + 1, &shared.flag)) finish_tensor(job, t, first, last, shared);
}

__global__ void __launch_bounds__(kThreads, kBlocks) grad_stats_pieces(const __grid_constant__ Job job) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const double scale = job.inv_scale.read();
  const int end = first_piece_of(job, blockIdx.x + 1);
  int begin = first_piece_of(job, blockIdx.x);
  int t = begin < end ? tensor_of(job, begin) : 0;
  while (begin < end) {
    while (job.tensors[t + 1].first_piece <= begin) ++t;
    const int stop = min(end, job.tensors[t + 1].first_piece);
    run(job, t, begin, stop, scale, shared);
    begin = stop;
  }
  if (!is_last(job.tickets + job.num_tensors, gridDim.x, &shared.flag)) return;

  Found all;  // over all tensors; of the counts, only whether anything is not finite
  for (int i = threadIdx.x; i < job.num_tensors; i += kThreads) {
    if (job.tensors[i].first_piece == job.tensors[i + 1].first_piece)  // empty
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

std::vector<Tensor> table_of(const std::vector<Array>& arrays) {
  std::vector<Tensor> table;
  table.reserve(arrays.size() + 1);
  int32_t piece = 0;
  for (const Array& x : arrays) {
    const int64_t size = x.numel(), pieces = (size + kPiece - 1) / kPiece;
    table.push_back(
        {x.data, piece, static_cast<uint16_t>(pieces * kPiece - size), static_cast<uint16_t>(x.dtype)});
    piece += pieces;
  }
  table.push_back({nullptr, piece, 0, 0});
  return table;
}

// Fills the table on the device, and sets its tickets to 0.
void write_table(const std::vector<Tensor>& table, const Job& job, cudaStream_t stream) {
  Part part{};
  for (size_t first = 0; first < table.size(); first += kTableTensors) {
    const int count = std::min<size_t>(kTableTensors, table.size() - first);
    std::copy_n(table.begin() + first, count, part.tensors);
    check(launch(write_tensor_table, Grid{1, kThreads}, stream, part, job.tensors + first,
                 job.tickets + first, count));
  }
}

}  // namespace

void grad_stats(const std::vector<Array>& arrays, const Number& inv_scale, const GradStatsOut& out,
                const Allocate& allocate, cudaStream_t stream) {
  const std::vector<Tensor> table = table_of(arrays);
  const int64_t t = arrays.size(), bytes = table.size() * sizeof(Tensor);
  Job job{};
  job.num_tensors = t;
  job.num_pieces = table.back().first_piece;
  job.inv_scale = inv_scale;
  job.out = out;
  const int blocks = std::clamp(job.num_pieces, 1, current_device().multiprocessors * kBlocks);

  // A graph writes its own table whenever it is replayed: the kept one may hold other tensors by then.
  const bool kept = out.table && !is_capturing(stream);
  const int64_t table_bytes = kept ? 0 : (t + 1) * kGradTableWords * 4;
  char* memory = static_cast<char*>(allocate((t + blocks) * sizeof(Found) + t * 8 + table_bytes));
  job.runs = reinterpret_cast<Found*>(memory);
  job.squares = reinterpret_cast<double*>(job.runs + t + blocks);
  job.tensors = reinterpret_cast<Tensor*>(kept ? static_cast<void*>(out.table) : job.squares + t);
  job.tickets = reinterpret_cast<unsigned*>(job.tensors + t + 1);
  if (!kept) {
    write_table(table, job, stream);
  } else if (std::memcmp(out.table_on_host, table.data(), bytes) != 0) {
    std::memset(out.table_on_host, -1, bytes);  // unknown, should a launch fail
    write_table(table, job, stream);
    std::memcpy(out.table_on_host, table.data(), bytes);
  }
  check(launch(grad_stats_pieces, Grid{blocks, kThreads, sizeof(Shared)}, stream, job));
}

}  // namespace esper::cuda
