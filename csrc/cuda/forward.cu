// The forward kernels: z, the KL, or both in one pass over mu and the scale.
#include "finish.cuh"

namespace vk::cuda {
namespace {

// Free bits on a quad of cells that are single elements, the first of them in `group`: returns the sum of
// their values and adds their open bits to `open` from bit `at` on.
template <class R>
__device__ __forceinline__ R clamp_quad(const ForwardArgs<R>& a, int64_t group, int valid, const R (&kl)[4],
                                        int at, unsigned& open) {
  R sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= valid) break;
    if (a.clamp == Clamp::sample) {
      const FreeBits<R> bits = free_bits_of(a, group + j);
      open |= static_cast<unsigned>(bits.open(kl[j])) << (at + j);
      sum += bits.value(kl[j], a.penalty);
    } else {
      sum += kl[j];
    }
  }
  return sum;
}

// Writes what clamp_quad found for a vector of N columns of row b, if there is one. Called by whole warps.
template <int N, class R>
__device__ __forceinline__ void write_cells(const ForwardArgs<R>& a, const Place& p, int64_t b, bool exists,
                                            int valid, R sum, unsigned open) {
  if (a.clamp == Clamp::sample) {
    if (a.masks != nullptr) {
      if (valid > 0) a.masks[b * a.g.vectors() + p.i / N] = static_cast<uint8_t>(open);
    } else {
      // Rows are whole bytes. Two neighbours share one where a vector is half as long.
      if constexpr (N == 4) open |= __shfl_xor_sync(0xFFFFFFFFu, open, 1) << 4;
      if (valid > 0 && p.i % 8 == 0) a.open[(b * a.groups + p.i) / 8] = static_cast<uint8_t>(open);
    }
  }
  if (a.reduction == Reduction::none) {
    const R row = lane_sum(sum, a.g.tx());
    if (p.tx == 0 && exists) (a.row_values ? a.row_values[b * a.g.tiles + p.tile] : a.kl[b]) = row;
  }
}

// Where a thread's vector is in the tensors, and what its KL counts.
template <class R>
struct Position {
  const char *mu, *scale, *prior_mu, *prior_scale;
  int64_t storage, batch_row;
  int valid;
  bool exists;  // the row
  R weight;
};

// One vector: reads it, draws K samples, and adds its KL to `sum` (by column; or all of it to sum[0]).
template <class T, Layout L, bool HasKL, bool Sample, bool Plain, int kSums>
__device__ __forceinline__ void forward_vector(const ForwardArgs<compute_t<T>>& a, const PhiloxKeys& keys,
                                               const Place& p, const Position<compute_t<T>>& at,
                                               compute_t<T> (&sum)[kSums], compute_t<T>& clamped) {
  using R = compute_t<T>;
  constexpr int N = kVector<T>;
  const bool prior = !Plain && HasKL && a.prior_mu.data != nullptr;
  Vector<T> mu_words, scale_words, prior_mu_words{}, prior_scale_words{};
  mu_words.load(at.mu, a.mu.i, Plain || a.mu.wide, at.valid, a.dtype);
  scale_words.load(at.scale, a.scale.i, Plain || a.scale.wide, at.valid, a.dtype);
  if (prior) {
    prior_mu_words.load(at.prior_mu, a.prior_mu.i, Plain || a.prior_mu.wide, at.valid, a.dtype);
    prior_scale_words.load(at.prior_scale, a.prior_scale.i, Plain || a.prior_scale.wide, at.valid, a.dtype);
  }
  const bool cells = !Plain && HasKL && L == Layout::column && a.g.cells == Cells::elements;
  R row_value = 0, total = 0;
  unsigned open = 0;
  int64_t storage = at.storage;
  int k = 0;
  do {
    Vector<T> z{};
    auto quad = [&](int q) {
      forget_shared();
      R mu[4], sd[4], kl[4] = {}, prior_mu[4] = {}, prior_s[4] = {};
      mu_words.front(mu);
      scale_words.front(sd);
      if (prior) {
        prior_mu_words.front(prior_mu);
        prior_scale_words.front(prior_s);
      }
      sample_and_kl<Plain, HasKL>(a.param, a.slope, a.bounds, prior, mu, sd, prior_mu, prior_s, kl);
      if constexpr (HasKL) {
        if (k == 0) {
          const int valid = at.valid - 4 * q;
          if (!Plain && a.reduction == Reduction::elementwise) {
            R* to = a.kl + storage + 4 * q;
            if (a.kl_wide && valid >= 4) {
              Vector<R> out;
              out.set_front(kl);
              out.store(reinterpret_cast<char*>(to), sizeof(R), true, 4, a.dtype);
            } else {
#pragma unroll
              for (int j = 0; j < 4; ++j)
                if (j < valid) to[j] = kl[j];
            }
          }
          if constexpr (L == Layout::column) {
            if (Plain || at.exists) {
#pragma unroll
              for (int j = 0; j < 4; ++j) sum[j] += at.weight * kl[j];
            }
            if (cells) row_value += clamp_quad(a, p.i + 4 * q, valid, kl, 4 * q, open);
          } else if (valid >= 4) {
            total += (kl[0] + kl[1]) + (kl[2] + kl[3]);
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) total += j < valid ? kl[j] : R(0);
          }
        }
        if constexpr (L == Layout::column && N > 4) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const R front = sum[j];
            sum[j] = sum[j + 4];
            sum[j + 4] = front;
          }
        }
      }
      if constexpr (Sample) {
        R eps[4];
        normals(keys, static_cast<uint64_t>(storage) + 4 * q, Plain || a.g.aligned, eps);
#pragma unroll
        for (int j = 0; j < 4; ++j) eps[j] = mu[j] + sd[j] * eps[j];
        z.set_front(eps);
        z.turn();
      }
      mu_words.turn();
      scale_words.turn();
      if (prior) {
        prior_mu_words.turn();
        prior_scale_words.turn();
      }
    };
