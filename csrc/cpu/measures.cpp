#include "measures.h"

namespace esper {
namespace {

// Blocks are added up by themselves, in parallel, if they have at most this many counts for each of their
// rows. With more, there are so many classes that adding a row up costs little beside reading it.
constexpr int64_t kCountsOfRow = 4;

// In an order that only n decides.
double sum_of(const float* x, int64_t n) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
  for (; i < n; ++i) lanes[i % kLanes] += x[i];
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// Calls f(i, target, predicted) for each row from begin to end that is measured.
template <class F>
void for_measured(const LossRows& p, int64_t begin, int64_t end, const F& f) {
  with_targets(p, [&](const auto* targets) {
    for (int64_t i = begin; i < end; ++i)
      if (p.predicted[i] >= 0) f(i, static_cast<int64_t>(targets[i]), p.predicted[i]);
  });
}

}  // namespace

MeasuredRows::MeasuredRows(const MeasurePlan& plan, LossRows& p) : plan_(plan), p_(p) {
  if (!plan.any()) return;
  predicted_.reset(new int32_t[p.rows]);
  values_.reset(new float[kNumRowMeasures * p.rows]);
  p.predicted = predicted_.get();
  p.row_measures = values_.get();
  p.wants_entropy = plan.entropy;
}

void MeasuredRows::expect(int64_t blocks, int64_t rows) {
  in_blocks_ = plan_.any() && blocks > 1 && plan_.num_counts() <= kCountsOfRow * rows;
  if (!in_blocks_) return;
  block_sums_.resize(blocks * plan_.num_sums());
  block_counts_.resize(blocks * plan_.num_counts());
}

void MeasuredRows::add_block(int64_t block, int64_t begin, int64_t end) {
  if (in_blocks_)
    add_rows(begin, end, block_sums_.data() + block * plan_.num_sums(),
             block_counts_.data() + block * plan_.num_counts());
}

void MeasuredRows::add_to_meter(double* sums, int64_t* counts) const {
  if (!plan_.any()) return;
  if (!in_blocks_) return add_rows(0, p_.rows, sums, counts);
  const size_t num_sums = plan_.num_sums(), num_counts = plan_.num_counts();
  for (size_t i = 0; i < block_sums_.size(); ++i) sums[i % num_sums] += block_sums_[i];
  for (size_t begin = 0; begin < block_counts_.size(); begin += num_counts)
    for (size_t k = 0; k < num_counts; ++k) counts[k] += block_counts_[begin + k];
}

// One after the other.
void MeasuredRows::add_rows(int64_t begin, int64_t end, double* sums, int64_t* counts) const {
  const MeasurePlan& plan = plan_;
  const LossRows& p = p_;
  for (int k = kNll; k < (plan.entropy ? kNumRowMeasures : kEntropy); ++k)
    sums[k - kNll] += sum_of(p.row_measures + k * p.rows + begin, end - begin);
  const int64_t classes = plan.per_class, bins = plan.bins;
  if (plan.confusion) {
    for_measured(p, begin, end, [&](int64_t, int64_t target, int64_t predicted) {
      counts[target * classes + predicted] += 1;
    });
  } else if (classes) {
    int64_t *const support = counts, *const correct = counts + classes, *const chosen = correct + classes;
    for_measured(p, begin, end, [&](int64_t, int64_t target, int64_t predicted) {
      support[target] += 1;
      correct[target] += predicted == target;
      chosen[predicted] += 1;
    });
  }
  if (!bins) return;
  const float *const confidence = p.row_measures + kConfidence * p.rows, scale = bins;
  double* const confidence_sum = sums + (kNumRowMeasures - kNll);
  int64_t *const rows = counts + plan.num_class_counts(), *const correct = rows + bins;
  for_measured(p, begin, end, [&](int64_t i, int64_t target, int64_t predicted) {
    const int64_t scaled = confidence[i] * scale, bin = scaled < bins ? scaled : bins - 1;
    rows[bin] += 1;
    correct[bin] += predicted == target;
    confidence_sum[bin] += confidence[i];
  });
}

}  // namespace esper
