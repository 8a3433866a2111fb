// Random problems of the aggregate posterior, judged in float64.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "cuda/aggregate.h"
#include "inputs.h"
#include "outputs.h"
#include "shim.h"

namespace shim {

inline void check_error(cudaError_t error) {
  if (error != cudaSuccess) wrong(std::string("the launch failed: ") + cudaGetErrorString(error));
}

struct AggregateCase {
  vk::AggregateForward forward;
  vk::AggregateBackward backward;
  Array z, mu, scale, grad_qz, grad_dims;
  uint64_t seed;

  int64_t at(int64_t row, int64_t d) const { return row * forward.D + d; }
  vk::DType compute() const { return compute_type(forward.dtype); }
};

struct AggregateResults {
  Array log_qz, dims, saved, grad_z, grad_mu, grad_scale;
  std::vector<const Array*> all() const { return {&log_qz, &dims, &saved, &grad_z, &grad_mu, &grad_scale}; }
};

inline AggregateCase draw_aggregate(uint64_t index, int64_t most) {
  Random r(index);
  AggregateCase c;
  c.seed = r();
  vk::AggregateForward& f = c.forward;
  // Around the borders of the tiles, of 64 or 32 rows and 32 dimensions, and of the 4 to 16 rows of a block.
  f.N = chance(r, 0.2) ? between(r, 1, 4) : between(r, 1, 140);
  f.M = chance(r, 0.2) ? between(r, 1, 4) : between(r, 1, 140);
  f.D = chance(r, 0.3) ? between(r, 31, 70) : between(r, 1, 20);
  while (f.N * f.M * f.D > 8 * most) (f.N > f.M ? f.N : (f.M > 1 ? f.M : f.D)) /= 2;
  f.dtype = static_cast<vk::DType>(between(r, 0, 3));
  f.param = static_cast<vk::Param>(between(r, 0, 3));
  f.per_dim = chance(r, 0.7);
  f.base = -std::log(static_cast<double>(f.M));
  if (chance(r, 0.3)) {
    f.lo = -1;
    f.hi = 0.5;
  }
  if (f.M >= 2 && chance(r, 0.5)) {
    f.N = std::min(f.N, f.M);
    f.first = between(r, 0, f.M - f.N);
    f.own = chance(r, 0.5) ? -INFINITY : -2;
    f.next = f.own == -2 ? 1.5 : 0;
  }
  std::normal_distribution<double> gauss;
  c.z = Array(f.dtype, f.N * f.D, 0);
  c.mu = Array(f.dtype, f.M * f.D, 0);
  c.scale = Array(f.dtype, f.M * f.D, 0);
  for (int64_t i = 0; i < c.mu.count(); ++i) {
    c.mu.set(i, gauss(r));
    c.scale.set(i, second_of(uniform(r, -2.5, 1.5), f.param));
  }
  for (int64_t i = 0; i < c.z.count(); ++i) c.z.set(i, gauss(r) * 1.5);
  const bool both = chance(r, 0.6), all = !f.per_dim || chance(r, 0.5);
  if (both || all) {
    c.grad_qz = Array(c.compute(), f.N, 0);
    for (int64_t i = 0; i < f.N; ++i) c.grad_qz.set(i, gauss(r));
  }
  if (f.per_dim && (both || !all)) {
    c.grad_dims = Array(c.compute(), f.N * f.D, 0);
    for (int64_t i = 0; i < f.N * f.D; ++i) c.grad_dims.set(i, gauss(r));
  }
  f.z = c.z.data();
  f.mu = c.mu.data();
  f.scale = c.scale.data();
  static_cast<vk::Aggregate&>(c.backward) = f;
  c.backward.grad_qz = c.grad_qz.data();
  c.backward.grad_dims = c.grad_dims.data();
  return c;
}

// Both directions, in a schedule and in memory of their own.
inline AggregateResults run_aggregate(const AggregateCase& c, uint64_t seed, uint8_t fill) {
  settings().seed = seed;
  vk::AggregateForward f = c.forward;
  vk::AggregateBackward b = c.backward;
  AggregateResults out;
  out.log_qz = Array(c.compute(), f.N, fill);
  out.dims = Array(c.compute(), f.per_dim ? f.N * f.D : 0, fill);
  out.saved = Array(c.compute(), 2 * f.N * f.columns(), fill);
  out.grad_z = Array(f.dtype, f.N * f.D, fill);
  out.grad_mu = Array(f.dtype, f.M * f.D, fill);
  out.grad_scale = Array(f.dtype, f.M * f.D, fill);
  f.log_qz = out.log_qz.data();
  f.log_qz_dims = f.per_dim ? out.dims.data() : nullptr;
  f.saved = out.saved.data();
  b.saved = out.saved.data();
  b.grad_z = out.grad_z.data();
  b.grad_mu = out.grad_mu.data();
  b.grad_scale = out.grad_scale.data();
  const Guarded scratch(vk::cuda::aggregate_scratch(f), fill), more(vk::cuda::aggregate_scratch(b), fill);
  const int64_t before = launches();
  check_error(vk::cuda::aggregate(f, scratch.size() > 0 ? scratch.data() : nullptr, nullptr));
  check_error(vk::cuda::aggregate(b, more.size() > 0 ? more.data() : nullptr, nullptr));
  if (launches() != before + 2) wrong("not one launch each way");
  for (const Array* a : out.all())
    if (!a->memory->whole()) wrong("bytes beside a result were written");
  if (!scratch.whole() || !more.whole()) wrong("bytes beside the scratch memory were written");
  return out;
}

// The log-variance that an element stands for, and its derivative.
inline std::pair<double, double> log_variance_and_slope(double s, const vk::Aggregate& p) {
  double lv = s, slope = 1;
  if (p.param == vk::Param::log_std) {
    lv = 2 * s;
    slope = 2;
  } else if (p.param != vk::Param::logvar) {
    const bool std = p.param == vk::Param::std;
    const double sd = std ? s : std::log1p(std::exp(s));
    lv = 2 * std::log(sd);
    slope = 2 / sd * (std ? 1 : 1 / (1 + std::exp(-s)));
  }
  if (lv < p.lo || lv > p.hi) return {lv < p.lo ? p.lo : p.hi, 0};
  return {lv, slope};
}

inline void judge_aggregate(const AggregateCase& c, const AggregateResults& out) {
  const vk::AggregateForward& p = c.forward;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  const auto density = [&](int64_t i, int64_t j, int64_t d) {
    const double lv = log_variance_and_slope(c.scale.get(c.at(j, d)), p).first;
    const double distance = c.z.get(c.at(i, d)) - c.mu.get(c.at(j, d));
    return -0.5 * (distance * distance * std::exp(-lv) + lv + std::log(2 * M_PI));
  };
  const auto weight = [&](int64_t i, int64_t j) {
    const int64_t own = p.first + i;
    return p.base + (j == own ? p.own : (j == (own + 1) % p.M ? p.next : 0));
  };
  std::vector<double> grad_z(size(p.N * p.D)), grad_mu(size(p.M * p.D)), grad_scale(size(p.M * p.D));
  const double tolerance = p.dtype == vk::DType::f64 ? 1e-12 : 1e-5;
  const auto same = [&](double got, double expected, double tolerance, const char* what) {
    if (!(std::abs(got - expected) <= tolerance * (1 + std::abs(expected))))
      wrong(std::string(what) + ": " + std::to_string(got) + " for " + std::to_string(expected));
  };
  // Of one sum: the terms of `column`, 0 for all dimensions together, else one more than the dimension.
  const auto sum = [&](int64_t i, int64_t column, double grad, double got) {
    std::vector<double> t(size(p.M));
    double top = -INFINITY, total = 0;
    for (int64_t j = 0; j < p.M; ++j) {
      double& one = t[size(j)] = weight(i, j);
      for (int64_t d = column == 0 ? 0 : column - 1; d < (column == 0 ? p.D : column); ++d)
        one += density(i, j, d);
      top = std::max(top, one);
    }
    for (const double one : t) total += std::exp(one - top);
    same(got, top + std::log(total), tolerance, column == 0 ? "log_qz" : "log_qz_dims");
    for (int64_t j = 0; j < p.M; ++j) {
      const double w = grad * std::exp(t[size(j)] - top) / total;
      for (int64_t d = column == 0 ? 0 : column - 1; d < (column == 0 ? p.D : column); ++d) {
        const auto [lv, slope] = log_variance_and_slope(c.scale.get(c.at(j, d)), p);
        const double distance = c.z.get(c.at(i, d)) - c.mu.get(c.at(j, d)), precision = std::exp(-lv);
        grad_z[size(c.at(i, d))] -= w * distance * precision;
        grad_mu[size(c.at(j, d))] += w * distance * precision;
        grad_scale[size(c.at(j, d))] += w * 0.5 * (distance * distance * precision - 1) * slope;
      }
    }
  };
  for (int64_t i = 0; i < p.N; ++i) {
    sum(i, 0, c.grad_qz ? c.grad_qz.get(i) : 0, out.log_qz.get(i));
    for (int64_t d = 0; p.per_dim && d < p.D; ++d)
      sum(i, 1 + d, c.grad_dims ? c.grad_dims.get(c.at(i, d)) : 0, out.dims.get(c.at(i, d)));
  }
  const auto judge = [&](const Array& got, const std::vector<double>& expected, const char* what) {
    double largest = 1;
    for (const double x : expected) largest = std::max(largest, std::abs(x));
    const double rounding = p.dtype == vk::DType::bf16 ? 8e-3 : (p.dtype == vk::DType::f16 ? 1e-3 : 0);
    for (size_t i = 0; i < expected.size(); ++i)
      same(got.get(static_cast<int64_t>(i)), expected[i], 3 * tolerance * largest + rounding, what);
  };
  judge(out.grad_z, grad_z, "grad_z");
  judge(out.grad_mu, grad_mu, "grad_mu");
  judge(out.grad_scale, grad_scale, "grad_scale");
}

inline void solve_aggregate(uint64_t index, int64_t most) {
  const AggregateCase c = draw_aggregate(index, most);
  try {
    const AggregateResults first = run_aggregate(c, c.seed, 0x5A), again = run_aggregate(c, c.seed + 1, 0xA5);
    judge_aggregate(c, first);
    for (size_t i = 0; i < first.all().size(); ++i) {
      const Array &a = *first.all()[i], &b = *again.all()[i];
      if (std::memcmp(a.data(), b.data(), a.memory->size()) != 0)
        wrong("result " + std::to_string(i) + " differs in another schedule");
    }
  } catch (const std::exception& error) {
    const vk::AggregateForward& p = c.forward;
    wrong("aggregate problem " + std::to_string(index) + " N=" + std::to_string(p.N) +
          " M=" + std::to_string(p.M) + " D=" + std::to_string(p.D) + " dtype=" +
          std::to_string(static_cast<int>(p.dtype)) + " param=" + std::to_string(static_cast<int>(p.param)) +
          " per_dim=" + std::to_string(p.per_dim) + " own=" + std::to_string(p.own) + ": " + error.what());
  }
}

}  // namespace shim
