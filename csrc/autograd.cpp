// The Autograd kernels: one node of the graph for every public operator, since they share one backward.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/version.h>

#include <algorithm>

#include "checks.h"
#include "handles.h"

namespace vk {
namespace {

using torch::autograd::compute_requires_grad;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The options of a call, owned: what the schema passes by reference is gone when backward runs.
struct Options {
  bool packed = false, sample = false, kl = false, draw = false, prior_grads = false;
  int64_t dim = 0;
  OptTensor rng;
  OptGenerator generator;
  OptSymInt num_samples;
  std::optional<double> free_bits, balance;
  OptTensor free_bits_per_group, weight;
  std::string clamp = "batch", penalty = "floor", reduction = "batchmean", parameterization = "logvar";
  int64_t batch_dims = 1;
  bool group_sums = false;
  std::optional<std::vector<int64_t>> group_dims;
  std::optional<std::vector<double>> bounds;

  OptInts groups() const { return group_dims ? OptInts(*group_dims) : OptInts(); }
  OptDoubles logvar_bounds() const { return bounds ? OptDoubles(*bounds) : OptDoubles(); }

  void set_param(VK_PARAM_ARGS) {
    this->parameterization = parameterization;
    if (logvar_bounds) bounds = logvar_bounds->vec();
  }
  void set_kl(VK_KL_ARGS) {
    kl = true;
    this->free_bits = free_bits;
    this->free_bits_per_group = free_bits_per_group;
    this->clamp = clamp;
    this->penalty = penalty;
    this->batch_dims = batch_dims;
    if (group_dims) this->group_dims = group_dims->vec();
    this->weight = weight;
    this->balance = balance;
    this->reduction = reduction;
    this->group_sums = group_sums;
    set_param(VK_PARAM_PASS);
  }
};

#define VK_OPTIONS_PARAM o.parameterization, o.logvar_bounds()
#define VK_OPTIONS_LAYOUT o.batch_dims, o.groups(), o.weight, o.balance, o.reduction, o.group_sums
#define VK_OPTIONS_KL \
  o.free_bits, o.free_bits_per_group, o.clamp, o.penalty, VK_OPTIONS_LAYOUT, VK_OPTIONS_PARAM

// The operator's results, from below autograd. `second` is undefined for packed calls.
Results compute(const Tensor& first, const Tensor& second, const OptTensor& prior_mu,
                const OptTensor& prior_logvar, const Options& o) {
  const at::AutoDispatchBelowADInplaceOrView below;
  Results r;
  if (!o.kl) {
    if (o.draw)
      std::tie(r.z, r.rng) =
          o.packed
              ? call::reparameterize_packed_draw(first, o.dim, o.generator, o.num_samples, VK_OPTIONS_PARAM)
              : call::reparameterize_draw(first, second, o.generator, o.num_samples, VK_OPTIONS_PARAM);
    else
      r.z = o.packed ? call::reparameterize_packed(first, o.dim, *o.rng, o.num_samples, VK_OPTIONS_PARAM)
                     : call::reparameterize(first, second, *o.rng, o.num_samples, VK_OPTIONS_PARAM);
  } else if (!o.sample) {
    std::tie(r.kl, r.per_group, r.gate, r.open) =
        o.packed ? call::gaussian_kl_packed(first, o.dim, prior_mu, prior_logvar, VK_OPTIONS_KL)
                 : call::gaussian_kl(first, second, prior_mu, prior_logvar, VK_OPTIONS_KL);
  } else if (o.draw) {
    std::tie(r.z, r.kl, r.per_group, r.gate, r.open, r.rng) =
        o.packed ? call::sample_kl_packed_draw(first, o.dim, prior_mu, prior_logvar, o.generator,
                                               o.num_samples, VK_OPTIONS_KL)
                 : call::sample_kl_draw(first, second, prior_mu, prior_logvar, o.generator, o.num_samples,
                                        VK_OPTIONS_KL);
  } else {
    std::tie(r.z, r.kl, r.per_group, r.gate, r.open) =
        o.packed
            ? call::sample_kl_packed(first, o.dim, *o.rng, prior_mu, prior_logvar, o.num_samples,
                                     VK_OPTIONS_KL)
            : call::sample_kl(first, second, *o.rng, prior_mu, prior_logvar, o.num_samples, VK_OPTIONS_KL);
  }
  return r;
}

// Differentiated itself (double backward), the backward is computed by formulas that autograd can follow.
Tensors4 latent_backward(VK_GRAD_ARGS, VK_TARGET_ARGS, VK_SAVED_ARGS) {
  if (compute_requires_grad(VK_GRAD_PASS, VK_TARGET_PASS, VK_PRIOR_PASS)) {
    check_backward<c10::SymInt>(VK_GRAD_PASS, VK_TARGET_PASS, VK_SAVED_PASS);
    return call::latent_backward_reference(VK_GRAD_PASS, VK_TARGET_PASS, VK_SAVED_PASS);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call::latent_backward(VK_GRAD_PASS, VK_TARGET_PASS, VK_SAVED_PASS);
}
Tensors3 latent_backward_packed(VK_GRAD_ARGS, VK_PACKED_ARGS, VK_SAVED_ARGS) {
  if (compute_requires_grad(VK_GRAD_PASS, moments, VK_PRIOR_PASS)) {
    {
      const at::NoGradGuard unrecorded;
      const auto [mu, logvar] = halves<c10::SymInt>(VK_PACKED_PASS);
      check_backward<c10::SymInt>(VK_GRAD_PASS, VK_TARGET_PASS, VK_SAVED_PASS);
    }
    return call::latent_backward_packed_reference(VK_GRAD_PASS, VK_PACKED_PASS, VK_SAVED_PASS);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call::latent_backward_packed(VK_GRAD_PASS, VK_PACKED_PASS, VK_SAVED_PASS);
}

// Written out like torch's own nodes: torch::autograd::Function wraps every result, hashes names and keeps
// the shapes of all arguments, which took a fifth of a small forward and backward.
class LatentBackward final : public Node {
 public:
  // `rng`, `gate` and `open` as they left the operator, undefined where it has none.
  void save(const Tensor& first, const Tensor& second, const Tensor& rng, const Tensor& gate,
            const Tensor& open, const OptTensor& prior_mu, const OptTensor& prior_logvar, Options&& options) {
    const bool prior = prior_mu.has_value(), weighted = options.weight.has_value();
    saved_.reserve(weighted ? 8 : (prior ? 7 : 5));
    for (const Tensor* t : {&first, &second, &rng, &gate, &open}) saved_.emplace_back(*t, false);
    if (prior || weighted) {
      saved_.emplace_back(prior_mu, false);
      saved_.emplace_back(prior_logvar, false);
    }
    if (weighted) saved_.emplace_back(options.weight, false);
    options_ = std::move(options);
    // Saved above, or not needed; held here as well they would escape the hooks on saved tensors.
    options_.weight.reset();
    options_.rng.reset();
    options_.free_bits_per_group.reset();
    options_.generator.reset();
  }

  std::string name() const override { return "vaekernels::LatentBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& saved : saved_) saved.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const Options& o = options_;
    const auto given = [](Tensor&& t) { return t.defined() ? OptTensor(std::move(t)) : OptTensor(); };
    OptTensor grad_z = o.sample ? given(std::move(grads[0])) : OptTensor();
    const OptTensor grad_kl = o.kl ? given(std::move(grads[o.sample ? 1 : 0])) : OptTensor();
    const OptTensor grad_rate = o.kl ? given(std::move(grads[o.sample ? 2 : 1])) : OptTensor();
    variable_list out(4);
    if (!grad_z && !grad_kl && !grad_rate) return out;
    std::unique_lock<std::mutex> lock(mutex_);
    const auto unpacked = [this](size_t i) { return i < saved_.size() ? saved_[i].unpack() : Tensor(); };
    const Tensor first = unpacked(0), second = unpacked(1);
    const OptTensor rng = given(unpacked(2)), gate = given(unpacked(3)), open = given(unpacked(4)),
                    prior_mu = given(unpacked(5)), prior_logvar = given(unpacked(6)),
                    weight = given(unpacked(7));
    lock.unlock();
#define VK_OPTIONS_SAVED                                                                             \
  rng, prior_mu, prior_logvar, gate, open, o.prior_grads, o.clamp, o.batch_dims, o.groups(), weight, \
      o.balance, o.reduction, o.group_sums, VK_OPTIONS_PARAM
    if (o.packed) {
      std::tie(out[0], out[2], out[3]) =
          latent_backward_packed(grad_z, grad_kl, grad_rate, first, o.dim, VK_OPTIONS_SAVED);
    } else {
      std::tie(out[0], out[1], out[2], out[3]) =
          latent_backward(grad_z, grad_kl, grad_rate, first, second, VK_OPTIONS_SAVED);
      if (!out[0].defined()) out[0] = std::move(*grad_z);
    }
#undef VK_OPTIONS_SAVED
    return out;
  }

 private:
  Options options_;
  // In the order of `save`, and as many as the call had: a node of more than 1 KB takes malloc's slow way.
  std::vector<SavedVariable> saved_;
};

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
std::shared_ptr<LatentBackward> new_node() {
  return std::shared_ptr<LatentBackward>(new LatentBackward(), torch::autograd::deleteNode);
}
#else
c10::intrusive_ptr<LatentBackward> new_node() { return c10::make_intrusive<LatentBackward>(); }
#endif

Results run(const Tensor& first, const Tensor& second, const OptTensor& prior_mu,
            const OptTensor& prior_logvar, Options&& o) {
  const bool posterior_grads = compute_requires_grad(first, second);
  o.prior_grads = compute_requires_grad(prior_mu, prior_logvar);
  Results r = compute(first, second, prior_mu, prior_logvar, o);
  if (!posterior_grads && !o.prior_grads) return r;

  auto node = new_node();
  node->set_next_edges(torch::autograd::collect_next_edges(first, second, prior_mu, prior_logvar));
  if (o.sample) {
    // Where only the prior is learned, z is a constant to autograd.
    if (posterior_grads)
      torch::autograd::set_history(r.z, node);
    else
      node->add_input_metadata(Node::undefined_input());
  }
  if (o.kl) {
    torch::autograd::set_history(r.kl, node);
    torch::autograd::set_history(r.per_group, node);
  }
  node->save(first, second, o.rng ? *o.rng : r.rng, r.gate, r.open, prior_mu, prior_logvar, std::move(o));
  return r;
}

void set_packed(Options& o, int64_t dim) {
  o.packed = true;
  o.dim = dim;
}
void set_state(Options& o, const Tensor& rng) { o.rng = rng; }
void set_state(Options& o, const OptGenerator& generator) {
  o.generator = generator;
  o.draw = true;
}

template <class State>
Results sampled(const Tensor& first, const Tensor& second, std::optional<int64_t> dim, const State& state,
                const OptSymInt& num_samples, VK_PARAM_ARGS) {
  Options o;
  o.sample = true;
  if (dim) set_packed(o, *dim);
  set_state(o, state);
  o.num_samples = num_samples;
  // Backward's, where there is no KL: a single number has no axis.
  o.batch_dims = std::min<int64_t>(1, first.dim());
  o.set_param(VK_PARAM_PASS);
  return run(first, second, {}, {}, std::move(o));
}

template <class State>
Results sampled_kl(const Tensor& first, const Tensor& second, std::optional<int64_t> dim, const State& state,
                   const OptSymInt& num_samples, VK_PRIOR_ARGS, VK_KL_ARGS) {
  Options o;
  o.sample = true;
  if (dim) set_packed(o, *dim);
  set_state(o, state);
  o.num_samples = num_samples;
  o.set_kl(VK_KL_PASS);
  return run(first, second, VK_PRIOR_PASS, std::move(o));
}

Results only_kl(const Tensor& first, const Tensor& second, std::optional<int64_t> dim, VK_PRIOR_ARGS,
                VK_KL_ARGS) {
  Options o;
  if (dim) set_packed(o, *dim);
  o.set_kl(VK_KL_PASS);
  return run(first, second, VK_PRIOR_PASS, std::move(o));
}

Tensor reparameterize(VK_TARGET_ARGS, const Tensor& rng, OptSymInt num_samples, VK_PARAM_ARGS) {
  return sampled(mu, logvar, {}, rng, num_samples, VK_PARAM_PASS).z;
}
Tensors2 reparameterize_draw(VK_TARGET_ARGS, const OptGenerator& generator, OptSymInt num_samples,
                             VK_PARAM_ARGS) {
  return sampled(mu, logvar, {}, generator, num_samples, VK_PARAM_PASS).drawn();
}
Tensor reparameterize_packed(VK_PACKED_ARGS, const Tensor& rng, OptSymInt num_samples, VK_PARAM_ARGS) {
  return sampled(moments, {}, dim, rng, num_samples, VK_PARAM_PASS).z;
}
Tensors2 reparameterize_packed_draw(VK_PACKED_ARGS, const OptGenerator& generator, OptSymInt num_samples,
                                    VK_PARAM_ARGS) {
  return sampled(moments, {}, dim, generator, num_samples, VK_PARAM_PASS).drawn();
}
Tensors4 gaussian_kl(VK_TARGET_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS) {
  return only_kl(mu, logvar, {}, VK_PRIOR_PASS, VK_KL_PASS).of_kl();
}
Tensors4 gaussian_kl_packed(VK_PACKED_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS) {
  return only_kl(moments, {}, dim, VK_PRIOR_PASS, VK_KL_PASS).of_kl();
}
Tensors5 sample_kl(VK_TARGET_ARGS, const Tensor& rng, VK_PRIOR_ARGS, OptSymInt num_samples, VK_KL_ARGS) {
  return sampled_kl(mu, logvar, {}, rng, num_samples, VK_PRIOR_PASS, VK_KL_PASS).of_both();
}
Tensors6 sample_kl_draw(VK_TARGET_ARGS, VK_PRIOR_ARGS, const OptGenerator& generator, OptSymInt num_samples,
                        VK_KL_ARGS) {
  return sampled_kl(mu, logvar, {}, generator, num_samples, VK_PRIOR_PASS, VK_KL_PASS).of_both_drawn();
}
Tensors5 sample_kl_packed(VK_PACKED_ARGS, const Tensor& rng, VK_PRIOR_ARGS, OptSymInt num_samples,
                          VK_KL_ARGS) {
  return sampled_kl(moments, {}, dim, rng, num_samples, VK_PRIOR_PASS, VK_KL_PASS).of_both();
}
Tensors6 sample_kl_packed_draw(VK_PACKED_ARGS, VK_PRIOR_ARGS, const OptGenerator& generator,
                               OptSymInt num_samples, VK_KL_ARGS) {
  return sampled_kl(moments, {}, dim, generator, num_samples, VK_PRIOR_PASS, VK_KL_PASS).of_both_drawn();
}

}  // namespace

TORCH_LIBRARY_IMPL(vaekernels, Autograd, m) {
#define VK_AUTOGRAD(name) m.impl(#name, &name);
  VK_AUTOGRAD(reparameterize)
  VK_AUTOGRAD(reparameterize_draw)
  VK_AUTOGRAD(reparameterize_packed)
  VK_AUTOGRAD(reparameterize_packed_draw)
  VK_AUTOGRAD(gaussian_kl)
  VK_AUTOGRAD(gaussian_kl_packed)
  VK_AUTOGRAD(sample_kl)
  VK_AUTOGRAD(sample_kl_draw)
  VK_AUTOGRAD(sample_kl_packed)
  VK_AUTOGRAD(sample_kl_packed_draw)
  VK_AUTOGRAD(latent_backward)
  VK_AUTOGRAD(latent_backward_packed)
#undef VK_AUTOGRAD
  // States and words are integers: nothing to differentiate.
  m.impl("_rng_state", torch::autograd::autogradNotImplementedFallback());
  m.impl("_philox_words", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace vk
