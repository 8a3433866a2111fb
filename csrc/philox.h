// Counter-based normals: Philox4x32-10 (Salmon et al. 2011) and the Box-Muller transform.
//
// The stream is frozen. Key = seed; counter words (0, 1) = offset / 4, words (2, 3) = index of a quad of four
// consecutive elements of z in storage order. The four words of a quad give two Box-Muller pairs: (x0, x1)
// the elements 0 and 1, (x2, x3) the elements 2 and 3.
#pragma once

#include <cstdint>

#include "math.h"

namespace vk {

inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

// The same for every counter of one call: the round keys and the first two counter words.
struct PhiloxKeys {
  uint32_t round[2 * kPhiloxRounds];
  uint32_t c0, c1;
};

VK_FN PhiloxKeys philox_keys(uint64_t seed, uint64_t offset) {
  PhiloxKeys keys;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r) {
    keys.round[2 * r] = k0;
    keys.round[2 * r + 1] = k1;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  keys.c0 = static_cast<uint32_t>(offset >> 2);
  keys.c1 = static_cast<uint32_t>(offset >> 34);
  return keys;
}

struct Words {
  uint32_t x0, x1, x2, x3;
};

#if defined(__CUDA_ARCH__)

VK_FN Words philox(const PhiloxKeys& keys, uint64_t quad) {
  Words c{keys.c0, keys.c1, static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32)};
#pragma unroll
  for (int r = 0; r < kPhiloxRounds; ++r) {
    const uint64_t a = static_cast<uint64_t>(kPhiloxM0) * c.x0;
    const uint64_t b = static_cast<uint64_t>(kPhiloxM1) * c.x2;
    c = {static_cast<uint32_t>(b >> 32) ^ c.x1 ^ keys.round[2 * r], static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c.x3 ^ keys.round[2 * r + 1], static_cast<uint32_t>(a)};
  }
  return c;
}

#else

// The host holds each word in a 64-bit lane whose upper half may be anything: a product needs only the lower
// half of its factors, so the vectorised loop does without a single shuffle (1.15 against 1.40 ns per
// element for 32-bit lanes, AVX-512).
VK_FN Words philox(const PhiloxKeys& keys, uint64_t quad) {
  const uint64_t low = 0xFFFFFFFFu;
  uint64_t c0 = keys.c0, c1 = keys.c1, c2 = quad & low, c3 = quad >> 32;
#if !defined(__CUDACC__)  // whose host pass does not know the pragma
#pragma GCC unroll 10
#endif
  for (int r = 0; r < kPhiloxRounds; ++r) {
    const uint64_t a = (c0 & low) * kPhiloxM0;
    const uint64_t b = (c2 & low) * kPhiloxM1;
    c0 = (b >> 32) ^ c1 ^ keys.round[2 * r];
    c2 = (a >> 32) ^ c3 ^ keys.round[2 * r + 1];
    c1 = b;
    c3 = a;
  }
  return {static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2),
          static_cast<uint32_t>(c3)};
}

#endif

// The part of the first two rounds that does not depend on the quad, for quads below 2^32: two of the twenty
// products need no quad.
struct QuadKeys {
  uint32_t first;      // of round 1
  uint32_t second[2];  // of round 2, with what is known of the words they meet
  uint32_t round[2 * (kPhiloxRounds - 2)];
};

VK_FN QuadKeys quad_keys(const PhiloxKeys& keys) {
  const uint64_t a = static_cast<uint64_t>(kPhiloxM0) * keys.c0;
  const uint64_t b = static_cast<uint64_t>(kPhiloxM1) * (static_cast<uint32_t>(a >> 32) ^ keys.round[1]);
  QuadKeys q;
  q.first = keys.c1 ^ keys.round[0];
  q.second[0] = static_cast<uint32_t>(b >> 32) ^ keys.round[2];
  q.second[1] = static_cast<uint32_t>(a) ^ keys.round[3];
  for (int i = 0; i < 2 * (kPhiloxRounds - 2); ++i) q.round[i] = keys.round[i + 4];
  q.round[0] ^= static_cast<uint32_t>(b);
  return q;
}

// The words of philox(keys, quad).
VK_FN Words philox(const QuadKeys& keys, uint32_t quad) {
  uint64_t b = static_cast<uint64_t>(kPhiloxM1) * quad;
  uint64_t a = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(b >> 32) ^ keys.first);
  Words c{static_cast<uint32_t>(b) ^ keys.second[0], 0, static_cast<uint32_t>(a >> 32) ^ keys.second[1],
          static_cast<uint32_t>(a)};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int r = 0; r < kPhiloxRounds - 2; ++r) {
    a = static_cast<uint64_t>(kPhiloxM0) * c.x0;
    b = static_cast<uint64_t>(kPhiloxM1) * c.x2;
    c = {static_cast<uint32_t>(b >> 32) ^ c.x1 ^ keys.round[2 * r], static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c.x3 ^ keys.round[2 * r + 1], static_cast<uint32_t>(a)};
  }
  return c;
}

template <class R>
struct Pair {
  R first, second;
};

