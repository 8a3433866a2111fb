// torch's CUDA generator, for the shim (see ../../../shim.h): hands out states like the CUDA one, but takes
// them from the CPU's generator, since the shim's tensors lie on the CPU.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <ATen/cuda/PhiloxCudaState.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <mutex>
#include <optional>

namespace at {

struct CUDAGeneratorImpl {
  explicit CUDAGeneratorImpl(CPUGeneratorImpl* source) : mutex_(source->mutex_), source_(source) {}

  // As in CUDAGeneratorImpl.cpp: numbers, or, while a graph is captured, the memory in which they will be
  // found when it runs, and how far this call is from there. Here the graph runs at once.
  PhiloxCudaState philox_cuda_state(uint64_t increment) {
    struct Graph {
      int64_t seed = 0, offset = 0;
      uint64_t taken = 0;
    };
    static Graph graph;
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    if (stream->capture == cudaStreamCaptureStatusNone) {
      graph = {};
      return {source_->random64(), 0};
    }
    if (graph.taken == 0) {
      graph.seed = static_cast<int64_t>(source_->random64());
      graph.offset = 4096;
    }
    PhiloxCudaState state(&graph.seed, &graph.offset, graph.taken);
    graph.taken += increment;
    return state;
  }

  std::mutex& mutex_;

 private:
  CPUGeneratorImpl* source_;
};

template <>
inline CUDAGeneratorImpl* get_generator_or_default<CUDAGeneratorImpl>(
    const std::optional<Generator>& generator, const Generator& fallback) {
  static thread_local std::optional<CUDAGeneratorImpl> found;
  found.emplace(get_generator_or_default<CPUGeneratorImpl>(generator, fallback));
  return &*found;
}

namespace cuda::detail {

inline const Generator& getDefaultCUDAGenerator() { return at::detail::getDefaultCPUGenerator(); }

}  // namespace cuda::detail

}  // namespace at
