// The CPU ops, registered through libtorch's stable ABI. Python checks the arguments; here the targets are
// looked at, before anything is written and outside of any parallel region, which would lose the error's
// type.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <vector>

#include "cpu/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Below this many elements one thread is done before others would have woken up.
constexpr int64_t kSerial = 65536;
// Outputs larger than this are stored past the caches: they would have left them before they are read again.
constexpr int64_t kStreamBytes = 16 << 20;
constexpr const char* kSets[] = {"auto", "avx512", "avx2", "baseline"};

const esper::Kernels& kernels_of(int64_t instruction_set) {
  STD_TORCH_CHECK(instruction_set >= 0 && instruction_set < 4, "unknown instruction set");
  const esper::Kernels* found = esper::find_kernels(kSets[instruction_set]);
  STD_TORCH_CHECK(found, "this machine or build has no kernels for ", kSets[instruction_set]);
  return *found;
}

esper::Dtype dtype_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::BFloat16) return esper::kBFloat16;
  if (type == ScalarType::Half) return esper::kFloat16;
  STD_TORCH_CHECK(type == ScalarType::Float, "expected float32, bfloat16 or float16");
  return esper::kFloat32;
}

template <class T>
T* data(const MaybeTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

// Dimensions of size 1 vanish and neighbours that follow one another merge; two leading ones may remain.
esper::RowLayout layout_of(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t dims = sizes.size();
  STD_TORCH_CHECK(dims > 0 && (sizes[dims - 1] == 1 || strides[dims - 1] == 1), "expected class stride 1");
  if (x.numel() == 0) return {};
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int level = 0;
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (size[level] == 1) {
      size[level] = sizes[d], stride[level] = strides[d];
    } else if (strides[d] == stride[level] * size[level]) {
      size[level] *= sizes[d];
    } else {
      STD_TORCH_CHECK(level == 0, "expected at most two leading dimensions that do not merge");
      level = 1, size[1] = sizes[d], stride[1] = strides[d];
    }
  }
  return {size[0], stride[1], stride[0]};
}

// For each block of rows, in parallel: f(block, scratch).
template <class F>
void for_blocks(int64_t blocks, bool serial, int64_t scratch_size, const F& f) {
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
  torch::stable::parallel_for(0, blocks, 1, range);
}

struct Sums {
  double loss = 0, weight = 0;
  int64_t valid = 0, ignored = 0;
  std::vector<int64_t> counts;  // non-finite, correct@k
};

void scan_targets(const esper::CrossEntropy& p, Sums* sums) {
  int64_t bad = 0;
  const auto scan = [&](const auto* targets) {
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t t = targets[i];
      const bool ignored = t == p.ignore_index,
                 inside = static_cast<uint64_t>(t) < static_cast<uint64_t>(p.classes);
      sums->ignored += ignored;
      bad += !ignored && !inside;
    }
    STD_TORCH_CHECK(bad == 0, bad, " targets are outside [0, ", p.classes, ") and not ignore_index");
    sums->valid = p.rows - sums->ignored;
    sums->weight = static_cast<double>(sums->valid);
    if (!p.weight) return;
    sums->weight = 0;
    for (int64_t i = 0; i < p.rows; ++i)
      if (targets[i] != p.ignore_index) sums->weight += p.weight[targets[i]];
  };
  if (p.target_bytes == 8) return scan(static_cast<const int64_t*>(p.targets));
  if (p.target_bytes == 4) return scan(static_cast<const int32_t*>(p.targets));
  scan(static_cast<const uint8_t*>(p.targets));
}

void run(const esper::Kernels& kernels, const esper::CrossEntropy& p, bool count, Sums* sums) {
  const int64_t step = esper::rows_per_block(p.classes), blocks = (p.rows + step - 1) / step;
  const int64_t columns = 1 + p.num_topk;
  std::vector<double> loss(blocks);
  std::vector<int64_t> counts(count ? blocks * columns : 0);
  for_blocks(blocks, p.rows * p.classes <= kSerial, esper::scratch_size(p.classes),
             [&](int64_t block, float* scratch) {
               const int64_t begin = block * step, end = begin + step < p.rows ? begin + step : p.rows;
               kernels.cross_entropy(p, begin, end, scratch, &loss[block],
                                     count ? &counts[block * columns] : nullptr);
             });
  for (double x : loss) sums->loss += x;
  sums->counts.assign(columns, 0);
  for (size_t i = 0; i < counts.size(); ++i) sums->counts[i % columns] += counts[i];
}

