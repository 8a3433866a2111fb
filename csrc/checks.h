// What every operator looks at before it reads a tensor: on every device, and of tensors without memory,
// whose sizes may be symbols. The messages are those of vaekernels/_checks.py, which has said most of them
// already when the call came through the public functions.
#pragma once

#include "plan.h"
#include "text.h"

namespace vk {

// ---- text ------------------------------------------------------------------------------------------------

inline std::string dtype_text(const Tensor& t) {
  const std::pair<at::ScalarType, const char*> names[] = {
      {at::kFloat, "float32"},
      {at::kDouble, "float64"},
      {at::kBFloat16, "bfloat16"},
      {at::kHalf, "float16"},
      {at::kLong, "int64"},
      {at::kInt, "int32"},
      {at::kShort, "int16"},
      {at::kChar, "int8"},
      {at::kByte, "uint8"},
      {at::kBool, "bool"},
      {at::kComplexFloat, "complex64"},
      {at::kComplexDouble, "complex128"},
      {at::kComplexHalf, "complex32"},
  };
  for (const auto& [type, name] : names)
    if (t.scalar_type() == type) return std::string("torch.") + name;
  return c10::toString(t.scalar_type());
}

inline std::string numbers_text(at::ArrayRef<double> x) {
  std::string text = "(";
  for (size_t i = 0; i < x.size(); ++i) text += (i > 0 ? ", " : "") + repr(x[i]);
  return text + (x.size() == 1 ? ",)" : ")");
}

// ---- tensors ---------------------------------------------------------------------------------------------

inline void check_floating(const char* name, const Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble,
                   name, " must be float32, bfloat16, float16 or float64, got ", dtype_text(t),
                   "; convert it, e.g. with .float()");
}

// Two floating tensors of one dtype, device and shape.
inline void check_pair(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  check_floating(name, t);
  if (t.scalar_type() == other.scalar_type() && t.device() == other.device() &&
      t.sym_sizes() == other.sym_sizes())
    return;
  check_floating(other_name, other);
  TORCH_CHECK_TYPE(t.scalar_type() == other.scalar_type(), name, " and ", other_name,
                   " must have one dtype, got ", dtype_text(t), " and ", dtype_text(other),
                   "; convert one, e.g. ", other_name, ".to(", name, ".dtype)");
  TORCH_CHECK_VALUE(t.device() == other.device(), name, " and ", other_name, " must be on one device, got ",
                    t.device(), " and ", other.device(), "; move one, e.g. ", other_name, ".to(", name,
                    ".device)");
  TORCH_CHECK_VALUE(false, name, " and ", other_name, " must have one shape, got ", t.sym_sizes(), " and ",
                    other.sym_sizes(), "; expand the smaller one, e.g. ", other_name, ".expand_as(", name,
                    ")");
}

// A constant of the loss beside the tensors of the latent. `else_what`: what helps besides moving it.
inline void check_constant(const char* name, const Tensor& t, const Tensor& mu, const char* else_what = "") {
  TORCH_CHECK_VALUE(!t.requires_grad(), name, " must not require grad, it is a constant of the loss; give ",
                    name, ".detach()");
  TORCH_CHECK_VALUE(t.device() == mu.device(), name, " must be on the tensors' device, ", mu.device(),
                    ", got ", t.device(), "; move it there", else_what);
}

// Both or neither, of mu's shape, dtype and device.
inline void check_prior(const Tensor& mu, VK_PRIOR_ARGS) {
  if (!prior_mu && !prior_logvar) return;
  TORCH_CHECK_VALUE(prior_mu && prior_logvar, prior_mu ? "prior_logvar" : "prior_mu", " must be given with ",
                    prior_mu ? "prior_mu" : "prior_logvar", ", got None; for the prior N(0, I) give neither");
  check_pair("prior_mu", *prior_mu, "prior_logvar", *prior_logvar);
  TORCH_CHECK_TYPE(prior_mu->scalar_type() == mu.scalar_type(), "prior_mu and mu must have one dtype, got ",
                   dtype_text(*prior_mu), " and ", dtype_text(mu));
  TORCH_CHECK_VALUE(prior_mu->device() == mu.device(), "prior_mu and mu must be on one device, got ",
                    prior_mu->device(), " and ", mu.device());
  TORCH_CHECK_VALUE(prior_mu->sym_sizes() == mu.sym_sizes(), "prior_mu must have the shape of mu, ",
                    mu.sym_sizes(), ", got ", prior_mu->sym_sizes(), "; expand it: prior_mu.expand(",
                    mu.sym_sizes(), ") copies nothing");
}

