// The Python module: build_info() and the entry that eager calls take. An argument goes from Python to the
// dispatcher once, without the schema matching of torch.ops.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>

#include "cpu/latent.h"
#include "options.h"

namespace vk {
namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["torch"] = VAEKERNELS_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cxx_std"] = static_cast<int64_t>(__cplusplus);
  info["cpu_isa"] = cpu::isa();
  return info;
}

// ---- options that were checked once ----------------------------------------------------------------------
//
// Python's checks take longer than a small call. So their outcome is kept, by what was asked: the values of
// the options, the shape, dtype and device of the tensors. Floats are left out, which the operators check
// themselves: an annealed threshold is another one in every call.

// The positional arguments of `latent` in vaekernels/_dispatch.py, and the bits of `want`.
enum Position {
  kWant,
  kFirst,
  kSecond,
  kDim,
  kPriorMu,
  kPriorLogvar,
  kWeight,
  kNumSamples,
  kGenerator,
  kRng
};
enum Want { kSample = 1, kKl = 2, kPacked = 4 };

// The arguments of a call as Python passes them: the positional ones, then the values of `names`.
struct Arguments {
  PyObject* const* values;
  Py_ssize_t positional;
  PyObject* names;  // a tuple, or null

  Py_ssize_t named() const { return names == nullptr ? 0 : PyTuple_GET_SIZE(names); }
  Py_ssize_t count() const { return positional + named(); }
  PyObject* name(Py_ssize_t i) const { return PyTuple_GET_ITEM(names, i); }
  // The place of a keyword argument; -1 where it was not given.
  Py_ssize_t find(const char* wanted) const {
    for (Py_ssize_t i = 0; i < named(); ++i)
      if (PyUnicode_CompareWithASCIIString(name(i), wanted) == 0) return positional + i;
    return -1;
  }
  // A positional argument, None where it was left out.
  PyObject* operator[](Py_ssize_t i) const { return i < positional ? values[i] : Py_None; }
  PyObject* keyword(Py_ssize_t place) const { return place < 0 ? Py_None : values[place]; }
};

bool same_number(PyObject* a, PyObject* b) {
  if (PyLong_CheckExact(a) && PyLong_CheckExact(b)) return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
  return PyFloat_CheckExact(a) && PyFloat_CheckExact(b) && PyFloat_AS_DOUBLE(a) == PyFloat_AS_DOUBLE(b);
}

// What is kept of an argument, to tell whether another call asks the same.
class Kept {
 public:
  bool requires_grad() const { return requires_grad_; }

  // None where no answer can be kept: tensors without plain sizes, arguments of other types.
  static std::optional<Kept> of(PyObject* x) {
    Kept k;
    k.type_ = Py_TYPE(x);
    if (x == Py_None || PyUnicode_CheckExact(x) || PyBool_Check(x) || PyLong_CheckExact(x) ||
        PyFloat_CheckExact(x)) {
      k.value_ = py::reinterpret_borrow<py::object>(x);
    } else if (PyTuple_CheckExact(x) || PyList_CheckExact(x)) {
      k.value_ = py::reinterpret_steal<py::object>(PySequence_Tuple(x));  // a list may change
    } else if (THPGenerator_Check(x)) {
      k.device_ = THPGenerator_Unwrap(x).device();
    } else if (THPVariable_Check(x)) {
      const Tensor& t = THPVariable_Unpack(x);
      if (!plain(t)) return std::nullopt;
      k.is_tensor_ = true;
      k.device_ = t.device();
      k.dtype_ = t.scalar_type();
      k.requires_grad_ = t.requires_grad();
      k.sizes_ = t.sizes();
    } else {
      return std::nullopt;
    }
    return k;
  }

  bool same(PyObject* x) const {
    if (x == value_.ptr()) return true;
    if (Py_TYPE(x) != type_) return false;
    if (is_tensor_) {
      const Tensor& t = THPVariable_Unpack(x);
      return t.scalar_type() == dtype_ && plain(t) && t.sizes() == sizes_ && t.device() == device_ &&
             t.requires_grad() == requires_grad_;
    }
    if (PyFloat_CheckExact(x)) return true;
    if (PyLong_CheckExact(x)) return same_number(x, value_.ptr());
    if (PyUnicode_CheckExact(x)) return PyUnicode_Compare(x, value_.ptr()) == 0;
    if (PyTuple_CheckExact(x) || PyList_CheckExact(x)) {
      const Py_ssize_t n = PySequence_Fast_GET_SIZE(x);
      if (n != PyTuple_GET_SIZE(value_.ptr())) return false;
      for (Py_ssize_t i = 0; i < n; ++i)
        if (!same_number(PySequence_Fast_GET_ITEM(x, i), PyTuple_GET_ITEM(value_.ptr(), i))) return false;
      return true;
    }
    return !value_ && THPGenerator_Unwrap(x).device() == device_;
  }

