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
  bool special;  // for plain kernels: log-variances are adjusted, batch rows weighted, or shares not 1
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

// The loss's gradient with respect to sum_b w[b] KL[b, g] of an open group.
template <class R>
__device__ __forceinline__ R loss_gain(const BackwardArgs<R>& a, R inverse_weight) {
  if (a.grad_kl == nullptr || !a.scalar_loss()) return R(0);
  R gain = a.grad_kl[0];
  if (a.reduction != Reduction::sum) gain *= inverse_weight;
  return a.reduction == Reduction::mean ? gain / a.row_size : gain;
}

template <class R>
__device__ __forceinline__ R shared_gradient(const BackwardArgs<R>& a, int64_t group, R gain,
                                             R inverse_weight) {
  R shared = 0;
  if (a.grad_kl_per_group != nullptr)
    shared = a.group_sums ? a.grad_kl_per_group[group] : a.grad_kl_per_group[group] * inverse_weight;
  const bool open = a.clamp != Clamp::batch || !signbit(a.gate[group]);
  return open && !a.by_row() ? shared + gain : shared;
}

// The part of the KL's gradient that is the same for all batch rows, of kGroups groups from `first` on.
// Returns the loss's gain.
template <int kGroups, class R>
__device__ __forceinline__ R shared_gradients(const BackwardArgs<R>& a, int64_t first, R* shared) {
  const R inverse_weight = fabs(a.gate[0]);
  const R gain = loss_gain(a, inverse_weight);
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
    shared[j] = first + j < a.groups ? shared_gradient(a, first + j, gain, inverse_weight) : R(0);
  return gain;
}

// Launches the kernels of plain.cuh.
void backward_plain(const BackwardArgs<float>& a, bool has_kl, bool sample, cudaStream_t stream);

}  // namespace vk::cuda