#pragma unroll 1
    for (int q = 0; q < N / 4; ++q) quad(q);
    if constexpr (Sample)
      z.store(a.z + storage * element_size<T>(a.dtype), element_size<T>(a.dtype), Plain || a.z_wide, at.valid,
              a.dtype);
    storage += a.numel;
  } while (Sample && ++k < a.K);
  if constexpr (HasKL && L == Layout::row) sum[0] += at.weight * total;
  if (cells) {
    clamped += at.weight * row_value;
    write_cells<N>(a, p, at.batch_row, at.exists, at.valid, row_value, open);
  }
}

template <class T, Layout L, bool HasKL, bool Sample, Path P>
__global__ void __launch_bounds__(P == Path::general ? kBlock : kSmallBlock, P == Path::general ? 1 : 2)
    forward_kernel(const __grid_constant__ ForwardArgs<compute_t<T>> a) {
  using R = compute_t<T>;
  constexpr int N = kVector<T>;
  constexpr int kSums = HasKL && L == Layout::column ? N : 1;
  VK_SHARED(shared);
  const PhiloxKeys& keys = keys_for<Sample ? P : Path::host>(a.keys, shared);
  unsigned char* room = shared + key_bytes<Sample, P>();
  int* flag = reinterpret_cast<int*>(room);
  R* sums = reinterpret_cast<R*>(room + kFlagBytes);
  const Geometry& g = a.g;
  const Place p = place_of<L, N>(g);
  const bool scratch = P == Path::general && HasKL && g.cells == Cells::scratch;
  const int height = L == Layout::column ? g.ty() : g.tx();  // threads that share a cell
  R* totals = sums + max(g.threads() * kSums, g.width() + g.threads());
  if (scratch)
    for (int c = threadIdx.x; c < g.width(); c += blockDim.x) totals[c] = 0;
  if (a.rng_out != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    a.rng_out[0] = static_cast<int64_t>(a.seed);
    a.rng_out[1] = static_cast<int64_t>(a.offset);
  }

  const bool prior = P == Path::general && HasKL && a.prior_mu.data != nullptr;
  const int64_t storage_step = L == Layout::column ? g.ty() * g.I : static_cast<int64_t>(g.tx()) * N;
  R sum[kSums] = {};
  R clamped = 0;
  for (int64_t row = p.b_begin; row < p.b_end; row += g.tz()) {
    const int64_t b = row + p.tz;
    // Where neighbours exchange numbers, all threads make the same steps, some of them without elements.
    const bool together = P == Path::general && HasKL && g.cells == Cells::elements;
    const bool idle = b >= p.b_end || (L == Layout::column && p.tail == 0);
    const int steps =
        together ? static_cast<int>((p.to - p.from + g.ty() - 1) >> g.log_ty) : (idle ? 0 : p.steps);
    Position<R> at{};
    at.mu = element_of(a.mu, b, p.o, p.i);
    at.scale = element_of(a.scale, b, p.o, p.i);
    if (prior) {
      at.prior_mu = element_of(a.prior_mu, b, p.o, p.i);
      at.prior_scale = element_of(a.prior_scale, b, p.o, p.i);
    }
    at.storage = (b * g.O + p.o) * g.I + p.i;
    at.batch_row = g.folded ? p.o : b;
    at.weight = 1;
    const bool weighted = HasKL && a.weight != nullptr && !scratch;
    if (weighted && !g.folded && steps > 0) at.weight = a.weight[b];
    for (int step = 0; step < steps; ++step) {
      at.valid = P != Path::general || step < p.full ? N : p.tail;
      at.exists = !together || (b < p.b_end && at.batch_row < p.to);
      if (together && (idle || !at.exists)) at.valid = 0;
      if (weighted && g.folded && at.exists) at.weight = a.weight[at.batch_row];
      forward_vector<T, L, HasKL, Sample, P != Path::general>(a, keys, p, at, sum, clamped);
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
      if (scratch) {
        // The cells of tz batch rows: a row of the matrix for each thread that shares a cell.
        const int width = g.width(), cells = g.tz() * width;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kSums; ++j) {
          const int cell = L == Layout::column ? p.tz * width + p.tx * N + j : p.tz * width + p.ty;
          sums[(L == Layout::column ? p.ty : p.tx) * cells + cell] = sum[j];
          sum[j] = 0;
        }
        __syncthreads();
        sum_rows(sums, cells, height);
        for (int c = threadIdx.x; c < width; c += blockDim.x) {
          const int64_t group = p.tile * width + c;
          for (int z = 0; z < g.tz() && row + z < p.b_end && group < a.groups; ++z) {
            const R cell = sums[z * width + c];
            a.cells[((row + z) * a.groups + group) * g.splits + p.split] = cell;
            totals[c] += a.weight ? a.weight[row + z] * cell : cell;
          }
        }
      }
    }
  }

  if constexpr (HasKL) {
    const int width = g.width();
    __syncthreads();
    if (scratch) {
      for (int c = threadIdx.x; c < width; c += blockDim.x) sums[c] = totals[c];
      __syncthreads();
    } else {
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        const int line = p.tz * height + (L == Layout::column ? p.ty : p.tx);
        sums[line * width + (L == Layout::column ? p.tx * N + j : p.ty)] = sum[j];
      }
      __syncthreads();
      sum_rows(sums, width, height * g.tz());
    }
    finish_block(a, p.tile, p.part, clamped, flag, sums);
  }
}

