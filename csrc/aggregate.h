// The log-density of samples under the mixture of a batch's posteriors (the aggregate posterior), as plain
// data and as formulas.
//
//   t[i,j,d]         = log N(z[i,d]; mu[j,d], sd[j,d]^2)
//   log_qz[i]        = logsumexp_j(sum_d t[i,j,d] + lw[i,j])
//   log_qz_dims[i,d] = logsumexp_j(t[i,j,d] + lw[i,j])
//
// The kernels work in units of log(2), where an exponential is a power of two: a density is then one
// difference, one product and one fused multiply-add. The CPU kernels, the CUDA kernels and the host tests
// compile these functions; vaekernels/reference.py is the only other statement of them.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "problem.h"

namespace vk {

// "Compute type" as in problem.h. All tensors are contiguous.
struct Aggregate {
  int64_t N = 0, M = 0, D = 0;
  DType dtype = DType::f32;
  Param param = Param::logvar;
  double lo = -std::numeric_limits<double>::infinity();  // bounds on the log-variance
  double hi = std::numeric_limits<double>::infinity();
  const void* z = nullptr;      // [N, D]
  const void* mu = nullptr;     // [M, D]
  const void* scale = nullptr;  // [M, D], read by `param`
  bool per_dim = false;

  // lw[i,j] = base, plus `own` where j is the sample's own posterior, first + i, plus `next` where it is the
  // one behind that, the first one behind the last. -inf leaves a posterior out.
  double base = 0, own = 0, next = 0;
  int64_t first = 0;

