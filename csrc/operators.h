// The operators, for any backend that can launch a Problem. A backend is a class of static functions:
//   Tensor rng_state(like, generator)        the next state of a generator, int64[2] on like's device
//   Tensor draw(Forward&, like, generator)   the same, and tells the call to use it
//   void forward(const Forward&, like), void backward(const Backward&, like)
//   Tensor philox_words(rng, n, first_quad)
#pragma once

#include "plan.h"

namespace vk {

struct ForwardArgs {
  const Tensor& mu;
  const Tensor& logvar;
  const OptTensor& prior_mu;
  const OptTensor& prior_logvar;
  bool sample = false, kl = false;
  const Tensor* rng = nullptr;  // null: draw from `generator`
  const OptGenerator* generator = nullptr;
  std::optional<int64_t> num_samples;
};

struct Results {
  Tensor z, kl, per_group, gate, open, rng;
};

struct KLOptions {
  std::optional<double> free_bits;
  const OptTensor& free_bits_per_group;
  std::string_view clamp, penalty;
  int64_t batch_dims;
  OptInts group_dims;
  const OptTensor& weight;
  std::optional<double> balance;
  std::string_view reduction;
  bool group_sums;
};

inline void check_inputs(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                         const OptTensor& prior_logvar) {
  check_like(mu, logvar, "logvar");
  TORCH_CHECK_VALUE(prior_mu.has_value() == prior_logvar.has_value(),
                    "prior_mu and prior_logvar go together, got only ",
                    prior_mu ? "prior_mu" : "prior_logvar");
  if (prior_mu) {
    check_like(mu, *prior_mu, "prior_mu");
    check_like(mu, *prior_logvar, "prior_logvar");
  }
}

// Fills in the half of the problem that samples.
template <class Backend>
void bind_sample(Forward& call, const ForwardArgs& in, at::IntArrayRef dense, Results& out) {
  const Tensor& mu = in.mu;
  if (in.num_samples) {
    TORCH_CHECK_VALUE(*in.num_samples >= 0, "num_samples must not be negative, got ", *in.num_samples);
    at::DimVector sizes{*in.num_samples}, strides{mu.numel()};
    sizes.insert(sizes.end(), mu.sizes().begin(), mu.sizes().end());
    strides.insert(strides.end(), dense.begin(), dense.end());
    out.z = at::empty_strided(sizes, strides, mu.options());
    call.K = *in.num_samples;
  } else {
    out.z = empty_dense(mu, dense, mu.scalar_type());
  }
  call.z = out.z.data_ptr();
  if (in.rng) {
    check_rng(mu, *in.rng);
    call.rng = in.rng->const_data_ptr<int64_t>();
  } else {
    out.rng = Backend::draw(call, mu, *in.generator);
  }
}

// z alone.
template <class Backend>
void run_sample(const ForwardArgs& in, VK_PARAM_ARGS, Results& out) {
  const auto dense = dense_strides(in.mu);
  const Tensor* tensors[] = {&in.mu, &in.logvar};
  const Layout layout = sample_layout(in.mu, tensors, dense);
  Forward call;
  set_param(call, VK_PARAM_PASS);
  call.dtype = dtype_of(in.mu, "mu");
  Bound bound(call, in.mu, layout, dense);
  call.mu = bound.input(in.mu);
  call.scale = bound.input(in.logvar);
  bind_sample<Backend>(call, in, dense, out);
  Backend::forward(call, in.mu);
}

// Fills in what the KL is told about, and allocates what it returns. `kept` outlives the launch.
inline void bind_kl(Forward& call, const Tensor& mu, const Axes& a, at::IntArrayRef dense, const KLOptions& o,
                    Bound& bound, Results& out) {
  const auto compute = compute_type(mu);
  const auto options = mu.options().dtype(compute);
  call.has_kl = true;
  call.reduction = reduction_of(o.reduction);
  call.group_sums = o.group_sums;
  if (has_free_bits(o.free_bits, o.free_bits_per_group)) {
    call.clamp = clamp_of(o.clamp);
    call.penalty = penalty_of(o.penalty);
    if (o.free_bits_per_group)
      call.free_bits_per_group = bound.keep(constant(*o.free_bits_per_group, a.group_shape, mu, "free_bits"));
    else
      call.free_bits = *o.free_bits;
  }
  check_reduction(call.reduction, call.clamp, o.weight.has_value());
  if (o.weight)
    call.weight =
        bound.keep(constant(*o.weight, mu.sizes().slice(0, static_cast<size_t>(a.batch_dims)), mu, "weight"));
  out.kl = call.reduction == Reduction::elementwise ? empty_dense(mu, dense, compute)
                                                    : at::empty(kl_shape(mu, a, call.reduction), options);
  out.per_group = at::empty(a.group_shape, options);
  out.gate = at::empty({call.clamp == Clamp::batch ? a.G : 1}, options);
  const auto bytes = mu.options().dtype(at::kByte);
  const bool bits = call.clamp == Clamp::sample;
  // Latents without elements run no kernel that would write the bits.
  out.open = mu.numel() == 0 ? at::zeros({bits ? (a.B * a.G + 7) / 8 : 0}, bytes)
                             : at::empty({bits ? (a.B * a.G + 7) / 8 : 0}, bytes);
  call.kl = out.kl.data_ptr();
  call.kl_per_group = out.per_group.data_ptr();
  call.gate = out.gate.data_ptr();
  call.open = bits ? out.open.data_ptr<uint8_t>() : nullptr;
}

template <class Backend>
Results forward(const ForwardArgs& in, const KLOptions& o, VK_PARAM_ARGS) {
  check_inputs(in.mu, in.logvar, in.prior_mu, in.prior_logvar);
  Results out;
  if (!in.kl) {
    run_sample<Backend>(in, VK_PARAM_PASS, out);
    return out;
  }
  const Axes a = axes_of(in.mu, o.batch_dims, o.group_dims);
  const auto dense = dense_strides(in.mu);
  const auto layout = layout_of(in.mu, a, dense);
  if (!layout) {
    // Groups that interleave with the summed axes in memory: z from the tensors as they are, because its
    // numbers go by storage order, the KL from copies in [B, G, S] order.
    if (in.sample) run_sample<Backend>(in, VK_PARAM_PASS, out);
    const auto [order, inverse] = by_role(a);
    const Tensor mu = in.mu.permute(order).contiguous(), logvar = in.logvar.permute(order).contiguous();
    OptTensor prior_mu, prior_logvar;
    if (in.prior_mu) {
      prior_mu = in.prior_mu->permute(order).contiguous();
      prior_logvar = in.prior_logvar->permute(order).contiguous();
    }
    const auto groups = counting(a.batch_dims, a.group_shape.size());
    KLOptions copied{
        o.free_bits, o.free_bits_per_group, o.clamp,     o.penalty, o.batch_dims, groups, o.weight,
        o.balance,   o.reduction,           o.group_sums};
    Results kl =
        forward<Backend>(ForwardArgs{mu, logvar, prior_mu, prior_logvar, false, true}, copied, VK_PARAM_PASS);
    if (reduction_of(o.reduction) == Reduction::elementwise) {
      out.kl = empty_dense(in.mu, dense, kl.kl.scalar_type());
      out.kl.copy_(kl.kl.permute(inverse));
    } else {
      out.kl = kl.kl;
    }
    out.per_group = kl.per_group;
    out.gate = kl.gate;
    out.open = kl.open;
    return out;
  }
  Forward call;
  set_param(call, VK_PARAM_PASS);
  call.dtype = dtype_of(in.mu, "mu");
  Bound bound(call, in.mu, *layout, dense);
  call.mu = bound.input(in.mu);
  call.scale = bound.input(in.logvar);
  if (in.prior_mu) {
    call.prior_mu = bound.input(*in.prior_mu);
    call.prior_scale = bound.input(*in.prior_logvar);
  }
  bind_kl(call, in.mu, a, dense, o, bound, out);
  if (in.sample) bind_sample<Backend>(call, in, dense, out);
  Backend::forward(call, in.mu);
  return out;
}

// ---- backward --------------------------------------------------------------------------------------------

struct BackwardArgs {
  const OptTensor& grad_z;
  const OptTensor& grad_kl;
  const OptTensor& grad_per_group;
  const Tensor& mu;
  const Tensor& logvar;
  const OptTensor& rng;
  const OptTensor& prior_mu;
  const OptTensor& prior_logvar;
  const OptTensor& gate;
  const OptTensor& open;
  bool prior_grads;
};

struct Gradients {
  Tensor mu, logvar, prior_mu, prior_logvar;  // undefined where not asked for
};

struct BackwardOptions {
  std::string_view clamp;
  int64_t batch_dims;
  OptInts group_dims;
  const OptTensor& weight;
  std::optional<double> balance;
  std::string_view reduction;
  bool group_sums;
};

// grad_z in the dense order that the kernels read, one block for each sample.
inline Tensor dense_grad_z(const Tensor& grad_z, const Tensor& mu, at::IntArrayRef dense, int64_t& K) {
  at::DimVector strides(dense);
  if (grad_z.dim() != mu.dim()) {
    K = grad_z.size(0);
    strides.insert(strides.begin(), mu.numel());
  }
  if (grad_z.strides() == at::IntArrayRef(strides)) return grad_z;
  return at::empty_strided(grad_z.sizes(), strides, grad_z.options()).copy_(grad_z);
}

// Without a KL and with one sample, mu's gradient is grad_z itself; the operator then returns none, since an
// operator must not return its argument.
inline bool grad_mu_is_grad_z(const OptTensor& grad_z, const OptTensor& grad_kl,
                              const OptTensor& grad_per_group, const Tensor& mu) {
  return grad_z && !grad_kl && !grad_per_group && grad_z->dim() == mu.dim();
}

// Writes into `out`: the caller settles where gradients go, so that packed ones are written in place.
template <class Backend>
void backward_into(const BackwardArgs& in, const BackwardOptions& o, VK_PARAM_ARGS, Gradients& out) {
  const Tensor& mu = in.mu;
  check_inputs(mu, in.logvar, in.prior_mu, in.prior_logvar);
  const bool kl_used = in.grad_kl.has_value() || in.grad_per_group.has_value();
  const auto dense = dense_strides(mu);
  const Axes a = axes_of(mu, o.batch_dims, o.group_dims);
  std::optional<Layout> layout;
  if (!kl_used) {
    const Tensor* tensors[] = {&mu, &in.logvar};
    layout = sample_layout(mu, tensors, dense);
  } else {
    layout = layout_of(mu, a, dense);
  }
  if (!layout) {
    // As in `forward`: the two gradients come from two launches and are added.
    const OptTensor none;
    const auto [order, inverse] = by_role(a);
    const Tensor copied_mu = mu.permute(order).contiguous(),
                 copied_logvar = in.logvar.permute(order).contiguous();
    OptTensor prior_mu, prior_logvar, grad_kl = in.grad_kl;
    if (in.prior_mu) {
      prior_mu = in.prior_mu->permute(order).contiguous();
      prior_logvar = in.prior_logvar->permute(order).contiguous();
    }
    if (grad_kl && reduction_of(o.reduction) == Reduction::elementwise) grad_kl = grad_kl->permute(order);
    const auto groups = counting(a.batch_dims, a.group_shape.size());
    Gradients kl{at::empty_like(copied_mu), at::empty_like(copied_mu), {}, {}};
    if (in.prior_grads) {
      kl.prior_mu = at::empty_like(copied_mu);
      kl.prior_logvar = at::empty_like(copied_mu);
    }
    backward_into<Backend>(
        BackwardArgs{none, grad_kl, in.grad_per_group, copied_mu, copied_logvar, none, prior_mu, prior_logvar,
                     in.gate, in.open, in.prior_grads},
        BackwardOptions{o.clamp, o.batch_dims, groups, o.weight, o.balance, o.reduction, o.group_sums},
        VK_PARAM_PASS, kl);
    if (in.grad_z) {
      Gradients sampled{out.mu, out.logvar, {}, {}};
      backward_into<Backend>(
          BackwardArgs{in.grad_z, none, none, mu, in.logvar, in.rng, none, none, none, none, false}, o,
          VK_PARAM_PASS, sampled);
      out.mu.add_(kl.mu.permute(inverse));
      out.logvar.add_(kl.logvar.permute(inverse));
    } else {
      out.mu.copy_(kl.mu.permute(inverse));
      out.logvar.copy_(kl.logvar.permute(inverse));
    }
    if (in.prior_grads) {
      out.prior_mu.copy_(kl.prior_mu.permute(inverse));
      out.prior_logvar.copy_(kl.prior_logvar.permute(inverse));
    }
    return;
  }

  Backward call;
  set_param(call, VK_PARAM_PASS);
  call.dtype = dtype_of(mu, "mu");
  Bound bound(call, mu, *layout, dense);
  call.mu = bound.input(mu);
  call.scale = bound.input(in.logvar);
  if (in.grad_z) {
    TORCH_CHECK_VALUE(in.rng.has_value(), "grad_z needs the rng that z was drawn with");
    check_rng(mu, *in.rng);
    call.rng = in.rng->const_data_ptr<int64_t>();
    call.grad_z = bound.keep(dense_grad_z(*in.grad_z, mu, dense, call.K));
  }
  if (kl_used) {
    TORCH_CHECK_VALUE(in.gate.has_value() && in.open.has_value(), "a gradient of the KL needs gate and open");
    const auto compute = compute_type(mu);
    call.has_kl = true;
    call.reduction = reduction_of(o.reduction);
    call.group_sums = o.group_sums;
    call.clamp = in.open->numel() > 0 ? Clamp::sample : Clamp::none;
    if (call.clamp == Clamp::none && clamp_of(o.clamp) == Clamp::batch && in.gate->numel() == a.G)
      call.clamp = Clamp::batch;
    if (in.prior_mu) {
      call.prior_mu = bound.input(*in.prior_mu);
      call.prior_scale = bound.input(*in.prior_logvar);
    }
    call.gate = bound.keep(in.gate->contiguous());
    if (call.clamp == Clamp::sample)
      call.open = static_cast<const uint8_t*>(bound.keep(in.open->contiguous()));
    if (o.weight)
      call.weight = bound.keep(
          constant(*o.weight, mu.sizes().slice(0, static_cast<size_t>(a.batch_dims)), mu, "weight"));
    if (o.balance) {
      call.posterior_share = 1 - *o.balance;
      call.prior_share = *o.balance;
    }
    if (in.grad_kl) {
      const Tensor grad = in.grad_kl->to(compute);
      call.grad_kl =
          bound.keep(call.reduction == Reduction::elementwise && grad.strides() != at::IntArrayRef(dense)
                         ? empty_dense(mu, dense, compute).copy_(grad)
                         : (call.reduction == Reduction::elementwise ? grad : grad.contiguous()));
    }
    if (in.grad_per_group) call.grad_kl_per_group = bound.keep(in.grad_per_group->to(compute).contiguous());
  }
  if (out.mu.defined()) call.grad_mu = bound.output(out.mu);
  call.grad_scale = bound.output(out.logvar);
  if (in.prior_grads) {
    if (kl_used) {
      call.grad_prior_mu = bound.output(out.prior_mu);
      call.grad_prior_scale = bound.output(out.prior_logvar);
    } else {
      out.prior_mu.zero_();
      out.prior_logvar.zero_();
    }
  }
  Backend::backward(call, mu);
  bound.finish();
}

// ---- the schemas, as functions ---------------------------------------------------------------------------

template <class Backend>
struct Ops {
  using OptInt = std::optional<int64_t>;

