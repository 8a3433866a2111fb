// The Python module: build_info() and the entry that eager calls take. An argument goes from Python to the
// dispatcher once, without the schema matching of torch.ops.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/latent.h"
#include "handles.h"

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

// The keyword arguments of a call. Read here from what was given, since pybind11 would look for each of the
// twenty that may be given, under a string made anew: that took a fifth of a small call.
struct Keywords {
  OptTensor free_bits_per_group, weight;
  OptGenerator generator;
  OptSymInt num_samples;
  std::optional<double> free_bits, balance;
  std::string_view clamp = "batch", penalty = "floor", reduction = "batchmean", parameterization = "logvar";
  int64_t batch_dims = 1;
  std::optional<std::vector<int64_t>> group_dims;
  std::optional<std::vector<double>> bounds;
  bool group_sums = false, prior_grads = false;

  explicit Keywords(const py::kwargs& given) {
    for (const auto& [key, value] : given) {
      const auto name = key.cast<std::string_view>();
      if (!set(name, value)) throw py::type_error("unexpected keyword argument '" + std::string(name) + "'");
    }
  }

  OptInts groups() const { return group_dims ? OptInts(*group_dims) : OptInts(); }
  OptDoubles logvar_bounds() const { return bounds ? OptDoubles(*bounds) : OptDoubles(); }

 private:
  template <class T>
  static bool read(T& to, py::handle value) {
    to = value.cast<T>();
    return true;
  }

  bool set(std::string_view name, py::handle value) {
    if (name == "free_bits") return read(free_bits, value);
    if (name == "generator") return read(generator, value);
    if (name == "num_samples") {
      if (!value.is_none()) num_samples = value.cast<int64_t>();
      return true;
    }
    if (name == "free_bits_per_group") return read(free_bits_per_group, value);
    if (name == "clamp") return read(clamp, value);
    if (name == "penalty") return read(penalty, value);
    if (name == "batch_dims") return read(batch_dims, value);
    if (name == "group_dims") return read(group_dims, value);
    if (name == "weight") return read(weight, value);
    if (name == "balance") return read(balance, value);
    if (name == "reduction") return read(reduction, value);
    if (name == "group_sums") return read(group_sums, value);
    if (name == "parameterization") return read(parameterization, value);
    if (name == "logvar_bounds") return read(bounds, value);
    if (name == "prior_grads") return read(prior_grads, value);
    return false;
  }
};

#define PY_PARAM_PASS k.parameterization, k.logvar_bounds()
#define PY_LAYOUT_PASS k.batch_dims, k.groups(), k.weight, k.balance, k.reduction, k.group_sums
#define PY_KL_PASS k.free_bits, k.free_bits_per_group, k.clamp, k.penalty, PY_LAYOUT_PASS, PY_PARAM_PASS
#define PY_SAVED_ARGS const OptTensor &rng, VK_PRIOR_ARGS, const OptTensor &gate, const OptTensor &open
#define PY_SAVED_PASS rng, VK_PRIOR_PASS, gate, open, k.prior_grads, k.clamp, PY_LAYOUT_PASS, PY_PARAM_PASS
#define PY_SAVED_NAMES \
  py::arg("rng"), py::arg("prior_mu"), py::arg("prior_logvar"), py::arg("gate"), py::arg("open")
#define PY_PRIOR_NAMES py::arg("prior_mu") = py::none(), py::arg("prior_logvar") = py::none()
#define PY_GRAD_NAMES py::arg("grad_z"), py::arg("grad_kl"), py::arg("grad_kl_per_group")
#define PY_MOMENTS_NAMES py::arg("moments"), py::arg("dim")
#define PY_PAIR_NAMES py::arg("mu"), py::arg("logvar")

// The operator, called without the interpreter's lock: the kernels need no Python.
#define PY_CALL(name, ...)               \
  const Keywords k(keywords);            \
  const py::gil_scoped_release unlocked; \
  return call::name(__VA_ARGS__);

