// How far off the float32 formulas of csrc/math.h and csrc/philox.h are at most, against float64: with
// HOST_HALF those of the CPU; else those of the GPU, compiled for the CPU over special functions with the
// largest errors that PTX admits. Run by test_device_math.py; the argument multiplies those errors.
#if !defined(HOST_HALF)
#define __CUDA_ARCH__ 700
#define VK_SPECIAL_FUNCTIONS
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>

namespace {

double excuse = 1;        // times the errors
unsigned directions = 0;  // bit i: the errors of function i go up

#if !defined(HOST_HALF)
float off(double exact, double relative, double absolute, int function) {
  const double sign = (directions >> function & 1) != 0 ? excuse : -excuse;
  return static_cast<float>(exact * (1 + sign * relative) + sign * absolute);
}

#endif

}  // namespace

#if !defined(HOST_HALF)
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(M_PI * x);
  *cosine = std::cos(M_PI * x);
}

namespace vk {

// As PTX states them: for lg2 absolute between 1/2 and 2, for sin and cos within a turn.
inline float ex2_approx(float x) { return off(std::exp2(static_cast<double>(x)), 0x1p-22, 0, 0); }
inline float lg2_approx(float x) {
  const bool near = x > 0.5f && x < 2.f;
  return off(std::log2(static_cast<double>(x)), near ? 0 : 0x1p-22, near ? 0x1p-22 : 0, 1);
}
inline float sqrt_of(float x) { return off(std::sqrt(static_cast<double>(x)), 0x1p-23, 0, 2); }
inline float sin_approx(float x) { return off(std::sin(static_cast<double>(x)), 0, 6.8e-7, 3); }
inline float cos_approx(float x) { return off(std::cos(static_cast<double>(x)), 0, 6.8e-7, 4); }

}  // namespace vk
#endif

#include "philox.h"

namespace {

struct Worst {
  double error = 0;
  void see(double e) { error = std::isnan(e) ? e : (std::isnan(error) ? error : std::max(error, e)); }
};

double normal_error(uint32_t x, uint32_t y) {
  const vk::Pair<float> got = vk::box_muller(x, y, 0.f);
  const vk::Pair<double> exact = vk::box_muller(x, y, 0.0);
  return std::max(std::fabs(got.first - exact.first), std::fabs(got.second - exact.second));
}

Worst normals(std::mt19937_64& random) {
  Worst worst;
  // Where a radius is largest, where it is smallest, where the formula changes, and a sample of the others.
  for (uint32_t i = 0; i < 2000; ++i)
    for (const uint32_t x :
         {i, ~i, 0xFFC00000u - 1000 + i, 0x80000000u - 1000 + i, static_cast<uint32_t>(random())})
      for (const uint32_t y : {0u, 0x40000000u, 0x80000000u, 0xC0000000u, static_cast<uint32_t>(random())})
        worst.see(normal_error(x, y));
  return worst;
}

// e^y - 1 - y; the series where expm1(y) - y would cancel.
double excess_of(double y) {
  if (std::fabs(y) > 1) return std::expm1(y) - y;
  double sum = 0, term = y * y / 2;
  for (int n = 3; n < 40; ++n) {
    sum += term;
    term *= y / n;
  }
  return sum;
}

void exponentials(Worst& exp, Worst& excess, Worst& growth) {
  for (const float sign : {-1.f, 1.f})
    for (double size = 1e-6; size < 20; size *= 1.0003) {
      const float y = sign * static_cast<float>(size);
      const vk::Exp<float> e = vk::exp_parts_of_half(y);
      exp.see(std::fabs(e.exp / std::exp(0.5 * y) - 1));
      excess.see(std::fabs(e.excess / excess_of(y) - 1));
      growth.see(std::fabs(e.growth / std::expm1(static_cast<double>(y)) - 1));
    }
}

// Quads whose words come out otherwise when what they share is computed beforehand.
int wrong_quads(std::mt19937_64& random) {
  int wrong = 0;
  for (int i = 0; i < 100000; ++i) {
    const vk::PhiloxKeys keys = vk::philox_keys(random(), random());
    const auto quad = static_cast<uint32_t>(random());
    const vk::Words a = vk::philox(keys, uint64_t{quad}), b = vk::philox(vk::quad_keys(keys), quad);
    wrong += a.x0 != b.x0 || a.x1 != b.x1 || a.x2 != b.x2 || a.x3 != b.x3;
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  excuse = argc > 1 ? std::atof(argv[1]) : 1;
  std::mt19937_64 random(5);
  Worst normal, exp, excess, growth;
  for (directions = 0; directions < 32; ++directions) normal.see(normals(random).error);
  for (directions = 0; directions < 2; ++directions) exponentials(exp, excess, growth);
  std::printf("normal %.3g\nexp %.3g\nexcess %.3g\ngrowth %.3g\nwrong_quads %d\n", normal.error, exp.error,
              excess.error, growth.error, wrong_quads(random));
  for (const float y : {INFINITY, -INFINITY, NAN, 0.f, 200.f, -200.f}) {
    const vk::Exp<float> e = vk::exp_parts_of_half(y);
    std::printf("at %g %g %g %g\n", y, e.exp, e.excess, e.growth);
  }
  return 0;
}
