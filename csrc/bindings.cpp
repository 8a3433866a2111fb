// The Python module: build_info() and the entry that eager calls take. An argument goes from Python to the
// dispatcher once, without the schema matching of torch.ops.
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

// The schemas' types as Python hands them over.
using PyInts = std::optional<std::vector<int64_t>>;
using PyDoubles = std::optional<std::vector<double>>;
using PyInt = std::optional<int64_t>;

OptInts ints(const PyInts& v) { return v ? OptInts(*v) : OptInts(); }
OptDoubles doubles(const PyDoubles& v) { return v ? OptDoubles(*v) : OptDoubles(); }
OptSymInt sym(const PyInt& v) { return v ? OptSymInt(*v) : OptSymInt(); }

#define PY_PARAM_ARGS std::string_view parameterization, const PyDoubles &bounds
#define PY_PARAM_PASS parameterization, doubles(bounds)
#define PY_PARAM_NAMES py::arg("parameterization") = "logvar", py::arg("logvar_bounds") = py::none()
#define PY_LAYOUT_ARGS                                                                                  \
  int64_t batch_dims, const PyInts &group_dims, const OptTensor &weight, std::optional<double> balance, \
      std::string_view reduction, bool group_sums
#define PY_LAYOUT_PASS batch_dims, ints(group_dims), weight, balance, reduction, group_sums
#define PY_LAYOUT_NAMES                                                                          \
  py::arg("batch_dims") = 1, py::arg("group_dims") = py::none(), py::arg("weight") = py::none(), \
  py::arg("balance") = py::none(), py::arg("reduction") = "batchmean", py::arg("group_sums") = false
#define PY_KL_ARGS                                                                               \
  std::optional<double> free_bits, const OptTensor &free_bits_per_group, std::string_view clamp, \
      std::string_view penalty, PY_LAYOUT_ARGS, PY_PARAM_ARGS
#define PY_KL_PASS free_bits, free_bits_per_group, clamp, penalty, PY_LAYOUT_PASS, PY_PARAM_PASS
#define PY_KL_NAMES                                                               \
  py::arg("free_bits") = py::none(), py::arg("free_bits_per_group") = py::none(), \
  py::arg("clamp") = "batch", py::arg("penalty") = "floor", PY_LAYOUT_NAMES, PY_PARAM_NAMES
#define PY_BACKWARD_ARGS bool prior_grads, std::string_view clamp, PY_LAYOUT_ARGS, PY_PARAM_ARGS
#define PY_BACKWARD_PASS prior_grads, clamp, PY_LAYOUT_PASS, PY_PARAM_PASS
#define PY_BACKWARD_NAMES \
  py::arg("prior_grads") = false, py::arg("clamp") = "batch", PY_LAYOUT_NAMES, PY_PARAM_NAMES
#define PY_SAVED_ARGS \
  const OptTensor &rng, VK_PRIOR_ARGS, const OptTensor &gate, const OptTensor &open, PY_BACKWARD_ARGS
#define PY_SAVED_PASS rng, VK_PRIOR_PASS, gate, open, PY_BACKWARD_PASS
#define PY_SAVED_NAMES                                                                            \
  py::arg("rng"), py::arg("prior_mu"), py::arg("prior_logvar"), py::arg("gate"), py::arg("open"), \
      py::kw_only(), PY_BACKWARD_NAMES
#define PY_PRIOR_NAMES py::arg("prior_mu") = py::none(), py::arg("prior_logvar") = py::none()
#define PY_GENERATOR_NAME py::arg("generator") = py::none()
#define PY_SAMPLES_NAME py::arg("num_samples") = py::none()
#define PY_GRAD_NAMES py::arg("grad_z"), py::arg("grad_kl"), py::arg("grad_kl_per_group")
#define PY_MOMENTS_NAMES py::arg("moments"), py::arg("dim")
#define PY_PAIR_NAMES py::arg("mu"), py::arg("logvar")

