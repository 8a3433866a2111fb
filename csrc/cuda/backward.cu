// The backward kernels: every gradient in one elementwise pass. What the forward decided is read, never
// decided again.
#include "launch.cuh"

namespace vk::cuda {
namespace {

template <class R>
struct BackwardArgs {
  Geometry g;
  int64_t groups, numel, K;
  Source mu, scale, prior_mu, prior_scale;
  Source grad_mu, grad_scale, grad_prior_mu, grad_prior_scale;
  Shares<R> shares;
  Keys keys;
  DType dtype;
  Param param;
  Clamp clamp;
  Reduction reduction;
  bool group_sums, grad_z_wide, grad_kl_wide;
  R row_size, slope;

  const char* grad_z;
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

// Where a thread's vector is in the tensors.
struct Position {
  const char *mu, *scale, *prior_mu, *prior_scale;
  char *grad_mu, *grad_scale, *grad_prior_mu, *grad_prior_scale;
  int64_t storage, batch_row;
  int valid;
};

// One vector. `shared`: what of its KL's gradient all batch rows share, by column or for all of it.
template <class T, Layout L, bool HasKL, bool Sample, bool Plain, int kGroups>
__device__ __forceinline__ void backward_vector(const BackwardArgs<compute_t<T>>& a, const PhiloxKeys& keys,
                                                const Place& p, const Position& at, compute_t<T> gain,
                                                compute_t<T> (&shared)[kGroups]) {
  using R = compute_t<T>;
  constexpr int N = kVector<T>;
  const bool prior = !Plain && HasKL && a.prior_mu.data != nullptr;
  Vector<T> mu_words{}, scale_words, grad_words, prior_mu_words{}, prior_scale_words{};
  scale_words.load(at.scale, a.scale.i, Plain || a.scale.wide, at.valid, a.dtype);
  if (HasKL) mu_words.load(at.mu, a.mu.i, Plain || a.mu.wide, at.valid, a.dtype);
  if (prior) {
    prior_mu_words.load(at.prior_mu, a.prior_mu.i, Plain || a.prior_mu.wide, at.valid, a.dtype);
    prior_scale_words.load(at.prior_scale, a.prior_scale.i, Plain || a.prior_scale.wide, at.valid, a.dtype);
  }
  if (Plain && Sample)
    grad_words.load(a.grad_z + at.storage * element_size<T>(a.dtype), element_size<T>(a.dtype), true,
                    at.valid, a.dtype);

  R weight = 1, row_gain = 0;
  unsigned open = ~0u;
  if constexpr (HasKL) {
    if (a.weight != nullptr) weight = a.weight[at.batch_row];
    if (!Plain && a.by_row()) {
      row_gain = a.reduction == Reduction::none ? a.grad_kl[at.batch_row] : gain;
      if (a.clamp == Clamp::sample) {
        const int64_t cell = at.batch_row * a.groups + (L == Layout::column ? p.i : p.o);
        const int shift = static_cast<int>(cell % 8), bits = L == Layout::column ? at.valid : 1;
        open = a.open[cell / 8];
        if (shift + bits > 8) open |= static_cast<unsigned>(a.open[cell / 8 + 1]) << 8;
        open >>= shift;
      }
    }
  }

  auto quad = [&](int q) {
    forget_shared();
    R mu[4], s[4], sum[4] = {}, noise[4] = {}, c[4] = {}, prior_mu[4] = {}, prior_s[4] = {};
    mu_words.front(mu);
    scale_words.front(s);
    if (prior) {
      prior_mu_words.front(prior_mu);
      prior_scale_words.front(prior_s);
    }
    if constexpr (Plain && Sample) {
      R eps[4];
      grad_words.front(sum);
      normals(keys, static_cast<uint64_t>(at.storage) + 4 * q, true, eps);
#pragma unroll
      for (int j = 0; j < 4; ++j) noise[j] = sum[j] * eps[j];
    } else if constexpr (Sample) {
      int64_t storage = at.storage + 4 * q;
      for (int64_t k = 0; k < a.K; ++k) {
        R grad[4], eps[4];
        grad_words.load(a.grad_z + storage * element_size<T>(a.dtype), element_size<T>(a.dtype),
                        a.grad_z_wide, at.valid, a.dtype);
        grad_words.front(grad);
        normals(keys, static_cast<uint64_t>(storage), a.g.aligned, eps);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[j] += grad[j];
          noise[j] += grad[j] * eps[j];
        }
        storage += a.numel;
      }
    }
    if constexpr (HasKL) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int group = kGroups == 1 ? 0 : j;
        const R own = Plain || (open >> group & 1) == 0 ? R(0) : row_gain;
        c[j] = weight * (shared[group] + own);
      }
      if (!Plain && a.grad_kl != nullptr && a.reduction == Reduction::elementwise) {
        R grad[4];
        Vector<R> grad_kl;
        grad_kl.load(reinterpret_cast<const char*>(a.grad_kl + at.storage), sizeof(R), a.grad_kl_wide,
                     at.valid, a.dtype);
        grad_kl.front(grad);
#pragma unroll
        for (int j = 0; j < 4; ++j) c[j] += grad[j];
      }
      if constexpr (kGroups == 8) {
        open >>= 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const R front = shared[j];
          shared[j] = shared[j + 4];
          shared[j + 4] = front;
        }
      }
    }
    quad_gradients<Plain, HasKL>(a.param, a.slope, a.shares, prior, mu, s, prior_mu, prior_s, sum, noise, c);
    // The gradients take the place of the elements.
    mu_words.set_front(mu);
    scale_words.set_front(s);
    mu_words.turn();
    scale_words.turn();
    if (Plain && Sample) grad_words.turn();
    if (prior) {
      prior_mu_words.set_front(prior_mu);
      prior_scale_words.set_front(prior_s);
      prior_mu_words.turn();
      prior_scale_words.turn();
    }
  };