// r cos(2 pi y 2^-32) and r sin(2 pi y 2^-32), r = sqrt(-2 ln u), u = (x + 1/2) 2^-32. The largest radius is
// 6.76 (x = 0), the smallest 1.5e-5.
VK_LONG_FN Pair<double> box_muller(uint32_t x, uint32_t y, double) {
  const double scale = 1.0 / 4294967296.0;
  const int32_t s = static_cast<int32_t>(x);
  // The complement u - 1 is exact, so log1p keeps the small radii right.
  const double minus = (static_cast<double>(s) + 0.5) * scale;
  const double r = sqrt(-2.0 * (s < 0 ? log1p(minus) : log(minus)));
  const double turns = scale * static_cast<double>(static_cast<int32_t>(y));
#if defined(__CUDA_ARCH__)
  // sin and cos would bring along a reduction of huge angles, which keeps a table in local memory.
  double sine, cosine;
  sincospi(2.0 * turns, &sine, &cosine);
  return {r * cosine, r * sine};
#else
  const double angle = 6.283185307179586477 * turns;
  return {r * cos(angle), r * sin(angle)};
#endif
}

#if defined(__CUDA_ARCH__)

// Within 6.7e-6 of the exact pair, with the largest errors that PTX admits: 2^-22 for lg2, 2^-23 for sqrt,
// 2^-20.5 for sin and cos.
VK_FN Pair<float> box_muller(uint32_t x, uint32_t y, float) {
  const float u = fmaf(static_cast<float>(x), 2.3283064e-10f, 1.1641532e-10f);
  float t = -1.3862943611f * lg2_approx(u);
  // The error of lg2.approx near u = 1 is absolute. For w = 1 - u < 2^-10, -2 ln u is 2 w (1 + 0.375 *
  // 2^-10): the radius is off by 2.7e-6, where lg2.approx would give 5.1e-6 and, further on, no digit.
  const float near = fmaf(static_cast<float>(static_cast<int32_t>(x)), -4.6583664e-10f, -2.3291832e-10f);
  t = x >= 0xFFC00000u ? near : t;
  const float r = sqrt_of(t);
  const float angle = static_cast<float>(static_cast<int32_t>(y)) * 1.46291808e-9f;
  return {r * cos_approx(angle), r * sin_approx(angle)};
}

#else

// Numbers one at a time; csrc/cpu/normals.h has them by the vector.
struct Scalar {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  static VK_FN F to_float(I x) { return static_cast<F>(x); }
  static VK_FN F sqrt(F x) { return std::sqrt(x); }
  static VK_FN F if_negative(I x, F a, F b) { return x < 0 ? a : b; }
  static VK_FN I not_above_zero(I x) { return x < 0 ? x : 0; }
};

template <class L>
VK_FN Pair<typename L::F> box_muller_of(typename L::U x, typename L::U y) {
  using F = typename L::F;
  using I = typename L::I;
  using U = typename L::U;
  // s = u for the lower half of the words and u - 1, exact to the last bit, for the upper half.
  const F s = L::to_float(std::bit_cast<I>(x)) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  // u = (1 + f) 2^k with f in [-1/2, 0).
  const U bits = std::bit_cast<U>(s);
  const F m = std::bit_cast<F>((bits & 0x007FFFFFu) | 0x3F000000u);
  const F f = L::if_negative(std::bit_cast<I>(bits), s, m - 1.f);
  const I k = L::not_above_zero(std::bit_cast<I>(bits >> 23) - 126);
  // -2 ln(1 + f) / f, largest relative error 1.5e-7.
  F p = f * 2.369863f + 2.1630808f;
  p = p * f + 1.5708621f;
  p = p * f - 0.076036125f;
  p = p * f + 0.54450108f;
  p = p * f - 0.66372524f;
  p = p * f + 1.0000731f;
  p = p * f - 1.9999997f;
  const F r = L::sqrt(p * f + L::to_float(k) * -1.3862944f);
  // The angle less a multiple of pi, |a| <= pi/2: an odd multiple changes the sign of both normals.
  const U doubled = y + y;
  const F a = L::to_float(std::bit_cast<I>(doubled)) * 7.3145904e-10f;
  const F signed_r = std::bit_cast<F>(std::bit_cast<U>(r) ^ ((y ^ doubled) & 0x80000000u));
  const F a2 = a * a;
  F sine = a2 * 2.5904885e-6f - 1.9800898e-4f;
  sine = sine * a2 + 8.33289982e-3f;
  sine = sine * a2 - 0.16666648f;
  sine = sine * a2 + 1.f;
  F cosine = a2 * 2.3153938e-5f - 1.38537047e-3f;
  cosine = cosine * a2 + 4.16635848e-2f;
  cosine = cosine * a2 - 0.49999905f;
  cosine = cosine * a2 + 1.f;
  return {signed_r * cosine, signed_r * a * sine};
}

VK_FN Pair<float> box_muller(uint32_t x, uint32_t y, float) { return box_muller_of<Scalar>(x, y); }

#endif

}  // namespace vk
