// Random problems for the kernels, over every axis: what they are told, and the memory that they work on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "guarded.h"
#include "problem.h"

namespace shim {

using Random = std::mt19937_64;

inline int64_t between(Random& r, int64_t lo, int64_t hi) {
  return lo + static_cast<int64_t>(r() % static_cast<uint64_t>(hi - lo + 1));
}
inline bool chance(Random& r, double p) { return static_cast<double>(r() >> 11) * 0x1p-53 < p; }
inline double uniform(Random& r, double lo, double hi) {
  return lo + (hi - lo) * static_cast<double>(r() >> 11) * 0x1p-53;
}
template <class T, size_t N>
T one_of(Random& r, const T (&list)[N]) {
  return list[r() % N];
}

// How a tensor lies in memory.
enum class Lie { dense, halves, padded, gapped, other_order, batch_inner, expanded };
inline const char* name_of(Lie lie) {
  const char* names[] = {"dense", "halves", "padded", "gapped", "other_order", "batch_inner", "expanded"};
  return names[static_cast<int>(lie)];
}

struct Case {
  uint64_t seed = 0;  // of the values
  int64_t B = 1, G = 1, S = 1, K = 1;
  bool groups_inner = false;
  vk::DType dtype = vk::DType::f32;
  vk::Param param = vk::Param::logvar;
  bool bounded = false;
  bool sample = true, kl = true, prior = false;
  enum class State { device, host, host_kept } state = State::device;
  enum class Weight { none, random, zero } weight = Weight::none;
  vk::Clamp clamp = vk::Clamp::none;
  vk::Penalty penalty = vk::Penalty::floor;
  bool bits_per_group = false;
  vk::Reduction reduction = vk::Reduction::batchmean;
  bool group_sums = false;
  bool balance = false;
  bool near_prior = false;  // values near collapse, where the KL is tiny
  bool nan = false;         // one element is not a number
  Lie mu = Lie::dense, scale = Lie::dense, prior_lie = Lie::dense, gradients = Lie::dense;
  int misaligned = 0;  // by so many elements: all tensors of the shape of mu
  bool use_z = true, use_kl = true, use_rate = true;
  bool no_grad_mu = false, no_grad_scale = false, no_prior_gradients = false;

  int64_t numel() const { return B * G * S; }
  bool drawn() const { return sample && K > 0 && numel() > 0; }

