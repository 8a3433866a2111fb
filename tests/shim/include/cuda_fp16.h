// float16 as the kernels use it, for the shim (see ../shim.h).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_runtime_api.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float x) {  // to nearest, ties to even
    const uint16_t sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000u : 0u);
    const float a = std::fabs(x);
    if (std::isnan(x)) {
      bits = 0x7FFFu;
    } else if (a >= 65520.f) {
      bits = static_cast<uint16_t>(sign | 0x7C00u);
    } else {
      // The step between neighbours is 2^-24 for subnormal numbers, and 2^(e - 10) from 2^e on.
      const int e = a < 6.103515625e-05f ? -14 : std::ilogb(a);
      const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(a, 10 - e)));
      // The leading one, where there is one, carries into the exponent.
      bits = static_cast<uint16_t>(sign | (static_cast<uint32_t>(e + 14) * 1024u + steps));
    }
  }
  operator float() const {
    const int e = bits >> 10 & 31, m = bits & 1023;
    const float a = e == 31 ? (m != 0 ? NAN : INFINITY)
                            : (e == 0 ? std::ldexp(static_cast<float>(m), -24)
                                      : std::ldexp(static_cast<float>(1024 + m), e - 25));
    return (bits & 0x8000u) != 0 ? -a : a;
  }
};

struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
