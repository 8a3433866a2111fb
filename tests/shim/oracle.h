// The latent layer in float64, from its definition: what a problem's results are, and how far rounding may
// take a kernel from them. Shares no formula with csrc.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cases.h"

namespace shim {

// A number, and what error it may have.
struct Expected {
  double value = 0, tolerance = 0;
  bool accepts(double got) const {
    if (std::isnan(value)) return std::isnan(got);
    if (std::isinf(value)) return got == value;
    return std::fabs(got - value) <= tolerance;
  }
};

// ---- random numbers --------------------------------------------------------------------------------------

// Element `index` of the stream of normals: Philox4x32-10 (Salmon et al. 2011), then Box-Muller.
inline double normal(uint64_t seed, uint64_t offset, uint64_t index) {
  uint32_t c[4] = {static_cast<uint32_t>(offset / 4), static_cast<uint32_t>(offset / 4 >> 32),
                   static_cast<uint32_t>(index / 4), static_cast<uint32_t>(index / 4 >> 32)};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{0xD2511F53} * c[0], q = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(q >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(q),
                              static_cast<uint32_t>(p >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p)};
    std::memcpy(c, next, sizeof(c));
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  const uint32_t* pair = c + index % 4 / 2 * 2;
  const double r = std::sqrt(-2 * std::log((pair[0] + 0.5) * 0x1p-32)), angle = 2 * M_PI * pair[1] * 0x1p-32;
  return index % 2 == 0 ? r * std::cos(angle) : r * std::sin(angle);
}

// ---- rounding --------------------------------------------------------------------------------------------

// Distances between neighbours at x.
inline double ulp(double x, vk::DType dtype) {
  const int digits[] = {23, 52, 7, 10}, smallest[] = {-126, -1022, -126, -14};
  const int d = static_cast<int>(dtype);
  const int e = x == 0 ? smallest[d] : std::max(smallest[d], std::ilogb(x));
  return std::ldexp(1.0, e - digits[d]);
}

// Of the arithmetic: the unit of rounding, the error of a normal, and the relative error of a KL and of each
// term of a gradient (exponentials, divisions and products, each of a few units).
struct Precision {
  double unit, normal, term;
  explicit Precision(vk::DType dtype)
      : unit(dtype == vk::DType::f64 ? 0x1p-52 : 0x1p-23),
        normal(dtype == vk::DType::f64 ? 1e-13 : 1e-5),
        term(32 * unit) {}
  // Of a sum of n numbers of one sign: partial sums are rounded this way and that.
  double sum(double n) const { return unit * (16 + 4 * std::sqrt(n)); }
};

// ---- elements --------------------------------------------------------------------------------------------

struct ScaleOf {
  double lv;        // log-variance, before bounds
  double slope;     // d(lv / 2)/ds
  double lv_error;  // that rounding makes where the standard deviation is what is given
};

inline ScaleOf scale_of(double s, vk::Param param, const Precision& e) {
  switch (param) {
    case vk::Param::logvar:
      return {s, 0.5, 0};
    case vk::Param::log_std:
      return {2 * s, 1, 0};
    case vk::Param::std:
      return {2 * std::log(s), 1 / s, 4 * e.unit * std::fabs(2 * std::log(s))};
    default: {
      const double sd = std::log1p(std::exp(s));
      return {2 * std::log(sd), 1 / (1 + std::exp(-s)) / sd, 8 * e.unit * (1 + std::fabs(2 * std::log(sd)))};
    }
  }
}

// e^x - 1 - x without cancellation.
inline double excess(double x) {
  if (std::fabs(x) > 0.1) return std::expm1(x) - x;
  double term = x * x / 2, sum = term;
  for (int n = 3; n < 20; ++n) sum += term *= x / n;
  return sum;
}

inline constexpr double kBounds[] = {-1.0, 0.5};

struct Element {
  double mu, sd, lv;
  double sd_slope;  // d sd/ds
  double kl, kl_error;
  double kl_mu, kl_s, kl_s_size;  // derivatives of the KL, and of the second the size of its terms
  double kl_prior_mu, kl_prior_s, kl_prior_s_size;
  bool passes, on_edge;  // the bounds let the gradient through; rounding may decide
};

inline Element element_of(double mu, double s, const double* prior, const Case& c, const Precision& e) {
  Element x{};
  const ScaleOf q = scale_of(s, c.param, e);
  x.mu = mu;
  x.lv = q.lv;
  x.passes = true;
  if (c.bounded) {
    if (q.lv < kBounds[0]) x.lv = kBounds[0];
    if (q.lv > kBounds[1]) x.lv = kBounds[1];
    x.passes = !(q.lv < kBounds[0] || q.lv > kBounds[1]);
    for (const double bound : kBounds) x.on_edge = x.on_edge || std::fabs(q.lv - bound) <= q.lv_error * 4;
  }
  x.sd = std::exp(x.lv / 2);
  x.sd_slope = x.sd * q.slope;
  const ScaleOf p = prior != nullptr ? scale_of(prior[1], c.param, e) : ScaleOf{0, 0, 0};
  const double mp = prior != nullptr ? prior[0] : 0, t = x.lv - p.lv;
  const double distance = (mu - mp) * std::exp(-p.lv / 2);
  x.kl = 0.5 * (distance * distance + excess(t));
  // Log-variances that were rounded move the excess by its slope.
  const double t_error = q.lv_error + p.lv_error + e.unit * std::fabs(t);
  x.kl_error = e.term * x.kl + (std::fabs(std::expm1(t)) + t_error) * t_error;
  const double growth = std::expm1(t);
  x.kl_mu = distance * std::exp(-p.lv / 2);
  x.kl_s = growth * q.slope;
  x.kl_s_size = (std::fabs(growth) + (1 + std::fabs(growth)) * t_error / e.term) * q.slope;
  x.kl_prior_mu = -x.kl_mu;
  x.kl_prior_s = -(growth + distance * distance) * p.slope;
  x.kl_prior_s_size =
      (std::fabs(growth) + distance * distance + (1 + std::fabs(growth)) * t_error / e.term) * p.slope;
  return x;
}

}  // namespace shim