  std::string text() const {
    const char* dtypes[] = {"f32", "f64", "bf16", "f16"};
    const char* params[] = {"logvar", "log_std", "std", "softplus"};
    const char* clamps[] = {"none", "batch", "sample"};
    const char* penalties[] = {"floor", "hinge", "mask"};
    const char* reductions[] = {"batchmean", "sum", "mean", "none", "elementwise"};
    const char* states[] = {"device", "host", "host_kept"};
    const char* weights[] = {"none", "random", "zero"};
    std::string t = "[" + std::to_string(B) + "," + std::to_string(G) + "," + std::to_string(S) + "]";
    t += groups_inner ? " groups_inner" : "";
    t += std::string(" ") + dtypes[static_cast<int>(dtype)] + " " + params[static_cast<int>(param)];
    if (sample) t += " K=" + std::to_string(K) + " state=" + states[static_cast<int>(state)];
    t += std::string(" mu=") + name_of(mu) + " scale=" + name_of(scale) + " grads=" + name_of(gradients);
    if (misaligned != 0) t += " misaligned=" + std::to_string(misaligned);
    if (bounded) t += " bounded";
    if (near_prior) t += " near_prior";
    if (nan) t += " nan";
    if (kl) {
      t += std::string(" kl clamp=") + clamps[static_cast<int>(clamp)] + " " +
           penalties[static_cast<int>(penalty)] + (bits_per_group ? " per_group" : "") + " " +
           reductions[static_cast<int>(reduction)] + " weight=" + weights[static_cast<int>(weight)];
      if (group_sums) t += " group_sums";
      if (prior) t += std::string(" prior=") + name_of(prior_lie) + (balance ? " balance" : "");
      if (no_prior_gradients) t += " no_prior_gradients";
    }
    t += std::string(" backward=") + (use_z ? "z" : "") + (use_kl ? "k" : "") + (use_rate ? "r" : "");
    if (no_grad_mu) t += " no_grad_mu";
    if (no_grad_scale) t += " no_grad_scale";
    return t;
  }
};

// `usual`: sizes that vectors fit.
inline void draw_sizes(Random& r, Case& c, int64_t most, bool usual) {
  switch (usual ? between(r, 0, 2) : between(r, 3, 10)) {
    case 0:  // [B, D]
      c.B = between(r, 1, 12) * between(r, 1, 12);
      c.G = 8 * between(r, 1, 40);
      break;
    case 1:  // images by channel, channels first or last
      c.B = between(r, 1, 6);
      c.G = 8 * between(r, 1, 4);
      c.S = 8 * between(r, 1, 40);
      c.groups_inner = chance(r, 0.5);
      break;
    case 2:  // few, long sums
      c.B = between(r, 1, 4);
      c.G = between(r, 1, 3);
      c.S = 8 * between(r, 60, 400);
      break;
    case 3:  // [B, D]
      c.B = between(r, 1, 40);
      c.G = between(r, 1, 70);
      break;
    case 4:  // wide
      c.B = between(r, 1, 6);
      c.G = between(r, 100, 3000);
      break;
    case 5:  // tall
      c.B = between(r, 100, 3000);
      c.G = between(r, 1, 9);
      break;
    case 6:  // images by channel
      c.B = between(r, 1, 6);
      c.G = between(r, 1, 9);
      c.S = between(r, 1, 200);
      break;
    case 7:  // few, long sums
      c.B = between(r, 1, 3);
      c.G = between(r, 1, 3);
      c.S = between(r, 500, 9000);
      break;
    case 8:  // channels last
      c.B = between(r, 1, 6);
      c.G = between(r, 1, 70);
      c.S = between(r, 2, 70);
      c.groups_inner = true;
      break;
    case 9:  // one group
      c.B = between(r, 1, 40);
      c.S = between(r, 1, 700);
      c.groups_inner = chance(r, 0.3);
      break;
    default:  // nothing in it
      c.B = between(r, 0, 3);
      c.G = between(r, 0, 3);
      c.S = between(r, 0, 3);
      if (c.numel() > 0) c.B = 300;
  }
  c.groups_inner = c.groups_inner && c.S > 1;
  // Where there is time for it, sums that many blocks share.
  if (chance(r, 0.1) && c.numel() > 0 && c.numel() * 4 < most) c.B *= between(r, 2, most / c.numel());
  while (c.numel() > most) (c.B > 1 ? c.B : (c.S > 1 ? c.S : c.G)) /= 2;
}

// `usual`: what the fast kernels are for, at times with a learned prior.
inline void draw_options(Random& r, Case& c, bool usual) {
  const vk::DType dtypes[] = {vk::DType::f32, vk::DType::bf16, vk::DType::f16, vk::DType::f64};
  c.dtype = dtypes[between(r, 0, usual ? 2 : 3)];
  const vk::Param params[] = {vk::Param::logvar, vk::Param::logvar, vk::Param::log_std, vk::Param::std,
                              vk::Param::softplus};
  c.param = params[between(r, 0, 4)];
  c.bounded = chance(r, 0.3);
  c.sample = chance(r, 0.75);
  c.kl = !c.sample || chance(r, 0.8);
  const int64_t samples[] = {1, 1, 1, 1, 0, 2, 3, 5};
  c.K = c.sample && !usual ? one_of(r, samples) : 1;
  c.state = static_cast<Case::State>(between(r, 0, 2));
  c.near_prior = chance(r, 0.15);
  c.nan = chance(r, 0.05) && c.numel() > 0;
  if (!c.kl) return;
  c.prior = chance(r, 0.35);
  c.balance = c.prior && chance(r, 0.4);
  c.clamp = static_cast<vk::Clamp>(between(r, 0, usual ? 1 : 2));
  c.penalty = static_cast<vk::Penalty>(between(r, 0, 2));
  c.bits_per_group = c.clamp != vk::Clamp::none && chance(r, 0.4);
  const vk::Reduction scalar[] = {vk::Reduction::batchmean, vk::Reduction::sum, vk::Reduction::mean};
  c.reduction = one_of(r, scalar);
  if (!usual && c.clamp != vk::Clamp::batch && chance(r, 0.2)) c.reduction = vk::Reduction::none;
  if (!usual && c.clamp == vk::Clamp::none && chance(r, 0.2)) c.reduction = vk::Reduction::elementwise;
  const bool rows = c.reduction == vk::Reduction::none || c.reduction == vk::Reduction::elementwise;
  if (!rows && chance(r, 0.4)) c.weight = chance(r, 0.1) ? Case::Weight::zero : Case::Weight::random;
  c.group_sums = chance(r, 0.2);
}

inline void draw_memory(Random& r, Case& c, bool usual) {
  if (usual || chance(r, 0.3)) {
    if (chance(r, 0.3)) c.mu = c.scale = c.gradients = Lie::halves;
    return;
  }
  const Lie lies[] = {Lie::dense,       Lie::halves,      Lie::padded,  Lie::gapped,
                      Lie::other_order, Lie::batch_inner, Lie::expanded};
  c.mu = one_of(r, lies);
  c.scale = c.mu == Lie::halves ? c.mu : one_of(r, lies);
  if (c.scale == Lie::halves) c.scale = c.mu;
  c.prior_lie = c.prior ? one_of(r, lies) : Lie::dense;
  if (c.prior_lie == Lie::halves) c.prior_lie = Lie::expanded;
  if (chance(r, 0.4)) c.misaligned = static_cast<int>(between(r, 1, 7));
  const Lie gradients[] = {Lie::dense, Lie::dense, Lie::halves, Lie::padded, Lie::gapped};
  c.gradients = c.mu == Lie::halves ? Lie::halves : one_of(r, gradients);
}

inline void draw_gradients(Random& r, Case& c) {
  c.use_z = c.sample && chance(r, 0.8);
  c.use_kl = c.kl && chance(r, 0.8);
  c.use_rate = c.kl && chance(r, 0.4);
  if (!c.use_z && !c.use_kl && !c.use_rate) (c.sample ? c.use_z : c.use_kl) = true;
  // What autograd leaves out: the gradient that is the incoming one; and what kernels allow besides.
  const bool kl_used = c.use_kl || c.use_rate;
  c.no_grad_mu = c.gradients != Lie::halves && chance(r, kl_used ? 0.1 : 0.5);
  c.no_grad_scale = !c.no_grad_mu && chance(r, 0.05);
  c.no_prior_gradients = c.prior && chance(r, 0.3);
}

// `most`: elements of mu.
inline Case random_case(uint64_t seed, int64_t most) {
  Random r(seed * 0x9E3779B97F4A7C15u + 1);
  Case c;
  c.seed = r();
  const bool usual = chance(r, 0.4);
  draw_sizes(r, c, most, usual);
  draw_options(r, c, usual);
  draw_memory(r, c, usual);
  draw_gradients(r, c);
  return c;
}

// ---- memory ----------------------------------------------------------------------------------------------

inline int64_t size_of(vk::DType dtype) {
  return dtype == vk::DType::f64 ? 8 : (dtype == vk::DType::f32 ? 4 : 2);
}
inline vk::DType compute_type(vk::DType dtype) {
  return dtype == vk::DType::f64 ? vk::DType::f64 : vk::DType::f32;
}

template <class T>
double load(const uint8_t* at) {
  T x;
  std::memcpy(&x, at, sizeof(x));
  return static_cast<double>(x);
}
template <class T>
void store(uint8_t* at, T x) {
  std::memcpy(at, &x, sizeof(x));
}

// Elements in guarded memory, in one buffer or, of packed tensors, a part of it.
struct Array {
  vk::DType dtype = vk::DType::f32;
  int64_t width = 1;  // bytes of an element
  std::shared_ptr<Guarded> memory;
  int64_t first = 0;   // where its element 0 is
  vk::Strides stride;  // of [B, G, S]

