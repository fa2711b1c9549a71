#include "call.h"

namespace esper {
namespace {

// Dimensions of size 1 vanish and neighbours that follow one another merge; two leading ones may remain.
bool layout_of(const Array& x, RowLayout* layout) {
  if (x.dims == 0 || (x.sizes[x.dims - 1] != 1 && x.strides[x.dims - 1] != 1)) return false;
  if (x.numel() == 0) return *layout = {}, true;
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int level = 0;
  for (int64_t d = x.dims - 2; d >= 0; --d) {
    if (x.sizes[d] == 1) continue;
    if (size[level] == 1) {
      size[level] = x.sizes[d], stride[level] = x.strides[d];
    } else if (x.strides[d] == stride[level] * size[level]) {
      size[level] *= x.sizes[d];
    } else if (level == 0) {
      level = 1, size[1] = x.sizes[d], stride[1] = x.strides[d];
    } else {
      return false;
    }
  }
  *layout = {size[0], stride[1], stride[0]};
  return true;
}

}  // namespace

bool lay_out(const LossCall& call, CrossEntropy* p) {
  const Array &logits = call.logits, &targets = call.targets;
  if (logits.dtype > kFloat16 || targets.dtype < kInt64 || !targets.contiguous() || logits.dims == 0)
    return false;
  if (!layout_of(logits, &p->logits_at)) return false;
  p->classes = logits.sizes[logits.dims - 1];
  p->rows = targets.numel();
  if (p->classes == 0 || p->rows * p->classes != logits.numel()) return false;
  p->dtype = logits.dtype;
  p->logits = logits.data;
  p->targets = targets.data;
  p->target_bytes = bytes_of(targets.dtype);
  p->ignore_index = call.ignore_index;
  p->weight = call.weight;
  p->weight_sum = p->classes;
  p->smoothing = call.smoothing;
  p->z_loss = call.z_loss;
  p->softcap = call.softcap;
  if (call.rows) {
    p->saved_max = call.rows;
    p->saved_sum = call.rows + p->rows;
    p->saved_denominator = call.rows + 2 * p->rows;
  }
  if (!call.out) return true;
  p->out = call.out->data;
  return call.out->dtype == logits.dtype && call.out->numel() == logits.numel() &&
         layout_of(*call.out, &p->out_at);
}

}  // namespace esper
