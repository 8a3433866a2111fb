// Philox words by the tile, with the multiplication that the compiler does not find by itself.
//
// A round multiplies 32-bit words to 64 bits. Each word sits in a 64-bit lane whose upper half may hold
// rubbish, which is what `vpmuludq` takes, so no lane is ever shuffled. Left to the vectoriser, AVX-512 gets
// `vpmullq` instead, twice the time (1.19 against 0.56 ns per element).
#pragma once

#include "../philox.h"

// Whether the instruction set is chosen at run time; 0 compiles for that of the compiler's flags alone.
#if !defined(VK_X86_DISPATCH)
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define VK_X86_DISPATCH 1
#else
#define VK_X86_DISPATCH 0
#endif
#endif
#if VK_X86_DISPATCH
#include <immintrin.h>
#endif

namespace vk::cpu {

// The words of `quads` consecutive quads, x0[q] ... x3[q]. quads is a multiple of kQuadLanes.
struct WordArrays {
  uint32_t *x0, *x1, *x2, *x3;
};

inline constexpr int kQuadLanes = 16;

inline void words_portable(const PhiloxKeys& keys, uint64_t first_quad, int quads, const WordArrays& out) {
  const PhiloxKeys local = keys;  // which the stores below cannot change
  uint32_t* __restrict x0 = out.x0, * __restrict x1 = out.x1, * __restrict x2 = out.x2, * __restrict x3 = out.x3;
  for (int q = 0; q < quads; ++q) {
    const Words w = philox(local, first_quad + static_cast<uint64_t>(q));
    x0[q] = w.x0;
    x1[q] = w.x1;
    x2[q] = w.x2;
    x3[q] = w.x3;
  }
}

#if VK_X86_DISPATCH

#define VK_XOR3_512(a, b, c) _mm512_ternarylogic_epi64(a, b, c, 0x96)
#define VK_XOR3_256(a, b, c) _mm256_xor_si256(_mm256_xor_si256(a, b), c)

// Two vectors at a time: one alone would wait for the multiplier's latency.
#define VK_PHILOX_ROUNDS(V, SET1, MUL, SHIFT, XOR3)                         \
  const V m0 = SET1(kPhiloxM0), m1 = SET1(kPhiloxM1);                       \
  _Pragma("GCC unroll 10") for (int r = 0; r < kPhiloxRounds; ++r) {        \
    const V k0 = SET1(keys.round[2 * r]), k1 = SET1(keys.round[2 * r + 1]); \
    _Pragma("GCC unroll 2") for (int v = 0; v < 2; ++v) {                   \
      const V a = MUL(c0[v], m0), b = MUL(c2[v], m1);                       \
      c0[v] = XOR3(SHIFT(b, 32), c1[v], k0);                                \
      c2[v] = XOR3(SHIFT(a, 32), c3[v], k1);                                \
      c1[v] = b;                                                            \
      c3[v] = a;                                                            \
    }                                                                       \
  }

__attribute__((target("arch=x86-64-v4"))) inline void words_avx512(const PhiloxKeys& keys,
                                                                   uint64_t first_quad, int quads,
                                                                   const WordArrays& out) {
  using V = __m512i;
  const V step = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int q = 0; q < quads; q += 16) {
    V c0[2], c1[2], c2[2], c3[2];
    for (int v = 0; v < 2; ++v) {
      c2[v] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first_quad) + q + 8 * v), step);
      c3[v] = _mm512_srli_epi64(c2[v], 32);
      c0[v] = _mm512_set1_epi64(keys.c0);
      c1[v] = _mm512_set1_epi64(keys.c1);
    }
    VK_PHILOX_ROUNDS(V, _mm512_set1_epi64, _mm512_mul_epu32, _mm512_srli_epi64, VK_XOR3_512)
    for (int v = 0; v < 2; ++v) {
      const int at = q + 8 * v;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.x0 + at), _mm512_cvtepi64_epi32(c0[v]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.x1 + at), _mm512_cvtepi64_epi32(c1[v]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.x2 + at), _mm512_cvtepi64_epi32(c2[v]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.x3 + at), _mm512_cvtepi64_epi32(c3[v]));
    }
  }
}

// The lower halves of eight 64-bit lanes.
__attribute__((target("arch=x86-64-v3"))) inline void store_low_halves(__m256i a, __m256i b, uint32_t* out) {
  const __m256 joined = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_permute4x64_epi64(_mm256_castps_si256(joined), 0xD8));
}

__attribute__((target("arch=x86-64-v3"))) inline void words_avx2(const PhiloxKeys& keys, uint64_t first_quad,
                                                                 int quads, const WordArrays& out) {
  using V = __m256i;
  const V step = _mm256_setr_epi64x(0, 1, 2, 3);
  for (int q = 0; q < quads; q += 8) {
    V c0[2], c1[2], c2[2], c3[2];
    for (int v = 0; v < 2; ++v) {
      c2[v] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first_quad) + q + 4 * v), step);
      c3[v] = _mm256_srli_epi64(c2[v], 32);
      c0[v] = _mm256_set1_epi64x(keys.c0);
      c1[v] = _mm256_set1_epi64x(keys.c1);
    }
    VK_PHILOX_ROUNDS(V, _mm256_set1_epi64x, _mm256_mul_epu32, _mm256_srli_epi64, VK_XOR3_256)
    store_low_halves(c0[0], c0[1], out.x0 + q);
    store_low_halves(c1[0], c1[1], out.x1 + q);
    store_low_halves(c2[0], c2[1], out.x2 + q);
    store_low_halves(c3[0], c3[1], out.x3 + q);
  }
}

#undef VK_PHILOX_ROUNDS
#undef VK_XOR3_512
#undef VK_XOR3_256

#endif

using WordsFunction = void (*)(const PhiloxKeys&, uint64_t, int, const WordArrays&);

inline WordsFunction best_words() {
#if VK_X86_DISPATCH
  if (__builtin_cpu_supports("x86-64-v4")) return words_avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return words_avx2;
#endif
  return words_portable;
}

}  // namespace vk::cpu