  static Results run(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                     const OptTensor& prior_logvar, bool sample, bool kl, const Tensor* rng,
                     const OptGenerator* generator, OptInt num_samples, VK_KL_ARGS) {
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
    Results r = run_z(mu, logvar, nullptr, &generator, num_samples, VK_PARAM_PASS);
    return {r.z, r.rng};
  }
  static Tensors4 gaussian_kl(VK_TARGET_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS) {
    Results r = run(mu, logvar, prior_mu, prior_logvar, false, true, nullptr, nullptr, {}, VK_KL_PASS);
    return {r.kl, r.per_group, r.gate, r.open};
  }
  static Tensors5 sample_kl(const Tensor& mu, const Tensor& logvar, const Tensor& rng,
                            const OptTensor& prior_mu, const OptTensor& prior_logvar, OptInt num_samples,
                            VK_KL_ARGS) {
    Results r = run(mu, logvar, prior_mu, prior_logvar, true, true, &rng, nullptr, num_samples, VK_KL_PASS);
    return {r.z, r.kl, r.per_group, r.gate, r.open};
  }
  static Tensors6 sample_kl_draw(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                                 const OptTensor& prior_logvar, const OptGenerator& generator,
                                 OptInt num_samples, VK_KL_ARGS) {
    Results r =
        run(mu, logvar, prior_mu, prior_logvar, true, true, nullptr, &generator, num_samples, VK_KL_PASS);
    return {r.z, r.kl, r.per_group, r.gate, r.open, r.rng};
  }

