// Long file: how a call is split among threads, and what it adds to a meter or to gradient statistics.
#include "driver.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "measures.h"

namespace esper {
namespace {

// Up to this many elements, one thread finishes before others would have woken up.
constexpr int64_t kSerial = 65536;
// Gradients larger than this are stored past the caches, which could not hold them until they are read.
constexpr int64_t kStreamBytes = 16 << 20;

// Calls f(block, next, scratch) for each block, in parallel unless `serial`; `next` is the block that the
// same thread does after it, or any number from `blocks` on. A thread begins with its own share, which may
// still be in its cache from the last call. Then it takes what others have not begun, so that none waits long
// for another whose core is busy.
template <class F>
void for_blocks(int64_t blocks, bool serial, int64_t scratch_size, const Machine& machine, const F& f) {
  constexpr int64_t kMostPieces = 256;
  const int64_t piece_size = (blocks + kMostPieces - 1) / kMostPieces;  // in blocks
  const int64_t pieces = piece_size ? (blocks + piece_size - 1) / piece_size : 0;
  std::atomic<bool> taken[kMostPieces] = {};
  const auto work = [&](int64_t first, int64_t last) {
    thread_local std::unique_ptr<float[]> scratch;  // reused, because fresh pages cost more than the kernel
    thread_local int64_t size = 0;
    if (size < scratch_size) {
      scratch.reset(new float[scratch_size]);
      size = scratch_size;
    }
    const int64_t own = last - first;
    int64_t asked = 0;
    const auto take = [&] {
      while (asked < pieces) {
        // Others do their own pieces in rising order, so those below this share are the last to be begun.
        const int64_t k = asked++;
        const int64_t piece = k < own ? first + k : (last - 1 - k + pieces) % pieces;
        if (!taken[piece].exchange(true, std::memory_order_relaxed)) return piece;
      }
      return pieces;
    };
    int64_t piece = take();
    while (piece < pieces) {
      const int64_t then = take();  // known this early, so that it can be prefetched
      const int64_t begin = piece * piece_size;
      const int64_t end = begin + piece_size < blocks ? begin + piece_size : blocks;
      for (int64_t block = begin; block < end; ++block)
        f(block, block + 1 < end ? block + 1 : then * piece_size, scratch.get());
      piece = then;
    }
  };
  if (serial) return work(0, pieces);
  machine.parallel_for(pieces, work);
}

// What a batch adds to a meter.
struct Sums {
  double loss = 0, weight = 0;
  int64_t valid = 0, ignored = 0;
  std::vector<int64_t> counts = {};  // rows that are not finite, then correct@k for each k of topk
};

[[noreturn]] void throw_bad_target(const LossRows& p, int64_t bad) {
  int64_t i = 0;
  while (target_of(p, i) == p.ignore_index || is_valid(p, target_of(p, i))) ++i;
  throw std::out_of_range("target " + std::to_string(target_of(p, i)) + " of row " + std::to_string(i) +
                          " is outside [0, " + std::to_string(p.all_classes) + ") and not ignore_index " +
                          std::to_string(p.ignore_index) + "; " + std::to_string(bad) + " such rows");
}

// The weights of both targets of a row, times their shares.
double mixed_weight(const LossRows& p, int64_t i, int64_t target) {
  const int64_t second = p.second[i];
  return p.shares[i] * (p.weight ? p.weight[target] : 1.0f) +
         p.shares[p.rows + i] * (p.weight ? p.weight[second] : 1.0f);
}

// Counts the targets and adds up their weights; throws for one that is bad.
template <class T>
Sums scan(const T* targets, const LossRows& p) {
  int64_t bad = 0, ignored = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t t = targets[i];
    const bool skip = t == p.ignore_index;
    ignored += skip;
    bad += !skip & (static_cast<uint64_t>(t) >= static_cast<uint64_t>(p.all_classes));
  }
  if (bad) throw_bad_target(p, bad);
  Sums sums;
  sums.ignored = ignored;
  sums.valid = p.rows - ignored;
  sums.weight = static_cast<double>(sums.valid);
  if (!p.weight && !p.second) return sums;
  sums.weight = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    if (targets[i] != p.ignore_index)
      sums.weight += p.second ? mixed_weight(p, i, targets[i]) : p.weight[targets[i]];
  return sums;
}

// Throws for a second target that is no class.
void require_second(const LossRows& p) {
  for (int64_t i = 0; p.second && i < p.rows; ++i)
    if (p.second[i] < 0 || p.second[i] >= p.all_classes)
      throw std::invalid_argument("esper: expected second targets that are classes");
}

Sums scan_targets(const LossRows& p) {
  return with_targets(p, [&](const auto* targets) { return scan(targets, p); });
}

// The rows of a block of `step` rows.
RowRange rows_at(const LossRows& p, int64_t step, int64_t block, int64_t next) {
  const int64_t begin = block * step, end = begin + step < p.rows ? begin + step : p.rows;
  return {begin, end, next * step < p.rows ? next * step : end - 1};
}

// Runs the kernels over all rows; adds their losses and counts to those of the targets.
Sums run(const Kernels& kernels, const Machine& machine, const CrossEntropy& p, bool count, Sums sums,
         MeasuredRows& measured) {
  const bool tiled = is_tiled(p);
  const int64_t step = tiled ? rows_per_tile(p.classes) : rows_per_block(p.classes);
  const int64_t blocks = (p.rows + step - 1) / step;
  const int64_t scratch_floats = scratch_size(p.classes, p.kept) + (tiled ? step * tile_width(p.classes) : 0);
  const int64_t columns = 1 + p.num_topk;
  std::vector<double> loss(blocks);
  std::vector<int64_t> counts(count ? blocks * columns : 0);
  measured.expect(blocks, step);
  for_blocks(blocks, p.rows * p.classes <= kSerial, scratch_floats, machine,
             [&](int64_t block, int64_t next, float* scratch) {
               const RowRange rows = rows_at(p, step, block, next);
               kernels.cross_entropy(p, rows, scratch, &loss[block],
                                     count ? &counts[block * columns] : nullptr);
               measured.add_block(block, rows.begin, rows.end);
             });
  for (double x : loss) sums.loss += x;
  sums.counts.assign(columns, 0);
  for (size_t i = 0; i < counts.size(); ++i) sums.counts[i % columns] += counts[i];
  return sums;
}

// Whether the gradient is to be stored past the caches.
bool exceeds_caches(const LossRows& p) {
  return p.out && p.out != p.logits && p.rows * p.classes * bytes_of(p.dtype) > kStreamBytes;
}

// What both passes have in common.
CrossEntropy start(const LossCall& call, const Array* grad_output, const Machine& machine) {
  CrossEntropy p{rows_of(call, grad_output)};
  p.smoothing = call.numbers.label_smoothing.read();
  p.z_loss = call.numbers.z_loss.read();
  p.softcap = call.numbers.has_softcap ? call.numbers.softcap.read() : 0;
  p.weight_sum = p.all_classes;
  if (p.weight && p.smoothing > 0) {
    double sum = 0;
    for (int64_t c = 0; c < p.all_classes; ++c) sum += p.weight[c];
    p.weight_sum = sum;
  }
  p.stream = exceeds_caches(p);
  p.kept = kept_classes(p.classes, machine.cache_bytes);
  return p;
}

void add_to_meter(const LossCall& call, const Sums& seen) {
  double* sums = static_cast<double*>(call.sums->data);
  int64_t* counts = static_cast<int64_t*>(call.counts->data);
  sums[kLossSum] += seen.loss;
  sums[kWeightSum] += seen.weight;
  if (seen.valid) sums[kBatchMeanSum] += seen.loss / seen.weight;
  counts[kValid] += seen.valid;
  counts[kIgnored] += seen.ignored;
  counts[kNonfinite] += seen.counts[0];
  counts[kBatches] += 1;
  counts[kBatchesWithValid] += seen.valid > 0;
  for (size_t k = 0; k < call.topk.size(); ++k) counts[kFirstCorrect + k] += seen.counts[1 + k];
}

}  // namespace