// The axis of a packed tensor that holds both halves.
inline int64_t packed_axis(const Tensor& moments, int64_t dim) {
  check_floating("moments", moments);
  const int64_t dims = moments.dim();
  TORCH_CHECK_VALUE(dim >= -dims && dim < dims, "dim must be an axis of moments, whose shape is ",
                    moments.sym_sizes(), ", got ", dim);
  const int64_t axis = dim < 0 ? dim + dims : dim;
  TORCH_CHECK_VALUE(moments.sym_size(axis) % 2 == 0, "moments must have an even size along dim ", dim,
                    ", mu then logvar, got shape ", moments.sym_sizes(),
                    "; choose the axis that holds both halves");
  return axis;
}

// mu and the second tensor of a packed one, as views. Int: of the sizes, int64_t, or SymInt where they may be
// symbols; so below.
template <class Int>
std::pair<Tensor, Tensor> halves(const Tensor& moments, int64_t dim) {
  const int64_t axis = packed_axis(moments, dim);
  if constexpr (std::is_same_v<Int, int64_t>) {
    const int64_t half = moments.size(axis) / 2;
    return {moments.narrow(axis, 0, half), moments.narrow(axis, half, half)};
  } else {
    const Int half = moments.sym_size(axis) / 2;
    return {moments.narrow_symint(axis, 0, half), moments.narrow_symint(axis, half, half)};
  }
}

// ---- random numbers --------------------------------------------------------------------------------------

inline void check_rng(const Tensor& like, const Tensor& rng) {
  TORCH_CHECK_VALUE(rng.scalar_type() == at::kLong && rng.dim() == 1 && rng.sym_size(0) == 2,
                    "rng must be int64 [2] (seed, offset), got ", dtype_text(rng), " ", rng.sym_sizes(),
                    "; make it with vaekernels.rng_state");
  TORCH_CHECK_VALUE(rng.device() == like.device(), "rng must be on the tensors' device, ", like.device(),
                    ", got ", rng.device(), "; move it there");
  TORCH_CHECK_VALUE(rng.is_contiguous(), "rng must be contiguous, got strides ", rng.sym_strides(),
                    "; give rng.contiguous()");
}

// Of a state whose numbers can be read.
inline void check_offset(int64_t offset) {
  TORCH_CHECK_VALUE(offset % 4 == 0, "rng must have an offset that is a multiple of 4, got ", offset,
                    "; see vaekernels.rng_state");
}

inline void check_generator(const Tensor& like, const OptGenerator& generator) {
  if (!generator || !generator->defined()) return;
  TORCH_CHECK_VALUE(generator->device().type() == like.device().type(),
                    "generator must be on the tensors' device, ", like.device(), ", got one on ",
                    generator->device(), "; make it with torch.Generator('", like.device(), "')");
}

template <class Int>
void check_num_samples(const std::optional<Int>& num_samples) {
  if (!num_samples) return;
  TORCH_CHECK_VALUE(*num_samples >= 0, "num_samples must be at least 0, got ", *num_samples,
                    "; None gives z the shape of mu");
}

inline void check_words(const Tensor& rng, int64_t n) {
  check_rng(rng, rng);
  TORCH_CHECK_VALUE(n >= 0, "n must be at least 0, the number of words, got ", n);
}

// ---- options ---------------------------------------------------------------------------------------------

inline void check_bounds(OptDoubles bounds) {
  if (!bounds) return;
  TORCH_CHECK_VALUE(bounds->size() == 2, "logvar_bounds must be None or a pair (lo, hi) of numbers, got ",
                    numbers_text(*bounds));
  TORCH_CHECK_VALUE((*bounds)[0] <= (*bounds)[1], "logvar_bounds must be (lo, hi) with lo <= hi, got ",
                    numbers_text(*bounds), "; swap or mend them");
}

