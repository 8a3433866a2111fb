// The operators of the aggregate posterior: their options, what is refused, and the launch of one problem. A
// backend, as in launch.h, has
//   void aggregate(const AggregateForward&, like), void aggregate(const AggregateBackward&, like)
#pragma once

#include <cmath>

#include "aggregate.h"
#include "launch.h"

namespace vk {

// What the log-weights are of: all posteriors alike, the minibatch-weighted or the stratified estimate of the
// mixture over a whole data set (Chen et al. 2018, appendix C).
enum class LogWeight : uint8_t { uniform, minibatch, stratified };

constexpr auto choices(LogWeight) {
  return std::to_array<Choice<LogWeight>>({{"uniform", LogWeight::uniform},
                                           {"minibatch", LogWeight::minibatch},
                                           {"stratified", LogWeight::stratified}});
}

struct AggregateOptions {
  bool per_dim;
  LogWeight log_weight;
  int64_t examples;  // of the data set; not for uniform weights
  bool leave_one_out;
  int64_t first;  // own posterior of the first sample
  Param parameterization;
  std::optional<std::array<double, 2>> logvar_bounds;

  bool knows_own() const { return leave_one_out || log_weight == LogWeight::stratified; }
};

inline constexpr char kAggregateOptions[] =
    "*, bool per_dim=True, str log_weight=\"uniform\", int examples=0, bool leave_one_out=False, int "
    "first=0, "
    "str parameterization=\"logvar\", float[]? logvar_bounds=None)";

using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
// z, mu, logvar, then the options
using AggregateCall = Tensors3(const Tensor&, const Tensor&, const Tensor&, bool, std::string_view, int64_t,
                               bool, int64_t, std::string_view, OptDoubles);
// grad_qz, grad_dims, z, mu, logvar, saved, then the options
using AggregateBackwardCall = Tensors3(const OptTensor&, const OptTensor&, const Tensor&, const Tensor&,
                                       const Tensor&, const Tensor&, bool, std::string_view, int64_t, bool,
                                       int64_t, std::string_view, OptDoubles);

// A kernel that takes its options as `AggregateOptions`, in the form in which the dispatcher calls it.
template <auto kernel, class = decltype(kernel)>
struct RegisteredAggregate;

template <auto kernel, class... Args>
struct RegisteredAggregate<kernel, Tensors3 (*)(const AggregateOptions&, Args...)> {
  static Tensors3 call(Args... args, bool per_dim, std::string_view log_weight, int64_t examples,
                       bool leave_one_out, int64_t first, std::string_view parameterization,
                       OptDoubles logvar_bounds) {
    const AggregateOptions o{
        per_dim,
        choice<LogWeight>("log_weight", log_weight),
        examples,
        leave_one_out,
        first,
        choice<Param>("parameterization", parameterization),
        Passed<std::optional<std::array<double, 2>>>::read("logvar_bounds", logvar_bounds),
    };
    return kernel(o, std::forward<Args>(args)...);
  }
};

// ---- checks ----------------------------------------------------------------------------------------------

inline void check_aggregate(const AggregateOptions& o, const Tensor& z, const Tensor& mu,
                            const Tensor& logvar) {
  check_pair("mu", mu, "logvar", logvar);
  check_floating("z", z);
  TORCH_CHECK_TYPE(z.scalar_type() == mu.scalar_type(), "z and mu must have one dtype, got ", dtype_text(z),
                   " and ", dtype_text(mu), "; convert one, e.g. z.to(mu.dtype)");
  TORCH_CHECK_VALUE(z.device() == mu.device(), "z and mu must be on one device, got ", z.device(), " and ",
                    mu.device(), "; move one, e.g. z.to(mu.device)");
  TORCH_CHECK_VALUE(mu.dim() == 2, "mu must be [posteriors, dimensions], got shape ", mu.sym_sizes(),
                    "; flatten the latent, e.g. mu.flatten(1)");
  TORCH_CHECK_VALUE(z.dim() == 2 && z.sym_size(1) == mu.sym_size(1),
                    "z must be [samples, dimensions] with the dimensions of mu, whose shape is ",
                    mu.sym_sizes(), ", got ", z.sym_sizes());
  TORCH_CHECK_VALUE(mu.sym_size(0) >= 1, "mu must have at least one posterior, got shape ", mu.sym_sizes());
  if (o.logvar_bounds) {
    Options bounds;
    bounds.logvar_bounds = o.logvar_bounds;
    check_bounds(bounds);
  }
  if (o.log_weight != LogWeight::uniform) {
    TORCH_CHECK_VALUE(o.examples >= 1, "log_weight must have at least 1 example, got ", o.examples,
                      "; give the number of examples of the data set");
    TORCH_CHECK_VALUE(!o.leave_one_out, "leave_one_out must be False with log_weight, whose weights are of ",
                      "all posteriors; drop one of them");
  }
  if (!o.knows_own()) return;
  TORCH_CHECK_VALUE(mu.sym_size(0) >= 2, o.leave_one_out ? "leave_one_out" : "log_weight='stratified'",
                    " needs at least two posteriors, got mu of shape ", mu.sym_sizes());
  TORCH_CHECK_VALUE(o.first >= 0 && z.sym_size(0) + o.first <= mu.sym_size(0),
                    o.leave_one_out ? "leave_one_out" : "log_weight='stratified'",
                    " needs the posterior of each row of z, got ", z.sym_size(0), " samples from number ",
                    o.first, " on and ", mu.sym_size(0), " posteriors");
  if (o.log_weight == LogWeight::stratified)
    TORCH_CHECK_VALUE(mu.sym_size(0) <= o.examples, "log_weight must be of at least as many examples as mu ",
                      "has posteriors, ", mu.sym_size(0), ", got ", o.examples);
}

inline void check_aggregate_backward(const AggregateOptions& o, const OptTensor& grad_qz,
                                     const OptTensor& grad_dims, const Tensor& z, const Tensor& mu,
                                     const Tensor& logvar, const Tensor& saved) {
  check_aggregate(o, z, mu, logvar);
  const at::ScalarType compute = compute_type(mu);
  TORCH_CHECK_VALUE(o.per_dim || !grad_dims, "grad_dims must be None without per_dim");
  if (grad_qz)
    check_saved(*grad_qz, "grad_qz", mu, compute,
                grad_qz->dim() == 1 && grad_qz->sym_size(0) == z.sym_size(0), "of the shape of log_qz");
  if (grad_dims)
    check_saved(*grad_dims, "grad_dims", mu, compute, grad_dims->sym_sizes() == z.sym_sizes(),
                "of the shape of log_qz_dims");
  check_saved(saved, "saved", mu, compute,
              saved.dim() == 3 && saved.sym_size(0) == 2 && saved.sym_size(1) == z.sym_size(0) &&
                  saved.sym_size(2) == (o.per_dim ? z.sym_size(1) + 1 : c10::SymInt(1)),
              "two numbers for each sum");
}

// ---- the launch ------------------------------------------------------------------------------------------

inline void bind_aggregate(Aggregate& call, const AggregateOptions& o, const Tensor& z, const Tensor& mu,
                           const Tensor& logvar) {
  call.N = z.size(0);
  call.M = mu.size(0);
  call.D = mu.size(1);
  call.dtype = dtype_of(mu);
  call.param = o.parameterization;
  if (o.logvar_bounds) {
    call.lo = (*o.logvar_bounds)[0];
    call.hi = (*o.logvar_bounds)[1];
  }
  call.z = z.const_data_ptr();
  call.mu = mu.const_data_ptr();
  call.scale = logvar.const_data_ptr();
  call.per_dim = o.per_dim;
  call.first = o.first;
  const double all = static_cast<double>(call.M), others = all - 1, n = static_cast<double>(o.examples);
  if (o.leave_one_out) {
    call.base = -std::log(others);
    call.own = -std::numeric_limits<double>::infinity();
  } else if (o.log_weight == LogWeight::stratified) {
    // 1 / n for the own posterior, (n - others) / (n others) for one more, 1 / others for the rest.
    call.base = -std::log(others);
    call.own = std::log(others / n);
    call.next = std::log((n - others) / n);
  } else {
    call.base = -std::log(all) - (o.log_weight == LogWeight::minibatch ? std::log(n) : 0);
  }
}

template <class Backend>
struct AggregateOperators {
  static Tensors3 forward(const AggregateOptions& o, const Tensor& z, const Tensor& mu,
                          const Tensor& logvar) {
    check_aggregate(o, z, mu, logvar);
    const Tensor dense_z = z.contiguous(), dense_mu = mu.contiguous(), dense_scale = logvar.contiguous();
    AggregateForward call;
    bind_aggregate(call, o, dense_z, dense_mu, dense_scale);
    const auto compute = compute_type(mu);
    Tensor log_qz = empty_beside(mu, {call.N}, compute);
    Tensor dims = o.per_dim ? empty_beside(mu, {call.N, call.D}, compute) : nothing(mu, compute, 1);
    Tensor saved = empty_beside(mu, {2, call.N, call.columns()}, compute);
    call.log_qz = log_qz.data_ptr();
    call.log_qz_dims = o.per_dim ? dims.data_ptr() : nullptr;
    call.saved = saved.data_ptr();
    if (call.N > 0) Backend::aggregate(call, mu);
    return {std::move(log_qz), std::move(dims), std::move(saved)};
  }

