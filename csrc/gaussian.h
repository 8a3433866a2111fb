// The diagonal Gaussian, element by element: the sample, the KL divergence and their derivatives.
//
// Everything is written in the log standard deviation x = logvar / 2:
//   z  = mu + e^x eps
//   KL = 1/2 (mu^2 + e^(2x) - 1 - 2x)                                prior N(0, I)
//   KL = 1/2 (((mu - mp) e^(-xp))^2 + e^(2t) - 1 - 2t), t = x - xp   prior N(mp, e^(2 xp))
// The CPU kernels, the CUDA kernels and the host tests compile these functions; vaekernels/reference.py is
// the only other statement of them.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "math.h"

namespace vk {

// What the second tensor of a Gaussian holds.
enum class Param : uint8_t { logvar, log_std, std, softplus };

// f(param, as an integral constant).
template <class F>
VK_FN auto with_param(Param param, const F& f) {
  switch (param) {
    case Param::logvar:
      return f(std::integral_constant<Param, Param::logvar>());
    case Param::log_std:
      return f(std::integral_constant<Param, Param::log_std>());
    case Param::std:
      return f(std::integral_constant<Param, Param::std>());
    default:
      return f(std::integral_constant<Param, Param::softplus>());
  }
}

template <class R>
struct Scale {
  R x;          // log standard deviation
  R log_slope;  // dx/ds
  R sd;         // e^x, these three only where the tensor holds the standard deviation (`std`, `softplus`)
  R inverse;    // 1 / sd
  R slope;      // d sd/ds
};

template <Param P>
inline constexpr bool kHoldsSd = P == Param::std || P == Param::softplus;

// Below -16, log(1 + e^s) = e^s (1 - e^s / 2) to the last digit of float32; above, nothing underflows.
// float64 has the room to go to -36.
template <class R>
VK_FN R softplus_switch();
template <>
VK_FN float softplus_switch<float>() {
  return -16.f;
}
template <>
VK_FN double softplus_switch<double>() {
  return -36.0;
}

VK_FN float exp_of(float x) { return exp_parts(x).exp; }
VK_LONG_FN double exp_of(double x) { return exp(x); }

// The scale that element s of the second tensor stands for.
template <Param P, class R>
VK_FN Scale<R> scale_of(R s) {
  if constexpr (P == Param::logvar) {
    return {s * R(0.5), R(0.5), R(0), R(0), R(0)};
  } else if constexpr (P == Param::log_std) {
    return {s, R(1), R(0), R(0), R(0)};
  } else if constexpr (P == Param::std) {
    const R sd = s < R(0) ? nan_of<R>() : s;
    const R inverse = R(1) / sd;
    return {log_of(sd), inverse, sd, inverse, R(1)};
  } else {
    const R y = exp_of(s < R(0) ? s : -s);  // e^-|s|
    const R sd = (s > R(0) ? s : R(0)) + log1p_of(y);
    const R sigmoid = (s < R(0) ? y : R(1)) / (R(1) + y);
    // Far down sd underflows long before the KL, which is close to -s there, overflows.
    const bool far = s < softplus_switch<R>();
    const R ratio = R(1) - y * R(0.5);
    const R inverse = far ? exp_of(-s) : R(1) / sd;
    return {far ? s - y * R(0.5) : log_of(sd), far ? ratio : sigmoid / sd, sd, inverse, sigmoid};
  }
}

// Bounds on the log-variance, as bounds on x.
template <class R>
struct Bounds {
  R lo, hi;
  VK_FN R clamp(R x) const { return clamp_of(x, lo, hi); }
};
// Whether x was within the bounds that made `clamped` of it. NaN is inside, so that it comes out.
template <class R>
VK_FN bool is_inside(R x, R clamped) {
  return !(x < clamped || x > clamped);
}
template <class R>
struct NoBounds {
  VK_FN R clamp(R x) const { return x; }
};

template <class R>
struct Posterior {
  R x, sd, excess, growth;
  bool inside;
};

// The same where the tensor holds the log-variance y and no bounds are set.
template <class R>
VK_FN Posterior<R> posterior_of_log_variance(R y) {
  const Exp<R> e = exp_parts_of_half(y);
  return {R(0.5) * y, e.exp, e.excess, e.growth, true};
}

// The posterior's scale after the bounds, with the parts of its exponential. `range`, here and below: the x
// that exp_parts takes.
template <Param P, class R, class AnyBounds, class Range = AnyRange>
VK_FN Posterior<R> posterior_of(const Scale<R>& scale, const AnyBounds& bounds, const Range& range = {}) {
  const R x = bounds.clamp(scale.x);
  const Exp<R> e = exp_parts(x, range);
  const bool inside = is_inside(scale.x, x);
  if constexpr (kHoldsSd<P>) return {x, inside ? scale.sd : e.exp, e.excess, e.growth, inside};
  return {x, e.exp, e.excess, e.growth, inside};
}

// Twice the KL: the kernels that add up many of them halve the sum.
template <class R>
VK_FN R twice_kl_standard(R mu, R excess) {
  return mu * mu + excess;
}

template <class R>
VK_FN R kl_standard(R mu, R excess) {
  return R(0.5) * twice_kl_standard(mu, excess);
}

// The terms of the KL to a Gaussian prior. `distance` is squared only after it was scaled, so that a distant
// mean overflows no earlier than the KL itself.
template <class R>
struct Prior {
  R distance;        // (mu - mp) e^(-xp)
  R precision_root;  // e^(-xp)
  R excess, growth;  // of t = x - xp
};

template <Param P, class R, class Range = AnyRange>
VK_FN Prior<R> prior_of(R mu, R x, R prior_mu, const Scale<R>& prior, const Range& range = {}) {
  const R root = kHoldsSd<P> ? prior.inverse : exp_parts(-prior.x, range).exp;
  const Exp<R> e = exp_parts(x - prior.x, range);
  return {(mu - prior_mu) * root, root, e.excess, e.growth};
}

// The same where the tensors hold log-variances.
template <class R>
VK_FN Prior<R> prior_of_log_variance(R mu, R y, R prior_mu, R prior_y) {
  const R root = exp_parts_of_half(-prior_y).exp;
  const Exp<R> e = exp_parts_of_half(y - prior_y);
  return {(mu - prior_mu) * root, root, e.excess, e.growth};
}

template <class R>
VK_FN R twice_kl_prior(const Prior<R>& p) {
  return p.distance * p.distance + p.excess;
}

template <class R>
VK_FN R kl_prior(const Prior<R>& p) {
  return R(0.5) * twice_kl_prior(p);
}

// e^(2t) - 1 for gradients. Of tensors that hold sd from the quotient itself, while neither end is so far out
// that it overflows: t is the difference of two logarithms and brings the roundings of both.
template <Param P, class R>
VK_FN R prior_growth(const Posterior<R>& q, const Scale<R>& prior, const Prior<R>& p) {
  if constexpr (kHoldsSd<P>) {
    const R d = (q.sd - prior.sd) * prior.inverse;
    const bool near = q.x < R(40) && q.x > R(-40) && prior.x < R(40) && prior.x > R(-40);
    return near ? d * (d + R(2)) : p.growth;
  }
  return p.growth;
}

// dKL/ds against N(0, I), or dKL/dx where the tensor holds a logarithm. Where it holds sd this is (sd - 1/sd)
// d sd/ds, in an order that neither cancels near sd = 1 nor overflows before the result does.
template <Param P, class R>
VK_FN R kl_slope_standard(const Scale<R>& scale, const Posterior<R>& q) {
  if constexpr (kHoldsSd<P>) return (scale.sd - R(1)) * ((scale.sd + R(1)) * scale.log_slope);
  return q.growth;
}

// What comes to an element through its samples: the sums over them of grad_z, and of grad_z * eps, which is
// the gradient with respect to sd. Where z was not used both are 0.
template <class R>
struct SampleGradients {
  R sum, noise;
  bool used;

