#include "call.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace esper {
namespace {

void require(bool holds, const char* expectation) {
  if (!holds) throw std::invalid_argument(std::string("esper: expected ") + expectation);
}

[[noreturn]] void refuse(const char* name, const char* expectation) {
  throw std::invalid_argument(std::string("esper: expected ") + name + " " + expectation);
}

void require_storage(const char* name, const Array& x) {
  // `room` may be negative for an empty tensor, whose offset may lie past the end of its storage.
  if (x.numel() > 0 && x.reach() > x.room)
    refuse(name, "to have storage for its shape: it was freed or shrunk");
}

// Memory for exactly n numbers of one type.
template <class T>
T* memory_of(const char* name, const Array& x, Dtype dtype, int64_t n) {
  if (x.dtype != dtype) refuse(name, "to have another dtype");
  if (x.numel() != n || !x.contiguous()) refuse(name, "to be contiguous, with another number of elements");
  if (!x.aligned()) refuse(name, "to lie at a multiple of its element size");
  require_storage(name, x);
  return static_cast<T*>(x.data);
}

bool same_sizes(const Array& x, const Array& y, int64_t dims) {
  return std::equal(x.sizes, x.sizes + dims, y.sizes);
}

bool overlap(const Array& x, const Array& y) {
  const char *x_begin = static_cast<const char*>(x.data), *y_begin = static_cast<const char*>(y.data);
  return x_begin < y_begin + y.reach() && y_begin < x_begin + x.reach();
}

bool same_place(const Array& x, const Array& y) {
  return x.data == y.data && x.dims == y.dims && same_sizes(x, y, x.dims) &&
         std::equal(x.strides, x.strides + x.dims, y.strides);
}

// Strides and sizes of the dimensions of more than one element, by stride.
std::vector<std::pair<int64_t, int64_t>> sorted_dims(const Array& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < x.dims; ++d)
    if (x.sizes[d] > 1) dims.emplace_back(x.strides[d], x.sizes[d]);
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Whether two elements may share memory, as in an expanded tensor. Unusual strides without any such pair can
// give true as well.
bool overlaps_itself(const Array& x) {
  int64_t reach = 0;  // from the first to the last element, over the dimensions so far
  for (const auto& [stride, size] : sorted_dims(x)) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

void require_number(const char* name, const Number& number, double low, double high) {
  if (number.from_tensor) return;
  if (!(number.value >= low && number.value <= high)) refuse(name, "to be in its range");
}

void require_plan(const LossCall& call) {
  require(call.measures.empty() || call.measures.size() == 4, "the four numbers of a meter's measures");
}

// Merges neighbouring leading dimensions; false if more than two remain.
bool merge_rows(const Array& x, RowLayout* layout) {
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int level = 0;
  for (int64_t d = x.dims - 2; d >= 0; --d) {
    if (x.sizes[d] == 1) continue;
    if (size[level] == 1) {
      size[level] = x.sizes[d];
      stride[level] = x.strides[d];
    } else if (x.strides[d] == stride[level] * size[level]) {
      size[level] *= x.sizes[d];
    } else if (level == 0) {
      level = 1;
      size[1] = x.sizes[d];
      stride[1] = x.strides[d];
    } else {
      return false;
    }
  }
  *layout = {size[0], stride[1], stride[0]};
  return true;
}

// What the forward pass, the step and the backward pass have in common.
void check_inputs(const LossCall& call) {
  const Array &logits = call.logits, &targets = call.targets;
  require(logits.dtype <= kFloat16, "logits of float32, bfloat16 or float16");
  require(targets.dtype >= kInt64, "targets of int64, int32 or uint8");
  require(logits.dims > 0 && logits.sizes[logits.dims - 1] > 0, "logits [..., V] with V of at least 1");
  require(targets.dims == logits.dims - 1 && same_sizes(logits, targets, targets.dims),
          "targets of the logits' shape without the classes");
  require_storage("logits", logits);
  require_storage("targets", targets);
  const int64_t classes = logits.sizes[logits.dims - 1], all = call.num_classes.value_or(classes);
  require(all >= classes && call.first_class >= 0 && call.first_class <= all - classes,
          "logits of some of all classes");
  if (call.weight) {
    require(call.weight->dims == 1 && call.weight->sizes[0] == all, "weight of all classes");
    require(call.weight->dtype == kFloat32, "weight of float32");
    require_storage("weight", *call.weight);
  }
  require(call.second.has_value() == call.shares.has_value(), "second targets with shares or neither");
  if (call.second) {
    memory_of<int64_t>("second", *call.second, kInt64, targets.numel());
    memory_of<float>("shares", *call.shares, kFloat32, 2 * targets.numel());
  }
  require_number("label_smoothing", call.numbers.label_smoothing, 0, 1);
  require_number("z_loss", call.numbers.z_loss, 0, HUGE_VAL);
  // In float32, logit / softcap leaves the normal numbers outside of this range.
  if (call.numbers.has_softcap) require_number("softcap", call.numbers.softcap, 0x1p-100, 0x1p100);
}

void check_out(const LossCall& call) {
  const Array &logits = call.logits, &out = *call.out;
  require(out.dtype == logits.dtype && out.dims == logits.dims && same_sizes(logits, out, logits.dims),
          "out like the logits");
  require_storage("out", out);
  if (out.numel() == 0) return;
  require(!overlaps_itself(out), "out without elements that share memory");
  require(same_place(out, logits) || !overlap(out, logits), "out that does not overlap the logits");
  require(!overlap(out, call.targets) && !(call.weight && overlap(out, *call.weight)),
          "out that overlaps neither targets nor weight");
  require(!call.second || !(overlap(out, *call.second) || overlap(out, *call.shares)),
          "out that overlaps neither second nor shares");
}

}  // namespace

int64_t Array::numel() const {
  int64_t n = 1;
  for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
  return n;
}

int64_t Array::reach() const {
  int64_t last = 0;
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return (last + 1) * bytes_of(dtype);
}

bool Array::contiguous() const {
  int64_t expected = 1;
  bool follows = true;
  for (int64_t d = dims - 1; d >= 0; --d) {
    follows = follows && (sizes[d] == 1 || strides[d] == expected);
    expected *= sizes[d];
  }
  return follows || expected == 0;
}

bool Array::dense() const {
  if (contiguous()) return true;
  int64_t expected = 1;
  for (const auto& [stride, size] : sorted_dims(*this)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool Array::has_row_layout() const {
  RowLayout layout;
  if (numel() == 0) return true;
  return dims > 0 && merge_rows(*this, &layout);
}

RowLayout Array::row_layout() const {
  RowLayout layout;
  if (numel() > 0) merge_rows(*this, &layout);
  return layout;
}

bool usable(const Array& x, Access access) {
  if (!x.aligned()) return false;
  if (access == Access::kContiguous) return x.contiguous();
  if (access == Access::kDense) return x.dense();
  if (access == Access::kRows && x.numel() > 0 && x.class_stride() != 1) return false;
  return x.has_row_layout();
}

void check(const LossCall& call) {
  check_inputs(call);
  const int64_t rows = call.targets.numel();
  require(call.reduction >= kMean && call.reduction <= kNone, "a known reduction");
  require(call.reduction == kMean || !call.numbers.has_normalizer, "a normalizer with a mean only");
  require_number("normalizer", call.numbers.normalizer, 0, HUGE_VAL);
  require_number("grad_scale", call.numbers.grad_scale, -HUGE_VAL, HUGE_VAL);
  require(call.sums.has_value() == call.counts.has_value(), "both accumulators of a meter or none");
  if (call.ticket) memory_of<int32_t>("a meter's ticket", *call.ticket, kInt32, 1);
  if (call.sums) {
    const int64_t classes = call.logits.sizes[call.logits.dims - 1];
    require_plan(call);
    const MeasurePlan plan = measures_of(call);
    require(plan.per_class == 0 || plan.per_class == classes,
            "logits of as many classes as the meter counts");
    require(plan.bins >= 0 && plan.bins < INT32_MAX, "a number of calibration bins of at least 0");
    memory_of<double>("a meter's sums", *call.sums, kFloat64, kNumSums + plan.num_sums());
    memory_of<int64_t>("a meter's counts", *call.counts, kInt64,
                       kFirstCorrect + call.topk.size() + plan.num_counts());
    for (const int64_t k : call.topk) require(k > 0, "each k of topk to be at least 1");
  }
  if (call.loss) memory_of<float>("loss", *call.loss, kFloat32, call.reduction == kNone ? rows : 1);
  if (call.saved) memory_of<float>("saved", *call.saved, kFloat32, 2 * rows + 1);
  if (call.out) check_out(call);
}

void check_backward(const LossCall& call, const Array& grad_output) {
  check_inputs(call);
  const int64_t rows = call.targets.numel();
  require(call.out && call.saved, "out and saved");
  memory_of<float>("saved", *call.saved, kFloat32, 2 * rows + 1);
  memory_of<float>("grad_output", grad_output, kFloat32, grad_output.dims == 0 ? 1 : rows);
  check_out(call);
}

void check(const ClassSumsCall& call) {
  check_inputs(call.batch);
  const int64_t rows = call.batch.targets.numel();
  if (call.target_logits) memory_of<float>("target_logits", *call.target_logits, kFloat32, rows);
  require_plan(call.batch);
  const bool measured = measures_of(call.batch).any();
  memory_of<double>("sums", call.sums, kFloat64, (measured ? kNumMeasuredSums : kNumClassSums) * rows);
}

void check(const LogprobCall& call) {
  check_inputs(call.batch);
  require(call.temperature >= 0x1p-100 && call.temperature <= 0x1p100, "temperature in [2**-100, 2**100]");
  const int64_t rows = call.batch.targets.numel();
  if (call.logprobs) memory_of<float>("logprobs", *call.logprobs, kFloat32, rows);
  if (call.entropy) memory_of<float>("entropy", *call.entropy, kFloat32, rows);
  if (call.row_sums) memory_of<float>("row_sums", *call.row_sums, kFloat32, 2 * rows);
  if (call.grad_logprobs) memory_of<float>("grad_logprobs", *call.grad_logprobs, kFloat32, rows);
  if (call.grad_entropy) memory_of<float>("grad_entropy", *call.grad_entropy, kFloat32, rows);
  if (!call.batch.out) return;
  require(call.row_sums && call.grad_logprobs, "row_sums and grad_logprobs");
  require(!call.grad_entropy || call.entropy, "entropy with grad_entropy");
  check_out(call.batch);
}

GradStatsOut check(const std::vector<Array>& tensors, const GradStatsArrays& out) {
  for (const Array& x : tensors) {
    require(x.dtype <= kFloat16, "gradients of float32, bfloat16 or float16");
    require_storage("each gradient", x);
  }
  const int64_t n = tensors.size();
  double* const magnitudes = memory_of<double>("magnitudes", out.magnitudes, kFloat64, 2 * n);
  int64_t* const counts = memory_of<int64_t>("counts", out.counts, kInt64, 3 * n);
  require(out.table.has_value() == out.table_on_host.has_value(), "both tables or none");
  const auto table = [&](const std::optional<Array>& x) {
    return x ? memory_of<int32_t>("a table", *x, kInt32, (n + 1) * kGradTableWords) : nullptr;
  };
  return {magnitudes,
          magnitudes + n,
          counts,
          counts + n,
          counts + 2 * n,
          memory_of<double>("total_norm", out.total_norm, kFloat64, 1),
          memory_of<float>("found_inf", out.found_inf, kFloat32, 1),
          table(out.table),
          table(out.table_on_host)};
}

int64_t MeasurePlan::num_sums() const { return any() ? kNumRowMeasures - kNll + bins : 0; }

MeasurePlan measures_of(const LossCall& call) {
  const std::vector<int64_t>& given = call.measures;
  if (given.empty()) return {};
  return {given[0], given[1], given[2] != 0, given[3] != 0};
}

LossRows rows_of(const LossCall& call, const Array* grad_output) {
  LossRows p{};
  p.rows = call.targets.numel();
  p.classes = call.logits.sizes[call.logits.dims - 1];
  p.first_class = call.first_class;
  p.all_classes = call.num_classes.value_or(p.classes);
  p.dtype = call.logits.dtype;
  p.logits = call.logits.data;
  p.logits_at = call.logits.row_layout();
  p.class_stride = call.logits.class_stride();
  p.targets = call.targets.data;
  p.target_bytes = bytes_of(call.targets.dtype);
  p.ignore_index = call.ignore_index;
  p.second = call.second ? static_cast<const int64_t*>(call.second->data) : nullptr;
  p.shares = call.shares ? static_cast<const float*>(call.shares->data) : nullptr;
  p.weight = call.weight ? static_cast<const float*>(call.weight->data) : nullptr;
  p.num_topk = call.counts ? call.topk.size() : 0;
  if (call.loss && call.reduction == kNone) p.row_loss = static_cast<float*>(call.loss->data);
  if (call.saved) {
    p.saved_max = static_cast<float*>(call.saved->data);
    p.saved_sum = p.saved_max + p.rows;
    p.saved_denominator = p.saved_sum + p.rows;
  }
  if (call.out) {
    p.out = call.out->data;
    p.out_at = call.out->row_layout();
    p.out_class_stride = call.out->class_stride();
  }
  if (grad_output) {
    p.backward = true;
    p.scale_of_row = static_cast<const float*>(grad_output->data);
    p.scale_stride = grad_output->dims == 0 ? 0 : 1;
  }
  return p;
}

LogprobRows rows_of(const LogprobCall& call) {
  const auto numbers = [](const std::optional<Array>& x) {
    return x ? static_cast<float*>(x->data) : nullptr;
  };
  LogprobRows p{rows_of(call.batch)};
  p.temperature = call.temperature;
  p.logprobs = numbers(call.logprobs);
  p.entropy = numbers(call.entropy);
  p.row_sums = numbers(call.row_sums);
  p.grad_logprobs = numbers(call.grad_logprobs);
  p.grad_entropy = numbers(call.grad_entropy);
  p.backward = p.out != nullptr;
  return p;
}

}  // namespace esper
