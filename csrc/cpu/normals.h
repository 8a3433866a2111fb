// Philox words and normals by the vector.
//
// The vectors are the compiler's own (`vector_size`): one source, which also runs, slower, on processors that
// have none as wide. Intrinsics are used only where the compiler does not find the instruction: the square
// root, the product of 32-bit words, which left alone becomes `vpmullq` on AVX-512 (twice the time), and the
// xor of three.
//
// A round of Philox multiplies 32-bit words to 64 bits. Each word sits in a 64-bit lane whose upper half may
// hold anything, which is what `vpmuludq` takes, so no lane is ever shuffled.
//
// Of W quads that are worked on together, lane 4 L + j holds quad (W / 4) j + L. In this order the four
// normals of a quad lie within the same 128 bits, where shuffles are cheapest.
#pragma once

#include <cstring>
#include <utility>

#include "../philox.h"
#include "isa.h"

namespace vk::cpu {

inline constexpr int kTile = 512;
inline constexpr int kSideBySide = 2;                // vectors of quads whose rounds go on at the same time
inline constexpr int kQuadLanes = 16 * kSideBySide;  // of the widest vectors

// ---- vectors ---------------------------------------------------------------------------------------------

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};

// W 32-bit numbers, or W / 2 of 64 bits.
template <int W>
struct Lanes {
  using F = typename VectorOf<float, 4 * W>::type;
  using I = typename VectorOf<int32_t, 4 * W>::type;
  using U = typename VectorOf<uint32_t, 4 * W>::type;
  using Q = typename VectorOf<uint64_t, 4 * W>::type;

  static VK_FN F to_float(I x) { return __builtin_convertvector(x, F); }
  static VK_FN F if_negative(I x, F a, F b) { return x < 0 ? a : b; }
  static VK_FN I not_above_zero(I x) { return x < 0 ? x : I{}; }

  static VK_FN F sqrt(F x) {
#if VK_X86_DISPATCH
    if constexpr (W == 4) return __builtin_ia32_sqrtps(x);
    if constexpr (W == 8) return __builtin_ia32_sqrtps256(x);
    if constexpr (W == 16) return __builtin_ia32_sqrtps512_mask(x, x, -1, _MM_FROUND_CUR_DIRECTION);
#endif
    float numbers[W];
    std::memcpy(numbers, &x, sizeof(x));
    for (float& number : numbers) number = std::sqrt(number);
    std::memcpy(&x, numbers, sizeof(x));
    return x;
  }

  // The 64-bit products of the lower halves.
  static VK_FN Q multiply(Q a, Q b) {
#if VK_X86_DISPATCH
    if constexpr (W == 4) return (Q)__builtin_ia32_pmuludq128((__v4si)a, (__v4si)b);
    if constexpr (W == 8) return (Q)__builtin_ia32_pmuludq256((__v8si)a, (__v8si)b);
    if constexpr (W == 16) return (Q)__builtin_ia32_pmuludq512_mask((__v16si)a, (__v16si)b, (__v8di)a, -1);
#endif
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
  }

  static VK_FN Q xor3(Q a, Q b, Q c) {
#if VK_X86_DISPATCH
    if constexpr (W == 16)
      return (Q)__builtin_ia32_pternlogq512_mask((__v8di)a, (__v8di)b, (__v8di)c, 0x96, -1);
#endif
    return a ^ b ^ c;
  }
};

// Two vectors as one number, so that two independent computations go on side by side.
template <class V>
struct Twin {
  V a, b;
};
#define VK_TWIN(op)                                                              \
  template <class V>                                                             \
  VK_FN Twin<V> operator op(const Twin<V>& x, const Twin<V>& y) {                \
    return {x.a op y.a, x.b op y.b};                                             \
  }                                                                              \
  template <class V, class S, class = std::enable_if_t<std::is_arithmetic_v<S>>> \
  VK_FN Twin<V> operator op(const Twin<V>& x, S y) {                             \
    return {x.a op y, x.b op y};                                                 \
  }                                                                              \
  static_assert(true)
VK_TWIN(+);
VK_TWIN(-);
VK_TWIN(*);
VK_TWIN(&);
VK_TWIN(|);
VK_TWIN(^);
VK_TWIN(>>);
#undef VK_TWIN

template <int W>
struct Twins {
  using L = Lanes<W>;
  using F = Twin<typename L::F>;
  using I = Twin<typename L::I>;
  using U = Twin<typename L::U>;
  static VK_FN F to_float(I x) { return {L::to_float(x.a), L::to_float(x.b)}; }
  static VK_FN F if_negative(I x, F a, F b) {
    return {L::if_negative(x.a, a.a, b.a), L::if_negative(x.b, a.b, b.b)};
  }
  static VK_FN I not_above_zero(I x) { return {L::not_above_zero(x.a), L::not_above_zero(x.b)}; }
  static VK_FN F sqrt(F x) { return {L::sqrt(x.a), L::sqrt(x.b)}; }
};