// Hands out pieces of scratch memory; with no memory it only counts.
class Room {
 public:
  explicit Room(void* base) : base_(static_cast<char*>(base)) {}

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
  const bool plain = !prior && !(call.has_kl && call.reduction == Reduction::elementwise);
  const Purpose purpose{call.has_kl, has_sample(call), call.has_kl, plain,
                        has_sample(call) ? call.z : nullptr};
  if (prior)
    a.g = geometry_of(call, purpose, Tensors<4>{{&mu, &scale, &prior_mu, &prior_scale}});
  else
    a.g = geometry_of(call, purpose, Tensors<2>{{&mu, &scale}});
  const Geometry& g = a.g;
  a.rows = call.B;
  a.groups = call.G;
  a.numel = call.numel();
  a.K = static_cast<int>(call.K);
  a.mu = source_of(mu, g, call.dtype);
  a.scale = source_of(scale, g, call.dtype);
  if (prior) {
    a.prior_mu = source_of(prior_mu, g, call.dtype);
    a.prior_scale = source_of(prior_scale, g, call.dtype);
  }
  a.bounds = bounds_of<R>(call);
  if (has_sample(call)) a.keys = keys_of(call);
  a.dtype = call.dtype;
  a.param = call.param;
  a.slope = log_slope<R>(call.param);
  a.clamp = call.clamp;
  a.penalty = call.penalty;
  a.reduction = call.reduction;
  a.group_sums = call.group_sums;
  a.z_wide = is_wide_dense(call.z, g, call.K, size_of(call.dtype));
  a.kl_wide = is_wide_dense(call.kl, g, 1, sizeof(R));
  a.free_bits = static_cast<R>(call.free_bits);
  a.row_size = static_cast<R>(call.row_size());
  a.seed = call.seed;
  a.offset = call.offset;
  a.z = static_cast<char*>(call.z);
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
  Room room(base);
  if (g.parts() > 1) {
    room.take(a.sums, g.tiles * g.parts() * g.width());
    if (a.weight != nullptr) room.take(a.weights, g.tiles * g.parts());
  }
  room.take(a.losses, a.loss_count());
  if (g.cells == Cells::scratch) room.take(a.cells, a.rows * a.groups * g.splits);
  if (g.cells == Cells::elements) {
    if (a.reduction == Reduction::none && g.tiles > 1) room.take(a.row_values, a.rows * g.tiles);
    if (a.clamp == Clamp::sample && a.groups % 8 != 0) room.take(a.masks, a.rows * g.vectors());
  }
  return room.used();
}

