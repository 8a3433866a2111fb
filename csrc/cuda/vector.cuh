// Numbers in memory: 16-byte loads and stores where a tensor allows them, single elements where it does not.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../problem.h"

namespace vk::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;
// Any of float, bf16 and f16; which one is known at run time only. Kernels that need not be fast are compiled
// once for all three.
struct AnyFloat {};

// The type that elements of type T are computed in.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// Two neighbours of a 16-bit type, from and to the word that they share.
template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float& first, float& second) {
  if constexpr (std::is_same_v<T, bf16>) {
    first = bits_as<float>(word << 16);
    second = bits_as<float>(word & 0xFFFF0000u);
  } else {
    const float2 two = __half22float2(bits_as<__half2>(word));
    first = two.x;
    second = two.y;
  }
}
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, bf16>)
    return bits_as<uint32_t>(__floats2bfloat162_rn(first, second));
  else
    return bits_as<uint32_t>(__floats2half2_rn(first, second));
}

// Elements in 16 bytes.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// 16 bytes of a float, bf16 or f16 tensor, from a multiple of 16 bytes.
template <class T>
struct Vector {
  uint4 words;

  __device__ __forceinline__ void load(const char* data) {
    words = __ldg(reinterpret_cast<const uint4*>(data));
  }
  __device__ __forceinline__ void store(char* data) const { *reinterpret_cast<uint4*>(data) = words; }

  // Quad q of the one or two.
  __device__ __forceinline__ void get(int q, float (&out)[4]) const {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4)
        out[i] = bits_as<float>(word[i]);
      else if (i % 2 == 0)
        unpack<T>(word[2 * q + i / 2], out[i], out[i + 1]);
    }
  }

  __device__ __forceinline__ void set(int q, const float (&in)[4]) {
    if constexpr (sizeof(T) == 4) {
      words = make_uint4(bits_as<uint32_t>(in[0]), bits_as<uint32_t>(in[1]), bits_as<uint32_t>(in[2]),
                         bits_as<uint32_t>(in[3]));
    } else {
      (q == 0 ? words.x : words.z) = pack<T>(in[0], in[1]);
      (q == 0 ? words.y : words.w) = pack<T>(in[2], in[3]);
    }
  }
};

// Four elements from `data`, `stride` bytes apart, of which `valid` exist; the others read as 0 and are not
// written. `wide`: they are dense, and data is a multiple of 16 bytes.
template <class R>
struct Quad {
  R value[4];

  __device__ __forceinline__ void load(const char* data, int64_t stride, bool wide, int valid, DType) {
    if (wide && valid == 4) {
      uint4 words[sizeof(R) / 4];
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(R) / 4); ++i)
        words[i] = __ldg(reinterpret_cast<const uint4*>(data) + i);
      memcpy(value, words, sizeof(value));
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = i < valid ? *reinterpret_cast<const R*>(data + i * stride) : R(0);
  }

  __device__ __forceinline__ void store(char* data, int64_t stride, bool wide, int valid, DType) const {
    if (wide && valid == 4) {
      uint4 words[sizeof(R) / 4];
      memcpy(words, value, sizeof(value));
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(R) / 4); ++i) reinterpret_cast<uint4*>(data)[i] = words[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < valid) *reinterpret_cast<R*>(data + i * stride) = value[i];
  }
};

// 16-bit types move 8 bytes at a time.
template <>
struct Quad<AnyFloat> {
  float value[4];

  __device__ __forceinline__ void load(const char* data, int64_t stride, bool wide, int valid, DType dtype) {
    if (dtype == DType::f32) {
      Quad<float> quad;
      quad.load(data, stride, wide, valid, dtype);
      memcpy(value, quad.value, sizeof(value));
      return;
    }
    uint32_t word[2];
    if (wide && valid == 4) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(data));
      word[0] = two.x;
      word[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = i < valid ? *reinterpret_cast<const uint16_t*>(data + i * stride) : 0u;
        word[i / 2] = i % 2 == 0 ? bits : word[i / 2] | bits << 16;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (dtype == DType::bf16)
        unpack<bf16>(word[i], value[2 * i], value[2 * i + 1]);
      else
        unpack<f16>(word[i], value[2 * i], value[2 * i + 1]);
    }
  }

  __device__ __forceinline__ void store(char* data, int64_t stride, bool wide, int valid, DType dtype) const {
    if (dtype == DType::f32) {
      Quad<float> quad;
      memcpy(quad.value, value, sizeof(value));
      quad.store(data, stride, wide, valid, dtype);
      return;
    }
    uint32_t word[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      word[i] = dtype == DType::bf16 ? pack<bf16>(value[2 * i], value[2 * i + 1])
                                     : pack<f16>(value[2 * i], value[2 * i + 1]);
    if (wide && valid == 4) {
      *reinterpret_cast<uint2*>(data) = make_uint2(word[0], word[1]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < valid)
        *reinterpret_cast<uint16_t*>(data + i * stride) =
            static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)));
  }
};

}  // namespace vk::cuda
