// The operators as functions of their schemas, for any backend that can launch a Problem. A backend is a
// class of static functions:
//   Tensor rng_state(like, generator)        the next state of a generator, int64[2] on like's device
//   Tensor draw(Forward&, like, generator)   the same, and tells the call to use it
//   void forward(const Forward&, like), void backward(const Backward&, like)
//   Tensor philox_words(rng, n, first_quad)
#pragma once

#include "backward.h"
#include "checks.h"

namespace vk {

template <class Backend>
struct Ops {
  using OptInt = std::optional<int64_t>;

  static Results run(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                     const OptTensor& prior_logvar, bool sample, bool kl, const Tensor* rng,
                     const OptGenerator* generator, OptInt num_samples, VK_KL_ARGS) {
    if (kl)
      check_kl<int64_t>(mu, logvar, prior_mu, prior_logvar, VK_KL_PASS);
    else
      check_posterior(mu, logvar, VK_PARAM_PASS);
    if (rng) check_rng(mu, *rng);
    if (generator) check_generator(mu, *generator);
    check_num_samples(num_samples);
    return forward<Backend>(
        ForwardArgs{mu, logvar, prior_mu, prior_logvar, sample, kl, rng, generator, num_samples},
        KLOptions{free_bits, free_bits_per_group, clamp, penalty, VK_LAYOUT_PASS}, VK_PARAM_PASS);
  }
  static Results run_z(const Tensor& mu, const Tensor& logvar, const Tensor* rng,
                       const OptGenerator* generator, OptInt num_samples, VK_PARAM_ARGS) {
    const OptTensor none;
    return run(mu, logvar, none, none, true, false, rng, generator, num_samples, {}, none, "batch", "floor",
               0, {}, none, {}, "batchmean", false, VK_PARAM_PASS);
  }

  static Tensor reparameterize(const Tensor& mu, const Tensor& logvar, const Tensor& rng, OptInt num_samples,
                               VK_PARAM_ARGS) {
    return run_z(mu, logvar, &rng, nullptr, num_samples, VK_PARAM_PASS).z;
  }
  static Tensors2 reparameterize_draw(const Tensor& mu, const Tensor& logvar, const OptGenerator& generator,
                                      OptInt num_samples, VK_PARAM_ARGS) {
    return run_z(mu, logvar, nullptr, &generator, num_samples, VK_PARAM_PASS).drawn();
  }
  static Tensors4 gaussian_kl(VK_TARGET_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS) {
    return run(mu, logvar, prior_mu, prior_logvar, false, true, nullptr, nullptr, {}, VK_KL_PASS).of_kl();
  }
  static Tensors5 sample_kl(const Tensor& mu, const Tensor& logvar, const Tensor& rng,
                            const OptTensor& prior_mu, const OptTensor& prior_logvar, OptInt num_samples,
                            VK_KL_ARGS) {
    return run(mu, logvar, prior_mu, prior_logvar, true, true, &rng, nullptr, num_samples, VK_KL_PASS)
        .of_both();
  }
  static Tensors6 sample_kl_draw(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                                 const OptTensor& prior_logvar, const OptGenerator& generator,
                                 OptInt num_samples, VK_KL_ARGS) {
    return run(mu, logvar, prior_mu, prior_logvar, true, true, nullptr, &generator, num_samples, VK_KL_PASS)
        .of_both_drawn();
  }

  static Tensor reparameterize_packed(const Tensor& moments, int64_t dim, const Tensor& rng,
                                      OptInt num_samples, VK_PARAM_ARGS) {
    const auto [mu, logvar] = halves<int64_t>(moments, dim);
    return reparameterize(mu, logvar, rng, num_samples, VK_PARAM_PASS);
  }
  static Tensors2 reparameterize_packed_draw(const Tensor& moments, int64_t dim,
                                             const OptGenerator& generator, OptInt num_samples,
                                             VK_PARAM_ARGS) {
    const auto [mu, logvar] = halves<int64_t>(moments, dim);
    return reparameterize_draw(mu, logvar, generator, num_samples, VK_PARAM_PASS);
  }
  static Tensors4 gaussian_kl_packed(const Tensor& moments, int64_t dim, const OptTensor& prior_mu,
                                     const OptTensor& prior_logvar, VK_KL_ARGS) {
    const auto [mu, logvar] = halves<int64_t>(moments, dim);
    return gaussian_kl(mu, logvar, prior_mu, prior_logvar, VK_KL_PASS);
  }
  static Tensors5 sample_kl_packed(const Tensor& moments, int64_t dim, const Tensor& rng,
                                   const OptTensor& prior_mu, const OptTensor& prior_logvar,
                                   OptInt num_samples, VK_KL_ARGS) {
    const auto [mu, logvar] = halves<int64_t>(moments, dim);
    return sample_kl(mu, logvar, rng, prior_mu, prior_logvar, num_samples, VK_KL_PASS);
  }
  static Tensors6 sample_kl_packed_draw(const Tensor& moments, int64_t dim, const OptTensor& prior_mu,
                                        const OptTensor& prior_logvar, const OptGenerator& generator,
                                        OptInt num_samples, VK_KL_ARGS) {
    const auto [mu, logvar] = halves<int64_t>(moments, dim);
    return sample_kl_draw(mu, logvar, prior_mu, prior_logvar, generator, num_samples, VK_KL_PASS);
  }

