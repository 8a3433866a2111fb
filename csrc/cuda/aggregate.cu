// The aggregate posterior on the GPU.
//
// A block owns a few samples, or in backward a few posteriors, and goes through all of the others in tiles of
// kOthers, kSlab dimensions at a time, which lie in shared memory. There it does two things:
//   pairs       a thread has one of the others and some of the block's own, and adds up their densities over
//               all dimensions;
//   dimensions  a thread has a dimension and one or two of the block's own, and goes through the others.
//   Where
//               that leaves threads over, they share the others out.
// Backward needs the pairs' weights before it comes to the dimensions, so that a tile with more dimensions
// than a slab has is read twice.
//
// What a thread adds up in which order depends on the shapes alone.
#include "aggregate.h"
#include "launch.cuh"

namespace vk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSlab = 32;
constexpr int kPitch = kSlab + 1;     // of a row that threads of different rows read at once
constexpr int kOwnPitch = kSlab + 4;  // of one that all threads read at once, four numbers at a time

template <class R>
inline constexpr int kOthers = sizeof(R) == 4 ? 64 : 32;
template <class R>
inline constexpr int kChunk = sizeof(R) == 4 ? 8 : 4;  // terms that are scaled to one maximum at once

// Rows that a block owns: few where there would be too few blocks for a large GPU.
template <class R, Rows kRowsOwned>
inline constexpr int kOwn = kRowsOwned == Rows::many ? 16 : (sizeof(R) == 4 ? 4 : 8);
constexpr int64_t kManyBlocks = 264;
// That a multiprocessor shall have at once. Left to itself, nvcc spills to have more of them.
constexpr int kLeastBlocks = 2;

// Pairs and rows that a thread has.
template <class R, int Own>
inline constexpr int kPairs = Own * kOthers<R> / kThreads;
template <int Own>
inline constexpr int kRows = Own > 8 ? Own / 8 : 1;

template <class R>
struct Args {
  int64_t N, M, D;
  DType dtype;
  Param param;
  Bounds<R> bounds;
  const void *z, *mu, *scale;
  int64_t columns, first;
  R base, own, next;
  bool weighted;
  int log_dims;  // threads along the dimensions, and dimensions of a slab that are loaded
  int slabs;
  R* scratch;

  // forward
  R *log_qz, *log_qz_dims, *saved;

  // backward
  const R *grad_qz, *grad_dims, *top, *sum;  // the two halves of what forward saved
  void *grad_z, *grad_mu, *grad_scale;
  int64_t sample_blocks;
};

// ---- numbers in memory -----------------------------------------------------------------------------------

__device__ __forceinline__ double load_number(const void* data, DType, int64_t i, double) {
  return __ldg(static_cast<const double*>(data) + i);
}
__device__ __forceinline__ float load_number(const void* data, DType dtype, int64_t i, float) {
  if (dtype == DType::f32) return __ldg(static_cast<const float*>(data) + i);
  if (dtype == DType::bf16) return __bfloat162float(static_cast<const bf16*>(data)[i]);
  return __half2float(static_cast<const f16*>(data)[i]);
}
__device__ __forceinline__ void store_number(double x, void* data, DType, int64_t i) {
  static_cast<double*>(data)[i] = x;
}
__device__ __forceinline__ void store_number(float x, void* data, DType dtype, int64_t i) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[i] = x;
  else if (dtype == DType::bf16)
    static_cast<bf16*>(data)[i] = __float2bfloat16_rn(x);
  else
    static_cast<f16*>(data)[i] = __float2half_rn(x);
}

template <class R>
__device__ __forceinline__ Component<R> component_at(const Args<R>& a, int64_t j, int64_t d) {
  const int64_t i = j * a.D + d;
  const R mu = load_number(a.mu, a.dtype, i, R()), s = load_number(a.scale, a.dtype, i, R());
  return with_param(a.param, [&](auto param) { return component_of<param.value>(mu, s, a.bounds); });
}

// ---- tiles in shared memory ------------------------------------------------------------------------------

template <class R, int Rows, int Pitch>
struct Components {
  R mu[Rows][Pitch], root[Rows][Pitch], peak[Rows][Pitch];