const Kernels* kernels_at(int64_t instruction_set) {
  const bool known = instruction_set >= 0 && instruction_set < kNumInstructionSets;
  return known ? find_kernels(kInstructionSets[instruction_set]) : nullptr;
}

void cross_entropy(const LossCall& call, const Kernels& kernels, const Machine& machine) {
  CrossEntropy p = start(call, nullptr, machine);
  require_second(p);
  const Sums targets = scan_targets(p);
  double denominator = 1;
  if (call.reduction == kMean)
    denominator = call.numbers.has_normalizer ? call.numbers.normalizer.read() : targets.weight;
  p.topk = call.topk.data();
  p.zero = denominator == 0;
  p.scale = call.numbers.grad_scale.read() / denominator;
  MeasuredRows measured(measures_of(call), p);
  const Sums sums = run(kernels, machine, p, call.counts.has_value(), targets, measured);

  if (call.loss && call.reduction != kNone) {
    const double loss = denominator == 0 ? std::nan("") : sums.loss / denominator;
    *static_cast<float*>(call.loss->data) = loss;
  }
  if (p.saved_denominator) *p.saved_denominator = denominator;
  if (!call.counts) return;
  add_to_meter(call, sums);
  measured.add_to_meter(static_cast<double*>(call.sums->data) + kNumSums,
                        static_cast<int64_t*>(call.counts->data) + kFirstCorrect + call.topk.size());
}