#pragma unroll 1
  for (int q = 0; q < N / 4; ++q) quad(q);
  if (at.grad_mu != nullptr)
    mu_words.store(at.grad_mu, a.grad_mu.i, Plain || a.grad_mu.wide, at.valid, a.dtype);
  if (at.grad_scale != nullptr)
    scale_words.store(at.grad_scale, a.grad_scale.i, Plain || a.grad_scale.wide, at.valid, a.dtype);
  if (prior && at.grad_prior_mu != nullptr)
    prior_mu_words.store(at.grad_prior_mu, a.grad_prior_mu.i, a.grad_prior_mu.wide, at.valid, a.dtype);
  if (prior && at.grad_prior_scale != nullptr)
    prior_scale_words.store(at.grad_prior_scale, a.grad_prior_scale.i, a.grad_prior_scale.wide, at.valid,
                            a.dtype);
}

// Blocks on a multiprocessor that leave enough registers (80, 64) for plain quads.
template <class T, Path P>
inline constexpr int kBlocksAtOnce = P == Path::general ? 1 : (sizeof(T) == 2 ? 3 : 4);

template <class T, Layout L, bool HasKL, bool Sample, Path P>
__global__ void __launch_bounds__(kBlock, (kBlocksAtOnce<T, P>))
    backward_kernel(const __grid_constant__ BackwardArgs<compute_t<T>> a) {
  using R = compute_t<T>;
  constexpr int N = kVector<T>;
  constexpr int kGroups = HasKL && L == Layout::column ? N : 1;
  VK_SHARED(memory);
  const PhiloxKeys& keys = keys_for<Sample ? P : Path::host>(a.keys, memory);
  const Geometry& g = a.g;
  const Place p = place_of<L, N>(g);
  if (p.steps == 0 || (L == Layout::column && p.tail == 0)) return;
  const bool prior = P == Path::general && HasKL && a.prior_mu.data != nullptr;
  const int64_t storage_step = L == Layout::column ? g.ty() * g.I : static_cast<int64_t>(g.tx()) * N;

  R shared[kGroups] = {}, gain = 0;
  if constexpr (HasKL) {
    const R inverse_weight = fabs(a.gate[0]);
    gain = loss_gain(a, inverse_weight);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int64_t group = L == Layout::column ? p.i + j : p.o;
      if (group < a.groups) shared[j] = shared_gradient(a, group, gain, inverse_weight);
    }
  }

  for (int64_t b = p.b_begin + p.tz; b < p.b_end; b += g.tz()) {
    Position at{};
    if (HasKL) at.mu = element_of(a.mu, b, p.o, p.i);
    at.scale = element_of(a.scale, b, p.o, p.i);
    if (a.grad_mu.data != nullptr) at.grad_mu = element_of(a.grad_mu, b, p.o, p.i);
    if (a.grad_scale.data != nullptr) at.grad_scale = element_of(a.grad_scale, b, p.o, p.i);
    if (prior) {
      at.prior_mu = element_of(a.prior_mu, b, p.o, p.i);
      at.prior_scale = element_of(a.prior_scale, b, p.o, p.i);
    }
    if (prior && a.grad_prior_mu.data != nullptr) at.grad_prior_mu = element_of(a.grad_prior_mu, b, p.o, p.i);
    if (prior && a.grad_prior_scale.data != nullptr)
      at.grad_prior_scale = element_of(a.grad_prior_scale, b, p.o, p.i);
    at.storage = (b * g.O + p.o) * g.I + p.i;
    at.batch_row = g.folded ? p.o : b;
    for (int step = 0; step < p.steps; ++step) {
      at.valid = P != Path::general || step < p.full ? N : p.tail;
      backward_vector<T, L, HasKL, Sample, P != Path::general>(a, keys, p, at, gain, shared);
      if (HasKL) at.mu += a.mu.step;
      at.scale += a.scale.step;
      at.grad_mu += a.grad_mu.step;
      at.grad_scale += a.grad_scale.step;
      if (prior) {
        at.prior_mu += a.prior_mu.step;
        at.prior_scale += a.prior_scale.step;
        at.grad_prior_mu += a.grad_prior_mu.step;
        at.grad_prior_scale += a.grad_prior_scale.step;
      }
      at.storage += storage_step;
      if (g.folded) at.batch_row += g.ty();
    }
  }
}