  static Tensors3 backward(const AggregateOptions& o, const OptTensor& grad_qz, const OptTensor& grad_dims,
                           const Tensor& z, const Tensor& mu, const Tensor& logvar, const Tensor& saved) {
    check_aggregate_backward(o, grad_qz, grad_dims, z, mu, logvar, saved);
    const Tensor dense_z = z.contiguous(), dense_mu = mu.contiguous(), dense_scale = logvar.contiguous(),
                 dense_saved = saved.contiguous();
    const Tensor qz = grad_qz ? grad_qz->contiguous() : Tensor(),
                 dims = grad_dims ? grad_dims->contiguous() : Tensor();
    AggregateBackward call;
    bind_aggregate(call, o, dense_z, dense_mu, dense_scale);
    const auto gradient = [&](const Tensor& t) { return empty_beside(mu, t.sizes(), mu.scalar_type()); };
    Tensor grad_z = gradient(z), grad_mu = gradient(mu), grad_scale = gradient(mu);
    if (call.N == 0 || (!grad_qz && !grad_dims)) {
      grad_z.zero_(), grad_mu.zero_(), grad_scale.zero_();
      return {std::move(grad_z), std::move(grad_mu), std::move(grad_scale)};
    }
    call.grad_qz = grad_qz ? qz.const_data_ptr() : nullptr;
    call.grad_dims = grad_dims ? dims.const_data_ptr() : nullptr;
    call.saved = dense_saved.const_data_ptr();
    call.grad_z = grad_z.data_ptr();
    call.grad_mu = grad_mu.data_ptr();
    call.grad_scale = grad_scale.data_ptr();
    if (call.D > 0) Backend::aggregate(call, mu);
    return {std::move(grad_z), std::move(grad_mu), std::move(grad_scale)};
  }
};

// Registers `forward` and `backward` of `Kernels`.
template <class Kernels>
void register_aggregate(torch::Library& m) {
  m.impl("aggregate", TORCH_FN((RegisteredAggregate<&Kernels::forward>::call)));
  m.impl("aggregate_backward", TORCH_FN((RegisteredAggregate<&Kernels::backward>::call)));
}

}  // namespace vk