esper::CrossEntropy call_of(const Tensor& logits, const Tensor& targets, const MaybeTensor& weight,
                            int64_t ignore_index, double smoothing, double z_loss, double softcap) {
  esper::CrossEntropy p{};
  p.classes = logits.size(logits.dim() - 1);
  p.rows = targets.numel();
  STD_TORCH_CHECK(targets.is_contiguous() && p.rows * p.classes == logits.numel(),
                  "expected contiguous targets");
  p.dtype = dtype_of(logits);
  p.logits = logits.data_ptr();
  p.logits_at = layout_of(logits);
  p.targets = targets.data_ptr();
  p.target_bytes = targets.element_size();
  p.ignore_index = ignore_index;
  p.weight = data<float>(weight);
  p.weight_sum = p.classes;
  if (p.weight && smoothing > 0) {
    double sum = 0;
    for (int64_t c = 0; c < p.classes; ++c) sum += p.weight[c];
    p.weight_sum = sum;
  }
  p.smoothing = smoothing;
  p.z_loss = z_loss;
  p.softcap = softcap;
  return p;
}

// Options given as tensors: float64 [smoothing, z_loss, normalizer, grad_scale], NaN where the number counts.
void override(const MaybeTensor& numbers, std::vector<double*> values) {
  if (!numbers) return;
  const double* given = data<double>(numbers);
  for (size_t i = 0; i < values.size(); ++i)
    if (!std::isnan(given[i])) *values[i] = given[i];
}

// Reductions, in the order of esper_kernels/cross_entropy/cpp.py.
enum Reduction : int64_t { kMean, kSum, kNone };

// Loss and counts, and where `out` is given the gradient. normalizer: negative for the sum of the weights.
void cross_entropy(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index, double smoothing,
                   double z_loss, double softcap, double normalizer, double grad_scale, MaybeTensor numbers,
                   int64_t reduction, int64_t instruction_set, MaybeTensor meter_sums,
                   MaybeTensor meter_counts, std::vector<int64_t> topk, MaybeTensor loss, MaybeTensor rows,
                   MaybeTensor out) {
  override(numbers, {&smoothing, &z_loss, &normalizer, &grad_scale});
  esper::CrossEntropy p = call_of(logits, targets, weight, ignore_index, smoothing, z_loss, softcap);
  const esper::Kernels& kernels = kernels_of(instruction_set);
  Sums sums;
  scan_targets(p, &sums);
  double denominator = 1;
  if (reduction == kMean) denominator = normalizer < 0 ? sums.weight : normalizer;
  p.topk = topk.data();
  p.num_topk = topk.size();
  if (loss && reduction == kNone) p.row_loss = data<float>(loss);
  if (rows) {
    p.saved_max = data<float>(rows);
    p.saved_sum = p.saved_max + p.rows;
  }
  if (out) {
    p.out = out->data_ptr();
    p.out_at = layout_of(*out);
    p.zero = denominator == 0;
    p.scale = grad_scale / denominator;
    p.stream = p.out != p.logits && out->numel() * out->element_size() > kStreamBytes;
  }
  run(kernels, p, meter_counts.has_value(), &sums);

  if (loss && reduction != kNone)
    *data<float>(loss) = denominator == 0 ? std::nan("") : sums.loss / denominator;
  if (rows) data<float>(rows)[2 * p.rows] = denominator;
  if (!meter_counts) return;
  double* s = data<double>(meter_sums);  // the layout of esper_kernels/meter.py
  s[0] += sums.loss;
  s[1] += sums.weight;
  if (sums.valid) s[2] += sums.loss / sums.weight;
  int64_t* c = data<int64_t>(meter_counts);
  c[0] += sums.valid;
  c[1] += sums.ignored;
  c[2] += sums.counts[0];
  c[4] += 1;
  c[5] += sums.valid > 0;
  for (size_t k = 0; k < topk.size(); ++k) c[6 + k] += sums.counts[1 + k];
}

// The gradient from what `cross_entropy` put into `rows` [2 rows + 1]: maxima, sums, the denominator.
void cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor targets, MaybeTensor weight,
                            int64_t ignore_index, double smoothing, double z_loss, double softcap,
                            MaybeTensor numbers, int64_t instruction_set, Tensor rows, Tensor out) {
  override(numbers, {&smoothing, &z_loss});
  esper::CrossEntropy p = call_of(logits, targets, weight, ignore_index, smoothing, z_loss, softcap);
  p.backward = true;
  p.saved_max = static_cast<float*>(rows.data_ptr());
  p.saved_sum = p.saved_max + p.rows;
  p.out = out.data_ptr();
  p.out_at = layout_of(out);
  p.stream = out.numel() * out.element_size() > kStreamBytes;
  const double denominator = p.saved_max[2 * p.rows];
  p.zero = denominator == 0;
  const float* given = static_cast<const float*>(grad_output.data_ptr());
  if (grad_output.numel() == 1 && p.rows != 1) {
    p.scale = given[0] / denominator;
  } else {
    p.scale = 1 / denominator;
    p.scale_of_row = given;
    p.scale_stride = grad_output.numel() == p.rows ? 1 : 0;
  }
  Sums sums;
  run(kernels_of(instruction_set), p, false, &sums);
}

