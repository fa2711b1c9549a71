#include "driver.h"

#include <cmath>
#include <memory>

namespace esper {
namespace {

// Below this many elements one thread is done before others would have woken up.
constexpr int64_t kSerial = 65536;
// Outputs larger than this are stored past the caches: they would have left them before they are read again.
constexpr int64_t kStreamBytes = 16 << 20;

// For each block of rows, in parallel: f(block, scratch).
template <class F>
void for_blocks(int64_t blocks, bool serial, int64_t scratch_size, ParallelFor parallel_for, const F& f) {
  const auto range = [&](int64_t begin, int64_t end) {
    thread_local std::unique_ptr<float[]> scratch;  // kept: fresh pages would cost more than the kernel
    thread_local int64_t size = 0;
    if (size < scratch_size) {
      scratch.reset(new float[scratch_size]);
      size = scratch_size;
    }
    for (int64_t block = begin; block < end; ++block) f(block, scratch.get());
  };
  if (serial) return range(0, blocks);
  parallel_for(blocks, range);
}

struct Sums {
  double loss = 0, weight = 0;
  int64_t valid = 0, ignored = 0;
  std::vector<int64_t> counts;  // non-finite, correct@k
};

template <class T>
bool scan(const T* targets, const CrossEntropy& p, Sums* sums) {
  int64_t bad = 0, ignored = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t t = targets[i];
    const bool skip = t == p.ignore_index;
    ignored += skip;
    bad += !skip & (static_cast<uint64_t>(t) >= static_cast<uint64_t>(p.classes));
  }
  if (bad) return false;
  sums->ignored = ignored;
  sums->valid = p.rows - ignored;
  sums->weight = static_cast<double>(sums->valid);
  if (!p.weight) return true;
  sums->weight = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    if (targets[i] != p.ignore_index) sums->weight += p.weight[targets[i]];
  return true;
}

bool scan_targets(const CrossEntropy& p, Sums* sums) {
  if (p.target_bytes == 8) return scan(static_cast<const int64_t*>(p.targets), p, sums);
  if (p.target_bytes == 4) return scan(static_cast<const int32_t*>(p.targets), p, sums);
  return scan(static_cast<const uint8_t*>(p.targets), p, sums);
}

void run(const Kernels& kernels, ParallelFor parallel_for, const CrossEntropy& p, bool count, Sums* sums) {
  const int64_t step = rows_per_block(p.classes), blocks = (p.rows + step - 1) / step;
  const int64_t columns = 1 + p.num_topk;
  std::vector<double> loss(blocks);
  std::vector<int64_t> counts(count ? blocks * columns : 0);
  for_blocks(blocks, p.rows * p.classes <= kSerial, scratch_size(p.classes), parallel_for,
             [&](int64_t block, float* scratch) {
               const int64_t begin = block * step, end = begin + step < p.rows ? begin + step : p.rows;
               kernels.cross_entropy(p, begin, end, scratch, &loss[block],
                                     count ? &counts[block * columns] : nullptr);
             });
  for (double x : loss) sums->loss += x;
  sums->counts.assign(columns, 0);
  for (size_t i = 0; i < counts.size(); ++i) sums->counts[i % columns] += counts[i];
}

// What both passes have in common; false where the tensors are not as promised.
bool start(const LossCall& call, CrossEntropy* p) {
  if (!lay_out(call, p)) return false;
  if (p->weight && call.smoothing > 0) {
    double sum = 0;
    for (int64_t c = 0; c < p->classes; ++c) sum += p->weight[c];
    p->weight_sum = sum;
  }
  p->stream = p->out && p->out != p->logits && p->rows * p->classes * bytes_of(p->dtype) > kStreamBytes;
  return true;
}

}  // namespace

const Kernels* kernels_at(int64_t instruction_set) {
  constexpr const char* names[] = {"auto", "avx512", "avx2", "baseline"};
  return instruction_set >= 0 && instruction_set < 4 ? find_kernels(names[instruction_set]) : nullptr;
}

