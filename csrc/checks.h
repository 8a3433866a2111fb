// What the operators refuse, in the words of vaekernels/_checks.py. Every backend checks, Meta too, since
// torch.ops can be called without the checks in Python.
#pragma once

#include <ATen/ATen.h>

#include <string>

#include "layout.h"

namespace vk {

// ---- the tensors of a call -------------------------------------------------------------------------------

// mu and logvar, as views where they came packed.
struct Latent {
  Tensor mu, logvar;
  OptTensor prior_mu, prior_logvar, weight;

  Latent permuted(at::IntArrayRef order) const {
    const auto copy = [&](const Tensor& t) { return t.permute(order).contiguous(); };
    const auto copy_given = [&](const OptTensor& t) { return t ? OptTensor(copy(*t)) : t; };
    return {copy(mu), copy(logvar), copy_given(prior_mu), copy_given(prior_logvar), weight};
  }
};

// The gradients that reach backward, and what the forward saved for it.
struct Incoming {
  OptTensor z, kl, kl_per_group;
};
struct Saved {
  const OptTensor &rng, &gate, &open;
};

// Undefined where not asked for.
struct Gradients {
  Tensor mu, logvar, prior_mu, prior_logvar;
};

// ---- names and sizes -------------------------------------------------------------------------------------

inline const char* name_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kHalf:
      return "torch.float16";
    case at::kLong:
      return "torch.int64";
    case at::kInt:
      return "torch.int32";
    case at::kByte:
      return "torch.uint8";
    case at::kBool:
      return "torch.bool";
    default:
      return c10::toString(type);
  }
}

inline bool symbolic(const Tensor& t) { return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides(); }

// Comparing symbolic sizes costs several times as much as comparing numbers.
inline bool same_shape(const Tensor& a, const Tensor& b) {
  return symbolic(a) || symbolic(b) ? a.sym_sizes() == b.sym_sizes() : a.sizes() == b.sizes();
}
inline bool has_shape(const Tensor& t, c10::SymIntArrayRef shape) { return t.sym_sizes() == shape; }

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16, float16 or float64, got ",
                       name_of(t.scalar_type()), "; convert it, e.g. with .float()");
  }
}

inline at::ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// ---- checks ----------------------------------------------------------------------------------------------

inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " must be on the tensors' device, ", like.device(),
                    ", got ", t.device(), "; move it there");
}

inline void check_like(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  dtype_of(t, name);
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), like_name, " and ", name,
                   " must have one dtype, got ", name_of(like.scalar_type()), " and ",
                   name_of(t.scalar_type()), "; convert one, e.g. ", name, ".to(", like_name, ".dtype)");
  TORCH_CHECK_VALUE(t.device() == like.device(), like_name, " and ", name, " must be on one device, got ",
                    like.device(), " and ", t.device(), "; move one, e.g. ", name, ".to(", like_name,
                    ".device)");
  TORCH_CHECK_VALUE(same_shape(t, like), like_name, " and ", name, " must have one shape, got ",
                    like.sym_sizes(), " and ", t.sym_sizes(), "; expand the smaller one, e.g. ", name,
                    ".expand_as(", like_name, ")");
}

inline void check_rng(const Tensor& mu, const OptTensor& rng) {
  TORCH_CHECK_VALUE(rng.has_value(),
                    "rng must be given, the state of the noise; make it with "
                    "vaekernels.rng_state");
  TORCH_CHECK_VALUE(rng->scalar_type() == at::kLong && rng->dim() == 1 && rng->sym_size(0) == 2,
                    "rng must be int64 [2] (seed, offset), got ", name_of(rng->scalar_type()), " ",
                    rng->sym_sizes(), "; make it with vaekernels.rng_state");
  check_device(*rng, "rng", mu);
}

inline void check_words(const Tensor& rng, int64_t n) {
  check_rng(rng, rng);
  TORCH_CHECK_VALUE(n >= 0, "n must be at least 0, got ", n);
}

// mu and the second tensor of a packed one, as views.
inline std::pair<Tensor, Tensor> halves(const Tensor& moments, int64_t dim) {
  const int64_t axis = axis_of(dim, moments.dim(), "dim", "moments");
  const c10::SymInt size = moments.sym_size(axis);
  TORCH_CHECK_VALUE(size % 2 == 0, "moments must have an even size along dim ", dim,
                    ", mu then logvar, got shape ", moments.sym_sizes(),
                    "; choose the axis that holds both halves");
  const c10::SymInt half = size / 2;
  return {moments.narrow_symint(axis, 0, half), moments.narrow_symint(axis, half, half)};
}