 private:
  static bool plain(const Tensor& t) {
    const auto* impl = t.unsafeGetTensorImpl();
    return !impl->is_python_dispatch() && !impl->has_symbolic_sizes_strides();
  }

  PyTypeObject* type_ = nullptr;
  py::object value_;  // null for tensors and generators
  bool is_tensor_ = false, requires_grad_ = false;
  at::ScalarType dtype_ = at::kFloat;
  at::Device device_ = at::kCPU;
  at::DimVector sizes_;
};

// A call that was checked: what was asked, its options, and the places of the numbers that each call brings.
struct Checked {
  std::vector<Kept> asked;
  Py_ssize_t positional;
  py::object names;
  Options options;
  bool sample, kl;
  bool requires_grad = false;  // of a tensor among what was asked
  int64_t dim;
  std::optional<int64_t> num_samples;
  Py_ssize_t free_bits, balance;

  bool answers(const Arguments& a) const {
    if (a.positional != positional || a.count() != static_cast<Py_ssize_t>(asked.size())) return false;
    for (size_t i = 0; i < asked.size(); ++i)
      if (!asked[i].same(a.values[i])) return false;
    if (a.names == names.ptr()) return true;
    for (Py_ssize_t i = 0; i < a.named(); ++i)
      if (a.name(i) != PyTuple_GET_ITEM(names.ptr(), i)) return false;
    return true;
  }
};

// Writes the options that `given`, a dict of Python, names.
void read_options(const py::dict& given, Options& o) {
  for_options([&](const auto& option) {
    if (!given.contains(option.name)) return;
    const py::object value = given[option.name];
    auto& member = o.*option.member;
    using Member = std::remove_cvref_t<decltype(member)>;
    if constexpr (std::is_enum_v<Member>)
      member = choice<Member>(option.name, value.cast<std::string_view>());
    else if constexpr (std::is_same_v<Member, std::optional<at::DimVector>>)
      member.emplace(value.cast<std::vector<int64_t>>());
    else
      member = value.cast<Member>();
  });
}

