// The backward kernels for any problem, and the choice of the kernel: every gradient in one elementwise pass.
// Which groups are open is read from what the forward wrote, never computed again.
#include "backward.cuh"
#include "element.cuh"

namespace vk::cuda {
namespace {

// Where in the tensors the quad is that a thread works on.
struct BackwardPosition {
  const char *mu, *scale, *prior_mu, *prior_scale;
  char *grad_mu, *grad_scale, *grad_prior_mu, *grad_prior_scale;
  int64_t storage, batch_row;
  int valid;
};

// The part of the KL's gradient that differs between batch rows: its factor, and a bit for each group of the
// vector that is 1 where the group is open.
template <class R>
struct RowGain {
  R gain = 0;
  unsigned open = ~0u;
};

template <Tiling kTiling, class R>
__device__ __forceinline__ RowGain<R> row_gain(const BackwardArgs<R>& a, const ThreadOffsets& p,
                                               const BackwardPosition& at, R gain) {
  RowGain<R> row;
  if (!a.by_row()) return row;
  row.gain = a.reduction == Reduction::none ? a.grad_kl[at.batch_row] : gain;
  if (a.clamp != Clamp::sample) return row;
  const int64_t cell = at.batch_row * a.groups + (kTiling == Tiling::column ? p.i : p.o);
  const int shift = static_cast<int>(cell % 8), bits = kTiling == Tiling::column ? at.valid : 1;
  row.open = a.open[cell / 8];
  if (shift + bits > 8) row.open |= static_cast<unsigned>(a.open[cell / 8 + 1]) << 8;
  row.open >>= shift;
  return row;
}

// Computes the gradients of one quad. `shared`: the part of the KL's gradient that is the same for all batch
// rows, by column or one number for all elements.
template <class T, Tiling kTiling, bool HasKL, bool Sample, int kGroups>
__device__ __forceinline__ void backward_quad(const BackwardArgs<compute_t<T>>& a, const PhiloxKeys& keys,
                                              const ThreadOffsets& p, const BackwardPosition& at,
                                              compute_t<T> gain, const compute_t<T> (&shared)[kGroups]) {
  using R = compute_t<T>;
  const bool prior = HasKL && a.prior_mu.data != nullptr;
  Quad<T> mu{}, scale, prior_mu{}, prior_scale{};
  scale.load(at.scale, a.scale.i, a.scale.wide, at.valid, a.dtype);
  if (HasKL) mu.load(at.mu, a.mu.i, a.mu.wide, at.valid, a.dtype);
  if (prior) {
    prior_mu.load(at.prior_mu, a.prior_mu.i, a.prior_mu.wide, at.valid, a.dtype);
    prior_scale.load(at.prior_scale, a.prior_scale.i, a.prior_scale.wide, at.valid, a.dtype);
  }
  R sum[4] = {}, noise[4] = {}, c[4] = {};
  if constexpr (Sample) {
    const int lanes = 1 << a.g.log_k, lane = threadIdx.x & (lanes - 1);
    int64_t storage = at.storage + lane * a.numel;
    for (int64_t k = lane; k < a.K; k += lanes) {
      reload_shared();
      Quad<T> grad;
      R eps[4];
      grad.load(static_cast<const char*>(a.grad_z.data) + storage * a.grad_z.i, a.grad_z.i, a.grad_z.wide,
                at.valid, a.dtype);
      normals(keys, static_cast<uint64_t>(storage), a.g.aligned, eps);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[j] += grad.value[j];
        noise[j] += grad.value[j] * eps[j];
      }
      storage += lanes * a.numel;
    }
    for (int m = 1; m < lanes; m *= 2) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[j] += __shfl_xor_sync(0xFFFFFFFFu, sum[j], m);
        noise[j] += __shfl_xor_sync(0xFFFFFFFFu, noise[j], m);
      }
    }
    if (lane != 0 || at.valid == 0) return;
  }
  if constexpr (HasKL) {
    const RowGain<R> row = row_gain<kTiling>(a, p, at, gain);
    const R weight = a.weight != nullptr ? a.weight[at.batch_row] : R(1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int group = kGroups == 1 ? 0 : j;
      c[j] = weight * (shared[group] + ((row.open >> group & 1) != 0 ? row.gain : R(0)));
    }
    if (a.grad_kl != nullptr && a.reduction == Reduction::elementwise) {
      Quad<R> grad_kl;
      grad_kl.load(reinterpret_cast<const char*>(a.grad_kl + at.storage), sizeof(R), a.grad_kl_wide, at.valid,
                   a.dtype);
#pragma unroll
      for (int j = 0; j < 4; ++j) c[j] += grad_kl.value[j];
    }
  }
  // The gradients overwrite the elements.
  quad_gradients<HasKL, Sample>(a.param, a.slope, Shares<R>{a.bounds, a.posterior_share, a.prior_share},
                                prior, mu.value, scale.value, prior_mu.value, prior_scale.value, sum, noise,
                                c);
  if (at.grad_mu != nullptr) mu.store(at.grad_mu, a.grad_mu.i, a.grad_mu.wide, at.valid, a.dtype);
  if (at.grad_scale != nullptr)
    scale.store(at.grad_scale, a.grad_scale.i, a.grad_scale.wide, at.valid, a.dtype);
  if (prior && at.grad_prior_mu != nullptr)
    prior_mu.store(at.grad_prior_mu, a.grad_prior_mu.i, a.grad_prior_mu.wide, at.valid, a.dtype);
  if (prior && at.grad_prior_scale != nullptr)
    prior_scale.store(at.grad_prior_scale, a.grad_prior_scale.i, a.grad_prior_scale.wide, at.valid, a.dtype);
}

