// The forward kernels for any problem, and the choice of the kernel: z, the KL, or both in one pass over mu
// and the scale.
#include "element.cuh"
#include "finish.cuh"

namespace vk::cuda {
namespace {

// Free bits on a quad of cells that are single elements, the first of them in `group`: returns the sum of
// their values and sets their open bits in `open`.
template <class R>
__device__ __forceinline__ R clamp_quad(const ForwardArgs<R>& a, int64_t group, int valid, const R (&kl)[4],
                                        unsigned& open) {
  R sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= valid) break;
    if (a.clamp == Clamp::sample) {
      const FreeBits<R> bits = free_bits_of(a, group + j);
      open |= static_cast<unsigned>(bits.open(kl[j])) << j;
      sum += bits.value(kl[j], a.penalty);
    } else {
      sum += kl[j];
    }
  }
  return sum;
}

// Writes what clamp_quad computed for four columns of row b, if that row exists. Called by whole warps.
template <class R>
__device__ __forceinline__ void write_cells(const ForwardArgs<R>& a, const ThreadOffsets& p, int64_t b,
                                            bool exists, int valid, R sum, unsigned open) {
  if (a.clamp == Clamp::sample) {
    if (a.masks != nullptr) {
      if (valid > 0) a.masks[b * a.g.vectors() + p.i / 4] = static_cast<uint8_t>(open);
    } else {
      // Rows are whole bytes, each shared by two neighbours.
      open |= __shfl_xor_sync(0xFFFFFFFFu, open, 1) << 4;
      if (valid > 0 && p.i % 8 == 0) a.open[(b * a.groups + p.i) / 8] = static_cast<uint8_t>(open);
    }
  }
  if (a.reduction == Reduction::none) {
    const R row = lane_sum(sum, a.g.tx());
    if (p.tx == 0 && exists) (a.row_values ? a.row_values[b * a.g.tiles + p.tile] : a.kl[b]) = row;
  }
}

// Free bits on the cells of tz batch rows from `row` on, row-major in shared memory; a warp for each row.
// Returns this thread's share of the loss.
template <class R>
__device__ __forceinline__ R clamp_cells(const ForwardArgs<R>& a, const ThreadOffsets& p, int64_t row,
                                         const R* cells) {
  const int width = a.g.width(), lane = threadIdx.x % 32;
  R loss = 0;
  for (int z = threadIdx.x / 32; z < a.g.tz() && row + z < p.b_end; z += blockDim.x / 32) {
    const int64_t b = row + z;
    R sum = 0;
    for (int first = 0; first < width; first += 32) {
      const int64_t group = p.tile * width + first + lane;
      const bool exists = first + lane < width && group < a.groups;
      const R cell = exists ? cells[z * width + first + lane] : R(0);
      if (a.clamp != Clamp::sample) {
        sum += cell;
        continue;
      }
      unsigned open = 0;
      if (exists) {
        const FreeBits<R> bits = free_bits_of(a, group);
        open = static_cast<unsigned>(bits.open(cell)) << lane % 8;
        sum += bits.value(cell, a.penalty);
      }
      for (int m = 1; m < 8; m *= 2) open |= __shfl_xor_sync(0xFFFFFFFFu, open, m);
      if (exists && lane % 8 == 0) a.open[(b * a.groups + group) / 8] = static_cast<uint8_t>(open);
    }
    sum = lane_sum(sum, 32);
    if (lane != 0) continue;
    if (a.reduction == Reduction::none) (a.row_values ? a.row_values[b * a.g.tiles + p.tile] : a.kl[b]) = sum;
    loss += a.weight ? a.weight[b] * sum : sum;
  }
  return loss;
}

// Where in the tensors the quad is that a thread works on, and the weight of its batch row.
template <class R>
struct ForwardPosition {
  const char *mu, *scale, *prior_mu, *prior_scale;
  int64_t storage, batch_row;
  int valid;
  bool exists;  // the row
  R weight;
};