void cross_entropy_backward(const LossCall& call, const Array& grad_output, const Kernels& kernels,
                            const Machine& machine) {
  CrossEntropy p = start(call, &grad_output, machine);
  require_second(p);
  const double denominator = *p.saved_denominator;
  p.zero = denominator == 0;
  p.scale = 1 / denominator;
  if (p.scale_stride == 0) {
    p.scale = *p.scale_of_row / denominator;
    p.scale_of_row = nullptr;
  }
  MeasuredRows none({}, p);
  run(kernels, machine, p, false, {}, none);
}

void class_sums(const ClassSumsCall& call, const Kernels& kernels, const Machine& machine) {
  ClassSums p{start(call.batch, nullptr, machine)};
  require_second(p);
  scan_targets(p);
  p.target_logits = call.target_logits ? static_cast<const float*>(call.target_logits->data) : nullptr;
  const MeasurePlan plan = measures_of(call.batch);
  p.measured = plan.any();
  p.wants_entropy = plan.entropy;
  p.sums = static_cast<double*>(call.sums.data);
  const int64_t step = rows_per_block(p.classes), blocks = (p.rows + step - 1) / step;
  for_blocks(blocks, p.rows * p.classes <= kSerial, scratch_size(p.classes, 0), machine,
             [&](int64_t block, int64_t next, float* scratch) {
               kernels.class_sums(p, rows_at(p, step, block, next), scratch);
             });
}

void token_logprobs(const LogprobCall& call, const Kernels& kernels, const Machine& machine) {
  TokenLogprobs p{rows_of(call)};
  scan_targets(p);
  p.stream = exceeds_caches(p);
  const int64_t step = rows_per_block(p.classes), blocks = (p.rows + step - 1) / step;
  for_blocks(blocks, p.rows * p.classes <= kSerial, 0, machine, [&](int64_t block, int64_t next, float*) {
    kernels.token_logprobs(p, rows_at(p, step, block, next));
  });
}

void grad_stats(const std::vector<Array>& tensors, double inv_scale, const GradStatsOut& out,
                const Kernels& kernels, const Machine& machine) {
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
  // Threads get equal shares of the elements, whatever the tensors' sizes: share s holds the pieces that
  // begin inside of it.
  const int64_t shares = (elements + kSerial - 1) / kSerial;
  std::vector<int64_t> first(shares + 1, static_cast<int64_t>(pieces.size()));
  int64_t seen = 0, filled = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    while (filled < shares && filled * kSerial <= seen) first[filled++] = i;
    seen += pieces[i].size;
  }
  std::vector<GradChunk> found(pieces.size());
  for_blocks(shares, shares <= 1, 0, machine, [&](int64_t share, int64_t, float*) {
    for (int64_t i = first[share]; i < first[share + 1]; ++i) {
      const Piece& piece = pieces[i];
      const Array& x = tensors[piece.tensor];
      found[i] = kernels.grad_chunk(static_cast<const char*>(x.data) + piece.begin * bytes_of(x.dtype),
                                    x.dtype, piece.size, inv_scale);
    }
  });

  double total = 0;
  bool found_inf = false;
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
    found_inf |= all.nans + all.infs > 0;
    out.norms[t] = std::sqrt(all.sum_of_squares);
    out.max_abs[t] = all.max_abs;
    out.zeros[t] = all.zeros;
    out.nans[t] = all.nans;
    out.infs[t] = all.infs;
  }
  *out.total_norm = std::sqrt(total);
  *out.found_inf = found_inf;
}

}  // namespace esper
