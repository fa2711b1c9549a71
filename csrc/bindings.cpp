// The compiled part of the package as Python sees it: build facts, and the calls of cpu/driver.h on plain CPU
// tensors, past torch's dispatcher. Written to Python's limited interface, so that one build serves every
// version; no torch types, as tensors are read through the DLPack exchange table that torch.Tensor offers, in
// nanoseconds.
#include <Python.h>

#include <ATen/dlpack.h>  // a C header, without torch in it
#include <dlfcn.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/driver.h"

namespace {

using esper::Array;

constexpr int64_t kKeepLock = 65536;  // elements: below, other Python threads wait for the kernel
constexpr const char* kRoad = "esper_kernels.road";

const esper::Api* find_api(const std::string& library) {
  // The kernels are in the library of ops, which torch has loaded by then.
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  void* symbol = handle ? dlsym(handle, "esper_api") : nullptr;
  if (!symbol) throw std::runtime_error("load " + library + " with torch.ops.load_library first");
  return reinterpret_cast<const esper::Api* (*)()>(symbol)();
}

struct Road {
  const esper::Api* api;
  DLPackDLTensorFromPyObjectNoSync view;
  PyTypeObject* tensor;  // torch.Tensor; subclasses may mean something else by their memory

  // The readers below give false for what the general road has to see, be it served there or refused.
  bool array(PyObject* x, Array* to) const {
    DLTensor t;
    if (Py_TYPE(x) != tensor) return false;
    if (view(x, &t) != 0) return PyErr_Clear(), false;
    if (t.device.device_type != kDLCPU) return false;
    const int kind = t.dtype.code * 256 + t.dtype.bits;
    switch (kind) {
      case kDLFloat * 256 + 32:
        to->dtype = esper::kFloat32;
        break;
      case kDLBfloat * 256 + 16:
        to->dtype = esper::kBFloat16;
        break;
      case kDLFloat * 256 + 16:
        to->dtype = esper::kFloat16;
        break;
      case kDLFloat * 256 + 64:
        to->dtype = esper::kFloat64;
        break;
      case kDLInt * 256 + 64:
        to->dtype = esper::kInt64;
        break;
      case kDLInt * 256 + 32:
        to->dtype = esper::kInt32;
        break;
      case kDLUInt * 256 + 8:
        to->dtype = esper::kUInt8;
        break;
      default:
        return false;
    }
    to->data = static_cast<char*>(t.data) + t.byte_offset;
    to->dims = t.ndim, to->sizes = t.shape, to->strides = t.strides;
    return true;
  }

  // The memory of a contiguous tensor of n elements (any number for -1), or null for None.
  template <class T>
  bool memory(PyObject* x, esper::Dtype dtype, int64_t n, T** to) const {
    *to = nullptr;
    if (x == Py_None) return true;
    Array a;
    if (!array(x, &a) || a.dtype != dtype || !a.contiguous() || (n >= 0 && a.numel() != n)) return false;
    *to = static_cast<T*>(a.data);
    return true;
  }