// Both forms of each op: suffix, declaration of what is encoded, its arguments, their names.
#define PY_OPERATORS(suffix, TARGET, PASS, NAMES)                                                      \
  m.def(                                                                                               \
      "reparameterize" #suffix,                                                                        \
      [](TARGET, const Tensor& rng, const py::kwargs& keywords) {                                      \
        PY_CALL(reparameterize##suffix, PASS, rng, k.num_samples, PY_PARAM_PASS)                       \
      },                                                                                               \
      NAMES, py::arg("rng"));                                                                          \
  m.def(                                                                                               \
      "reparameterize" #suffix "_draw",                                                                \
      [](TARGET, const py::kwargs& keywords) {                                                         \
        PY_CALL(reparameterize##suffix##_draw, PASS, k.generator, k.num_samples, PY_PARAM_PASS)        \
      },                                                                                               \
      NAMES);                                                                                          \
  m.def(                                                                                               \
      "gaussian_kl" #suffix,                                                                           \
      [](TARGET, VK_PRIOR_ARGS, const py::kwargs& keywords) {                                          \
        PY_CALL(gaussian_kl##suffix, PASS, VK_PRIOR_PASS, PY_KL_PASS)                                  \
      },                                                                                               \
      NAMES, PY_PRIOR_NAMES);                                                                          \
  m.def(                                                                                               \
      "sample_kl" #suffix,                                                                             \
      [](TARGET, const Tensor& rng, VK_PRIOR_ARGS, const py::kwargs& keywords) {                       \
        PY_CALL(sample_kl##suffix, PASS, rng, VK_PRIOR_PASS, k.num_samples, PY_KL_PASS)                \
      },                                                                                               \
      NAMES, py::arg("rng"), PY_PRIOR_NAMES);                                                          \
  m.def(                                                                                               \
      "sample_kl" #suffix "_draw",                                                                     \
      [](TARGET, VK_PRIOR_ARGS, const py::kwargs& keywords) {                                          \
        PY_CALL(sample_kl##suffix##_draw, PASS, VK_PRIOR_PASS, k.generator, k.num_samples, PY_KL_PASS) \
      },                                                                                               \
      NAMES, PY_PRIOR_NAMES);                                                                          \
  m.def(                                                                                               \
      "latent_backward" #suffix,                                                                       \
      [](VK_GRAD_ARGS, TARGET, PY_SAVED_ARGS, const py::kwargs& keywords) {                            \
        PY_CALL(latent_backward##suffix, VK_GRAD_PASS, PASS, PY_SAVED_PASS)                            \
      },                                                                                               \
      PY_GRAD_NAMES, NAMES, PY_SAVED_NAMES);

// ---- the short way ---------------------------------------------------------------------------------------
//
// Calls that leave every option but a number of free bits at its default, as most do: what their arguments
// have to fulfil is little, and is looked at here instead of in Python, which took a third of a small call.
// Anything else, mistakes included, gives None, and the caller goes the long way, which knows what to say.
// The options come as tuples, so that the caller hands them on as they are.

const Tensor* tensor_of(PyObject* x) { return THPVariable_Check(x) ? &THPVariable_Unpack(x) : nullptr; }

// A tensor that the compiled kernels serve.
bool served(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      break;
    default:
      return false;
  }
  if (t.is_cpu()) return true;
  // Whether the CUDA library was loaded does not change after the first CUDA tensor was seen.
  static const bool cuda = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("vaekernels::sample_kl", "")
                               .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return t.is_cuda() && cuda;
}

bool alike(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device() && a.sizes() == b.sizes();
}

bool read_number(PyObject* x, std::optional<double>& number) {
  if (x == Py_None) return true;
  if (!PyFloat_CheckExact(x)) return false;
  number = PyFloat_AS_DOUBLE(x);
  return *number >= 0;
}

bool read_axis(PyObject* x, const Tensor& t, int64_t& axis) {
  if (!PyLong_CheckExact(x)) return false;
  axis = PyLong_AsLongLong(x);
  if (axis == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return axis >= -t.dim() && axis < t.dim() && t.size(axis) % 2 == 0;
}

// Options at their defaults. By identity, except for strings: comparing a tensor with None takes 50 us, since
// torch raises and catches an error on the way, and True equals 1.
bool at_defaults(PyObject* options, PyObject* defaults) {
  if (!PyTuple_CheckExact(options) || PyTuple_GET_SIZE(options) != PyTuple_GET_SIZE(defaults)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(defaults); ++i) {
    PyObject *x = PyTuple_GET_ITEM(options, i), *usual = PyTuple_GET_ITEM(defaults, i);
    const bool same = x == usual || (PyUnicode_CheckExact(x) && PyUnicode_CheckExact(usual) &&
                                     PyUnicode_Compare(x, usual) == 0);
    if (!same) return false;
  }
  return true;
}

// num_samples, generator, rng
bool usual_draw(PyObject* options) {
  static PyObject* const defaults = Py_BuildValue("(OOO)", Py_None, Py_None, Py_None);
  return at_defaults(options, defaults);
}

// parameterization, logvar_bounds
bool usual_scale(PyObject* options) {
  static PyObject* const defaults = Py_BuildValue("(sO)", "logvar", Py_None);
  return at_defaults(options, defaults);
}

// prior_mu, prior_logvar, clamp, penalty, batch_dims, group_dims, weight, balance, reduction,
// parameterization, logvar_bounds, process_group
bool usual_kl(PyObject* options) {
  static PyObject* const defaults =
      Py_BuildValue("(OOssiOOOssOO)", Py_None, Py_None, "batch", "floor", 1, Py_None, Py_None, Py_None,
                    "batchmean", "logvar", Py_None, Py_None);
  return at_defaults(options, defaults);
}

// Calls this small keep the lock of the interpreter, for some 15 us at most. Given up, it would be taken
// again for each tensor that autograd saves, since the Python object of a tensor has to live as long.
constexpr int64_t kElementsUnderLock = 4096;

// The operator's first results, as Python has them.
template <size_t... I, class Results>
PyObject* first_results(Results&& results, std::index_sequence<I...>) {
  if constexpr (sizeof...(I) == 1) return THPVariable_Wrap(std::move(std::get<0>(results)));
  PyObject* tuple = PyTuple_New(sizeof...(I));
  if (tuple == nullptr) throw python_error();
  (PyTuple_SET_ITEM(tuple, I, THPVariable_Wrap(std::move(std::get<I>(results)))), ...);
  return tuple;
}

#define PY_DEFAULT_KL \
  bits, none, "batch", "floor", 1, {}, none, {}, "batchmean", false, "logvar", {}

// For mu and logvar, and for packed ones: a name, how many arguments and results, what has to hold, the call.
#define PY_SHORT(name, arguments, results, holds, op, ...)                        \
  PyObject* name(PyObject*, PyObject* const* args, Py_ssize_t n) {                \
    HANDLE_TH_ERRORS                                                              \
    static const OptTensor none;                                                  \
    static const OptGenerator generator;                                          \
    const Tensor* a = n == arguments ? tensor_of(args[0]) : nullptr;              \
    [[maybe_unused]] const Tensor* b = nullptr;                                   \
    [[maybe_unused]] int64_t axis = 0;                                            \
    std::optional<double> bits;                                                   \
    if (a == nullptr || !served(*a) || a->dim() == 0 || !(holds)) Py_RETURN_NONE; \
    auto values = [&] {                                                           \
      std::optional<py::gil_scoped_release> unlocked;                             \
      if (!a->is_cpu() || a->numel() > kElementsUnderLock) unlocked.emplace();    \
      return call::op(__VA_ARGS__);                                               \
    }();                                                                          \
    return first_results(std::move(values), std::make_index_sequence<results>()); \
    END_HANDLE_TH_ERRORS                                                          \
  }
#define PY_TWO ((b = tensor_of(args[1])) != nullptr && alike(*a, *b))
#define PY_PACKED read_axis(args[1], *a, axis)

#define PY_USUAL_SAMPLE usual_draw(args[2]) && usual_scale(args[3])
#define PY_USUAL_KL read_number(args[2], bits) && usual_kl(args[3])

PY_SHORT(short_reparameterize, 4, 1, PY_TWO&& PY_USUAL_SAMPLE, reparameterize_draw, *a, *b, generator, {},
         "logvar", {})
PY_SHORT(short_gaussian_kl, 4, 2, PY_TWO&& PY_USUAL_KL, gaussian_kl, *a, *b, none, none, PY_DEFAULT_KL)
PY_SHORT(short_sample_kl, 5, 3, PY_TWO && PY_USUAL_KL && usual_draw(args[4]), sample_kl_draw, *a, *b, none,
         none, generator, {}, PY_DEFAULT_KL)
PY_SHORT(short_reparameterize_packed, 4, 1, PY_PACKED&& PY_USUAL_SAMPLE, reparameterize_packed_draw, *a, axis,
         generator, {}, "logvar", {})
PY_SHORT(short_gaussian_kl_packed, 4, 2, PY_PACKED&& PY_USUAL_KL, gaussian_kl_packed, *a, axis, none, none,
         PY_DEFAULT_KL)
PY_SHORT(short_sample_kl_packed, 5, 3, PY_PACKED && PY_USUAL_KL && usual_draw(args[4]), sample_kl_packed_draw,
         *a, axis, none, none, generator, {}, PY_DEFAULT_KL)

PyMethodDef kShort[] = {
#define PY_ENTRY(name)                                                                                       \
  {"short_" #name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(short_##name)), METH_FASTCALL, \
   nullptr},
    PY_ENTRY(reparameterize) PY_ENTRY(gaussian_kl) PY_ENTRY(sample_kl) PY_ENTRY(reparameterize_packed)
        PY_ENTRY(gaussian_kl_packed) PY_ENTRY(sample_kl_packed){nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "What the library was compiled with, and the instruction set it runs on.");
  m.def("_rng_state", &call::_rng_state, py::arg("like"), py::kw_only(), py::arg("generator") = py::none());
  m.def("_philox_words", &call::_philox_words, py::arg("rng"), py::arg("n"), py::arg("first_quad") = 0);
  PY_OPERATORS(, VK_TARGET_ARGS, VK_TARGET_PASS, PY_PAIR_NAMES)
  PY_OPERATORS(_packed, VK_PACKED_ARGS, VK_PACKED_PASS, PY_MOMENTS_NAMES)
  if (PyModule_AddFunctions(m.ptr(), kShort) != 0) throw py::error_already_set();
}

}  // namespace vk
