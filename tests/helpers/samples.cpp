// Runs the CPU kernels on samples from a file and compares them with the truths beside them, without Python
// or torch: for machines that are emulated. tests/kernels/test_arm.py writes the file. Prints the worst
// errors, as shares of what is allowed; fails where one is above 1. Compiled with ESPER_TESTING.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "cpu/driver.h"

using namespace esper;

namespace {

void serial(int64_t n, const Range& f) { f(0, n); }

int failures = 0;

// Prints an error as a share of what is allowed.
void report(const std::string& name, const char* what, double share) {
  const bool good = share <= 1;  // not for NaN
  failures += !good;
  std::printf("%s%s: %s %.3g\n", good ? "" : "FAILED ", name.c_str(), what, share);
}

// Arrays as the file has them: the number of bytes, then the bytes.
struct File {
  std::ifstream stream;

  template <class T>
  std::vector<T> array() {
    int64_t bytes = 0;
    stream.read(reinterpret_cast<char*>(&bytes), sizeof bytes);
    std::vector<T> found(bytes / sizeof(T));
    stream.read(reinterpret_cast<char*>(found.data()), bytes);
    if (!stream) std::exit(2);
    return found;
  }
  std::string text() {
    const std::vector<char> found = array<char>();
    return {found.begin(), found.end()};
  }
};

double widened(const void* data, Dtype dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  const VectorFunctions* functions = find_kernels("baseline")->vector_functions;
  float x;
  (dtype == kBFloat16 ? functions->widen_bfloat16 : functions->widen_float16)(
      static_cast<const uint16_t*>(data) + i, &x, 1);
  return x;
}

// |found - truth| / |truth| over the finite entries of truth; the others must be equal, which NaN is to NaN.
double relative_error(const std::vector<double>& found, const std::vector<double>& truth) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    if (std::isfinite(truth[i])) {
      difference += (found[i] - truth[i]) * (found[i] - truth[i]);
      size += truth[i] * truth[i];
    } else if (std::isnan(truth[i]) ? !std::isnan(found[i]) : found[i] != truth[i]) {
      return INFINITY;
    }
  }
  return std::sqrt(difference) / std::max(std::sqrt(size), 1e-300);
}

// A sample of cross entropy: its name; rows, classes, dtype, ignore_index; smoothing, z-loss, softcap or 0,
// normalizer or 0; logits, targets, weight or nothing; then the loss, the gradient, the counts of the meter,
// and the errors that loss and gradient may have.
void check_cross_entropy(File& file) {
  const std::string name = file.text();
  const std::vector<int64_t> shape = file.array<int64_t>();
  const std::vector<double> numbers = file.array<double>();
  std::vector<char> logits = file.array<char>();
  std::vector<int64_t> targets = file.array<int64_t>();
  std::vector<float> weight = file.array<float>();
  const std::vector<double> loss_truth = file.array<double>(), truth = file.array<double>();
  const std::vector<int64_t> counts_truth = file.array<int64_t>();
  const std::vector<double> bounds = file.array<double>();

  const int64_t rows = shape[0], classes = shape[1];
  const Dtype dtype = static_cast<Dtype>(shape[2]);
  const int64_t sizes[] = {rows, classes}, strides[] = {classes, 1}, one[] = {1};
  const int64_t num_sums[] = {kNumSums}, num_counts[] = {kFirstCorrect + 1};
  std::vector<char> out(logits.size());
  std::vector<double> sums(kNumSums);
  std::vector<int64_t> counts(kFirstCorrect + 1);
  std::vector<float> loss(1);
  const auto array = [](auto& data, int64_t dims, const int64_t* size, const int64_t* stride, Dtype type) {
    return Array{data.data(), dims, size, stride, type, static_cast<int64_t>(data.size() * sizeof(data[0]))};
  };
  LossCall call{array(logits, 2, sizes, strides, dtype), array(targets, 1, sizes, one, kInt64)};
  if (!weight.empty()) call.weight = array(weight, 1, sizes + 1, one, kFloat32);
  call.ignore_index = shape[3];
  call.numbers.label_smoothing = {numbers[0]};
  call.numbers.z_loss = {numbers[1]};
  call.numbers.has_softcap = numbers[2] != 0;
  call.numbers.softcap = {numbers[2]};
  call.numbers.has_normalizer = numbers[3] != 0;
  call.numbers.normalizer = {numbers[3]};
  call.sums = array(sums, 1, num_sums, one, kFloat64);
  call.counts = array(counts, 1, num_counts, one, kInt64);
  call.topk = {1};
  call.loss = array(loss, 0, nullptr, nullptr, kFloat32);
  call.out = array(out, 2, sizes, strides, dtype);
  check(call);
  cross_entropy(call, *find_kernels("baseline"), {serial, 1 << 20});

  std::vector<double> found(truth.size());
  for (size_t i = 0; i < found.size(); ++i) found[i] = widened(out.data(), dtype, i);
  report(name, "loss", relative_error({loss[0]}, loss_truth) / bounds[0]);
  report(name, "gradient", relative_error(found, truth) / bounds[1]);
  report(name, "counts", counts == counts_truth ? 0 : INFINITY);
}

