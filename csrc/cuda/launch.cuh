// What all kernels share: the launch, shared memory, round keys, the strides of tensors in bytes, and the
// part of a problem that a block and a thread take.
#pragma once

#include <cuda_runtime.h>

#include "../philox.h"
#include "geometry.h"
#include "latent.h"
#include "vector.cuh"

// The two places where a kernel touches the CUDA runtime. A build that runs the kernels on the CPU defines
// its own.
#if !defined(VK_LAUNCH)
#define VK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define VK_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace vk::cuda {

// The round keys where the host knows the random state; else where in device memory that state is.
struct Keys {
  StateSource state;
  PhiloxKeys general;  // for general kernels; neither of these two is set where the device has the state
  QuadKeys plain;      // the same for plain kernels

  __device__ bool on_device() const { return state.seed_data != nullptr; }
  // From the state where it lies.
  __device__ PhiloxKeys computed() const { return philox_keys(state.read_seed(), state.read_offset()); }
};

inline Keys keys_of(const Problem& p) {
  if (!p.host_state) return {state_of(p), {}, {}};
  const PhiloxKeys keys = philox_keys(p.seed, p.offset);
  return {state_of(p), keys, quad_keys(keys)};
}

// A tensor as [B, O, I], all distances in bytes; `step` is what a thread adds in each step of its loop.
// `wide`: whole vectors can be loaded and stored at once.
struct Source {
  void* data = nullptr;
  int64_t b = 0, o = 0, i = 0;
  int64_t step = 0;
  bool wide = false;
};

__device__ __forceinline__ char* element_of(const Source& s, int64_t b, int64_t o, int64_t i) {
  return static_cast<char*>(s.data) + (b * s.b + o * s.o + i * s.i);
}

inline Source source_of(const Axes& a, const Geometry& g, DType dtype) {
  const int size = item_size(dtype);
  Source s;
  s.data = const_cast<void*>(a.data);
  s.b = a.b * size;
  s.o = a.o * size;
  s.i = a.i * size;
  if (a.data != nullptr) s.step = g.step_of(a) * size;
  s.wide = is_wide(a, g, size);
  return s;
}

// The same for z, or what is dense like it. `step` is set even where there is no such tensor.
inline Source dense_source(const void* data, const Geometry& g, DType dtype) {
  const Axes axes{data, g.O * g.I, g.I, 1};
  Source s = source_of(axes, g, dtype);
  s.step = g.step_of(axes) * item_size(dtype);
  return s;
}

// The distances of a source in `unit` bytes, where 32 bits hold them all; i is that of a whole vector.
struct Stride32 {
  uint32_t b, o, i, step, row;
};

inline Stride32 stride32_of(const Source& s, const Geometry& g, int64_t unit) {
  const auto units = [unit](int64_t bytes) { return static_cast<uint32_t>(bytes / unit); };
  return {units(s.b), units(s.o), units(16), units(s.step), units(g.tz() * s.b)};
}

// The part of the problem that a block owns, and where in it a thread starts.
struct ThreadOffsets {
  int tx, ty, tz;  // of the thread in its block
  int64_t tile;
  int part, chunk, split;
  int64_t b_begin, b_end;  // batch rows of the chunk
  int64_t from, to;        // of the axis that threads loop along: O in columns, I in rows
  int64_t o, i;            // where this thread starts
  int steps, full;         // how many steps it makes, and how many of them with a full vector
  int tail;                // valid elements of the vectors that are not full
};

template <Tiling kTiling, int N>
__device__ __forceinline__ ThreadOffsets thread_offsets_of(const Geometry& g) {
  ThreadOffsets p;
  const int thread = static_cast<int>(threadIdx.x) >> g.log_k;
  p.tx = thread & (g.tx() - 1);
  p.ty = (thread >> g.log_tx) & (g.ty() - 1);
  p.tz = thread >> (g.log_tx + g.log_ty);
  p.tile = blockIdx.x;
  p.part = static_cast<int>(blockIdx.y);
  p.chunk = p.part / g.splits;
  p.split = p.part % g.splits;
  p.b_begin = p.chunk * g.chunk_rows;
  p.b_end = min(g.B, p.b_begin + g.chunk_rows);
  p.from = p.split * g.split_length;
  if constexpr (kTiling == Tiling::column) {
    p.to = min(g.O, p.from + g.split_length);
    p.i = (p.tile * g.tx() + p.tx) * N;
    p.o = p.from + p.ty;
    const int64_t left = p.to - p.o;
    p.steps = left > 0 ? static_cast<int>((left - 1) >> g.log_ty) + 1 : 0;
    p.tail = static_cast<int>(min(max(g.I - p.i, int64_t{0}), int64_t{N}));
    p.full = p.tail == N ? p.steps : 0;
  } else {
    p.to = min(g.I, p.from + g.split_length);
    p.o = p.tile * g.ty() + p.ty;
    p.i = p.from + p.tx * N;
    constexpr int kLogN = N == 8 ? 3 : 2;
    static_assert(1 << kLogN == N);
    const int log_step = g.log_tx + kLogN;
    const int64_t left = p.to - p.i;
    p.full = left >= N ? static_cast<int>((left - N) >> log_step) + 1 : 0;
    const int64_t rest = left - (static_cast<int64_t>(p.full) << log_step);
    p.tail = rest > 0 ? static_cast<int>(rest) : 0;
    p.steps = p.o < g.O ? p.full + (rest > 0 ? 1 : 0) : 0;
  }
  return p;
}

VK_FN bool by_logarithm(Param param) { return param == Param::logvar || param == Param::log_std; }

// From an element of the second tensor to the log-variance, if its logarithm is what that tensor holds.
struct LogVariance {
  bool adjusts;  // it is not simply the element, or any scale has bounds
  float slope;   // 1 for a log-variance, 2 for a log_std
  Bounds<float> bounds;
};

inline LogVariance log_variance_of(const Problem& p) {
  const float lo = static_cast<float>(p.lo), hi = static_cast<float>(p.hi);
  const bool bounded =
      lo > -std::numeric_limits<float>::infinity() || hi < std::numeric_limits<float>::infinity();
  return {bounded || p.param == Param::log_std, p.param == Param::log_std ? 2.f : 1.f, {lo, hi}};
}

inline dim3 grid_of(const Geometry& g) {
  return dim3(static_cast<unsigned>(g.tiles), static_cast<unsigned>(g.parts()));
}

}  // namespace vk::cuda