template <class T, Layout L, bool HasKL, bool Sample, Path P>
void launch(const BackwardArgs<compute_t<T>>& a, cudaStream_t stream) {
  const auto kernel = backward_kernel<T, L, HasKL, Sample, P>;
  VK_LAUNCH(kernel, grid_of(a.g), a.g.threads(), (key_bytes<Sample, P>()), stream, a);
}

// T: the element type of a plain kernel.
template <class T, Layout L, bool HasKL, bool Sample>
void launch_plain(const BackwardArgs<float>& a, cudaStream_t stream) {
  if constexpr (Sample) {
    if (a.keys.state != nullptr) return launch<T, L, HasKL, Sample, Path::device>(a, stream);
  }
  launch<T, L, HasKL, Sample, Path::host>(a, stream);
}

template <Layout L, bool HasKL, bool Sample, class R>
void launch_path(const BackwardArgs<R>& a, cudaStream_t stream) {
  if constexpr (sizeof(R) == 8) {
    launch<double, L, HasKL, Sample, Path::general>(a, stream);
  } else if (!a.g.plain) {
    launch<AnyFloat, L, HasKL, Sample, Path::general>(a, stream);
  } else if (a.dtype == DType::f32) {
    launch_plain<float, L, HasKL, Sample>(a, stream);
  } else if (a.dtype == DType::bf16) {
    launch_plain<bf16, L, HasKL, Sample>(a, stream);
  } else {
    launch_plain<f16, L, HasKL, Sample>(a, stream);
  }
}

template <Layout L, class R>
void launch_layout(const BackwardArgs<R>& a, bool kl, cudaStream_t stream) {
  // Without any gradient that is used, K = 0 samples give zeros.
  if (!kl)
    launch_path<L, false, true>(a, stream);
  else if (a.grad_z != nullptr)
    launch_path<L, true, true>(a, stream);
  else
    launch_path<L, true, false>(a, stream);
}

// An output that is not wanted stands in no vector's way: it counts as a dense one.
Axes axes_of_output(const Output& out, const Problem& p) {
  return axes_of(out.data != nullptr ? out : Output{nullptr, p.dense()}, p);
}