template <class T, Layout L, bool HasKL, bool Sample, Path P>
void launch(const ForwardArgs<compute_t<T>>& a, cudaStream_t stream) {
  using R = compute_t<T>;
  const Geometry& g = a.g;
  size_t shared = key_bytes<Sample, P>();
  if (HasKL) {
    const int sums = L == Layout::column ? kVector<T> : 1;
    int numbers = std::max(g.threads() * sums, g.width() + g.threads());
    if (g.cells == Cells::scratch) numbers += g.width();
    shared += kFlagBytes + static_cast<size_t>(numbers) * sizeof(R);
  }
  const auto kernel = forward_kernel<T, L, HasKL, Sample, P>;
  VK_LAUNCH(kernel, grid_of(g), g.threads(), shared, stream, a);
}

// T: the element type of a plain kernel.
template <class T, Layout L, bool HasKL, bool Sample>
void launch_plain(const ForwardArgs<float>& a, cudaStream_t stream) {
  if constexpr (Sample) {
    if (a.keys.state != nullptr) return launch<T, L, HasKL, Sample, Path::device>(a, stream);
  }
  launch<T, L, HasKL, Sample, Path::host>(a, stream);
}

template <Layout L, bool HasKL, bool Sample, class R>
void launch_path(const ForwardArgs<R>& a, cudaStream_t stream) {
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
void launch_layout(const ForwardArgs<R>& a, bool has_kl, bool sample, cudaStream_t stream) {
  if (!has_kl)
    launch_path<L, false, true>(a, stream);
  else if (sample)
    launch_path<L, true, true>(a, stream);
  else
    launch_path<L, true, false>(a, stream);
}

template <class R>
void launch_forward(const Forward& call, void* scratch, unsigned* counters, bool capturing,
                    cudaStream_t stream) {
  ForwardArgs<R> a = arguments<R>(call);
  const Geometry& g = a.g;
  if (call.has_kl) take_scratch(a, scratch);
  a.counters = capturing || a.one_block() ? nullptr : counters;
  if (g.layout == Layout::column)
    launch_layout<Layout::column>(a, call.has_kl, has_sample(call), stream);
  else
    launch_layout<Layout::row>(a, call.has_kl, has_sample(call), stream);
  if (!call.has_kl || !capturing || a.one_block()) return;
  const int64_t open = a.open_tiles() + a.open_sets();
  const size_t shared = static_cast<size_t>(g.width() + g.threads()) * sizeof(R);
  const auto kernel = finish_kernel<R>;
  if (open > 0) VK_LAUNCH(kernel, dim3(static_cast<unsigned>(open)), g.threads(), shared, stream, a, false);
  if (open != 1 && a.has_loss()) VK_LAUNCH(kernel, dim3(1), g.threads(), shared, stream, a, true);
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
    return write_state({call.seed, call.offset}, call.rng_out, stream);
  }
  if (call.dtype == DType::f64)
    launch_forward<double>(call, scratch, counters, capturing, stream);
  else
    launch_forward<float>(call, scratch, counters, capturing, stream);
  return cudaGetLastError();
}

}  // namespace vk::cuda