inline void check_param(VK_PARAM_ARGS) {
  param_of(parameterization);
  check_bounds(logvar_bounds);
}

inline void check_balance(std::optional<double> balance, bool has_prior) {
  if (!balance) return;
  TORCH_CHECK_VALUE(*balance >= 0 && *balance <= 1,
                    "balance must be between 0 and 1, the prior's share of the gradient, got ",
                    repr(*balance));
  TORCH_CHECK_VALUE(
      has_prior, "balance needs a learned prior, got none; give prior_mu and prior_logvar, or drop balance");
}

// `batch_shape`: the leading sizes of mu.
inline void check_weight(const OptTensor& weight, const Tensor& mu, int64_t batch_dims) {
  if (!weight) return;
  const auto batch_shape = mu.sym_sizes().slice(0, static_cast<size_t>(batch_dims));
  check_constant("weight", *weight, mu);
  TORCH_CHECK_TYPE(!weight->is_complex(), "weight must be of a real or bool dtype, got ",
                   dtype_text(*weight));
  TORCH_CHECK_VALUE(weight->sym_sizes() == batch_shape, "weight must have the batch shape ", batch_shape,
                    ", got ", weight->sym_sizes(), "; see batch_dims, or expand it");
}

template <class Int>
void check_free_bits(std::optional<double> number, const OptTensor& per_group, const Tensor& mu,
                     const AxesOf<Int>& a) {
  if (number)
    TORCH_CHECK_VALUE(*number >= 0, "free_bits must be non-negative and not NaN, got ", repr(*number),
                      "; it is a rate in nats, None is no clamp");
  if (!per_group) return;
  TORCH_CHECK_VALUE(!number,
                    "free_bits and free_bits_per_group must not be given together; drop one of them");
  check_constant("free_bits", *per_group, mu, " or give a number");
  TORCH_CHECK_TYPE(!per_group->is_complex() && per_group->scalar_type() != at::kBool,
                   "free_bits must be of a real dtype, got ", dtype_text(*per_group));
  const auto shape = per_group->sym_sizes();
  bool fits = shape.size() <= a.group_shape.size();
  for (size_t i = 1; fits && i <= shape.size(); ++i)
    fits = shape[shape.size() - i] == a.group_shape[a.group_shape.size() - i] || shape[shape.size() - i] == 1;
  TORCH_CHECK_VALUE(fits, "free_bits must broadcast to the group shape ", at::ArrayRef<Int>(a.group_shape),
                    ", got ", shape, "; see group_dims");
}

// What "none" and "elementwise" cannot be combined with.
inline void check_reduction(Reduction reduction, Clamp clamp, bool free_bits, bool weighted) {
  if (reduction != Reduction::none && reduction != Reduction::elementwise) return;
  TORCH_CHECK_VALUE(!free_bits || reduction == Reduction::none,
                    "reduction='elementwise' takes no free_bits; drop them or choose another reduction");
  TORCH_CHECK_VALUE(!free_bits || clamp == Clamp::sample,
                    "reduction='none' does not fit clamp='batch' with free_bits, which clamps the mean over "
                    "the batch; use clamp='sample' or reduction='batchmean'");
  TORCH_CHECK_VALUE(!weighted, "weight must be None with reduction='",
                    reduction == Reduction::none ? "none" : "elementwise",
                    "', which averages nothing; apply it yourself");
}

// ---- whole calls -----------------------------------------------------------------------------------------

inline void check_posterior(VK_TARGET_ARGS, VK_PARAM_ARGS) {
  check_pair("mu", mu, "logvar", logvar);
  check_param(VK_PARAM_PASS);
}

