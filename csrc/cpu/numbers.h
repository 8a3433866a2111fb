// Numbers in memory: their dtypes, and rows of them into tiles and back.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../math.h"
#include "isa.h"

namespace vk::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

VK_FN float widen(float x) { return x; }
VK_FN double widen(double x) { return x; }
VK_FN float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
VK_FN float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  // Multiplying by 2^112 moves the exponent over and turns subnormals into normal numbers.
  const float scaled = std::bit_cast<float>(magnitude) * 5.192296858534828e33f;
  const uint32_t special = magnitude | 0x7F800000u;  // inf and NaN keep their payload
  const uint32_t bits = (x.bits & 0x7C00u) == 0x7C00u ? special : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(bits | sign);
}

VK_FN void narrow(float x, float& out) { out = x; }
VK_FN void narrow(double x, double& out) { out = x; }
VK_FN void narrow(float x, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t even = bits + 0x7FFFu + ((bits >> 16) & 1u);
  out.bits = static_cast<uint16_t>(x != x ? 0x7FC0u : even >> 16);
}
VK_FN void narrow(float x, Half& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  // Normal results: rebias the exponent and round to even in the integer domain; 65520 and above become inf.
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 1/2 aligns the digits so that the float addition does the rounding.
  const uint32_t small =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  out.bits = static_cast<uint16_t>(half | sign);
}

// ---- rows ------------------------------------------------------------------------------------------------

// `rows` rows of n numbers each, `stride` apart in memory and one behind the other in the tile.
template <class T, class R>
VK_CLONES void load_rows_plainly(const T* __restrict from, int64_t stride, int rows, int n,
                                 R* __restrict to) {
  for (int row = 0; row < rows; ++row, from += stride, to += n)
    for (int i = 0; i < n; ++i) to[i] = widen(from[i]);
}
template <class T, class R>
VK_CLONES void store_rows_plainly(const R* __restrict from, T* __restrict to, int64_t stride, int rows,
                                  int n) {
  for (int row = 0; row < rows; ++row, from += n, to += stride)
    for (int i = 0; i < n; ++i) narrow(from[i], to[i]);
}

// The same without a conversion: by 32 bytes, the last of them, where they do not fit, over what was copied.
// As vectors of that type, since `memcpy` becomes two halves, which a load of the whole has to wait for: 0.25
// ns an element.
template <class T, int Bytes>
VK_FN void copy_vector(const T* from, T* to) {
  typedef T Vector __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
  *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
}
// Rows of at most eight vectors, by loops of a known length: half the time of one that asks where a row ends.
template <int Vectors = 1, class T>
VK_FN bool copy_short_rows(int vectors, const T* from, int64_t from_stride, T* to, int64_t to_stride,
                           int rows, int n) {
  constexpr int kWhole = 32 / sizeof(T);
  if (vectors == Vectors) {
    for (int row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
#pragma GCC unroll 8
      for (int i = 0; i < Vectors - 1; ++i) copy_vector<T, 32>(from + i * kWhole, to + i * kWhole);
      copy_vector<T, 32>(from + n - kWhole, to + n - kWhole);
    }
    return true;
  }
  if constexpr (Vectors < 8)
    return copy_short_rows<Vectors + 1>(vectors, from, from_stride, to, to_stride, rows, n);
  return false;
}
template <class T>
VK_CLONES void copy_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int rows, int n) {
  constexpr int kWhole = 32 / sizeof(T), kHalf = kWhole / 2;
  if (n >= kWhole && copy_short_rows((n + kWhole - 1) / kWhole, from, from_stride, to, to_stride, rows, n))
    return;
  for (int row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    if (n >= kWhole) {
#pragma GCC unroll 8
      for (int i = 0; i + kWhole <= n; i += kWhole) copy_vector<T, 32>(from + i, to + i);
      copy_vector<T, 32>(from + n - kWhole, to + n - kWhole);
    } else if (n >= kHalf) {
      copy_vector<T, 16>(from, to);
      copy_vector<T, 16>(from + n - kHalf, to + n - kHalf);
    } else {
      for (int i = 0; i < n; ++i) to[i] = from[i];
    }
  }
}

#if VK_X86_DISPATCH
// The conversions in AVX2. Storing a bfloat16 takes 1.4 instructions, where the compiler's takes 1.6, and a
// float16 0.4 (5). The results are the same but for what a NaN of float16 carries.
struct Avx2Numbers {
  VK_AVX2 VK_FN static void widen8(const BFloat16* from, float* to) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  VK_AVX2 VK_FN static void narrow8(const float* from, BFloat16* to) {
    const __m256 x = _mm256_loadu_ps(from);
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
    const __m256 whole = _mm256_blendv_ps(_mm256_castsi256_ps(even), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i half = _mm256_srli_epi32(_mm256_castps_si256(whole), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
  VK_AVX2 VK_FN static void widen8(const Half* from, float* to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  VK_AVX2 VK_FN static void narrow8(const float* from, Half* to) {
    const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
};

// With AVX-512 the compiler's bfloat16 is the shorter, of 0.6 instructions.
template <class T>
bool by_avx2() {
  const Isa isa = best_isa();
  return isa == Isa::avx2 || (isa == Isa::avx512 && std::is_same_v<T, Half>);
}

template <class T>
VK_AVX2 inline void load_rows_avx2(const T* from, int64_t stride, int rows, int n, float* to) {
  for (int row = 0; row < rows; ++row, from += stride, to += n) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + 8 <= n; i += 8) Avx2Numbers::widen8(from + i, to + i);
    if (i < n && n >= 8) Avx2Numbers::widen8(from + n - 8, to + n - 8);  // some of them again
    if (n < 8)
      for (; i < n; ++i) to[i] = widen(from[i]);
  }
}
template <class T>
VK_AVX2 inline void store_rows_avx2(const float* from, T* to, int64_t stride, int rows, int n) {
  for (int row = 0; row < rows; ++row, from += n, to += stride) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + 8 <= n; i += 8) Avx2Numbers::narrow8(from + i, to + i);
    if (i < n && n >= 8) Avx2Numbers::narrow8(from + n - 8, to + n - 8);
    if (n < 8)
      for (; i < n; ++i) narrow(from[i], to[i]);
  }
}
#endif

template <class T, class R>
void load_rows(const T* from, int64_t stride, int rows, int n, R* to) {
  if constexpr (std::is_same_v<T, R>) return copy_rows(from, stride, to, n, rows, n);
#if VK_X86_DISPATCH
  if constexpr (sizeof(T) == 2) {
    if (by_avx2<T>()) return load_rows_avx2(from, stride, rows, n, to);
  }
#endif
  load_rows_plainly(from, stride, rows, n, to);
}
template <class T, class R>
void store_rows(const R* from, T* to, int64_t stride, int rows, int n) {
  if constexpr (std::is_same_v<T, R>) return copy_rows(from, n, to, stride, rows, n);
#if VK_X86_DISPATCH
  if constexpr (sizeof(T) == 2) {
    if (by_avx2<T>()) return store_rows_avx2(from, to, stride, rows, n);
  }
#endif
  store_rows_plainly(from, to, stride, rows, n);
}

}  // namespace vk::cpu
