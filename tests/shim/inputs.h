// The numbers of a problem, and what the oracle makes of them element by element and cell by cell.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "oracle.h"

namespace shim {

struct Inputs {
  Array mu, scale, prior_mu, prior_scale;
  Array weight, thresholds;  // compute type, [B] and [G]
  double free_bits = 0;
  Array grad_z, grad_kl, grad_rate;
  Array state;  // int64[2], as bytes
  uint64_t seed = 0, offset = 0;
  double posterior_share = 1, prior_share = 1;

  std::vector<const Array*> all() const {
    return {&mu,         &scale,  &prior_mu, &prior_scale, &weight,
            &thresholds, &grad_z, &grad_kl,  &grad_rate,   &state};
  }
};

inline double second_of(double lv, vk::Param param) {
  const double sd = std::exp(lv / 2);
  switch (param) {
    case vk::Param::logvar:
      return lv;
    case vk::Param::log_std:
      return lv / 2;
    case vk::Param::std:
      return sd;
    default:
      return std::log(std::expm1(sd));
  }
}

// [count] numbers of the compute type.
inline Array numbers(const Case& c, int64_t count, uint8_t fill) {
  return Array(compute_type(c.dtype), count, fill);
}

inline Inputs inputs_of(const Case& c) {
  Random r(c.seed);
  std::normal_distribution<double> gauss;
  Inputs in;
  in.mu = lay(c, c.mu, 0x7F, 0);
  in.scale = lay(c, c.scale, 0x7F, 1, c.scale == Lie::halves ? in.mu : Array());
  const double size = c.near_prior ? 1e-3 : 1;
  const auto fill = [&](const Array& mu, const Array& scale, double shift) {
    for_elements(c, [&](int64_t b, int64_t g, int64_t s, int64_t) {
      mu.set(mu.offset(b, g, s), (gauss(r) * 0.8 + shift) * size);
      scale.set(scale.offset(b, g, s),
                second_of(c.near_prior ? gauss(r) * size : uniform(r, -2.5, 1.5), c.param));
    });
  };
  fill(in.mu, in.scale, 0);
  if (c.prior) {
    in.prior_mu = lay(c, c.prior_lie, 0x7F);
    in.prior_scale = lay(c, c.prior_lie, 0x7F);
    fill(in.prior_mu, in.prior_scale, 0.3);
  }
  if (c.nan)
    in.mu.set(in.mu.offset(between(r, 0, c.B - 1), between(r, 0, c.G - 1), between(r, 0, c.S - 1)), NAN);
  in.seed = r();
  in.offset = 4 * (r() >> 3);
  in.state = Array(vk::DType::f64, 2, 0);
  store(in.state.data(), in.seed);
  store(in.state.data() + 8, in.offset);
  if (c.balance) {
    in.posterior_share = 0.2;
    in.prior_share = 0.8;
  }
  if (c.weight != Case::Weight::none) {
    in.weight = numbers(c, c.B, 0);
    for (int64_t b = 0; b < c.B; ++b)
      in.weight.set(b, c.weight == Case::Weight::zero || chance(r, 0.2) ? 0 : uniform(r, 0, 3));
  }
  const auto random_numbers = [&](Array& a) {
    for (int64_t i = 0; i < a.count(); ++i) a.set(i, gauss(r));
  };
  if (c.use_z && c.K > 0) {
    in.grad_z = Array(c.dtype, c.K * c.numel(), 0, c.misaligned % 3 == 1 ? c.misaligned : 0);
    random_numbers(in.grad_z);
  }
  if (c.use_kl) {
    const bool elements = c.reduction == vk::Reduction::elementwise;
    const int64_t count = elements ? c.numel() : (c.reduction == vk::Reduction::none ? c.B : 1);
    in.grad_kl = Array(compute_type(c.dtype), count, 0, elements && c.misaligned % 3 == 2 ? 1 : 0);
    random_numbers(in.grad_kl);
  }
  if (c.use_rate) {
    in.grad_rate = numbers(c, c.G, 0);
    random_numbers(in.grad_rate);
  }
  return in;
}

// Both passes look at the same elements.
struct Elements {
  std::vector<Element> all;                // in the order of z's storage
  std::vector<double> cells, cell_errors;  // KL[b, g]
  std::vector<double> rates, rate_errors, sums;
  double weight = 0;  // of all rows
};

inline double weight_of(const Inputs& in, int64_t b) { return in.weight ? in.weight.get(b) : 1; }

inline Elements elements_of(const Case& c, const Inputs& in) {
  const Precision e(c.dtype);
  Elements x;
  x.cells.assign(static_cast<size_t>(c.B * c.G), 0);
  x.cell_errors = x.cells;
  x.sums.assign(static_cast<size_t>(c.G), 0);
  x.rates = x.rate_errors = x.sums;
  for_elements(c, [&](int64_t b, int64_t g, int64_t s, int64_t) {
    double prior[2];
    if (in.prior_mu) {
      prior[0] = in.prior_mu.get(in.prior_mu.offset(b, g, s));
      prior[1] = in.prior_scale.get(in.prior_scale.offset(b, g, s));
    }
    const Element at = element_of(in.mu.get(in.mu.offset(b, g, s)), in.scale.get(in.scale.offset(b, g, s)),
                                  in.prior_mu ? prior : nullptr, c, e);
    x.all.push_back(at);
    x.cells[static_cast<size_t>(b * c.G + g)] += at.kl;
    x.cell_errors[static_cast<size_t>(b * c.G + g)] += at.kl_error;
  });
  for (int64_t b = 0; b < c.B; ++b) x.weight += weight_of(in, b);
  for (size_t i = 0; i < x.cells.size(); ++i)
    x.cell_errors[i] += e.sum(static_cast<double>(c.S)) * x.cells[i];
  for (int64_t g = 0; g < c.G; ++g) {
    const auto at = static_cast<size_t>(g);
    double error = 0;
    for (int64_t b = 0; b < c.B; ++b) {
      const auto cell = static_cast<size_t>(b * c.G + g);
      x.sums[at] += weight_of(in, b) * x.cells[cell];
      error += weight_of(in, b) * x.cell_errors[cell];
    }
    x.rates[at] = x.sums[at] / x.weight;
    x.rate_errors[at] = error / x.weight + e.sum(static_cast<double>(c.B)) * x.rates[at];
  }
  return x;
}

// Thresholds about as large as what they clamp, so that some gates are open and some are not.
inline void choose_thresholds(const Case& c, const Elements& x, Inputs& in) {
  if (c.clamp == vk::Clamp::none) return;
  Random r(c.seed + 1);
  const std::vector<double>& values = c.clamp == vk::Clamp::batch ? x.rates : x.cells;
  const auto typical = [&] {
    const double v = values.empty() ? 1 : values[r() % values.size()];
    return std::isfinite(v) ? v * uniform(r, 0.5, 1.5) : 1.0;
  };
  const bool wide = c.dtype == vk::DType::f64;
  in.free_bits = wide ? typical() : static_cast<double>(static_cast<float>(typical()));
  if (!c.bits_per_group) return;
  in.thresholds = numbers(c, c.G, 0);
  for (int64_t g = 0; g < c.G; ++g) in.thresholds.set(g, typical());
}

inline double threshold(const Inputs& in, int64_t g) {
  return in.thresholds ? in.thresholds.get(g) : in.free_bits;
}

}  // namespace shim