  // A number in [low, high], `otherwise` for None, or what a [] tensor holds.
  bool number(PyObject* x, double low, double high, double otherwise, double* to) const {
    if (x == Py_None) return *to = otherwise, true;
    if (PyFloat_Check(x)) return *to = PyFloat_AsDouble(x), *to >= low && *to <= high;
    Array a;
    if (array(x, &a)) {
      if (a.dims != 0 || (a.dtype != esper::kFloat32 && a.dtype != esper::kFloat64)) return false;
      *to = a.dtype == esper::kFloat32 ? *static_cast<float*>(a.data) : *static_cast<double*>(a.data);
      return true;
    }
    if (!PyLong_Check(x)) return false;
    *to = PyLong_AsDouble(x);
    return PyErr_Occurred() ? (PyErr_Clear(), false) : *to >= low && *to <= high;
  }
};

bool integer(PyObject* x, int64_t* to) {
  if (!PyLong_Check(x)) return false;
  *to = PyLong_AsLongLong(x);
  return PyErr_Occurred() ? (PyErr_Clear(), false) : true;
}

bool same_sizes(const Array& x, const Array& y, int64_t dims) {
  for (int64_t d = 0; d < dims; ++d)
    if (x.sizes[d] != y.sizes[d]) return false;
  return true;
}

const Road& road_of(PyObject* self) { return *static_cast<const Road*>(PyCapsule_GetPointer(self, kRoad)); }

struct WithoutLock {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutLock() { PyEval_RestoreThread(state); }
};

template <class F>
void without_lock(int64_t elements, const F& f) {
  if (elements <= kKeepLock) return f();
  WithoutLock released;
  f();
}

template <class F>
PyObject* guarded(const F& f) {
  try {
    return f();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// A member of `names`, which ends with null, or -1.
int64_t place_of(PyObject* x, const char* const* names) {
  for (int64_t i = 0; PyUnicode_Check(x) && names[i]; ++i)
    if (PyUnicode_CompareWithASCIIString(x, names[i]) == 0) return i;
  return -1;
}

const esper::Kernels* kernels_of(const Road& road, PyObject* name) {
  static constexpr const char* sets[] = {"auto", "avx512", "avx2", "baseline", nullptr};
  return road.api->kernels_at(place_of(name, sets));
}

// Logits, targets and the options in the order of esper_kernels.cross_entropy.reference.Options: ten
// arguments. False where the general road has to look.
bool read_call(const Road& road, PyObject* const* a, esper::LossCall* call, const esper::Kernels** kernels) {
  static constexpr const char* reductions[] = {"mean", "sum", "none", nullptr};
  Array& logits = call->logits;
  if (!road.array(a[0], &logits) || !road.array(a[1], &call->targets) || logits.dims == 0) return false;
  if (call->targets.dims != logits.dims - 1 || !same_sizes(logits, call->targets, logits.dims - 1))
    return false;
  float* weight;
  if (!road.memory(a[2], esper::kFloat32, logits.sizes[logits.dims - 1], &weight)) return false;
  call->weight = weight;
  if (!integer(a[3], &call->ignore_index) || !road.number(a[4], 0, 1, 0, &call->smoothing) ||
      !road.number(a[5], 0, HUGE_VAL, 0, &call->z_loss) ||
      !road.number(a[6], 0, HUGE_VAL, 0, &call->softcap) ||
      !road.number(a[8], 0, HUGE_VAL, -1, &call->normalizer))
    return false;
  if (a[6] != Py_None && (call->softcap == 0 || call->softcap > FLT_MAX || !PyFloat_Check(a[6])))
    return false;
  call->reduction = place_of(a[7], reductions);
  if (call->reduction < 0) return false;
  if (a[8] != Py_None && (call->reduction != esper::kMean || !(call->normalizer >= 0))) return false;
  *kernels = kernels_of(road, a[9]);
  return *kernels != nullptr;
}

// `out` as the logits themselves or separate memory of their shape and dtype.
bool read_out(const Road& road, PyObject* logits, PyObject* out, esper::LossCall* call, Array* written) {
  const Array& x = call->logits;
  if (!road.array(out, written) || !written->contiguous() || written->dtype != x.dtype) return false;
  if (written->dims != x.dims || !same_sizes(x, *written, x.dims)) return false;
  call->out = written;
  if (out == logits) return true;
  const int64_t size = esper::bytes_of(x.dtype);
  int64_t reach = 1;
  for (int64_t d = 0; d < x.dims; ++d) reach += (x.sizes[d] - 1) * x.strides[d];
  const char *in = static_cast<const char*>(x.data), *to = static_cast<const char*>(written->data);
  return x.numel() == 0 || to >= in + reach * size || in >= to + x.numel() * size;
}

// cross_entropy(logits, targets, *options, grad_scale, sums, counts, topk, loss, rows, out) -> whether it was
// served
PyObject* cross_entropy(PyObject* self, PyObject* const* a, Py_ssize_t n) {
  return guarded([&]() -> PyObject* {
    const Road& road = road_of(self);
    esper::LossCall call;
    const esper::Kernels* kernels;
    Array written;
    if (n != 17 || !read_call(road, a, &call, &kernels)) Py_RETURN_FALSE;
    const int64_t rows = call.targets.numel();
    if (!road.number(a[10], -HUGE_VAL, HUGE_VAL, 1, &call.grad_scale) ||
        !road.memory(a[11], esper::kFloat64, -1, &call.sums) ||
        !road.memory(a[12], esper::kInt64, -1, &call.counts) ||
        !road.memory(a[14], esper::kFloat32, call.reduction == esper::kNone ? rows : 1, &call.loss) ||
        !road.memory(a[15], esper::kFloat32, 2 * rows + 1, &call.rows))
      Py_RETURN_FALSE;
    if (call.counts) {
      call.topk.clear();
      for (Py_ssize_t i = 0; i < PyTuple_Size(a[13]); ++i)
        call.topk.push_back(PyLong_AsLongLong(PyTuple_GetItem(a[13], i)));
      if (PyErr_Occurred()) return PyErr_Clear(), PyBool_FromLong(false);
    }
    if (a[16] != Py_None && !read_out(road, a[0], a[16], &call, &written)) Py_RETURN_FALSE;
    esper::Outcome outcome;
    without_lock(call.logits.numel(), [&] { outcome = road.api->cross_entropy(call, *kernels); });
    return PyBool_FromLong(outcome == esper::Outcome::kDone);
  });
}

// cross_entropy_backward(logits, targets, *options, grad_output, rows, out) -> whether it was served
PyObject* cross_entropy_backward(PyObject* self, PyObject* const* a, Py_ssize_t n) {
  return guarded([&]() -> PyObject* {
    const Road& road = road_of(self);
    esper::LossCall call;
    const esper::Kernels* kernels;
    Array written, grad_output;
    if (n != 13 || !read_call(road, a, &call, &kernels) || !road.array(a[10], &grad_output) ||
        !road.memory(a[11], esper::kFloat32, 2 * call.targets.numel() + 1, &call.rows) || !call.rows ||
        !read_out(road, a[0], a[12], &call, &written))
      Py_RETURN_FALSE;
    esper::Outcome outcome;
    without_lock(call.logits.numel(),
                 [&] { outcome = road.api->cross_entropy_backward(call, grad_output, *kernels); });
    return PyBool_FromLong(outcome == esper::Outcome::kDone);
  });
}

// grad_stats(list or tuple of tensors and None, inv_scale, instruction_set, norms, max_abs, zeros, nans,
// infs,
//            total_norm, found_inf) -> the tensors' sizes, or None where it was not served
PyObject* grad_stats(PyObject* self, PyObject* const* a, Py_ssize_t n) {
  return guarded([&]() -> PyObject* {
    const Road& road = road_of(self);
    if (n != 10 || !(PyList_Check(a[0]) || PyTuple_Check(a[0]))) Py_RETURN_NONE;
    const bool list = PyList_Check(a[0]);
    const Py_ssize_t count = list ? PyList_Size(a[0]) : PyTuple_Size(a[0]);
    std::vector<Array> arrays(count);
    int64_t elements = 0;
    static constexpr int64_t none[] = {0};
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* item = list ? PyList_GetItem(a[0], i) : PyTuple_GetItem(a[0], i);
      if (item == Py_None) {
        arrays[i] = {nullptr, 1, none, none, esper::kFloat32};
        continue;
      }
      if (!road.array(item, &arrays[i]) || arrays[i].dtype > esper::kFloat16 || !arrays[i].contiguous())
        Py_RETURN_NONE;
      elements += arrays[i].numel();
    }
    double inv_scale;
    esper::GradStatsOut out;
    if (!road.number(a[1], -HUGE_VAL, HUGE_VAL, 1, &inv_scale) ||
        !road.memory(a[3], esper::kFloat64, count, &out.norms) ||
        !road.memory(a[4], esper::kFloat64, count, &out.max_abs) ||
        !road.memory(a[5], esper::kInt64, count, &out.zeros) ||
        !road.memory(a[6], esper::kInt64, count, &out.nans) ||
        !road.memory(a[7], esper::kInt64, count, &out.infs) ||
        !road.memory(a[8], esper::kFloat64, 1, &out.total_norm) ||
        !road.memory(a[9], esper::kFloat32, 1, &out.found_inf))
      Py_RETURN_NONE;
    const esper::Kernels* kernels = kernels_of(road, a[2]);
    if (!kernels) Py_RETURN_NONE;
    without_lock(elements, [&] { road.api->grad_stats(arrays, inv_scale, out, *kernels); });
    PyObject* numels = PyTuple_New(count);
    if (!numels) return nullptr;
    for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SetItem(numels, i, PyLong_FromLongLong(arrays[i].numel()));
    if (PyErr_Occurred()) Py_CLEAR(numels);
    return numels;
  });
}

// use_huge_pages(tensor): asks the system for its largest pages where fresh memory is this large. One fault
// for 4 KiB would cost more than computing them.
PyObject* use_huge_pages(PyObject* self, PyObject* const* a, Py_ssize_t n) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  Array x;
  if (n == 1 && road_of(self).array(a[0], &x) && x.contiguous()) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(x.data),
                    end = start + x.numel() * esper::bytes_of(x.dtype);
    const uintptr_t from = (start + kPage - 1) / kPage * kPage, to = end / kPage * kPage;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // no more than advice
  }
#endif
  Py_RETURN_NONE;
}