// One quad: reads it, draws K samples, and adds its KL to `sum` (by column; or all of it to sum[0]).
template <class T, Tiling kTiling, bool HasKL, bool Sample, int kSums>
__device__ __forceinline__ void forward_quad(const ForwardArgs<compute_t<T>>& a, const PhiloxKeys& keys,
                                             const ThreadOffsets& p, const ForwardPosition<compute_t<T>>& at,
                                             compute_t<T> (&sum)[kSums], compute_t<T>& clamped) {
  using R = compute_t<T>;
  const bool prior = HasKL && a.prior_mu.data != nullptr, counts = HasKL && blockIdx.z == 0;
  Quad<T> mu_quad, scale_quad, prior_mu_quad{}, prior_scale_quad{};
  mu_quad.load(at.mu, a.mu.i, a.mu.wide, at.valid, a.dtype);
  scale_quad.load(at.scale, a.scale.i, a.scale.wide, at.valid, a.dtype);
  if (prior) {
    prior_mu_quad.load(at.prior_mu, a.prior_mu.i, a.prior_mu.wide, at.valid, a.dtype);
    prior_scale_quad.load(at.prior_scale, a.prior_scale.i, a.prior_scale.wide, at.valid, a.dtype);
  }
  R kl[4] = {};
  auto& mu = mu_quad.value;
  auto& sd = scale_quad.value;
  sample_and_kl<HasKL>(a.param, a.slope, a.bounds, prior, mu, sd, prior_mu_quad.value, prior_scale_quad.value,
                       kl);
  if constexpr (HasKL) {
    if (counts) {
      if (a.reduction == Reduction::elementwise) {
        Quad<R> out;
#pragma unroll
        for (int j = 0; j < 4; ++j) out.value[j] = kl[j];
        out.store(reinterpret_cast<char*>(a.kl + at.storage), sizeof(R), a.kl_wide, at.valid, a.dtype);
      }
      if constexpr (kTiling == Tiling::column) {
        if (at.exists) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[j] += at.weight * kl[j];
        }
        if (a.g.cells == Cells::elements) {
          unsigned open = 0;
          const R row_value = clamp_quad(a, p.i, at.valid, kl, open);
          clamped += at.weight * row_value;
          write_cells(a, p, at.batch_row, at.exists, at.valid, row_value, open);
        }
      } else {
        R total = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) total += j < at.valid ? kl[j] : R(0);
        sum[0] += at.weight * total;
      }
    }
  }
  if constexpr (Sample) {
    const int k0 = blockIdx.z * a.block_samples;
    int64_t storage = at.storage + k0 * a.numel;
    for (int k = k0; k < min(a.K, k0 + a.block_samples); ++k) {
      reload_shared();
      R eps[4];
      normals(keys, static_cast<uint64_t>(storage), a.g.aligned, eps);
      Quad<T> z;
#pragma unroll
      for (int j = 0; j < 4; ++j) z.value[j] = mu[j] + sd[j] * eps[j];
      z.store(static_cast<char*>(a.z.data) + storage * a.z.i, a.z.i, a.z.wide, at.valid, a.dtype);
      storage += a.numel;
    }
  }
}

