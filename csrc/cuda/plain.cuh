// Plain vectors: the fast paths. A thread moves 16 bytes of every tensor at a time. To save instructions
// nothing is tested element by element, all tensors that are laid out alike share one index, and two quads of
// a 16-bit type are computed side by side.
//
// A problem is plain (Geometry::plain) where float32 arithmetic is enough, every vector is whole and lies at
// a multiple of 16 bytes, mu and the scale have the same strides, and the KL is only summed; backward, there
// is one sample at most. All others, and those with more than 2^32 quads or vectors, are left to the general
// kernels.
#pragma once

#include "launch.cuh"

namespace vk::cuda {

// Which KL a kernel computes: none, that to N(0, I), that to a Gaussian prior given by two tensors.
enum class Kl { none, standard, prior };

// What the scale tensors of a kernel hold: logarithms (Param::logvar, log_std) or standard deviations (std,
// softplus).
enum class Holds { log, sd };

// Calls rows(the parameterization, whether the call is special) of the loop for a call. Both logarithms share
// two loops. Softplus is always special, since few use it.
template <Holds H, class Args, class Rows>
__device__ __forceinline__ void choose_rows(const Args& a, const Rows& rows) {
  using std::bool_constant, std::integral_constant;
  if constexpr (H == Holds::log) {
    const integral_constant<Param, Param::logvar> param;
    a.special ? rows(param, bool_constant<true>()) : rows(param, bool_constant<false>());
  } else if (a.param == Param::softplus) {
    rows(integral_constant<Param, Param::softplus>(), bool_constant<true>());
  } else {
    const integral_constant<Param, Param::std> param;
    a.special ? rows(param, bool_constant<true>()) : rows(param, bool_constant<false>());
  }
}

// A kernel with at most that many registers. 48 leave room for five blocks of 256 threads on a multiprocessor
// of 65536, 64 for four, 80 for three. A launch bound could not say so, since small problems are launched
// with blocks of kSmallBlock. sm_75 holds four such blocks at most, so that fewer than 64 would gain nothing.
#if defined(__CUDACC__) && CUDART_VERSION >= 12040
#define VK_PLAIN_KERNEL(registers) \
  __global__ void __maxnreg__(vk::cuda::kArch == 750 && (registers) < 64 ? 64 : (registers))
#else
#define VK_PLAIN_KERNEL(registers) __global__ void __launch_bounds__(vk::cuda::kSmallBlock)
#endif
#if defined(__CUDA_ARCH__)
inline constexpr int kArch = __CUDA_ARCH__;
#else
inline constexpr int kArch = 0;
#endif

// The round keys: as the host computed them, or from the state in device memory. One kernel serves both,
// since its loop is the same: the compiler holds the keys in uniform registers, one copy for a warp.
template <bool Sample>
__device__ __forceinline__ QuadKeys quad_keys_for(const Keys& keys) {
  return Sample && keys.on_device() ? quad_keys(keys.computed()) : keys.plain;
}

// The offset of a thread's next vector in tensors that are laid out alike, in the units of a Stride32. The
// thread makes the same number of steps in every row.
struct VectorOffset {
  uint32_t at;

  // `vector` counts along I.
  __device__ __forceinline__ VectorOffset(const Stride32& s, int64_t b, int64_t o, int64_t vector)
      : at(static_cast<uint32_t>(b) * s.b + static_cast<uint32_t>(o) * s.o +
           static_cast<uint32_t>(vector) * s.i) {}
  __device__ __forceinline__ uint32_t end(const Stride32& s, uint32_t steps) const {
    return at + steps * s.step;
  }
  __device__ __forceinline__ void next_row(const Stride32& s, uint32_t steps) {
    at += s.row - steps * s.step;
  }
};

// The address that is `at` units of `Unit` bytes behind `data`.
template <int Unit>
__device__ __forceinline__ char* bytes_at(void* data, uint32_t at) {
  return static_cast<char*>(data) + static_cast<uint64_t>(at) * Unit;
}

// The same pointer, held in a register for the whole loop. Without this the compiler loads the parameter from
// constant memory again in every step. threadIdx.z is always 0, so the pointer stays the same, but the
// compiler does not know that and takes it for a new value.
__device__ __forceinline__ char* in_registers(void* data) {
  const uint64_t nothing = threadIdx.z * uint64_t{0x100000001};
  char* same = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(data) ^ nothing);
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(same));
#endif
  return same;
}

