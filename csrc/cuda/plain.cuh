// Plain vectors: the fast paths. A thread moves 16 bytes of every tensor at a time and has no instruction to
// spare, so nothing is tested element by element, all tensors that are laid out alike share one index, and
// two quads of a 16-bit type are worked on side by side.
//
// A problem is plain (Geometry::plain) where float32 arithmetic does, the scale is given by its logarithm,
// there is one sample at most, every vector is whole and lies at a multiple of 16 bytes, mu and the scale
// have the same strides, and the KL is only summed. All others, and those with more than 2^32 quads or
// vectors, are left to the general kernels.
#pragma once

#include "launch.cuh"

namespace vk::cuda {

// What of the KL a kernel computes: nothing, against N(0, I), against a prior that is learned.
enum class Kl { none, standard, prior };

// A kernel with so many registers at most. 48 leave room for five blocks of 256 threads on a multiprocessor
// of 65536, 64 for four, 80 for three. A launch bound could not say so, since small problems are launched
// with blocks of kSmallBlock.
#if defined(__CUDACC__) && CUDART_VERSION >= 12040
#define VK_PLAIN_KERNEL(registers) __global__ void __maxnreg__(registers)
#else
#define VK_PLAIN_KERNEL(registers) __global__ void __launch_bounds__(vk::cuda::kSmallBlock)
#endif

// Where the round keys are from: the host, as kernel parameters, or a state in device memory; or either,
// which spares what is less often used a second kernel.
enum class KeySource { host, device, either };

// The compiler keeps what it makes here in uniform registers, one copy for a warp.
template <KeySource S>
__device__ __forceinline__ QuadKeys quad_keys_for(const Keys& keys) {
  if (S == KeySource::host || (S == KeySource::either && keys.state == nullptr)) return keys.quads;
  return quad_keys(
      philox_keys(static_cast<uint64_t>(__ldg(keys.state)), static_cast<uint64_t>(__ldg(keys.state + 1))));
}

// Where a thread is in tensors that are laid out alike, in the units of a Stride32. It makes the same steps
// in every row.
struct Walk {
  uint32_t at;

  // `vector` counts along I.
  __device__ __forceinline__ Walk(const Stride32& s, int64_t b, int64_t o, int64_t vector)
      : at(static_cast<uint32_t>(b) * s.b + static_cast<uint32_t>(o) * s.o +
           static_cast<uint32_t>(vector) * s.i) {}
  __device__ __forceinline__ uint32_t end(const Stride32& s, uint32_t steps) const {
    return at + steps * s.step;
  }
  __device__ __forceinline__ void next_row(const Stride32& s, uint32_t steps) {
    at += s.row - steps * s.step;
  }
};

// The bytes that a walk has come to.
template <int Unit>
__device__ __forceinline__ char* bytes_at(void* data, uint32_t at) {
  return static_cast<char*>(data) + static_cast<uint64_t>(at) * Unit;
}

// The same pointer to global memory, for which the compiler finds registers: otherwise it loads it from
// constant memory again in every step. Blocks have no depth, so this changes nothing, but only we know.
__device__ __forceinline__ char* kept(void* data) {
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
    inside[j] = !(clamped < y[j] || clamped > y[j]);  // one comparison; NaN is inside
    y[j] = clamped;
  }
}

// The same of the prior, which has no bounds.
__device__ __forceinline__ void adjust_prior(const LogVariance& rule, float (&y)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) y[j] *= rule.slope;
}

// What a plain kernel is compiled for.
template <class T, Layout L, Kl K, bool Sample, KeySource S>
struct PlainKernel {};

// Calls launch(PlainKernel<...>()) of the kernel for a call.
template <class T, Layout L, class Args, class Launch>
void choose_plain(const Args& a, bool has_kl, bool sample, const Launch& launch) {
  const bool device = a.keys.state != nullptr, prior = has_kl && a.prior_mu.data != nullptr;
  if (prior && sample)
    launch(PlainKernel<T, L, Kl::prior, true, KeySource::either>());
  else if (prior)
    launch(PlainKernel<T, L, Kl::prior, false, KeySource::host>());
  else if (!sample)
    launch(PlainKernel<T, L, Kl::standard, false, KeySource::host>());
  else if (has_kl && device)
    launch(PlainKernel<T, L, Kl::standard, true, KeySource::device>());
  else if (has_kl)
    launch(PlainKernel<T, L, Kl::standard, true, KeySource::host>());
  else if (device)
    launch(PlainKernel<T, L, Kl::none, true, KeySource::device>());
  else
    launch(PlainKernel<T, L, Kl::none, true, KeySource::host>());
}

template <class T, class Args, class Launch>
void choose_plain(const Args& a, bool has_kl, bool sample, const Launch& launch) {
  if (a.g.layout == Layout::column)
    choose_plain<T, Layout::column>(a, has_kl, sample, launch);
  else
    choose_plain<T, Layout::row>(a, has_kl, sample, launch);
}

template <class Args, class Launch>
void choose_plain(const Args& a, bool has_kl, bool sample, const Launch& launch) {
  if (a.dtype == DType::f32)
    choose_plain<float>(a, has_kl, sample, launch);
  else if (a.dtype == DType::bf16)
    choose_plain<bf16>(a, has_kl, sample, launch);
  else
    choose_plain<f16>(a, has_kl, sample, launch);
}

}  // namespace vk::cuda