template <class T, Tiling kTiling, bool HasKL, bool Sample>
__global__ void __launch_bounds__(kBlock, 1)
    forward_kernel(const __grid_constant__ ForwardArgs<compute_t<T>> a) {
  using R = compute_t<T>;
  constexpr int kSums = HasKL && kTiling == Tiling::column ? 4 : 1;
  VK_SHARED(shared);
  const PhiloxKeys& keys = keys_for<Sample>(a.keys, shared);
  unsigned char* reduction = shared + kKeyBytes<Sample>;
  R* sums = reinterpret_cast<R*>(reduction + kFlagBytes);
  const Geometry& g = a.g;
  const ThreadOffsets p = thread_offsets_of<kTiling, 4>(g);
  const bool counts = HasKL && blockIdx.z == 0;
  const bool by_cell = counts && (g.cells == Cells::scratch || g.cells == Cells::sums);
  const int height = kTiling == Tiling::column ? g.ty() : g.tx();  // threads that share a cell
  R* totals = sums + max(g.threads() * kSums, g.width() + g.threads());
  if (by_cell)
    for (int c = threadIdx.x; c < g.width(); c += blockDim.x) totals[c] = 0;
  store_state(a);

  const bool prior = HasKL && a.prior_mu.data != nullptr;
  const int64_t storage_step = kTiling == Tiling::column ? g.ty() * g.I : static_cast<int64_t>(g.tx()) * 4;
  R sum[kSums] = {};
  R clamped = 0;
  for (int64_t row = p.b_begin; row < p.b_end; row += g.tz()) {
    const int64_t b = row + p.tz;
    // Where threads of a warp exchange numbers, all make the same number of steps, some without elements.
    const bool together = counts && g.cells == Cells::elements;
    const bool idle = b >= p.b_end || (kTiling == Tiling::column && p.tail == 0);
    const int steps =
        together ? static_cast<int>((p.to - p.from + g.ty() - 1) >> g.log_ty) : (idle ? 0 : p.steps);
    ForwardPosition<R> at{};
    at.mu = element_of(a.mu, b, p.o, p.i);
    at.scale = element_of(a.scale, b, p.o, p.i);
    if (prior) {
      at.prior_mu = element_of(a.prior_mu, b, p.o, p.i);
      at.prior_scale = element_of(a.prior_scale, b, p.o, p.i);
    }
    at.storage = (b * g.O + p.o) * g.I + p.i;
    at.batch_row = g.folded ? p.o : b;
    at.weight = 1;
    const bool weighted = HasKL && a.weight != nullptr && !by_cell;
    if (weighted && !g.folded && steps > 0) at.weight = a.weight[b];
    for (int step = 0; step < steps; ++step) {
      at.valid = step < p.full ? 4 : p.tail;
      at.exists = !together || (b < p.b_end && at.batch_row < p.to);
      if (together && (idle || !at.exists)) at.valid = 0;
      if (weighted && g.folded && at.exists) at.weight = a.weight[at.batch_row];
      forward_quad<T, kTiling, HasKL, Sample>(a, keys, p, at, sum, clamped);
      at.mu += a.mu.step;
      at.scale += a.scale.step;
      if (prior) {
        at.prior_mu += a.prior_mu.step;
        at.prior_scale += a.prior_scale.step;
      }
      at.storage += storage_step;
      if (g.folded) at.batch_row += g.ty();
    }
    if constexpr (HasKL) {
      if (by_cell) {
        // The cells of tz batch rows: a row of the matrix for each thread that shares a cell.
        const int width = g.width(), cells = g.tz() * width;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kSums; ++j) {
          const int cell = kTiling == Tiling::column ? p.tz * width + p.tx * 4 + j : p.tz * width + p.ty;
          sums[(kTiling == Tiling::column ? p.ty : p.tx) * cells + cell] = sum[j];
          sum[j] = 0;
        }
        __syncthreads();
        sum_rows(sums, cells, height);
        for (int c = threadIdx.x; c < width; c += blockDim.x) {
          const int64_t group = p.tile * width + c;
          for (int z = 0; z < g.tz() && row + z < p.b_end && group < a.groups; ++z) {
            const R cell = sums[z * width + c];
            if (g.cells == Cells::scratch)
              a.cells[((row + z) * a.groups + group) * g.splits + p.split] = cell;
            totals[c] += a.weight ? a.weight[row + z] * cell : cell;
          }
        }
        if (g.cells == Cells::sums) clamped += clamp_cells(a, p, row, sums);
      }
    }
  }

  if constexpr (HasKL) {
    if (!counts) return;
    __syncthreads();
    if (by_cell) {
      for (int c = threadIdx.x; c < g.width(); c += blockDim.x) sums[c] = totals[c];
      __syncthreads();
      finish_block<true>(a, p.tile, p.part, clamped, reinterpret_cast<int*>(reduction), sums);
    } else {
      write_partials<kTiling, true>(a, p, sum, clamped, reduction);
    }
  }
}