// A function of vaekernels/_dispatch.py, called as this module was.
py::object ask_python(const char* function, const Arguments& a) {
  const py::object f = py::module_::import("vaekernels._dispatch").attr(function);
  PyObject* out = PyObject_Vectorcall(f.ptr(), a.values, static_cast<size_t>(a.positional), a.names);
  if (out == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(out);
}

// What Python's checks say of a call; none where it is not for the compiled operators, or cannot be kept.
std::shared_ptr<const Checked> check(const Arguments& a) {
  auto c = std::make_shared<Checked>();
  for (Py_ssize_t i = 0; i < a.count(); ++i) {
    std::optional<Kept> kept = Kept::of(a.values[i]);
    if (!kept) return nullptr;
    c->requires_grad |= kept->requires_grad();
    c->asked.push_back(std::move(*kept));
  }
  const py::object options = ask_python("checked", a);
  if (options.is_none()) return nullptr;
  read_options(options, c->options);
  const int64_t want = PyLong_AsLongLong(a[kWant]);
  c->positional = a.positional;
  c->names = py::reinterpret_borrow<py::object>(a.names);
  c->sample = (want & kSample) != 0;
  c->kl = (want & kKl) != 0;
  c->dim = PyLong_AsLongLong(a[kDim]);
  if (a[kNumSamples] != Py_None) c->num_samples = PyLong_AsLongLong(a[kNumSamples]);
  c->free_bits = a.find("free_bits");
  c->balance = a.find("balance");
  return c;
}

// ---- the entry -------------------------------------------------------------------------------------------

// Calls this small keep the lock of the interpreter, for some 15 us at most. Given up, it would be taken
// again for each tensor that autograd saves, since the Python object of a tensor has to live as long.
constexpr int64_t kElementsUnderLock = 4096;

PyObject* run(const Arguments& a, const Checked& c) {
  static const Operator<PureCall> pure("vaekernels::latent");
  static const Operator<DrawCall> draw("vaekernels::latent_draw");
  const auto tensor = [](PyObject* x) {
    return x == Py_None || PyFloat_CheckExact(x) || PyLong_CheckExact(x) ? OptTensor()
                                                                         : OptTensor(THPVariable_Unpack(x));
  };
  PyObject *free_bits = a.keyword(c.free_bits), *balance = a.keyword(c.balance);
  const Tensor& first = THPVariable_Unpack(a[kFirst]);
  const OptTensor second = tensor(a[kSecond]), prior_mu = tensor(a[kPriorMu]),
                  prior_logvar = tensor(a[kPriorLogvar]), weight = tensor(a[kWeight]), rng = tensor(a[kRng]),
                  free_bits_per_group = tensor(free_bits);
  OptGenerator generator;
  if (a[kGenerator] != Py_None) generator = THPGenerator_Unwrap(a[kGenerator]);
  Options options = c.options;
  if (PyFloat_CheckExact(free_bits)) options.free_bits = PyFloat_AS_DOUBLE(free_bits);
  if (PyFloat_CheckExact(balance)) options.balance = PyFloat_AS_DOUBLE(balance);
  const OptSymInt num_samples = c.num_samples ? OptSymInt(*c.num_samples) : OptSymInt();
  Tensor z, kl, kl_per_group;
  {
    std::optional<py::gil_scoped_release> unlocked;
    if (!first.is_cpu() || first.numel() > kElementsUnderLock) unlocked.emplace();
    // Without a graph to record, past autograd's kernel, which would only call on: 0.3 us.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!c.requires_grad || !at::GradMode::is_enabled()) below.emplace();
    if (c.sample && !rng)
      std::tie(z, kl, kl_per_group, std::ignore, std::ignore, std::ignore) =
          draw(options, first, second, c.dim, generator, prior_mu, prior_logvar, true, c.kl, num_samples,
               weight, free_bits_per_group);
    else
      std::tie(z, kl, kl_per_group, std::ignore, std::ignore) =
          pure(options, first, second, c.dim, rng, prior_mu, prior_logvar, c.sample, c.kl, num_samples,
               weight, free_bits_per_group);
  }
  PyObject* out = PyTuple_New(3);
  if (out == nullptr) throw python_error();
  const auto put = [&](Py_ssize_t i, bool wanted, Tensor& t) {
    PyTuple_SET_ITEM(out, i, wanted ? THPVariable_Wrap(std::move(t)) : Py_NewRef(Py_None));
  };
  put(0, c.sample, z);
  put(1, c.kl, kl);
  put(2, c.kl, kl_per_group);
  return out;
}

// As `latent` in vaekernels/_dispatch.py, which serves what this does not.
PyObject* latent(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  HANDLE_TH_ERRORS
  // The last calls, the newest first. A training loop has a few; telling that one is another takes 5 ns.
  constexpr size_t kMostKept = 32;
  static auto* kept = new std::vector<std::shared_ptr<const Checked>>();
  const Arguments a{values, positional, names};
  if (torch::jit::tracer::isTracing()) return ask_python("latent", a).release().ptr();
  for (size_t i = 0; i < kept->size(); ++i) {
    if (!(*kept)[i]->answers(a)) continue;
    const std::shared_ptr<const Checked> checked = (*kept)[i];  // another thread may drop it
    if (i > 0)
      std::rotate(kept->begin(), kept->begin() + static_cast<std::ptrdiff_t>(i),
                  kept->begin() + static_cast<std::ptrdiff_t>(i) + 1);
    return run(a, *checked);
  }
  const std::shared_ptr<const Checked> checked = check(a);
  if (checked == nullptr) return ask_python("latent", a).release().ptr();
  if (kept->size() == kMostKept) kept->pop_back();
  kept->insert(kept->begin(), checked);
  return run(a, *checked);
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {{"latent", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&latent)),
                           METH_FASTCALL | METH_KEYWORDS, "The eager form of vaekernels._dispatch.latent."},
                          {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "What the library was compiled with, and the instruction set it runs on.");
  if (PyModule_AddFunctions(m.ptr(), kMethods) != 0) throw py::error_already_set();
}

}  // namespace vk