// --- gradient statistics ---

struct Piece {
  int64_t tensor, begin, size;
};

void grad_stats(std::vector<Tensor> tensors, MaybeTensor inv_scale, int64_t instruction_set, Tensor norms,
                Tensor max_abs, Tensor zeros, Tensor nans, Tensor infs, Tensor total_norm, Tensor found_inf) {
  constexpr int64_t kPiece = 16384;
  const esper::Kernels& kernels = kernels_of(instruction_set);
  const double scale = inv_scale ? *data<double>(inv_scale) : 1;
  std::vector<const char*> starts;
  std::vector<esper::Dtype> dtypes;
  std::vector<Piece> pieces;
  int64_t elements = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t size = tensors[t].numel();
    if (size && !tensors[t].is_contiguous()) tensors[t] = torch::stable::contiguous(tensors[t]);
    starts.push_back(static_cast<const char*>(tensors[t].data_ptr()));
    dtypes.push_back(size ? dtype_of(tensors[t]) : esper::kFloat32);
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
  std::vector<esper::GradChunk> found(pieces.size());
  for_blocks(shares, shares <= 1, 0, [&](int64_t share, float*) {
    for (int64_t i = first[share]; i < first[share + 1]; ++i) {
      const Piece& piece = pieces[i];
      const int64_t bytes = dtypes[piece.tensor] == esper::kFloat32 ? 4 : 2;
      found[i] = kernels.grad_chunk(starts[piece.tensor] + piece.begin * bytes, dtypes[piece.tensor],
                                    piece.size, scale);
    }
  });

  double* norm = static_cast<double*>(norms.data_ptr());
  double* largest = static_cast<double*>(max_abs.data_ptr());
  int64_t* columns[] = {static_cast<int64_t*>(zeros.data_ptr()), static_cast<int64_t*>(nans.data_ptr()),
                        static_cast<int64_t*>(infs.data_ptr())};
  for (size_t t = 0; t < tensors.size(); ++t) {
    norm[t] = largest[t] = 0;
    for (int64_t* column : columns) column[t] = 0;
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    const int64_t t = pieces[i].tensor;
    norm[t] += found[i].sum_of_squares;
    if (!(found[i].max_abs <= largest[t]))
      largest[t] = std::isnan(largest[t]) ? largest[t] : found[i].max_abs;
    columns[0][t] += found[i].zeros;
    columns[1][t] += found[i].nans;
    columns[2][t] += found[i].infs;
  }
  double total = 0;
  bool spoilt = false;
  for (size_t t = 0; t < tensors.size(); ++t) {
    total += norm[t];
    norm[t] = std::sqrt(norm[t]);
    spoilt |= columns[1][t] + columns[2][t] > 0;
  }
  *static_cast<double*>(total_norm.data_ptr()) = std::sqrt(total);
  *static_cast<float*>(found_inf.data_ptr()) = spoilt;
}

}  // namespace

// For bindings.cpp, which has no torch in it.
extern "C" __attribute__((visibility("default"))) const esper::Kernels* esper_find_kernels(const char* name) {
  return esper::find_kernels(name);
}

STABLE_TORCH_LIBRARY(esper, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, float smoothing, "
      "float z_loss, float softcap, float normalizer, float grad_scale, Tensor? numbers, int reduction, "
      "int instruction_set, Tensor(a!)? sums, Tensor(b!)? counts, int[] topk, Tensor(c!)? loss, "
      "Tensor(d!)? rows, Tensor(e!)? out) -> ()");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor targets, Tensor? weight, "
      "int ignore_index, float smoothing, float z_loss, float softcap, Tensor? numbers, int instruction_set, "
      "Tensor rows, Tensor(a!) out) -> ()");
  m.def(
      "grad_stats(Tensor[] tensors, Tensor? inv_scale, int instruction_set, Tensor(a!) norms, "
      "Tensor(b!) max_abs, Tensor(c!) zeros, Tensor(d!) nans, Tensor(e!) infs, Tensor(f!) total_norm, "
      "Tensor(g!) found_inf) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
}