// Gives out pieces of scratch memory, each a multiple of 16 bytes. Without memory it only counts the bytes.
class ScratchAllocator {
 public:
  explicit ScratchAllocator(void* base) : base_(static_cast<char*>(base)) {}

  template <class V>
  void take(V*& out, int64_t count) {
    out = reinterpret_cast<V*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(V) + 15) / 16 * 16;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

bool has_sample(const Forward& call) { return call.z != nullptr && call.K > 0 && call.numel() > 0; }

// Everything but the pointers into scratch memory.
template <class R>
ForwardArgs<R> arguments(const Forward& call) {
  ForwardArgs<R> a{};
  Axes mu = axes_of(call.mu, call), scale = axes_of(call.scale, call);
  Axes prior_mu = axes_of(call.prior_mu, call), prior_scale = axes_of(call.prior_scale, call);
  const bool prior = call.has_kl && call.prior_mu.data != nullptr;
  const bool plain = !(call.has_kl && call.reduction == Reduction::elementwise);
  const Purpose purpose{
      call.has_kl, has_sample(call), call.has_kl, false, plain, has_sample(call) ? call.z : nullptr};
  if (prior)
    a.g = geometry_of(call, purpose, Tensors<4>{{&mu, &scale, &prior_mu, &prior_scale}});
  else
    a.g = geometry_of(call, purpose, Tensors<2>{{&mu, &scale}});
  const Geometry& g = a.g;
  a.rows = call.B;
  a.groups = call.G;
  a.numel = call.numel();
  a.K = static_cast<int>(call.K);
  const int64_t sets = std::min(call.K, ceil_div(kReducingBlocks, g.tiles * g.parts()));
  a.block_samples = static_cast<int>(ceil_div(call.K, std::max<int64_t>(sets, 1)));
  a.mu = source_of(mu, g, call.dtype);
  a.scale = source_of(scale, g, call.dtype);
  if (prior) {
    a.prior_mu = source_of(prior_mu, g, call.dtype);
    a.prior_scale = source_of(prior_scale, g, call.dtype);
  }
  a.bounds = bounds_of<R>(call);
  a.log_variance = log_variance_of(call);
  a.special = a.log_variance.adjusts || (call.has_kl && call.weight != nullptr);
  if (has_sample(call) || call.rng_out != nullptr) a.keys = keys_of(call);
  a.dtype = call.dtype;
  a.param = call.param;
  a.slope = log_slope<R>(call.param);
  a.clamp = call.clamp;
  a.penalty = call.penalty;
  a.reduction = call.reduction;
  a.group_sums = call.group_sums;
  a.z = dense_source(call.z, g, call.dtype);
  a.z.wide = is_wide_dense(call.z, g, call.K, item_size(call.dtype));
  a.in = stride32_of(a.mu, g, 16);
  a.prior_in = stride32_of(a.prior_mu, g, 16);
  a.quads = stride32_of(a.z, g, 4 * item_size(call.dtype));
  a.sample_quads = static_cast<uint32_t>(a.numel / 4);
  a.kl_wide = is_wide_dense(call.kl, g, 1, sizeof(R));
  a.free_bits = static_cast<R>(call.free_bits);
  a.row_size = static_cast<R>(call.row_size());
  a.rng_out = call.rng_out;
  a.kl = static_cast<R*>(call.kl);
  a.kl_per_group = static_cast<R*>(call.kl_per_group);
  a.gate = static_cast<R*>(call.gate);
  a.open = call.open;
  a.weight = static_cast<const R*>(call.weight);
  a.free_bits_per_group = static_cast<const R*>(call.free_bits_per_group);
  return a;
}

template <class R>
size_t take_scratch(ForwardArgs<R>& a, void* base) {
  const Geometry& g = a.g;
  ScratchAllocator scratch(base);
  if (g.parts() > 1) {
    scratch.take(a.sums, g.tiles * g.parts() * g.width());
    if (a.weight != nullptr) scratch.take(a.weights, g.tiles * g.parts());
  }
  if (!a.one_tile() && !a.few_sums()) scratch.take(a.losses, a.loss_count());
  if (!a.one_block()) scratch.take(a.finished, 1);
  if (g.cells == Cells::scratch) scratch.take(a.cells, a.rows * a.groups * g.splits);
  if (g.cells == Cells::elements || g.cells == Cells::sums) {
    if (a.reduction == Reduction::none && g.tiles > 1) scratch.take(a.row_values, a.rows * g.tiles);
    if (a.clamp == Clamp::sample && a.groups % 8 != 0) scratch.take(a.masks, a.rows * g.vectors());
  }
  return scratch.used();
}

template <class R>
void launch_kernel(const ForwardArgs<R>& a, bool has_kl, bool sample, cudaStream_t stream) {
  if constexpr (sizeof(R) == 4) {
    if (a.g.plain) return forward_plain(a, has_kl, sample, stream);
  }
  choose_general(a.g.tiling, has_kl, sample,
                 [&]<Tiling kTiling, bool HasKL, bool Sample>(GeneralKernel<kTiling, HasKL, Sample>) {
                   const auto kernel = forward_kernel<general_t<R>, kTiling, HasKL, Sample>;
                   size_t shared = kKeyBytes<Sample>;
                   if (HasKL) shared += reduction_bytes<R>(a.g, kTiling == Tiling::column ? 4 : 1);
                   dim3 grid = grid_of(a.g);
                   if (Sample) grid.z = static_cast<unsigned>(ceil_div(a.K, a.block_samples));
                   VK_LAUNCH(kernel, grid, a.g.threads(), shared, stream, a);
                 });
}

template <class R>
void launch_forward(const Forward& call, void* scratch, unsigned* counters, bool capturing,
                    cudaStream_t stream) {
  ForwardArgs<R> a = arguments<R>(call);
  const Geometry& g = a.g;
  if (call.has_kl) take_scratch(a, scratch);
  const bool finish = call.has_kl && capturing && !a.one_block();
  a.counters = finish || a.one_block() ? nullptr : counters;
  if (!finish) a.finished = nullptr;
  launch_kernel(a, call.has_kl, has_sample(call), stream);
  const int64_t open = a.few_sums() ? 1 : a.open_tiles() + a.open_sets();
  if (!finish || (open == 0 && !a.has_loss())) return;
  const size_t shared = reduction_bytes<R>(g, g.tiling == Tiling::column ? g.vector : 1);
  const auto kernel = finish_kernel<R>;
  VK_LAUNCH(kernel, dim3(static_cast<unsigned>(std::max<int64_t>(open, 1))), g.threads(), shared, stream, a);
}

template <class R>
size_t scratch_size(const Forward& call) {
  ForwardArgs<R> a = arguments<R>(call);
  return take_scratch(a, nullptr);
}

}  // namespace

size_t forward_scratch(const Forward& call) {
  if (!call.has_kl) return 0;
  return call.dtype == DType::f64 ? scratch_size<double>(call) : scratch_size<float>(call);
}

cudaError_t forward(const Forward& call, void* scratch, unsigned* counters, bool capturing,
                    cudaStream_t stream) {
  if (!call.has_kl && !has_sample(call)) {
    if (call.rng_out == nullptr) return cudaSuccess;
    return write_state(state_of(call), call.rng_out, stream);
  }
  if (call.dtype == DType::f64)
    launch_forward<double>(call, scratch, counters, capturing, stream);
  else
    launch_forward<float>(call, scratch, counters, capturing, stream);
  return cudaGetLastError();
}

}  // namespace vk::cuda