  static Tensors4 latent_backward(const OptTensor& grad_z, const OptTensor& grad_kl,
                                  const OptTensor& grad_kl_per_group, const Tensor& mu, const Tensor& logvar,
                                  const OptTensor& rng, const OptTensor& prior_mu,
                                  const OptTensor& prior_logvar, const OptTensor& gate, const OptTensor& open,
                                  VK_BACKWARD_ARGS) {
    check_backward<int64_t>(VK_GRAD_PASS, mu, logvar, VK_SAVED_PASS);
    const auto dense = dense_strides(mu);
    const auto gradient = [&](bool wanted) {
      return wanted ? empty_dense(mu, dense, mu.scalar_type()) : Tensor();
    };
    Gradients g{gradient(!grad_mu_is_grad_z(grad_z, grad_kl, grad_kl_per_group, mu)), gradient(true),
                gradient(prior_grads), gradient(prior_grads)};
    backward_into<Backend>(BackwardArgs{grad_z, grad_kl, grad_kl_per_group, mu, logvar, rng, prior_mu,
                                        prior_logvar, gate, open, prior_grads},
                           BackwardOptions{clamp, VK_LAYOUT_PASS}, VK_PARAM_PASS, g);
    return {std::move(g.mu), std::move(g.logvar), std::move(g.prior_mu), std::move(g.prior_logvar)};
  }
  static Tensors3 latent_backward_packed(const OptTensor& grad_z, const OptTensor& grad_kl,
                                         const OptTensor& grad_kl_per_group, const Tensor& moments,
                                         int64_t dim, const OptTensor& rng, const OptTensor& prior_mu,
                                         const OptTensor& prior_logvar, const OptTensor& gate,
                                         const OptTensor& open, VK_BACKWARD_ARGS) {
    const auto [mu, logvar] = halves<int64_t>(moments, dim);
    check_backward<int64_t>(VK_GRAD_PASS, mu, logvar, VK_SAVED_PASS);
    Tensor grad = at::empty_like(moments);
    const auto [grad_mu, grad_logvar] = halves<int64_t>(grad, dim);
    Gradients g{grad_mu, grad_logvar, {}, {}};
    if (prior_grads) {
      const auto dense = dense_strides(mu);
      g.prior_mu = empty_dense(mu, dense, mu.scalar_type());
      g.prior_logvar = empty_dense(mu, dense, mu.scalar_type());
    }
    backward_into<Backend>(BackwardArgs{grad_z, grad_kl, grad_kl_per_group, mu, logvar, rng, prior_mu,
                                        prior_logvar, gate, open, prior_grads},
                           BackwardOptions{clamp, VK_LAYOUT_PASS}, VK_PARAM_PASS, g);
    return {std::move(grad), std::move(g.prior_mu), std::move(g.prior_logvar)};
  }

  static Tensor rng_state(const Tensor& like, const OptGenerator& generator) {
    check_generator(like, generator);
    return Backend::rng_state(like, generator);
  }
  static Tensor philox_words(const Tensor& rng, int64_t n, int64_t first_quad) {
    check_words(rng, n);
    return Backend::philox_words(rng, n, first_quad);
  }
};

template <class Backend>
void register_ops(torch::Library& m) {
  using O = Ops<Backend>;
  m.impl("_rng_state", &O::rng_state);
  m.impl("_philox_words", &O::philox_words);
  m.impl("reparameterize", &O::reparameterize);
  m.impl("reparameterize_draw", &O::reparameterize_draw);
  m.impl("reparameterize_packed", &O::reparameterize_packed);
  m.impl("reparameterize_packed_draw", &O::reparameterize_packed_draw);
  m.impl("gaussian_kl", &O::gaussian_kl);
  m.impl("gaussian_kl_packed", &O::gaussian_kl_packed);
  m.impl("sample_kl", &O::sample_kl);
  m.impl("sample_kl_draw", &O::sample_kl_draw);
  m.impl("sample_kl_packed", &O::sample_kl_packed);
  m.impl("sample_kl_packed_draw", &O::sample_kl_packed_draw);
  m.impl("latent_backward", &O::latent_backward);
  m.impl("latent_backward_packed", &O::latent_backward_packed);
}

}  // namespace vk