// Lane i of the result is lane Pattern::at(i) of a, or of b for those from W on.
template <class Pattern, class V, size_t... I>
VK_FN V shuffle(V a, V b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pattern::at(I, sizeof...(I))...);
#else
  return __builtin_shuffle(
      a, b, typename VectorOf<int32_t, 4 * sizeof...(I)>::type{Pattern::at(I, sizeof...(I))...});
#endif
}
template <class Pattern, int W, class V>
VK_FN V shuffle(V a, V b) {
  return shuffle<Pattern>(a, b, std::make_index_sequence<W>());
}

// The patterns, in each 128 bits alike: the two lower halves of 64-bit lanes, first of a, then of b; lanes of
// a and b in turn; 64-bit halves of a, then of b.
struct LowHalves {
  static constexpr int at(int i, int W) { return i / 4 * 4 + i % 2 * 2 + (i % 4 < 2 ? 0 : W); }
};
template <int From>
struct InTurn {
  static constexpr int at(int i, int W) { return i / 4 * 4 + From + i % 4 / 2 + i % 2 * W; }
};
template <int From>
struct Halves {
  static constexpr int at(int i, int W) { return i / 4 * 4 + From + i % 2 + (i % 4 < 2 ? 0 : W); }
};

// ---- words -----------------------------------------------------------------------------------------------

// Where in a vector of W quads one of them is.
constexpr int lane_of(int quad, int W) { return quad % (W / 4) * 4 + quad / (W / 4); }

// quad_keys of a call, as vectors.
template <int W>
struct VectorKeys {
  using Q = typename Lanes<W>::Q;
  Q first, second[2], round[2 * (kPhiloxRounds - 2)];

  explicit VK_FN VectorKeys(const QuadKeys& keys)
      : first(Q{} + keys.first), second{Q{} + keys.second[0], Q{} + keys.second[1]} {
    for (int i = 0; i < 2 * (kPhiloxRounds - 2); ++i) round[i] = Q{} + keys.round[i];
  }
};

// The words of N W quads from `first` on, all of them below 2^32. The rounds of all N go on side by side,
// since each alone waits for its products.
template <int N, int W>
VK_FN void philox_vectors(const VectorKeys<W>& keys, uint32_t first, typename Lanes<W>::U (*words)[4]) {
  using L = Lanes<W>;
  using Q = typename L::Q;
  using U = typename L::U;
  const Q m0 = Q{} + kPhiloxM0, m1 = Q{} + kPhiloxM1;
  Q c0[2 * N], c1[2 * N], c2[2 * N], c3[2 * N];
#pragma GCC unroll 8
  for (int v = 0; v < 2 * N; ++v) {
    Q quad;
    for (int i = 0; i < W / 2; ++i)
      quad[i] = static_cast<uint64_t>(v / 2 * W + W / 4 * (v % 2 * 2 + i % 2) + i / 2);
    const Q b = L::multiply(quad + first, m1);
    const Q a = L::multiply((b >> 32) ^ keys.first, m0);
    c0[v] = b ^ keys.second[0];
    c2[v] = (a >> 32) ^ keys.second[1];
    c3[v] = a;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kPhiloxRounds - 2; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < 2 * N; ++v) {
      const Q a = L::multiply(c0[v], m0), b = L::multiply(c2[v], m1);
      c0[v] = r == 0 ? (b >> 32) ^ keys.round[0] : L::xor3(b >> 32, c1[v], keys.round[2 * r]);
      c2[v] = L::xor3(a >> 32, c3[v], keys.round[2 * r + 1]);
      c1[v] = b;
      c3[v] = a;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    words[v][0] = shuffle<LowHalves, W>((U)c0[2 * v], (U)c0[2 * v + 1]);
    words[v][1] = shuffle<LowHalves, W>((U)c1[2 * v], (U)c1[2 * v + 1]);
    words[v][2] = shuffle<LowHalves, W>((U)c2[2 * v], (U)c2[2 * v + 1]);
    words[v][3] = shuffle<LowHalves, W>((U)c3[2 * v], (U)c3[2 * v + 1]);
  }
}

// The words of `quads` consecutive quads, a multiple of kQuadLanes and at most kMostQuads, by the vector.
inline constexpr int kMostQuads = kTile / 4 + kQuadLanes;
template <int W>
using WordVectors = typename Lanes<W>::U[kMostQuads / W][4];

