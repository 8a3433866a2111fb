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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "What the library was compiled with, and the instruction set it runs on.");
  m.def("_rng_state", &call::_rng_state, py::arg("like"), py::kw_only(), py::arg("generator") = py::none());
  m.def("_philox_words", &call::_philox_words, py::arg("rng"), py::arg("n"), py::arg("first_quad") = 0);
  PY_OPERATORS(, VK_TARGET_ARGS, VK_TARGET_PASS, PY_PAIR_NAMES)
  PY_OPERATORS(_packed, VK_PACKED_ARGS, VK_PACKED_PASS, PY_MOMENTS_NAMES)
}

}  // namespace vk
