// The forward of every operator: from tensors, which checks.h has seen, to the launch of one Problem, for any
// backend (see operators.h).
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

// Fills in the half of the problem that samples.
template <class Backend>
void bind_sample(Forward& call, const ForwardArgs& in, at::IntArrayRef dense, Results& out) {
  const Tensor& mu = in.mu;
  if (in.num_samples) {
    at::DimVector sizes{*in.num_samples}, strides{mu.numel()};
    sizes.insert(sizes.end(), mu.sizes().begin(), mu.sizes().end());
    strides.insert(strides.end(), dense.begin(), dense.end());
    out.z = empty_beside(mu, sizes, strides, mu.scalar_type());
    call.K = *in.num_samples;
  } else {
    out.z = empty_dense(mu, dense, mu.scalar_type());
  }
  call.z = out.z.data_ptr();
  if (in.rng) {
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
  call.dtype = dtype_of(in.mu);
  Bound bound(call, in.mu, layout, dense);
  call.mu = bound.input(in.mu);
  call.scale = bound.input(in.logvar);
  bind_sample<Backend>(call, in, dense, out);
  Backend::forward(call, in.mu);
}

// Fills in what the KL is told about, and allocates what it returns. `bound` outlives the launch.
inline void bind_kl(Forward& call, const Tensor& mu, const Axes& a, at::IntArrayRef dense, const KLOptions& o,
                    Bound& bound, Results& out) {
  const auto compute = compute_type(mu);
  call.has_kl = true;
  call.reduction = reduction_of(o.reduction);
  call.group_sums = o.group_sums;
  if (has_free_bits(o.free_bits, o.free_bits_per_group)) {
    call.clamp = clamp_of(o.clamp);
    call.penalty = penalty_of(o.penalty);
    if (o.free_bits_per_group)
      call.free_bits_per_group = bound.keep(constant(*o.free_bits_per_group, a.group_shape, mu));
    else
      call.free_bits = *o.free_bits;
  }
  if (o.weight)
    call.weight = bound.keep(constant(*o.weight, mu.sizes().slice(0, static_cast<size_t>(a.batch_dims)), mu));
  out.kl = call.reduction == Reduction::elementwise
               ? empty_dense(mu, dense, compute)
               : empty_beside(mu, kl_shape(mu, a, call.reduction), compute);
  out.per_group = empty_beside(mu, a.group_shape, compute);
  out.gate = empty_beside(mu, {call.clamp == Clamp::batch ? a.G : 1}, compute);
  const bool bits = call.clamp == Clamp::sample;
  out.open = empty_beside(mu, {bits ? (a.B * a.G + 7) / 8 : 0}, at::kByte);
  call.kl = out.kl.data_ptr();
  call.kl_per_group = out.per_group.data_ptr();
  call.gate = out.gate.data_ptr();
  call.open = bits ? out.open.data_ptr<uint8_t>() : nullptr;
}

template <class Backend>
Results forward(const ForwardArgs& in, const KLOptions& o, VK_PARAM_ARGS) {
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
  call.dtype = dtype_of(in.mu);
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

}  // namespace vk
