// The forward kernels for plain vectors.
#include "finish.cuh"
#include "plain.cuh"

namespace vk::cuda {
namespace {

// Computes one sample of the batch rows of a block. Adds twice their KL to `sum`: by column, or (row) all of
// it to sum[0]. Special: with weights of batch rows, and log-variances that have to be adjusted.
template <class T, Tiling kTiling, Kl K, bool Sample, Param P, bool Special, int kSums>
__device__ __forceinline__ void forward_rows(const ForwardArgs<float>& a, const QuadKeys& keys,
                                             const ThreadOffsets& p, float (&sum)[kSums]) {
  constexpr int N = kVector<T>;
  constexpr bool kHasKl = K != Kl::none, kPrior = K == Kl::prior, kColumn = kTiling == Tiling::column;
  constexpr bool kAdjusts = Special && P == Param::logvar;
  const Geometry& g = a.g;
  const int64_t first = p.b_begin + p.tz;
  const uint32_t steps = kColumn && p.tail == 0 ? 0 : p.steps;
  VectorOffset in(a.in, first, p.o, p.i / N), quad(a.quads, first, p.o, p.i / N);
  VectorOffset prior(a.prior_in, first, p.o, p.i / N);
  if constexpr (Sample) quad.at += blockIdx.z * a.sample_quads;
  char* const mu_data = in_registers(a.mu.data);
  char* const scale_data = in_registers(a.scale.data);
  char* const z_data = in_registers(a.z.data);
  const bool weighted = Special && kHasKl && a.weight != nullptr;
  const bool folded = kColumn && g.folded;  // then B is 1
  if (first >= p.b_end) return;
  uint32_t batch_row = static_cast<uint32_t>(folded ? p.o : first);
#pragma unroll 1
  do {
    float total = 0;
    const uint32_t end = quad.end(a.quads, steps);  // not of `in`, whose step is 0 where mu is expanded
#pragma unroll 1
    for (; quad.at != end; quad.at += a.quads.step) {
      const float weight = weighted && kColumn ? __ldg(a.weight + batch_row) : 1.f;
      if (weighted && folded) batch_row += g.ty();
      Vector<T> mu_vector, scale_vector, z_vector;
      mu_vector.load(bytes_at<16>(mu_data, in.at));
      scale_vector.load(bytes_at<16>(scale_data, in.at));
      in.at += a.in.step;
      Vector<T> prior_mu_vector{}, prior_scale_vector{};
      if constexpr (kPrior) {
        prior_mu_vector.load(bytes_at<16>(a.prior_mu.data, prior.at));
        prior_scale_vector.load(bytes_at<16>(a.prior_scale.data, prior.at));
        prior.at += a.prior_in.step;
      }
#pragma unroll
      for (int q = 0; q < N / 4; ++q) {
        float mu[4], s[4], z[4];
        bool inside[4];
        mu_vector.get(q, mu);
        scale_vector.get(q, s);
        if constexpr (kAdjusts) adjust(a.log_variance, s, inside);
        float prior_mu[4], prior_s[4];
        prior_mu_vector.get(q, prior_mu);
        prior_scale_vector.get(q, prior_s);
        if constexpr (kAdjusts && kPrior) adjust_prior(a.log_variance, prior_s);
        if constexpr (Sample) normals(keys, quad.at + static_cast<uint32_t>(q), z);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Posterior<float> posterior = plain_posterior<P, Special>(s[j], scale_of<P>(s[j]), a.bounds);
          if constexpr (kHasKl) {
            float kl;
            if constexpr (kPrior)
              kl = twice_kl_prior(
                  plain_prior<P>(mu[j], s[j], posterior, prior_mu[j], prior_s[j], scale_of<P>(prior_s[j])));
            else
              kl = twice_kl_standard(mu[j], posterior.excess);
            if constexpr (!kColumn)
              total += kl;
            else if constexpr (Special)
              sum[4 * q + j] += weight * kl;
            else
              sum[4 * q + j] += kl;
          }
          if constexpr (Sample) z[j] = mu[j] + posterior.sd * z[j];
        }
        if constexpr (Sample) z_vector.set(q, z);
      }
      if constexpr (Sample) z_vector.store(bytes_at<4 * sizeof(T)>(z_data, quad.at));
    }
    if constexpr (kHasKl && !kColumn) sum[0] += weighted ? __ldg(a.weight + batch_row) * total : total;
    batch_row += g.tz();
    in.next_row(a.in, steps);
    if constexpr (kPrior) prior.next_row(a.prior_in, steps);
    quad.next_row(a.quads, steps);
  } while (!folded && batch_row < static_cast<uint32_t>(p.b_end));
}

template <class T, Tiling kTiling, Kl K, bool Sample, Holds H, int kSums>
__device__ __forceinline__ void forward_block(const ForwardArgs<float>& a, const QuadKeys& keys,
                                              const ThreadOffsets& p, float (&sum)[kSums]) {
  choose_rows<H>(a, [&](auto param, auto special) {
    forward_rows<T, kTiling, K, Sample, param.value, special.value>(a, keys, p, sum);
  });
}

// What keeps every kernel out of local memory.
template <class T, Tiling kTiling, Kl K, bool Sample, Holds H>
constexpr int registers() {
  if (H == Holds::sd) return K == Kl::prior ? 80 : 64;
  if (K == Kl::prior) return 64;
  const bool columns = kTiling == Tiling::column && K != Kl::none && Sample;
  return kArch < 900 && sizeof(T) == 2 && columns ? 56 : 48;
}

template <class T, Tiling kTiling, Kl K, bool Sample, Holds H>
VK_PLAIN_KERNEL((registers<T, kTiling, K, Sample, H>()))
forward_plain_kernel(const __grid_constant__ ForwardArgs<float> a) {
  constexpr int kSums = K != Kl::none && kTiling == Tiling::column ? kVector<T> : 1;
  VK_SHARED(shared);
  const QuadKeys keys = quad_keys_for<Sample>(a.keys);
  store_state(a);
  const ThreadOffsets p = thread_offsets_of<kTiling, kVector<T>>(a.g);
  float sum[kSums] = {};
  if constexpr (K != Kl::none && Sample) {
    if (blockIdx.z > 0) return forward_block<T, kTiling, Kl::none, true, H>(a, keys, p, sum);
  }
  forward_block<T, kTiling, K, Sample, H>(a, keys, p, sum);
  if constexpr (K != Kl::none) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) sum[j] *= 0.5f;
    write_partials<kTiling, false>(a, p, sum, 0.f, shared);
  }
}

}  // namespace

void forward_plain(const ForwardArgs<float>& a, bool has_kl, bool sample, cudaStream_t stream) {
  choose_plain(
      a, has_kl, sample,
      [&]<class T, Tiling kTiling, Kl K, bool Sample, Holds H>(PlainKernel<T, kTiling, K, Sample, H>) {
        const auto kernel = forward_plain_kernel<T, kTiling, K, Sample, H>;
        const int sums = kTiling == Tiling::column ? kVector<T> : 1;
        const size_t shared = K == Kl::none ? 0 : reduction_bytes<float>(a.g, sums);
        dim3 grid = grid_of(a.g);
        if (Sample) grid.z = static_cast<unsigned>(a.K);
        VK_LAUNCH(kernel, grid, a.g.threads(), shared, stream, a);
      });
}

}  // namespace vk::cuda