  bool weighted() const { return own != 0 || next != 0; }
  // Numbers that are kept of each sample: of all dimensions together, then of each.
  int64_t columns() const { return per_dim ? D + 1 : 1; }
};

struct AggregateForward : Aggregate {
  void* log_qz = nullptr;       // [N], compute type
  void* log_qz_dims = nullptr;  // [N, D], compute type; null without per_dim
  // [2, N, columns()], compute type: the largest term in units of log(2), and the sum of the terms over it.
  // Backward divides by the very sum of its terms; from log_qz, rounded at its own size, it would not.
  void* saved = nullptr;
};

struct AggregateBackward : Aggregate {
  const void* grad_qz = nullptr;    // [N], compute type; null: not used
  const void* grad_dims = nullptr;  // [N, D], compute type; null: not used
  const void* saved = nullptr;
  void* grad_z = nullptr;  // [N, D]
  void* grad_mu = nullptr;
  void* grad_scale = nullptr;  // [M, D]
};

// ---- one posterior in one dimension ----------------------------------------------------------------------

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

// log2 N(z) = peak - (root (z - mu))^2. Scaled before it is squared, the distance overflows no earlier than
// the density does.
template <class R>
struct Component {
  R mu, root, peak;
};

template <Param P, class R>
VK_FN Component<R> component_of(R mu, R s, const Bounds<R>& bounds) {
  const Scale<R> scale = scale_of<P>(s);
  const R x = bounds.clamp(scale.x);
  const bool inside = is_inside(scale.x, x);
  const R inverse = kHoldsSd<P> && inside ? scale.inverse : exp_of(-x);
  return {mu, R(0.8493218002880191) * inverse,        // sqrt(log2(e) / 2)
          R(-kLog2E) * (x + R(0.9189385332046727))};  // log(2 pi) / 2
}

// Named here, since std::numeric_limits is host code to nvcc.
template <class R>
VK_FN R minus_infinity() {
  return static_cast<R>(-INFINITY);
}
template <class R>
VK_FN R lowest();
template <>
VK_FN float lowest<float>() {
  return -3.402823466e+38f;
}
template <>
VK_FN double lowest<double>() {
  return -1.7976931348623157e+308;
}

// Where no posterior is: it adds nothing to any sum.
template <class R>
VK_FN Component<R> no_component() {
  return {R(0), R(0), minus_infinity<R>()};
}

VK_FN float minus_square(float c, float u) {
#if defined(__CUDA_ARCH__)
  return fmaf(-u, u, c);
#else
  return c - u * u;  // one instruction too, where there is one
#endif
}
VK_FN double minus_square(double c, double u) {
#if defined(__CUDA_ARCH__)
  return fma(-u, u, c);
#else
  return c - u * u;
#endif
}

template <class R>
VK_FN R log2_density(R z, const Component<R>& q) {
  return minus_square(q.peak, q.root * (z - q.mu));
}

// 2^x for x <= 0, relative error 1.5e-7; 0 below -126.5, NaN of NaN. 2^0 is 1.
#if defined(__CUDA_ARCH__)
VK_FN float power_of_two(float x) { return ex2_approx(x); }
VK_LONG_FN double power_of_two(double x) { return exp2(x); }
#else
VK_FN float power_of_two(float x) {
  const float above = x < -127.f ? -127.f : x;  // whose power is written as 0
  const float magic = 12583039.f;               // as in exp_parts_from
  const float t = above + magic;
  const float f = above - (t - magic);
  float p = 1.3264727e-3f;
  p = p * f + 9.671513e-3f;
  p = p * f + 5.5507336e-2f;
  p = p * f + 0.24022242f;
  p = p * f + 0.693147f;
  p = p * f + 1.f;
  return p * std::bit_cast<float>(std::bit_cast<uint32_t>(t) << 23);
}
// The power series of e^(f log 2): its next term is 5e-18 at |f| = 1/2.
VK_FN double power_of_two(double x) {
  const double above = x < -1023.0 ? -1023.0 : x;
  const double magic = 6755399441056767.0;  // 1.5 * 2^52 + 1023
  const double t = above + magic;
  const double f = above - (t - magic);
  double p = 1.3691488853904128e-12;
  p = p * f + 2.5678435993488202e-11;
  p = p * f + 4.4455382718708112e-10;
  p = p * f + 7.0549116208011229e-9;
  p = p * f + 1.0178086009239699e-7;
  p = p * f + 1.3215486790144308e-6;
  p = p * f + 1.5252733804059841e-5;
  p = p * f + 1.5403530393381608e-4;
  p = p * f + 1.3333558146428443e-3;
  p = p * f + 9.6181291076284769e-3;
  p = p * f + 5.5504108664821576e-2;
  p = p * f + 0.24022650695910072;
  p = p * f + 0.69314718055994529;
  p = p * f + 1.0;
  return p * std::bit_cast<double>(std::bit_cast<uint64_t>(t) << 52);
}
#endif

// ---- sums of terms ---------------------------------------------------------------------------------------

// The sum of 2^t over some terms, as 2^top times `sum`. The largest finite number below all stands for "no
// term yet": from -inf, the difference to a term of -inf would be NaN.
template <class R>
struct Powers {
  R top, sum;
};
template <class R>
VK_FN Powers<R> no_powers() {
  return {lowest<R>(), R(0)};
}

// NaN, which is in the sum, is passed over here.
template <class R>
VK_FN R larger(R a, R b) {
  return b > a ? b : a;
}

template <class R>
VK_FN Powers<R> operator+(const Powers<R>& a, const Powers<R>& b) {
  const R top = larger(a.top, b.top);
  return {top, a.sum * power_of_two(a.top - top) + b.sum * power_of_two(b.top - top)};
}

// The logarithm, in nats. -inf where every term was.
template <class R>
VK_FN R log_of_powers(const Powers<R>& p, R base) {
  return base + (R(kLn2) * p.top + log_of(p.sum));
}

// What a gradient of the logarithm is multiplied with the terms' powers by. Without any, it goes nowhere.
template <class R>
VK_FN R share_of(R grad, R sum) {
  return sum == R(0) ? R(0) : grad / sum;
}

// A term with its weight.
template <class R>
VK_FN R with_weight(R t, R weight) {
  return weight == minus_infinity<R>() ? weight : t + weight;
}

// ---- gradients -------------------------------------------------------------------------------------------

// What one term adds to the sums of the gradients, w being the gradient with respect to it:
//   pull = w root (z - mu), spread = pull (z - mu); with the root once more at the end, so that nothing
// overflows where w is 0.
template <class R>
struct PosteriorSums {
  R weight, pull, spread;
};

template <class R>
VK_FN R grad_z_of(R pulled) {  // the sum of pull * root
  return R(-2 * kLn2) * pulled;
}

// The gradients with respect to mu and s.
template <class R>
struct PosteriorGradients {
  R mu, scale;
};

template <Param P, class R>
VK_FN PosteriorGradients<R> posterior_gradients(R s, const Bounds<R>& bounds, R root,
                                                const PosteriorSums<R>& sums) {
  const Scale<R> scale = scale_of<P>(s);
  const R x = bounds.clamp(scale.x);
  const bool inside = is_inside(scale.x, x);
  const R twice = R(2 * kLn2) * root;
  return {twice * sums.pull, keep_if(inside, (twice * sums.spread - sums.weight) * scale.log_slope)};
}

}  // namespace vk