template <class T, Tiling kTiling, bool HasKL, bool Sample>
__global__ void __launch_bounds__(kBlock, 1)
    backward_kernel(const __grid_constant__ BackwardArgs<compute_t<T>> a) {
  using R = compute_t<T>;
  constexpr int kGroups = HasKL && kTiling == Tiling::column ? 4 : 1;
  VK_SHARED(memory);
  const PhiloxKeys& keys = keys_for<Sample>(a.keys, memory);
  const Geometry& g = a.g;
  const ThreadOffsets p = thread_offsets_of<kTiling, 4>(g);
  // Where lanes of a warp add up samples, all make the same number of steps, some without elements.
  const bool together = Sample && g.log_k > 0;
  const bool idle = p.steps == 0 || (kTiling == Tiling::column && p.tail == 0);
  if (!together && idle) return;
  const int64_t step_length = kTiling == Tiling::column ? g.ty() : static_cast<int64_t>(g.tx()) * 4;
  const int steps = together ? static_cast<int>(ceil_div(p.to - p.from, step_length)) : p.steps;
  const bool prior = HasKL && a.prior_mu.data != nullptr;
  const int64_t storage_step = kTiling == Tiling::column ? g.ty() * g.I : static_cast<int64_t>(g.tx()) * 4;

  R shared[kGroups] = {}, gain = 0;
  if constexpr (HasKL) gain = shared_gradients<kGroups>(a, kTiling == Tiling::column ? p.i : p.o, shared);

  for (int64_t row = p.b_begin; row < p.b_end; row += g.tz()) {
    const int64_t b = row + p.tz;
    const bool none = idle || b >= p.b_end;
    if (none && !together) break;
    BackwardPosition at{};
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
    for (int step = 0; step < steps; ++step) {
      at.valid = none || step >= p.steps ? 0 : (step < p.full ? 4 : p.tail);
      backward_quad<T, kTiling, HasKL, Sample>(a, keys, p, at, gain, shared);
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

template <class R>
void launch_kernel(const BackwardArgs<R>& a, bool has_kl, bool sample, cudaStream_t stream) {
  if constexpr (sizeof(R) == 4) {
    if (a.g.plain) return backward_plain(a, has_kl, sample, stream);
  }
  choose_general(a.g.tiling, has_kl, sample,
                 [&]<Tiling kTiling, bool HasKL, bool Sample>(GeneralKernel<kTiling, HasKL, Sample>) {
                   const auto kernel = backward_kernel<general_t<R>, kTiling, HasKL, Sample>;
                   VK_LAUNCH(kernel, grid_of(a.g), a.g.threads(), kKeyBytes<Sample>, stream, a);
                 });
}

// An output that is not wanted counts as one that is laid out like `other`, so that it does not keep vectors
// from being moved whole.
Axes axes_of_output(const Output& out, const Output& other, const Problem& p) {
  return axes_of(out.data != nullptr ? out : Output{nullptr, other.stride}, p);
}

template <class R>
void launch_backward(const Backward& call, cudaStream_t stream) {
  const bool kl = call.has_kl && (call.grad_kl != nullptr || call.grad_kl_per_group != nullptr);
  const bool prior = kl && call.prior_mu.data != nullptr;
  BackwardArgs<R> a{};
  Axes mu = axes_of(call.mu, call), scale = axes_of(call.scale, call);
  Axes prior_mu = axes_of(call.prior_mu, call), prior_scale = axes_of(call.prior_scale, call);
  Axes out_mu = axes_of_output(call.grad_mu, call.grad_scale, call);
  Axes out_scale = axes_of_output(call.grad_scale, call.grad_mu, call);
  Axes out_prior_mu = axes_of_output(call.grad_prior_mu, call.grad_prior_scale, call);
  Axes out_prior_scale = axes_of_output(call.grad_prior_scale, call.grad_prior_mu, call);
  const bool out_prior =
      prior && (call.grad_prior_mu.data != nullptr || call.grad_prior_scale.data != nullptr);
  a.K = call.has_z ? call.K : 0;
  a.clamp = call.clamp;
  a.reduction = call.reduction;
  a.grad_kl = static_cast<const R*>(call.grad_kl);
  const bool sample = !kl || call.has_z;
  const bool by_cell =
      kl && (a.by_row() || (a.grad_kl != nullptr && call.reduction == Reduction::elementwise));
  const bool wanted = call.grad_scale.data != nullptr && (!kl || call.grad_mu.data != nullptr) &&
                      (call.grad_prior_mu.data == nullptr) == (call.grad_prior_scale.data == nullptr);
  const Purpose purpose{
      kl, sample, false, sample && a.K > 1, wanted && !by_cell && !(sample && a.K != 1), call.grad_z};
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
  a.grad_z = dense_source(call.grad_z, g, call.dtype);
  a.grad_z.wide = is_wide_dense(call.grad_z, g, call.K, item_size(call.dtype));
  a.in = stride32_of(a.scale, g, 16);
  a.out = stride32_of(a.grad_scale, g, 16);
  a.prior_in = stride32_of(a.prior_scale, g, 16);
  a.prior_out = stride32_of(a.grad_prior_scale, g, 16);
  a.quads = stride32_of(a.grad_z, g, 4 * item_size(call.dtype));
  a.bounds = bounds_of<R>(call);
  a.log_variance = log_variance_of(call);
  a.special = a.log_variance.adjusts || (kl && call.weight != nullptr) ||
              (prior && (call.posterior_share != 1 || call.prior_share != 1));
  a.posterior_share = static_cast<R>(call.posterior_share);
  a.prior_share = static_cast<R>(call.prior_share);
  if (call.has_z) a.keys = keys_of(call);
  a.dtype = call.dtype;
  a.param = call.param;
  a.slope = log_slope<R>(call.param);
  a.group_sums = call.group_sums;
  a.grad_kl_wide = is_wide_dense(call.grad_kl, g, 1, sizeof(R));
  a.row_size = static_cast<R>(call.row_size());
  a.grad_kl_per_group = static_cast<const R*>(call.grad_kl_per_group);
  a.gate = static_cast<const R*>(call.gate);
  a.weight = static_cast<const R*>(call.weight);
  a.open = call.open;
  launch_kernel(a, kl, sample, stream);
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
