// bfloat16 as the kernels use it, for the shim (see ../shim.h).
#pragma once

#include <bit>
#include <cstdint>

#include "cuda_runtime_api.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {  // to nearest, ties to even
    const uint32_t b = std::bit_cast<uint32_t>(x);
    const bool nan = (b & 0x7FFFFFFFu) > 0x7F800000u;
    const uint32_t rest = b & 0xFFFFu, odd = b >> 16 & 1u;
    const uint32_t up = rest > 0x8000u || (rest == 0x8000u && odd != 0) ? 1 : 0;
    bits = static_cast<uint16_t>(nan ? 0x7FFFu : (b >> 16) + up);
  }
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
