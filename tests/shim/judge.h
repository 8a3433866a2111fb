// Compares what kernels left with the oracle.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "inputs.h"
#include "outputs.h"

namespace shim {

inline void check(const Expected& e, double got, const std::string& what, int64_t i) {
  if (!e.accepts(got))
    wrong(what + "[" + std::to_string(i) + "] is " + number(got) + ", float64 says " + number(e.value) +
          " within " + number(e.tolerance));
}

inline bool is_open(const Outputs& out, const Case& c, int64_t b, int64_t g) {
  const int64_t cell = b * c.G + g;
  return (find(out, "open").data()[cell / 8] >> (cell % 8) & 1) != 0;
}

// f(x; threshold) as the kernel's gate decides, which is right wherever rounding leaves no doubt.
inline Expected clamped(const Case& c, double x, double error, double lambda, bool open,
                        const std::string& what) {
  if (std::fabs(x - lambda) > error && open != (x >= lambda))
    wrong(what + " is " + (open ? "open" : "closed") + " at " + number(x) + ", threshold " + number(lambda));
  if (std::isnan(x)) {
    if (open) wrong(what + " is open at nan");
    return {x, 0};
  }
  switch (c.penalty) {
    case vk::Penalty::floor:
      return {open ? x : lambda, error};
    case vk::Penalty::hinge:
      return {open ? x - lambda : 0, error + Precision(c.dtype).unit * (std::fabs(x) + lambda)};
    default:
      return {open ? x : 0, open ? error : 0};
  }
}

inline void judge_samples(const Case& c, const Inputs& in, const Elements& x, const Outputs& out) {
  const Precision e(c.dtype);
  const Array& z = find(out, "z");
  for (int64_t i = 0; i < c.K * c.numel(); ++i) {
    const Element& at = x.all[static_cast<size_t>(i % c.numel())];
    const double noise = at.sd * normal(in.seed, in.offset, static_cast<uint64_t>(i));
    const double size = std::max({std::fabs(at.mu), std::fabs(noise), std::fabs(at.mu + noise)});
    check({at.mu + noise, e.normal * at.sd + e.term * std::fabs(noise) + 2 * ulp(size, c.dtype)}, z.get(i),
          "z", i);
  }
  if (const Array& state = find(out, "state"))
    if (load<uint64_t>(state.data()) != in.seed || load<uint64_t>(state.data() + 8) != in.offset)
      wrong("the state that was left is another one");
}

inline void judge_kl(const Case& c, const Inputs& in, const Elements& x, const Outputs& out) {
  const Precision e(c.dtype);
  const Array &kl = find(out, "kl"), &rates = find(out, "kl_per_group"), &gate = find(out, "gate");
  const double inverse = 1 / x.weight, weight_error = e.sum(static_cast<double>(c.B));
  const auto all = static_cast<double>(c.B * c.G);
  Expected loss{0, 0};
  const auto add = [&loss](const Expected& part, double weight) {
    loss.value += weight * part.value;
    loss.tolerance += weight * part.tolerance;
  };
  for (int64_t g = 0; g < c.G; ++g) {
    const auto at = static_cast<size_t>(g);
    const double factor = c.group_sums ? x.weight : 1;
    const double value = c.group_sums ? x.sums[at] : x.rates[at];
    const double error = x.weight > 0 ? x.rate_errors[at] * factor : 0;
    check({value, error}, rates.get(g), "kl_per_group", g);
    if (c.clamp != vk::Clamp::batch) continue;
    const bool open = !std::signbit(gate.get(g)) && x.weight != 0 && !std::isnan(x.rates[at]);
    check({open ? inverse : -inverse, weight_error * inverse}, x.weight == 0 ? -inverse : gate.get(g), "gate",
          g);
    add(clamped(c, x.rates[at], x.rate_errors[at], threshold(in, g), open, "gate " + std::to_string(g)), 1);
  }
  if (c.clamp != vk::Clamp::batch) check({inverse, weight_error * inverse}, gate.get(0), "gate", 0);
  for (int64_t b = 0; b < c.B; ++b) {
    Expected row{0, 0};
    double sizes = 0;
    for (int64_t g = 0; g < c.G; ++g) {
      const auto cell = static_cast<size_t>(b * c.G + g);
      Expected value{x.cells[cell], x.cell_errors[cell]};
      if (c.clamp == vk::Clamp::sample)
        value = clamped(c, value.value, value.tolerance, threshold(in, g), is_open(out, c, b, g),
                        "cell [" + std::to_string(b) + "," + std::to_string(g) + "]");
      row.value += value.value;
      row.tolerance += value.tolerance;
      sizes += std::fabs(value.value);
    }
    row.tolerance += e.sum(static_cast<double>(c.G)) * sizes;
    if (c.reduction == vk::Reduction::none) check(row, kl.get(b), "kl", b);
    if (c.clamp != vk::Clamp::batch) add(row, weight_of(in, b));
  }
  if (c.reduction == vk::Reduction::elementwise)
    for (int64_t i = 0; i < c.numel(); ++i)
      check({x.all[static_cast<size_t>(i)].kl, x.all[static_cast<size_t>(i)].kl_error}, kl.get(i), "kl", i);
  if (c.reduction == vk::Reduction::none || c.reduction == vk::Reduction::elementwise) return;

  loss.tolerance += e.sum(all) * std::fabs(loss.value);
  double factor = c.clamp == vk::Clamp::batch ? 1 : inverse;
  if (c.reduction == vk::Reduction::sum) factor *= x.weight;
  if (c.reduction == vk::Reduction::mean) factor /= static_cast<double>(c.G * c.S);
  if (x.weight == 0)
    loss = {c.reduction == vk::Reduction::sum ? 0.0 : NAN, 0};
  else
    loss = {loss.value * factor, loss.tolerance * factor + weight_error * std::fabs(loss.value * factor)};
  // Rows of weight 0 make 0 of a finite KL only.
  if (x.weight == 0 && c.nan) loss.value = NAN;
  check(loss, kl.get(0), "kl", 0);
}

inline void judge_gradients(const Case& c, const Inputs& in, const Elements& x, const Outputs& forward,
                            const Outputs& out) {
  const Precision e(c.dtype);
  const bool kl_used = c.use_kl || c.use_rate;
  const bool rows = c.reduction == vk::Reduction::none, elements = c.reduction == vk::Reduction::elementwise;
  double gain = 0;
  if (c.use_kl && !rows && !elements) {
    gain = in.grad_kl.get(0);
    if (c.reduction != vk::Reduction::sum) gain /= x.weight;
    if (c.reduction == vk::Reduction::mean) gain /= static_cast<double>(c.G * c.S);
  }
  const Array &gate = find(forward, "gate"), grad_mu = find(out, "grad_mu"), grad_s = find(out, "grad_scale");
  const Array &grad_prior_mu = find(out, "grad_prior_mu"), &grad_prior_s = find(out, "grad_prior_scale");
  for_elements(c, [&](int64_t b, int64_t g, int64_t s, int64_t i) {
    const Element& at = x.all[static_cast<size_t>(i)];
    // The gradient with respect to the element's KL, and the size of its terms.
    double coefficient = 0, terms = 0;
    const auto add = [&](double term) {
      coefficient += term;
      terms += std::fabs(term);
    };
    if (c.use_rate) add(in.grad_rate.get(g) * (c.group_sums ? 1 : 1 / x.weight));
    if (c.use_kl && !elements) {
      bool open = true;
      if (c.clamp == vk::Clamp::batch) open = !std::signbit(gate.get(g));
      if (c.clamp == vk::Clamp::sample) open = is_open(forward, c, b, g);
      if (open) add(rows ? in.grad_kl.get(b) : gain);
    }
    coefficient *= weight_of(in, b);
    terms *= weight_of(in, b);
    if (c.use_kl && elements) add(in.grad_kl.get(i));
    double sum = 0, sum_size = 0, noise = 0, noise_size = 0, noise_error = 0;
    for (int64_t k = 0; c.use_z && k < c.K; ++k) {
      const double grad = in.grad_z.get(k * c.numel() + i);
      const double eps = normal(in.seed, in.offset, static_cast<uint64_t>(k * c.numel() + i));
      sum += grad;
      sum_size += std::fabs(grad);
      noise += grad * eps;
      noise_size += std::fabs(grad * eps);
      noise_error += std::fabs(grad) * e.normal;
    }
    if (!kl_used) coefficient = terms = 0;
    const double q = coefficient * in.posterior_share, p = coefficient * in.prior_share;
    const double q_size = terms * in.posterior_share, p_size = terms * in.prior_share;
    const auto compare = [&](const Array& array, const char* name, double value, double error, double size) {
      if (!array) return;
      check({value, error + e.term * size +
                        2 * ulp(std::max(std::fabs(value), std::isnan(size) ? 0 : size), c.dtype)},
            array.get(array.offset(b, g, s)), name, i);
    };
    compare(grad_mu, "grad_mu", sum + (kl_used ? q * at.kl_mu : 0), 0,
            sum_size + (kl_used ? q_size * std::fabs(at.kl_mu) : 0));
    if (!at.passes && !at.on_edge) compare(grad_s, "grad_scale", 0, 0, 0);
    if (at.passes && !at.on_edge)
      compare(grad_s, "grad_scale", noise * at.sd_slope + (kl_used ? q * at.kl_s : 0),
              noise_error * at.sd_slope, noise_size * at.sd_slope + (kl_used ? q_size * at.kl_s_size : 0));
    compare(grad_prior_mu, "grad_prior_mu", p * at.kl_prior_mu, 0, p_size * std::fabs(at.kl_prior_mu));
    compare(grad_prior_s, "grad_prior_scale", p * at.kl_prior_s, 0, p_size * at.kl_prior_s_size);
  });
}

}  // namespace shim
