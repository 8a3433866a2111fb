// The elementwise half of the CPU kernels: loops over a tile that fits the first-level cache, written so that
// the compiler vectorises them for every instruction set.
//
// Every loop runs over whole groups of elements. Where n elements are not a multiple of a group, the last
// group covers some elements again, or the unused ones behind the end of a buffer. So there is no scalar
// remainder, every element takes the same instructions wherever a tile starts, and results do not depend on
// chunk borders or vector width.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "../gaussian.h"
#include "../problem.h"
#include "normals.h"
#include "numbers.h"

// A lambda that is inlined into the clone that calls it: out of line it would be compiled for the baseline
// only.
#define VK_LAMBDA __attribute__((always_inline))

namespace vk::cpu {

inline constexpr int kLanes = 32;  // elements of a group
inline constexpr int kBlock = 16;  // of a group in rows whose width is no multiple of kLanes

// Whole groups for n elements.
inline int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Calls body(i) for i in [0, n), n a multiple of kLanes. Masking n shows that to the compiler.
template <class Body>
VK_FN void lanes(int n, const Body& body) {
  const int whole = n & -kLanes;
#pragma GCC ivdep
#pragma GCC unroll 2
  for (int i = 0; i < whole; ++i) body(i);
}

// Calls part(from, m) for whole groups that cover n elements, n at least kLanes: the last of them covers some
// elements again where n is no multiple of kLanes.
template <class Part>
VK_FN void in_groups(int n, const Part& part) {
  const int whole = n / kLanes * kLanes;
  part(0, whole);
  if (whole < n) part(n - kLanes, kLanes);
}

// Calls body(i) for i in [0, n), n at least kBlock, by blocks of which the last covers some elements again.
// It takes more instructions for an element than `lanes`, fewer for a short row.
template <class Body>
VK_FN void blocks(int n, const Body& body) {
  for (int i = 0; i < n; i += kBlock) {
    const int at = std::min(i, n - kBlock);
#pragma GCC ivdep
    for (int j = 0; j < kBlock; ++j) body(at + j);
  }
}

// ---- normals ---------------------------------------------------------------------------------------------

// Those of float32 are in normals.h. These are float64's, where the platform's libm takes nearly all the
// time.
inline void normals_of(const Words* words, int quads, double* eps) {
  for (int q = 0; q < quads; ++q) {
    const Pair<double> a = box_muller(words[q].x0, words[q].x1, double());
    const Pair<double> b = box_muller(words[q].x2, words[q].x3, double());
    eps[4 * q] = a.first;
    eps[4 * q + 1] = a.second;
    eps[4 * q + 2] = b.first;
    eps[4 * q + 3] = b.second;
  }
}

// ---- the latent layer ------------------------------------------------------------------------------------

enum class Mode { sample, standard, prior };  // no KL; the KL to N(0, I); the KL to a given Gaussian

// The rows of a tile, or of a tensor that it is read from, where they are in memory: `stride` apart.
template <class R>
struct Rows {
  R* at = nullptr;
  int64_t stride = 0;
  VK_FN R* operator[](int row) const { return at + row * stride; }
  Rows from(int column) const { return {at == nullptr ? at : at + column, stride}; }
};

struct TileShape {
  int rows, width;  // width: of several rows at least kBlock, of one at least kLanes
};

template <class R>
struct TileInputs {
  Rows<const R> mu, scale, prior_mu, prior_scale;
  AnyRange range = {};  // here the compiler does not know its numbers, which math.h wants

