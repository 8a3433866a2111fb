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

// What every counter of one call shares: the round keys and the first two counter words.
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

// The host keeps each word in a 64-bit lane and lets the upper half fill with rubbish: a product needs its
// factor's lower half only, so the vectorised loop does without a single shuffle (1.15 against 1.40 ns per
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

// What the first rounds make of a counter before they see the quad, for quads below 2^32. Four of the rounds'
// twenty products, and half of their keys, need no quad.
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
  const double turn = scale * static_cast<double>(static_cast<int32_t>(y));
#if defined(__CUDA_ARCH__)
  // sin and cos would bring along a reduction of huge angles, which keeps a table in local memory.
  double sine, cosine;
  sincospi(2.0 * turn, &sine, &cosine);
  return {r * cosine, r * sine};
#else
  const double angle = 6.283185307179586477 * turn;
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

VK_FN Pair<float> box_muller(uint32_t x, uint32_t y, float) {
  // s = u for the lower half of the words and u - 1, exact to the last bit, for the upper half.
  const float s =
      static_cast<float>(static_cast<int32_t>(x)) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  const float u = s < 0.f ? 1.f + s : s;
  const float r = sqrt_of(-2.f * log_reduced(u, s));
  // Quadrant and remainder: the angle is quadrant * pi/2 + f with |f| <= pi/4.
  const uint32_t quadrant = (y + 0x20000000u) >> 30;
  const float f = static_cast<float>(static_cast<int32_t>(y - (quadrant << 30))) * 1.46291808e-9f;
  const float f2 = f * f;
  float sine = -1.9495566e-4f;
  sine = sine * f2 + 8.331978e-3f;
  sine = sine * f2 - 0.16666651f;
  sine = sine * f2 * f + f;
  float cosine = -1.3652402e-3f;
  cosine = cosine * f2 + 4.1661277e-2f;
  cosine = cosine * f2 - 0.5f;
  cosine = cosine * f2 + 1.f;
  const bool swap = (quadrant & 1u) != 0;
  const uint32_t c = std::bit_cast<uint32_t>(swap ? sine : cosine) ^ (((quadrant + 1u) & 2u) << 30);
  const uint32_t d = std::bit_cast<uint32_t>(swap ? cosine : sine) ^ ((quadrant & 2u) << 30);
  return {r * std::bit_cast<float>(c), r * std::bit_cast<float>(d)};
}

#endif

}  // namespace vk