__device__ __forceinline__ void normals(const QuadKeys& keys, uint32_t quad, float (&out)[4]) {
  const Words w = philox(keys, quad);
  const Pair<float> a = box_muller(w.x0, w.x1, 0.f), b = box_muller(w.x2, w.x3, 0.f);
  out[0] = a.first;
  out[1] = a.second;
  out[2] = b.first;
  out[3] = b.second;
}

// From elements of the second tensor to log-variances, where these are not the same: twice a log_std, and
// within the bounds. `inside`: which were within them before.
__device__ __forceinline__ void adjust(const LogVariance& rule, float (&y)[4], bool (&inside)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    y[j] *= rule.slope;
    const float clamped = rule.bounds.clamp(y[j]);
    inside[j] = is_inside(y[j], clamped);  // one comparison
    y[j] = clamped;
  }
}

// The same of the prior, which has no bounds.
__device__ __forceinline__ void adjust_prior(const LogVariance& rule, float (&y)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) y[j] *= rule.slope;
}

// The posterior of element s of the scale, which adjust() has seen if it is a log-variance.
template <Param P, bool Special>
__device__ __forceinline__ Posterior<float> plain_posterior(float s, const Scale<float>& scale,
                                                            const Bounds<float>& bounds) {
  if constexpr (P == Param::logvar)
    return posterior_of_log_variance(s);
  else if constexpr (Special)
    return posterior_of<P>(scale, bounds);
  else
    return posterior_of<P>(scale, NoBounds<float>());
}

// The terms of the KL to a prior.
template <Param P>
__device__ __forceinline__ Prior<float> plain_prior(float mu, float s, const Posterior<float>& posterior,
                                                    float prior_mu, float prior_s,
                                                    const Scale<float>& prior) {
  if constexpr (P == Param::logvar)
    return prior_of_log_variance(mu, s, prior_mu, prior_s);
  else
    return prior_of<P>(mu, posterior.x, prior_mu, prior);
}

// What a plain kernel is compiled for.
template <class T, Tiling kTiling, Kl K, bool Sample, Holds H>
struct PlainKernel {};

// Calls launch(PlainKernel<...>()) of the kernel for a call.
template <class T, Tiling kTiling, Holds H, class Args, class Launch>
void choose_plain(const Args& a, bool has_kl, bool sample, const Launch& launch) {
  const bool prior = has_kl && a.prior_mu.data != nullptr;
  if (prior && sample)
    launch(PlainKernel<T, kTiling, Kl::prior, true, H>());
  else if (prior)
    launch(PlainKernel<T, kTiling, Kl::prior, false, H>());
  else if (!has_kl)
    launch(PlainKernel<T, kTiling, Kl::none, true, H>());
  else if (sample)
    launch(PlainKernel<T, kTiling, Kl::standard, true, H>());
  else
    launch(PlainKernel<T, kTiling, Kl::standard, false, H>());
}

template <class T, Holds H, class Args, class Launch>
void choose_plain(const Args& a, bool has_kl, bool sample, const Launch& launch) {
  if (a.g.tiling == Tiling::column)
    choose_plain<T, Tiling::column, H>(a, has_kl, sample, launch);
  else
    choose_plain<T, Tiling::row, H>(a, has_kl, sample, launch);
}

template <Holds H, class Args, class Launch>
void choose_plain(const Args& a, bool has_kl, bool sample, const Launch& launch) {
  if (a.dtype == DType::f32)
    choose_plain<float, H>(a, has_kl, sample, launch);
  else if (a.dtype == DType::bf16)
    choose_plain<bf16, H>(a, has_kl, sample, launch);
  else
    choose_plain<f16, H>(a, has_kl, sample, launch);
}

template <class Args, class Launch>
void choose_plain(const Args& a, bool has_kl, bool sample, const Launch& launch) {
  if (by_logarithm(a.param))
    choose_plain<Holds::log>(a, has_kl, sample, launch);
  else
    choose_plain<Holds::sd>(a, has_kl, sample, launch);
}

}  // namespace vk::cuda