  TileInputs from(int column) const {
    return {mu.from(column), scale.from(column), prior_mu.from(column), prior_scale.from(column), range};
  }
};

// The kinds of the loop over a tile, which give the same bits. `near` is for log-variances within +-87 and no
// bounds on them, which is nearly every call. It needs five clamps less; they would use the same ports of the
// processor as the multiplications, which limit the speed. It checks the numbers that it reads and returns
// false where `far` has to compute the tile again. `rows` is for rows in place whose width is no multiple of
// kLanes; it is not split into near and far, since a check takes a reduction for each row.
enum class Loop { near, far, rows };

template <Param P, class R>
inline constexpr bool kHasNear = sizeof(R) == 4 && !kHoldsSd<P>;

template <Loop L, class Body>
VK_FN void lanes_of(int n, const Body& body) {
  if constexpr (L == Loop::rows)
    blocks(n, body);
  else
    lanes(n, body);
}

// The largest |s| as bits, of which a NaN has more than any number.
struct LargestScale {
  int32_t bits = 0;
  VK_FN void see(float s) {
    const int32_t next = std::bit_cast<int32_t>(s) & 0x7FFFFFFF;
    bits = bits < next ? next : bits;
  }
  template <Param P>
  VK_FN bool near() const {
    return bits <= std::bit_cast<int32_t>(P == Param::log_std ? 43.5f : 87.f);
  }
};

template <Loop L, class R>
VK_FN auto range_of(const TileInputs<R>& in) {
  if constexpr (L == Loop::near)
    return NearRange();
  else
    return in.range;
}
template <Loop L, class R>
VK_FN auto bounds_for(const Bounds<R>& bounds) {
  if constexpr (L == Loop::near)
    return NoBounds<R>();
  else
    return bounds;
}

// The pointers of a row are parameters of a function, since only there does the compiler heed `restrict`.
template <Param P, Mode M, bool Draw, Loop L, class R, class B, class Range>
VK_FN void forward_row(const R* __restrict mu, const R* __restrict s, const R* __restrict prior_mu,
                       const R* __restrict prior_s, const R* __restrict eps, R* __restrict z,
                       R* __restrict kl, int width, const B& bounds, const Range& range,
                       LargestScale& largest) {
  lanes_of<L>(width, [&](int i) VK_LAMBDA {
    if constexpr (L == Loop::near) {
      largest.see(s[i]);
      if constexpr (M == Mode::prior) largest.see(prior_s[i]);
    }
    const Posterior<R> q = posterior_of<P>(scale_of<P>(s[i]), bounds, range);
    z[i] = Draw ? mu[i] + q.sd * eps[i] : q.sd;
    if constexpr (M == Mode::standard) kl[i] = kl_standard(mu[i], q.excess);
    if constexpr (M == Mode::prior)
      kl[i] = kl_prior(prior_of<P>(mu[i], q.x, prior_mu[i], scale_of<P>(prior_s[i]), range));
  });
}

// Draw: z = mu + sd eps at once, for the one sample that most calls want. Else the standard deviations go to
// `z`, for sample_tile.
template <Param P, Mode M, bool Draw, Loop L, class R>
VK_CLONES bool forward_tile(const TileInputs<R>& in, Bounds<R> bounds, const R* eps, Rows<R> z, R* kl,
                            TileShape shape) {
  const auto b = bounds_for<L>(bounds);
  const auto range = range_of<L>(in);
  LargestScale largest;
  for (int row = 0; row < shape.rows; ++row) {
    const int at = row * shape.width;
    forward_row<P, M, Draw, L>(in.mu[row], in.scale[row], in.prior_mu[row], in.prior_scale[row], eps + at,
                               z[row], kl + at, shape.width, b, range, largest);
  }
  return L != Loop::near || largest.near<P>();
}

template <class R>
VK_CLONES void sample_tile(const R* __restrict mu, const R* __restrict sd, const R* __restrict eps,
                           R* __restrict z, int n) {
  in_groups(n, [&](int from, int m) VK_LAMBDA {
    lanes(m, [&](int i) VK_LAMBDA { z[from + i] = mu[from + i] + sd[from + i] * eps[from + i]; });
  });
}

// One of several samples: adds its share of the sums of grad_z and of grad_z eps. n is a multiple of kLanes,
// so that no share is added twice.
template <class R>
VK_CLONES void add_noise_tile(const R* __restrict grad_z, const R* __restrict eps, R* __restrict sum,
                              R* __restrict noise, int n) {
  lanes(n, [&](int i) VK_LAMBDA {
    sum[i] += grad_z[i];
    noise[i] += grad_z[i] * eps[i];
  });
}

template <class R>
struct TileGradients {
  Rows<R> mu, scale, prior_mu, prior_scale;