  static Tensor reparameterize_packed(const Tensor& moments, int64_t dim, const Tensor& rng,
                                      OptInt num_samples, VK_PARAM_ARGS) {
    const auto [mu, logvar] = halves(moments, dim);
    return reparameterize(mu, logvar, rng, num_samples, VK_PARAM_PASS);
  }
  static Tensors2 reparameterize_packed_draw(const Tensor& moments, int64_t dim,
                                             const OptGenerator& generator, OptInt num_samples,
                                             VK_PARAM_ARGS) {
    const auto [mu, logvar] = halves(moments, dim);
    return reparameterize_draw(mu, logvar, generator, num_samples, VK_PARAM_PASS);
  }
  static Tensors4 gaussian_kl_packed(const Tensor& moments, int64_t dim, const OptTensor& prior_mu,
                                     const OptTensor& prior_logvar, VK_KL_ARGS) {
    const auto [mu, logvar] = halves(moments, dim);
    return gaussian_kl(mu, logvar, prior_mu, prior_logvar, VK_KL_PASS);
  }
  static Tensors5 sample_kl_packed(const Tensor& moments, int64_t dim, const Tensor& rng,
                                   const OptTensor& prior_mu, const OptTensor& prior_logvar,
                                   OptInt num_samples, VK_KL_ARGS) {
    const auto [mu, logvar] = halves(moments, dim);
    return sample_kl(mu, logvar, rng, prior_mu, prior_logvar, num_samples, VK_KL_PASS);
  }
  static Tensors6 sample_kl_packed_draw(const Tensor& moments, int64_t dim, const OptTensor& prior_mu,
                                        const OptTensor& prior_logvar, const OptGenerator& generator,
                                        OptInt num_samples, VK_KL_ARGS) {
    const auto [mu, logvar] = halves(moments, dim);
    return sample_kl_draw(mu, logvar, prior_mu, prior_logvar, generator, num_samples, VK_KL_PASS);
  }