  // The noise's part of the gradient with respect to x. 0 where z was not used, though sd may be inf.
  VK_FN R log_sd(R sd) const { return noise * keep_if(used, sd); }
};

// The gradient with respect to s. `of_kl` comes through the KL, and is that by s where the tensor holds sd,
// by x otherwise.
template <Param P, class R>
VK_FN R scale_gradient(const Scale<R>& scale, const Posterior<R>& q, const SampleGradients<R>& z, R of_kl) {
  const R gradient = kHoldsSd<P> ? z.noise * scale.slope + of_kl : (z.log_sd(q.sd) + of_kl) * scale.log_slope;
  return keep_if(q.inside, gradient);
}

// The gradients of one element.
template <class R>
struct ElementGradients {
  R mu, scale, prior_mu, prior_scale;
};

template <Param P, class R>
VK_FN ElementGradients<R> gradients_sample(const Scale<R>& scale, const Posterior<R>& q,
                                           const SampleGradients<R>& z) {
  const R gradient = kHoldsSd<P> ? z.noise * scale.slope : z.log_sd(q.sd) * scale.log_slope;
  return {z.sum, keep_if(q.inside, gradient), R(0), R(0)};
}

template <Param P, class R, class AnyBounds, class Range = AnyRange>
VK_FN ElementGradients<R> gradients_sample(R s, const AnyBounds& bounds, const SampleGradients<R>& z,
                                           const Range& range = {}) {
  const Scale<R> scale = scale_of<P>(s);
  return gradients_sample<P>(scale, posterior_of<P>(scale, bounds, range), z);
}

// `c`, here and below: the gradient of the loss with respect to the element's KL.
template <Param P, class R>
VK_FN ElementGradients<R> gradients_standard(const Scale<R>& scale, const Posterior<R>& q, R mu,
                                             const SampleGradients<R>& z, R c) {
  return {z.sum + c * mu, scale_gradient<P>(scale, q, z, c * kl_slope_standard<P>(scale, q)), R(0), R(0)};
}

template <Param P, class R, class AnyBounds, class Range = AnyRange>
VK_FN ElementGradients<R> gradients_standard(R mu, R s, const AnyBounds& bounds, const SampleGradients<R>& z,
                                             R c, const Range& range = {}) {
  const Scale<R> scale = scale_of<P>(s);
  return gradients_standard<P>(scale, posterior_of<P>(scale, bounds, range), mu, z, c);
}

// cq and cp: c for the posterior and for the prior, which differ under KL balancing. They come before the
// slope of the logarithm, 1 / sd, which may leave float32's range where the gradient does not.
template <Param P, class R>
VK_FN ElementGradients<R> gradients_prior(const Scale<R>& scale, const Scale<R>& prior_scale,
                                          const Posterior<R>& q, const Prior<R>& p,
                                          const SampleGradients<R>& z, R cq, R cp) {
  const R pull = p.distance * p.precision_root;
  const R growth = prior_growth<P>(q, prior_scale, p);
  const R of_kl = kHoldsSd<P> ? cq * growth * scale.log_slope : cq * growth;
  return {z.sum + cq * pull, scale_gradient<P>(scale, q, z, of_kl), -(cp * pull),
          -(cp * (growth + p.distance * p.distance) * prior_scale.log_slope)};
}

template <Param P, class R, class AnyBounds, class Range = AnyRange>
VK_FN ElementGradients<R> gradients_prior(R mu, R s, R prior_mu, R prior_s, const AnyBounds& bounds,
                                          const SampleGradients<R>& z, R cq, R cp, const Range& range = {}) {
  const Scale<R> scale = scale_of<P>(s), prior_scale = scale_of<P>(prior_s);
  const Posterior<R> q = posterior_of<P>(scale, bounds, range);
  const Prior<R> p = prior_of<P>(mu, q.x, prior_mu, prior_scale, range);
  return gradients_prior<P>(scale, prior_scale, q, p, z, cq, cp);
}

// Free bits, f(x; lambda): what the loss counts of a rate x. The gate is open, x >= lambda, where the
// gradient passes. NaN is never open and always comes out.
enum class Penalty : uint8_t { floor, hinge, mask };

template <class R>
VK_FN R clamp_value(R x, R lambda, Penalty penalty) {
  const bool open = x >= lambda;
  const R closed = x != x ? x : (penalty == Penalty::floor ? lambda : R(0));
  return open ? (penalty == Penalty::hinge ? x - lambda : x) : closed;
}

}  // namespace vk
