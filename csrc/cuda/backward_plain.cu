// The backward kernels for plain vectors.
#include "backward.cuh"
#include "plain.cuh"

namespace vk::cuda {
namespace {

// Computes the batch rows of a block. `gains`: the gradient of the loss with respect to an element's KL, by
// column or (row) one number for all elements. Special: with weights of batch rows, log-variances that have
// to be adjusted, and the prior's and the posterior's shares of the gradient.
template <class T, Tiling kTiling, Kl K, bool Sample, Param P, bool Special>
__device__ __forceinline__ void backward_rows(const BackwardArgs<float>& a, const QuadKeys& keys,
                                              const ThreadOffsets& p, const float* gains) {
  constexpr int N = kVector<T>;
  constexpr bool kHasKl = K != Kl::none, kPrior = K == Kl::prior, kColumn = kTiling == Tiling::column;
  constexpr bool kAdjusts = Special && P == Param::logvar;
  const Geometry& g = a.g;
  const int64_t first = p.b_begin + p.tz;
  const uint32_t steps = kColumn && p.tail == 0 ? 0 : p.steps;
  VectorOffset in(a.in, first, p.o, p.i / N), out(a.out, first, p.o, p.i / N),
      quad(a.quads, first, p.o, p.i / N);
  VectorOffset prior(a.prior_in, first, p.o, p.i / N), prior_out(a.prior_out, first, p.o, p.i / N);
  const bool weighted = Special && kHasKl && a.weight != nullptr;
  const bool folded = kColumn && g.folded;  // then B is 1
  if (first >= p.b_end) return;
  uint32_t batch_row = static_cast<uint32_t>(folded ? p.o : first);
#pragma unroll 1
  do {
    const uint32_t end = quad.end(a.quads, steps);
#pragma unroll 1
    for (; quad.at != end; quad.at += a.quads.step) {
      const float weight = weighted ? __ldg(a.weight + batch_row) : 1.f;
      if (weighted && folded) batch_row += g.ty();
      Vector<T> mu_vector{}, scale_vector, grad_vector{};
      scale_vector.load(bytes_at<16>(a.scale.data, in.at));
      if constexpr (kHasKl) mu_vector.load(bytes_at<16>(a.mu.data, in.at));
      if constexpr (Sample) grad_vector.load(bytes_at<4 * sizeof(T)>(a.grad_z.data, quad.at));
      Vector<T> prior_mu_vector{}, prior_scale_vector{};
      if constexpr (kPrior) {
        prior_mu_vector.load(bytes_at<16>(a.prior_mu.data, prior.at));
        prior_scale_vector.load(bytes_at<16>(a.prior_scale.data, prior.at));
        prior.at += a.prior_in.step;
      }
      in.at += a.in.step;
#pragma unroll
      for (int q = 0; q < N / 4; ++q) {
        float mu[4], s[4], prior_mu[4], prior_s[4], sum[4], eps[4] = {};
        bool inside[4];
        float c[4] = {};
        if constexpr (kHasKl) {
          if constexpr (kColumn) {
            const float4 four = reinterpret_cast<const float4*>(gains)[q];
            c[0] = four.x;
            c[1] = four.y;
            c[2] = four.z;
            c[3] = four.w;
          } else {
            c[0] = c[1] = c[2] = c[3] = gains[0];
          }
        }
        mu_vector.get(q, mu);
        scale_vector.get(q, s);
        grad_vector.get(q, sum);
        prior_mu_vector.get(q, prior_mu);
        prior_scale_vector.get(q, prior_s);
        if constexpr (kAdjusts) adjust(a.log_variance, s, inside);
        if constexpr (kAdjusts && kPrior) adjust_prior(a.log_variance, prior_s);
        if constexpr (Sample) normals(keys, quad.at + static_cast<uint32_t>(q), eps);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Scale<float> scale = scale_of<P>(s[j]);
          const Posterior<float> posterior = plain_posterior<P, Special>(s[j], scale, a.bounds);
          const SampleGradients<float> z{sum[j], sum[j] * eps[j], Sample};
          const float cj = Special ? weight * c[j] : c[j];
          ElementGradients<float> e;
          if constexpr (kPrior) {
            const Scale<float> prior_scale = scale_of<P>(prior_s[j]);
            const Prior<float> p =
                plain_prior<P>(mu[j], s[j], posterior, prior_mu[j], prior_s[j], prior_scale);
            e = gradients_prior<P>(scale, prior_scale, posterior, p, z, Special ? cj * a.posterior_share : cj,
                                   Special ? cj * a.prior_share : cj);
          } else if constexpr (kHasKl) {
            e = gradients_standard<P>(scale, posterior, mu[j], z, cj);
          } else {
            e = gradients_sample<P>(scale, posterior, z);
          }
          mu[j] = e.mu;
          s[j] = kAdjusts ? keep_if(inside[j], e.scale * a.log_variance.slope) : e.scale;
          prior_mu[j] = e.prior_mu;
          prior_s[j] = kAdjusts ? e.prior_scale * a.log_variance.slope : e.prior_scale;
        }
        // The gradients overwrite the elements.
        mu_vector.set(q, mu);
        scale_vector.set(q, s);
        prior_mu_vector.set(q, prior_mu);
        prior_scale_vector.set(q, prior_s);
      }
      if (kHasKl || a.grad_mu.data != nullptr) mu_vector.store(bytes_at<16>(a.grad_mu.data, out.at));
      scale_vector.store(bytes_at<16>(a.grad_scale.data, out.at));
      out.at += a.out.step;
      if constexpr (kPrior) {
        if (a.grad_prior_mu.data != nullptr) {
          prior_mu_vector.store(bytes_at<16>(a.grad_prior_mu.data, prior_out.at));
          prior_scale_vector.store(bytes_at<16>(a.grad_prior_scale.data, prior_out.at));
        }
        prior_out.at += a.prior_out.step;
      }
    }
    batch_row += g.tz();
    in.next_row(a.in, steps);
    out.next_row(a.out, steps);
    if constexpr (kPrior) {
      prior.next_row(a.prior_in, steps);
      prior_out.next_row(a.prior_out, steps);
    }
    quad.next_row(a.quads, steps);
  } while (!folded && batch_row < static_cast<uint32_t>(p.b_end));
}

// What keeps every kernel out of local memory.
template <class T, Tiling kTiling, Kl K, bool Sample, Holds H>
constexpr int registers() {
  if (H == Holds::sd) return K == Kl::prior ? 80 : 64;
  if (K != Kl::prior) return 48;
  if (sizeof(T) == 4) return 64;
  if (Sample && kTiling == Tiling::column) return 80;
  return kArch < (Sample ? 860 : 800) ? 72 : 64;
}

template <class T, Tiling kTiling, Kl K, bool Sample, Holds H>
VK_PLAIN_KERNEL((registers<T, kTiling, K, Sample, H>()))
backward_plain_kernel(const __grid_constant__ BackwardArgs<float> a) {
  constexpr bool kColumns = K != Kl::none && kTiling == Tiling::column;
  const QuadKeys keys = quad_keys_for<Sample>(a.keys);
  const ThreadOffsets p = thread_offsets_of<kTiling, kVector<T>>(a.g);
  float* gains = nullptr;
  float row_gain[1];
  if constexpr (kColumns) {
    // All rows have these numbers in common. In shared memory they take no registers.
    VK_SHARED(memory);
    float* all = reinterpret_cast<float*>(memory);
    for (int c = threadIdx.x; c < a.g.width(); c += blockDim.x)
      shared_gradients<1>(a, p.tile * a.g.width() + c, all + c);
    gains = all + p.tx * kVector<T>;
    __syncthreads();
  } else if constexpr (K != Kl::none) {
    gains = row_gain;
    shared_gradients<1>(a, p.o, gains);
  }
  choose_rows<H>(a, [&](auto param, auto special) {
    backward_rows<T, kTiling, K, Sample, param.value, special.value>(a, keys, p, gains);
  });
}

}  // namespace

void backward_plain(const BackwardArgs<float>& a, bool has_kl, bool sample, cudaStream_t stream) {
  choose_plain(
      a, has_kl, sample,
      [&]<class T, Tiling kTiling, Kl K, bool Sample, Holds H>(PlainKernel<T, kTiling, K, Sample, H>) {
        const auto kernel = backward_plain_kernel<T, kTiling, K, Sample, H>;
        const bool gains = K != Kl::none && kTiling == Tiling::column;
        const size_t shared = gains ? a.g.width() * sizeof(float) : 0;
        VK_LAUNCH(kernel, grid_of(a.g), a.g.threads(), shared, stream, a);
      });
}

}  // namespace vk::cuda