  static Tensors4 latent_backward(const OptTensor& grad_z, const OptTensor& grad_kl,
                                  const OptTensor& grad_kl_per_group, const Tensor& mu, const Tensor& logvar,
                                  const OptTensor& rng, const OptTensor& prior_mu,
                                  const OptTensor& prior_logvar, const OptTensor& gate, const OptTensor& open,
                                  VK_BACKWARD_ARGS) {
    const auto dense = dense_strides(mu);
    const auto gradient = [&](bool wanted) {
      return wanted ? empty_dense(mu, dense, mu.scalar_type()) : Tensor();
    };
    Gradients g{gradient(!grad_mu_is_grad_z(grad_z, grad_kl, grad_kl_per_group, mu)), gradient(true),
                gradient(prior_grads), gradient(prior_grads)};
    backward_into<Backend>(BackwardArgs{grad_z, grad_kl, grad_kl_per_group, mu, logvar, rng, prior_mu,
                                        prior_logvar, gate, open, prior_grads},
                           BackwardOptions{clamp, VK_LAYOUT_PASS}, VK_PARAM_PASS, g);
    return {g.mu, g.logvar, g.prior_mu, g.prior_logvar};
  }
  static Tensors3 latent_backward_packed(const OptTensor& grad_z, const OptTensor& grad_kl,
                                         const OptTensor& grad_kl_per_group, const Tensor& moments,
                                         int64_t dim, const OptTensor& rng, const OptTensor& prior_mu,
                                         const OptTensor& prior_logvar, const OptTensor& gate,
                                         const OptTensor& open, VK_BACKWARD_ARGS) {
    const auto [mu, logvar] = halves(moments, dim);
    Tensor grad = at::empty_like(moments);
    const auto [grad_mu, grad_logvar] = halves(grad, dim);
    Gradients g{grad_mu, grad_logvar, {}, {}};
    if (prior_grads) {
      const auto dense = dense_strides(mu);
      g.prior_mu = empty_dense(mu, dense, mu.scalar_type());
      g.prior_logvar = empty_dense(mu, dense, mu.scalar_type());
    }
    backward_into<Backend>(BackwardArgs{grad_z, grad_kl, grad_kl_per_group, mu, logvar, rng, prior_mu,
                                        prior_logvar, gate, open, prior_grads},
                           BackwardOptions{clamp, VK_LAYOUT_PASS}, VK_PARAM_PASS, g);
    return {grad, g.prior_mu, g.prior_logvar};
  }
};

template <class Backend>
void register_ops(torch::Library& m) {
  using O = Ops<Backend>;
  m.impl("_rng_state", &Backend::rng_state);
  m.impl("_philox_words", &Backend::philox_words);
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
