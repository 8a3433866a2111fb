// The Autograd kernels, with the one node that every call has.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "checks.h"
#include "node.h"

namespace vk {
namespace {

using torch::autograd::compute_requires_grad;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

template <class Noise>
constexpr bool kDraws = std::is_same_v<Noise, OptGenerator>;

// Differentiated itself (double backward), the backward is computed by formulas that autograd can follow.
Tensors4 latent_backward(const Options& o, const OptTensor& grad_z, const OptTensor& grad_kl,
                         const OptTensor& grad_kl_per_group, const Tensor& first, const OptTensor& second,
                         int64_t dim, const OptTensor& rng, const OptTensor& prior_mu,
                         const OptTensor& prior_logvar, const OptTensor& gate, const OptTensor& open,
                         const OptTensor& weight, bool prior_grads) {
  static const Operator<BackwardCall> kernel("vaekernels::latent_backward");
  static const Operator<BackwardCall> reference("vaekernels::latent_backward_reference");
  const auto call = [&](const Operator<BackwardCall>& op) {
    return op(o, grad_z, grad_kl, grad_kl_per_group, first, second, dim, rng, prior_mu, prior_logvar, gate,
              open, weight, prior_grads);
  };
  if (compute_requires_grad(grad_z, grad_kl, grad_kl_per_group, first, second, prior_mu, prior_logvar)) {
    {
      const at::NoGradGuard unrecorded;
      const Latent in = latent_of<c10::SymInt>(first, second, dim, prior_mu, prior_logvar, weight);
      check_backward<c10::SymInt>(in, o, {grad_z, grad_kl, grad_kl_per_group}, Saved{rng, gate, open},
                                  prior_grads);
    }
    return call(reference);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call(kernel);
}

// Written out like torch's own nodes: torch::autograd::Function wraps every result, hashes names and keeps
// the shapes of all arguments, which took a fifth of a small forward and backward.
class LatentBackward final : public Node {
 public:
  LatentBackward() {}  // where it is defaulted, `new LatentBackward()` writes zeros to the whole node first

  Options options;
  int64_t dim = 0;
  bool sample = false, kl = false, prior_grads = false;

  // Undefined: what the call does not have.
  void save(std::initializer_list<const Tensor*> inputs_and_results, const OptTensor& prior_mu,
            const OptTensor& prior_logvar, const OptTensor& weight) {
    saved_.reserve(weight ? 8 : (prior_mu ? 7 : 5));
    for (const Tensor* t : inputs_and_results) saved_.emplace_back(*t, false);
    if (prior_mu || weight) {
      saved_.emplace_back(prior_mu, false);
      saved_.emplace_back(prior_logvar, false);
    }
    if (weight) saved_.emplace_back(weight, false);
  }

  std::string name() const override { return "vaekernels::LatentBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& saved : saved_) saved.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const auto given = [](Tensor&& t) { return t.defined() ? OptTensor(std::move(t)) : OptTensor(); };
    OptTensor grad_z = sample ? given(std::move(grads[0])) : OptTensor();
    const OptTensor grad_kl = kl ? given(std::move(grads[sample ? 1 : 0])) : OptTensor();
    const OptTensor grad_rate = kl ? given(std::move(grads[sample ? 2 : 1])) : OptTensor();
    variable_list out(4);
    if (!grad_z && !grad_kl && !grad_rate) return out;
    std::unique_lock<std::mutex> lock(mutex_);
    const auto unpacked = [&](size_t i) {
      return i < saved_.size() ? given(saved_[i].unpack()) : OptTensor();
    };
    const OptTensor first = unpacked(0), second = unpacked(1), rng = unpacked(2), gate = unpacked(3),
                    open = unpacked(4), prior_mu = unpacked(5), prior_logvar = unpacked(6),
                    weight = unpacked(7);
    lock.unlock();
    std::tie(out[0], out[1], out[2], out[3]) =
        latent_backward(options, grad_z, grad_kl, grad_rate, *first, second, dim, rng, prior_mu, prior_logvar,
                        gate, open, weight, prior_grads);
    if (!out[0].defined()) out[0] = std::move(*grad_z);
    return out;
  }

 private:
  // In the order of `save`, and as many as the call had: a node of more than 1 KB takes malloc's slow way.
  std::vector<SavedVariable> saved_;
};

template <class Result, class Noise>
Result latent(const Options& o, const Tensor& first, const OptTensor& second, int64_t dim, const Noise& noise,
              const OptTensor& prior_mu, const OptTensor& prior_logvar, bool sample, bool kl,
              OptSymInt num_samples, const OptTensor& weight, const OptTensor& free_bits_per_group) {
  static const Operator<LatentCall<Result, Noise>> kernel(kDraws<Noise> ? "vaekernels::latent_draw"
                                                                        : "vaekernels::latent");
  const bool posterior_grads = compute_requires_grad(first, second);
  const bool prior_grads = compute_requires_grad(prior_mu, prior_logvar);
  Result out = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return kernel(o, first, second, dim, noise, prior_mu, prior_logvar, sample, kl, std::move(num_samples),
                  weight, free_bits_per_group);
  }();
  if (!posterior_grads && !prior_grads) return out;

  auto node = new_node<LatentBackward>();
  static const Tensor none;
  const Tensor& second_tensor = second ? *second : none;
  node->set_next_edges(torch::autograd::collect_next_edges(first, second_tensor, prior_mu, prior_logvar));
  if (sample) {
    // Where only the prior is learned, z is a constant to autograd.
    if (posterior_grads)
      torch::autograd::set_history(std::get<0>(out), node);
    else
      node->add_input_metadata(Node::undefined_input());
  }
  if (kl) {
    torch::autograd::set_history(std::get<1>(out), node);
    torch::autograd::set_history(std::get<2>(out), node);
  }
  const Tensor* rng = &none;
  if constexpr (kDraws<Noise>)
    rng = &std::get<5>(out);
  else if (sample)
    rng = &*noise;
  node->options = o;
  node->dim = dim;
  node->sample = sample;
  node->kl = kl;
  node->prior_grads = prior_grads;
  node->save({&first, &second_tensor, rng, kl ? &std::get<3>(out) : &none, kl ? &std::get<4>(out) : &none},
             prior_mu, prior_logvar, weight);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(vaekernels, Autograd, m) {
  m.impl("latent", TORCH_FN((Registered<&latent<Tensors5, OptTensor>>::call)));
  m.impl("latent_draw", TORCH_FN((Registered<&latent<Tensors6, OptGenerator>>::call)));
  m.impl("latent_backward", TORCH_FN((Registered<&latent_backward>::call)));
  // States and words are integers: nothing to differentiate.
  m.impl("_rng_state", torch::autograd::autogradNotImplementedFallback());
  m.impl("_philox_words", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace vk
