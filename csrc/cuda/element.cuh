// A quad of elements on the general paths: its normals, its samples and KL, its gradients.
//
// Elements go one by one through one copy of their code: the arrays rotate by one element per round, so that
// every index is a constant and all arrays stay in registers.
#pragma once

#include "launch.cuh"

namespace vk::cuda {

// Bytes of shared memory for the round keys. Reading them there costs 1.5 instructions per element and takes
// no registers.
template <bool Sample>
inline constexpr int kKeyBytes = Sample ? (sizeof(PhiloxKeys) + 15) / 16 * 16 : 0;

template <bool Sample>
__device__ __forceinline__ const PhiloxKeys& keys_for(const Keys& keys, unsigned char* shared) {
  PhiloxKeys* copy = reinterpret_cast<PhiloxKeys*>(shared);
  if constexpr (Sample) {
    if (threadIdx.x == 0) *copy = keys.on_device() ? keys.computed() : keys.general;
    __syncthreads();
  }
  return *copy;
}

// Makes the compiler read shared memory again: otherwise it would hold the round keys in registers for the
// whole loop.
__device__ __forceinline__ void reload_shared() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// Drops x[0], moves the others down and puts `last` behind them.
template <class R, int N>
__device__ __forceinline__ void rotate(R (&x)[N], R last) {
#pragma unroll
  for (int i = 0; i + 1 < N; ++i) x[i] = x[i + 1];
  x[N - 1] = last;
}

template <class R>
__device__ __forceinline__ void quad_normals(const PhiloxKeys& keys, uint64_t quad, R (&out)[4]) {
  const Words w = philox(keys, quad);
  if constexpr (sizeof(R) == 4) {
    const Pair<R> a = box_muller(w.x0, w.x1, R()), b = box_muller(w.x2, w.x3, R());
    out[0] = a.first;
    out[1] = a.second;
    out[2] = b.first;
    out[3] = b.second;
  } else {
    uint32_t x[2] = {w.x0, w.x2}, y[2] = {w.x1, w.x3};
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const Pair<R> pair = box_muller(x[0], y[0], R());
      rotate(x, x[0]);
      rotate(y, y[0]);
      rotate(out, pair.first);
      rotate(out, pair.second);
    }
  }
}

// The normals number first .. first + 3. `aligned`: first is a multiple of 4.
template <class R>
__device__ __forceinline__ void normals(const PhiloxKeys& keys, uint64_t first, bool aligned, R (&out)[4]) {
  if (aligned) return quad_normals(keys, first / 4, out);
  R all[8] = {};
#pragma unroll 1
  for (int q = 0; q < 2; ++q) {
    R four[4] = {};
    quad_normals(keys, first / 4 + q, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) rotate(all, four[j]);
  }
  if ((first & 1) != 0) rotate(all, R(0));
  if ((first & 2) != 0) {
    rotate(all, R(0));
    rotate(all, R(0));
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = all[j];
}

// Both parameterizations by the logarithm are log_std of s * slope, so they share their code.
template <class R>
R log_slope(Param param) {
  return param == Param::logvar ? R(0.5) : R(1);
}

template <class R>
struct Sampled {
  R sd, kl;
};

template <Param P, bool HasKL, class R>
__device__ __forceinline__ Sampled<R> sampled(R mu, R s, R prior_mu, R prior_s, bool prior,
                                              const Bounds<R>& bounds) {
  const Posterior<R> q = posterior_of<P>(scale_of<P>(s), bounds);
  if constexpr (!HasKL) return {q.sd, R(0)};
  if (prior) return {q.sd, kl_prior(prior_of<P>(mu, q.x, prior_mu, scale_of<P>(prior_s)))};
  return {q.sd, kl_standard(mu, q.excess)};
}

// In: the second tensor's elements in sd; out: the standard deviations, and the KL where it is wanted.
template <bool HasKL, class R>
__device__ __forceinline__ void sample_and_kl(Param param, R slope, const Bounds<R>& bounds, bool prior,
                                              R (&mu)[4], R (&sd)[4], R (&prior_mu)[4], R (&prior_s)[4],
                                              R (&kl)[4]) {
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    Sampled<R> e;
    if (by_logarithm(param))
      e = sampled<Param::log_std, HasKL>(mu[0], sd[0] * slope, prior_mu[0], prior_s[0] * slope, prior,
                                         bounds);
    else if (param == Param::std)
      e = sampled<Param::std, HasKL>(mu[0], sd[0], prior_mu[0], prior_s[0], prior, bounds);
    else
      e = sampled<Param::softplus, HasKL>(mu[0], sd[0], prior_mu[0], prior_s[0], prior, bounds);
    rotate(mu, mu[0]);
    rotate(sd, e.sd);
    rotate(prior_mu, prior_mu[0]);
    rotate(prior_s, prior_s[0]);
    rotate(kl, e.kl);
  }
}

