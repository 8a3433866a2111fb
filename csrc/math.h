// Elementary functions for the kernels, one name on host and device.
//
// The host versions are branch-free polynomials, because a call into libm stops the compiler from
// vectorising the loop around it. The device versions in float32 use the special-function unit. float64 goes
// to the platform's own libm on both sides: there accuracy counts and speed does not.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

// VK_LONG_FN: long float64 code, which nvcc takes 50 s more to compile when it is copied into every kernel.
#if defined(__CUDACC__)
#define VK_FN __host__ __device__ __forceinline__
#define VK_LONG_FN __host__ __device__ __noinline__ inline
#else
#define VK_FN inline __attribute__((always_inline))
#define VK_LONG_FN VK_FN
#endif

namespace vk {

// As a macro's value: std::numeric_limits is host code to nvcc.
template <class R>
VK_FN R nan_of() {
  return static_cast<R>(NAN);
}

// What exp(x) is made of, kept apart so that nothing cancels near x = 0.
template <class R>
struct Exp {
  R exp;     // e^x
  R growth;  // e^(2x) - 1
  R excess;  // e^(2x) - 1 - 2x, relative error < 1.2e-6 also where it is 1e-12
};

// The x that exp_parts takes. Between lo and hi e^x comes out as it is; beyond, as 0 or inf. They are numbers
// of a call rather than constants, because GCC makes one instruction of a bound that it does not know and
// three of one that it does.
struct AnyRange {
  float lo = -88.f;  // 2^-127, the exponent of `lo`, is written as 0
  float hi = 88.3f;  // the last whose power of two is finite
};
// The caller has seen that |x| <= 88, NaN excluded: the same bits from fewer instructions.
struct NearRange {};

// Beyond 24 the "- 1 - 2x" of the excess is below the rounding of e^(2x); stopping there keeps inf - inf out.
template <class R>
VK_FN R excess_far(R sd, R x) {
  const R near = x > R(24) ? R(24) : x;
  return sd * sd - (R(1) + R(2) * near);
}

#if defined(__CUDA_ARCH__)

// The special-function unit. A test brings its own, as far off as PTX lets them be.
#if !defined(VK_SPECIAL_FUNCTIONS)
VK_FN float lg2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VK_FN float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VK_FN float sqrt_of(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VK_FN float sin_approx(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VK_FN float cos_approx(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

VK_FN float log_of(float x) { return logf(x); }

// The parts of exp(y / 2). Relative errors for |y| from 1e-6 to 20, ex2.approx being off by 2^-22:
// exp 7.4e-7, growth 6.2e-6, excess 9.2e-6.
VK_FN Exp<float> exp_parts_of_half(float y) {
  const float e = ex2_approx(y * 0.72134752f);
  // e^y - 1 - y cancels near 0. Below 0.1 (y in [-0.49, 0.42]) it is y^2 (a + b y + e (c + b y)), fitted to
  // 6.8e-6: e brings the higher powers of y with it, which leaves three products where a polynomial needs
  // five. The test is false for NaN, which inf - inf is: then y^2 (...) gives the inf, or the NaN.
  const float direct = fmaf(e, e, -1.f - y);
  const float series = y * y * fmaf(e, fmaf(y, 0.03273098f, 0.20241277f), fmaf(y, 0.03273098f, 0.29759061f));
  // e^y - 1 = y (a + b y + c e), fitted to 3.5e-6 below 0.1.
  const float steep = y * fmaf(e, 1.3335416f, fmaf(y, -0.16666667f, -0.33354162f));
  return {e, fabsf(y) < 0.1f ? steep : fmaf(e, e, -1.f), direct >= 0.1f ? direct : series};
}
VK_FN Exp<float> exp_parts(float x, const AnyRange& = {}) { return exp_parts_of_half(x + x); }

// lo or hi where x is beyond them; NaN stays NaN.
VK_FN float clamp_of(float x, float lo, float hi) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(lo));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(y), "f"(hi));
  return y;
#else
  return x < lo ? lo : (x > hi ? hi : x);
#endif
}

#else

// e^x = 2^m e^g with |g| <= ln(2)/2. Where m = 0 nothing is added to small numbers, so that growth and excess
// have no rounding of 1 in them; elsewhere |2x| > ln(2), and the plain differences lose little. Largest
// relative error of e^g - 1 - g on the reduced range: 1.3e-7 before rounding.
//
// `rounded` gives m, `above` g, `below` the 2x of the excess: all of them x, but for the ends of AnyRange.
VK_FN Exp<float> exp_parts_from(float rounded, float above, float below) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the float; 127 more, and they are
  // the exponent of 2^m.
  const float magic = 12583039.f;
  const float t = rounded * 1.44269504088896f + magic;
  const float m = t - magic;
  // One step, since float32's ln(2) is good to 1.9e-9: 1.7e-7 of the result at |x| = 88.
  const float g = above - m * 0.693147182f;
  float p = 1.39414e-3f;
  p = p * g + 8.36335e-3f;
  p = p * g + 4.166637e-2f;
  p = p * g + 0.16666576f;
  p = p * g + 0.5f;
  // Every product that meets an addition is used there alone: then the compiler fuses the two wherever this
  // is inlined, and e^x has the same bits with and without its companions.
  const float gp = g * p;
  const float q = gp * g + g;  // e^g - 1
  const float power = std::bit_cast<float>(std::bit_cast<uint32_t>(t) << 23);
  const float e = power * q + power;
  const bool near = std::bit_cast<uint32_t>(t) == std::bit_cast<uint32_t>(magic);  // m = 0, so g = x
  return {e, near ? q * (2.f + q) : e * e - 1.f,
          near ? q * q + gp * (g + g) : e * e - (1.f + (below + below))};
}