  __device__ __forceinline__ Component<R> at(int row, int d) const {
    return {mu[row][d], root[row][d], peak[row][d]};
  }
  // Posteriors that do not exist add nothing; dimensions that do not add 0.
  __device__ __forceinline__ void load(const Args<R>& a, int64_t j0, int64_t d0) {
    for (int i = threadIdx.x; i < Rows << a.log_dims; i += kThreads) {
      const int row = i >> a.log_dims, d = i & ((1 << a.log_dims) - 1);
      Component<R> q = no_component<R>();
      if (d0 + d >= a.D)
        q.peak = R(0);
      else if (j0 + row < a.M)
        q = component_at(a, j0 + row, d0 + d);
      mu[row][d] = q.mu;
      root[row][d] = q.root;
      peak[row][d] = q.peak;
    }
  }
};

template <class R, int Rows, int Pitch>
__device__ __forceinline__ void load_samples(R (&to)[Rows][Pitch], const Args<R>& a, int64_t i0, int64_t d0) {
  for (int i = threadIdx.x; i < Rows << a.log_dims; i += kThreads) {
    const int row = i >> a.log_dims, d = i & ((1 << a.log_dims) - 1);
    const bool exists = i0 + row < a.N && d0 + d < a.D;
    to[row][d] = exists ? load_number(a.z, a.dtype, (i0 + row) * a.D + d0 + d, R()) : R(0);
  }
}

// The density of a pair with the pair's weight.
template <class R>
__device__ __forceinline__ R weigh(const Args<R>& a, R t, int64_t sample, int64_t posterior) {
  const int64_t own = a.first + sample, next = own + 1 == a.M ? 0 : own + 1;
  if (posterior == own) return with_weight(t, a.own);
  if (posterior == next) return with_weight(t, a.next);
  return t;
}
// Whether any pair of samples [i0, i0 + samples) and posteriors [j0, j0 + posteriors) has a weight.
template <class R>
__device__ __forceinline__ bool any_weight(const Args<R>& a, int64_t i0, int samples, int64_t j0,
                                           int posteriors) {
  const int64_t from = a.first + i0, to = from + samples;  // and `to` itself, the next of the last
  return a.weighted && ((j0 <= to && from < j0 + posteriors) || (j0 == 0 && to >= a.M));
}

// How the threads are divided for the dimensions.
template <class R, int Own>
struct Division {
  int d, row, rows, split, splits;

  __device__ __forceinline__ explicit Division(const Args<R>& a) {
    const int group = static_cast<int>(threadIdx.x) >> a.log_dims, groups = kThreads >> a.log_dims;
    d = static_cast<int>(threadIdx.x) & ((1 << a.log_dims) - 1);
    rows = min(groups, Own);
    row = group & (rows - 1);
    split = group / rows;
    splits = groups / rows;
  }
  __device__ __forceinline__ int span() const { return kOthers<R> / splits; }
  // The thread's q-th row; none where it is not below Own.
  __device__ __forceinline__ int own(int q) const { return row + q * rows; }
};

// A number of a thread that waits in scratch memory while the block is at other slabs.
template <class R, int Rows, int Numbers>
__device__ __forceinline__ R& waiting(const Args<R>& a, int slab, int q, int number) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * a.slabs + slab;
  return a.scratch[((block * Rows + q) * Numbers + number) * kThreads + threadIdx.x];
}

// Sums of all splits of a row and dimension, in their order; the same for each of these threads. `buffer`
// holds kThreads numbers. Called by all threads.
template <class R, int Own>
__device__ __forceinline__ R sum_of_splits(const Division<R, Own>& p, int log_dims, R* buffer, R value) {
  __syncthreads();
  buffer[threadIdx.x] = value;
  __syncthreads();
  R sum = R(0);
  for (int s = 0; s < p.splits; ++s) sum += buffer[((s * p.rows + p.row) << log_dims) + p.d];
  return sum;
}

// ---- forward ---------------------------------------------------------------------------------------------

template <class R, int Own>
struct ForwardShared {
  R z[Own][kOwnPitch];
  union {
    Components<R, kOthers<R>, kPitch> q;
    Powers<R> pairs[Own][kOthers<R>];
    Powers<R> dims[kThreads];
  };
};