Outcome cross_entropy(const LossCall& call, const Kernels& kernels, ParallelFor parallel_for) {
  CrossEntropy p{};
  if (!start(call, &p)) return Outcome::kUnsupported;
  Sums sums;
  if (!scan_targets(p, &sums)) return Outcome::kBadTargets;
  double denominator = 1;
  if (call.reduction == kMean) denominator = call.normalizer < 0 ? sums.weight : call.normalizer;
  p.topk = call.topk.data();
  p.num_topk = call.topk.size();
  if (call.reduction == kNone) p.row_loss = call.loss;
  p.zero = denominator == 0;
  p.scale = call.grad_scale / denominator;
  run(kernels, parallel_for, p, call.counts != nullptr, &sums);

  if (call.loss && call.reduction != kNone)
    *call.loss = denominator == 0 ? std::nan("") : sums.loss / denominator;
  if (call.rows) *p.saved_denominator = denominator;
  if (!call.counts) return Outcome::kDone;
  double* s = call.sums;
  s[0] += sums.loss;
  s[1] += sums.weight;
  if (sums.valid) s[2] += sums.loss / sums.weight;
  int64_t* c = call.counts;
  c[0] += sums.valid;
  c[1] += sums.ignored;
  c[2] += sums.counts[0];
  c[4] += 1;
  c[5] += sums.valid > 0;
  for (size_t k = 0; k < call.topk.size(); ++k) c[6 + k] += sums.counts[1 + k];
  return Outcome::kDone;
}

Outcome cross_entropy_backward(const LossCall& call, const Array& grad_output, const Kernels& kernels,
                               ParallelFor parallel_for) {
  CrossEntropy p{};
  if (!call.out || grad_output.dtype != kFloat32 || !grad_output.contiguous() || !start(call, &p))
    return Outcome::kUnsupported;
  p.backward = true;
  const double denominator = *p.saved_denominator;
  p.zero = denominator == 0;
  const float* given = static_cast<const float*>(grad_output.data);
  if (grad_output.numel() == 1 && p.rows != 1) {
    p.scale = given[0] / denominator;
  } else {
    p.scale = 1 / denominator;
    p.scale_of_row = given;
    p.scale_stride = grad_output.numel() == p.rows ? 1 : 0;
  }
  Sums sums;
  run(kernels, parallel_for, p, false, &sums);
  return Outcome::kDone;
}

void grad_stats(const std::vector<Array>& tensors, double inv_scale, const GradStatsOut& out,
                const Kernels& kernels, ParallelFor parallel_for) {
  constexpr int64_t kPiece = 16384;
  struct Piece {
    int64_t tensor, begin, size;
  };
  std::vector<Piece> pieces;
  int64_t elements = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t size = tensors[t].numel();
    for (int64_t begin = 0; begin < size; begin += kPiece)
      pieces.push_back({static_cast<int64_t>(t), begin, size - begin < kPiece ? size - begin : kPiece});
    elements += size;
  }
  // Equal shares of the elements, however they lie in tensors: share s has the pieces that begin inside of
  // it.
  const int64_t shares = (elements + kSerial - 1) / kSerial;
  std::vector<int64_t> first(shares + 1, static_cast<int64_t>(pieces.size()));
  int64_t seen = 0, filled = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    while (filled < shares && filled * kSerial <= seen) first[filled++] = i;
    seen += pieces[i].size;
  }
  std::vector<GradChunk> found(pieces.size());
  for_blocks(shares, shares <= 1, 0, parallel_for, [&](int64_t share, float*) {
    for (int64_t i = first[share]; i < first[share + 1]; ++i) {
      const Piece& piece = pieces[i];
      const Array& x = tensors[piece.tensor];
      found[i] = kernels.grad_chunk(static_cast<const char*>(x.data) + piece.begin * bytes_of(x.dtype),
                                    x.dtype, piece.size, inv_scale);
    }
  });

  double total = 0;
  bool spoilt = false;
  size_t i = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    GradChunk all{};
    for (; i < pieces.size() && pieces[i].tensor == static_cast<int64_t>(t); ++i) {
      all.sum_of_squares += found[i].sum_of_squares;
      if (!(found[i].max_abs <= all.max_abs) && !std::isnan(all.max_abs)) all.max_abs = found[i].max_abs;
      all.zeros += found[i].zeros;
      all.nans += found[i].nans;
      all.infs += found[i].infs;
    }
    total += all.sum_of_squares;
    spoilt |= all.nans + all.infs > 0;
    out.norms[t] = std::sqrt(all.sum_of_squares);
    out.max_abs[t] = all.max_abs;
    out.zeros[t] = all.zeros;
    out.nans[t] = all.nans;
    out.infs[t] = all.infs;
  }
  *out.total_norm = std::sqrt(total);
  *out.found_inf = spoilt;
}

}  // namespace esper
