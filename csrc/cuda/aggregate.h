// The launchers of the aggregate posterior: raw pointers and a stream, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../aggregate.h"

namespace vk::cuda {

// How many rows a block owns, and which results the gradients are of (in backward) or are wanted (in
// forward): those of all dimensions together, those of single ones, or both.
enum class Rows : uint8_t { few, many };
enum class Terms : uint8_t { all, dims, both };

// Bytes of scratch memory, 16-byte aligned, needed until the kernel has run; contents do not matter.
size_t aggregate_scratch(const AggregateForward& call);
size_t aggregate_scratch(const AggregateBackward& call);

// One launch each.
cudaError_t aggregate(const AggregateForward& call, void* scratch, cudaStream_t stream);
cudaError_t aggregate(const AggregateBackward& call, void* scratch, cudaStream_t stream);

}  // namespace vk::cuda