  TileGradients from(int column) const {
    return {mu.from(column), scale.from(column), prior_mu.from(column), prior_scale.from(column)};
  }
};

template <Param P, Mode M, bool Draw, Loop L, class R, class B, class Range>
VK_FN void backward_row(const R* __restrict mu, const R* __restrict s, const R* __restrict prior_mu,
                        const R* __restrict prior_s, const R* __restrict sum, const R* __restrict noise,
                        const R* __restrict c, R* __restrict grad_mu, R* __restrict grad_s,
                        R* __restrict grad_prior_mu, R* __restrict grad_prior_s, bool sampled,
                        R posterior_share, R prior_share, int width, const B& bounds, const Range& range,
                        LargestScale& largest) {
  lanes_of<L>(width, [&](int i) VK_LAMBDA {
    if constexpr (L == Loop::near) {
      largest.see(s[i]);
      if constexpr (M == Mode::prior) largest.see(prior_s[i]);
    }
    // A near log-variance has a finite sd, which needs no test.
    const SampleGradients<R> z{sum[i], Draw ? sum[i] * noise[i] : noise[i],
                               Draw || L == Loop::near || sampled};
    if constexpr (M == Mode::prior) {
      const ElementGradients<R> g = gradients_prior<P>(mu[i], s[i], prior_mu[i], prior_s[i], bounds, z,
                                                       c[i] * posterior_share, c[i] * prior_share, range);
      grad_mu[i] = g.mu;
      grad_s[i] = g.scale;
      grad_prior_mu[i] = g.prior_mu;
      grad_prior_s[i] = g.prior_scale;
    } else {
      const ElementGradients<R> g = M == Mode::sample
                                        ? gradients_sample<P>(s[i], bounds, z, range)
                                        : gradients_standard<P>(mu[i], s[i], bounds, z, c[i], range);
      grad_mu[i] = g.mu;
      grad_s[i] = g.scale;
    }
  });
}

// In: the sums over samples of grad_z and of grad_z eps; c, the gradient of the loss with respect to each
// element's KL. Draw: of one sample, and `noise` holds eps itself. `sampled`: z was used at all, so that the
// sums are not merely 0.
template <Param P, Mode M, bool Draw, Loop L, class R>
VK_CLONES bool backward_tile(const TileInputs<R>& in, Bounds<R> bounds, const R* sum, const R* noise,
                             const R* c, bool sampled, R posterior_share, R prior_share,
                             const TileGradients<R>& out, TileShape shape) {
  const auto b = bounds_for<L>(bounds);
  const auto range = range_of<L>(in);
  LargestScale largest;
  for (int row = 0; row < shape.rows; ++row) {
    const int at = row * shape.width;
    backward_row<P, M, Draw, L>(in.mu[row], in.scale[row], in.prior_mu[row], in.prior_scale[row], sum + at,
                                noise + at, c + at, out.mu[row], out.scale[row], out.prior_mu[row],
                                out.prior_scale[row], sampled, posterior_share, prior_share, shape.width, b,
                                range, largest);
  }
  return L != Loop::near || largest.near<P>();
}

// ---- free bits and sums ----------------------------------------------------------------------------------

inline constexpr int kSums = 16;  // running sums side by side

template <class R>
VK_CLONES void clamp_tile(const R* __restrict kl, const R* __restrict lambda, Penalty penalty,
                          R* __restrict value, uint8_t* __restrict open, int n) {
  lanes(n, [&](int i) VK_LAMBDA { value[i] = clamp_value(kl[i], lambda[i], penalty); });
  lanes(n, [&](int i) VK_LAMBDA { open[i] = kl[i] >= lambda[i] ? 1 : 0; });
}

template <class R>
VK_CLONES void add_scaled(const R* __restrict x, R w, R* __restrict sum, int n) {
  for (int i = 0; i < n; ++i) sum[i] += w * x[i];
}

// Adds rows of at most kLanes numbers, one behind the other, in their order. Reads up to kLanes behind them.
template <class R>
VK_CLONES void add_rows(const R* __restrict x, int rows, int width, R* __restrict sum) {
  R part[kLanes] = {};  // in registers
  std::copy_n(sum, width, part);
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < kLanes; ++i) part[i] += x[row * width + i];
  std::copy_n(part, width, sum);
}

// The same, each row times its weight.
template <class R>
VK_CLONES void add_weighted_rows(const R* __restrict x, const R* __restrict weight, int rows, int width,
                                 R* __restrict sum) {
  R part[kLanes] = {};
  std::copy_n(sum, width, part);
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < kLanes; ++i) part[i] += weight[row] * x[row * width + i];
  std::copy_n(part, width, sum);
}

// The sum of each row of a few numbers, the rows one behind the other. In double, since nothing is gained by
// running sums side by side, and one alone collects a rounding for each number.
template <class R, class To>
void sum_rows(const R* __restrict x, int rows, int width, To* __restrict sum) {
  for (int row = 0; row < rows; ++row) {
    double of_row = 0;
    for (int i = 0; i < width; ++i) of_row += static_cast<double>(x[row * width + i]);
    sum[row] = static_cast<To>(of_row);
  }
}

template <class R>
VK_CLONES void flush(R* __restrict from, double* __restrict to, int n) {
  for (int i = 0; i < n; ++i) {
    to[i] += from[i];
    from[i] = R(0);
  }
}

template <class R>
VK_FN R tree_of(R (&part)[kSums]) {
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) part[j] += part[j + width];
  return part[0];
}

