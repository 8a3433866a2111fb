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

// Elements that one thread handles at a time: whole quads of normals, and whole 16-byte words in memory.
template <class T>
inline constexpr int kVector = sizeof(T) == 2 ? 8 : 4;

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

// The same number, of which the compiler knows nothing: multiples of a stride that it knew it would compute ahead of a
// loop and keep in registers.
__device__ __forceinline__ int64_t opaque(int64_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// A vector of elements as it lies in memory. It is worked on by quads, from the front; `turn` brings the next quad to the
// front, so that every index is a constant and nothing leaves the registers. In an unrolled loop it costs nothing.
template <class T>
struct Vector {
  static constexpr int kWords = kVector<T> * sizeof(T) / 4, kQuad = sizeof(T);  // in 32-bit words
  uint32_t word[kWords];

  __device__ __forceinline__ void turn() {
#pragma unroll
    for (int i = 0; i < kWords - kQuad; i += kQuad)
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const uint32_t front = word[i + j];
        word[i + j] = word[i + j + kQuad];
        word[i + j + kQuad] = front;
      }
  }

  __device__ __forceinline__ void front(compute_t<T> (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if constexpr (sizeof(T) == 4) {
        out[i] = bits_as<float>(word[i]);
      } else if constexpr (sizeof(T) == 8) {
        if (i % 2 == 0) out[i / 2] = bits_as<double>(word[i] | static_cast<uint64_t>(word[i + 1]) << 32);
      } else if constexpr (std::is_same_v<T, bf16>) {
        out[2 * i] = bits_as<float>(word[i] << 16);
        out[2 * i + 1] = bits_as<float>(word[i] & 0xFFFF0000u);
      } else {
        const float2 two = __half22float2(bits_as<__half2>(word[i]));
        out[2 * i] = two.x;
        out[2 * i + 1] = two.y;
      }
    }
  }

  __device__ __forceinline__ void set_front(const compute_t<T> (&in)[4]) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if constexpr (sizeof(T) == 4)
        word[i] = bits_as<uint32_t>(in[i]);
      else if constexpr (sizeof(T) == 8)
        word[i] = static_cast<uint32_t>(bits_as<uint64_t>(in[i / 2]) >> (32 * (i % 2)));
      else if constexpr (std::is_same_v<T, bf16>)
        word[i] = bits_as<uint32_t>(__floats2bfloat162_rn(in[2 * i], in[2 * i + 1]));
      else
        word[i] = bits_as<uint32_t>(__floats2half2_rn(in[2 * i], in[2 * i + 1]));
    }
  }

  // From `data`, `stride` apart, of which `valid` exist; the others read as 0. `wide`: stride is 1 and data a multiple
  // of 16 bytes.
  __device__ __forceinline__ void load(const T* data, int64_t stride, bool wide, int valid) {
    if (wide && valid == kVector<T>) {
      const uint4* from = reinterpret_cast<const uint4*>(data);
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 four = __ldg(from + i);
        word[4 * i] = four.x;
        word[4 * i + 1] = four.y;
        word[4 * i + 2] = four.z;
        word[4 * i + 3] = four.w;
      }
      return;
    }
    stride = opaque(stride);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const T x = i < valid ? data[i * stride] : T(0.f);
      if constexpr (sizeof(T) == 2) {
        const uint32_t bits = static_cast<uint32_t>(bits_as<uint16_t>(x)) << (16 * (i % 2));
        word[i / 2] = i % 2 == 0 ? bits : word[i / 2] | bits;
      } else if constexpr (sizeof(T) == 4) {
        word[i] = bits_as<uint32_t>(x);
      } else {
        word[2 * i] = static_cast<uint32_t>(bits_as<uint64_t>(x));
        word[2 * i + 1] = static_cast<uint32_t>(bits_as<uint64_t>(x) >> 32);
      }
    }
  }

  __device__ __forceinline__ void store(T* data, int64_t stride, bool wide, int valid) const {
    if (wide && valid == kVector<T>) {
      uint4* to = reinterpret_cast<uint4*>(data);
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i)
        to[i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
      return;
    }
    stride = opaque(stride);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i >= valid) break;
      if constexpr (sizeof(T) == 2)
        data[i * stride] = bits_as<T>(static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2))));
      else if constexpr (sizeof(T) == 4)
        data[i * stride] = bits_as<float>(word[i]);
      else
        data[i * stride] = bits_as<double>(word[2 * i] | static_cast<uint64_t>(word[2 * i + 1]) << 32);
    }
  }
};

// Four dense elements.
template <class T>
__device__ __forceinline__ void load_quad(const T* data, bool wide, int valid, compute_t<T> (&out)[4]) {
  if (wide && valid >= 4) {
    if constexpr (sizeof(T) == 2) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(data));
      Vector<T> v;
      v.word[0] = two.x;
      v.word[1] = two.y;
      v.front(out);
    } else {
      Vector<T> v;
      v.load(data, 1, true, 4);
      v.front(out);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = i < valid ? widen(data[i]) : compute_t<T>(0);
}

}  // namespace vk::cuda
