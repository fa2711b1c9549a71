// What the compiled part of the package says about itself. No torch types here: torch carries its own
// pybind11.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace {

using Find = const esper::Kernels* (*)(const char*);

// The kernels are in the library of ops, which torch has loaded by then.
Find find_in(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  void* symbol = handle ? dlsym(handle, "esper_find_kernels") : nullptr;
  if (!symbol) throw std::runtime_error("load " + library + " with torch.ops.load_library first");
  return reinterpret_cast<Find>(symbol);
}

std::vector<std::string> instruction_sets(const std::string& library) {
  std::vector<std::string> names;
  for (const char* name : {"avx512", "avx2", "baseline"})
    if (find_in(library)(name)) names.push_back(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build facts of the compiled kernels";
  m.attr("compiler") = __VERSION__;
  m.def("instruction_sets", &instruction_sets, pybind11::arg("library"),
        "Instruction sets built into the library of ops that this machine can run, best first");
}