// The sum of n numbers in an order that depends on n alone: sixteen running sums, then a tree.
template <class R>
VK_CLONES R sum_of(const R* x, int64_t n) {
  R part[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int j = 0; j < kSums; ++j) part[j] += x[i + j];
  for (int j = 0; i + j < n; ++j) part[j] += x[i + j];
  return tree_of(part);
}

// Eight bits as eight bytes of 0 or 1 in memory, the lowest bit first. kUp has bit k in the byte k of memory,
// kDown bit 7 - k.
inline constexpr bool kLittle = std::endian::native == std::endian::little;
inline constexpr uint64_t kUp = kLittle ? 0x8040201008040201 : 0x0102040810204080;
inline constexpr uint64_t kDown = kLittle ? 0x0102040810204080 : 0x8040201008040201;

VK_FN uint8_t packed8(const uint8_t* bytes) {
  uint64_t all;
  std::memcpy(&all, bytes, sizeof(all));
  return static_cast<uint8_t>(all * kDown >> 56);
}
VK_FN void unpack8(uint8_t bits, uint8_t* bytes) {
  const uint64_t ones = 0x0101010101010101;
  const uint64_t all = ((bits * ones & kUp) + 0x7F * ones) >> 7 & ones;
  std::memcpy(bytes, &all, sizeof(all));
}

// Bits `begin` to begin + n of `bits` from n bytes of 0 or 1, with those before that share their byte.
inline void pack_bits(const uint8_t* open, int64_t begin, int n, uint8_t* bits) {
  bits += begin / 8;
  int i = 0;
  const auto rest = [&](int bit, unsigned byte) {
    for (; bit < 8 && i < n; ++bit) byte |= static_cast<unsigned>(open[i++]) << bit;
    *bits++ = static_cast<uint8_t>(byte);
  };
  if (begin % 8 != 0) rest(static_cast<int>(begin % 8), *bits);
  for (; i + 8 <= n; i += 8) *bits++ = packed8(open + i);
  if (i < n) rest(0, 0);
}

// The same back.
inline void unpack_bits(const uint8_t* bits, int64_t begin, int n, uint8_t* open) {
  bits += begin / 8;
  int i = 0;
  const auto rest = [&](int bit) {
    for (; bit < 8 && i < n; ++bit) open[i++] = *bits >> bit & 1;
    ++bits;
  };
  if (begin % 8 != 0) rest(static_cast<int>(begin % 8));
  for (; i + 8 <= n; i += 8) unpack8(*bits++, open + i);
  if (i < n) rest(0);
}

// The gradient of the loss with respect to the KL of n elements of a batch row: w times what all rows share,
// and `gain` besides where they are `open` (null: all are).
template <class R>
VK_FN void short_row_coefficients(const R* __restrict shared, const uint8_t* __restrict open, R gain, R w,
                                  R* __restrict c, int n) {
  if (open == nullptr)
    for (int i = 0; i < n; ++i) c[i] = w * (shared[i] + gain);
  else
    for (int i = 0; i < n; ++i) c[i] = w * (open[i] ? shared[i] + gain : shared[i]);
}

template <class R>
VK_CLONES void row_coefficients(const R* shared, const uint8_t* open, R gain, R w, R* c, int n) {
  short_row_coefficients(shared, open, gain, w, c, n);
}

// The rates of n groups, from their sums.
template <class R>
VK_CLONES void rates_of(const double* __restrict sum, double divisor, R* __restrict rate, int64_t n) {
  for (int64_t i = 0; i < n; ++i) rate[i] = static_cast<R>(sum[i] / divisor);
}

// Free bits on the rates of n groups, `lambda` or (null) `free_bits` for all of them: the gates, `inverse`
// where they are open and -inverse elsewhere. Returns the sum of the clamped rates, added up as in sum_of.
template <class R>
VK_CLONES double clamp_groups(const R* __restrict rate, const R* __restrict lambda, R free_bits,
                              Penalty penalty, R inverse, R* __restrict gate, int64_t n) {
  double part[kSums] = {};
  const auto add = [&](int64_t i, int many) VK_LAMBDA {
    for (int j = 0; j < many; ++j) {
      const R least = lambda ? lambda[i + j] : free_bits;
      gate[i + j] = rate[i + j] >= least ? inverse : -inverse;
      part[j] += static_cast<double>(clamp_value(rate[i + j], least, penalty));
    }
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) add(i, kSums);
  add(i, static_cast<int>(n - i));
  return tree_of(part);
}

}  // namespace vk::cpu