  Array() = default;
  Array(vk::DType dtype, int64_t count, uint8_t fill, int64_t misaligned = 0)
      : dtype(dtype),
        width(size_of(dtype)),
        memory(std::make_shared<Guarded>(static_cast<size_t>(count * width), fill,
                                         static_cast<size_t>(misaligned * width))) {}
  static Array bytes(int64_t count, uint8_t fill) {
    Array a;
    a.memory = std::make_shared<Guarded>(static_cast<size_t>(count), fill);
    return a;
  }

  explicit operator bool() const { return memory != nullptr; }
  uint8_t* data() const { return memory ? memory->data() + first * width : nullptr; }
  int64_t count() const { return static_cast<int64_t>(memory->size()) / width; }
  int64_t offset(int64_t b, int64_t g, int64_t s) const { return b * stride.b + g * stride.g + s * stride.s; }

  double get(int64_t i) const {
    const uint8_t* at = data() + i * width;
    if (width == 1) return *at;
    switch (dtype) {
      case vk::DType::f32:
        return load<float>(at);
      case vk::DType::f64:
        return load<double>(at);
      case vk::DType::bf16:
        return load<__nv_bfloat16>(at);
      default:
        return load<__half>(at);
    }
  }
  void set(int64_t i, double x) const {
    uint8_t* at = data() + i * width;
    switch (dtype) {
      case vk::DType::f32:
        return store(at, static_cast<float>(x));
      case vk::DType::f64:
        return store(at, x);
      case vk::DType::bf16:
        return store(at, __nv_bfloat16(static_cast<float>(x)));
      default:
        return store(at, __half(static_cast<float>(x)));
    }
  }
};

// Part 0 or 1 (mu or the second tensor) of a tensor of the shape of mu, as `lie` says; `packed` has the
// other.
inline Array lay(const Case& c, Lie lie, uint8_t fill, int part = 0, const Array& packed = {}) {
  const int64_t B = c.B, G = c.G, S = c.S, pad = 1 + static_cast<int64_t>(c.seed % 5);
  const bool inner = c.groups_inner;
  const auto dense = [B](int64_t G, int64_t S, bool inner) {
    return inner ? vk::Strides{G * S, 1, G} : vk::Strides{G * S, S, 1};
  };
  vk::Strides s = dense(G, S, inner);
  int64_t first = 0, count = c.numel();
  switch (lie) {
    case Lie::halves:  // of the latent axes as a whole, or of the innermost one
      count *= 2;
      if (c.seed / 5 % 2 == 0) {
        s.b *= 2;
        first = part * G * S;
      } else if (inner || S == 1) {
        s = S == 1 ? vk::Strides{2 * G, 1, 1} : dense(2 * G, S, true);
        first = part * G;
      } else {
        s = dense(G, 2 * S, false);
        first = part * S;
      }
      break;
    case Lie::padded:
      if (S == 1)
        s = {G + pad, 1, 1};
      else
        s = inner ? vk::Strides{S * (G + pad), 1, G + pad} : vk::Strides{G * (S + pad), S + pad, 1};
      break;
    case Lie::gapped:
      s = {2 * s.b, 2 * s.g, 2 * s.s};
      break;
    case Lie::other_order:
      s = dense(G, S, !inner);
      break;
    case Lie::batch_inner:
      s = {1, s.g * B, s.s * B};
      break;
    case Lie::expanded:
      s.b = 0;
      break;
    case Lie::dense:
      break;
  }
  if (lie != Lie::halves) count = count == 0 ? 0 : 1 + (B - 1) * s.b + (G - 1) * s.g + (S - 1) * s.s;
  Array a = packed ? packed : Array(c.dtype, count, fill, c.misaligned);
  a.first = first;
  a.stride = s;
  return a;
}

// Calls f(b, g, s, i) for each element in the order of z's storage, i counting.
template <class F>
void for_elements(const Case& c, const F& f) {
  const int64_t O = c.groups_inner ? c.S : c.G, I = c.groups_inner ? c.G : c.S;
  int64_t i = 0;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t o = 0; o < O; ++o)
      for (int64_t n = 0; n < I; ++n, ++i) c.groups_inner ? f(b, n, o, i) : f(b, o, n, i);
}

}  // namespace shim
