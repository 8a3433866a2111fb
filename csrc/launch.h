// From tensors to the launch of one Problem, forward and backward. A backend is a class of static functions:
//   Tensor rng_state(like, generator)        the next state of a generator, int64[2] on like's device
//   Tensor draw(Forward&, like, generator)   the same, and tells the call to use it
//   void forward(const Forward&, like), void backward(const Backward&, like)
//   Tensor philox_words(rng, n, first_quad)
#pragma once

#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "checks.h"
#include "layout.h"

namespace vk {

// ---- memory ----------------------------------------------------------------------------------------------

// Asks Linux for pages of 2 MiB for a large new tensor, as NumPy does for its arrays. malloc gives back to
// the system what is larger than 32 MiB when it is freed; new pages of 4 KiB then take longer than the layer.
// Where the request fails, nothing changes.
inline Tensor in_huge_pages(at::TensorBase t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 1 << 21;
  if (t.nbytes() >= 2 * page) {
    const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page, end = (begin + t.nbytes()) / page * page;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
#endif
  return Tensor(std::move(t));
}

// New tensors beside `like`. On the CPU without the dispatcher, since a small call makes six of them.
inline Tensor empty_beside(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) {
  return like.is_cpu() ? in_huge_pages(at::detail::empty_cpu(sizes, dtype))
                       : at::empty(sizes, like.options().dtype(dtype));
}
inline Tensor empty_beside(const Tensor& like, at::IntArrayRef sizes, at::IntArrayRef strides,
                           at::ScalarType dtype) {
  return like.is_cpu() ? in_huge_pages(at::detail::empty_strided_cpu(sizes, strides, dtype))
                       : at::empty_strided(sizes, strides, like.options().dtype(dtype));
}

// The result at `place` that a call does not want, of shape [0]. On the CPU made once, since it takes 0.1 us,
// and one for each place, so that no two results of a call are one tensor.
inline Tensor nothing(const Tensor& like, at::ScalarType dtype, size_t place) {
  if (!like.is_cpu()) return empty_beside(like, {0}, dtype);
  static const auto made = [] {
    std::array<std::array<Tensor, static_cast<size_t>(at::ScalarType::NumOptions)>, 6> all;
    for (auto& by_dtype : all)
      for (const at::ScalarType type :
           {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kByte, at::kLong})
        by_dtype[static_cast<size_t>(type)] = at::detail::empty_cpu({0}, type);
    return all;
  }();
  return made[place][static_cast<size_t>(dtype)];
}

// `to`, without the 0.1 us that the dispatcher takes where nothing changes.
inline Tensor as_dtype(const Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

// Dense, in the compute type, expanded to `shape`.
inline Tensor constant(const Tensor& t, at::IntArrayRef shape, const Tensor& mu) {
  return t.detach().to(compute_type(mu)).expand(shape).contiguous();
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    default:
      return DType::f16;  // checked before
  }
}

// Binds the tensors of one call to a Problem, with the copies that its strides could not avoid.
class Binding {
 public:
  Binding(Problem& p, const Tensor& mu, const Layout& layout, at::IntArrayRef dense)
      : mu_(mu), layout_(layout), dense_(dense) {
    int64_t size[3] = {1, 1, 1};
    for (int role = 0; role < 3; ++role)
      for (const int64_t d : layout.axes[role]) size[role] *= mu.size(d);
    p.B = size[0];
    p.G = size[1];
    p.S = size[2];
    p.groups_inner = layout.groups_inner && p.S > 1;
    p.dtype = dtype_of(mu);
  }

  Input input(const Tensor& t) {
    if (const auto strides = layout_.strides(t)) return {t.const_data_ptr(), *strides};
    Tensor copy = empty_beside(mu_, mu_.sizes(), dense_, t.scalar_type());
    copy.copy_(t);
    const auto strides = layout_.strides(copy);
    return {keep(std::move(copy)), *strides};
  }

  // Gradients of packed tensors are views that `layout_` describes whenever it describes the tensor; where it
  // does not, the kernel writes beside and `finish` copies.
  Output output(Tensor& t) {
    if (const auto strides = layout_.strides(t)) return {t.data_ptr(), *strides};
    Tensor beside = empty_beside(mu_, mu_.sizes(), dense_, t.scalar_type());
    Output out{beside.data_ptr(), *layout_.strides(beside)};
    late_.emplace_back(t, std::move(beside));
    return out;
  }

  void finish() {
    for (auto& [to, from] : late_) to.copy_(from);
  }

  // Memory that has to live until the kernel was launched.
  const void* keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back().const_data_ptr();
  }

 private:
  const Tensor& mu_;
  const Layout& layout_;
  at::IntArrayRef dense_;
  c10::SmallVector<Tensor, 6> kept_;
  c10::SmallVector<std::pair<Tensor, Tensor>, 2> late_;
};

inline void set_scale(Problem& p, const Options& o) {
  p.param = o.parameterization;
  if (o.logvar_bounds) {
    p.lo = (*o.logvar_bounds)[0];
    p.hi = (*o.logvar_bounds)[1];
  }
}

// ---- forward ---------------------------------------------------------------------------------------------

// The state's two numbers. On a GPU nobody waits for them, to look at the offset.
inline const int64_t* state_of(const Tensor& rng, Binding& binding) {
  const auto* numbers = static_cast<const int64_t*>(binding.keep(rng.contiguous()));
  if (rng.is_cpu()) check_offset(numbers[1]);
  return numbers;
}

// Where the noise of a call comes from.
template <class Backend>
void set_noise(Forward& call, const Tensor& mu, const OptTensor& rng, Binding& binding, Results&) {
  check_state(mu, rng);
  call.rng = state_of(*rng, binding);
}
template <class Backend>
void set_noise(Forward& call, const Tensor& mu, const OptGenerator& generator, Binding&, Results& out) {
  check_generator(mu, generator);
  out.rng = Backend::draw(call, mu, generator);
}

// The half of the problem that samples.
template <class Backend, class Noise>
void bind_sample(Forward& call, const Tensor& mu, at::IntArrayRef dense, const Noise& noise,
                 const OptSymInt& num_samples, Binding& binding, Results& out) {
  at::DimVector sizes(mu.sizes()), strides(dense);
  if (num_samples) {
    call.K = num_samples->guard_int(__FILE__, __LINE__);
    sizes.insert(sizes.begin(), call.K);
    strides.insert(strides.begin(), mu.numel());
  }
  out.z = empty_beside(mu, sizes, strides, mu.scalar_type());
  call.z = out.z.data_ptr();
  set_noise<Backend>(call, mu, noise, binding, out);
}

// The half of the problem that computes the KL, with what it returns.
inline void bind_kl(Forward& call, const Latent& in, const Grouping& g, at::IntArrayRef dense,
                    const Options& o, const OptTensor& free_bits_per_group, Binding& binding, Results& out) {
  const auto compute = compute_type(in.mu);
  call.has_kl = true;
  call.reduction = o.reduction;
  call.group_sums = o.group_sums;
  if (in.prior_mu) {
    call.prior_mu = binding.input(*in.prior_mu);
    call.prior_scale = binding.input(*in.prior_logvar);
  }
  call.clamp = clamp_of(o, free_bits_per_group);
  call.penalty = o.penalty;
  if (free_bits_per_group)
    call.free_bits_per_group = binding.keep(constant(*free_bits_per_group, g.group_shape, in.mu));
  else if (o.free_bits)
    call.free_bits = *o.free_bits;
  if (in.weight) call.weight = binding.keep(constant(*in.weight, g.batch_shape, in.mu));
  out.kl = o.reduction == Reduction::elementwise ? empty_beside(in.mu, in.mu.sizes(), dense, compute)
           : o.reduction == Reduction::none      ? empty_beside(in.mu, g.batch_shape, compute)
                                                 : empty_beside(in.mu, {}, compute);
  out.kl_per_group = empty_beside(in.mu, g.group_shape, compute);
  out.gate = empty_beside(in.mu, {call.clamp == Clamp::batch ? g.G : 1}, compute);
  const bool bits = call.clamp == Clamp::sample;
  out.open = empty_beside(in.mu, {bits ? (g.B * g.G + 7) / 8 : 0}, at::kByte);
  call.kl = out.kl.data_ptr();
  call.kl_per_group = out.kl_per_group.data_ptr();
  call.gate = out.gate.data_ptr();
  call.open = bits ? out.open.data_ptr<uint8_t>() : nullptr;
}

inline at::DimVector counting(int64_t from, size_t n) {
  at::DimVector v;
  for (size_t i = 0; i < n; ++i) v.push_back(from + static_cast<int64_t>(i));
  return v;
}

// The options for tensors whose axes were brought to the order of `by_role`.
inline Options permuted(Options o, const Grouping& g) {
  o.group_dims = counting(o.batch_dims, g.group_shape.size());
  return o;
}

template <class Backend, class Noise>
Results forward(const Options& o, const Latent& in, const Noise& noise, bool sample, bool kl,
                const OptSymInt& num_samples, const OptTensor& free_bits_per_group) {
  const Tensor& mu = in.mu;
  const Grouping g = check_forward<int64_t>(in, o, kl, num_samples, free_bits_per_group);
  const auto dense = dense_strides(mu);
  const std::optional<Layout> layout = kl ? kl_layout(mu, g, dense) : sample_layout(mu, in.logvar, dense);
  if (!layout) {
    // Groups that interleave with the summed axes in memory: z from the tensors as they are, because its
    // numbers go by storage order, the KL from copies in [B, G, S] order.
    const auto [order, inverse] = by_role(g);
    Results out = forward<Backend>(permuted(o, g), in.permuted(order, mu.scalar_type()), OptTensor(), false,
                                   true, {}, free_bits_per_group);
    if (o.reduction == Reduction::elementwise) {
      const Tensor copied = std::move(out.kl);
      out.kl = empty_beside(mu, mu.sizes(), dense, copied.scalar_type());
      out.kl.copy_(copied.permute(inverse));
    }
    if (sample) {
      Results sampled = forward<Backend>(o, in, noise, true, false, num_samples, OptTensor());
      out.z = std::move(sampled.z);
      out.rng = std::move(sampled.rng);
    }
    return out;
  }
  Results out;
  Forward call;
  set_scale(call, o);
  Binding binding(call, mu, *layout, dense);
  call.mu = binding.input(mu);
  call.scale = binding.input(in.logvar);
  if (kl) bind_kl(call, in, g, dense, o, free_bits_per_group, binding, out);
  if (sample) bind_sample<Backend>(call, mu, dense, noise, num_samples, binding, out);
  if (kl || sample) Backend::forward(call, mu);
  return out;
}

// ---- backward --------------------------------------------------------------------------------------------

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
inline bool grad_mu_is_grad_z(const Incoming& in, const Tensor& mu) {
  return in.z && !in.kl && !in.kl_per_group && in.z->dim() == mu.dim();
}

// What the KL's half of the backward reads.
inline void bind_kl(Backward& call, const Latent& in, const Incoming& grads, const Saved& saved,
                    const Grouping& g, at::IntArrayRef dense, const Options& o, Binding& binding) {
  const auto compute = compute_type(in.mu);
  call.has_kl = true;
  call.reduction = o.reduction;
  call.group_sums = o.group_sums;
  call.clamp = saved.open->numel() > 0                                 ? Clamp::sample
               : o.clamp == Clamp::batch && saved.gate->numel() == g.G ? Clamp::batch
                                                                       : Clamp::none;
  if (in.prior_mu) {
    call.prior_mu = binding.input(*in.prior_mu);
    call.prior_scale = binding.input(*in.prior_logvar);
  }
  call.gate = binding.keep(saved.gate->contiguous());
  if (call.clamp == Clamp::sample)
    call.open = static_cast<const uint8_t*>(binding.keep(saved.open->contiguous()));
  if (in.weight) call.weight = binding.keep(constant(*in.weight, g.batch_shape, in.mu));
  if (o.balance) {
    call.posterior_share = 1 - *o.balance;
    call.prior_share = *o.balance;
  }
  if (grads.kl) {
    Tensor grad = as_dtype(*grads.kl, compute);
    if (o.reduction != Reduction::elementwise)
      grad = grad.contiguous();
    else if (grad.strides() != dense)
      grad = empty_beside(in.mu, in.mu.sizes(), dense, compute).copy_(grad);
    call.grad_kl = binding.keep(std::move(grad));
  }
  if (grads.kl_per_group)
    call.grad_kl_per_group = binding.keep(as_dtype(*grads.kl_per_group, compute).contiguous());
}

// Writes into `out`: the caller settles where gradients go, so that packed ones are written in place.
template <class Backend>
void backward(const Options& o, const Latent& in, const Incoming& grads, const Saved& saved,
              const Grouping& g, Gradients& out) {
  const Tensor& mu = in.mu;
  const bool kl = grads.kl || grads.kl_per_group;
  const auto dense = dense_strides(mu);
  const std::optional<Layout> layout = kl ? kl_layout(mu, g, dense) : sample_layout(mu, in.logvar, dense);
  if (!layout) {
    // As in `forward`: the two gradients come from two launches and are added. Both are written in the dtype
    // of the arithmetic: in a smaller one each would be rounded, and could overflow, before they are added.
    const auto compute = compute_type(mu);
    const auto [order, inverse] = by_role(g);
    const Latent copied = in.permuted(order, compute);
    Incoming of_kl{{}, grads.kl, grads.kl_per_group};
    if (of_kl.kl && o.reduction == Reduction::elementwise) of_kl.kl = of_kl.kl->permute(order);
    const auto like = [](const Tensor& wanted, const Tensor& t) {
      return wanted.defined() ? at::empty_like(t) : Tensor();
    };
    Gradients kl_part{like(out.mu, copied.mu), like(out.logvar, copied.mu), like(out.prior_mu, copied.mu),
                      like(out.prior_logvar, copied.mu)};
    const Options in_order = permuted(o, g);
    backward<Backend>(in_order, copied, of_kl, saved, grouping_of<int64_t>(copied.mu, in_order), kl_part);
    Gradients z_part;
    if (grads.z) {
      // These keep the order in storage, by which the random numbers go.
      const Latent wide{mu.to(compute), in.logvar.to(compute), {}, {}, {}};
      z_part = {at::empty_like(wide.mu), at::empty_like(wide.mu), {}, {}};
      backward<Backend>(o, wide, Incoming{grads.z->to(compute), {}, {}}, saved, Grouping(), z_part);
    }
    const auto put = [inverse = inverse](Tensor& to, const Tensor& kl, const Tensor& z) {
      if (to.defined()) to.copy_(z.defined() ? kl.permute(inverse).add_(z) : kl.permute(inverse));
    };
    put(out.mu, kl_part.mu, z_part.mu);
    put(out.logvar, kl_part.logvar, z_part.logvar);
    put(out.prior_mu, kl_part.prior_mu, {});
    put(out.prior_logvar, kl_part.prior_logvar, {});
    return;
  }

  Backward call;
  set_scale(call, o);
  Binding binding(call, mu, *layout, dense);
  call.mu = binding.input(mu);
  call.scale = binding.input(in.logvar);
  if (grads.z) {
    call.rng = state_of(*saved.rng, binding);
    call.has_z = true;
    call.grad_z = binding.keep(dense_grad_z(*grads.z, mu, dense, call.K));
  }
  if (kl) bind_kl(call, in, grads, saved, g, dense, o, binding);
  if (out.mu.defined()) call.grad_mu = binding.output(out.mu);
  call.grad_scale = binding.output(out.logvar);
  if (out.prior_mu.defined()) {
    if (kl) {
      call.grad_prior_mu = binding.output(out.prior_mu);
      call.grad_prior_scale = binding.output(out.prior_logvar);
    } else {
      out.prior_mu.zero_();
      out.prior_logvar.zero_();
    }
  }
  Backend::backward(call, mu);
  binding.finish();
}

// ---- the operators ---------------------------------------------------------------------------------------

template <class Backend>
struct Operators {
  template <class Result, class Noise>
  static Result latent(const Options& o, const Tensor& first, const OptTensor& second, int64_t dim,
                       const Noise& noise, const OptTensor& prior_mu, const OptTensor& prior_logvar,
                       bool sample, bool kl, OptSymInt num_samples, const OptTensor& weight,
                       const OptTensor& free_bits_per_group) {
    const Latent in = latent_of<int64_t>(first, second, dim, prior_mu, prior_logvar, weight);
    Results out = forward<Backend>(o, in, noise, sample, kl, num_samples, free_bits_per_group);
    if (!sample) out.z = nothing(in.mu, in.mu.scalar_type(), 0);
    if (!kl) {
      out.kl = nothing(in.mu, compute_type(in.mu), 1);
      out.kl_per_group = nothing(in.mu, compute_type(in.mu), 2);
      out.gate = nothing(in.mu, compute_type(in.mu), 3);
      out.open = nothing(in.mu, at::kByte, 4);
    }
    if (!out.rng.defined() && std::is_same_v<Noise, OptGenerator>) out.rng = nothing(in.mu, at::kLong, 5);
    return std::move(out);
  }

