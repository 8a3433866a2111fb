// The interface of the CPU kernels. Without torch: the caller passes the memory and a function that runs
// chunks in parallel.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace vk::cpu {

// Runs body(context, begin, end) over parts of [0, count), on several threads where that pays. The cost of
// one item is `elements` latent elements. Which thread runs what changes no result.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using Parallel = void (*)(int64_t count, int64_t elements, Body body, void* context);

// Both throw std::invalid_argument where `weight` or `free_bits_per_group` holds a negative number or NaN.
void forward(const Forward& call, Parallel parallel);
void backward(const Backward& call, Parallel parallel);

// words[i] = word i % 4 of quad first_quad + i / 4.
void philox_words(uint64_t seed, uint64_t offset, uint64_t first_quad, int64_t n, int64_t* words);

// The instruction set that the kernels run on: "avx512", "avx2" or "baseline".
const char* isa();

}  // namespace vk::cpu
