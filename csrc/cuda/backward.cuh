// The parameter of a backward kernel.
#pragma once

#include "launch.cuh"

namespace vk::cuda {

template <class R>
struct BackwardArgs {
  Geometry g;
  int64_t groups, numel, K;
  Source mu, scale, prior_mu, prior_scale, grad_z;
  Source grad_mu, grad_scale, grad_prior_mu, grad_prior_scale;
  // For plain kernels: of mu and the scale, of their gradients, the same of the prior; of grad_z in quads.
  Stride32 in, out, prior_in, prior_out, quads;
  Bounds<R> bounds;
  LogVariance log_variance;
  R posterior_share, prior_share;  // of c
  Keys keys;
  DType dtype;
  Param param;
  Clamp clamp;
  Reduction reduction;
  bool group_sums, grad_kl_wide;
  bool special;  // for plain kernels: scales are adjusted, batch rows weighted, or shares not 1
  R row_size, slope;

  const R *grad_kl, *grad_kl_per_group, *gate, *weight;
  const uint8_t* open;

  __host__ __device__ bool scalar_loss() const {
    return reduction != Reduction::none && reduction != Reduction::elementwise;
  }
  // The gradient of the loss with respect to KL[b, g] is w[b] (shared[g] + row[b] open[b, g]); is there a
  // `row`?
  __host__ __device__ bool by_row() const {
    return grad_kl != nullptr && (reduction == Reduction::none || (scalar_loss() && clamp == Clamp::sample));
  }
};

// The part of the KL's gradient that is the same for all batch rows, of kGroups groups from `first` on.
// Returns the loss's gain. All numbers are loaded before the first is used: one after the other, each would
// wait for memory.
template <int kGroups, class R>
__device__ __forceinline__ R shared_gradients(const BackwardArgs<R>& a, int64_t first, R* shared) {
  const R weight = a.gate[0];
  const bool has_gain = a.grad_kl != nullptr && a.scalar_loss();
  const R grad = has_gain ? a.grad_kl[0] : R(0);
  R gate[kGroups], own[kGroups];
  const auto load = [&](const R* from, R(&to)[kGroups]) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
      to[j] = from != nullptr && first + j < a.groups ? from[first + j] : R(0);
  };
  load(a.clamp == Clamp::batch ? a.gate : nullptr, gate);
  load(a.grad_kl_per_group, own);

  const R inverse_weight = fabs(weight);
  R gain = 0;
  if (has_gain) gain = a.reduction == Reduction::sum ? grad : grad * inverse_weight;
  if (a.reduction == Reduction::mean) gain /= a.row_size;
  const R scale = a.grad_kl_per_group == nullptr || a.group_sums ? R(1) : inverse_weight;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const R sum = own[j] * scale;
    shared[j] = signbit(gate[j]) || a.by_row() || first + j >= a.groups ? sum : sum + gain;
  }
  return gain;
}

// Launches the kernels of plain.cuh.
void backward_plain(const BackwardArgs<float>& a, bool has_kl, bool sample, cudaStream_t stream);

}  // namespace vk::cuda
