// The C++ below the ops, for tests: numpy arrays in and out, no torch. ESPER_TESTING=1 builds it for the
// tests of a source checkout; it is never part of a wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/driver.h"

namespace py = pybind11;

namespace {

using esper::VectorFunctions;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const esper::Kernels* const* set = esper::available_kernels(); *set; ++set)
    names.push_back((*set)->name);
  return names;
}

// Applies one of the VectorFunctions to an array of any shape.
template <class From, class To>
auto elementwise(void (*VectorFunctions::*function)(const From*, To*, int64_t)) {
  return [function](const Array<From>& x, const std::string& instruction_set) {
    const esper::Kernels* kernels = esper::find_kernels(instruction_set.c_str());
    if (!kernels) throw std::invalid_argument("this machine or build lacks " + instruction_set);
    Array<To> y(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
    (kernels->vector_functions->*function)(x.data(), y.mutable_data(), x.size());
    return y;
  };
}

// In kThreads threads, each with an equal share of the work.
template <int kThreads>
void parallel_for(int64_t n, const esper::Range& f) {
  const auto share = [&](int i) { f(i * n / kThreads, (i + 1) * n / kThreads); };
  std::vector<std::thread> threads;
  for (int i = 1; i < kThreads; ++i) threads.emplace_back(share, i);
  share(0);
  for (std::thread& thread : threads) thread.join();
}

esper::ParallelFor in_threads(int threads) {
  if (threads == 1) return parallel_for<1>;
  if (threads == 2) return parallel_for<2>;
  if (threads == 5) return parallel_for<5>;
  throw std::invalid_argument("expected 1, 2 or 5 threads");
}

// The gradient and the loss of mean cross entropy, on a machine with such caches and threads.
py::tuple cross_entropy(const Array<float>& logits, const Array<int64_t>& targets,
                        const std::string& instruction_set, int64_t cache_bytes, int threads) {
  const esper::Kernels* kernels = esper::find_kernels(instruction_set.c_str());
  if (!kernels || logits.ndim() != 2) throw std::invalid_argument("expected kernels and a matrix");
  const int64_t rows = logits.shape(0), classes = logits.shape(1);
  const int64_t sizes[] = {rows, classes}, strides[] = {classes, 1}, one[] = {1};
  Array<float> out({rows, classes}), loss(std::vector<py::ssize_t>{1});
  const auto array = [](const void* data, int64_t dims, const int64_t* shape, const int64_t* steps,
                        esper::Dtype dtype, int64_t room) {
    return esper::Array{const_cast<void*>(data), dims, shape, steps, dtype, room};
  };
  esper::LossCall call{
      array(logits.data(), 2, sizes, strides, esper::kFloat32, logits.nbytes()),
      array(targets.data(), 1, sizes, one, esper::kInt64, targets.nbytes()),
      {},
  };
  call.loss = array(loss.data(), 0, nullptr, nullptr, esper::kFloat32, loss.nbytes());
  call.out = array(out.data(), 2, sizes, strides, esper::kFloat32, out.nbytes());
  esper::check(call);
  esper::cross_entropy(call, *kernels, {in_threads(threads), cache_bytes});
  return py::make_tuple(out, loss);
}

}  // namespace

PYBIND11_MODULE(cpp, m) {
  m.doc() = "The C++ functions below the ops. Half-precision numbers are passed as uint16, their bits.";
  m.def("instruction_sets", instruction_sets, "The instruction sets that can run here, the best first.");
  m.def("kept_classes", esper::kept_classes, "Of how many classes of a row the exponentials are kept.",
        py::arg("classes"), py::arg("cache_bytes"));
  const auto def = [&m](const char* name, auto function) {
    m.def(name, function, py::arg("x").noconvert(), py::arg("instruction_set"));
  };
  m.def("cross_entropy", cross_entropy,
        "The gradient and the loss, on a machine with such caches and threads.",
        py::arg("logits").noconvert(), py::arg("targets").noconvert(), py::arg("instruction_set"),
        py::arg("cache_bytes"), py::arg("threads"));
  def("exp", elementwise(&VectorFunctions::exp));
  def("log", elementwise(&VectorFunctions::log));
  def("tanh", elementwise(&VectorFunctions::tanh));
  def("widen_bfloat16", elementwise(&VectorFunctions::widen_bfloat16));
  def("widen_float16", elementwise(&VectorFunctions::widen_float16));
  def("narrow_bfloat16", elementwise(&VectorFunctions::narrow_bfloat16));
  def("narrow_float16", elementwise(&VectorFunctions::narrow_float16));
}
