// Sums in a fixed order, and how blocks find out which of them is the last.
//
// No result depends on the order in which threads or blocks run: every sum is a tree or a loop whose shape
// depends on the problem alone, and counters only decide which block adds, never in what order.
#pragma once

#include <cstdint>

namespace vk::cuda {

// Adds the `height` rows of a row-major [height, width] matrix in shared memory into its first row. height is
// a power of two. Called by all threads of the block, after a barrier; ends with one.
template <class R>
__device__ __forceinline__ void sum_rows(R* matrix, int width, int height) {
  for (int half = height / 2; half > 0; half /= 2) {
    for (int i = threadIdx.x; i < half * width; i += blockDim.x) matrix[i] += matrix[i + half * width];
    __syncthreads();
  }
}

// The sum over each group of `lanes` neighbours in a warp, a power of two. The whole warp takes part.
template <class R>
__device__ __forceinline__ R lane_sum(R value, int lanes) {
  for (int m = lanes / 2; m > 0; m /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, m);
  return value;
}

// The sum of one number per thread, the same for all threads of the block: a butterfly within each warp, then
// one over the warps. `shared` takes a number per warp. blockDim.x is a multiple of 32.
template <class R>
__device__ __forceinline__ R block_sum(R* shared, R value) {
  value = lane_sum(value, 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  return lane_sum(lane < blockDim.x / 32 ? shared[lane] : R(0), 32);
}

// Adds, within a warp, the numbers of the lanes that are a multiple of `apart` from each other, a power of
// two. The whole warp takes part.
template <class R, int N>
__device__ __forceinline__ void sum_lanes_apart(R (&value)[N], int apart) {
#pragma unroll 1
  for (int m = apart; m < 32; m *= 2) {
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] += __shfl_xor_sync(0xFFFFFFFFu, value[j], m);
  }
}

// Adds the `height` rows of a row-major [height, width] matrix in shared memory into its first row, one after
// the other. Called by all threads of the block, after a barrier; ends with one.
template <class R>
__device__ __forceinline__ void sum_columns(R* matrix, int width, int height) {
#pragma unroll 1
  for (int c = threadIdx.x; c < width; c += blockDim.x) {
    R sum = matrix[c];
#pragma unroll 4
    for (int row = 1; row < height; ++row) sum += matrix[row * width + c];
    matrix[c] = sum;
  }
  __syncthreads();
}

// Counts an arrival and returns whether it was the last of `count`; the last one leaves the counter at zero.
// Orders what the block wrote before against what the last arriver reads afterwards.
__device__ __forceinline__ bool arrive_last(unsigned* counter, unsigned count) {
#if defined(__CUDA_ARCH__)
  unsigned before;
  asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(count - 1)
               : "memory");
#else
  unsigned before = __atomic_load_n(counter, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(counter, &before, before >= count - 1 ? 0 : before + 1, false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
#endif
  return before == count - 1;
}

// The same for a whole block: all threads call it, and it returns the same to all. `flag` is in shared
// memory.
__device__ __forceinline__ bool block_arrives_last(unsigned* counter, unsigned count, int* flag) {
  __syncthreads();
  if (threadIdx.x == 0) *flag = arrive_last(counter, count) ? 1 : 0;
  __syncthreads();
  return *flag != 0;
}

}  // namespace vk::cuda
