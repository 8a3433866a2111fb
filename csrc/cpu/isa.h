// One source, several instruction sets.
#pragma once

// Whether the instruction set is chosen at run time; 0 compiles for that of the compiler's flags alone.
#if !defined(VK_X86_DISPATCH)
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define VK_X86_DISPATCH 1
#else
#define VK_X86_DISPATCH 0
#endif
#endif

// Three compilations, chosen at load time. Spelled as architecture levels: with single features GCC leaves
// scalar calls and loses the fused multiply-add.
#if VK_X86_DISPATCH
#include <immintrin.h>
#define VK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define VK_AVX2 __attribute__((target("arch=x86-64-v3")))
#define VK_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define VK_CLONES
#endif

namespace vk::cpu {

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#if VK_X86_DISPATCH
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace vk::cpu
