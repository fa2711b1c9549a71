// The ops, for any device: puts a call together from torch's arguments, checks it, and lets the device run
// it. A Device is made from a tensor that is on it and an instruction set, and has the functions that
// ops_cpu.cpp and ops_cuda.cpp give it.
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "tensors.h"

namespace esper {

template <class Device>
void cross_entropy_op(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index,
                      double label_smoothing, double z_loss, std::optional<double> softcap, int64_t reduction,
                      std::optional<double> normalizer, int64_t instruction_set, double grad_scale,
                      MaybeTensor sums, MaybeTensor counts, MaybeTensor ticket, std::vector<int64_t> topk,
                      std::vector<int64_t> measures, MaybeTensor loss, MaybeTensor saved, MaybeTensor out,
                      MaybeTensor label_smoothing_at, MaybeTensor z_loss_at, MaybeTensor softcap_at,
                      MaybeTensor normalizer_at, MaybeTensor grad_scale_at, MaybeTensor second,
                      MaybeTensor shares) {
  Device device(logits, instruction_set);
  Arrays arrays{logits};
  const LossNumbers numbers{arrays.number(label_smoothing, label_smoothing_at),
                            arrays.number(z_loss, z_loss_at),
                            arrays.number(grad_scale, grad_scale_at),
                            arrays.number(softcap.value_or(0), softcap_at),
                            arrays.number(normalizer.value_or(0), normalizer_at),
                            softcap || softcap_at,
                            normalizer || normalizer_at};
  LossCall call = inputs_of(arrays, logits, targets, weight, second, shares, ignore_index, numbers);
  call.reduction = reduction;
  call.sums = arrays.of(sums);
  call.counts = arrays.of(counts);
  call.ticket = arrays.of(ticket);
  call.topk = std::move(topk);
  call.measures = std::move(measures);
  call.loss = arrays.of(loss);
  call.saved = arrays.of(saved);
  call.out = arrays.of(out);
  check(call);
  Device::check(call);
  run_usable(Device::kAccess, call, arrays, logits, targets, weight, out,
             [&] { device.cross_entropy(call); });
}

template <class Device>
void cross_entropy_backward_op(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index,
                               double label_smoothing, double z_loss, std::optional<double> softcap,
                               int64_t instruction_set, Tensor grad_output, Tensor saved, Tensor out,
                               MaybeTensor label_smoothing_at, MaybeTensor z_loss_at, MaybeTensor softcap_at,
                               MaybeTensor second, MaybeTensor shares, int64_t first_class,
                               std::optional<int64_t> num_classes) {
  Device device(logits, instruction_set);
  Arrays arrays{logits};
  const LossNumbers numbers{arrays.number(label_smoothing, label_smoothing_at),
                            arrays.number(z_loss, z_loss_at),
                            {1},
                            arrays.number(softcap.value_or(0), softcap_at),
                            {},
                            softcap || softcap_at};
  LossCall call = inputs_of(arrays, logits, targets, weight, second, shares, ignore_index, numbers);
  call.first_class = first_class;
  call.num_classes = num_classes;
  call.saved = arrays.of(saved);
  call.out = arrays.of(out);
  Array gradient = arrays.of(grad_output);
  arrays.make_usable(grad_output, Access::kContiguous, &gradient);
  check_backward(call, gradient);
  Device::check(call);
  run_usable(Device::kAccess, call, arrays, logits, targets, weight, out,
             [&] { device.cross_entropy_backward(call, gradient); });
}

template <class Device>
void class_sums_op(Tensor logits, Tensor targets, MaybeTensor weight, int64_t ignore_index, bool smoothed,
                   std::optional<double> softcap, int64_t instruction_set, int64_t first_class,
                   int64_t num_classes, MaybeTensor target_logits, MaybeTensor second, MaybeTensor shares,
                   std::vector<int64_t> measures, Tensor sums) {
  Device device(logits, instruction_set);
  Arrays arrays{logits};
  LossNumbers numbers{{smoothed ? 1.0 : 0.0}};
  numbers.softcap = {softcap.value_or(0)};
  numbers.has_softcap = softcap.has_value();
  ClassSumsCall call{inputs_of(arrays, logits, targets, weight, second, shares, ignore_index, numbers),
                     arrays.of(target_logits), arrays.of(sums)};
  call.batch.first_class = first_class;
  call.batch.num_classes = num_classes;
  call.batch.measures = std::move(measures);
  check(call);
  run_usable(Access::kRows, call.batch, arrays, logits, targets, weight, std::nullopt,
             [&] { device.class_sums(call); });
}

inline LogprobCall logprob_call(const Arrays& arrays, const Tensor& logits, const Tensor& targets,
                                int64_t ignore_index, double temperature) {
  LogprobCall call{{arrays.of(logits), arrays.of(targets)}};
  call.batch.ignore_index = ignore_index;
  call.temperature = temperature;
  return call;
}

template <class Device>
void token_logprobs_op(Tensor logits, Tensor targets, int64_t ignore_index, double temperature,
                       int64_t instruction_set, Tensor logprobs, MaybeTensor entropy, MaybeTensor row_sums) {
  Device device(logits, instruction_set);
  Arrays arrays{logits};
  LogprobCall call = logprob_call(arrays, logits, targets, ignore_index, temperature);
  call.logprobs = arrays.of(logprobs);
  call.entropy = arrays.of(entropy);
  call.row_sums = arrays.of(row_sums);
  check(call);
  run_usable(Access::kRows, call.batch, arrays, logits, targets, std::nullopt, std::nullopt,
             [&] { device.token_logprobs(call); });
}

template <class Device>
void token_logprobs_backward_op(Tensor logits, Tensor targets, int64_t ignore_index, double temperature,
                                int64_t instruction_set, MaybeTensor entropy, Tensor row_sums,
                                Tensor grad_logprobs, MaybeTensor grad_entropy, Tensor out) {
  Device device(logits, instruction_set);
  Arrays arrays{logits};
  LogprobCall call = logprob_call(arrays, logits, targets, ignore_index, temperature);
  call.entropy = arrays.of(entropy);
  call.row_sums = arrays.of(row_sums);
  call.grad_logprobs = arrays.of(grad_logprobs);
  call.grad_entropy = arrays.of(grad_entropy);
  arrays.make_usable(grad_logprobs, Access::kContiguous, &*call.grad_logprobs);
  if (grad_entropy) arrays.make_usable(*grad_entropy, Access::kContiguous, &*call.grad_entropy);
  call.batch.out = arrays.of(out);
  check(call);
  run_usable(Access::kRows, call.batch, arrays, logits, targets, std::nullopt, out,
             [&] { device.token_logprobs(call); });
}

template <class Device>
void grad_stats_op(std::vector<Tensor> tensors, MaybeTensor inv_scale, int64_t instruction_set,
                   Tensor magnitudes, Tensor counts, Tensor total_norm, Tensor found_inf, MaybeTensor table,
                   MaybeTensor table_on_host) {
  Device device(magnitudes, instruction_set);
  Arrays arrays{magnitudes};
  std::vector<Array> gradients;
  gradients.reserve(tensors.size());
  for (const Tensor& x : tensors) gradients.push_back(arrays.of(x));
  if (table_on_host && !table_on_host->is_cpu())
    throw std::invalid_argument("esper: expected the host's table on the CPU");
  const GradStatsOut out =
      check(gradients, {arrays.of(magnitudes), arrays.of(counts), arrays.of(total_norm), arrays.of(found_inf),
                        arrays.of(table),
                        table_on_host ? std::optional<Array>(array_of(*table_on_host)) : std::nullopt});
  const Number scale = arrays.number(1, inv_scale);
  for (size_t i = 0; i < tensors.size(); ++i) arrays.make_usable(tensors[i], Access::kDense, &gradients[i]);
  device.grad_stats(gradients, scale, out);
}

}  // namespace esper
