// Two small kernels: one writes a random state, one writes the generator's words.
#include "launch.cuh"

namespace vk::cuda {
namespace {

__global__ void write_state_kernel(const StateSource source, int64_t* state) {
  state[0] = static_cast<int64_t>(source.read_seed());
  state[1] = static_cast<int64_t>(source.read_offset());
}

__global__ void __launch_bounds__(kBlock)
    words_kernel(const int64_t* state, uint64_t first_quad, int64_t n, int64_t* words) {
  const PhiloxKeys keys = philox_keys(static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[1]));
  const int64_t quads = ceil_div(n, 4), stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t q = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; q < quads; q += stride) {
    const Words w = philox(keys, first_quad + static_cast<uint64_t>(q));
    const uint32_t x[4] = {w.x0, w.x1, w.x2, w.x3};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (4 * q + j < n) words[4 * q + j] = static_cast<int64_t>(x[j]);
  }
}

}  // namespace

cudaError_t write_state(const StateSource& source, int64_t* state, cudaStream_t stream) {
  VK_LAUNCH(write_state_kernel, dim3(1), 1, 0, stream, source, state);
  return cudaGetLastError();
}

cudaError_t philox_words(const int64_t* state, uint64_t first_quad, int64_t n, int64_t* words,
                         cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>(ceil_div(ceil_div(n, 4), kBlock), 4 * kReducingBlocks);
  VK_LAUNCH(words_kernel, dim3(static_cast<unsigned>(blocks)), kBlock, 0, stream, state, first_quad, n,
            words);
  return cudaGetLastError();
}

}  // namespace vk::cuda
