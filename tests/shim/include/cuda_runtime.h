// What kernels use of CUDA C++, for the shim (see ../shim.h): qualifiers, indices, barriers, warp
// collectives.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "../shim.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
// Empty, so that __attribute__((__noinline__)) in other headers stays what it is.
#define __noinline__
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)

#define VK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::shim::launch(grid, block, shared, stream, [&] { kernel(__VA_ARGS__); })
#define VK_SHARED(name) unsigned char* const name = ::shim::shared_memory()

// Of the thread that runs.
extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
using std::fabs;
using std::signbit;

inline void __syncthreads(std::source_location at = std::source_location::current()) { shim::barrier(at); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }

namespace shim {

// The value of lane `source`, as all lanes of the mask see it once they have met.
template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, const std::source_location& at) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange({name, mask, at}, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace shim

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes,
                  std::source_location at = std::source_location::current()) {
  return shim::shuffle("__shfl_xor_sync", mask, value, shim::lane() ^ static_cast<unsigned>(lanes), at);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, std::source_location at = std::source_location::current()) {
  return shim::shuffle("__shfl_sync", mask, value, static_cast<unsigned>(source) % 32, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes,
                   std::source_location at = std::source_location::current()) {
  const unsigned source = shim::lane() + lanes;
  return shim::shuffle("__shfl_down_sync", mask, value, source < 32 ? source : shim::lane(), at);
}