VK_FN Exp<float> exp_parts(float x, const NearRange&) { return exp_parts_from(x, x, x); }

VK_FN Exp<float> exp_parts(float x, const AnyRange& range = {}) {
  const float above = x < range.lo ? range.lo : x;  // NaN passes through both tests
  const float rounded = above > range.hi ? range.hi : above;
  const float below = x > range.hi ? range.hi : x;  // keeps inf - inf out of the excess
  // From `above`: beyond the range's end g grows, and with it the result, to inf.
  return exp_parts_from(rounded, above, below);
}

// Natural logarithm of a positive finite number whose complement is known: where x is in [sqrt(1/2),
// sqrt(2)), `minus_one` stands for x - 1 and carries the digits that x itself has lost. Relative error <
// 1e-7.
VK_FN float log_reduced(float x, float minus_one) {
  // Unsigned, so that the bits of any x, -0 and negative ones included, may wrap around.
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const int32_t e = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float m = std::bit_cast<float>(bits - (static_cast<uint32_t>(e) << 23));
  const float f = e == 0 ? minus_one : m - 1.f;
  float p = -0.07634499f;
  p = p * f + 0.12761578f;
  p = p * f - 0.13160183f;
  p = p * f + 0.14201757f;
  p = p * f - 0.16623357f;
  p = p * f + 0.20001227f;
  p = p * f - 0.2500082f;
  p = p * f + 0.3333333f;
  const float f2 = f * f;
  const float tail = f2 * (f * p - 0.5f);
  const float scale = static_cast<float>(e);
  return f + (tail - scale * 2.12194440e-4f) + scale * 0.693359375f;
}

VK_FN float log_of(float x) {
  const float tiny = x < 1.17549435e-38f ? x * 8388608.f : x;  // subnormals have no exponent to read
  float y = log_reduced(tiny, tiny - 1.f) - (x < 1.17549435e-38f ? 15.942385152f : 0.f);
  y = x == 0.f ? -std::numeric_limits<float>::infinity() : y;
  y = x < 0.f ? std::numeric_limits<float>::quiet_NaN() : y;
  return x < std::numeric_limits<float>::infinity() ? y : x;  // inf and NaN
}

VK_FN float sqrt_of(float x) { return std::sqrt(x); }

VK_FN Exp<float> exp_parts_of_half(float y) { return exp_parts(0.5f * y); }

// log(1 + y) for 0 <= y <= 1, relative error < 1.3e-7; NaN of NaN. The upper half as log(2) +
// log(1 + (y - 1) / 2), which keeps the digits that 1 + y has no room for.
VK_FN float log1p_of(float y) {
  const bool upper = y > 0.41421356f;
  const float f = upper ? (y - 1.f) * 0.5f : y;
  const float log = log_reduced(1.f + f, f) + (upper ? 0.69314718f : 0.f);
  return y <= 1.f ? log : y;  // log_reduced makes some number of a NaN
}

VK_FN float clamp_of(float x, float lo, float hi) {
  const float above = x < lo ? lo : x;  // a step each, which is an instruction each
  return above > hi ? hi : above;
}

#endif

VK_FN double clamp_of(double x, double lo, double hi) { return x < lo ? lo : (x > hi ? hi : x); }

VK_LONG_FN double log_of(double x) { return log(x); }
VK_FN double sqrt_of(double x) { return sqrt(x); }

VK_LONG_FN Exp<double> exp_parts(double x, const AnyRange& = {}) {
  const double q = expm1(x);
  const double e = exp(x);
  // |x| < 1/2: sum x^n / n! from n = 2; the term n = 18 is below 1e-21 of the first.
  double p = 1.0 / 6402373705728000.0;
  const double inverse_factorial[] = {1.0 / 355687428096000.0,
                                      1.0 / 20922789888000.0,
                                      1.0 / 1307674368000.0,
                                      1.0 / 87178291200.0,
                                      1.0 / 6227020800.0,
                                      1.0 / 479001600.0,
                                      1.0 / 39916800.0,
                                      1.0 / 3628800.0,
                                      1.0 / 362880.0,
                                      1.0 / 40320.0,
                                      1.0 / 5040.0,
                                      1.0 / 720.0,
                                      1.0 / 120.0,
                                      1.0 / 24.0,
                                      1.0 / 6.0,
                                      0.5};
  for (double c : inverse_factorial) p = p * x + c;
  const double q2 = x * x * p;
  const bool small = fabs(x) < 0.5;
  return {e, small ? q * (2.0 + q) : e * e - 1.0, small ? q * q + 2.0 * q2 : excess_far(e, x)};
}

VK_FN Exp<double> exp_parts_of_half(double y) { return exp_parts(0.5 * y); }

// x where `keep` holds, else 0. On the host as a mask, because the compiler turns a conditional around a long
// expression into a branch and then gives up vectorising (20 ns per element instead of 1).
#if defined(__CUDA_ARCH__)
template <class R>
VK_FN R keep_if(bool keep, R x) {
  return keep ? x : R(0);
}
#else
VK_FN float keep_if(bool keep, float x) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & (0u - static_cast<uint32_t>(keep)));
}
VK_FN double keep_if(bool keep, double x) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & (uint64_t{0} - static_cast<uint64_t>(keep)));
}
#endif

// The same where nothing better is at hand; the quotient repairs the rounding of 1 + y.
template <class R>
VK_FN R log1p_of(R y) {
  const R u = R(1) + y;
  const R d = u - R(1);
  return d == R(0) ? y : log_of(u) * (y / d);
}

}  // namespace vk