// What gradients need besides the elements.
template <class R>
struct Shares {
  Bounds<R> bounds;
  R posterior, prior;  // of c
};

template <Param P, bool HasKL, class R>
__device__ __forceinline__ ElementGradients<R> gradients(R mu, R s, R prior_mu, R prior_s, bool prior,
                                                         const Shares<R>& shares, const SampleGradients<R>& z,
                                                         R c) {
  if constexpr (!HasKL) return gradients_sample<P>(s, shares.bounds, z);
  if (prior)
    return gradients_prior<P>(mu, s, prior_mu, prior_s, shares.bounds, z, c * shares.posterior,
                              c * shares.prior);
  return gradients_standard<P>(mu, s, shares.bounds, z, c);
}

// In: the elements; out: their gradients. sum, noise and c as in gaussian.h.
template <bool HasKL, bool Sample, class R>
__device__ __forceinline__ void quad_gradients(Param param, R slope, const Shares<R>& shares, bool prior,
                                               R (&mu)[4], R (&s)[4], R (&prior_mu)[4], R (&prior_s)[4],
                                               R (&sum)[4], R (&noise)[4], R (&c)[4]) {
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    const SampleGradients<R> z{sum[0], noise[0], Sample};
    ElementGradients<R> e;
    if (by_logarithm(param)) {
      e = gradients<Param::log_std, HasKL>(mu[0], s[0] * slope, prior_mu[0], prior_s[0] * slope, prior,
                                           shares, z, c[0]);
      e.scale *= slope;
      e.prior_scale *= slope;
    } else if (param == Param::std) {
      e = gradients<Param::std, HasKL>(mu[0], s[0], prior_mu[0], prior_s[0], prior, shares, z, c[0]);
    } else {
      e = gradients<Param::softplus, HasKL>(mu[0], s[0], prior_mu[0], prior_s[0], prior, shares, z, c[0]);
    }
    rotate(mu, e.mu);
    rotate(s, e.scale);
    rotate(prior_mu, e.prior_mu);
    rotate(prior_s, e.prior_scale);
    rotate(sum, sum[0]);
    rotate(noise, noise[0]);
    rotate(c, c[0]);
  }
}

// What a general kernel is compiled for, besides the type.
template <Tiling kTiling, bool HasKL, bool Sample>
struct GeneralKernel {};

// Calls launch(GeneralKernel<...>()) of the kernel for a call.
template <Tiling kTiling, class Launch>
void choose_general(bool has_kl, bool sample, const Launch& launch) {
  if (!has_kl)
    launch(GeneralKernel<kTiling, false, true>());
  else if (sample)
    launch(GeneralKernel<kTiling, true, true>());
  else
    launch(GeneralKernel<kTiling, true, false>());
}

template <class Launch>
void choose_general(Tiling tiling, bool has_kl, bool sample, const Launch& launch) {
  if (tiling == Tiling::column)
    choose_general<Tiling::column>(has_kl, sample, launch);
  else
    choose_general<Tiling::row>(has_kl, sample, launch);
}

// The type that a general kernel's elements have in memory.
template <class R>
using general_t = std::conditional_t<sizeof(R) == 8, double, AnyFloat>;

}  // namespace vk::cuda
