// The C++ below the ops, for tests: numpy arrays in and out, no torch. ESPER_TESTING=1 builds it for the
// tests of a source checkout; it is never part of a wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

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

}  // namespace

PYBIND11_MODULE(cpp, m) {
  m.doc() = "The C++ functions below the ops. Half-precision numbers are passed as uint16, their bits.";
  m.def("instruction_sets", instruction_sets, "The instruction sets that can run here, the best first.");
  const auto def = [&m](const char* name, auto function) {
    m.def(name, function, py::arg("x").noconvert(), py::arg("instruction_set"));
  };
  def("exp", elementwise(&VectorFunctions::exp));
  def("log", elementwise(&VectorFunctions::log));
  def("tanh", elementwise(&VectorFunctions::tanh));
  def("widen_bfloat16", elementwise(&VectorFunctions::widen_bfloat16));
  def("widen_float16", elementwise(&VectorFunctions::widen_float16));
  def("narrow_bfloat16", elementwise(&VectorFunctions::narrow_bfloat16));
  def("narrow_float16", elementwise(&VectorFunctions::narrow_float16));
}