  static Tensors4 latent_backward(const Options& o, const OptTensor& grad_z, const OptTensor& grad_kl,
                                  const OptTensor& grad_kl_per_group, const Tensor& first,
                                  const OptTensor& second, int64_t dim, const OptTensor& rng,
                                  const OptTensor& prior_mu, const OptTensor& prior_logvar,
                                  const OptTensor& gate, const OptTensor& open, const OptTensor& weight,
                                  bool prior_grads) {
    const Latent in = latent_of<int64_t>(first, second, dim, prior_mu, prior_logvar, weight);
    const Incoming grads{grad_z, grad_kl, grad_kl_per_group};
    const Saved saved{rng, gate, open};
    const Grouping g = check_backward<int64_t>(in, o, grads, saved, prior_grads);
    const auto dense = dense_strides(in.mu);
    const auto gradient = [&](bool wanted) {
      return wanted ? empty_beside(in.mu, in.mu.sizes(), dense, in.mu.scalar_type()) : Tensor();
    };
    Tensor packed;
    Gradients out{{}, {}, gradient(prior_grads), gradient(prior_grads)};
    if (second) {
      out.mu = gradient(!grad_mu_is_grad_z(grads, in.mu));
      out.logvar = gradient(true);
    } else {
      packed = empty_beside(first, first.sizes(), dense_strides(first), first.scalar_type());
      std::tie(out.mu, out.logvar) = halves<int64_t>(packed, dim);
    }
    backward<Backend>(o, in, grads, saved, g, out);
    if (!second) {
      out.mu = std::move(packed);
      out.logvar = Tensor();
    }
    return {std::move(out.mu), std::move(out.logvar), std::move(out.prior_mu), std::move(out.prior_logvar)};
  }
};

template <class Random>
Tensor rng_state(const Tensor& like, const OptGenerator& generator) {
  check_generator(like, generator);
  return Random::rng_state(like, generator);
}
template <class Random>
Tensor philox_words(const Tensor& rng, int64_t n, int64_t first_quad) {
  check_words(rng, n);
  return Random::philox_words(rng.contiguous(), n, first_quad);
}

// Registers latent<Result, Noise> and latent_backward of `Kernels`, rng_state and philox_words of `Random`.
template <class Kernels, class Random>
void register_kernels(torch::Library& m) {
  m.impl("latent", TORCH_FN((Registered<&Kernels::template latent<Tensors5, OptTensor>>::call)));
  m.impl("latent_draw", TORCH_FN((Registered<&Kernels::template latent<Tensors6, OptGenerator>>::call)));
  m.impl("latent_backward", TORCH_FN((Registered<&Kernels::latent_backward>::call)));
  m.impl("_rng_state", TORCH_FN(rng_state<Random>));
  m.impl("_philox_words", TORCH_FN(philox_words<Random>));
}

}  // namespace vk
