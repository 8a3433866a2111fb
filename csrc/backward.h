// The backward of every operator: from gradients and saved tensors, which checks.h has seen, to the launch of
// one Problem.
#pragma once

#include "forward.h"

namespace vk {

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
    // As in `forward`: the two gradients come from two launches and are added. Both are written in the dtype of
    // the arithmetic: in a smaller one each would be rounded, and could overflow, before they are added.
    const OptTensor none;
    const auto compute = compute_type(mu);
    const auto [order, inverse] = by_role(a);
    const auto copy = [&](const Tensor& t) { return t.permute(order).to(compute).contiguous(); };
    const Tensor copied_mu = copy(mu), copied_logvar = copy(in.logvar);
    OptTensor prior_mu, prior_logvar, grad_kl = in.grad_kl;
    if (in.prior_mu) {
      prior_mu = copy(*in.prior_mu);
      prior_logvar = copy(*in.prior_logvar);
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
    kl.mu = kl.mu.permute(inverse);
    kl.logvar = kl.logvar.permute(inverse);
    if (in.grad_z) {
      // These keep the order in storage, by which the random numbers go.
      const Tensor wide_mu = mu.to(compute), wide_logvar = in.logvar.to(compute);
      const OptTensor grad_z = in.grad_z->to(compute);
      Gradients sampled{at::empty_like(wide_mu), at::empty_like(wide_mu), {}, {}};
      backward_into<Backend>(
          BackwardArgs{grad_z, none, none, wide_mu, wide_logvar, in.rng, none, none, none, none, false}, o,
          VK_PARAM_PASS, sampled);
      kl.mu.add_(sampled.mu);
      kl.logvar.add_(sampled.logvar);
    }
    out.mu.copy_(kl.mu);
    out.logvar.copy_(kl.logvar);
    if (in.prior_grads) {
      out.prior_mu.copy_(kl.prior_mu.permute(inverse));
      out.prior_logvar.copy_(kl.prior_logvar.permute(inverse));
    }
    return;
  }

  Backward call;
  set_param(call, VK_PARAM_PASS);
  call.dtype = dtype_of(mu);
  Bound bound(call, mu, *layout, dense);
  call.mu = bound.input(mu);
  call.scale = bound.input(in.logvar);
  if (in.grad_z) {
    call.rng = in.rng->const_data_ptr<int64_t>();
    call.grad_z = bound.keep(dense_grad_z(*in.grad_z, mu, dense, call.K));
  }
  if (kl_used) {
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
      call.weight =
          bound.keep(constant(*o.weight, mu.sizes().slice(0, static_cast<size_t>(a.batch_dims)), mu));
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

}  // namespace vk