template <int W>
VK_FN void fill_words(const PhiloxKeys& keys, uint64_t first_quad, int quads, WordVectors<W>& words) {
  if ((first_quad + static_cast<uint64_t>(quads) - 1) >> 32 == 0 && first_quad >> 32 == 0) {
    const VectorKeys<W> vector_keys(quad_keys(keys));
    for (int v = 0; v < quads / W; v += kSideBySide)
      philox_vectors<kSideBySide>(
          vector_keys, static_cast<uint32_t>(first_quad) + static_cast<uint32_t>(v * W), &words[v]);
    return;
  }
  for (int q = 0; q < quads; ++q) {
    const Words w = philox(keys, first_quad + static_cast<uint64_t>(q));
    const uint32_t x[4] = {w.x0, w.x1, w.x2, w.x3};
    for (int i = 0; i < 4; ++i) words[q / W][i][lane_of(q % W, W)] = x[i];
  }
}

// The same in the order of the quads.
template <int W>
VK_FN void list_words(const PhiloxKeys& keys, uint64_t first_quad, int quads, Words* out) {
  WordVectors<W> words;
  fill_words<W>(keys, first_quad, quads, words);
  for (int q = 0; q < quads; ++q) {
    const auto& v = words[q / W];
    const int lane = lane_of(q % W, W);
    out[q] = {v[0][lane], v[1][lane], v[2][lane], v[3][lane]};
  }
}

// ---- normals ---------------------------------------------------------------------------------------------

template <int W>
VK_FN void store(typename Lanes<W>::F x, float* to) {
  std::memcpy(to, &x, sizeof(x));
}

// eps[4 q + i] is normal i of quad first_quad + q.
template <int W>
VK_FN void fill_normals(const PhiloxKeys& keys, uint64_t first_quad, int quads, float* eps) {
  using L = Lanes<W>;
  using F = typename L::F;
  // Words first, then normals: more steps of one loop are under way at a time than of both in one.
  WordVectors<W> words;
  fill_words<W>(keys, first_quad, quads, words);
  for (int v = 0; v < quads / W; ++v) {
    const auto both = box_muller_of<Twins<W>>({words[v][0], words[v][2]}, {words[v][1], words[v][3]});
    const Pair<F> a{both.first.a, both.second.a}, b{both.first.b, both.second.b};
    const F a01 = shuffle<InTurn<0>, W>(a.first, a.second), a23 = shuffle<InTurn<2>, W>(a.first, a.second);
    const F b01 = shuffle<InTurn<0>, W>(b.first, b.second), b23 = shuffle<InTurn<2>, W>(b.first, b.second);
    float* to = eps + 4 * W * v;
    store<W>(shuffle<Halves<0>, W>(a01, b01), to);
    store<W>(shuffle<Halves<2>, W>(a01, b01), to + W);
    store<W>(shuffle<Halves<0>, W>(a23, b23), to + 2 * W);
    store<W>(shuffle<Halves<2>, W>(a23, b23), to + 3 * W);
  }
}

// One of these for each instruction set.
struct Generator {
  void (*words)(const PhiloxKeys&, uint64_t first_quad, int quads, Words*);
  void (*normals)(const PhiloxKeys&, uint64_t first_quad, int quads, float* eps);
};

#define VK_GENERATOR(name, W, attributes)                                                                   \
  attributes inline void words_##name(const PhiloxKeys& keys, uint64_t first_quad, int quads, Words* out) { \
    list_words<W>(keys, first_quad, quads, out);                                                            \
  }                                                                                                         \
  attributes inline void normals_##name(const PhiloxKeys& keys, uint64_t first_quad, int quads,             \
                                        float* eps) {                                                       \
    fill_normals<W>(keys, first_quad, quads, eps);                                                          \
  }                                                                                                         \
  inline constexpr Generator k_##name{words_##name, normals_##name};

#if VK_X86_DISPATCH
VK_GENERATOR(baseline, 4, )
VK_GENERATOR(avx2, 8, VK_AVX2)
VK_GENERATOR(avx512, 16, VK_AVX512)
inline const Generator& best_generator() {
  const Isa isa = best_isa();
  return isa == Isa::avx512 ? k_avx512 : isa == Isa::avx2 ? k_avx2 : k_baseline;
}
#else
#if !defined(VK_LANES)  // set by a test, which runs them all
#define VK_LANES 4
#endif
VK_GENERATOR(generic, VK_LANES, )
inline const Generator& best_generator() { return k_generic; }
#endif
#undef VK_GENERATOR

}  // namespace vk::cpu
