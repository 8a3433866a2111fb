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
// Any of float, bf16 and f16, which one is known at run time: what need not be fast is compiled once for all
// three.
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

// Elements that one thread handles at a time: whole quads of normals, and whole 16-byte words in memory.
template <class T>
inline constexpr int kVector = std::is_same_v<T, bf16> || std::is_same_v<T, f16> ? 8 : 4;

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// The same number, of which the compiler knows nothing: multiples of a stride that it knew it would compute
// ahead of a loop and keep in registers.
__device__ __forceinline__ int64_t opaque(int64_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// A vector of elements as it lies in memory. It is worked on by quads, from the front; `turn` brings the next
// quad to the front, so that every index is a constant and nothing leaves the registers. In an unrolled loop
// it costs nothing.
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

  // From `data`, `stride` bytes apart, of which `valid` exist; the others read as 0. `wide`: the elements are
  // dense and data is a multiple of 16 bytes.
  __device__ __forceinline__ void load(const char* data, int64_t stride, bool wide, int valid, DType) {
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
      const T x = i < valid ? *reinterpret_cast<const T*>(data + i * stride) : T(0.f);
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

  __device__ __forceinline__ void store(char* data, int64_t stride, bool wide, int valid, DType) const {
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
      T* to = reinterpret_cast<T*>(data + i * stride);
      if constexpr (sizeof(T) == 2)
        *to = bits_as<T>(static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2))));
      else if constexpr (sizeof(T) == 4)
        *to = bits_as<float>(word[i]);
      else
        *to = bits_as<double>(word[2 * i] | static_cast<uint64_t>(word[2 * i + 1]) << 32);
    }
  }
};

// One quad; 16-bit types move 8 bytes at a time.
template <>
struct Vector<AnyFloat> {
  float value[4];

  __device__ __forceinline__ void turn() {}
  __device__ __forceinline__ void front(float (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = value[i];
  }
  __device__ __forceinline__ void set_front(const float (&in)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = in[i];
  }

  __device__ __forceinline__ void load(const char* data, int64_t stride, bool wide, int valid, DType dtype) {
    if (dtype == DType::f32) {
      Vector<float> v;
      v.load(data, stride, wide, valid, dtype);
      v.front(value);
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
    if (dtype == DType::bf16)
      front_of<bf16>(word);
    else
      front_of<f16>(word);
  }

  __device__ __forceinline__ void store(char* data, int64_t stride, bool wide, int valid, DType dtype) const {
    if (dtype == DType::f32) {
      Vector<float> v;
      v.set_front(value);
      v.store(data, stride, wide, valid, dtype);
      return;
    }
    uint32_t word[2];
    if (dtype == DType::bf16)
      words_of<bf16>(word);
    else
      words_of<f16>(word);
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

 private:
  template <class T>
  __device__ __forceinline__ void front_of(const uint32_t (&word)[2]) {
    Vector<T> v;
    v.word[0] = word[0];
    v.word[1] = word[1];
    v.front(value);
  }
  template <class T>
  __device__ __forceinline__ void words_of(uint32_t (&word)[2]) const {
    Vector<T> v;
    v.set_front(value);
    word[0] = v.word[0];
    word[1] = v.word[1];
  }
};

}  // namespace vk::cuda