template <class Int>
AxesOf<Int> check_kl(VK_TARGET_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS) {
  check_posterior(VK_TARGET_PASS, VK_PARAM_PASS);
  check_prior(mu, VK_PRIOR_PASS);
  AxesOf<Int> a = axes_of<Int>(mu, batch_dims, group_dims);
  penalty_of(penalty);
  check_reduction(reduction_of(reduction), clamp_of(clamp), has_free_bits(free_bits, free_bits_per_group),
                  weight.has_value());
  check_balance(balance, prior_mu.has_value());
  check_weight(weight, mu, batch_dims);
  check_free_bits(free_bits, free_bits_per_group, mu, a);
  return a;
}

// A tensor that only backward is given. A kernel would read it out of bounds if it were of another size.
inline void check_saved(const Tensor& t, const char* name, const Tensor& mu, at::ScalarType dtype, bool fits,
                        const char* takes) {
  TORCH_CHECK_VALUE(t.device() == mu.device(), name, " must be on the tensors' device, ", mu.device(),
                    ", got ", t.device(), "; move it there");
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be of dtype ", c10::toString(dtype),
                   " for mu of dtype ", dtype_text(mu), ", got ", dtype_text(t), "; convert it");
  TORCH_CHECK_VALUE(fits, name, " must be ", takes, " for mu of shape ", mu.sym_sizes(), ", got ",
                    t.sym_sizes(), "; give what the forward call returned, or a gradient of its shape");
}

template <class Int>
void check_backward(VK_GRAD_ARGS, VK_TARGET_ARGS, VK_SAVED_ARGS) {
  check_posterior(VK_TARGET_PASS, VK_PARAM_PASS);
  check_prior(mu, VK_PRIOR_PASS);
  TORCH_CHECK_VALUE(!prior_grads || prior_mu,
                    "prior_grads needs a learned prior, got none; give prior_mu and prior_logvar");
  const AxesOf<Int> a = axes_of<Int>(mu, batch_dims, group_dims);
  const Reduction kept = reduction_of(reduction);
  clamp_of(clamp);
  check_reduction(kept, Clamp::none, false, weight.has_value());
  check_balance(balance, prior_mu.has_value());
  check_weight(weight, mu, batch_dims);
  if (grad_z) {
    const auto shape = grad_z->sym_sizes();
    const bool batched = grad_z->dim() == mu.dim() + 1;
    check_saved(*grad_z, "grad_z", mu, mu.scalar_type(), (batched ? shape.slice(1) : shape) == mu.sym_sizes(),
                "[*mu.shape] or [K, *mu.shape]");
    TORCH_CHECK_VALUE(rng.has_value(), "rng must be given with grad_z, got None; give the state of z");
    check_rng(mu, *rng);
  }
  const at::ScalarType compute = compute_type(mu);
  if (grad_kl) {
    const auto shape = grad_kl->sym_sizes(), whole = mu.sym_sizes();
    const size_t axes = kept == Reduction::elementwise ? whole.size()
                        : kept == Reduction::none      ? static_cast<size_t>(batch_dims)
                                                       : 0;
    check_saved(*grad_kl, "grad_kl", mu, compute, shape == whole.slice(0, axes), "of the shape of kl");
  }
  const auto in_groups = [&a](const Tensor& t) {
    bool same = t.dim() == static_cast<int64_t>(a.group_shape.size());
    for (size_t i = 0; same && i < a.group_shape.size(); ++i) same = t.sym_sizes()[i] == a.group_shape[i];
    return same;
  };
  if (grad_kl_per_group)
    check_saved(*grad_kl_per_group, "grad_kl_per_group", mu, compute, in_groups(*grad_kl_per_group),
                "of the group shape");
  if (!grad_kl && !grad_kl_per_group) return;
  TORCH_CHECK_VALUE(
      gate && open, gate ? "open" : "gate",
      " must be given with a gradient of the KL, got None; give what the forward call returned");
  check_saved(*gate, "gate", mu, compute,
              gate->dim() == 1 && (gate->sym_numel() == 1 || gate->sym_numel() == a.G),
              "[1] or one number for each group");
  check_saved(*open, "open", mu, at::kByte,
              open->dim() == 1 && (open->sym_numel() == 0 || open->sym_numel() == (a.B * a.G + 7) / 8),
              "empty or one bit for each row and group");
}

}  // namespace vk