// A list of gradients: its name; the dtype of each; the gradients; then norms, and zeros, NaN and Inf of
// each.
void check_grad_stats(File& file) {
  const std::string name = file.text();
  const std::vector<int64_t> dtypes = file.array<int64_t>();
  std::vector<std::vector<char>> data;
  for (size_t i = 0; i < dtypes.size(); ++i) data.push_back(file.array<char>());
  const std::vector<double> norms_truth = file.array<double>();
  const std::vector<int64_t> counts_truth = file.array<int64_t>();

  const size_t n = dtypes.size();
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < n; ++i) sizes.push_back(data[i].size() / bytes_of(static_cast<Dtype>(dtypes[i])));
  const int64_t one = 1;
  std::vector<Array> tensors;
  for (size_t i = 0; i < n; ++i)
    tensors.push_back({data[i].data(), 1, &sizes[i], &one, static_cast<Dtype>(dtypes[i]),
                       static_cast<int64_t>(data[i].size())});
  std::vector<double> norms(n), max_abs(n);
  std::vector<int64_t> counts(3 * n);
  double total = 0;
  float found_inf = 0;
  const GradStatsOut out{
      norms.data(), max_abs.data(), counts.data(), counts.data() + n, counts.data() + 2 * n, &total,
      &found_inf,   nullptr,        nullptr};
  grad_stats(tensors, 1, out, *find_kernels("baseline"), {serial, 1 << 20});
  report(name, "norms", relative_error(norms, norms_truth) / 1e-12);
  report(name, "counts", counts == counts_truth ? 0 : INFINITY);
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Every 257th float32 from `begin` to `end`, by their bits.
std::vector<float> floats(int64_t begin, int64_t end) {
  std::vector<float> found;
  for (int64_t bits = begin; bits < end; bits += 257) found.push_back(from_bits(bits));
  return found;
}

// Compares a function with that of the C library in double, in units of the last place.
void check_function(const char* name, void (*function)(const float*, float*, int64_t),
                    double (*truth)(double), const std::vector<float>& x, double bound, double per_x) {
  std::vector<float> y(x.size());
  function(x.data(), y.data(), x.size());
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = truth(x[i]), size = std::max(std::fabs(exact), std::ldexp(1.0, -126));
    if (y[i] == 0 && std::fabs(exact) < std::ldexp(1.0, -126)) continue;
    const double unit = std::ldexp(1.0, std::ilogb(size) - 23);
    const double error = std::fabs(y[i] - exact) / unit / (bound + per_x * std::fabs(x[i]));
    worst = error <= worst ? worst : error;  // NaN stays
  }
  report(name, "error", worst);
}

// Rounds to a format with `digits` bits of mantissa, exponents from `lowest` on and none above `highest`.
double rounded(double x, int digits, int lowest, int highest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int unit = std::max(std::ilogb(x), lowest) - digits;
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  return std::fabs(y) >= std::ldexp(1.0, highest + 1) ? std::copysign(INFINITY, x) : y;
}

void check_rounding(const char* name, void (*narrow)(const float*, uint16_t*, int64_t), Dtype dtype,
                    int digits, int lowest, int highest) {
  const std::vector<float> x = floats(0, int64_t(1) << 32);
  std::vector<uint16_t> y(x.size());
  narrow(x.data(), y.data(), x.size());
  int64_t wrong = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double found = widened(y.data(), dtype, i), exact = rounded(x[i], digits, lowest, highest);
    wrong += std::isnan(exact) ? !std::isnan(found) : found != exact;
  }
  report(name, "wrong", wrong ? INFINITY : 0);
}

void check_functions() {
  const VectorFunctions& f = *find_kernels("baseline")->vector_functions;
  const double ulp = std::ldexp(1.0, -24);  // NEON has fused multiply-add
  check_function("exp", f.exp, std::exp, floats(0x80000000, 0xC2AC0000), 2e-7 / ulp, 1.5e-8 / ulp);
  check_function("log", f.log, std::log, floats(0x3F000000, 0x7F800000), 2, 0);
  check_function("tanh", f.tanh, std::tanh, floats(0, 0x7F800000), 4, 0);
  check_function("tanh of negative numbers", f.tanh, std::tanh, floats(0x80000000, 0xFF800000), 4, 0);
  check_rounding("to bfloat16", f.narrow_bfloat16, kBFloat16, 7, -126, 127);
  check_rounding("to float16", f.narrow_float16, kFloat16, 10, -14, 15);
}

}  // namespace

int main(int, char** arguments) {
  File file{std::ifstream(arguments[1], std::ios::binary)};
  for (std::string kind = file.text(); kind != "end"; kind = file.text())
    kind == "cross_entropy" ? check_cross_entropy(file) : check_grad_stats(file);
  check_functions();
  return failures > 0;
}