// The kernels need no Python.
using Unlocked = py::call_guard<py::gil_scoped_release>;

// Both forms of each op: suffix, declaration of what is encoded, its arguments, their names.
#define PY_OPERATORS(suffix, TARGET, PASS, NAMES)                                                            \
  m.def(                                                                                                     \
      "reparameterize" #suffix,                                                                              \
      [](TARGET, const Tensor& rng, const PyInt& num_samples, PY_PARAM_ARGS) {                               \
        return call::reparameterize##suffix(PASS, rng, sym(num_samples), PY_PARAM_PASS);                     \
      },                                                                                                     \
      NAMES, py::arg("rng"), py::kw_only(), PY_SAMPLES_NAME, PY_PARAM_NAMES, Unlocked());                    \
  m.def(                                                                                                     \
      "reparameterize" #suffix "_draw",                                                                      \
      [](TARGET, const OptGenerator& generator, const PyInt& num_samples, PY_PARAM_ARGS) {                   \
        return call::reparameterize##suffix##_draw(PASS, generator, sym(num_samples), PY_PARAM_PASS);        \
      },                                                                                                     \
      NAMES, py::kw_only(), PY_GENERATOR_NAME, PY_SAMPLES_NAME, PY_PARAM_NAMES, Unlocked());                 \
  m.def(                                                                                                     \
      "gaussian_kl" #suffix,                                                                                 \
      [](TARGET, VK_PRIOR_ARGS, PY_KL_ARGS) {                                                                \
        return call::gaussian_kl##suffix(PASS, VK_PRIOR_PASS, PY_KL_PASS);                                   \
      },                                                                                                     \
      NAMES, PY_PRIOR_NAMES, py::kw_only(), PY_KL_NAMES, Unlocked());                                        \
  m.def(                                                                                                     \
      "sample_kl" #suffix,                                                                                   \
      [](TARGET, const Tensor& rng, VK_PRIOR_ARGS, const PyInt& num_samples, PY_KL_ARGS) {                   \
        return call::sample_kl##suffix(PASS, rng, VK_PRIOR_PASS, sym(num_samples), PY_KL_PASS);              \
      },                                                                                                     \
      NAMES, py::arg("rng"), PY_PRIOR_NAMES, py::kw_only(), PY_SAMPLES_NAME, PY_KL_NAMES, Unlocked());       \
  m.def(                                                                                                     \
      "sample_kl" #suffix "_draw",                                                                           \
      [](TARGET, VK_PRIOR_ARGS, const OptGenerator& generator, const PyInt& num_samples, PY_KL_ARGS) {       \
        return call::sample_kl##suffix##_draw(PASS, VK_PRIOR_PASS, generator, sym(num_samples), PY_KL_PASS); \
      },                                                                                                     \
      NAMES, PY_PRIOR_NAMES, py::kw_only(), PY_GENERATOR_NAME, PY_SAMPLES_NAME, PY_KL_NAMES, Unlocked());    \
  m.def(                                                                                                     \
      "latent_backward" #suffix,                                                                             \
      [](VK_GRAD_ARGS, TARGET, PY_SAVED_ARGS) {                                                              \
        return call::latent_backward##suffix(VK_GRAD_PASS, PASS, PY_SAVED_PASS);                             \
      },                                                                                                     \
      PY_GRAD_NAMES, NAMES, PY_SAVED_NAMES, Unlocked());

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "What the library was compiled with, and the instruction set it runs on.");
  m.def("_rng_state", &call::_rng_state, py::arg("like"), py::kw_only(), PY_GENERATOR_NAME);
  m.def("_philox_words", &call::_philox_words, py::arg("rng"), py::arg("n"), py::arg("first_quad") = 0);
  PY_OPERATORS(, VK_TARGET_ARGS, VK_TARGET_PASS, PY_PAIR_NAMES)
  PY_OPERATORS(_packed, VK_PACKED_ARGS, VK_PACKED_PASS, PY_MOMENTS_NAMES)
}

}  // namespace vk