template <class R>
void launch_backward(const Backward& call, cudaStream_t stream) {
  const bool kl = call.has_kl && (call.grad_kl != nullptr || call.grad_kl_per_group != nullptr);
  const bool prior = kl && call.prior_mu.data != nullptr;
  BackwardArgs<R> a{};
  Axes mu = axes_of(call.mu, call), scale = axes_of(call.scale, call);
  Axes prior_mu = axes_of(call.prior_mu, call), prior_scale = axes_of(call.prior_scale, call);
  Axes out_mu = axes_of_output(call.grad_mu, call), out_scale = axes_of_output(call.grad_scale, call);
  Axes out_prior_mu = axes_of_output(call.grad_prior_mu, call);
  Axes out_prior_scale = axes_of_output(call.grad_prior_scale, call);
  const bool out_prior =
      prior && (call.grad_prior_mu.data != nullptr || call.grad_prior_scale.data != nullptr);
  a.K = call.grad_z != nullptr ? call.K : 0;
  a.clamp = call.clamp;
  a.reduction = call.reduction;
  a.grad_kl = static_cast<const R*>(call.grad_kl);
  const bool sample = !kl || call.grad_z != nullptr;
  const bool by_cell =
      kl && (a.by_row() || (a.grad_kl != nullptr && call.reduction == Reduction::elementwise));
  const Purpose purpose{kl, sample, false, !prior && !by_cell && !(sample && a.K != 1), call.grad_z};
  if (out_prior)
    a.g = geometry_of(call, purpose,
                      Tensors<8>{{&mu, &scale, &prior_mu, &prior_scale, &out_mu, &out_scale, &out_prior_mu,
                                  &out_prior_scale}});
  else if (prior)
    a.g = geometry_of(call, purpose, Tensors<6>{{&mu, &scale, &prior_mu, &prior_scale, &out_mu, &out_scale}});
  else
    a.g = geometry_of(call, purpose, Tensors<4>{{&mu, &scale, &out_mu, &out_scale}});
  const Geometry& g = a.g;
  a.groups = call.G;
  a.numel = call.numel();
  a.mu = source_of(mu, g, call.dtype);
  a.scale = source_of(scale, g, call.dtype);
  a.grad_mu = source_of(out_mu, g, call.dtype);
  a.grad_scale = source_of(out_scale, g, call.dtype);
  if (prior) {
    a.prior_mu = source_of(prior_mu, g, call.dtype);
    a.prior_scale = source_of(prior_scale, g, call.dtype);
  }
  if (out_prior) {
    a.grad_prior_mu = source_of(out_prior_mu, g, call.dtype);
    a.grad_prior_scale = source_of(out_prior_scale, g, call.dtype);
  }
  a.shares = {bounds_of<R>(call), static_cast<R>(call.posterior_share), static_cast<R>(call.prior_share)};
  if (call.grad_z != nullptr) a.keys = keys_of(call);
  a.dtype = call.dtype;
  a.param = call.param;
  a.slope = log_slope<R>(call.param);
  a.group_sums = call.group_sums;
  a.grad_z_wide = is_wide_dense(call.grad_z, g, call.K, size_of(call.dtype));
  a.grad_kl_wide = is_wide_dense(call.grad_kl, g, 1, sizeof(R));
  a.row_size = static_cast<R>(call.row_size());
  a.grad_z = static_cast<const char*>(call.grad_z);
  a.grad_kl_per_group = static_cast<const R*>(call.grad_kl_per_group);
  a.gate = static_cast<const R*>(call.gate);
  a.weight = static_cast<const R*>(call.weight);
  a.open = call.open;
  if (g.layout == Layout::column)
    launch_layout<Layout::column>(a, kl, stream);
  else
    launch_layout<Layout::row>(a, kl, stream);
}

}  // namespace

cudaError_t backward(const Backward& call, cudaStream_t stream) {
  if (call.numel() == 0) return cudaSuccess;
  if (call.dtype == DType::f64)
    launch_backward<double>(call, stream);
  else
    launch_backward<float>(call, stream);
  return cudaGetLastError();
}

}  // namespace vk::cuda