PyMethodDef method(const char* name, PyObject* (*call)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL, ""};
}

// instruction_sets(path of the library of ops) -> names of those that this machine can run, best first
PyObject* instruction_sets(PyObject*, PyObject* path) {
  return guarded([&]() -> PyObject* {
    const char* library = PyUnicode_AsUTF8AndSize(path, nullptr);
    if (!library) return nullptr;
    const esper::Api* api = find_api(library);
    PyObject* names = PyList_New(0);
    for (int64_t i = 1; names && i < 4; ++i) {
      const esper::Kernels* found = api->kernels_at(i);
      PyObject* name = found ? PyUnicode_FromString(found->name) : nullptr;
      if (found && (!name || PyList_Append(names, name) != 0)) Py_CLEAR(names);
      Py_XDECREF(name);
    }
    return names;
  });
}

void forget(PyObject* capsule) { delete static_cast<Road*>(PyCapsule_GetPointer(capsule, kRoad)); }

// road(path of the library of ops, torch.Tensor) -> the four calls above in a tuple
PyObject* road(PyObject*, PyObject* const* a, Py_ssize_t n) {
  static PyMethodDef methods[] = {method("cross_entropy", cross_entropy),
                                  method("cross_entropy_backward", cross_entropy_backward),
                                  method("use_huge_pages", use_huge_pages), method("grad_stats", grad_stats)};
  return guarded([&]() -> PyObject* {
    const char* library = n == 2 ? PyUnicode_AsUTF8AndSize(a[0], nullptr) : nullptr;
    if (!library) throw std::runtime_error("expected the path of the library of ops and torch.Tensor");
    PyObject* table = PyObject_GetAttrString(a[1], "__dlpack_c_exchange_api__");
    if (!table) return nullptr;
    const void* pointer = PyCapsule_GetPointer(table, "dlpack_exchange_api");
    Py_DECREF(table);  // torch keeps what it points to
    if (!pointer) return nullptr;
    const auto* exchange = static_cast<const DLPackExchangeAPI*>(pointer);
    if (exchange->header.version.major != DLPACK_MAJOR_VERSION || !exchange->dltensor_from_py_object_no_sync)
      throw std::runtime_error("torch offers another major version of DLPack");
    const esper::Api* api = find_api(library);
    Py_INCREF(a[1]);  // for as long as the calls
    auto* self_data =
        new Road{api, exchange->dltensor_from_py_object_no_sync, reinterpret_cast<PyTypeObject*>(a[1])};
    PyObject* self = PyCapsule_New(self_data, kRoad, forget);
    if (!self) return delete self_data, nullptr;
    PyObject* calls = PyTuple_New(std::size(methods));
    for (size_t i = 0; calls && i < std::size(methods); ++i)
      PyTuple_SetItem(calls, i, PyCFunction_NewEx(&methods[i], self, nullptr));
    if (PyErr_Occurred()) Py_CLEAR(calls);
    Py_DECREF(self);  // the calls hold it
    return calls;
  });
}

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  static PyMethodDef functions[] = {
      {"instruction_sets", instruction_sets, METH_O, ""}, method("road", road), {}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, functions};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "compiler", __VERSION__) != 0) Py_CLEAR(module);
  return module;
}