// Adds the terms of one row and dimension over `span` others.
template <class R, class Density>
__device__ __forceinline__ void add_terms(Powers<R>& to, int begin, int span, const Density& density) {
  for (int r = begin; r < begin + span; r += kChunk<R>) {
    R t[kChunk<R>];
    R top = to.top;
#pragma unroll
    for (int k = 0; k < kChunk<R>; ++k) {
      t[k] = density(r + k);
      top = larger(top, t[k]);
    }
    R sum = to.sum * power_of_two(to.top - top);
#pragma unroll
    for (int k = 0; k < kChunk<R>; ++k) sum += power_of_two(t[k] - top);
    to = {top, sum};
  }
}

template <class R>
__device__ __forceinline__ void write_powers(const Args<R>& a, int64_t i, int64_t column,
                                             const Powers<R>& p) {
  const int64_t at = i * a.columns + column;
  a.saved[at] = p.top;
  a.saved[a.N * a.columns + at] = p.sum;
  const R log = log_of_powers(p, a.base);
  if (column == 0)
    a.log_qz[i] = log;
  else
    a.log_qz_dims[i * a.D + column - 1] = log;
}

template <class R, Rows kRowsOwned, Terms kTerms>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    aggregate_forward_kernel(const __grid_constant__ Args<R> a) {
  constexpr int Own = kOwn<R, kRowsOwned>;
  constexpr bool kPerDim = kTerms == Terms::both;
  constexpr int kGroups = kThreads / kOthers<R>;
  VK_SHARED(memory);
  auto& shared = *reinterpret_cast<ForwardShared<R, Own>*>(memory);
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * Own;
  const int other = static_cast<int>(threadIdx.x) % kOthers<R>, group = threadIdx.x / kOthers<R>;
  const Division<R, Own> p(a);
  Powers<R> all[kPairs<R, Own>], each[kRows<Own>];
#pragma unroll
  for (int k = 0; k < kPairs<R, Own>; ++k) all[k] = no_powers<R>();
#pragma unroll
  for (int n = 0; n < kRows<Own>; ++n) each[n] = no_powers<R>();

  for (int64_t j0 = 0; j0 < a.M; j0 += kOthers<R>) {
    const bool weights = any_weight(a, i0, Own, j0, kOthers<R>);
    R t[kPairs<R, Own>];
#pragma unroll
    for (int k = 0; k < kPairs<R, Own>; ++k) t[k] = j0 + other < a.M ? R(0) : minus_infinity<R>();
    for (int slab = 0; slab < a.slabs; ++slab) {
      const int64_t d0 = static_cast<int64_t>(slab) * kSlab;
      const int dims = static_cast<int>(min(a.D - d0, int64_t{kSlab}));
      __syncthreads();
      if (a.slabs > 1 || j0 == 0) load_samples(shared.z, a, i0, d0);
      shared.q.load(a, j0, d0);
      __syncthreads();
      R part[kPairs<R, Own>] = {};
#pragma unroll 4
      for (int d = 0; d < dims; ++d) {
        const Component<R> q = shared.q.at(other, d);
#pragma unroll
        for (int k = 0; k < kPairs<R, Own>; ++k) part[k] += log2_density(shared.z[group + k * kGroups][d], q);
      }
#pragma unroll
      for (int k = 0; k < kPairs<R, Own>; ++k) t[k] += part[k];
      if constexpr (kPerDim) {
        if (p.d >= dims) continue;
#pragma unroll
        for (int n = 0; n < kRows<Own>; ++n) {
          if (p.own(n) >= Own) continue;
          if (a.slabs > 1 && j0 > 0)
            each[n] = {waiting<R, kRows<Own>, 2>(a, slab, n, 0), waiting<R, kRows<Own>, 2>(a, slab, n, 1)};
          else if (a.slabs > 1)
            each[n] = no_powers<R>();
          const R z = shared.z[p.own(n)][p.d];
          const auto density = [&](int r) { return log2_density(z, shared.q.at(r, p.d)); };
          if (weights)
            add_terms(each[n], p.split * p.span(), p.span(),
                      [&](int r) { return weigh(a, density(r), i0 + p.own(n), j0 + r); });
          else
            add_terms(each[n], p.split * p.span(), p.span(), density);
          if (a.slabs > 1) {
            waiting<R, kRows<Own>, 2>(a, slab, n, 0) = each[n].top;
            waiting<R, kRows<Own>, 2>(a, slab, n, 1) = each[n].sum;
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kPairs<R, Own>; ++k) {
      if (weights) t[k] = weigh(a, t[k], i0 + group + k * kGroups, j0 + other);
      all[k] = all[k] + Powers<R>{larger(lowest<R>(), t[k]), power_of_two(t[k] - larger(lowest<R>(), t[k]))};
    }
  }

  // The others of a row, as a tree.
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kPairs<R, Own>; ++k) shared.pairs[group + k * kGroups][other] = all[k];
  __syncthreads();
  for (int half = kOthers<R> / 2; half > 0; half /= 2) {
    for (int i = threadIdx.x; i < Own * half; i += kThreads) {
      Powers<R>* row = shared.pairs[i / half];
      row[i % half] = row[i % half] + row[i % half + half];
    }
    __syncthreads();
  }
  if (threadIdx.x < Own && i0 + threadIdx.x < a.N)
    write_powers(a, i0 + threadIdx.x, 0, shared.pairs[threadIdx.x][0]);

  if constexpr (kPerDim) {
    for (int slab = 0; slab < a.slabs; ++slab) {
      const int64_t d = static_cast<int64_t>(slab) * kSlab + p.d;
#pragma unroll
      for (int n = 0; n < kRows<Own>; ++n) {
        if (a.slabs > 1 && d < a.D && p.own(n) < Own)
          each[n] = {waiting<R, kRows<Own>, 2>(a, slab, n, 0), waiting<R, kRows<Own>, 2>(a, slab, n, 1)};
        __syncthreads();
        shared.dims[threadIdx.x] = each[n];
        __syncthreads();
        if (p.split != 0 || p.own(n) >= Own || d >= a.D || i0 + p.own(n) >= a.N) continue;
        Powers<R> sum = each[n];
        for (int s = 1; s < p.splits; ++s)
          sum = sum + shared.dims[((s * p.rows + p.row) << a.log_dims) + p.d];
        write_powers(a, i0 + p.own(n), 1 + d, sum);
      }
    }
  }
}

// ---- backward --------------------------------------------------------------------------------------------

template <class R, int Own>
struct SampleShared {
  R z[Own][kOwnPitch];
  R weight[Own][kOthers<R>];
  Components<R, kOthers<R>, kPitch> q;
};

template <class R, int Own>
struct PosteriorShared {
  Components<R, Own, kOwnPitch> q;
  R weight[Own][kOthers<R>];
  R z[kOthers<R>][kPitch], share[kOthers<R>][kPitch], top[kOthers<R>][kPitch];
};

// The share and the largest term of a sample's sum; none of a sample that does not exist.
template <class R>
struct Share {
  R share, top;
};
template <class R>
__device__ __forceinline__ Share<R> share_at(const Args<R>& a, const R* grad, int64_t grad_at, int64_t i,
                                             int64_t column) {
  if (i >= a.N) return {R(0), -lowest<R>()};
  const int64_t at = i * a.columns + column;
  return {share_of(grad[grad_at], a.sum[at]), a.top[at]};
}

// The gradients of the block's samples.
template <class R, int Own, bool All, bool Dims>
__device__ __forceinline__ void sample_gradients(const Args<R>& a, unsigned char* memory, int64_t i0) {
  constexpr int kGroups = kThreads / kOthers<R>;
  auto& shared = *reinterpret_cast<SampleShared<R, Own>*>(memory);
  const int other = static_cast<int>(threadIdx.x) % kOthers<R>, group = threadIdx.x / kOthers<R>;
  const Division<R, Own> p(a);
  Share<R> all[kPairs<R, Own>] = {}, each[kRows<Own>] = {};
  R pulled[kRows<Own>] = {};
  if constexpr (All) {
#pragma unroll
    for (int k = 0; k < kPairs<R, Own>; ++k) {
      const int64_t i = i0 + group + k * kGroups;
      all[k] = share_at(a, a.grad_qz, i, i, 0);
    }
  }
  const auto load = [&](int64_t j0, int64_t d0) {
    __syncthreads();
    if (a.slabs > 1 || j0 == 0) load_samples(shared.z, a, i0, d0);
    shared.q.load(a, j0, d0);
    __syncthreads();
  };
  for (int64_t j0 = 0; j0 < a.M; j0 += kOthers<R>) {
    const bool weights = any_weight(a, i0, Own, j0, kOthers<R>);
    if constexpr (All) {
      R t[kPairs<R, Own>] = {};
      for (int slab = 0; slab < a.slabs; ++slab) {
        const int64_t d0 = static_cast<int64_t>(slab) * kSlab;
        const int dims = static_cast<int>(min(a.D - d0, int64_t{kSlab}));
        load(j0, d0);
        R part[kPairs<R, Own>] = {};
#pragma unroll 4
        for (int d = 0; d < dims; ++d) {
          const Component<R> q = shared.q.at(other, d);
#pragma unroll
          for (int k = 0; k < kPairs<R, Own>; ++k)
            part[k] += log2_density(shared.z[group + k * kGroups][d], q);
        }
#pragma unroll
        for (int k = 0; k < kPairs<R, Own>; ++k) t[k] += part[k];
      }
#pragma unroll
      for (int k = 0; k < kPairs<R, Own>; ++k) {
        const int row = group + k * kGroups;
        if (weights) t[k] = weigh(a, t[k], i0 + row, j0 + other);
        shared.weight[row][other] = all[k].share * power_of_two(t[k] - all[k].top);
      }
      if (a.slabs == 1) __syncthreads();
    }
    for (int slab = 0; slab < a.slabs; ++slab) {
      const int64_t d0 = static_cast<int64_t>(slab) * kSlab, d = d0 + p.d;
      if (!All || a.slabs > 1) load(j0, d0);
      if (d >= a.D) continue;
#pragma unroll
      for (int n = 0; n < kRows<Own>; ++n) {
        const int row = p.own(n);
        if (row >= Own) continue;
        if constexpr (Dims) {
          if (a.slabs > 1 || j0 == 0)
            each[n] = share_at(a, a.grad_dims, (i0 + row) * a.D + d, i0 + row, 1 + d);
        }
        if (a.slabs > 1) pulled[n] = j0 > 0 ? waiting<R, kRows<Own>, 3>(a, slab, n, 0) : R(0);
        const R z = shared.z[row][p.d];
        const auto add = [&](auto weighted) {
#pragma unroll 4
          for (int r = p.split * p.span(); r < (p.split + 1) * p.span(); ++r) {
            const Component<R> q = shared.q.at(r, p.d);
            R weight = R(0);
            if constexpr (Dims) {
              R t = log2_density(z, q);
              if constexpr (weighted.value) t = weigh(a, t, i0 + row, j0 + r);
              weight = each[n].share * power_of_two(t - each[n].top);
            }
            if constexpr (All) weight += shared.weight[row][r];
            pulled[n] += weight * (z - q.mu) * q.root * q.root;
          }
        };
        if (weights)
          add(std::true_type());
        else
          add(std::false_type());
        if (a.slabs > 1) waiting<R, kRows<Own>, 3>(a, slab, n, 0) = pulled[n];
      }
    }
  }
  R* buffer = &shared.q.mu[0][0];
  for (int slab = 0; slab < a.slabs; ++slab) {
    const int64_t d = static_cast<int64_t>(slab) * kSlab + p.d;
#pragma unroll
    for (int n = 0; n < kRows<Own>; ++n) {
      const bool exists = d < a.D && p.own(n) < Own;
      if (a.slabs > 1 && exists) pulled[n] = waiting<R, kRows<Own>, 3>(a, slab, n, 0);
      const R sum = sum_of_splits(p, a.log_dims, buffer, pulled[n]);
      if (exists && p.split == 0 && i0 + p.own(n) < a.N)
        store_number(grad_z_of(sum), a.grad_z, a.dtype, (i0 + p.own(n)) * a.D + d);
    }
  }
}

// The gradients of the block's posteriors.
template <class R, int Own, bool All, bool Dims>
__device__ __forceinline__ void posterior_gradients_of(const Args<R>& a, unsigned char* memory, int64_t j0) {
  constexpr int kGroups = kThreads / kOthers<R>;
  auto& shared = *reinterpret_cast<PosteriorShared<R, Own>*>(memory);
  const int other = static_cast<int>(threadIdx.x) % kOthers<R>, group = threadIdx.x / kOthers<R>;
  const Division<R, Own> p(a);
  PosteriorSums<R> sums[kRows<Own>] = {};
  const auto load = [&](int64_t i0, int64_t d0) {
    __syncthreads();
    if (a.slabs > 1 || i0 == 0) shared.q.load(a, j0, d0);
    load_samples(shared.z, a, i0, d0);
    if constexpr (Dims) {
      for (int i = threadIdx.x; i < kOthers<R> << a.log_dims; i += kThreads) {
        const int row = i >> a.log_dims, d = i & ((1 << a.log_dims) - 1);
        Share<R> one{R(0), -lowest<R>()};
        if (d0 + d < a.D) one = share_at(a, a.grad_dims, (i0 + row) * a.D + d0 + d, i0 + row, 1 + d0 + d);
        shared.share[row][d] = one.share;
        shared.top[row][d] = one.top;
      }
    }
    __syncthreads();
  };
  for (int64_t i0 = 0; i0 < a.N; i0 += kOthers<R>) {
    // Samples and posteriors change places.
    const bool weights = any_weight(a, i0, kOthers<R>, j0, Own);
    if constexpr (All) {
      R t[kPairs<R, Own>] = {};
      for (int slab = 0; slab < a.slabs; ++slab) {
        const int64_t d0 = static_cast<int64_t>(slab) * kSlab;
        const int dims = static_cast<int>(min(a.D - d0, int64_t{kSlab}));
        load(i0, d0);
        R part[kPairs<R, Own>] = {};
#pragma unroll 4
        for (int d = 0; d < dims; ++d) {
          const R z = shared.z[other][d];
#pragma unroll
          for (int k = 0; k < kPairs<R, Own>; ++k)
            part[k] += log2_density(z, shared.q.at(group + k * kGroups, d));
        }
#pragma unroll
        for (int k = 0; k < kPairs<R, Own>; ++k) t[k] += part[k];
      }
      const Share<R> all = share_at(a, a.grad_qz, i0 + other, i0 + other, 0);
#pragma unroll
      for (int k = 0; k < kPairs<R, Own>; ++k) {
        const int row = group + k * kGroups;
        if (weights) t[k] = weigh(a, t[k], i0 + other, j0 + row);
        shared.weight[row][other] = all.share * power_of_two(t[k] - all.top);
      }
      if (a.slabs == 1) __syncthreads();
    }
    for (int slab = 0; slab < a.slabs; ++slab) {
      const int64_t d0 = static_cast<int64_t>(slab) * kSlab;
      if (!All || a.slabs > 1) load(i0, d0);
      if (d0 + p.d >= a.D) continue;
#pragma unroll
      for (int n = 0; n < kRows<Own>; ++n) {
        const int row = p.own(n);
        if (row >= Own) continue;
        if (a.slabs > 1) {
          sums[n] = {};
          if (i0 > 0)
            sums[n] = {waiting<R, kRows<Own>, 3>(a, slab, n, 0), waiting<R, kRows<Own>, 3>(a, slab, n, 1),
                       waiting<R, kRows<Own>, 3>(a, slab, n, 2)};
        }
        const Component<R> q = shared.q.at(row, p.d);
        const auto add = [&](auto weighted) {
#pragma unroll 4
          for (int r = p.split * p.span(); r < (p.split + 1) * p.span(); ++r) {
            const R z = shared.z[r][p.d], distance = z - q.mu;
            R weight = R(0);
            if constexpr (Dims) {
              R t = log2_density(z, q);
              if constexpr (weighted.value) t = weigh(a, t, i0 + r, j0 + row);
              weight = shared.share[r][p.d] * power_of_two(t - shared.top[r][p.d]);
            }
            if constexpr (All) weight += shared.weight[row][r];
            const R pull = weight * distance * q.root;
            sums[n].weight += weight;
            sums[n].pull += pull;
            sums[n].spread += pull * distance;
          }
        };
        if (weights)
          add(std::true_type());
        else
          add(std::false_type());
        if (a.slabs > 1) {
          waiting<R, kRows<Own>, 3>(a, slab, n, 0) = sums[n].weight;
          waiting<R, kRows<Own>, 3>(a, slab, n, 1) = sums[n].pull;
          waiting<R, kRows<Own>, 3>(a, slab, n, 2) = sums[n].spread;
        }
      }
    }
  }
  R* buffer = &shared.z[0][0];
  for (int slab = 0; slab < a.slabs; ++slab) {
    const int64_t d = static_cast<int64_t>(slab) * kSlab + p.d;
#pragma unroll
    for (int n = 0; n < kRows<Own>; ++n) {
      const int row = p.own(n);
      const bool exists = d < a.D && row < Own;
      if (a.slabs > 1 && exists)
        sums[n] = {waiting<R, kRows<Own>, 3>(a, slab, n, 0), waiting<R, kRows<Own>, 3>(a, slab, n, 1),
                   waiting<R, kRows<Own>, 3>(a, slab, n, 2)};
      PosteriorSums<R> sum;
      sum.weight = sum_of_splits(p, a.log_dims, buffer, sums[n].weight);
      sum.pull = sum_of_splits(p, a.log_dims, buffer, sums[n].pull);
      sum.spread = sum_of_splits(p, a.log_dims, buffer, sums[n].spread);
      if (!exists || p.split != 0 || j0 + row >= a.M) continue;
      const int64_t at = (j0 + row) * a.D + d;
      const R root = component_at(a, j0 + row, d).root, s = load_number(a.scale, a.dtype, at, R());
      const PosteriorGradients<R> g = with_param(
          a.param, [&](auto param) { return posterior_gradients<param.value>(s, a.bounds, root, sum); });
      store_number(g.mu, a.grad_mu, a.dtype, at);
      store_number(g.scale, a.grad_scale, a.dtype, at);
    }
  }
}

template <class R, Rows kRowsOwned, Terms kTerms>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    aggregate_backward_kernel(const __grid_constant__ Args<R> a) {
  constexpr int Own = kOwn<R, kRowsOwned>;
  constexpr bool kAll = kTerms != Terms::dims, kDims = kTerms != Terms::all;
  VK_SHARED(memory);
  const int64_t block = blockIdx.x;
  if (block < a.sample_blocks)
    sample_gradients<R, Own, kAll, kDims>(a, memory, block * Own);
  else
    posterior_gradients_of<R, Own, kAll, kDims>(a, memory, (block - a.sample_blocks) * Own);
}

// ---- launching -------------------------------------------------------------------------------------------

// f(Rows, as a constant): how many of `rows` a block owns.
template <class R, class F>
auto with_rows(int64_t rows, const F& f) {
  if (rows >= kManyBlocks * kOwn<R, Rows::many>) return f(std::integral_constant<Rows, Rows::many>());
  return f(std::integral_constant<Rows, Rows::few>());
}

int slabs_of(const Aggregate& call) { return static_cast<int>(ceil_div(call.D, kSlab)); }

template <class R>
Args<R> args_of(const Aggregate& call, void* scratch) {
  Args<R> a{};
  a.N = call.N;
  a.M = call.M;
  a.D = call.D;
  a.dtype = call.dtype;
  a.param = call.param;
  a.bounds = {static_cast<R>(0.5 * call.lo), static_cast<R>(0.5 * call.hi)};
  a.z = call.z;
  a.mu = call.mu;
  a.scale = call.scale;
  a.columns = call.columns();
  a.first = call.first;
  a.base = static_cast<R>(call.base);
  a.own = static_cast<R>(call.own * kLog2E);
  a.next = static_cast<R>(call.next * kLog2E);
  a.weighted = call.weighted();
  a.log_dims = call.D > 16 ? 5 : (call.D > 8 ? 4 : 3);
  a.slabs = slabs_of(call);
  a.scratch = static_cast<R*>(scratch);
  return a;
}

template <class R, int Own>
size_t scratch_of(const Aggregate& call, int64_t blocks, int numbers) {
  const int64_t slabs = slabs_of(call);
  return slabs > 1 ? static_cast<size_t>(blocks * slabs * kRows<Own> * numbers * kThreads) * sizeof(R) : 0;
}

template <class R>
void launch_forward(const AggregateForward& call, void* scratch, cudaStream_t stream) {
  Args<R> a = args_of<R>(call, scratch);
  a.log_qz = static_cast<R*>(call.log_qz);
  a.log_qz_dims = static_cast<R*>(call.log_qz_dims);
  a.saved = static_cast<R*>(call.saved);
  with_rows<R>(call.N, [&](auto rows) {
    constexpr int Own = kOwn<R, rows.value>;
    constexpr size_t kShared = sizeof(ForwardShared<R, Own>);
    const dim3 grid(static_cast<unsigned>(ceil_div(call.N, Own)));
    const auto kernel = call.per_dim ? aggregate_forward_kernel<R, rows.value, Terms::both>
                                     : aggregate_forward_kernel<R, rows.value, Terms::all>;
    VK_LAUNCH(kernel, grid, kThreads, kShared, stream, a);
  });
}

template <class R>
void launch_backward(const AggregateBackward& call, void* scratch, cudaStream_t stream) {
  Args<R> a = args_of<R>(call, scratch);
  a.grad_qz = static_cast<const R*>(call.grad_qz);
  a.grad_dims = static_cast<const R*>(call.grad_dims);
  a.top = static_cast<const R*>(call.saved);
  a.sum = a.top + call.N * a.columns;
  a.grad_z = call.grad_z;
  a.grad_mu = call.grad_mu;
  a.grad_scale = call.grad_scale;
  with_rows<R>(call.N + call.M, [&](auto rows) {
    constexpr int Own = kOwn<R, rows.value>;
    constexpr size_t kShared = std::max(sizeof(SampleShared<R, Own>), sizeof(PosteriorShared<R, Own>));
    a.sample_blocks = ceil_div(call.N, Own);
    const dim3 grid(static_cast<unsigned>(a.sample_blocks + ceil_div(call.M, Own)));
    const auto kernel = a.grad_dims == nullptr ? aggregate_backward_kernel<R, rows.value, Terms::all>
                        : a.grad_qz == nullptr ? aggregate_backward_kernel<R, rows.value, Terms::dims>
                                               : aggregate_backward_kernel<R, rows.value, Terms::both>;
    VK_LAUNCH(kernel, grid, kThreads, kShared, stream, a);
  });
}

template <class F>
auto with_compute(DType dtype, const F& f) {
  return dtype == DType::f64 ? f(double()) : f(float());
}

}  // namespace

size_t aggregate_scratch(const AggregateForward& call) {
  if (!call.per_dim) return 0;
  return with_compute(call.dtype, [&](auto zero) {
    using R = decltype(zero);
    return with_rows<R>(call.N, [&](auto rows) {
      constexpr int Own = kOwn<R, rows.value>;
      return scratch_of<R, Own>(call, ceil_div(call.N, Own), 2);
    });
  });
}

size_t aggregate_scratch(const AggregateBackward& call) {
  return with_compute(call.dtype, [&](auto zero) {
    using R = decltype(zero);
    return with_rows<R>(call.N + call.M, [&](auto rows) {
      constexpr int Own = kOwn<R, rows.value>;
      return scratch_of<R, Own>(call, ceil_div(call.N, Own) + ceil_div(call.M, Own), 3);
    });
  });
}

cudaError_t aggregate(const AggregateForward& call, void* scratch, cudaStream_t stream) {
  with_compute(call.dtype, [&](auto zero) { launch_forward<decltype(zero)>(call, scratch, stream); });
  return cudaGetLastError();
}

cudaError_t aggregate(const AggregateBackward& call, void* scratch, cudaStream_t stream) {
  with_compute(call.dtype, [&](auto zero) { launch_backward<decltype(zero)>(call, scratch, stream); });
  return cudaGetLastError();
}

}  // namespace vk::cuda
