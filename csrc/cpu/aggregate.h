// The interface of the CPU kernels of the aggregate posterior.
#pragma once

#include "../aggregate.h"
#include "latent.h"

namespace vk::cpu {

// The cost of one item for `parallel` is counted in latent elements, as elsewhere.
void aggregate(const AggregateForward& call, Parallel parallel);
void aggregate(const AggregateBackward& call, Parallel parallel);

}  // namespace vk::cpu
