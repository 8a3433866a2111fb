// The aggregate posterior: schemas, the Meta and the Autograd kernels.
#include <ATen/core/enum_tag.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "aggregate_launch.h"
#include "node.h"

namespace vk {
namespace {

using torch::autograd::compute_requires_grad;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// An operator, called through the dispatcher.
template <class Call>
class AggregateOperator {
 public:
  explicit AggregateOperator(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Call>()) {}

  template <class... Args>
  Tensors3 operator()(const AggregateOptions& o, const Args&... args) const {
    return handle_.call(args..., o.per_dim, name_of(o.log_weight), o.examples, o.leave_one_out, o.first,
                        name_of(o.parameterization),
                        o.logvar_bounds ? OptDoubles(*o.logvar_bounds) : OptDoubles());
  }

 private:
  c10::TypedOperatorHandle<Call> handle_;
};

// ---- Meta ------------------------------------------------------------------------------------------------

struct Meta {
  static Tensors3 forward(const AggregateOptions& o, const Tensor& z, const Tensor& mu,
                          const Tensor& logvar) {
    check_aggregate(o, z, mu, logvar);
    const auto options = mu.options().dtype(compute_type(mu));
    const c10::SymInt columns = o.per_dim ? z.sym_size(1) + 1 : c10::SymInt(1);
    return {at::empty_symint({z.sym_size(0)}, options),
            o.per_dim ? at::empty_symint(z.sym_sizes(), options) : at::empty({0}, options),
            at::empty_symint({2, z.sym_size(0), columns}, options)};
  }

  static Tensors3 backward(const AggregateOptions& o, const OptTensor& grad_qz, const OptTensor& grad_dims,
                           const Tensor& z, const Tensor& mu, const Tensor& logvar, const Tensor& saved) {
    check_aggregate_backward(o, grad_qz, grad_dims, z, mu, logvar, saved);
    const auto gradient = [&](const Tensor& t) { return at::empty_symint(t.sym_sizes(), mu.options()); };
    return {gradient(z), gradient(mu), gradient(mu)};
  }
};

// ---- Autograd --------------------------------------------------------------------------------------------

// Differentiated itself (double backward), the backward is computed by formulas that autograd can follow.
Tensors3 differentiable_backward(const AggregateOptions& o, const OptTensor& grad_qz,
                                 const OptTensor& grad_dims, const Tensor& z, const Tensor& mu,
                                 const Tensor& logvar, const Tensor& saved) {
  static const AggregateOperator<AggregateBackwardCall> kernel("vaekernels::aggregate_backward");
  static const AggregateOperator<AggregateBackwardCall> reference("vaekernels::aggregate_backward_reference");
  if (compute_requires_grad(grad_qz, grad_dims, z, mu, logvar)) {
    {
      const at::NoGradGuard unrecorded;
      check_aggregate_backward(o, grad_qz, grad_dims, z, mu, logvar, saved);
    }
    return reference(o, grad_qz, grad_dims, z, mu, logvar, saved);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return kernel(o, grad_qz, grad_dims, z, mu, logvar, saved);
}

class AggregateNode final : public Node {
 public:
  AggregateOptions options{};
  SavedVariable z, mu, logvar, saved;

  std::string name() const override { return "vaekernels::AggregateBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* each : {&z, &mu, &logvar, &saved}) each->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const auto given = [&](size_t i) {
      return i < grads.size() && grads[i].defined() ? OptTensor(grads[i]) : OptTensor();
    };
    const OptTensor grad_qz = given(0), grad_dims = given(1);
    variable_list out(3);
    if (!grad_qz && !grad_dims) return out;
    std::unique_lock<std::mutex> lock(mutex_);
    const Tensor z_ = z.unpack(), mu_ = mu.unpack(), logvar_ = logvar.unpack(), saved_ = saved.unpack();
    lock.unlock();
    std::tie(out[0], out[1], out[2]) =
        differentiable_backward(options, grad_qz, grad_dims, z_, mu_, logvar_, saved_);
    return out;
  }
};

Tensors3 differentiable(const AggregateOptions& o, const Tensor& z, const Tensor& mu, const Tensor& logvar) {
  static const AggregateOperator<AggregateCall> kernel("vaekernels::aggregate");
  Tensors3 out = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return kernel(o, z, mu, logvar);
  }();
  if (!compute_requires_grad(z, mu, logvar)) return out;
  auto node = new_node<AggregateNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(z, mu, logvar));
  torch::autograd::set_history(std::get<0>(out), node);
  if (o.per_dim) torch::autograd::set_history(std::get<1>(out), node);
  node->options = o;
  node->z = SavedVariable(z, false);
  node->mu = SavedVariable(mu, false);
  node->logvar = SavedVariable(logvar, false);
  node->saved = SavedVariable(std::get<2>(out), false);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vaekernels, m) {
  const std::vector<at::Tag> pure{at::Tag::pt2_compliant_tag};
  const std::string options = kAggregateOptions;
  const std::string backward =
      "(Tensor? grad_qz, Tensor? grad_dims, Tensor z, Tensor mu, Tensor logvar, Tensor saved, " + options +
      " -> (Tensor, Tensor, Tensor)";
  const auto def = [&](const std::string& schema) { m.def(schema.c_str(), pure); };
  def("aggregate(Tensor z, Tensor mu, Tensor logvar, " + options +
      " -> (Tensor log_qz, Tensor log_qz_dims, Tensor saved)");
  def("aggregate_backward" + backward);
  // Implemented in vaekernels/_double_backward.py, as that of `latent`.
  def("aggregate_backward_reference" + backward);
}

TORCH_LIBRARY_IMPL(vaekernels, Meta, m) { register_aggregate<Meta>(m); }
TORCH_LIBRARY_IMPL(vaekernels, Autograd, m) {
  m.impl("aggregate", TORCH_FN((RegisteredAggregate<&differentiable>::call)));
  m.impl("aggregate_backward", TORCH_FN((RegisteredAggregate<&differentiable_backward>::call)));
}

}  // namespace vk