inline Latent latent_of(const Tensor& first, const OptTensor& second, int64_t dim, const OptTensor& prior_mu,
                        const OptTensor& prior_logvar, const OptTensor& weight) {
  dtype_of(first, second ? "mu" : "moments");
  Latent in{{}, {}, prior_mu, prior_logvar, weight};
  if (second) {
    check_like(*second, "logvar", first, "mu");
    in.mu = first;
    in.logvar = *second;
  } else {
    std::tie(in.mu, in.logvar) = halves(first, dim);
  }
  TORCH_CHECK_VALUE(prior_mu.has_value() == prior_logvar.has_value(),
                    prior_mu ? "prior_logvar must be given with prior_mu, got None"
                             : "prior_mu must be given with prior_logvar, got None",
                    "; for the prior N(0, I) give neither");
  if (prior_mu) {
    check_like(*prior_mu, "prior_mu", in.mu, "mu");
    check_like(*prior_logvar, "prior_logvar", in.mu, "mu");
  }
  return in;
}

// No free bits, no clamp.
inline Clamp clamp_of(const Options& o, const OptTensor& free_bits_per_group) {
  return o.free_bits || free_bits_per_group ? o.clamp : Clamp::none;
}

using Sizes = c10::SmallVector<c10::SymInt, 6>;

// The sizes of mu's axes of a role.
inline Sizes sizes_of(const Tensor& mu, const Roles& roles, Role role) {
  Sizes sizes;
  for (size_t d = 0; d < roles.size(); ++d)
    if (roles[d] == role) sizes.push_back(mu.sym_size(static_cast<int64_t>(d)));
  return sizes;
}

inline void check_weight(const Latent& in, const Roles& roles) {
  const Tensor& weight = *in.weight;
  const auto batch = sizes_of(in.mu, roles, Role::batch);
  TORCH_CHECK_TYPE(!weight.is_complex(), "weight must be of a real or bool dtype, got ",
                   name_of(weight.scalar_type()));
  TORCH_CHECK_VALUE(has_shape(weight, batch), "weight must have the batch shape ", c10::SymIntArrayRef(batch),
                    ", got ", weight.sym_sizes(), "; see batch_dims, or expand it");
  check_device(weight, "weight", in.mu);
}

inline void check_free_bits(const Tensor& free_bits, const Latent& in, const Roles& roles) {
  const auto group = sizes_of(in.mu, roles, Role::group);
  TORCH_CHECK_TYPE(!free_bits.is_complex() && free_bits.scalar_type() != at::kBool,
                   "free_bits must be of a real dtype, got ", name_of(free_bits.scalar_type()));
  check_device(free_bits, "free_bits", in.mu);
  bool fits = static_cast<size_t>(free_bits.dim()) <= group.size();
  for (int64_t d = 1; fits && d <= free_bits.dim(); ++d) {
    const c10::SymInt size = free_bits.sym_size(-d);
    fits = size == 1 || size == group[group.size() - static_cast<size_t>(d)];
  }
  TORCH_CHECK_VALUE(fits, "free_bits must broadcast to the group shape ", c10::SymIntArrayRef(group),
                    ", got ", free_bits.sym_sizes(), "; see group_dims");
}

// What the options of a KL exclude of each other.
inline void check_options(const Options& o, Clamp clamp, const Latent& in) {
  const bool rows = o.reduction == Reduction::none, elements = o.reduction == Reduction::elementwise;
  TORCH_CHECK_VALUE(!(elements && clamp != Clamp::none),
                    "reduction='elementwise' takes no free_bits; drop them or choose another reduction");
  TORCH_CHECK_VALUE(!(rows && clamp == Clamp::batch),
                    "reduction='none' does not fit clamp='batch' with free_bits, which clamps the mean over "
                    "the batch; use clamp='sample' or reduction='batchmean'");
  TORCH_CHECK_VALUE(!((rows || elements) && in.weight), "weight must be None with reduction='",
                    std::string(name_of(o.reduction)), "', which averages nothing; apply it yourself");
  TORCH_CHECK_VALUE(!o.free_bits || *o.free_bits >= 0, "free_bits must be non-negative and not NaN, got ",
                    *o.free_bits, "; it is a rate in nats, None is no clamp");
  if (o.balance) {
    TORCH_CHECK_VALUE(*o.balance >= 0 && *o.balance <= 1,
                      "balance must be between 0 and 1, the prior's share of the gradient, got ", *o.balance);
    TORCH_CHECK_VALUE(
        in.prior_mu.has_value(),
        "balance needs a learned prior, got none; give prior_mu and prior_logvar, or drop balance");
  }
}

