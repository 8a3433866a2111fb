// The CUDA kernels' launchers: raw pointers and a stream, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace vk::cuda {

// Counters that `forward` needs where it needs scratch memory, all zero before their first use; every
// completed call leaves them zero. Calls that may run at the same time need counters of their own.
inline constexpr size_t kCounters = 4096;
// Of these the first is that of the whole problem; then come those of sets of rows, then those of tiles.
inline constexpr size_t kTileCounters = 1 + 2 * kCounters / 3;

// Bytes of scratch memory for `forward`, 16-byte aligned, needed until the kernel has run; contents do not
// matter.
size_t forward_scratch(const Forward& call);

// One launch. With `capturing`, no counter is touched and a second, small launch finishes the sums in the
// same order, so that a graph may be replayed on any stream and a capture may be abandoned.
cudaError_t forward(const Forward& call, void* scratch, unsigned* counters, bool capturing,
                    cudaStream_t stream);

// One launch.
cudaError_t backward(const Backward& call, cudaStream_t stream);

// A random state with parts on the host or, where the pointers are set, on the device; `step` is added to the
// offset.
struct StateSource {
  uint64_t seed = 0, offset = 0;
  const int64_t* seed_data = nullptr;
  const int64_t* offset_data = nullptr;
  uint64_t step = 0;

  VK_FN uint64_t read_seed() const { return seed_data ? static_cast<uint64_t>(*seed_data) : seed; }
  VK_FN uint64_t read_offset() const {
    return (offset_data ? static_cast<uint64_t>(*offset_data) : offset) + step;
  }
};
inline StateSource state_of(const Problem& p) {
  if (p.host_state) return {p.seed, p.offset};
  if (p.rng_offset != nullptr) return {0, 0, p.rng, p.rng_offset, p.offset};
  return {0, 0, p.rng, p.rng == nullptr ? nullptr : p.rng + 1};
}

// state = (seed, offset).
cudaError_t write_state(const StateSource& source, int64_t* state, cudaStream_t stream);

// Word i of `words` is word i % 4 of quad first_quad + i / 4.
cudaError_t philox_words(const int64_t* state, uint64_t first_quad, int64_t n, int64_t* words,
                         cudaStream_t stream);

}  // namespace vk::cuda