inline void check_bounds(const Options& o) {
  TORCH_CHECK_VALUE(!o.logvar_bounds || (*o.logvar_bounds)[0] <= (*o.logvar_bounds)[1],
                    "logvar_bounds must be (lo, hi) with lo <= hi, got (", (*o.logvar_bounds)[0], ", ",
                    (*o.logvar_bounds)[1], "); swap or correct them");
}

// The roles of mu's axes; none are needed without a KL.
inline Roles check_forward(const Latent& in, const Options& o, bool kl, const OptSymInt& num_samples,
                           const OptTensor& free_bits_per_group) {
  check_bounds(o);
  TORCH_CHECK_VALUE(!num_samples || *num_samples >= 0, "num_samples must be at least 0, got ", *num_samples,
                    "; None gives z the shape of mu");
  if (!kl) return {};
  Roles roles = roles_of(o, in.mu.dim());
  check_options(o, clamp_of(o, free_bits_per_group), in);
  if (in.weight) check_weight(in, roles);
  if (free_bits_per_group) check_free_bits(*free_bits_per_group, in, roles);
  return roles;
}

// A kernel would read out of bounds what is of another size.
inline void check_backward(const Latent& in, const Options& o, const Incoming& grads, const Saved& saved,
                           bool prior_grads) {
  const Tensor& mu = in.mu;
  const auto check = [&](const Tensor& t, bool fits, const char* name, const char* takes) {
    TORCH_CHECK_VALUE(fits, name, " must be ", takes, " for mu of shape ", mu.sym_sizes(), ", got ",
                      t.sym_sizes());
    check_device(t, name, mu);
  };
  check_bounds(o);
  TORCH_CHECK_VALUE(!prior_grads || in.prior_mu,
                    "prior_grads needs prior_mu and prior_logvar, got none; give them or prior_grads=False");
  if (grads.z) {
    const Tensor& t = *grads.z;
    const auto sizes = t.sym_sizes();
    check(t, (t.dim() == mu.dim() + 1 ? sizes.slice(1) : sizes) == mu.sym_sizes(), "grad_z",
          "[*mu.shape] or [K, *mu.shape]");
    TORCH_CHECK_TYPE(t.scalar_type() == mu.scalar_type(), "grad_z must have the dtype of mu, ",
                     name_of(mu.scalar_type()), ", got ", name_of(t.scalar_type()));
    check_rng(mu, saved.rng);
  }
  if (!grads.kl && !grads.kl_per_group) return;
  const Roles roles = roles_of(o, mu.dim());
  check_options(o, Clamp::none, in);
  if (in.weight) check_weight(in, roles);
  const auto batch = sizes_of(mu, roles, Role::batch), group = sizes_of(mu, roles, Role::group);
  const auto real = [](const Tensor& t, const char* name) {
    TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), name, " must be of a floating dtype, got ",
                     name_of(t.scalar_type()));
  };
  if (grads.kl) {
    const Tensor& t = *grads.kl;
    real(t, "grad_kl");
    check(t,
          o.reduction == Reduction::elementwise ? same_shape(t, mu)
          : o.reduction == Reduction::none      ? has_shape(t, batch)
                                                : t.dim() == 0,
          "grad_kl", "the shape of kl");
  }
  if (grads.kl_per_group) {
    real(*grads.kl_per_group, "grad_kl_per_group");
    check(*grads.kl_per_group, has_shape(*grads.kl_per_group, group), "grad_kl_per_group", "the group shape");
  }
  TORCH_CHECK_VALUE(saved.gate && saved.open, "a gradient of the KL needs gate and open, got ",
                    saved.gate   ? "gate"
                    : saved.open ? "open"
                                 : "neither");
  TORCH_CHECK_TYPE(saved.gate->scalar_type() == compute_type(mu) && saved.open->scalar_type() == at::kByte,
                   "gate and open must be ", name_of(compute_type(mu)), " and torch.uint8, got ",
                   name_of(saved.gate->scalar_type()), " and ", name_of(saved.open->scalar_type()));
  c10::SymInt G = 1, cells = 1;
  for (const auto& size : group) G *= size;
  for (const auto& size : batch) cells *= size;
  cells *= G;
  const auto gates = saved.gate->sym_numel(), bytes = saved.open->sym_numel();
  check(*saved.gate, saved.gate->dim() == 1 && (gates == 1 || gates == G), "gate",
        "[1] or one number for each group");
  check(*saved.open, saved.open->dim() == 1 && (bytes == 0 || bytes == (cells + 7) / 8), "open",
        "empty or one bit for each row and group");
}

}  // namespace vk
